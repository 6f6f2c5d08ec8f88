"""What nanoGPT's users have: modules of its shapes in plain PyTorch, and a training script that knows its interface alone.

Written for these tests after the interface of nanoGPT's model.py and train.py; both take a module with GPT and GPTConfig.
"""

import contextlib
import math
import os
from dataclasses import dataclass

import numpy
import torch
from torch import nn
from torch.nn import functional as F


class LayerNorm(nn.Module):
    """With a bias or without, which nn.LayerNorm could not once."""

    def __init__(self, size, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head, self.dropout = config.n_head, config.dropout

    def forward(self, x):
        q, k, v = (t.unflatten(2, (self.n_head, -1)).transpose(1, 2) for t in self.c_attn(x).chunk(3, 2))
        p = self.dropout if self.training else 0
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=p, is_causal=True)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
                "ln_f": LayerNorm(config.n_embd, bias=config.bias),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        self.apply(self.initialise)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))

    def initialise(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def get_num_params(self, non_embedding=True):
        return sum(p.numel() for p in self.parameters()) - (self.transformer.wpe.weight.numel() if non_embedding else 0)

    def forward(self, idx, targets=None):
        positions = torch.arange(idx.shape[1], device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(positions))
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)

    def crop_block_size(self, block_size):
        self.config.block_size = block_size
        self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size])

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        params = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=device_type == "cuda")

    def estimate_mfu(self, fwdbwd_per_iter, dt):
        c = self.config
        per_token = 6 * self.get_num_params() + 12 * c.n_layer * c.n_embd * c.block_size
        return per_token * c.block_size * fwdbwd_per_iter / dt / 312e12

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        for _ in range(max_new_tokens):
            logits = self(idx[:, -self.config.block_size :])[0][:, -1] / temperature
            if top_k is not None:
                logits[logits < logits.topk(min(top_k, logits.size(-1))).values[:, [-1]]] = -float("inf")
            idx = torch.cat((idx, torch.multinomial(logits.softmax(-1), num_samples=1)), 1)
        return idx


# ---- the script ----

ITERATION = {"gradient_accumulation_steps": 2, "batch_size": 3, "grad_clip": 1.0, "eval_iters": 2, "eval_interval": 3}
MODEL = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "bias": False, "dropout": 0.0}
KEPT = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size")


def train(module, folder, init_from="scratch", iterations=7, compile=False, prepare=lambda model: model, **overrides):
    """Trains in `folder`, which holds data.bin; returns every loss it saw, the model and what it generates."""
    settings = MODEL | overrides
    device, device_type, block_size = "cpu", "cpu", settings["block_size"]
    data = numpy.memmap(os.path.join(folder, "data.bin"), dtype=numpy.uint16, mode="r")
    torch.manual_seed(1337)
    model_args = settings | {"vocab_size": None}
    best, start, checkpoint = 1e9, 0, None
    if init_from == "scratch":
        model_args["vocab_size"] = 65
        model = module.GPT(module.GPTConfig(**model_args))
    elif init_from == "resume":
        checkpoint = torch.load(os.path.join(folder, "ckpt.pt"), map_location=device)
        for name in KEPT:
            model_args[name] = checkpoint["model_args"][name]
        model = module.GPT(module.GPTConfig(**model_args))
        state, prefix = checkpoint["model"], "_orig_mod."
        for name in list(state):
            if name.startswith(prefix):
                state[name[len(prefix) :]] = state.pop(name)
        model.load_state_dict(state)
        best, start = checkpoint["best_val_loss"], checkpoint["iter_num"]
    else:
        model = module.GPT.from_pretrained(init_from, {"dropout": settings["dropout"]})
        for name in KEPT:
            model_args[name] = getattr(model.config, name)
    if block_size < model.config.block_size:
        model.crop_block_size(block_size)
        model_args["block_size"] = block_size
    model = prepare(model)
    model.to(device)
    scaler = torch.amp.GradScaler(device_type, enabled=False)
    optimizer = model.configure_optimizers(1e-1, 1e-2, (0.9, 0.95), device_type)
    if init_from == "resume":
        optimizer.load_state_dict(checkpoint["optimizer"])
    raw_model = model
    if compile:
        model = raw_model = torch.compile(model, backend="aot_eager")
    seen = []

    def batch():
        starts = torch.randint(len(data) - block_size, (ITERATION["batch_size"],))
        both = [torch.stack([torch.from_numpy(data[i + d :][:block_size].astype(numpy.int64)) for i in starts]) for d in (0, 1)]
        return [t.to(device) for t in both]

    @torch.no_grad()
    def estimate_loss():
        model.eval()
        losses = [model(*batch())[1].item() for _ in range(ITERATION["eval_iters"])]
        model.train()
        return sum(losses) / len(losses)

    for iteration in range(start, start + iterations):
        torch.manual_seed(iteration)  # the batches of an iteration are the same after a resume
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + iteration)
        if iteration % ITERATION["eval_interval"] == 0:
            seen.append(estimate_loss())
            best = min(best, seen[-1])
            torch.save({"model": raw_model.state_dict(), "optimizer": optimizer.state_dict(), "model_args": model_args,
                        "iter_num": iteration, "best_val_loss": best, "config": settings},
                       os.path.join(folder, "ckpt.pt"))  # fmt: skip
        for _ in range(ITERATION["gradient_accumulation_steps"]):
            with contextlib.nullcontext():
                _, loss = model(*batch())
                loss = loss / ITERATION["gradient_accumulation_steps"]
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), ITERATION["grad_clip"])
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        seen.append(loss.item())
        assert 0 < raw_model.estimate_mfu(ITERATION["batch_size"] * ITERATION["gradient_accumulation_steps"], 0.1) < 1
    model.eval()
    text = raw_model.generate(torch.zeros(1, 1, dtype=torch.long), 20, temperature=0.8, top_k=10)
    return seen, raw_model, text
