"""attention: what ops/attention.py says, in tiles. Here are the score steps, the forward pass and the checks; the backward pass
is attention_bwd.py.

A program owns BLOCK_M query rows of one head and visits the key blocks that they can see: first those that the window's left
edge crosses, then those that every row sees whole (no mask at all), then those on the diagonal or over the end of the keys.
The exponent is base 2: exp(scale s - max) = exp2(rate s - rate max) with rate = scale log2 e, one multiply-add per score.
A head dimension that is no power of two is two products, of D0 and D1 columns (80 = 64 + 16), not one with 48 of zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from ..ops.attention import MAX_HEAD_DIM, _empty_as
from . import Declined
from .common import arch, cdiv, check_device, check_dtype, check_float, dtype_name, fail, launch, target, unserved
from .philox import check_dropout, philox_kept
from .tuning import Parameters, Tunable, measuring, text

TMA_ARCHS = ("sm_90", "sm_100")  # families whose kernels read by tensor descriptors
LOG2E = 1.0 / math.log(2.0)


class Steps(NamedTuple):
    """The score steps of a call, one kernel argument. None is known at compile time: an absent step leaves no code."""

    rate: float  # exp(score) = exp2(rate score); log2 e, or scale log2 e where no other step needs the scaled score
    scale: float | None
    softcap: float | None
    slopes: Tensor | None  # ALiBi
    slopes_strides: tuple  # batch, head
    diagonal: int  # ALiBi's distance is |row + diagonal - column|
    bias: Tensor | None
    bias_strides: tuple  # batch, head, row, column
    additive: tl.constexpr  # the bias is of floats
    natural: tl.constexpr  # the exponent's unit is the score's, not base 2's: exponent_of
    first: int | None  # row i sees columns i + first ... i + last
    last: int | None
    rng_state: Tensor | None
    threshold: int
    keep_scale: float


# ---- what the kernels share ----


@triton.jit
def load_rows(
    base, stride, rows, D: tl.constexpr, BLOCK: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr
):
    """(BLOCK, WIDTH) elements of the rows at base from column FIRST, zero beyond column D and, with TAIL, from row `rows`."""
    row, column = tl.arange(0, BLOCK)[:, None], FIRST + tl.arange(0, WIDTH)[None, :]
    if BLOCK * stride >= 2**31:  # only then: 32 bits take fewer registers
        row = row.to(tl.int64)
    at = base + (row * stride + column)
    if FIRST + WIDTH > D:
        return tl.load(at, (row < rows) & (column < D), 0.0) if TAIL else tl.load(at, column < D, 0.0)
    else:
        return tl.load(at, row < rows, 0.0) if TAIL else tl.load(at)


@triton.jit
def head_of(x, strides, b, h, i):
    """Pointer to row i of a head."""
    return x + b.to(tl.int64) * strides[0] + h.to(tl.int64) * strides[1] + tl.cast(i, tl.int64) * strides[2]


@triton.jit
def load_parts(x, strides, b, h, i, T, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK: tl.constexpr,
               TAIL: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """Rows i ... of a head, of which T exist, as the parts of D0 and of D1 columns; D1 = 0: the one part, twice.

    x: a pointer and None, or a tensor descriptor for each part.
    """
    if TMA:
        x0 = tl.reshape(x[0].load([b, h, i, 0]), [BLOCK, D0])
        x1 = tl.reshape(x[1].load([b, h, i, D0]), [BLOCK, D1]) if D1 else x0
    else:
        base = head_of(x[0], strides, b, h, i)
        x0 = load_rows(base, strides[2], T - i, D, BLOCK, 0, D0, TAIL)
        x1 = load_rows(base, strides[2], T - i, D, BLOCK, D0, D1, TAIL) if D1 else x0
    return x0, x1


@triton.jit
def store_rows(base, stride, rows, x, D: tl.constexpr, FIRST: tl.constexpr):
    row, column = tl.arange(0, x.shape[0])[:, None], FIRST + tl.arange(0, x.shape[1])[None, :]
    tl.store(base + row.to(tl.int64) * stride + column, x.to(base.dtype.element_ty), (row < rows) & (column < D))


@triton.jit
def store_parts(x, strides, b, h, i, T, x0, x1, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    base = head_of(x, strides, b, h, i)
    store_rows(base, strides[2], T - i, x0, D, 0)
    if D1:
        store_rows(base, strides[2], T - i, x1, D, D0)


@triton.jit
def product(a0, a1, b0, b1, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T over the one or two parts of the head dimension."""
    s = tl.dot(a0, tl.trans(b0), input_precision=PRECISION)
    if SPLIT:
        s = tl.dot(a1, tl.trans(b1), s, input_precision=PRECISION)
    return s


