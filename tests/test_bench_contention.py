"""Other work on the machine: noticed, sample by sample, taken again, and said where it stays."""

import os
import subprocess
import sys
import time
import types

import bench_tools
import pytest
import torch

from gpt_kernels import cli, process
from gpt_kernels.bench import contention, diff, measure, report, run
from gpt_kernels.bench.measure import Settings, Variant
from gpt_kernels.bench.result import dumps, load

BUSY = "while True: pass"


class Machine:
    """A clock and a run queue: a call takes 10 ms, and as much again where it has to wait."""

    def __init__(self, monkeypatch, waits):
        self.now, self.waited, self.calls, self.waits = 0.0, {"1": 5, "2": 7}, 0, waits
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(contention, "waits", lambda: dict(self.waited))

    def call(self):
        wait = self.waits(self.calls)
        self.calls += 1
        self.now += 0.010 + wait
        self.waited["2"] += int(wait * 1e9)  # one thread waits, the call is late

    def samples(self):
        return measure.interleaved({"a": Variant(self.call)}, 0.0)["a"]


def test_a_quiet_machine(monkeypatch):
    """Waking threads is not contention."""
    machine = Machine(monkeypatch, lambda n: 1e-5)
    samples = machine.samples()
    assert samples == pytest.approx([0.01001] * 9) and not samples.disturbed and not samples.repeated
    assert measure.disturbance({"a": samples}, 0.0) == {}


def test_a_disturbed_sample_is_taken_again(monkeypatch):
    machine = Machine(monkeypatch, lambda n: 0.01 if n % 7 == 3 else 0.0)
    samples = machine.samples()
    assert samples == pytest.approx([0.010] * 9) and samples.repeated >= 2 and not samples.disturbed
    assert measure.disturbance({"a": samples}, 0.0) == {"repeated": samples.repeated}


def test_a_machine_that_stays_busy_is_said(monkeypatch):
    """24 ms ±0 %: each sample twice as long as it should be. Taken again, but not for ever."""
    machine = Machine(monkeypatch, lambda n: 0.01)
    samples = machine.samples()
    assert samples == pytest.approx([0.020] * 9) and samples.share == 1.0 and 9 <= samples.repeated <= 9 + contention.AGAIN
    facts = measure.disturbance({"a": samples, "copy": [1.0]}, 0.0)
    assert facts == {"disturbed": 1.0, "repeated": samples.repeated}
    assert measure.disturbance({"a": contention.Samples([1.0])}, 0.2) == {"disturbed": 1.0, "stolen": 0.2}
    assert measure.disturbance({"a": [1.0]}, 0.2) == {}, "a GPU's samples are not watched"


def test_of_disturbed_samples_the_least_stays(monkeypatch):
    waits = iter([0.008, 0.002, 0.005] + [0.0] * 100)
    machine = Machine(monkeypatch, lambda n: next(waits))
    samples = contention.Samples()
    for _ in range(2):
        samples.take(lambda: measure.once_more(machine.call, 1, warm=False))
    assert samples == pytest.approx([0.012, 0.010]) and (samples.disturbed, samples.repeated) == (1, 2)


def test_a_thread_that_begins_or_ends_meanwhile():
    assert contention.longest({"1": 100}, {"1": 100, "2": 3_000_000}) == pytest.approx(3e-3)
    assert contention.longest({"1": 100, "2": 9}, {"1": 100}) == 0.0 == contention.longest({}, {})


def test_a_system_that_does_not_tell(monkeypatch):
    def absent(*given, **more):
        raise FileNotFoundError

    monkeypatch.setattr(contention.os, "listdir", absent)
    monkeypatch.setattr("builtins.open", absent)
    assert contention.waits() == {} and contention.ticks() == [] and contention.others(0) is None
    assert contention.stolen([]) == 0.0


def test_what_others_and_a_hypervisor_take(monkeypatch):
    passed = iter([[0] * 8, [30, 0, 10, 160, 0, 0, 0, 0], [0] * 8, [0, 0, 0, 90, 0, 0, 0, 10]])
    monkeypatch.setattr(contention, "ticks", lambda: next(passed))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert contention.others(0) == 0.8
    assert contention.stolen(contention.ticks()) == 0.1


@pytest.mark.skipif(not contention.waits(), reason="no /proc/self/task/*/schedstat")
def test_busy_loops_of_other_processes():
    """For real: two of them on each processor."""
    matrix = torch.randn(256, 256)
    loops = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(2 * len(os.sched_getaffinity(0)))]
    try:
        time.sleep(0.3)
        samples = measure.interleaved({"mm": Variant(lambda: [matrix @ matrix for _ in range(20)])}, 0.0)["mm"]
        busy = contention.others()
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
    assert samples.share > contention.STAYED and samples.repeated > 0
    assert busy > 0.7 * len(os.sched_getaffinity(0))
    assert measure.disturbance({"mm": samples}, 0.0)["disturbed"] > contention.STAYED


