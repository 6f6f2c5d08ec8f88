"""What runs on our kernels in a GPT-2 with fresh weights, what each candidate costs here, and why it was chosen."""

from __future__ import annotations

from dataclasses import dataclass

from ..arguments import device, option, positive
from ..names import DTYPES


@dataclass
class Settings:
    model: str = option(help="gpt2, gpt2-medium, gpt2-large or gpt2-xl", metavar="MODEL")
    batch: int = option(1, "sequences", type=positive)
    seq: int = option(256, "tokens of each", type=positive)
    layers: int | None = option(None, "so many instead of the model's: layers are alike", type=positive, metavar="N")
    dtype: str = option(DTYPES[0], "of the products (autocast)", choices=DTYPES)
    compile: bool = option(True, "leave torch.compile out")
    device: str = device()
    out: str | None = option(None, "for explain.html and explain.json", metavar="DIR")


def run(settings: Settings) -> int:
    import torch

    from .. import process
    from ..arguments import chosen_device
    from ..errors import UserError, need
    from ..explain import explain
    from ..models.config import PRESETS, GPTConfig
    from ..workflows.models import autocast, gpt2

    if settings.model not in PRESETS:
        raise UserError(f"unknown model {settings.model!r}, expected one of {', '.join(PRESETS)}")
    need("bench", "transformers", *["jinja2"] * (settings.out is not None))
    folder = None if settings.out is None else process.out_folder(settings.out)
    to, config = chosen_device(settings.device), GPTConfig.preset(settings.model)
    if settings.seq > config.block_size:
        raise UserError(f"--seq {settings.seq}: {settings.model} has {config.block_size} positions")
    sizes = PRESETS[settings.model]
    model = gpt2(
        vocab=config.vocab_size, context=config.block_size, width=sizes["n_embd"], heads=sizes["n_head"],
        layers=settings.layers or sizes["n_layer"], dropout=0.1,
    )  # fmt: skip
    model = model.to(to).train()
    ids = torch.randint(config.vocab_size, (settings.batch, settings.seq), device=to)
    with autocast(ids, getattr(torch, settings.dtype)):
        found = explain(model, ids, compile=settings.compile)
    if folder is not None:
        found.write(folder / "explain.html")
        process.write(folder / "explain.json", found.to_json())
        print(f"written: explain.html and explain.json in {folder}")
    return 0
