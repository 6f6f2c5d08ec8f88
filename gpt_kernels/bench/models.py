"""A Hugging Face GPT-2 with fresh weights, eager, compiled and patched, and our GPT: a training step, and generation.

Checked first: `verify` on the very tokens of the step. A generated token counts as right where eager's own logits, on the same
tokens before it, rank it first or as good as first.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

import gpt_kernels

from ..accuracy import layers_apart
from ..workflows.models import autocast, gpt2, next_token_loss
from .measure import Settings, Trial, Variant, first_line, on_gpu


@dataclass(frozen=True)
class Sizes:
    layers: int
    width: int
    heads: int
    vocab: int
    batch: int
    length: int
    prompt: int
    new: int


FULL = Sizes(6, 768, 12, 50257, 2, 512, 32, 32)
TINY = Sizes(2, 64, 2, 512, 4, 32, 16, 16)  # costs what calling costs
QUICK = Sizes(2, 256, 4, 8192, 2, 256, 16, 16)
GPU = Sizes(12, 768, 12, 50257, 16, 1024, 32, 128)


def sizes_for(settings: Settings) -> Sizes:
    return QUICK if settings.quick else GPU if settings.device == "cuda" else FULL


def build(sizes: Sizes, dropout: float) -> Any:
    context = max(sizes.length, sizes.prompt + sizes.new)
    model = gpt2(vocab=sizes.vocab, context=context, width=sizes.width, layers=sizes.layers, heads=sizes.heads, dropout=dropout)
    return model.to(torch.get_default_device())


def patched(model: Any) -> Any:
    gpt_kernels.patch(model)
    return model


@dataclass
class ModelCase:
    """What measure() asks of a Case, for a whole model."""

    op: str
    sizes: Sizes
    dtype: torch.dtype
    shape: str
    directions: tuple[str, ...]
    start: Callable[[ModelCase], tuple[Any, torch.Tensor]]  # a model from its seed, and its tokens: the same in every process
    variant: Callable[[ModelCase, str, Any, torch.Tensor], Variant]  # made of that model, which it may change
    make: Callable[[ModelCase, Settings], Trial]
    main: bool = True
    length: int | None = None
    apart: ClassVar[bool] = True  # its memory is measured by memory_apart()

    def served(self) -> str:
        return str(gpt_kernels.where("attention_fwd")["CUDA" if on_gpu() else "CPU"])

    def trial(self, direction: str, settings: Settings) -> Trial:
        return self.make(self, settings)

    def alone(self, name: str) -> Variant:
        """The variant that a trial has by this name, without the others."""
        return self.variant(self, name, *self.start(self))


def refusals(settings: Settings) -> dict[str, str]:
    """Peers and backends are compared op by op."""
    return dict.fromkeys((*settings.against, *settings.backends), "compared op by op, not in a whole model")


def parameters(model: nn.Module, position_embedding: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in position_embedding.parameters())


# ---- training ----


def wrong_step(model: Any, ids: torch.Tensor, dtype: torch.dtype) -> str | None:
    report = gpt_kernels.verify(copy.deepcopy(model).to(dtype), {"input_ids": ids, "labels": ids}, show=False)
    return None if report.ok else str(report).splitlines()[-1]


def step(model: Any, ids: torch.Tensor, dtype: torch.dtype) -> Callable[[], None]:
    """Forward, backward and the optimizer; weights in float32, a 16-bit dtype by autocast."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def call():
        with autocast(ids, dtype):
            loss = next_token_loss(model, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return call


def training_start(case: ModelCase) -> tuple[Any, torch.Tensor]:
    s = case.sizes
    return build(s, dropout=0.1).train(), torch.randint(s.vocab, (s.batch, s.length))


def training_variant(case: ModelCase, name: str, model: Any, ids: torch.Tensor) -> Variant:
    """The loss is part of what is compiled, which is compiled at its first call."""
    if name == "GPT":
        model = gpt_kernels.GPT.from_hf(model).train()
    elif name == "ours":
        patched(model)
    elif name == "compile":
        model = torch.compile(model)
    return Variant(step(model, ids, case.dtype))


def training(case: ModelCase, settings: Settings) -> Trial:
    s = case.sizes
    eager, ids = case.start(case)
    tokens, positions = ids.numel(), eager.transformer.wpe
    # 6 flops per weight and token, and the attention's products: as GPT.estimate_flops
    flops = 3 * tokens * (2 * parameters(eager, positions) + 4 * s.layers * s.width * s.length)
    moved = 4 * sum(p.numel() for p in eager.parameters()) * 8  # weights, gradients and AdamW's two moments, read and written
    trial = Trial({}, moved, flops, refusals(settings), wrong_step(eager, ids, case.dtype))
    if trial.mismatch:
        return trial
    for name in ("eager", "ours", "GPT", *["compile"] * settings.compile):
        try:
            trial.variants[name] = case.variant(case, name, copy.deepcopy(eager), ids)
        except Exception as error:
            trial.absent[name] = first_line(error)
    return trial


# ---- generation ----


def wrong_tokens(model: Any, ids: torch.Tensor, prompt: int, dtype: torch.dtype) -> str | None:
    """Every token after the prompt must be eager's own first choice, or as good."""
    with torch.no_grad():
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits[:, prompt - 1 :].float()
    chosen = logits.gather(-1, ids[:, prompt:, None])[..., 0]
    best, largest = logits.amax(-1), logits.abs().max().item()
    behind = (best - chosen).max().item()
    allowed = layers_apart(largest, model.config.n_layer, dtype)
    return None if behind <= allowed else f"a token is {behind:.3e} behind eager's best, allowed {allowed:.3e}"


def decoding_start(case: ModelCase) -> tuple[Any, torch.Tensor]:
    s = case.sizes
    return build(s, dropout=0.0).to(case.dtype).eval(), torch.randint(1, s.vocab, (1, s.prompt))


def decoding_variant(case: ModelCase, name: str, model: Any, prompt: torch.Tensor) -> Variant:
    new = case.sizes.new
    if name == "GPT":
        own = gpt_kernels.GPT.from_hf(model).eval()
        return Variant(lambda: own.generate(prompt, max_new_tokens=new, temperature=0.0))
    if name == "ours":
        patched(model)
    fixed = {"do_sample": False, "pad_token_id": 0, "min_new_tokens": new, "max_new_tokens": new}
    return Variant(lambda: model.generate(prompt, attention_mask=torch.ones_like(prompt), **fixed))


def decoding(case: ModelCase, settings: Settings) -> Trial:
    s = case.sizes
    eager, prompt = case.start(case)
    variants = {name: case.variant(case, name, copy.deepcopy(eager), prompt) for name in ("eager", "ours", "GPT")}
    weights = parameters(eager, eager.transformer.wpe)
    cached = 2 * s.layers * s.width * (s.prompt + s.new // 2)
    trial = Trial({}, (weights + cached) * case.dtype.itemsize, 2 * (weights + cached), refusals(settings), units=s.new)
    wrong = {name: wrong_tokens(eager, variants[name].call(), s.prompt, case.dtype) for name in ("ours", "GPT")}
    trial.mismatch = wrong["ours"]
    if trial.mismatch:
        return trial
    trial.variants = variants
    if settings.compile:
        trial.absent["compile"] = "generation is not compiled: its shapes change at every token"
    if wrong["GPT"]:
        del trial.variants["GPT"]
        trial.absent["GPT"] = f"wrong: {wrong['GPT']}"
    return trial


def gpt(settings: Settings) -> Iterator[ModelCase]:
    full, first = sizes_for(settings), settings.dtypes[:1]
    for s, dtypes in ((full, first),) if settings.quick else ((full, settings.dtypes), (TINY, first)):
        shape = f"{s.layers} layers, width {s.width}, {s.batch}x{s.length} tokens"
        for name in dtypes:
            yield ModelCase("gpt", s, getattr(torch, name), shape, ("step",), training_start, training_variant, training)


def decode(settings: Settings) -> Iterator[ModelCase]:
    s = sizes_for(settings)
    shape = f"{s.layers} layers, width {s.width}, {s.new} tokens after {s.prompt}"
    for name in settings.dtypes[:1] if settings.quick else settings.dtypes:
        yield ModelCase("decode", s, getattr(torch, name), shape, ("token",), decoding_start, decoding_variant, decoding)
