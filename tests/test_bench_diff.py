"""bench diff: noise is not a change, the machine's drift is none either, a regression is one; the exit code says so."""

import copy
import random

import bench_tools
import pytest

from gpt_kernels import cli
from gpt_kernels.bench.diff import compare
from gpt_kernels.bench.result import dumps

pytest.importorskip("scipy")
OPS = ("gelu", "softmax", "dropout", "rms_norm", "layer_norm", "attention")


def results(noise=0.02, **factors):
    """Two runs of the same code; in the second, layer_norm's "ours", "eager", "memory" or the "machine" grow by a factor."""
    both = []
    for n in range(2):
        rows = []
        for i, op in enumerate(OPS):
            r = bench_tools.row(op)
            for name, base in (("ours", 1e-3), ("eager", 2e-3)):
                scale = (factors.get("machine", 1.0) * (factors.get(name, 1.0) if op == "layer_norm" else 1.0)) ** n
                r["variants"][name] = bench_tools.variant(base * scale, noise, seed=100 * n + 10 * i + len(name))
            if op == "layer_norm" and n:
                r["variants"]["ours"]["memory"] = int(factors.get("memory", 1.0) * (64 << 20))
            elif op == "layer_norm":
                r["variants"]["ours"]["memory"] = 64 << 20
            rows.append(r)
        both.append(bench_tools.result(rows))
    return both


def verdicts(a, b, threshold=0.05, alpha=0.01):
    return {change.name.split()[0]: change.verdict for change in compare(a, b, threshold, alpha)}


SAME = dict.fromkeys(OPS, "same")


@pytest.mark.parametrize("noise", [0.01, 0.1, 0.5])
def test_noise_is_no_change(noise):
    assert verdicts(*results(noise)) == SAME


@pytest.mark.parametrize(
    "factors, verdict",
    [
        ({"ours": 1.3}, "slower"),
        ({"ours": 1 / 1.3}, "faster"),
        ({"ours": 1.03}, "same"),  # certain, and too small to count
        ({"ours": 1.3, "noise": 0.9}, "same"),  # large, and in the noise
        ({"machine": 1.5}, "same"),  # all is slower, eager too
        ({"machine": 1.5, "ours": 1.3}, "slower"),
        ({"machine": 0.6, "ours": 1.1}, "same"),  # still faster than it was: which of the two it is cannot be told
        ({"eager": 0.5}, "same"),  # a faster eager is not our regression
        ({"memory": 1.5}, "more memory"),
        ({"memory": 0.5}, "same"),
    ],
)
def test_what_counts(factors, verdict):
    assert verdicts(*results(**factors)) == SAME | {"layer_norm": verdict}


def test_interval_holds_the_change():
    (change,) = (c for c in compare(*results(ours=1.3), 0.05, 0.01) if c.verdict == "slower")
    assert (
        1.2 < change.low < change.ratio < change.high < 1.4 and change.p < 0.01 and change.eager == pytest.approx(1, abs=0.05)
    )


def test_threshold_and_alpha():
    a, b = results(ours=1.3)
    assert verdicts(a, b, threshold=0.4) == SAME and verdicts(a, b, alpha=1e-12) == SAME


def test_many_rows_raise_no_false_alarm():
    """Without a correction, 200 rows of noise at alpha = 0.1 would give some twenty."""
    a, b = (bench_tools.result([bench_tools.row(shape=str(i)) for i in range(200)]) for _ in range(2))
    draw = random.Random(0)
    for result in (a, b):
        for row in result["rows"]:
            for name, base in (("ours", 1e-3), ("eager", 2e-3)):
                row["variants"][name] = bench_tools.variant(base, 0.1, seed=draw.random())
    found = [c for c in compare(a, b, 0.0, 0.1) if c.verdict != "same"]
    assert len(found) <= 2


def test_a_row_that_has_become_wrong_is_a_regression():
    a, b = results()
    b["rows"][4] |= {"mismatch": "output 0 is off", "variants": {}}
    assert verdicts(a, b)["layer_norm"] == "wrong" and verdicts(b, a)["layer_norm"] == "no numbers"


def test_few_samples_are_said():
    a, b = results(ours=3.0)
    a["rows"][4]["variants"]["ours"]["samples"] = []
    assert verdicts(a, b)["layer_norm"] == "too few samples"
    a, b = results(ours=3.0)
    del a["rows"][4]["variants"]["eager"]
    assert verdicts(a, b)["layer_norm"] == "slower", "without eager, time alone"


def command(tmp_path, a, b, *flags):
    paths = []
    for name, result in (("a", a), ("b", b)):
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(dumps(result))
    return cli.main(["bench", "diff", *map(str, paths), *flags])


def test_command(tmp_path, capsys):
    a, b = results()
    assert command(tmp_path, a, b) == 0 and "6 rows in both: 6 same" in capsys.readouterr().out
    a, b = results(ours=1.3)
    assert command(tmp_path, a, b) == 1
    out = capsys.readouterr().out
    assert "layer_norm 8192x768 float32 fwd" in out and "slower" in out and "5 same, 1 slower" in out and "softmax" not in out
    assert command(tmp_path, b, a) == 0 and "1 faster" in capsys.readouterr().out
    assert command(tmp_path, a, b, "--threshold", "0.5") == 0


def test_what_is_not_comparable_is_said(tmp_path, capsys):
    a, b = results()
    b = copy.deepcopy(b)
    b["environment"] |= {"threads": 8}
    b["rows"] = b["rows"][1:] + [bench_tools.row(shape="new")]
    assert command(tmp_path, a, b) == 0
    out = capsys.readouterr().out
    assert "not the same threads: 2 and 8" in out and "a.json: 1 rows, gelu 8192x768" in out and "layer_norm new" in out
    b["rows"] = []
    assert command(tmp_path, a, b) == 0 and "0 rows in both: none" in capsys.readouterr().out
