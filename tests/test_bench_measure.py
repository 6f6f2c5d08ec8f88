"""One row of the benchmark: right first, turns, temperatures, memory, limits, and every variant that is missing says why."""

import contextlib
import dataclasses
import importlib
import itertools
import json
import sys
import time
import types

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import gpt_kernels
from gpt_kernels.bench import contention, measure, models, peers, products, run
from gpt_kernels.bench.measure import Case, Settings, Variant
from gpt_kernels.bench.settings import PRODUCTS
from gpt_kernels.cases import attention
from gpt_kernels.names import families
from gpt_kernels.triton import tuning

LIMITS = {"copy": 2e9, "gemm": 4e9}
FIXED = types.SimpleNamespace(rates=LIMITS, calls=dict.fromkeys(LIMITS, lambda: None), work={"copy": 3e6, "gemm": 5e6})
PLAIN = Settings(compile=False, quick=True)
interleaved, other_temperature = measure.interleaved, measure.other_temperature  # the real ones


@pytest.fixture(autouse=True)
def no_clock(monkeypatch):
    """Where time is not the matter, each variant is called once and got its samples from nowhere."""

    def called(variants, seconds, known, beside):
        for variant in variants.values():
            with variant.around():
                variant.call()
        return {name: [1e-3 * (1 + n / 100) for n in range(9)] for name in (*variants, *beside)}

    monkeypatch.setattr(measure, "interleaved", called)
    monkeypatch.setattr(measure, "other_temperature", lambda variants, once: once)
    monkeypatch.setattr(contention, "waits", dict)  # whatever else runs here, no sample is taken again


def case(ours=gpt_kernels.layer_norm, eager=lambda x, w: F.layer_norm(x, (8,), w), dtype=torch.float32, **options):
    def inputs():
        return [torch.randn(*s, dtype=dtype).requires_grad_() for s in ((6, 8), (8,))]

    def cost(inputs, backward):
        return 1000 * (1 + backward), 1

    return Case("layer_norm", "6x8", dtype, inputs, eager, ours, cost, **options)


def row_of(case, direction="fwd+bwd", settings=PLAIN):
    return measure.measure(case, direction, FIXED, settings)


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy * 1.01


WRONG = {
    "off by 1 %": lambda x, w: gpt_kernels.layer_norm(x, w) * 1.01,
    "nan": lambda x, w: gpt_kernels.layer_norm(x, w) + torch.tensor(float("nan")),
    "shape": lambda x, w: gpt_kernels.layer_norm(x, w)[None],
}


# ---- right first ----


@pytest.mark.skipif(gpt_kernels.dispatch.kernel_of("gelu_fwd", "cpu") is None, reason="of the C++ kernels")
def test_every_variant_is_held_against_float64_and_the_row_shows_it():
    """The known fact: PyTorch's own bfloat16 gradient of a layer norm's weight, over 8192 rows, is 7 % off, ours 0.2 %: no
    tolerance around eager hides it, and it is no mismatch of ours."""
    (of_size,) = [
        c
        for c in run.cases("layer_norm", Settings(dtypes=("float32", "bfloat16"), quick=True))
        if (c.shape, c.dtype) == ("8192x768", torch.bfloat16)
    ]
    trial = of_size.trial("fwd+bwd", Settings(quick=True, compile=False))
    assert trial.mismatch is None and trial.truth == "the op in float64"
    weight_gradient = 2  # after the output and x's
    assert trial.errors["ours"][weight_gradient] < 0.004 < 0.03 < trial.errors["eager"][weight_gradient]
    row = row_of(case(), "fwd")
    assert row["truth"] == "the op in float64"
    for name in ("eager", "ours"):
        (error,) = row["variants"][name]["errors"]
        assert 0 < error < 1e-6


def test_what_float64_has_no_room_for_is_held_against_float32(monkeypatch):
    monkeypatch.setattr(measure, "TRUTH_BYTES", 8)
    assert row_of(case(), "fwd")["truth"] == "the op in float32"


def test_a_little_more_than_allowed_is_a_mismatch_of_ours_and_none_of_a_peers():
    def slightly(x, w):
        return F.layer_norm(x, (8,), w) * (1 + 1e-5)

    assert row_of(case(slightly), "fwd")["mismatch"].startswith("output 0: error")
    row = row_of(case(others={"peer": lambda: slightly}), "fwd")
    assert row["mismatch"] is None and row["variants"]["peer"]["errors"][0] == pytest.approx(1e-5, rel=0.1)


@pytest.mark.parametrize("how", WRONG)
def test_no_number_for_a_wrong_output(how):
    for direction in ("fwd", "fwd+bwd") if how != "shape" else ("fwd",):
        row = row_of(case(WRONG[how]), direction)
        assert row["mismatch"].startswith("output 0") and "variants" not in row