def test_the_row_of_a_busy_machine(monkeypatch):
    machine = Machine(monkeypatch, lambda n: 0.01)
    trial = measure.Trial({name: Variant(machine.call) for name in ("eager", "ours")}, 8, 8)
    made = types.SimpleNamespace(
        op="gelu",
        shape="",
        main=True,
        length=None,
        dtype=torch.float32,
        served=lambda: "cpu",
        apart=True,
        trial=lambda direction, settings: trial,
    )
    limits = types.SimpleNamespace(rates={"copy": 1e9, "gemm": 1e9}, calls={}, work={})
    row = measure.measure(made, "fwd", limits, Settings(quick=True, compile=False))
    assert row["disturbed"] == 1.0 and row["repeated"] > 9 and report.stayed_disturbed(row)


# ---- what a reader sees ----


def busy_result(disturbed=0.5):
    return bench_tools.result([bench_tools.row(disturbed=disturbed, repeated=12), bench_tools.row("gelu")])


def test_the_first_line_says_it(tmp_path, capsys):
    result = busy_result()
    report.show(result)
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("DISTURBED: in 1 of 2 rows other work on the machine kept more than 25% of the samples waiting")
    assert "12 were" in first
    text = report.html(result, {})
    assert text.index("DISTURBED") < text.index("limits, medians") and 'class="bad">DISTURBED' in text
    row, quiet = result["rows"]
    assert all(
        report.timing(row, v).endswith("% disturbed") for v in ("ours", "eager")
    ) and "disturbed" in report.markdown_cell(row)
    assert "disturbed" not in report.timing(quiet, "ours") + report.markdown_cell(quiet)
    assert ",0.5," in report.csv_text([row])
    for r in (busy_result(0.1), bench_tools.result()):
        report.show(r)
        assert "DISTURBED" not in capsys.readouterr().out and "DISTURBED" not in report.html(r, {})
    assert report.disturbance(busy_result(0.1)).startswith("12 samples were taken again")
    assert report.disturbance(bench_tools.result()) == "", "a result of before"
    (tmp_path / "r.json").write_text(dumps(result))
    assert load(tmp_path / "r.json") == result
    diff.diff(str(tmp_path / "r.json"), str(tmp_path / "r.json"), 0.05, 0.01)
    assert capsys.readouterr().out.count("r.json: DISTURBED: in 1 of 2 rows") == 2


@pytest.mark.parametrize(
    "facts, said",
    [
        ({"cores": 2, "threads": 2, "processors in use by others": 1.1}, True),
        ({"cores": 8, "threads": 4, "processors in use by others": 1.1}, False),
        ({"cores": 2, "threads": 2, "processors in use by others": 0.1}, False),
        ({"cores": 2, "threads": 2, "processors in use by others": None}, False),
        ({"cores": 2, "threads": 2, "processors in use by others": 1.1, "gpu": "x"}, False),
        ({}, False),
    ],
)
def test_the_start_says_it(facts, said, capsys):
    run.warn_of_others(facts)
    assert ("other work uses 1.1 of 2 processors, 2 threads" in capsys.readouterr().err) == said


def test_a_bench_on_a_busy_machine(tmp_path, capsys, monkeypatch):
    """The whole command: at the start, in the first line of what it prints, in the file."""
    monkeypatch.setattr(process.signal, "signal", lambda *given: None)

    def events(command, job, folder):
        yield {"environment": {"cores": 2, "threads": 2, "processors in use by others": 1.5}}
        yield {"row": bench_tools.row("gelu", disturbed=1.0, repeated=30)}

    monkeypatch.setattr(run, "events", events)
    assert cli.main(["bench", "gelu", "--out", str(tmp_path)]) == 0
    streams = capsys.readouterr()
    assert streams.out.startswith("DISTURBED: in 1 of 1 rows") and "other work uses 1.5 of 2" in streams.err
    assert load(tmp_path / "bench.json")["rows"][0]["disturbed"] == 1.0


# ---- a GPU's host time ----


def test_the_hosts_time_stands_beside_the_devices():
    row = bench_tools.row()
    row["variants"]["ours"]["host"] = 15e-6
    assert report.timing(row, "ours").endswith(", host 15 µs") and "host" not in report.timing(row, "eager")
    assert ", host 15 µs" in report.markdown_cell(row) and "1.5e-05" in report.csv_text([row])


def test_host_seconds(monkeypatch):
    """The least of three runs, each from an empty queue, of few calls."""
    log, clock = [], iter(range(1000))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("sync"))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock) * 4e-4)
    for about, calls in ((1e-3, 2), (5e-6, 20), (1.0, 1), (0.0, 20)):
        log.clear()
        assert measure.host_seconds(lambda: log.append("call"), about) == pytest.approx(4e-4 / calls)
        assert log == ["sync", *["call"] * calls] * 3
