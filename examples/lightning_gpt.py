"""A GPT in a LightningModule: nothing of it is special. pip install lightning; python examples/lightning_gpt.py"""

import lightning
import torch

import gpt_kernels


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = gpt_kernels.GPT(gpt_kernels.GPTConfig(vocab_size=128, block_size=64, n_embd=64, n_layer=2, n_head=2))

    def training_step(self, batch, _):
        loss = self.model(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())[1]
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


if __name__ == "__main__":
    rows = torch.frombuffer(bytearray(open(__file__, "rb").read()), dtype=torch.uint8).long().unfold(0, 65, 7) % 128
    trainer = lightning.Trainer(max_epochs=2, accelerator="auto", logger=False, enable_checkpointing=False)
    trainer.fit(Module(), torch.utils.data.DataLoader(rows, batch_size=8, shuffle=True))
    print(f"loss {trainer.callback_metrics['loss']:.4f}")
