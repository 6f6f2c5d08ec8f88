"""Triton's interpreter, made to see what a GPU would not forgive.

    scan()      every access of every launch: outside the tensors, or unordered with another program's
    only()      runs few of a launch's programs: tensors of more than 2^31 elements
    guarded()   tensors between pages that may not be touched
    padded()    tensors whose gaps and surroundings hold NaN

The interpreter runs programs one after the other, so a race changes no result there. scan() keeps, for each element, who
wrote and who read it last, and for each program whose accesses precede its own: by an atomic with acquire that saw another's
atomic with release, what the other did before its last debug_barrier. (A vector clock per program, as in FastTrack; of the
programs that have read an element two are remembered, and accesses of another width to it are seen by their first byte.)
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
from collections.abc import Iterator

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

BUILDER = interpreter.InterpreterBuilder


# ---- which programs run, and in which order ----


@contextlib.contextmanager
def _patched(cls, **methods) -> Iterator[None]:
    before = {name: getattr(cls, name) for name in methods}
    for name, method in methods.items():
        setattr(cls, name, method)
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(cls, name, method)


@contextlib.contextmanager
def reordered(seed: int) -> Iterator[None]:
    """The programs of every launch in a random order: nothing may depend on who comes last."""
    set_index, rng, order = BUILDER.set_grid_idx, np.random.default_rng(seed), []

    def set_grid_idx(self, x, y, z):
        if x == y == z == 0:
            order[:] = rng.permutation(np.prod(self.grid_dim))
        at = np.unravel_index(order[np.ravel_multi_index((x, y, z), self.grid_dim)], self.grid_dim)
        set_index(self, *map(int, at))

    with _patched(BUILDER, set_grid_idx=set_grid_idx):
        yield


@contextlib.contextmanager
def only(last: int) -> Iterator[None]:
    """Of the programs of every launch, the `last` in a GPU's order, x fastest; num_programs is still that of all."""
    run = interpreter.GridExecutor.__call__

    def call(executor, *args, **kwargs):
        grid = (*executor.grid, 1, 1)[:3]
        total = math.prod(grid)
        executor.grid = (min(last, total),)

        def set_grid_dim(self, *_):
            self.grid_dim = grid

        def set_grid_idx(self, x, y, z):
            self.grid_idx = tuple(map(int, np.unravel_index(max(total - last, 0) + x, grid, order="F")))

        with _patched(BUILDER, set_grid_dim=set_grid_dim, set_grid_idx=set_grid_idx):
            return run(executor, *args, **kwargs)

    with _patched(interpreter.GridExecutor, __call__=call):
        yield


# ---- accesses ----


