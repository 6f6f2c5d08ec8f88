"""What runs on our kernels in a model with fresh weights, what each candidate costs here, and why it was chosen."""

from __future__ import annotations

from dataclasses import dataclass

from ..arguments import device, option, positive
from ..names import DTYPES


@dataclass
class Settings:
    model: str = option(help="gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder with a config.json", metavar="MODEL")
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
    from ..workflows.models import autocast, config_in, gpt2, of_config

    need("bench", "transformers", *["jinja2"] * (settings.out is not None))
    folder = None if settings.out is None else process.out_folder(settings.out)
    to = chosen_device(settings.device)
    if settings.model in PRESETS:
        config, sizes = GPTConfig.preset(settings.model), PRESETS[settings.model]
        vocab, positions = config.vocab_size, config.block_size
        model = gpt2(
            vocab=vocab, context=positions, width=sizes["n_embd"], heads=sizes["n_head"],
            layers=settings.layers or sizes["n_layer"], dropout=0.1,
        )  # fmt: skip
    elif (found_config := config_in(settings.model)) is not None:
        if settings.layers:
            name = next((n for n in ("num_hidden_layers", "n_layer", "num_layers") if hasattr(found_config, n)), None)
            if name is None:
                raise UserError(f"--layers: {type(found_config).__name__} does not say how many it has")
            setattr(found_config, name, settings.layers)
        text = found_config.get_text_config()
        vocab, positions = text.vocab_size, getattr(text, "max_position_embeddings", settings.seq)
        torch.manual_seed(0)
        model = of_config(found_config)
    else:
        raise UserError(
            f"unknown model {settings.model!r}, expected one of {', '.join(PRESETS)}, or a folder with a config.json"
        )
    if settings.seq > positions:
        raise UserError(f"--seq {settings.seq}: {settings.model} has {positions} positions")
    model = model.to(to).train()
    ids = torch.randint(vocab, (settings.batch, settings.seq), device=to)
    with autocast(ids, getattr(torch, settings.dtype)):
        found = explain(model, ids, compile=settings.compile)
    if folder is not None:
        found.write(folder / "explain.html")
        process.write(folder / "explain.json", found.to_json())
        print(f"written: explain.html and explain.json in {folder}")
    return 0
