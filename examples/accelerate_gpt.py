"""A patched Hugging Face model under Accelerate. pip install accelerate transformers; python examples/accelerate_gpt.py"""

import accelerate
import torch
import transformers

import gpt_kernels

accelerator = accelerate.Accelerator()
sizes = dict(vocab_size=128, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4)
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=2))
print(gpt_kernels.patch(model))  # before prepare, which may wrap it
rows = torch.frombuffer(bytearray(open(__file__, "rb").read()), dtype=torch.uint8).long().unfold(0, 64, 7) % 128
model, optimizer, loader = accelerator.prepare(
    model, torch.optim.AdamW(model.parameters(), lr=1e-3), torch.utils.data.DataLoader(rows, batch_size=8, shuffle=True)
)
for _ in range(2):
    for batch in loader:
        loss = model(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
accelerator.print(f"loss {loss.item():.4f}")
