"""Hugging Face's models with fresh weights, eager, compiled and patched: a GPT-2, and our GPT beside it, in a training step
and in generation; a Llama in a training step; a BERT forward and backward. Beside each its matrix products alone (products.py).

Checked first: `verify` on the very tokens of the step. A generated token counts as right where eager's own logits, on the same
tokens before it, rank it first or as good as first.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn

import gpt_kernels

from ..accuracy import layers_apart
from ..workflows.models import autocast, gpt2, next_token_loss
from .measure import Settings, Trial, Variant, first_line, on_gpu
from .products import Products
from .settings import PRODUCTS


@dataclass(frozen=True)
class Sizes:
    layers: int
    width: int
    heads: int
    vocab: int
    batch: int
    length: int
    prompt: int = 0
    new: int = 0
    kv_heads: int = 0
    inner: int = 0


FULL = Sizes(6, 768, 12, 50257, 2, 512, 32, 32)
TINY = Sizes(2, 64, 2, 512, 4, 32, 16, 16)  # costs what calling costs
QUICK = Sizes(2, 256, 4, 8192, 2, 256, 16, 16)
GPU = Sizes(12, 768, 12, 50257, 16, 1024, 32, 128)
# quick, on a CPU, on a GPU
LLAMA = (
    Sizes(2, 256, 4, 8192, 2, 256, kv_heads=2, inner=704),
    Sizes(6, 512, 8, 32000, 2, 512, kv_heads=2, inner=1408),
    Sizes(12, 1024, 16, 32000, 8, 1024, kv_heads=4, inner=2816),
)
BERT = (
    Sizes(2, 256, 4, 8192, 2, 128, inner=1024),
    Sizes(12, 768, 12, 30522, 4, 128, inner=3072),
    Sizes(12, 768, 12, 30522, 32, 512, inner=3072),
)


def sizes_for(settings: Settings, of: tuple[Sizes, Sizes, Sizes] | None = None) -> Sizes:
    quick, full, gpu = of or (QUICK, FULL, GPU)
    return quick if settings.quick else gpu if settings.device == "cuda" else full


def build(sizes: Sizes, dropout: float) -> Any:
    context = max(sizes.length, sizes.prompt + sizes.new)
    model = gpt2(vocab=sizes.vocab, context=context, width=sizes.width, layers=sizes.layers, heads=sizes.heads, dropout=dropout)
    return model.to(torch.get_default_device())


def build_llama(sizes: Sizes) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=sizes.vocab, hidden_size=sizes.width, intermediate_size=sizes.inner, num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads, num_key_value_heads=sizes.kv_heads, max_position_embeddings=sizes.length,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    return model.to(torch.get_default_device())


def build_bert(sizes: Sizes) -> Any:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=sizes.vocab, hidden_size=sizes.width, intermediate_size=sizes.inner, num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads, max_position_embeddings=sizes.length,
    )  # fmt: skip
    model: Any = BertForMaskedLM(config)
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
    rivals: tuple[str, ...] = ("eager", "ours", "GPT")  # and torch.compile
    loss: Callable[[Any, torch.Tensor], torch.Tensor] = next_token_loss
    optimizer: bool = True
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


def masked_loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, labels=ids).loss


def step(case: ModelCase, model: Any, ids: torch.Tensor) -> Callable[[], None]:
    """Forward, backward and, where the case has one, the optimizer; weights in float32, a 16-bit dtype by autocast."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def call():
        with autocast(ids, case.dtype):
            loss = case.loss(model, ids)
        loss.backward()
        if case.optimizer:
            optimizer.step()
        optimizer.zero_grad()

    return call


def training_start(case: ModelCase) -> tuple[Any, torch.Tensor]:
    s = case.sizes
    model = {"llama": build_llama, "bert": build_bert}.get(case.op, functools.partial(build, dropout=0.1))(s)
    return model.train(), torch.randint(s.vocab, (s.batch, s.length))


def training_variant(case: ModelCase, name: str, model: Any, ids: torch.Tensor) -> Variant:
    """The loss is part of what is compiled, which is compiled at its first call."""
    if name == "GPT":
        model = gpt_kernels.GPT.from_hf(model).train()
    elif name == "ours":
        patched(model)
    elif name == "compile":
        model = torch.compile(model)
    return Variant(step(case, model, ids))


def training(case: ModelCase, settings: Settings) -> Trial:
    s = case.sizes
    eager, ids = case.start(case)
    products = Products()
    with products:
        case.variant(case, "eager", copy.deepcopy(eager), ids).call()
    # and the products of attention, which are fused with its softmax: two forward, four backward
    flops = products.flops + 3 * 4 * ids.numel() * s.layers * s.width * s.length
    # weights, gradients and AdamW's two moments, read and written; without it weights, twice, and gradients
    moved = 4 * sum(p.numel() for p in eager.parameters()) * (8 if case.optimizer else 3)
    trial = Trial({}, moved, flops, refusals(settings), wrong_step(eager, ids, case.dtype))
    if trial.mismatch:
        return trial
    for name in (*case.rivals, *["compile"] * settings.compile):
        try:
            trial.variants[name] = case.variant(case, name, copy.deepcopy(eager), ids)
        except Exception as error:
            trial.absent[name] = first_line(error)
    trial.variants[PRODUCTS] = Variant(products)
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
    products = Products()
    with products:
        variants["eager"].call()
    trial.variants[PRODUCTS] = Variant(products)
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


def llama(settings: Settings) -> Iterator[ModelCase]:
    s = sizes_for(settings, LLAMA)
    shape = f"{s.layers} layers, width {s.width}, {s.heads}/{s.kv_heads} heads, {s.batch}x{s.length} tokens"
    for name in settings.dtypes[:1] if settings.quick else settings.dtypes:
        made = ModelCase("llama", s, getattr(torch, name), shape, ("step",), training_start, training_variant, training)
        yield replace(made, rivals=("eager", "ours"))


def bert(settings: Settings) -> Iterator[ModelCase]:
    s = sizes_for(settings, BERT)
    shape = f"{s.layers} layers, width {s.width}, {s.batch}x{s.length} tokens"
    for name in settings.dtypes[:1] if settings.quick else settings.dtypes:
        made = ModelCase("bert", s, getattr(torch, name), shape, ("fwd+bwd",), training_start, training_variant, training)
        yield replace(made, rivals=("eager", "ours"), loss=masked_loss, optimizer=False)
