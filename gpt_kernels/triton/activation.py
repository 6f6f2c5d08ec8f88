"""SiLU and GELU: what gelu and glu share. All are v s(v), with s = 1 / (1 + e^-v), its like of the tanh form, or the normal
distribution's."""

from __future__ import annotations

import triton
import triton.language as tl

from ..ops import glu

SILU = tl.constexpr(glu.SILU)
GELU_TANH = tl.constexpr(glu.GELU_TANH)
GELU = tl.constexpr(glu.GELU)
LOG2_E = tl.constexpr(1.4426950408889634)
A = tl.constexpr(1.5957691216057308)  # 2 sqrt(2/pi)
B = tl.constexpr(1.5957691216057308 * 0.044715)
NORMAL = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)


@triton.jit
def gauss(v):
    """e^(-v^2 / 2)"""
    return tl.exp2(v * v * (-0.5 * LOG2_E))


@triton.jit
def normal_cdf(v, gauss):
    """The normal distribution function: gauss(v) P(t) on the left, relatively accurate, and 1 minus that on the right.

    P, in t = 2 / (2 + |v|), is the CPU kernel's fit (csrc/cpu/arithmetic.h).
    """
    t = 2.0 / (2.0 + tl.abs(v))
    p = -4.795330753e-2
    p = p * t + 2.306086126e-1
    p = p * t - 3.939418775e-1
    p = p * t + 1.838505251e-1
    p = p * t + 1.293441268e-1
    p = p * t + 1.980829209e-1
    p = p * t + 2.000089698e-1
    beyond = p * t * gauss
    return tl.where(v < 0, beyond, 1.0 - beyond)


@triton.jit
def exp_of(v, ACT: tl.constexpr):
    """e^-v, or e^-2u of y = v (1 + tanh u) / 2 = v / (1 + e^-2u): one exponential, and no cancellation where tanh u is close
    to -1"""
    if ACT == SILU:
        return tl.exp2(v * -LOG2_E)
    else:
        return tl.exp2(v * (-A * LOG2_E - B * LOG2_E * v * v))


@triton.jit
def activate(v, ACT: tl.constexpr):
    if ACT == GELU:
        return v * normal_cdf(v, gauss(v))
    else:
        return v / (1.0 + exp_of(v, ACT))


@triton.jit
def factor_and_slope(v, ACT: tl.constexpr):
    """s(v), and the derivative of v s(v)"""
    if ACT == GELU:
        g = gauss(v)
        s = normal_cdf(v, g)
        return s, s + v * g * NORMAL
    else:
        # p = s(|v|), q = 1 - p without the subtraction, which what follows would magnify; s(v) is one of them
        e = exp_of(tl.abs(v), ACT)
        p = 1.0 / (1.0 + e)
        q = e * p
        s = tl.where(v < 0, q, p)
        if ACT == SILU:
            return s, s + v * p * q
        else:
            return s, s + v * p * q * (A + 3.0 * B * tl.minimum(v * v, 1e30))  # 0 times inf is none


@triton.jit
def gelu(v, TANH: tl.constexpr):
    return activate(v, GELU_TANH if TANH else GELU)


@triton.jit
def gelu_slope(v, TANH: tl.constexpr):
    _, slope = factor_and_slope(v, GELU_TANH if TANH else GELU)
    return slope
