"""Families of modules that patch() swaps, one file each: <library>_<family>.py, as torch_nn.py or transformers_gpt2.py.

A file is found by the module path of a class: transformers.models.gpt2.modeling_gpt2 is of `transformers`, and one of its
parts is `gpt2`. It is imported when a model with such a class is patched, and only then. What goes wrong in it is a reason in
the plan, and ends no patch. In the file, per module class:

| line                                                 | says                                                                 |
|------------------------------------------------------|----------------------------------------------------------------------|
| `@register(cls, ops, why, unless=, fuses=, serves=)` | the methods that replace the class's, and for which calls (patch.py) |
| `keep(cls, why)`                                     | the class stays as it is                                             |

Names that a library calls private are asked for in one file with a fallback each: _transformers.py.
"""

from __future__ import annotations

import functools
import pkgutil


@functools.cache
def files() -> frozenset[str]:
    """Their names, without the ones that begin with an underscore, which are no family's."""
    return frozenset(file.name for file in pkgutil.iter_modules(__path__) if not file.name.startswith("_"))


def of(cls: type) -> list[str]:
    """The files that know modules of this class."""
    library, *parts = cls.__module__.split(".")
    return [file for part in dict.fromkeys(parts) if (file := f"{library}_{part}") in files()]