def test_no_number_for_a_wrong_gradient():
    wrong = case(lambda x, w: gpt_kernels.layer_norm(WrongGradient.apply(x), w))
    assert row_of(wrong, "fwd")["mismatch"] is None
    assert row_of(wrong, "bwd")["mismatch"].startswith("output 0")
    assert row_of(wrong, "fwd+bwd")["mismatch"].startswith("output 1")


def test_another_variant_that_is_wrong_has_no_number_and_the_row_says_so():
    row = row_of(case(others={"hf": lambda: WRONG["nan"]}))
    assert row["mismatch"] is None and "hf" not in row["variants"] and row["absent"]["hf"].startswith("wrong: output 0")


def test_random_ops_are_checked_against_the_reference():
    def attend(sdpa, p):
        return lambda q: sdpa(q, q, q, dropout_p=p)

    ours = attend(gpt_kernels.scaled_dot_product_attention, 0.5)
    eager = attend(F.scaled_dot_product_attention, 0.5)

    def dropout_case(random):
        def inputs():
            return [torch.randn(1, 2, 16, 8).requires_grad_()]

        return Case("attention", "", torch.float32, inputs, eager, ours, lambda inputs, backward: (1, 1), random=random)

    assert row_of(dropout_case(True))["mismatch"] is None
    assert row_of(dropout_case(False))["mismatch"] is not None


# ---- the row ----


def test_row():
    for dtype in (torch.float32, torch.bfloat16):
        for direction, moved in (("fwd", 1000), ("bwd", 2000), ("fwd+bwd", 3000)):
            row = row_of(case(dtype=dtype), direction)
            assert row["mismatch"] is None and row["bytes"] == moved and row["bound"] == "copy" and row["tiny"]
            ours, eager = row["variants"]["ours"], row["variants"]["eager"]
            assert row["timed"] == "warm" and ours["cold"] > 0 and ours["first"] > 0 and ours["launch"] == ours["seconds"]
            assert len(ours["samples"]) == 9
            assert row["of_limit"] == pytest.approx(moved / LIMITS["copy"] / ours["seconds"])
            assert row["ratio"] == eager["seconds"] / ours["seconds"]
            assert row["served"] == str(gpt_kernels.where("layer_norm_fwd")["CPU"]) and row["limits"] == LIMITS


def made(trial, apart=False):
    """A case of which this trial comes."""
    return types.SimpleNamespace(
        op="decode",
        shape="",
        main=True,
        length=None,
        dtype=torch.float32,
        served=lambda: "cpu",
        apart=apart,
        trial=lambda direction, settings: trial,
    )


def test_time_of_many_units_is_per_unit(monkeypatch):
    trial = measure.Trial({name: Variant(lambda: None) for name in ("eager", "ours")}, 1 << 20, 8, units=4)

    def fixed(variants, seconds, known, beside):
        return {"eager": [8.0] * 9, "ours": [4.0] * 9, "copy": [1.0] * 9}

    monkeypatch.setattr(measure, "interleaved", fixed)
    row = row_of(made(trial), "token")
    assert row["variants"]["ours"]["seconds"] == 1.0 and row["variants"]["ours"]["cold"] == 1.0 and row["ratio"] == 2.0
    assert row["variants"]["ours"]["samples"] == [1.0] * 9


@pytest.mark.parametrize(
    "moved, flops, sampled, bound",
    [
        (8_000_000, 1_000_000, {"copy"}, "copy"),  # 4 ms and 0.25 ms at the case's limits
        (800_000, 8_000_000, {"gemm"}, "gemm"),  # 0.4 ms and 2 ms
        (3_000_000, 8_000_000, {"copy", "gemm"}, "copy"),  # 1.5 ms and 2 ms, but 2 ms and 1.6 ms when it is timed
        (1000, 8000, set(), "gemm"),  # tiny
    ],
)
def test_a_row_is_compared_with_limits_of_its_own_rounds(monkeypatch, moved, flops, sampled, bound):
    trial = measure.Trial({name: Variant(lambda: None) for name in ("eager", "ours")}, moved, flops)
    taken = {"eager": [1e-2] * 9, "ours": [8e-3] * 9, "copy": [1e-3, 4e-3, 2e-3], "gemm": [1e-3, 1e-3, 2e-3]}

    def fixed(variants, seconds, known, beside):
        assert beside == {name: FIXED.calls[name] for name in sampled}
        return {name: taken[name] for name in (*variants, *beside)}

    monkeypatch.setattr(measure, "interleaved", fixed)
    row = row_of(made(trial), "fwd")
    fresh = {"copy": 3e6 / 2e-3, "gemm": 5e6 / 1e-3}
    assert row["limits"] == {name: pytest.approx(fresh[name] if name in sampled else LIMITS[name]) for name in LIMITS}
    assert row["limits_spread"].keys() == sampled and row["bound"] == bound
    if "copy" in sampled:
        assert row["limits_spread"]["copy"] == pytest.approx((3e9 - 0.75e9) / 2)
    seconds = max(moved / row["limits"]["copy"], flops / row["limits"]["gemm"])
    assert row["of_limit"] == pytest.approx(seconds / 8e-3)
    assert json.dumps(row)


