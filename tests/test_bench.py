import json
import sys
import time

import pytest
import torch
import torch.nn.functional as F

import gpt_kernels
from benchmarks import harness

LIMITS = {"copy": 2e9, "gemm": 4e9}


def case(ours, eager=lambda x, w: F.layer_norm(x, (8,), w), dtype=torch.float32, **options):
    x, w = torch.randn(6, 8, dtype=dtype).requires_grad_(), torch.randn(8, dtype=dtype).requires_grad_()
    return harness.Case("layer_norm", "6x8", (x, w), eager, ours, lambda backward: (1000 * (1 + backward), 1), **options)


def measure(case, direction="fwd+bwd", use_compile=False):
    return harness.measure(case, direction, LIMITS, 0.01, use_compile)


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


@pytest.mark.parametrize("how", WRONG)
def test_no_number_for_a_wrong_output(how):
    for direction in ("fwd", "fwd+bwd") if how != "shape" else ("fwd",):
        row = measure(case(WRONG[how]), direction)
        assert row["mismatch"].startswith("output 0") and "seconds" not in row
        assert "no numbers:" in harness.cells(row)


def test_no_number_for_a_wrong_gradient():
    wrong = case(lambda x, w: gpt_kernels.layer_norm(WrongGradient.apply(x), w))
    assert measure(wrong, "fwd")["mismatch"] is None
    assert measure(wrong, "bwd")["mismatch"].startswith("output 0")
    assert measure(wrong, "fwd+bwd")["mismatch"].startswith("output 1")


def test_row():
    for dtype in (torch.float32, torch.bfloat16):
        for direction, moved in (("fwd", 1000), ("bwd", 2000), ("fwd+bwd", 3000)):
            row = measure(case(gpt_kernels.layer_norm, dtype=dtype), direction)
            assert row["mismatch"] is None and row["bytes"] == moved and row["bound"] == "copy"
            assert set(row["seconds"]) == set(row["memory"]) == {"eager", "ours"}
            assert row["of_limit"] == pytest.approx(moved / LIMITS["copy"] / row["seconds"]["ours"])
            assert row["ratio"] == row["seconds"]["eager"] / row["seconds"]["ours"]
            assert row["served"] == gpt_kernels.where("layer_norm_fwd")["CPU"]
            assert len(harness.cells(row)) == 11


def test_random_ops_are_checked_against_the_reference():
    q = torch.randn(1, 2, 16, 8).requires_grad_()

    def attend(sdpa, p):
        return lambda q: sdpa(q, q, q, dropout_p=p)

    def dropout_case(p):
        ours = attend(gpt_kernels.scaled_dot_product_attention, p)
        eager = attend(F.scaled_dot_product_attention, 0.5)
        return harness.Case("attention", "", (q,), eager, ours, lambda backward: (1, 1), random=True)

    assert measure(dropout_case(0.5))["mismatch"] is None
    not_random = dropout_case(0.5)
    not_random.random = False
    assert measure(not_random)["mismatch"] is not None


def test_a_failing_compiler_is_told(monkeypatch):
    def broken(function, **options):
        raise NotImplementedError("not this one\nmore")

    monkeypatch.setattr(torch, "compile", broken)
    row = measure(case(gpt_kernels.layer_norm), use_compile=True)
    assert "compile" not in row["seconds"] and row["compile_error"] == "not this one"
    assert "failed" in harness.cells(row)


@pytest.mark.skipif(harness.peak_memory(lambda: None) is None, reason="no /proc/self/clear_refs")
def test_peak_memory():
    size = 64 << 20

    def briefly():
        torch.ones(size, dtype=torch.uint8)
        torch.ones(size, dtype=torch.uint8)

    both = [harness.peak_memory(briefly), harness.peak_memory(lambda: [torch.ones(size, dtype=torch.uint8) for _ in range(2)])]
    assert both[0] == pytest.approx(size, rel=0.1) and both[1] == pytest.approx(2 * size, rel=0.1)


def test_variants_take_turns():
    order = []

    def variant(name):
        def call():
            order.append(name)
            time.sleep(1e-3)  # long enough to be called once per sample

        return call

    samples = harness.interleaved({"a": variant("a"), "b": variant("b")}, 0.02)
    assert len(samples["a"]) == len(samples["b"]) >= 9
    assert order[12:] == ["a", "b"] * len(samples["a"])  # after three calls each to estimate, and three that do not count
    assert min(samples["a"]) >= 1e-3


def test_gpu_times_and_memory(monkeypatch):
    """On a GPU: CUDA events in turn, and torch's allocator instead of the process."""
    monkeypatch.setattr(harness, "on_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(harness, "event_timer", lambda device: lambda call: call() or 2.0)
    order = []
    samples = harness.interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 0.02)
    assert samples == {"a": [2e-3] * 9, "b": [2e-3] * 9} and order == ["a", "b"] * 10  # once before, to compile
    held = {"now": 100, "peak": 100}

    def briefly():
        held["peak"] = held["now"] + 30

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: held.update(peak=held["now"]))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: held["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: held["peak"])
    assert harness.peak_memory(briefly) == 30 and harness.peak_memory(lambda: None) == 0


def test_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "measure_limits", lambda: LIMITS)
    file = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["bench", "--quick", "--no-compile", "--json", str(file)])
    asked = []

    def cases(quick):
        asked.append(quick)
        yield case(gpt_kernels.layer_norm)

    harness.run(cases)
    written = json.loads(file.read_text())
    assert asked == [True] and [row["direction"] for row in written["rows"]] == ["fwd", "fwd+bwd"]
    assert written["limits"] == LIMITS and written["environment"]["torch"] == torch.__version__
    out = capsys.readouterr().out
    assert "layer_norm" in out and "copy 2.0 GB/s, sgemm 4 GFLOP/s" in out
    with pytest.raises(SystemExit) as stop:
        harness.run(lambda quick: [case(WRONG["nan"])])
    assert stop.value.code == 1 and json.loads(file.read_text())["rows"][0]["mismatch"]


def test_bad_arguments(monkeypatch, capsys):
    with pytest.raises(ValueError, match="unknown direction 'both', expected one of fwd, bwd, fwd\\+bwd"):
        case(gpt_kernels.layer_norm, directions=("both",))
    monkeypatch.setattr(sys, "argv", ["bench", "--threads", "0"])
    with pytest.raises(SystemExit) as stop:
        harness.arguments()
    assert stop.value.code == 2 and "expected at least 1, got 0" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench", "--device", "cuda"])
    with pytest.raises(SystemExit) as stop:
        harness.arguments()
    assert stop.value.code == 2 and "--device cuda: torch sees no GPU" in capsys.readouterr().err
