"""Hugging Face's GPT-2 folders, read and written: config.json and model.safetensors (or shards with an index).

Tensors are named as in transformers, `transformer.` optional; the four Conv1D weights of a block are (in, out), the
transpose of a Linear's. Only safetensors is read: a pickle can run code. Names, shapes and dtypes are compared with
config.json before anything is allocated.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from .models.config import PRESETS, GPTConfig

_ACTIVATIONS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none", "gelu_python": "none"}
_HF_FIELDS = {
    "n_positions": "block_size",
    "vocab_size": "vocab_size",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "n_inner": "n_inner",
    "resid_pdrop": "dropout",
    "attn_pdrop": "attn_dropout",
    "embd_pdrop": "embd_dropout",
    "layer_norm_epsilon": "layer_norm_eps",
    "scale_attn_weights": "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx": "scale_attn_by_inverse_layer_idx",
    "initializer_range": "initializer_range",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "tie_word_embeddings": "tie_word_embeddings",
}
# transformers' defaults where they differ from ours; older config.json files leave them out
_HF_DEFAULTS = {"resid_pdrop": 0.1, "attn_pdrop": 0.1, "embd_pdrop": 0.1}
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MAX_JSON_BYTES = 64 * 2**20


def config_from_hf(config: dict, overrides: dict) -> GPTConfig:
    if config.get("model_type") != "gpt2":
        raise ValueError(f"GPT: config has model_type {config.get('model_type')!r}, only 'gpt2' is supported")
    activation = config.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise ValueError(f"GPT: activation_function {activation!r} is not supported, only {', '.join(_ACTIVATIONS)}")
    if config.get("add_cross_attention", False) is not False:
        raise ValueError(f"GPT: config has add_cross_attention={config['add_cross_attention']}, only False is supported")
    known = {field.name for field in fields(GPTConfig)}
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise TypeError(f"GPT: {unknown[0]!r} is not a field of GPTConfig")
    values: dict[str, Any] = {"approximate": _ACTIVATIONS[activation]}
    merged = {**_HF_DEFAULTS, **config}
    values |= {ours: merged[theirs] for theirs, ours in _HF_FIELDS.items() if theirs in merged}
    return GPTConfig(**{**values, **overrides})


def config_to_hf(config: GPTConfig, dtype: torch.dtype, tied: bool) -> dict:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new" if config.approximate == "tanh" else "gelu",
        **{theirs: getattr(config, ours) for theirs, ours in _HF_FIELDS.items()},
        "tie_word_embeddings": tied,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _is_conv1d(name: str) -> bool:
    return name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))


def _hf_shapes(config: GPTConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor in a Hugging Face GPT-2 file, weights of Conv1D (in, out); lazily, n_layer may lie."""
    C, inner = config.n_embd, config.n_inner
    yield "transformer.wte.weight", (config.vocab_size, C)
    yield "transformer.wpe.weight", (config.block_size, C)
    for i in range(config.n_layer):
        for part, shape in (
            ("ln_1", (C,)), ("attn.c_attn", (C, 3 * C)), ("attn.c_proj", (C, C)),
            ("ln_2", (C,)), ("mlp.c_fc", (C, inner)), ("mlp.c_proj", (inner, C)),
        ):  # fmt: skip
            yield f"transformer.h.{i}.{part}.weight", shape
            yield f"transformer.h.{i}.{part}.bias", shape[-1:]
    yield "transformer.ln_f.weight", (C,)
    yield "transformer.ln_f.bias", (C,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, C)


def assemble(cls: type[Any], config: GPTConfig, source: dict, caller: str, dtype: torch.dtype | None = None) -> Any:
    """Check every tensor of `source` (name -> tensor, or _Slice of a file) against config, then build a cls of them."""
    prefixed = {
        name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}": t for name, t in source.items()
    }
    if len(prefixed) < len(source):
        raise ValueError(f"{caller}: a tensor is there twice, with and without the prefix transformer.")
    source = prefixed
    # old files carry the causal mask as buffers, and lm_head though it is wte
    ignored = {n for n in source if n == "lm_head.weight" or n.endswith((".attn.bias", ".attn.masked_bias"))}
    expected: dict[str, tuple[int, ...]] = {}
    dtypes = set()
    for name, shape in _hf_shapes(config):
        if name not in source:
            raise ValueError(f"{caller}: tensor {name} is missing")
        if tuple(source[name].shape) != shape:
            raise ValueError(f"{caller}: tensor {name} has shape {tuple(source[name].shape)}, config says {shape}")
        if source[name].dtype not in _DTYPES.values():
            raise ValueError(f"{caller}: tensor {name} has dtype {source[name].dtype}, expected a floating dtype")
        expected[name] = shape
        dtypes.add(source[name].dtype)
    unexpected = sorted(set(source) - set(expected) - ignored)
    if unexpected:
        raise ValueError(f"{caller}: tensor {unexpected[0]} is not part of a GPT-2 ({len(unexpected)} such)")
    if dtype is None and len(dtypes) > 1:
        raise ValueError(f"{caller}: tensors have dtypes {', '.join(sorted(map(str, dtypes)))}; pass dtype to convert")
    head, wte = source.get("lm_head.weight"), source["transformer.wte.weight"]
    if config.tie_word_embeddings and head is not None and not same(head[:], wte[:]):
        raise ValueError(
            f"{caller}: lm_head.weight differs from transformer.wte.weight, and config ties them; "
            "tie_word_embeddings=False keeps this head, without it in the file the embedding serves"
        )
    dtype = dtype or dtypes.pop()
    with torch.device("meta"):
        model = cls(config)
    tensors = {}
    for name in expected:
        if not config.bias and name.endswith(".bias"):
            if source[name][:].any():
                raise ValueError(f"{caller}: bias=False, but {name} is not zero")
            continue
        t = source[name][:]
        # always a copy of its own: a file's memory map must not outlive the file
        tensors[name] = (t.mT if _is_conv1d(name) else t).to(dtype, copy=True, memory_format=torch.contiguous_format)
    tensors.setdefault("lm_head.weight", tensors["transformer.wte.weight"])
    model.load_state_dict(tensors, assign=True)
    return model.eval()


