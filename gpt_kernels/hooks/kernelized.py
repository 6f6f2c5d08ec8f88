"""Our layers for the package `kernels`: its mapping for kernelize(), and transformers' KernelConfig, CPU included.

    with kernels.use_kernel_mapping(gpt_kernels.kernel_mapping()):
        kernels.kernelize(model, mode=Mode.TRAINING, device="cpu")
    model.set_use_kernels(True, gpt_kernels.kernel_config())
    Model.from_pretrained(name, use_kernels=True, kernel_config=gpt_kernels.kernel_config())

Nothing is downloaded: the layers are gpt_kernels/hooks/layers.py, forward and backward, compiled or not.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from ..dispatch import where
from .layers import LAYERS


class LocalLayer:
    """A repository, as the mapping has them, of one layer of ours. Two of one layer are equal."""

    def __init__(self, layer_name: str):
        self.layer_name = layer_name

    def load(self) -> type[nn.Module]:
        return LAYERS[self.layer_name][0]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LocalLayer) and self.layer_name == other.layer_name

    def __hash__(self) -> int:
        return hash((LocalLayer, self.layer_name))

    def __str__(self) -> str:
        return f"gpt_kernels, layer {self.layer_name}"


def kernel_mapping() -> dict[str, dict[str, LocalLayer]]:
    """{layer name: {device type: our layer}} for kernels.use_kernel_mapping and kernels.register_kernel_mapping.

    Of the devices "cpu" and "cuda", those on which there is a kernel for the layer's op and not its reference alone.
    """
    found: dict[str, dict[str, LocalLayer]] = {}
    for name, (_, op) in LAYERS.items():
        devices = [key.lower() for key, served in where(f"{op}_fwd").items() if served.backend != "reference"]
        if devices:
            found[name] = {device: LocalLayer(name) for device in devices}
    return found


@functools.cache
def _config_class() -> type:
    from transformers import KernelConfig

    class Config(KernelConfig):
        """transformers' own refuses "cpu" and whatever is not on the hub: this one's mapping is made when the model is
        there."""

        def sanitize_kernel_mapping(self, model: Any) -> None:
            self.store_registered_layer_names(model)

        def create_compatible_mapping(self, model: Any, compile: bool = False) -> None:
            self.kernel_mapping = kernel_mapping()

    Config.__name__ = Config.__qualname__ = "KernelConfig"
    return Config


def kernel_config() -> Any:
    """A transformers.KernelConfig with our layers, for `kernel_config=` of from_pretrained and of set_use_kernels.

    It is the whole mapping: layers of the hub that transformers would take for other names are taken as before. Raises
    ImportError without transformers; transformers itself says where the package kernels is missing, or of a version that it
    does not take.
    """
    return _config_class()()