def test_memory_that_is_measured_apart_is_not_measured_here(monkeypatch):
    calls = []
    monkeypatch.setattr(measure, "peak_memory", lambda call: [calls.append("watched"), 7 - len(calls)][1])
    variants = {name: Variant(lambda: calls.append("called")) for name in ("eager", "ours")}
    row = row_of(made(measure.Trial(variants, 8, 8), apart=True), "step")
    assert row["variants"]["ours"]["memory"] is None and "watched" not in calls
    row = row_of(made(measure.Trial(variants, 8, 8)), "step")
    assert calls.count("watched") == 4 and row["variants"]["ours"]["memory"] is not None
    calls.clear()
    alone = types.SimpleNamespace(alone=lambda name: variants[name])
    assert measure.memory_apart(alone, "ours") == 4 and calls == ["called", "watched", "watched"], "the lesser, once warm"


def test_a_failing_compiler_is_told(monkeypatch):
    def broken(function, **options):
        raise NotImplementedError("not this one\nmore")

    monkeypatch.setattr(torch, "compile", broken)
    row = row_of(case(), settings=Settings(quick=True))
    assert "compile" not in row["variants"] and row["absent"]["compile"] == "not this one"
    monkeypatch.setattr(torch, "compile", lambda function, **options: lambda *inputs: 1 / 0)
    row = row_of(case(), "fwd", Settings(quick=True))  # not at compiling but at the first call
    assert "compile" not in row["variants"] and row["absent"]["compile"] == "division by zero"