@triton.jit
def add_product(total, a, b, PRECISION: tl.constexpr):
    """total + a b. float32: the product is a sum of its own first, as one running sum over all the tiles of a long sequence
    loses what a tile adds, in proportion to the root of its length. 16 bits: the result is rounded anyway."""
    if a.dtype == tl.float32 and PRECISION == "ieee":
        # max_num_imprecise_acc speaks of 8 bits; here it keeps the compiler from making one sum of the two
        total += tl.dot(a, b, input_precision=PRECISION, max_num_imprecise_acc=1)
    else:
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


@triton.jit
def slope_of(steps, b, h):
    slope = 0.0
    if steps.slopes is not None:
        slope = tl.load(steps.slopes + b.to(tl.int64) * steps.slopes_strides[0] + h.to(tl.int64) * steps.slopes_strides[1])
    return slope


@triton.jit
def score_steps(s, row, column, b, h, slope, steps, Tq, Tk, MASKED: tl.constexpr):
    """Products q k^T as scores for exp_of, and tanh of softcap's argument for its derivative.

    row and column broadcast to s, either way round. MASKED: some of the tile may be hidden or lie beyond the last column.
    """
    capped = s
    if steps.scale is not None:
        s = s * steps.scale
    if steps.softcap is not None:
        capped = 1.0 - 2.0 / (1.0 + tl.exp2(s * (2.0 * 1.4426950408889634 / steps.softcap)))  # tanh, right at +-inf too
        s = steps.softcap * capped
    if steps.scale is not None and steps.natural:
        # keeps the compiler from rounding s - base but once: where one score outweighs all others, it is lse to the last bit
        s = tl.maximum(s, -3.3e38, propagate_nan=tl.PropagateNan.ALL)
    if steps.slopes is not None:
        s = s - slope * tl.abs(row + steps.diagonal - column).to(tl.float32)
    if steps.bias is not None:
        at = steps.bias + (b.to(tl.int64) * steps.bias_strides[0] + h.to(tl.int64) * steps.bias_strides[1])
        at += row.to(tl.int64) * steps.bias_strides[2] + column.to(tl.int64) * steps.bias_strides[3]
        bias = tl.load(at, (row < Tq) & (column < Tk), 0)
        s = s + bias.to(tl.float32) if steps.additive else tl.where(bias, s, float("-inf"))
    if MASKED:
        end = Tk - 1 if steps.last is None else tl.minimum(row + steps.last, Tk - 1)
        visible = column <= end
        if steps.first is not None:
            visible = visible & (column >= row + steps.first)
        s = tl.where(visible, s, float("-inf"))
    return s, capped


@triton.jit
def exponent_of(score, steps):
    """The unit in which exp_of subtracts: base 2's, but a score's beside a float bias, whose lowest float times rate would be
    infinite, and in float32, where lse times rate would be rounded otherwise than the scores are."""
    return score if steps.natural else score * steps.rate


@triton.jit
def exp_of(s, base, steps):
    """exp(score - base), base from exponent_of."""
    if steps.natural:
        p = tl.exp2((s - base) * steps.rate)
    else:
        p = tl.exp2(s * steps.rate - base)
    return p