class Scan:
    """The launches inside scan(): errors, each once, as "kernel: what"."""

    def __init__(self):
        self.errors: dict[str, None] = {}
        self.accesses = 0

    def begin(self, kernel: str, tensors: dict[str, Tensor], programs: int) -> None:
        spans = sorted((t.data_ptr(), t.data_ptr() + _extent(t) * t.element_size()) for t in tensors.values())
        merged: list[list[int]] = []
        for low, high in spans:
            if merged and low < merged[-1][1]:
                merged[-1][1] = max(high, merged[-1][1])
            else:
                merged.append([low, high])
        self.kernel, self.tensors = kernel, tensors
        self.low, self.high = np.array(merged, np.int64).reshape(-1, 2).T
        self.start = np.concatenate([[0], np.cumsum(self.high - self.low)])  # of each span in the shadow, a byte for a byte
        size = int(self.start[-1])
        self.legal = np.zeros(size, bool)
        for t in tensors.values():
            at = np.searchsorted(self.low, t.data_ptr(), "right") - 1
            begin = int(self.start[at] + t.data_ptr() - self.low[at])
            inside = torch.from_numpy(self.legal)[begin : begin + _extent(t) * t.element_size()]
            inside.as_strided(t.shape, [s * t.element_size() for s in t.stride()]).fill_(True)
        # of each element the last program to write it, to change it atomically, and two that read it; and their clocks then
        self.by = {kind: np.full(size, -1, np.int32) for kind in ("write", "atomic", "read", "other read")}
        self.when = {kind: np.zeros(size, np.int32) for kind in self.by}
        self.programs = programs
        self.clock: dict[int, int] = {}  # of each program; a barrier advances it
        self.seen: dict[int, np.ndarray] = {}  # of each program: the clocks of all up to which it is ordered after them
        self.released: dict[int, np.ndarray] = {}  # of each atomic's address: what those who released it had seen and done

    def error(self, what: str, address: int) -> None:
        near = [(address - t.data_ptr(), name, t) for name, t in self.tensors.items() if t.data_ptr() <= address]
        offset, name, t = min(near, key=lambda n: n[0]) if near else (0, "before every tensor", None)
        where = f"{name}[{offset // t.element_size()}] of shape {tuple(t.shape)}" if t is not None else name
        self.errors.setdefault(f"{self.kernel}: {what} at {where}")

    def locate(self, kind: str, pointers, mask) -> np.ndarray:
        """Where in the shadow the accessed elements are; what is outside is reported and leaves the mask."""
        self.accesses += 1
        on = np.broadcast_to(mask.data.astype(bool), pointers.data.shape)
        address = pointers.data[on].astype(np.int64)
        if not address.size or not self.low.size:
            return np.empty(0, np.int64)
        span = np.searchsorted(self.low, address, "right") - 1
        at = address - self.low[span] + self.start[span]
        ok = (span >= 0) & (address < self.high[span])
        ok[ok] = self.legal[at[ok]]
        if not ok.all():
            self.error(f"{kind} outside the tensors by program {self.program} ({(~ok).sum()} elements)", int(address[~ok][0]))
            mask.data = on.copy()
            mask.data[on] = ok
        return at[ok]

    def ordered(self, kind: str, at: np.ndarray) -> np.ndarray:
        """Which accesses of that kind came before this program's, by program order or by atomics."""
        who, when = self.by[kind][at], self.when[kind][at]
        seen = self.seen.get(self.program)
        before = np.zeros(at.size, bool) if seen is None else when <= seen[who]
        return (who < 0) | (who == self.program) | before

    def check(self, kind: str, at: np.ndarray, against: tuple[str, ...]) -> None:
        for other in against:
            bad = ~self.ordered(other, at)
            if bad.any():
                i = int(at[bad][0])
                span = np.searchsorted(self.start, i, "right") - 1
                what = f"{kind} by program {self.program} unordered with {other.split()[-1]} by program {self.by[other][i]}"
                self.error(f"race: {what}", int(self.low[span] + i - self.start[span]))

    def mark(self, kind: str, at: np.ndarray) -> None:
        self.by[kind][at], self.when[kind][at] = self.program, self.now

    @property
    def now(self) -> int:
        return self.clock.setdefault(self.program, 1)

    def load(self, pointers, mask) -> None:
        at = self.locate("load", pointers, mask)
        self.check("load", at, ("write", "atomic"))
        mine = (self.by["write"][at] == self.program) & (self.when["write"][at] == self.now)
        if mine.any():  # by another of its threads, maybe
            self.errors.setdefault(f"{self.kernel}: race: load of what program {self.program} stored with no barrier between")
        # the first reader stays, the last one is kept beside it
        first = (self.by["read"][at] < 0) | (self.by["read"][at] == self.program)
        self.mark("read", at[first])
        self.mark("other read", at[~first])

    def store(self, pointers, mask) -> None:
        at = self.locate("store", pointers, mask)
        if np.unique(at).size < at.size:
            self.errors.setdefault(f"{self.kernel}: race: one store of program {self.program} to an element twice")
        self.check("store", at, ("write", "atomic", "read", "other read"))
        self.mark("write", at)

    def atomic(self, pointers, mask, semantic: str) -> None:
        at = self.locate("atomic", pointers, mask)
        if pointers.get_element_ty().is_floating():
            self.errors.setdefault(f"{self.kernel}: atomic on floats: the order of additions is not fixed")
        self.check("atomic", at, ("write", "read", "other read"))
        self.mark("atomic", at)
        for i in at.tolist():
            if semantic.startswith("ACQUIRE") and i in self.released:
                seen = self.seen.setdefault(self.program, np.zeros(self.programs, np.int32))
                np.maximum(seen, self.released[i], out=seen)
            if semantic.endswith("RELEASE"):
                done = self.seen.get(self.program, np.zeros(self.programs, np.int32)).copy()
                # of this program what its other threads had done is what was done before its last barrier, and its atomics
                done[self.program] = self.now - 1
                before = self.released.get(i)
                self.released[i] = done if before is None else np.maximum(before, done)
        self.when["atomic"][at] = self.now - 1  # what a release says is done includes itself

    def barrier(self) -> None:
        self.clock[self.program] = self.now + 1

    @property
    def program(self) -> int:
        b = interpreter.interpreter_builder
        x, y, z = b.grid_idx
        return (x * b.grid_dim[1] + y) * b.grid_dim[2] + z


def _extent(t: Tensor) -> int:
    """Elements from the first to the last."""
    return 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0