def test_compile_is_timed_and_opaque_says_why_it_is_not(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    row = row_of(case(), settings=Settings(quick=True))
    assert row["variants"].keys() == {"eager", "compile", "ours"} and row["ratio"] == 1.0
    assert row_of(case(opaque="why"), settings=Settings(quick=True))["absent"] == {"compile": "why"}


def test_our_failure_is_not_swallowed():
    calls = itertools.count()

    def once_then_not(x, w):
        if next(calls):
            raise RuntimeError("later")
        return gpt_kernels.layer_norm(x, w)

    with pytest.raises(RuntimeError, match="later"):
        row_of(case(once_then_not), "fwd")


def test_other_backends_run_with_their_kernels_around_the_call(monkeypatch):
    served = []

    def ours(x, w):
        served.append(gpt_kernels.where("layer_norm_fwd")["CPU"].backend)
        return gpt_kernels.layer_norm(x, w)

    row = row_of(case(ours), "fwd", Settings(quick=True, compile=False, backends=("reference", "triton")))
    assert {"cpu", "reference"} == set(served) and row["variants"].keys() == {"eager", "ours", "reference"}
    assert "triton" in row["absent"] and "GPU" in row["absent"]["triton"]
    assert gpt_kernels.where("layer_norm_fwd")["CPU"].backend == "cpu"


def test_another_backend_that_is_wrong_has_no_number(monkeypatch):
    def ours(x, w):
        pushed = str(gpt_kernels.where("layer_norm_fwd")["CPU"]).startswith("cpu (pushed")
        return gpt_kernels.layer_norm(x, w) * (1.01 if pushed else 1.0)

    row = row_of(case(ours), "fwd", Settings(quick=True, compile=False, backends=("cpu",)))
    assert row["mismatch"] is None and row["absent"]["cpu"].startswith("wrong: output 0")


def test_the_naive_reference_is_left_out_where_memory_ends(monkeypatch):
    made = attention.case(1, 2, 64, 16, True, 0.0, torch.float32, naive=True, length=64)
    assert "reference" in row_of(made, "fwd")["variants"]
    monkeypatch.setattr(measure, "free_memory", lambda: 1e5)
    row = row_of(made, "bwd")
    assert "reference" not in row["variants"] and row["absent"]["reference"] == "needs about 0.0 GB, 0.0 are free"
    monkeypatch.setattr(measure, "free_memory", lambda: None)
    assert measure.too_large(made, made.inputs(), "fwd") is None


def test_the_first_call_is_the_one_that_compiles(monkeypatch):
    calls = itertools.count()

    def ours(x, w):
        time.sleep(0 if next(calls) else 0.2)
        return gpt_kernels.layer_norm(x, w)

    row = row_of(case(ours), "fwd")
    assert row["variants"]["ours"]["first"] > 0.2 > row["variants"]["eager"]["first"]


def test_real_clocks():
    assert measure.stopwatch(lambda: time.sleep(2e-3)) > 1e-3
    samples = interleaved({"a": Variant(lambda: time.sleep(2e-3))}, 0.01)
    assert len(samples["a"]) == 9 and min(samples["a"]) > 1e-3
    assert other_temperature({"a": Variant(lambda: time.sleep(2e-3))}, {"a": 2e-3})["a"] > 1e-3


# ---- clocks ----


class Clock:
    """Fake calls that take fixed times."""

    def __init__(self, monkeypatch):
        self.now, self.order = 0.0, []
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def variant(self, name, seconds, **more):
        def call():
            self.order.append(name)
            self.now += seconds

        return Variant(call, **more)


def test_variants_take_turns(monkeypatch):
    clock = Clock(monkeypatch)
    samples = interleaved({"a": clock.variant("a", 1e-3), "b": clock.variant("b", 2e-3)}, 0.03)
    assert len(samples["a"]) == len(samples["b"]) == 20
    assert samples["a"] == pytest.approx([1e-3] * 20) and samples["b"] == pytest.approx([2e-3] * 20)
    # after two calls each to estimate; three rounds do not count; each sample right after a call of the same variant
    assert clock.order[4:] == ["a", "a", "b", "b"] * 23


def test_tiny_calls_are_repeated_and_slow_ones_are_few(monkeypatch):
    clock = Clock(monkeypatch)
    assert len(interleaved({"a": clock.variant("a", 1e-6)}, 0.01)["a"]) == 50
    assert 50 * 201 <= len(clock.order) <= 60 * 201
    clock.order.clear()
    variants = {"a": clock.variant("a", 1.0), "naive": clock.variant("naive", 9.0, brief=True)}
    known = {"a": 1.1, "naive": 8.0}
    assert {name: len(s) for name, s in interleaved(variants, 0.3, known).items()} == {"a": 5, "naive": 1}
    assert clock.order == ["a", "a", "naive"] + 4 * ["a", "a"], "of a slow call it is known how long it takes"


def test_limits_are_sampled_among_the_rounds(monkeypatch):
    """At most so often, evenly, before the first variant."""
    clock = Clock(monkeypatch)
    variants = {"a": clock.variant("a", 1e-3), "b": clock.variant("b", 2e-3)}
    limit = clock.variant("copy", 5e-3).call
    samples = interleaved(variants, 0.3, beside={"copy": limit})
    assert {name: len(s) for name, s in samples.items()} == {"copy": 9, "a": 200, "b": 200}
    assert samples["copy"] == pytest.approx([5e-3] * 9) and samples["a"] == pytest.approx([1e-3] * 200)
    order = "".join(name[0] for name in clock.order)
    assert order == "aabb" + 3 * "aabb" + 8 * ("c" + 23 * "aabb") + "c" + 16 * "aabb", "no sample before the pages are there"
    for rounds, expected in ((0.03, 7), (0.0, 9)):
        assert len(interleaved(variants, rounds, beside={"copy": limit})["copy"]) == expected >= 5
    clock.order.clear()
    slow = {"a": clock.variant("a", 2.0)}
    assert len(interleaved(slow, 0.3, {"a": 2.0}, {"copy": limit})["copy"]) == 5 and clock.order == ["copy", "a", "a"] * 5


def test_what_is_around_a_call_is_not_timed(monkeypatch):
    clock, inside = Clock(monkeypatch), []

    @contextlib.contextmanager
    def around():
        clock.now += 100.0
        inside.append(True)
        yield
        inside.pop()

    def call():
        assert inside, "each call, timed or not"
        clock.now += 0.1

    samples = interleaved({"a": Variant(call, around=around)}, 0.3, beside={"copy": lambda: None})
    assert samples["a"] == pytest.approx([0.1] * 9) and samples["copy"] == [0.0] * 9


def test_cold_means_that_the_caches_were_written_over(monkeypatch):
    monkeypatch.setattr(measure, "cache_bytes", lambda: 1 << 20)
    written = []
    monkeypatch.setattr(torch.Tensor, "add_", lambda self, other: written.append(self.nbytes))
    clock = Clock(monkeypatch)
    variants = {"fast": clock.variant("fast", 1e-3), "slow": clock.variant("slow", 2.0)}
    assert other_temperature(variants, {"fast": 1e-3, "slow": 2.0}) == {"fast": pytest.approx(1e-3)}
    assert written == [2 << 20] * measure.COLD_ROUNDS


def test_limits(monkeypatch):
    asked, seconds = {}, {"copy": [0.5], "gemm torch.float32": [2e-3], "gemm torch.bfloat16": [1e-3]}

    def fake(variants, _):
        asked.update({name: variant.call for name, variant in variants.items()})
        return {name: seconds[name] for name in variants}

    monkeypatch.setattr(measure, "interleaved", fake)
    full = measure.Limits(torch.float32)
    assert full.rates == {"copy": 2 * (1 << 27) / 0.5, "gemm": 2 * 1024**3 / 2e-3} and len(asked) == 2
    assert full.rates == {name: full.work[name] / seconds[key][0] for name, key in zip(full.work, seconds, strict=False)}
    # the better of the two rates: a CPU without bfloat16 units is not held against a slow product
    for faster, rate in (("bfloat16", 1e-3), ("float32", 1e-4)):
        seconds["gemm torch.float32"] = [rate if faster == "float32" else 2e-3]
        half = measure.Limits(torch.bfloat16)
        assert half.rates["gemm"] == 2 * 1024**3 / rate
        assert half.calls == {"copy": asked["copy"], "gemm": asked[f"gemm torch.{faster}"]}
        assert half.calls["gemm"]().dtype == getattr(torch, faster)
    half.calls["copy"]()


def test_samples_are_thinned_evenly():
    kept = measure.thinned([float(i) for i in range(200)])
    assert len(kept) <= measure.MOST_SAMPLES and kept[0] == 0.0 and kept[-1] > 190 and kept == sorted(kept)
    assert measure.thinned([1.0, 2.0]) == [1.0, 2.0] and measure.half_interquartile([3.0]) == 0.0


@pytest.mark.skipif(measure.peak_memory(lambda: None) is None, reason="no /proc/self/clear_refs")
def test_peak_memory():
    size = 160 << 20  # more than any piece that malloc may have kept of the tests before

    def briefly():
        torch.ones(size, dtype=torch.uint8)
        torch.ones(size, dtype=torch.uint8)

    both = [
        measure.peak_memory(briefly),
        measure.peak_memory(lambda: [torch.ones(size, dtype=torch.uint8) for _ in range(2)]),
    ]
    assert both[0] == pytest.approx(size, rel=0.1) and both[1] == pytest.approx(2 * size, rel=0.1)


# ---- a GPU's way of it, without one ----


def test_gpu_times_and_memory(monkeypatch):
    """CUDA events in turn, and torch's allocator instead of the process."""
    monkeypatch.setattr(measure, "on_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    asked = []

    def timer(device, warm):
        asked.append(warm)
        return lambda call: [call(), 1.0 if warm else 2.0][1]

    monkeypatch.setattr(measure, "event_timer", timer)
    order = []
    variants = {name: Variant(lambda name=name: order.append(name)) for name in "ab"}
    assert interleaved(variants, 0.02) == {"a": [2e-3] * 9, "b": [2e-3] * 9} and order == ["a", "b"] * 9
    assert other_temperature(variants, dict.fromkeys("ab", 2e-3)) == {"a": 1e-3, "b": 1e-3} and asked == [False, True]
    assert other_temperature(variants, {"a": 2e-3, "b": 9.0}) == {"a": 1e-3}
    slow = interleaved(variants, 0.02, {"a": 9.0})
    order.clear()
    beside = interleaved(variants, 0.02, beside={"copy": lambda: order.append("copy")})
    assert list(beside) == ["copy", "a", "b"] and beside["copy"] == [2e-3] * 9 and order == ["copy", "a", "b"] * 9
    assert [len(s) for s in slow.values()] == [5, 5] and max(slow["a"]) < 1e-3 and slow["b"] == [2e-3] * 5, "a by the clock"
    held = {"now": 100, "peak": 100}

    def briefly():
        held["peak"] = held["now"] + 30

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: held.update(peak=held["now"]))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: held["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: held["peak"])
    assert measure.peak_memory(briefly) == 30 and measure.peak_memory(lambda: None) == 0
    monkeypatch.setattr(measure, "interleaved", interleaved)
    monkeypatch.setattr(measure, "other_temperature", other_temperature)
    row = row_of(case(), "fwd")
    assert row["timed"] == "cold" and row["variants"]["ours"]["warm"] == 1e-3 and row["variants"]["ours"]["seconds"] == 2e-3
    ours = row["variants"]["ours"]
    assert 0 < ours["launch"] == ours["host"] < 1.0, "the host's clock, without waiting"


def test_a_warm_sample_comes_right_after_another_call(monkeypatch):
    order = []

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            order.append("event")

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 10.0

    real = torch.empty
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(L2_cache_size=0))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: real(1, dtype=torch.int8))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append("spin"))
    for warm, expected in ((False, ["spin", "event", "call", "event"]), (True, ["call", "spin", "event", "call", "event"])):
        order.clear()
        assert tuning.event_timer(torch.device("cpu"), warm=warm)(lambda: order.append("call")) == 10.0
        assert order[: 2 + len(expected)] == ["call"] * 2 + expected, "after two for the host's time"


