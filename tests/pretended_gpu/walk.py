"""Triton's own launcher walked under the pretended driver (cuda.c), in a process of its own:

    python walk.py LIBCUDA ARCH steps|all        every call: packed parameters, and the replayed call beside the launched one
    python walk.py LIBCUDA ARCH kinds            which calls are replays of another one
    python walk.py LIBCUDA ARCH host             microseconds of a replayed call, and of a Python kernel in a dispatcher slot

TRITON_LIBCUDA_PATH must name the library's folder. Prints JSON.
"""

import ctypes
import importlib
import json
import re
import sys
import time

import torch
import triton
from kernel_calls import tensors
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.nvidia.driver import CudaDriver
from triton.compiler.compiler import CompiledKernel

from gpt_kernels import cases
from gpt_kernels.architectures import ARCHITECTURES, family
from gpt_kernels.triton import common, replay
from gpt_kernels.triton.slots import OPS
from gpt_kernels.triton.slots import launcher as launcher_of

LIBRARY, ARCH, WHAT = sys.argv[1:]
NUMBER, FAMILY = int(ARCH[3:]), ARCHITECTURES[family(ARCH)]
cuda = ctypes.CDLL(LIBRARY, mode=ctypes.RTLD_GLOBAL)
cuda.pretend_reason.restype = cuda.pretend_name.restype = ctypes.c_char_p
BYTES = {"8": 1, "16": 2, "32": 4, "64": 8}
# of Triton's own packer (from 3.7 on), by its code of a type
PACKED = {1: 8, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 2, 8: 4, 9: 8, 10: 2, 11: 2, 12: 4, 13: 8, 14: 128}


def pretend() -> None:
    """A GPU of ARCH under Triton, CPU tensors for its memory."""
    cuda.pretend(NUMBER, FAMILY.shared * 1024, FAMILY.processors, HOOK)
    driver = CudaDriver()
    driver.get_current_device = lambda: 0
    driver.get_current_stream = lambda device: 7
    driver.get_device_capability = lambda device=0: divmod(NUMBER, 10)
    triton.runtime.driver.set_active(driver)
    torch.cuda.current_device = lambda: None  # a CPU tensor's index
    found = {
        "arch": lambda device: family(ARCH),
        "target": lambda device: ARCH,
        "processors": lambda device: FAMILY.processors,
    }
    for name in {*OPS.values(), "norm", "aligned", "common"}:
        module = importlib.import_module(f"gpt_kernels.triton.{name}")
        for function in found.keys() & vars(module).keys():
            setattr(module, function, found[function])


# ---- what a launch passes ----

sizes: dict[int, list[int]] = {}  # kernel -> bytes of its parameters, by its PTX
launches: list[tuple] = []


def parameters(ptx: str) -> list[int]:
    declared = re.search(r"\.entry [^(]*\((.*?)\)\s*[\n.{]", ptx, re.S)[1]
    found = []
    for line in filter(None, (re.sub(r"//.*", "", p).strip() for p in declared.split(","))):
        array = re.search(r"\.b8 \S+\[(\d+)\]", line)
        found.append(int(array[1]) if array else BYTES[re.search(r"\.param \.[a-z](\d+)", line)[1]])
    return found


def loaded(self):
    first = self.module is None
    init(self)
    if first:
        sizes[self.function] = parameters(self.asm["ptx"])
        signature = getattr(self._run, "kernel_signature", None)
        if signature is not None and [PACKED[code] for code in signature] + [8, 8] != sizes[self.function]:
            faults.append(f"{self.name}: packed {list(signature)}, its PTX has {sizes[self.function]}")


@ctypes.CFUNCTYPE(None, ctypes.c_int, *[ctypes.c_uint] * 4)
def HOOK(kernel, grid, threads, shared, stream):
    values = []
    for i, size in enumerate(sizes[kernel]):
        buffer = ctypes.create_string_buffer(size)
        cuda.pretend_read(i, buffer, size)
        values.append(buffer.raw)
    launches.append((cuda.pretend_name(kernel).decode(), grid, threads, shared, stream, values))


init, CompiledKernel._init_handles = CompiledKernel._init_handles, loaded


class Made(TorchDispatchMode):
    """The tensors allocated inside."""

    def __init__(self):
        super().__init__()
        self.tensors = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.tensors += [t for t in tensors(result) if t.numel() and not function.is_view]
        return result


def named(launch: tuple, places: list[tuple[str, Tensor]]) -> tuple:
    """The launch with addresses as (tensor, offset): those of another call with other tensors are the same then."""
    *rest, values = launch
    return *rest, [(address(v[:8], places), v[8:]) if len(v) in (8, 128) else v for v in values]


def address(raw: bytes, places):
    value = int.from_bytes(raw, "little")
    for name, t in places:
        storage = t.untyped_storage()
        if storage.data_ptr() <= value < storage.data_ptr() + storage.nbytes():
            return name, value - storage.data_ptr()
    return raw


def copied(t):
    """The same tensor in other memory, as far from a 16-byte boundary."""
    if not isinstance(t, Tensor):
        return t
    return torch.empty(0, dtype=t.dtype).set_(t.untyped_storage().clone(), t.storage_offset(), t.shape, t.stride())


