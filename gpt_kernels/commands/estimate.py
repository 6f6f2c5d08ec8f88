"""Memory, FLOPs, traffic and predicted time of a model's forward and backward, eager and on our kernels, without a run."""

from __future__ import annotations

from dataclasses import dataclass

from ..arguments import option, positive
from ..names import DTYPES


@dataclass
class Settings:
    model: str = option(help="gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder with a config.json", metavar="MODEL")
    batch: int = option(1, "sequences", type=positive)
    seq: int = option(1024, "tokens of each", type=positive)
    device: str = option("cpu", "this CPU, measured, or the published peaks of a100, h100, h200, rtx4090 or l4", metavar="NAME")
    dtype: str = option(DTYPES[0], "of weights and activations", choices=DTYPES)
    json: bool = option(False, "the same as JSON")


def run(settings: Settings) -> int:
    from ..errors import UserError
    from ..estimate import estimate
    from ..models.config import PRESETS
    from ..workflows.models import config_in

    model = settings.model if settings.model in PRESETS else config_in(settings.model)
    model = settings.model if model is None else model
    try:
        found = estimate(model, settings.batch, settings.seq, settings.device, settings.dtype, show=False)
    except ValueError as error:
        raise UserError(str(error).removeprefix("estimate: ")) from None
    print(found.to_json() if settings.json else found)
    return 0