# ---- cases ----


def test_bad_direction():
    with pytest.raises(ValueError, match="unknown direction 'both', expected one of fwd, bwd, fwd\\+bwd"):
        case(directions=("both",))


def all_cases(**options):
    return [made for target in families() for made in run.cases(target, Settings(**options))]


def test_quick_is_a_part_of_the_whole_and_huge_is_asked_for():
    def names(**options):
        return {(c.op, c.shape, c.dtype) for c in all_cases(**options)}

    assert names(quick=True) < names() < names(huge=True)
    assert any("65536x4096" in shape for _, shape, _ in names(huge=True) - names())
    assert {dtype for _, _, dtype in names(dtypes=("float16",))} == {torch.float16}
    assert {op for op, _, _ in names(quick=True)} == set(families())
    bigger = {c.shape for c in all_cases(device="cuda") if c.op == "layer_norm"}
    assert "65536x768" in bigger and "1x64" in bigger


def test_each_op_has_main_and_tiny_cases():
    cases = all_cases()
    for op in families():
        mine = [c for c in cases if c.op == op]
        assert {c.dtype for c in mine if c.main} == {torch.float32, torch.bfloat16}, op
    assert [c.length for c in attention.sweep(Settings())] == [512, 1024, 2048, 4096, 8192, 16384]
    assert all(c.naive for c in attention.sweep(Settings()))