@triton.jit
def kept(i0, j0, head, steps, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Dropout's mask of a tile of rows from i0 and columns from j0, a multiple of 8; (BLOCK_N, BLOCK_M) if TRANSPOSED.

    What goes from the threads that draw to those that hold the tile is a word for 8 columns, not 8 of them.
    """
    group, row, bit = j0 // 8 + tl.arange(0, BLOCK_N // 8), i0 + tl.arange(0, BLOCK_M), tl.arange(0, 8)
    if TRANSPOSED:
        bits = philox_kept(steps.rng_state, group[:, None], row[None, :], head, steps.threshold)
        keep = tl.reshape(bits[:, None, :] >> bit[None, :, None] & 1, [BLOCK_N, BLOCK_M])
    else:
        bits = philox_kept(steps.rng_state, group[None, :], row[:, None], head, steps.threshold)
        keep = tl.reshape(bits[:, :, None] >> bit[None, None, :] & 1, [BLOCK_M, BLOCK_N])
    return keep != 0


@triton.jit
def tile_of(pid, blocks, heads, SECTION):
    """(block, head) of a program. All blocks of SECTION heads, whose keys and values fit the L2 cache together, before the
    next section's; in a section block by block, so that a causal launch ends with short programs."""
    section = pid // (blocks * SECTION)
    within = pid - section * blocks * SECTION
    here = tl.minimum(SECTION, heads - section * SECTION)
    return within // here, section * SECTION + within % here


@triton.jit
def clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def ranges(x0, first, last, T, BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr):
    """x sees the y in [0, T) with x + first <= y <= x + last (None: no limit). begin <= full_begin <= full_end, multiples of
    BLOCK_Y, and end: x0 ... x0 + BLOCK_X - 1 see nothing outside [begin, end) and everything in [full_begin, full_end)."""
    begin, full_begin, full_end, end = 0, 0, T, T
    if first is not None:
        begin = clamp(x0 + first, 0, T) // BLOCK_Y * BLOCK_Y
        full_begin = tl.cdiv(clamp(x0 + BLOCK_X - 1 + first, 0, T), BLOCK_Y) * BLOCK_Y
    if last is not None:
        full_end = clamp(x0 + last + 1, 0, T)
        end = clamp(x0 + BLOCK_X + last, 0, T)
    full_begin = tl.minimum(full_begin, tl.cdiv(end, BLOCK_Y) * BLOCK_Y)
    return begin, full_begin, tl.maximum(full_end // BLOCK_Y * BLOCK_Y, full_begin), end


# ---- forward ----


@triton.jit
def fwd_stage(
    o0, o1, l_i, m_i, q0, q1, k, v, k_strides, v_strides, i0, b, h, hk, head, slope, steps, Tq, Tk, begin, end,
    D: tl.constexpr, Dv: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax over the key blocks of [begin, end): o, l_i, m_i are its unnormalised output, sum and maximum."""
    row = i0 + tl.arange(0, BLOCK_M)[:, None]
    for j in range(begin, end, BLOCK_N):
        j = tl.multiple_of(j, BLOCK_N)
        k0, k1 = load_parts(k, k_strides, b, hk, j, Tk, D, D0, D1, BLOCK_N, MASKED, TMA)
        s = product(q0, q1, k0, k1, D1 > 0, PRECISION)
        s, _ = score_steps(s, row, j + tl.arange(0, BLOCK_N)[None, :], b, h, slope, steps, Tq, Tk, MASKED)
        m_new = tl.maximum(m_i, exponent_of(tl.max(s, 1), steps))
        base = m_new
        if MASKED or steps.bias is not None:
            base = tl.where(m_new == float("-inf"), 0.0, m_new)  # nothing seen yet
        alpha = tl.exp2((m_i - base) * steps.rate if steps.natural else m_i - base)
        m_i = m_new
        o0 = o0 * alpha[:, None]
        p = exp_of(s, base[:, None], steps)
        l_i = l_i * alpha + tl.sum(p, 1)
        if steps.rng_state is not None:
            p = tl.where(kept(i0, j, head, steps, BLOCK_M, BLOCK_N, False), p, 0.0)
        p = p.to(q0.dtype)
        v0, v1 = load_parts(v, v_strides, b, hk, j, Tk, Dv, V0, V1, BLOCK_N, MASKED, TMA)
        o0 = add_product(o0, p, v0, PRECISION)
        if V1:
            o1 = add_product(o1 * alpha[:, None], p, v1, PRECISION)
    return o0, o1, l_i, m_i


@triton.jit
def attention_fwd_kernel(
    o, lse, q, k, v, q_tail, k_tail, v_tail, o_strides, q_strides, k_strides, v_strides, steps, H, GROUP, Tq, Tk, blocks,
    heads, SECTION,
    D: tl.constexpr, Dv: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    block, head = tile_of(tl.program_id(0), blocks, heads, SECTION)
    i0 = (blocks - 1 - block) * BLOCK_M  # the rows that see most keys first
    b, h = head // H, head % H
    hk = h // GROUP
    slope = slope_of(steps, b, h)

    k, v = (k, k_tail), (v, v_tail)
    q0, q1 = load_parts((q, q_tail), q_strides, b, h, i0, Tq, D, D0, D1, BLOCK_M, True, TMA)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    o0 = tl.zeros([BLOCK_M, V0], tl.float32)
    o1 = tl.zeros([BLOCK_M, V1], tl.float32) if V1 else o0
    edges = ranges(i0, steps.first, steps.last, Tk, BLOCK_M, BLOCK_N)
    for stage in tl.static_range(1 if steps.first is None else 0, 3):
        o0, o1, l_i, m_i = fwd_stage(
            o0, o1, l_i, m_i, q0, q1, k, v, k_strides, v_strides, i0, b, h, hk, head, slope, steps, Tq, Tk, edges[stage],
            edges[stage + 1], D, Dv, D0, D1, V0, V1, PRECISION, TMA, BLOCK_M, BLOCK_N, stage != 1,
        )  # fmt: skip

    row = i0 + tl.arange(0, BLOCK_M)
    log_sum = (m_i if steps.natural else m_i * 0.6931471805599453) + tl.log(l_i)
    tl.store(lse + head.to(tl.int64) * Tq + row, log_sum, row < Tq)  # -inf for a row that saw nothing
    inverse = tl.where(l_i == 0.0, 0.0, steps.keep_scale / l_i)[:, None]
    store_parts(o, o_strides, b, h, i0, Tq, o0 * inverse, o1 * inverse, Dv, V0, V1)


# ---- launcher ----


def parts(D: int) -> tuple[int, int]:
    """The head dimension as one power of two or the sum of two, whichever pads less; at least 16 each."""
    whole = triton.next_power_of_2(max(D, 16))
    half = whole // 2
    rest = triton.next_power_of_2(max(D - half, 16))
    return (half, rest) if D > 16 and rest < half else (whole, 0)


def check_heads(op: str, name: str, t: Tensor, like: Tensor) -> None:
    check_device(op, name, t, like)
    check_dtype(op, name, t, like.dtype)
    if t.dim() != 4:
        fail(op, f"{name} must be 4-dimensional (batch, heads, tokens, head_dim), got shape {tuple(t.shape)}")
    if t.stride(3) != 1 and t.shape[3] > 1 and t.numel():
        fail(op, f"{name} must be contiguous in its last dimension, its stride there is {t.stride(3)}")
    if t.shape[3] > MAX_HEAD_DIM:
        fail(op, f"{name} has head_dim {t.shape[3]}, the limit is {MAX_HEAD_DIM}")


def check_bias(op: str, bias: Tensor, full: tuple[int, ...], q: Tensor) -> tuple[int, ...]:
    """Strides of the bias, 0 along dimensions that it broadcasts."""
    check_device(op, "bias", bias, q)
    if bias.dtype not in (torch.bool, q.dtype, torch.float32):
        fail(op, f"bias must be bool, {dtype_name(q.dtype)} like q or float32, got {dtype_name(bias.dtype)}")
    if bias.dim() != 4:
        fail(op, f"bias must be 4-dimensional (batch, heads, q tokens, k tokens), got shape {tuple(bias.shape)}")
    if any(n not in (1, want) for n, want in zip(bias.shape, full, strict=True)):
        fail(op, f"bias of shape {tuple(bias.shape)} does not broadcast to {full}")
    return tuple(0 if n == 1 else stride for n, stride in zip(bias.shape, bias.stride(), strict=True))


def check_slopes(op: str, slopes: Tensor, B: int, H: int, q: Tensor) -> tuple[int, int]:
    check_device(op, "alibi_slopes", slopes, q)
    check_dtype(op, "alibi_slopes", slopes, torch.float32)
    if slopes.shape not in ((H,), (B, H)):
        fail(op, f"alibi_slopes must have shape ({H},) or ({B}, {H}), got {tuple(slopes.shape)}")
    return (slopes.stride(0) if slopes.dim() == 2 else 0, slopes.stride(-1))


@dataclass(frozen=True)
class Call:
    """A checked call: its sizes, and the kernel arguments that every pass takes."""

    B: int
    H: int
    Hk: int
    Tq: int
    Tk: int
    steps: Steps
    widths: dict[str, Any]  # constexprs


def check_call(
    op, q, k, v, bias, alibi_slopes, rng_state, scale, softcap, dropout_p, causal_offset, window_left, window_right
) -> Call:
    if reason := unserved(op, target(q.device)):
        raise Declined(reason)
    check_float(op, "q", q)
    for name, t in (("q", q), ("k", k), ("v", v)):
        check_heads(op, name, t, q)
    (B, H, Tq, D), (Hk, Tk), Dv = q.shape, k.shape[1:3], v.shape[3]
    if not k.shape[0] == v.shape[0] == B:
        fail(op, f"q has batch {B}, k {k.shape[0]} and v {v.shape[0]}")
    if k.shape[3] != D:
        fail(op, f"k must have q's head_dim {D}, got {k.shape[3]}")
    if v.shape[1:3] != k.shape[1:3]:
        fail(op, f"v must have k's heads and tokens {(Hk, Tk)}, got {tuple(v.shape[1:3])}")
    if H and (Hk == 0 or H % Hk):
        fail(op, f"q's {H} heads must be a multiple of k's {Hk} heads")
    if Tq + Tk + 1024 >= 2**31 or B * H >= 2**31:  # rows, columns and their sums are 32 bits in the kernels
        fail(
            op, f"at most 2147482623 tokens of q and k and 2147483647 batch * heads, got q {tuple(q.shape)}, k {tuple(k.shape)}"
        )
    if not math.isfinite(scale):
        fail(op, f"scale must be finite, got {scale:g}")
    if not (math.isfinite(softcap) and softcap >= 0):
        fail(op, f"softcap must be finite and not negative, got {softcap:g}")
    if not -(2**40) < causal_offset < 2**40 or max(window_left, window_right) >= 2**40:
        got = f"{causal_offset}, {window_left}, {window_right}"
        fail(op, f"causal_offset, window_left and window_right must be below 2^40, got {got}")
    bias_strides = () if bias is None else check_bias(op, bias, (B, H, Tq, Tk), q)
    slopes_strides = () if alibi_slopes is None else check_slopes(op, alibi_slopes, B, H, q)
    threshold, keep_scale = check_dropout(op, rng_state, dropout_p, q)

    # the mask commutes with a positive scale, and the maximum too: with no step between, the scale waits for the exponent
    additive = bias is not None and bias.dtype != torch.bool
    natural = additive or q.dtype == torch.float32
    plain = scale > 1e-30 and softcap == 0 and alibi_slopes is None and not natural
    # a limit that hides nothing is none; one that hides everything needs no more than the end
    first, last = causal_offset - window_left, causal_offset + window_right
    steps = Steps(
        rate=scale * LOG2E if plain else LOG2E,
        scale=None if plain else scale,
        softcap=softcap or None,
        slopes=alibi_slopes,
        slopes_strides=slopes_strides,
        diagonal=causal_offset,
        bias=bias,
        bias_strides=bias_strides,
        additive=tl.constexpr(additive),
        natural=tl.constexpr(natural),
        first=min(first, Tk) if window_left >= 0 and first + Tq - 1 > 0 else None,
        last=max(last, -Tq) if window_right >= 0 and last < Tk - 1 else None,
        rng_state=rng_state if threshold else None,
        threshold=threshold,
        keep_scale=keep_scale,
    )
    (D0, D1), (V0, V1) = parts(D), parts(Dv)
    widths = dict(D=D, Dv=Dv, D0=D0, D1=D1, V0=V0, V1=V1, PRECISION=precision(target(q.device), q.dtype))
    return Call(B, H, Hk, Tq, Tk, steps, widths)


def precision(arch: str, dtype: torch.dtype) -> str:
    """Of products: "tf32" where torch asks for it, and float32 and the architecture have it; elsewhere Triton refuses it."""
    wanted = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"  # allow_tf32 sets it too
    return "tf32" if wanted and (arch.startswith("sm_") or arch == "gfx942") else "ieee"


def section(heads: int, *streamed: Tensor) -> int:
    """How many heads' streamed tensors (keys and values, or queries and output gradients) take half of a 40 MB L2 cache."""
    per_head = sum(t.shape[2] * t.shape[3] * t.element_size() for t in streamed)
    return min(max(1, 20 * 2**20 // max(1, per_head)), max(1, heads))


def wide(t: Tensor) -> bool:
    """Whether its rows can be read 16 bytes at a time, the only way of TMA and of copies that take no registers."""
    return t.data_ptr() % 16 == 0 and all(n * t.element_size() % 16 == 0 for n in (*t.stride()[:3], t.shape[3]))


def descriptors(arch: str, call: Call, **blocks: tuple[Tensor, int]) -> tuple[bool, list]:
    """Whether TMA reads the tensors, and what the kernel takes for them and then for their second parts: descriptors of
    (1, 1, rows, columns of the part) blocks."""
    tensors = [t for t, _ in blocks.values()]
    fits = (t.element_size() == 2 and t.numel() > 0 and min(t.stride()[:3]) > 0 and wide(t) for t in tensors)
    if arch not in TMA_ARCHS or not all(fits):
        return False, [*tensors, *[None] * len(tensors)]
    widths = {"q": "D", "k": "D", "v": "V", "do": "V"}

    def described(name: str, part: int):
        (t, rows), columns = blocks[name], call.widths[f"{widths[name]}{part}"]
        return TensorDescriptor(t, t.shape, t.stride(), [1, 1, rows, columns]) if columns else None

    return True, [described(name, part) for part in (0, 1) for name in blocks]


def strides(t: Tensor) -> tuple:
    """Batch, head and token; the token's is a constant of the kernel, so that a tile's addresses differ by constants."""
    return *t.stride()[:2], tl.constexpr(t.stride(2))


Table = dict[str, dict[int, list[tuple[int, ...]]]]


def tile_key(call: Call, *tensors: Tensor) -> dict[str, Any]:
    """What the tiles depend on."""
    q, v = tensors[0], tensors[-1]
    s = call.steps
    scaled = s.scale is not None and not s.natural.value
    steps = scaled or any(step is not None for step in (s.softcap, s.slopes, s.bias, s.rng_state))
    return dict(D=max(q.shape[3], v.shape[3]), dtype=q.dtype, steps=steps, aligned=all(wide(t) for t in tensors))


def chosen(table: Table, arch: str, D: int, dtype: torch.dtype, steps: bool, aligned: bool) -> Parameters:
    row = table["fp32" if dtype == torch.float32 else arch if aligned else "unaligned"]
    tiles = next(tiles for width, tiles in row.items() if D <= width)
    return dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), tiles[-1 if steps else 0], strict=True))


# BLOCK_M, BLOCK_N, num_warps, num_stages by the widest head dimension that they serve, read from machine code: of what stays
# out of local memory the least instructions and traffic of shared memory for the tensor work. Second, where there is one: with
# a step between product and exponent or dropout, whose values take registers. "unaligned": what cannot be copied 16 bytes at a
# time passes through registers. "fp32": multiply-adds, which keep whole rows in registers, on every architecture.
FWD: Table = {
    "fp32": {128: [(32, 32, 8, 1)], 256: [(16, 32, 8, 1)]},
    "unaligned": {128: [(64, 64, 4, 1)], 256: [(64, 32, 4, 1)]},
    "sm_80": {96: [(128, 64, 4, 3)], 128: [(128, 32, 4, 2), (64, 64, 4, 2)], 256: [(64, 32, 4, 2)]},
    "sm_86": {64: [(128, 64, 4, 2), (64, 64, 4, 2)], 96: [(64, 64, 4, 2)], 128: [(128, 64, 8, 2)], 256: [(64, 32, 4, 2)]},
    "sm_90": {
        64: [(128, 128, 4, 2), (128, 64, 4, 2)],
        96: [(64, 64, 4, 2)],
        128: [(128, 128, 8, 2), (64, 64, 4, 2)],
        256: [(128, 64, 8, 2)],
    },
    "sm_100": {64: [(128, 128, 8, 2), (128, 64, 8, 2)], 96: [(64, 64, 4, 2)], 256: [(128, 64, 8, 2)]},
    "sm_120": {96: [(64, 64, 4, 2), (64, 32, 4, 2)], 128: [(128, 64, 8, 2), (64, 32, 4, 2)], 256: [(64, 32, 4, 2)]},
    "gfx942": {64: [(128, 64, 4, 1)], 128: [(128, 32, 4, 1)], 256: [(64, 32, 4, 1)]},
}
FWD |= {"sm_89": FWD["sm_86"]} | dict.fromkeys(("gfx90a", "gfx1100", "gfx1201"), FWD["gfx942"])


def fitted(tunable: Tunable, device: torch.device, key: dict[str, Any], attempt: Callable[[Parameters], None]) -> Parameters:
    """attempt(parameters) with the tunable's, or with the largest smaller tile that the GPU has the memory for, if that is
    not known yet; the parameters that it was."""
    p = tunable(arch(device), **key)
    while True:
        try:
            attempt(p)
            return p
        except OutOfResources as error:
            if measuring():  # a candidate that does not fit is none
                raise
            wider = max("BLOCK_M", "BLOCK_N", key=lambda name: p[name])
            if p["num_stages"] > 1:
                p = p | {"num_stages": p["num_stages"] - 1}
            elif p[wider] > 16:
                p = p | {wider: p[wider] // 2}
            else:
                raise Declined(f"{tunable.name} with {text(key)} does not fit on {target(device)}: {error}") from error
            tunable.settle(arch(device), p, **key)


def neighbours(p: Parameters) -> list[Parameters]:
    """What is worth measuring beside p."""
    others = [p | {"BLOCK_N": n} for n in (32, 64, 128)] + [p | {"num_stages": n} for n in (1, 2, 3)]
    return [p, *(other for other in others if other != p)]


def made_up(device, D: int, dtype, steps: bool, aligned: bool) -> tuple[list[Tensor], tuple]:
    """q, k, v and the options of a causal call of this key."""
    inputs = [torch.randn(4, 16, 2048, D + (not aligned), device=device, dtype=dtype)[..., -D:] for _ in "qkv"]
    rng_state = torch.zeros(2, device=device, dtype=torch.int64) if steps else None
    return inputs, (None, None, rng_state, D**-0.5, 0.0, 0.1 if steps else 0.0, 0, -1, 0)


def _fwd_default(arch: str, Tq: int, **key) -> Parameters:
    p = chosen(FWD, arch, **key)
    if Tq < p["BLOCK_M"]:
        p |= {"BLOCK_M": max(16, triton.next_power_of_2(Tq)), "num_warps": 4}
    return p


def _fwd_candidates(arch: str, **key) -> list[Parameters]:
    return neighbours(_fwd_default(arch, **key))


def _fwd_problem(device, Tq: int, **key):
    (q, k, v), options = made_up(device, **key)
    return lambda: attention_fwd(q, k, v, *options)


ATTENTION_FWD = Tunable("attention_fwd", _fwd_default, _fwd_candidates, _fwd_problem)


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, alibi_slopes: Tensor | None, rng_state: Tensor | None, scale: float,
    softcap: float, dropout_p: float, causal_offset: int, window_left: int, window_right: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    call = check_call("attention_fwd", q, k, v, bias, alibi_slopes, rng_state, scale, softcap, dropout_p, causal_offset,
                      window_left, window_right)  # fmt: skip
    o = _empty_as(q, (call.B, call.H, call.Tq, v.shape[3]))
    lse = q.new_empty(call.B, call.H, call.Tq, dtype=torch.float32)

    def attempt(p: Parameters) -> None:
        blocks, heads = cdiv(call.Tq, p["BLOCK_M"]), call.B * call.H
        tma, inputs = descriptors(arch(q.device), call, q=(q, p["BLOCK_M"]), k=(k, p["BLOCK_N"]), v=(v, p["BLOCK_N"]))
        launch(
            attention_fwd_kernel, (blocks * heads,), q, o, lse, *inputs, strides(o), strides(q), strides(k), strides(v),
            call.steps, call.H, call.H // max(call.Hk, 1), call.Tq, call.Tk, blocks, heads, section(heads, k, v),
            **call.widths, TMA=tma, **p,
        )  # fmt: skip

    fitted(ATTENTION_FWD, q.device, dict(Tq=min(call.Tq, 128), **tile_key(call, q, k, v)), attempt)
    return o, lse