class _Slice:
    """A tensor in a safetensors file: shape and dtype from the header, the data when indexed."""

    def __init__(self, file, name: str, path: pathlib.Path):
        self._slice = file.get_slice(name)
        self.shape = self._slice.get_shape()
        kind = self._slice.get_dtype()
        if kind not in _DTYPES and not name.endswith((".attn.bias", ".attn.masked_bias")):
            raise ValueError(f"from_pretrained: {path}: tensor {name} has dtype {kind}, expected one of {', '.join(_DTYPES)}")
        self.dtype = _DTYPES.get(kind)

    def __getitem__(self, index) -> Tensor:
        return self._slice[index]


def _read_json(path: pathlib.Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"from_pretrained: {path} does not exist")
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise ValueError(f"from_pretrained: {path} has {path.stat().st_size} bytes, more than {_MAX_JSON_BYTES}")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"from_pretrained: {path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"from_pretrained: {path} must hold a JSON object, got {type(value).__name__}")
    return value


def _open_safetensors(folder: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, _Slice]:
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    wanted: dict[str, str] | None = None
    if not single.is_file():
        if not index.is_file():
            raise FileNotFoundError(f"from_pretrained: {folder} has no model.safetensors (pickled weights are not read)")
        wanted = _read_json(index).get("weight_map")
        if not isinstance(wanted, dict) or not all(isinstance(file, str) for file in wanted.values()):
            raise ValueError(f"from_pretrained: {index} has no weight_map from names to files")
        for file in wanted.values():
            if pathlib.Path(file).name != file or not file.endswith(".safetensors"):
                raise ValueError(f"from_pretrained: {index} names the file {file!r}, expected a .safetensors beside it")
    tensors: dict[str, _Slice] = {}
    names = sorted(set(wanted.values())) if wanted is not None else [single.name]
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"from_pretrained: {folder / name} does not exist")
    for name in names:
        path = folder / name
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"from_pretrained: {path} is not a valid safetensors file: {error}") from None
        for key in file.keys():
            if wanted is not None and wanted.get(key) != name:
                raise ValueError(f"from_pretrained: {path} holds tensor {key}, which the index does not place there")
            tensors[key] = _Slice(file, key, path)
    if wanted is not None and set(wanted) - set(tensors):
        missing = sorted(set(wanted) - set(tensors))[0]
        raise ValueError(f"from_pretrained: {wanted[missing]} lacks tensor {missing}, which the index places there")
    return tensors


def _write_whole(path: pathlib.Path, write: Callable[[str], object]) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    try:
        write(temporary)
        # mkstemp makes files private; a checkpoint gets the mode any new file has
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _cached(name: str) -> pathlib.Path:
    """Where huggingface_hub keeps a model that was downloaded before."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        from huggingface_hub import try_to_load_from_cache

        # the four of OpenAI are known by their bare names, too
        for repository in (name, f"openai-community/{name}") if name in PRESETS else (name,):
            if isinstance(found := try_to_load_from_cache(repository, "config.json"), str):
                return pathlib.Path(found).parent
    raise FileNotFoundError(
        f"from_pretrained: {name} is neither a folder nor a model in the local Hugging Face cache (models are never downloaded)"
    )


def load(cls: type[Any], path: str | os.PathLike, dtype: torch.dtype | None, overrides: dict) -> Any:
    """GPT.from_pretrained."""
    folder = pathlib.Path(path)
    if not folder.is_dir():
        folder = _cached(str(path))
    config = config_from_hf(_read_json(folder / "config.json"), overrides)
    with contextlib.ExitStack() as stack:
        return assemble(cls, config, _open_safetensors(folder, stack), "from_pretrained", dtype)


def save(model: Any, path: str | os.PathLike) -> None:
    """GPT.save_pretrained."""
    from safetensors.torch import save_file

    folder = pathlib.Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    own = model.state_dict()
    tensors = {}
    # as it is: load_state_dict(assign=True) or a user may have given it a head of its own
    for name, shape in _hf_shapes(replace(model.config, tie_word_embeddings=model.tied)):
        if name in own:
            tensors[name] = (own[name].mT if _is_conv1d(name) else own[name]).contiguous()
        else:
            tensors[name] = own["transformer.wte.weight"].new_zeros(shape)
    config = json.dumps(config_to_hf(model.config, model.lm_head.weight.dtype, model.tied), indent=2) + "\n"
    _write_whole(folder / "model.safetensors", lambda file: save_file(tensors, file, metadata={"format": "pt"}))
    _write_whole(folder / "config.json", lambda file: pathlib.Path(file).write_text(config))


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Are the two weights one, as far as can be told?"""
    if a is None or b is None or a is b or a.is_meta or b.is_meta or not {type(a), type(b)} <= {Tensor, nn.Parameter}:
        return True
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    return torch.equal(a, b) or torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True)