@pytest.mark.parametrize("op", families())
def test_the_first_case_of_each_op_is_measured(op, monkeypatch):
    if op == "attention":
        monkeypatch.setattr(attention, "SHAPES", ((1, 2, 24, 16, True, 0.0), (1, 2, 24, 16, True, 0.1)))
    settings = Settings(compile=False, against=tuple(peers.PEERS))
    for made in itertools.islice(run.cases(op, settings), 2 if op == "attention" else 1):
        for direction in made.directions:
            row = row_of(made, direction, settings)
            assert row["mismatch"] is None and {"eager", "ours"} <= row["variants"].keys(), row
            assert set(peers.PEERS) <= row["absent"].keys(), "a peer that is not there is told"
            if op in ("attention", "rms_norm", "gelu", "cross_entropy"):
                assert "hf" in row["variants"], row["absent"]


# ---- peers ----


def test_a_peer_says_why_it_is_absent(monkeypatch):
    found = peers.functions(("liger", "apex"), "gelu", {})
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None if name == "apex" else object())
    with pytest.raises(peers.Absent, match="not installed: build it from its repository"):
        found["apex"]()
    with pytest.raises(peers.Absent, match="its kernels need a GPU"):
        found["liger"]()
    monkeypatch.setattr(peers.torch, "get_default_device", lambda: torch.device("cuda"))
    with pytest.raises(peers.Absent, match="it has no gelu like ours"):
        found["liger"]()
    with pytest.raises(peers.Absent, match="its softmax takes no scale and mask"):
        peers.functions(("liger",), "softmax", {"causal": True})["liger"]()


def module(monkeypatch, name, **functions):
    parts = name.split(".")
    for n in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:n]), types.ModuleType(".".join(parts[:n])))
    for function, body in functions.items():
        setattr(sys.modules[name], function, body)


def test_adapters_call_as_the_documentation_has_it(monkeypatch):
    """Stand-ins with the documented signatures, computed by torch: the answers must be those of eager."""
    monkeypatch.setattr(peers.Peer, "absence", lambda self: None)

    def heads_first(q, k, v, dropout_p, causal):
        assert dropout_p == 0.0
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)

    class LowerTriangularMask:
        pass

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None):
        return heads_first(query, key, value, p, isinstance(attn_bias, LowerTriangularMask))

    module(
        monkeypatch,
        "xformers.ops",
        LowerTriangularMask=LowerTriangularMask,
        memory_efficient_attention=memory_efficient_attention,
    )
    module(
        monkeypatch,
        "flash_attn.ops.triton.layer_norm",
        layer_norm_fn=lambda x, weight, bias, residual=None, eps=1e-6: F.layer_norm(x, x.shape[-1:], weight, bias, eps),
        rms_norm_fn=lambda x, weight, bias, residual=None, eps=1e-6: F.rms_norm(x, x.shape[-1:], weight, eps),
    )

    def cross_entropy_loss(logits, labels, label_smoothing=0.0, inplace_backward=False):
        return F.cross_entropy(logits, labels, reduction="none"), None

    module(monkeypatch, "flash_attn.ops.triton.cross_entropy", cross_entropy_loss=cross_entropy_loss)
    sys.modules["flash_attn"].flash_attn_func = lambda q, k, v, dropout_p=0.0, softmax_scale=None, causal=False: heads_first(
        q, k, v, dropout_p, causal
    )
    module(
        monkeypatch,
        "apex.normalization.fused_layer_norm",
        fused_layer_norm_affine=lambda input, weight, bias, normalized_shape, eps=1e-6: F.layer_norm(
            input, normalized_shape, weight, bias, eps
        ),
        fused_rms_norm_affine=lambda input, weight, normalized_shape, eps=1e-6: F.rms_norm(
            input, normalized_shape, weight, eps
        ),
    )

    class SoftmaxCrossEntropyLoss(torch.autograd.Function):
        @staticmethod
        def apply(logits, labels, smoothing=0.0, padding_idx=0, half_to_float=False):
            return F.cross_entropy(logits, labels, ignore_index=padding_idx, reduction="none")

    module(monkeypatch, "apex.contrib.xentropy", SoftmaxCrossEntropyLoss=SoftmaxCrossEntropyLoss)
    monkeypatch.setattr(attention, "SHAPES", ((1, 2, 24, 16, True, 0.0), (1, 2, 24, 16, False, 0.0)))
    settings = Settings(compile=False, against=("flash_attn", "xformers", "apex"), dtypes=("float32",))
    given = {}
    for op in ("attention", "layer_norm", "rms_norm", "cross_entropy"):
        for made in itertools.islice(run.cases(op, settings), 2):
            trial = made.trial("fwd", settings)
            given[made.op] = set(trial.variants) - {"eager", "ours", "hf"}
            assert not any(reason.startswith("wrong") for reason in trial.absent.values()), trial.absent
    assert given == {
        "attention": {"flash_attn", "xformers"},
        "layer_norm": {"flash_attn", "apex"},
        "rms_norm": {"flash_attn", "apex"},
        "cross_entropy": {"flash_attn", "apex"},
    }