def watched(function, args):
    launches.clear()
    with Made() as made:
        result = function(*args)
    given = {name: t for name, t in ((f"a{i}", a) for i, a in enumerate(args)) if isinstance(t, Tensor)}
    places = [*given.items(), *((f"t{i}", t) for i, t in enumerate(made.tensors))]
    of_result = [
        next((n for n, p in places if p.untyped_storage().data_ptr() == t.untyped_storage().data_ptr()), "")
        for t in tensors(result)
        if t.numel()
    ]
    form = [(t.shape, t.stride(), t.dtype, t.storage_offset()) for t in tensors(result)]
    return [named(launch, places) for launch in launches], of_result, form


def replayed_call(name, launcher):
    return lambda *args: replay.call(name, launcher, args)


def outliving(name, launcher, args) -> int:
    given = [*map(copied, args)]
    with Made() as made:
        replay.call(name, launcher, given)
    left = [StorageWeakRef(t.untyped_storage()) for t in (*made.tensors, *tensors(given))]
    del made, given
    return sum(not storage.expired() for storage in left)


faults: list[str] = []


def walk() -> dict:
    replayed, ordinary, kernels, launched = 0, set(), set(), 0
    for what, name, args in cases.calls(torch.bfloat16, "cpu"):
        if WHAT == "steps" and (not what.startswith("step") or (name.startswith("attention") and args[-4 - ("bwd" in name)])):
            continue
        launcher = launcher_of(name)
        try:
            direct = watched(launcher, [*map(copied, args)])
            results = [watched(replayed_call(name, launcher), [*map(copied, args)]) for _ in range(3)]
        except Exception as error:
            faults.append(f"{name} {what}: {type(error).__name__}: {error} {cuda.pretend_reason().decode()}")
            continue
        if any(result != direct for result in results):
            faults.append(f"{name} {what}: replayed {results[-1]}, launched {direct}")
        if left := outliving(name, launcher, args):
            faults.append(f"{name} {what}: {left} tensors outlive a replay and its results")
        done = replay._replays.get(replay._key(name, args))
        replayed += done is not None
        ordinary |= {name} if done is None and direct[0] else set()
        kernels |= {launch[0] for launch in direct[0]}
        launched += len(direct[0])
    return {
        "faults": faults,
        "replayed": replayed,
        "ordinary": sorted(ordinary),
        "kernels": sorted(kernels),
        "launches": launched,
    }


def kinds() -> list[tuple[str, int, int]]:
    """(what was called, kinds known after it, launches that Triton's hook saw)"""
    launcher, seen, told = launcher_of("gelu_fwd"), [], []
    x, bias = torch.randn(8, 96).bfloat16(), torch.randn(96).bfloat16()
    hooks = triton.knobs.runtime.launch_enter_hook

    def call(what, *args):
        told.clear()
        replay.call("gelu_fwd", launcher, args)
        seen.append((what, len(replay._replays), len(told)))

    for what, args in {
        "first": (x, None, True),
        "same": (x.clone(), None, True),
        "option": (x, None, False),
        "bias": (x, bias, True),
        "shape": (x[:4], None, True),
        "alignment": (x.flatten()[1:97], None, True),
        "dtype": (x.half(), None, True),
    }.items():
        call(what, *args)
        call(what, *args)
    hooks.add(told.append)
    call("hook", x, None, True)
    hooks.remove(told.append)
    call("no hook", x, None, True)
    common.changed()
    call("parameters changed", x, None, True)
    for _ in range(2):
        try:
            call("float64", x.double(), None, True)
        except RuntimeError:
            seen.append(("refused", len(replay._replays), 0))
    replay.KINDS = 3
    for n in range(1, 9):
        call("many", x[:n], None, True)
        assert len(replay._replays) <= 3
    return seen


def best(function, calls=50, rounds=20) -> float:
    function(), function()
    found = []
    for _ in range(rounds):
        begin = time.perf_counter()
        for _ in range(calls):
            function()
        found.append((time.perf_counter() - begin) / calls)
    return min(found) * 1e6


def host() -> dict:
    """Microseconds: of each op's replayed call, and of its launcher's."""
    library = torch.library.Library("pretended", "DEF")
    library.define("slot(Tensor x, Tensor? w, Tensor? b, float e) -> (Tensor, Tensor, Tensor)")
    library.impl("slot", lambda x, w, b, e: (x, w, b), "CPU")
    x, found = torch.empty(8, 8), {}
    cuda.pretend(NUMBER, FAMILY.shared * 1024, FAMILY.processors, None)
    for name, args in cases.step(cases.Sizes(2, 64, 768, 12, vocab=1000), torch.bfloat16, "cpu"):
        if name not in found:
            launcher = launcher_of(name)
            again = best(lambda: replay.call(name, launcher, args))  # noqa: B023
            found[name] = again, best(lambda: launcher(*args), 10, 3)  # noqa: B023
    return {"slot": best(lambda: torch.ops.pretended.slot.default(x, x, x, 1e-5)), "ops": found}


pretend()
print(json.dumps({"host": host, "kinds": kinds}.get(WHAT, walk)()))