def _tensors(names: list[str], args: tuple, kwargs: dict) -> dict[str, Tensor]:
    found = {}
    for name, arg in (*zip(names, args, strict=False), *kwargs.items()):
        arg = getattr(arg, "base", arg) if not isinstance(arg, Tensor) else arg  # a tensor descriptor's
        if isinstance(arg, Tensor) and arg.numel():
            found[name] = arg
        elif isinstance(arg, tuple):
            fields = getattr(arg, "_fields", range(len(arg)))
            found |= _tensors([f"{name}.{field}" for field in fields], arg, {})
    return found


@contextlib.contextmanager
def scan() -> Iterator[Scan]:
    """Watch every launch inside; AssertionError at the end with all that was wrong. Accesses outside are not done."""
    s = Scan()
    run, load, store = interpreter.GridExecutor.__call__, BUILDER.create_masked_load, BUILDER.create_masked_store
    rmw, cas, barrier = BUILDER.create_atomic_rmw, BUILDER.create_atomic_cas, BUILDER.create_barrier

    def call(executor, *args, **kwargs):
        s.begin(executor.fn.__name__, _tensors(executor.arg_names, args, kwargs), math.prod(executor.grid))
        return run(executor, *args, **kwargs)

    def create_masked_load(self, ptrs, mask, *rest):
        mask = interpreter.TensorHandle(mask.data, mask.dtype)
        s.load(ptrs, mask)
        return load(self, ptrs, mask, *rest)

    def create_masked_store(self, ptrs, value, mask, *rest):
        mask = interpreter.TensorHandle(mask.data, mask.dtype)
        s.store(ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    def create_atomic_rmw(self, op, ptr, value, mask, sem, *rest):
        mask = interpreter.TensorHandle(mask.data, mask.dtype)
        s.atomic(ptr, mask, sem.name)
        return rmw(self, op, ptr, value, mask, sem, *rest)

    def create_atomic_cas(self, ptr, compare, value, sem, *rest):
        s.atomic(ptr, interpreter.TensorHandle(np.ones_like(ptr.data, bool), tl.int1), sem.name)
        return cas(self, ptr, compare, value, sem, *rest)

    def create_barrier(self):
        s.barrier()
        return barrier(self)

    with (
        _patched(interpreter.GridExecutor, __call__=call),
        _patched(
            BUILDER,
            create_masked_load=create_masked_load,
            create_masked_store=create_masked_store,
            create_atomic_rmw=create_atomic_rmw,
            create_atomic_cas=create_atomic_cas,
            create_barrier=create_barrier,
        ),
    ):
        yield s
    assert not s.errors, "\n".join([*s.errors][:8])


# ---- memory around tensors ----


def padded(t: Tensor, gap: int = 0) -> Tensor:
    """A copy of t in the middle of NaN (of the lowest number, for integers), with `gap` elements of it after each row."""
    worst = float("nan") if t.is_floating_point() else False if t.dtype == torch.bool else torch.iinfo(t.dtype).min
    rows = t.shape[-1] + gap if t.dim() else 1
    around = 16  # as many on either side keep 16-byte alignment; one more would not
    memory = torch.full((around + t.numel() // max(t.shape[-1] if t.dim() else 1, 1) * rows + around,), worst, dtype=t.dtype)
    body = memory[around : memory.numel() - around].view(*t.shape[:-1], rows) if t.dim() else memory[around].view(())
    return (body[..., : t.shape[-1]] if gap else body.view(t.shape)).copy_(t)


LIBC = ctypes.CDLL(None, use_errno=True)


def guarded(t: Tensor, front: bool) -> Tensor:
    """A copy of t, its strides too, that ends (or with `front` begins) where a page begins (ends) that may not be touched."""
    size, page = _extent(t) * t.element_size(), mmap.PAGESIZE
    if not size:
        return t
    body = -(-size // page) * page
    memory = mmap.mmap(-1, body + 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for at in (address, address + page + body):
        if LIBC.mprotect(ctypes.c_void_p(at), ctypes.c_size_t(page), 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    start = page if front else page + body - size
    flat = torch.frombuffer(memory, dtype=t.dtype, count=_extent(t), offset=start)
    return flat.as_strided(t.shape, t.stride()).copy_(t)


@contextlib.contextmanager
def allocations(change) -> Iterator[None]:
    """Inside, what launchers allocate passes through `change`."""
    names = ("empty", "empty_like", "zeros", "zeros_like", "full")

    def through(function):
        return lambda *args, **kwargs: change(function(*args, **kwargs))

    methods = ("new_empty", "new_zeros", "new_full")
    with (
        _patched(torch, **{n: through(getattr(torch, n)) for n in names}),
        _patched(Tensor, **{n: through(getattr(Tensor, n)) for n in methods}),
    ):
        yield