def test_a_process_that_measures(monkeypatch):
    """The heap is held for ops alone; on a CPU no default device, whose mode costs several times what a tiny call does."""
    import torch._functorch.config
    import torch._inductor.config

    done = []
    monkeypatch.setattr(measure, "hold_heap", lambda: done.append("held"))
    monkeypatch.setattr(measure.gpt_kernels, "reuse_memory", lambda: done.append("reused"))
    monkeypatch.setattr(torch, "set_default_device", done.append)
    monkeypatch.setattr(torch, "set_num_threads", done.append)
    chosen = [
        (Settings(device="cpu"), False, ["held"]),
        (Settings(device="cpu", threads=3), True, [3]),
        (Settings(device="cpu", reuse=True), False, ["reused"]),
        (Settings(device="cuda"), False, ["held", "cuda"]),
    ]
    with torch._functorch.config.patch(donated_buffer=True), torch._inductor.config.patch(compile_threads=2):
        for settings, whole_models, expected in chosen:
            done.clear()
            measure.configure(settings, models=whole_models)
            assert done == expected
        assert not torch._functorch.config.donated_buffer and torch._inductor.config.compile_threads == 1


# ---- models ----

SMALL = models.Sizes(layers=1, width=32, heads=2, vocab=101, batch=2, length=16, prompt=6, new=4)


