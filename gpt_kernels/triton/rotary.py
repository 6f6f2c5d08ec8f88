"""rotary: a program has some positions, whose cos and sin it reads once, and goes through some of the heads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import arch, cdiv, check_device, check_dtype, check_float, check_same_shape, dtype_name, fail, launch, wave_of
from .tuning import Parameters, Tunable


@triton.jit
def pairs(p, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr, at, half, lanes, wide, inside, inside_wide):
    """(first, second) of each pair in float32: half apart, or neighbours"""
    if INTERLEAVED:
        both = tl.load(p + at + wide, inside_wide, 0.0).to(tl.float32)
        return tl.split(tl.reshape(both, (both.shape[0], BLOCK, 2)))
    else:
        first = tl.load(p + at + lanes, inside, 0.0).to(tl.float32)
        return first, tl.load(p + at + half + lanes, inside, 0.0).to(tl.float32)


@triton.jit
def table(p, INTERLEAVED: tl.constexpr, BOTH: tl.constexpr, BLOCK: tl.constexpr, at, half, lanes, wide, inside, inside_wide):
    """(the first's, the second's) of each pair"""
    if BOTH:
        return pairs(p, INTERLEAVED, BLOCK, at, half, lanes, wide, inside, inside_wide)
    else:
        one = tl.load(p + at + lanes, inside, 0.0).to(tl.float32)
        return one, one


@triton.jit
def rotary_kernel(
    y, x, cos, sin, S, H, half, rest, tiles, groups,
    x_batch, x_position, x_head, y_batch, y_position, y_head, cos_batch, cos_position, sin_batch, sin_position,
    INTERLEAVED: tl.constexpr, BOTH: tl.constexpr, TRANSPOSED: tl.constexpr, VEC: tl.constexpr,
    BLOCK: tl.constexpr, REST: tl.constexpr, BLOCK_S: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    group, tile, b = tl.program_id(0) % groups, tl.program_id(0) // groups % tiles, tl.program_id(0) // groups // tiles
    s = (tile.to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S))[:, None]
    # as all strides: so that the compiler sees where 16 bytes go together
    half, rest = half // VEC * VEC, rest // VEC * VEC
    lanes, wide, beyond = tl.arange(0, BLOCK)[None, :], tl.arange(0, 2 * BLOCK)[None, :], tl.arange(0, REST)[None, :]
    inside, inside_wide, inside_rest = (s < S) & (lanes < half), (s < S) & (wide < 2 * half), (s < S) & (beyond < rest)
    b = b.to(tl.int64)
    cos_at = b * (cos_batch // VEC * VEC) + s * (cos_position // VEC * VEC)
    sin_at = b * (sin_batch // VEC * VEC) + s * (sin_position // VEC * VEC)
    cos1, cos2 = table(cos, INTERLEAVED, BOTH, BLOCK, cos_at, half, lanes, wide, inside, inside_wide)
    sin1, sin2 = table(sin, INTERLEAVED, BOTH, BLOCK, sin_at, half, lanes, wide, inside, inside_wide)
    if TRANSPOSED:
        sin1, sin2 = -sin2, -sin1
    x_at = b * (x_batch // VEC * VEC) + s * (x_position // VEC * VEC)
    y_at = b * (y_batch // VEC * VEC) + s * (y_position // VEC * VEC)
    first = group.to(tl.int64) * HEADS
    for k in range(0, tl.minimum(HEADS, H - group * HEADS)):
        from_head, to_head = x_at + (first + k) * (x_head // VEC * VEC), y_at + (first + k) * (y_head // VEC * VEC)
        x1, x2 = pairs(x, INTERLEAVED, BLOCK, from_head, half, lanes, wide, inside, inside_wide)
        y1 = (x1 * cos1 - x2 * sin1).to(y.dtype.element_ty)
        y2 = (x2 * cos2 + x1 * sin2).to(y.dtype.element_ty)
        if INTERLEAVED:
            tl.store(y + to_head + wide, tl.reshape(tl.join(y1, y2), (BLOCK_S, 2 * BLOCK)), inside_wide)
        else:
            tl.store(y + to_head + lanes, y1, inside)
            tl.store(y + to_head + half + lanes, y2, inside)
        if REST > 1:
            kept = tl.load(x + from_head + 2 * half + beyond, inside_rest, 0.0)
            tl.store(y + to_head + 2 * half + beyond, kept, inside_rest)


def _default(arch: str, half: int, dtype) -> Parameters:
    pairs = 4 * wave_of(arch) * (16 // dtype.itemsize)  # one 16-byte access per thread and half
    return {"BLOCK_S": max(1, pairs // triton.next_power_of_2(half)), "HEADS": 4, "num_warps": 4}


def _candidates(arch: str, half: int, dtype) -> list[Parameters]:
    default = _default(arch, half, dtype)
    fewer = max(1, default["BLOCK_S"] // 2)
    return [default, {**default, "HEADS": 2}, {**default, "BLOCK_S": fewer}, {**default, "HEADS": 8, "BLOCK_S": fewer}]


def _problem(device, half: int, dtype):
    x = torch.randn(8, 1024, 2**10 // half, 2 * half, device=device, dtype=dtype)
    cos = torch.randn(1, 1024, half, device=device, dtype=dtype)
    return lambda: rotary_fwd(x, cos, cos, 2 * half, False, False)


FWD = Tunable("rotary_fwd", _default, _candidates, _problem)


def _check_tensor(op: str, name: str, t: Tensor) -> None:
    if t.dim() != 4:
        fail(op, f"{name} must have 4 dimensions (batch, positions, heads, head_dim), got shape {tuple(t.shape)}")
    _check_last(op, name, t)


def _check_last(op: str, name: str, t: Tensor) -> None:
    if t.stride(-1) != 1 and t.shape[-1] > 1 and t.numel():
        fail(op, f"{name} must be contiguous in its last dimension, its stride there is {t.stride(-1)}")


def _check(op: str, x: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int) -> None:
    check_float(op, "x", x)
    _check_tensor(op, "x", x)
    B, S, _, D = x.shape
    if not 0 <= rotary_dim <= D or rotary_dim % 2:
        fail(op, f"rotary_dim must be even and at most {D}, x's last dimension, got {rotary_dim}")
    half = rotary_dim // 2
    for name, t in (("cos", cos), ("sin", sin)):
        check_device(op, name, t, x)
        if t.dtype not in (x.dtype, torch.float32):
            fail(op, f"{name} must be {dtype_name(x.dtype)} like x or float32, got {dtype_name(t.dtype)}")
        if t.dim() != 3 or t.shape[0] not in (1, B) or t.shape[1] != S or t.shape[2] not in (rotary_dim, half):
            fail(op, f"{name} must have shape ({B} or 1, {S}, {rotary_dim} or {half}), got {tuple(t.shape)}")
        _check_last(op, name, t)
    check_dtype(op, "sin", sin, cos.dtype)
    if cos.shape[2] != sin.shape[2]:
        fail(op, f"sin must have as many columns as cos, {cos.shape[2]}, got {sin.shape[2]}")


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool, transposed: bool, y: Tensor) -> None:
    if not x.numel():
        return
    B, S, H, D = x.shape
    half, rest = rotary_dim // 2, D - rotary_dim
    # where there is one, its stride moves nothing
    strides = [0 if t.shape[d] == 1 else t.stride(d) for t in (x, y, cos, sin) for d in range(t.dim() - 1)]
    vec = 16 // x.itemsize
    if any(n % vec for n in (half, D, *strides)):
        vec = 1
    p = FWD(arch(x.device), half=max(half, 1), dtype=x.dtype)
    tiles, groups = cdiv(S, p["BLOCK_S"]), cdiv(H, p["HEADS"])
    launch(
        rotary_kernel, (B * tiles * groups,), x, y, x, cos, sin, S, H, half, rest, tiles, groups, *strides,
        INTERLEAVED=interleaved, BOTH=half > 0 and cos.shape[2] == rotary_dim, TRANSPOSED=transposed, VEC=vec,
        BLOCK=triton.next_power_of_2(max(half, 1)), REST=triton.next_power_of_2(rest + 1) if rest else 1, **p,
    )  # fmt: skip


def rotary_fwd(x: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool, transposed: bool) -> Tensor:
    _check("rotary_fwd", x, cos, sin, rotary_dim)
    B, S, H, D = x.shape
    if x.stride(2) > x.stride(1):
        y = x.new_empty(B, H, S, D).transpose(1, 2)
    else:
        y = x.new_empty(x.shape)
    _rotate(x, cos, sin, rotary_dim, interleaved, transposed, y)
    return y


def rotary_fwd_out(
    x: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool, transposed: bool, y: Tensor
) -> None:
    op = "rotary_fwd"
    _check(op, x, cos, sin, rotary_dim)
    check_device(op, "y", y, x)
    check_dtype(op, "y", y, x.dtype)
    _check_tensor(op, "y", y)
    check_same_shape(op, "y", y, "x", x)
    _rotate(x, cos, sin, rotary_dim, interleaved, transposed, y)
