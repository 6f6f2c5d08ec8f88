"""What our integrations read of transformers that it does not promise to keep, all of it here: names with an underscore, tables
and functions inside its modules. No other file of integrations/ names them.

Each is looked up once, when this file is loaded. For one that is not there, `absent` has the reason, for which whatever needs
it is left to transformers, and nothing raises.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import transformers
from torch import nn

_absent: dict[str, str] = {}  # name -> what the plan says


def _find(module: str, name: str) -> Any:
    """transformers' module.name, or None, with its reason in _absent."""
    try:
        return getattr(importlib.import_module(f"transformers.{module}"), name)
    except Exception:
        # modules import what is optional, and fail in their own ways
        _absent[name] = f"transformers {transformers.__version__} has no {module}.{name}"
        return None


def absent(*names: str) -> str | None:
    """Why something that needs these names cannot be served, None where all are there."""
    return next((_absent[name] for name in names if name in _absent), None)


# ---- attention ----

ALL_ATTENTION_FUNCTIONS = _find("modeling_utils", "ALL_ATTENTION_FUNCTIONS")
sdpa_attention_forward = _find("integrations.sdpa_attention", "sdpa_attention_forward")
_AttentionInterface = _find("modeling_utils", "AttentionInterface")
_active_collector = _find("utils.output_capturing", "_active_collector")


def attention_interfaces(modeling: ModuleType) -> dict[str, Callable | str]:
    """{implementation: the function that our kernel stands in for, or why it does not}, for a model's module."""
    table = absent("ALL_ATTENTION_FUNCTIONS")
    # under "eager" who collects the weights must be known
    eager = getattr(modeling, "eager_attention_forward", f"{modeling.__name__} has no eager_attention_forward")
    return {
        "sdpa": table or absent("sdpa_attention_forward") or sdpa_attention_forward,
        "eager": table or absent("_active_collector") or eager,
    }


def attention_implementation(module: Any) -> str | None:
    """What the module's config asks for ("sdpa", "eager", ...); None where it is not said."""
    return getattr(module.config, "_attn_implementation", None)


def attention_function(implementation: str, modeling: ModuleType) -> Callable:
    """The function that the model's own attention calls now. Raises KeyError for an implementation that is not registered."""
    return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, modeling.eager_attention_forward)


def is_replaced(implementation: str, own: Callable, modeling: ModuleType) -> bool:
    """Does another function than `own` stand in its place, in the table or in the model's module?"""
    return ALL_ATTENTION_FUNCTIONS.get(implementation, getattr(modeling, "eager_attention_forward", None)) is not own


def no_eager() -> str | None:
    """Why no eager attention is to be stood in for: who collects the weights must be known."""
    return absent("_active_collector")


def is_attention_table(value: Any) -> bool:
    """Is it transformers' table of attention functions, or a model's own copy?"""
    return _AttentionInterface is not None and type(value) is _AttentionInterface


def collects_outputs(hook: Any) -> bool:
    """Is it the forward hook by which transformers collects outputs, which does nothing while nobody wants them?"""
    home = "transformers.utils.output_capturing"
    return getattr(hook, "__module__", None) == home and getattr(hook, "__name__", None) == "output_capturing_hook"


def wants_attentions() -> bool:
    """Is a caller collecting attention weights by hooks?"""
    wanted = _active_collector.get()
    return wanted is not None and "attentions" in wanted


class WritesAttentionOut:
    """Of a class whose forward calls self._attn(query, key, value, mask), which returns o and the weights."""

    def _attn(self: Any, query, key, value, attention_mask=None, *args: Any, **kwargs: Any):
        served = None if args or kwargs else self.attend(query, key, value, attention_mask)
        if served is not None:
            return served
        return super()._attn(query, key, value, attention_mask, *args, **kwargs)  # type: ignore[misc]


# ---- activations ----

_GELUActivation, _GELUTanh, _NewGELU = (
    _find("activations", name) for name in ("GELUActivation", "GELUTanh", "NewGELUActivation")
)
# methods that stand in an activation's `act`; without them no `act` is taken for one
_gelu_python = getattr(_GELUActivation, "_gelu_python", _absent)
_gelu_tanh_python = getattr(_GELUTanh, "_gelu_tanh_python", _absent)


def gelu_of(act: Any) -> str | None:
    """Which GELU `act` is: "tanh", "none" (erf), or None for something else."""
    if type(act) is _NewGELU:
        return "tanh"
    # these two call what stands in their `act`: torch's function, or a method of theirs in Python
    if type(act) is _GELUActivation:
        return "none" if act.act is nn.functional.gelu or getattr(act.act, "__func__", None) is _gelu_python else None
    if type(act) is _GELUTanh:
        if isinstance(f := act.act, functools.partial):
            own = f.func is nn.functional.gelu and not f.args and f.keywords == {"approximate": "tanh"}
        else:
            own = getattr(f, "__func__", None) is _gelu_tanh_python
        return "tanh" if own else None
    return None


# ---- loss ----

LOSS_MAPPING = _find("loss.loss_utils", "LOSS_MAPPING")
ForCausalLMLoss = _find("loss.loss_utils", "ForCausalLMLoss")


def no_causal_lm_loss(model: Any) -> str | None:
    """Why the loss of `model` is not to be taken for ForCausalLMLoss; None where it is that."""
    if (reason := absent("LOSS_MAPPING", "ForCausalLMLoss")) is not None:
        return reason
    # as PreTrainedModel.loss_function finds it, without its warning, at which the compiler stops
    if hasattr(model, "_loss_function"):
        function = model._loss_function
    else:
        function = LOSS_MAPPING.get(getattr(model, "loss_type", None), LOSS_MAPPING.get("ForCausalLM"))
    return None if function is ForCausalLMLoss else "its loss function is not the causal language model's"


# ---- masks ----


@contextlib.contextmanager
def not_packed() -> Iterator[None]:
    """Inside, a row of a batch is taken for one sequence, without a look at its positions, which may be stand-ins without
    values: the mask is then what it is for a real batch of such rows."""
    module = sys.modules.get("transformers.masking_utils")
    own = getattr(module, "find_packed_sequence_indices", None)
    if own is None:  # a version that does not look
        yield
        return
    module.find_packed_sequence_indices = lambda position_ids: None  # type: ignore[union-attr]
    try:
        yield
    finally:
        module.find_packed_sequence_indices = own  # type: ignore[union-attr]