@pytest.fixture
def small(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(models, "QUICK", SMALL)
    for name in ("LLAMA", "BERT"):
        monkeypatch.setattr(models, name, (dataclasses.replace(SMALL, kv_heads=1, inner=48),) * 3)
    return Settings(quick=True, compile=False, against=("liger",))


@pytest.mark.parametrize("target, direction", [("gpt", "step"), ("decode", "token")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_models(small, target, direction, dtype):
    small.dtypes = (dtype,)
    (made,) = run.cases(target, small)
    (only,) = made.directions
    row = row_of(made, only, small)
    assert only == direction and row["mismatch"] is None and row["variants"].keys() == {"eager", "ours", "GPT", PRODUCTS}
    assert row["absent"]["liger"] == "compared op by op, not in a whole model" and row["main"] and row["op"] == target
    assert all(v["memory"] is None for v in row["variants"].values()) and made.apart


@pytest.mark.parametrize("target, direction", [("llama", "step"), ("bert", "fwd+bwd")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_models_of_other_families(small, target, direction, dtype):
    small.dtypes = (dtype,)
    (made,) = run.cases(target, small)
    row = row_of(made, direction, small)
    assert made.directions == (direction,) and row["mismatch"] is None and row["op"] == target
    assert row["variants"].keys() == {"eager", "ours", PRODUCTS}


def test_llama_and_bert_have_their_sizes_and_every_dtype():
    (llama, llama16), (bert, bert16) = (list(run.cases(target, Settings())) for target in ("llama", "bert"))
    s = llama.sizes
    assert (s.layers, s.width, s.heads, s.kv_heads, s.inner, s.vocab, s.batch, s.length) == (6, 512, 8, 2, 1408, 32000, 2, 512)
    assert (llama.dtype, llama16.dtype, bert.dtype, bert16.dtype) == (torch.float32, torch.bfloat16) * 2
    assert llama.optimizer and not bert.optimizer and (bert.sizes.layers, bert.sizes.width) == (12, 768)


def test_a_backward_without_optimizer_changes_no_weight(small):
    (case,) = run.cases("bert", small)
    model, ids = case.start(case)
    before = [p.detach().clone() for p in model.parameters()]
    case.variant(case, "eager", model, ids).call()
    assert all(map(torch.equal, before, model.parameters())) and all(p.grad is None for p in model.parameters())


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(f"{func._opname}.{func._overloadname}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("target", ["gpt", "llama", "bert", "decode"])
def test_products_are_all_of_a_steps_and_nothing_else(small, target):
    """As many flops in products as torch's own counter finds, without the attention's; and replayed, nothing but these."""
    (case,) = run.cases(target, small)
    variant = case.variant(case, "eager", *case.start(case))
    with FlopCounterMode(display=False) as counter, products.Products() as found:
        variant.call()
    counts = counter.get_flop_counts()["Global"]
    attention = sum(n for op, n in counts.items() if "attention" in str(op))
    assert found.flops == sum(counts.values()) - attention > 0 and len(found) > 10
    with FlopCounterMode(display=False) as again, Names() as names:
        found()
    assert again.get_total_flops() == found.flops and set(names.seen) <= {"mm.out", "bmm.out"} and len(names.seen) == len(found)


def test_products_of_strided_operands_have_their_strides():
    a, b, bias = torch.randn(6, 4).t(), torch.randn(3, 6).t(), torch.randn(3)
    with products.Products() as found:
        torch.addmm(bias, a, b)
        torch.bmm(torch.randn(2, 3, 4).transpose(1, 2), torch.randn(1, 3, 5).expand(2, 3, 5))
    (mm, x, y, out), (bmm, _, expanded, _) = found._calls
    assert mm is torch.mm and bmm is torch.bmm and x.stride() == a.stride() and y.stride() == b.stride()
    assert out.shape == (4, 3) and expanded.stride(0) == 0
    found()
    torch.testing.assert_close(out, x @ y)


def test_sizes_of_models():
    """The quick run has one, the full one every dtype, and a model so small that it costs what calling costs."""
    found = [(case.sizes, case.dtype) for case in run.cases("gpt", Settings())]
    assert found == [(models.FULL, torch.float32), (models.FULL, torch.bfloat16), (models.TINY, torch.float32)]
    assert [case.sizes for case in run.cases("gpt", Settings(quick=True))] == [models.QUICK]


@pytest.mark.parametrize("target", ["gpt", "decode"])
def test_a_variant_alone_is_the_one_of_the_trial(small, target, monkeypatch):
    """The same weights, the same tokens, the same answer."""
    started = []

    def kept(case, name, model, ids):
        started.append((name, ids, [p.detach().clone() for p in model.parameters()]))
        return real(case, name, model, ids)

    (case,) = run.cases(target, small)
    real = case.variant
    case.variant = kept
    trial = case.trial(case.directions[0], Settings(quick=True, compile=target == "gpt"))
    assert trial.variants.pop(PRODUCTS)  # whose memory nobody asks for
    for name in trial.variants:
        torch.rand(3)  # whatever was drawn before
        variant = case.alone(name)
        beside = next(s for s in started if s[0] == name)
        assert torch.equal(started[-1][1], beside[1])
        assert all(map(torch.equal, started[-1][2], beside[2])) and len(beside[2]) > 10
        if target == "decode":
            assert torch.equal(variant.call(), trial.variants[name].call())
    assert measure.memory_apart(case, "ours") is None or measure.memory_apart(case, "ours") >= 0


def test_a_wrong_model_has_no_numbers(small, monkeypatch):
    (step,) = itertools.islice(run.cases("gpt", small), 1)
    monkeypatch.setattr(models, "patched", lambda model: model)
    monkeypatch.setattr(models, "wrong_step", lambda *given: "FAIL: worse than eager")
    assert row_of(step, "step", small)["mismatch"] == "FAIL: worse than eager"


def test_a_token_that_eager_would_not_choose_is_noticed(small):
    model = models.build(SMALL, 0.0).eval()
    prompt = torch.randint(1, 101, (1, 6))
    ids = model.generate(prompt, do_sample=False, max_new_tokens=4, min_new_tokens=4, pad_token_id=0)
    assert models.wrong_tokens(model, ids, 6, torch.float32) is None
    worst = ids.clone()
    with torch.no_grad():
        worst[0, 7] = model(input_ids=ids[:, :7]).logits[0, -1].argmin()
    assert "behind eager's best" in models.wrong_tokens(model, worst, 6, torch.float32)


def test_verify_is_what_checks_a_step(small, monkeypatch):
    """A patched model that is wrong: the trial says so."""
    real = gpt_kernels.layer_norm
    monkeypatch.setattr(
        importlib.import_module("gpt_kernels.integrations.torch_nn"), "layer_norm", lambda *a, **k: real(*a, **k) * 1.05
    )
    (step,) = itertools.islice(run.cases("gpt", small), 1)
    assert step.trial("step", small).mismatch.startswith("FAIL")
