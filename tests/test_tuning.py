"""Launch parameters: the table, measured winners, their file and what is refused; on a CPU, with a timer that we hold."""

import importlib
import json
import os
import stat
import sys
import threading
import types
import warnings

import pytest
import torch

from gpt_kernels import cache, cases, cli, info, triton
from gpt_kernels.architectures import ARCHITECTURES
from gpt_kernels.triton import common, tune, tuned, tuning
from gpt_kernels.triton.tuned import Tuned, text
from gpt_kernels.triton.tuning import Tunable, measure

MACHINE = {"gpu": "NVIDIA Test 9000", "arch": "sm_90", "driver": "1.2", "torch": "2", "triton": "3", "gpt_kernels": "0"}
KEY = {"N": 768, "dtype": torch.bfloat16}
CPU = torch.device("cpu")
SLOW, FAST = {"BLOCK": 1, "num_warps": 4}, {"BLOCK": 2, "num_warps": 8}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuned, "_tuned", {})
    return tmp_path


@pytest.fixture
def fake_gpu(home, monkeypatch):
    """A "GPU" on which every launch takes as many milliseconds as its parameters say; returns what was asked of it."""
    log = types.SimpleNamespace(timed=[], capturing=False)

    def timer(call):
        log.timed.append(call())
        return {1: 4.0, 2: 3.0}[log.timed[-1]["BLOCK"]]

    monkeypatch.setattr(tuning, "gpu", lambda arch: None if common.overridden() else CPU)
    monkeypatch.setattr(tuning, "event_timer", lambda device: timer)
    monkeypatch.setattr(tuned, "machine", lambda device, arch: MACHINE)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: log.capturing)
    return log


def tunable(offers=(SLOW, FAST), name="op", **replaced):
    """Its default is the first of its offers; its problem's result are the parameters that it was launched with."""

    def problem(device, **key):
        inputs = torch.randn(4)  # the random state must not move
        return lambda: (inputs, t("sm_90", **key))[1]

    parts = {"default": lambda arch, **key: offers[0], "candidates": lambda arch, **key: list(offers), "problem": problem}
    t = Tunable(name, **(parts | replaced))
    return t


def autotune(monkeypatch, on=True):
    monkeypatch.setattr(tuning, "AUTOTUNE", on)


# ---- choosing ----


def test_the_table_serves_without_measuring(fake_gpu, home):
    assert tunable()("sm_90", **KEY) is SLOW
    assert not fake_gpu.timed and not os.listdir(home)


def test_default_is_asked_once_for_each_key():
    asked = []
    t = tunable(default=lambda arch, **key: asked.append((arch, key)) or SLOW)
    for _ in range(3):
        t("sm_80", N=1)
        t("sm_80", N=2)
        t("sm_90", N=1)
    assert asked == [("sm_80", {"N": 1}), ("sm_80", {"N": 2}), ("sm_90", {"N": 1})]


def test_override_holds_inside_the_block_in_every_thread_and_for_one_tunable():
    t, other = tunable(), tunable()
    seen = []
    with t.override(FAST):
        assert t("sm_90", **KEY) is FAST and other("sm_90", **KEY) is SLOW
        thread = threading.Thread(target=lambda: seen.append(t("sm_90", **KEY)))  # autograd's, on a GPU
        thread.start()
        thread.join()
        with t.override(SLOW):
            assert t("sm_90", **KEY) is SLOW
        assert t("sm_90", **KEY) is FAST
    assert seen == [FAST] and t("sm_90", **KEY) is SLOW
    with pytest.raises(KeyError), t.override(FAST):
        raise KeyError
    assert t("sm_90", **KEY) is SLOW


@pytest.mark.parametrize("word, on", [("", False), ("0", False), ("off", False), ("1", True), ("ON", True), ("true", True)])
def test_autotune_switch(monkeypatch, word, on):
    monkeypatch.setenv("GPT_KERNELS_AUTOTUNE", word)
    assert tuning._autotune() is on


def test_autotune_refuses_another_word(monkeypatch):
    monkeypatch.setenv("GPT_KERNELS_AUTOTUNE", "maybe")
    with pytest.raises(ValueError, match="GPT_KERNELS_AUTOTUNE: expected 0 or 1, got 'maybe'"):
        tuning._autotune()


def test_autotune_measures_once_and_the_next_process_reads(fake_gpu, home, monkeypatch):
    autotune(monkeypatch)
    state = torch.get_rng_state()
    t = tunable()
    assert t("sm_90", **KEY) is FAST and t("sm_90", **KEY) is FAST
    assert len(fake_gpu.timed) == 2 * tuning.ROUNDS and torch.equal(torch.get_rng_state(), state)
    # another process: nothing in memory, no measuring asked for
    autotune(monkeypatch, False)
    monkeypatch.setattr(tuned, "_tuned", {})
    assert tunable()("sm_90", **KEY) is FAST and tunable()("sm_90", **(KEY | {"N": 769})) is SLOW
    assert tunable(name="another")("sm_90", **KEY) is SLOW and len(fake_gpu.timed) == 2 * tuning.ROUNDS
    (file,) = (home / "gpt_kernels").iterdir()
    assert file.name.startswith("tuned-nvidia-test-9000-") and stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_nothing_is_measured_during_a_graph_capture(fake_gpu, monkeypatch):
    autotune(monkeypatch)
    t = tunable()
    fake_gpu.capturing = True
    assert t("sm_90", **KEY) is SLOW and not fake_gpu.timed
    fake_gpu.capturing = False
    assert t("sm_90", **KEY) is FAST  # the default was not kept for good


def test_nothing_is_measured_for_an_architecture_that_is_not_here(fake_gpu, monkeypatch):
    autotune(monkeypatch)
    t = tunable()
    with common.use_arch("sm_90"):
        assert t("sm_90", **KEY) is SLOW and not fake_gpu.timed
    assert t("sm_90", **KEY) is FAST


def test_a_launch_inside_a_measurement_takes_its_default(fake_gpu, monkeypatch):
    """A backward's problem runs a forward that is to be tuned itself: later, not now."""
    autotune(monkeypatch)
    inner = tunable(name="inner")
    outer = tunable(name="outer")
    inside = []
    outer.problem = lambda device, **key: lambda: (inside.append(inner("sm_90", **key)), outer("sm_90", **key))[1]
    assert outer("sm_90", **KEY) is FAST and set(map(text, inside)) == {text(SLOW)}
    assert inner("sm_90", **KEY) is FAST


def test_other_threads_go_on_while_one_measures(fake_gpu, monkeypatch):
    """They neither wait nor see a candidate."""
    autotune(monkeypatch)
    t, busy, go_on, seen = tunable(), threading.Event(), threading.Event(), []
    problem = t.problem

    def slow_problem(device, **key):
        call = problem(device, **key)

        def wait():
            busy.set()
            assert go_on.wait(30)
            return call()

        return wait

    t.problem = slow_problem
    first = threading.Thread(target=lambda: seen.append(t("sm_90", **KEY)))
    first.start()
    assert busy.wait(30)
    assert t("sm_90", **KEY) is SLOW and t("sm_90", **(KEY | {"N": 1})) is SLOW
    go_on.set()
    first.join()
    assert seen == [FAST] and t("sm_90", **KEY) is FAST


def test_many_threads_agree(fake_gpu, monkeypatch):
    autotune(monkeypatch)
    tunables, answers = [tunable(name=str(i)) for i in range(8)], []
    threads = [
        threading.Thread(target=lambda t=t, n=n: answers.append((t, n, t("sm_90", N=n, dtype=torch.float32))))
        for t in tunables
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 64 and not tuning._hooks and not tuning._measuring.locked()
    for t, n, _ in answers:
        assert t("sm_90", N=n, dtype=torch.float32) is FAST


def test_a_measurement_that_fails_warns_and_leaves_the_default(fake_gpu, monkeypatch):
    autotune(monkeypatch)

    def problem(device, **key):
        raise torch.OutOfMemoryError("CUDA out of memory")

    t = tunable(problem=problem)
    with pytest.warns(RuntimeWarning, match="GPT_KERNELS_AUTOTUNE: op .*768.*: CUDA out of memory"):
        assert t("sm_90", **KEY) is SLOW
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert t("sm_90", **KEY) is SLOW
    assert not tuning._measuring.locked() and not tuning._hooks


def test_a_winner_that_cannot_be_stored_still_serves(fake_gpu, home, monkeypatch):
    autotune(monkeypatch)
    (home / "gpt_kernels").mkdir()
    (home / "gpt_kernels").chmod(0o777)
    with pytest.warns(RuntimeWarning) as caught:
        assert tunable()("sm_90", **KEY) is FAST
    messages = [str(w.message) for w in caught]
    assert len(messages) == 2 and "tuned parameters refused" in messages[0] and "not stored: cache refused" in messages[1]


# ---- measuring ----


def times(*milliseconds, offers=None):
    """(tunable, timer): candidate i takes milliseconds[i], an exception is raised"""
    offers = offers or tuple({"BLOCK": i} for i in range(len(milliseconds)))

    def timer(call):
        time = milliseconds[call()["BLOCK"]]
        if isinstance(time, Exception):
            raise time
        return time

    return tunable(offers), timer


def test_the_fastest_wins_and_noise_does_not():
    for milliseconds, best in (((4, 3, 2), 2), ((4, 2, 3), 1), ((2, 4, 3), 0), ((4, 3.95, 4.2), 0), ((1, 1, 1), 0)):
        t, timer = times(*milliseconds)
        result = measure(t, "sm_90", KEY, CPU, timer)
        assert result.best == {"BLOCK": best} and result.default_ms == milliseconds[0], milliseconds
        assert result.best_ms == milliseconds[best] and not result.failed


def test_candidates_take_turns():
    order = []
    t = tunable(({"BLOCK": 0}, {"BLOCK": 1}, {"BLOCK": 2}))
    measure(t, "sm_90", KEY, CPU, lambda call: order.append(call()["BLOCK"]) or 1.0)
    assert order == [0, 1, 2] * tuning.ROUNDS


def test_a_candidate_that_does_not_fit_is_left_out():
    t, timer = times(4, RuntimeError("out of resource: shared memory\nmore"), 3)
    result = measure(t, "sm_90", KEY, CPU, timer)
    assert result.best == {"BLOCK": 2} and result.failed == {'{"BLOCK": 1}': "out of resource: shared memory"}


def test_a_default_that_does_not_run_is_an_error():
    t, timer = times(RuntimeError("no"), 3)
    with pytest.raises(RuntimeError, match="the default cannot be measured: no"):
        measure(t, "sm_90", KEY, CPU, timer)
    with pytest.raises(RuntimeError, match="launches nothing that asks it"):
        measure(tunable(problem=lambda device, **key: lambda: None), "sm_90", KEY, CPU, lambda call: 1.0)
    assert not tuning._hooks


def test_offers_have_the_default_first_and_nothing_twice():
    assert tunable((SLOW, FAST, dict(SLOW))).offers("sm_90", **KEY) == [SLOW, FAST]
    assert tunable(candidates=lambda arch, **key: [FAST]).offers("sm_90", **KEY) == [SLOW, FAST]


def test_event_timer(monkeypatch):
    """Every timed call follows a write of more than the L2 holds and a spin of twice its host time, however slow its host is;
    the median of the events is the answer. A GPU that is ahead of the host waits for it between the events."""
    log = []

    class Event:
        clock = host = 0.0  # milliseconds; the device's, which does what it is told when it is told and free

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = Event.clock = max(Event.clock, Event.host)
            log.append("record")

        def synchronize(self):
            log.append("synchronize")

        def elapsed_time(self, end):
            return end.at - self.at

    class Flush:
        def zero_(self):
            Event.clock = max(Event.clock, Event.host) + 1
            log.append("flush")

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: types.SimpleNamespace(L2_cache_size=2**27))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", lambda n, dtype, device: (log.append(n), Flush())[1])
    device, python = [5.0, 1.0, 2.0, 2.0, 3.0, 2.0, 2.0], {}

    def spin(cycles):
        log.append("spin")
        Event.clock = max(Event.clock, Event.host) + cycles / tuning.CYCLES * 1e3

    def call():
        log.append("call")
        Event.host += python["ms"]
        Event.clock = max(Event.clock, Event.host) + next(took)

    monkeypatch.setattr(torch.cuda, "_sleep", spin)
    monkeypatch.setattr(tuning.time, "perf_counter", lambda: Event.host * 1e-3)
    # a call of 2 ms on the device, with a host that takes much less, and one that takes nearly as long
    for python["ms"] in (0.1, 1.9):
        log.clear()
        Event.clock = Event.host = 0.0
        took = iter([9, 9, 9, 9, *device])
        assert tuning.event_timer(CPU)(call) == pytest.approx(2.0)
        each = ["flush", "spin", "record", "call", "record"]
        assert log[0] == 4 * 2**27 and log[1:] == ["call", "call", *each * 2, "synchronize", *each * 7, "synchronize"]
    python["ms"], took = 2.1, iter([9] * 4 + device)
    assert tuning.event_timer(CPU)(call) > 0 and log.count("spin") == 9, "a host as slow as a whole model's: no spin"


# ---- the file ----


def entry(parameters=FAST, key=KEY, name="op"):
    return {"tunable": name, "key": json.loads(text(key)), "parameters": parameters, "default_ms": 4.0, "best_ms": 3.0}


def content(*choices, **replaced):
    return {"schema": tuned.SCHEMA, "machine": MACHINE, "choices": list(choices)} | replaced


def put(what):
    cache.write(Tuned(MACHINE).name, what if isinstance(what, bytes) else json.dumps(what).encode())


def test_a_good_file_is_used(fake_gpu):
    put(content(entry()))
    assert tunable()("sm_90", **KEY) is FAST
    assert Tuned(MACHINE).status().endswith(".json, 1 choices")


REFUSED = {
    "not JSON": (b"{", "Expecting property name"),
    "not text": (b"\xff\xfe\x00", "codec can't decode"),
    "code": (b"__import__('os').system('touch x')", "Expecting value"),
    "deep": (b"[" * 200000, "recursion"),
    "too large": (b" " * (tuned.LARGEST + 1), "more than 1048576 bytes"),
    "a list": ([], "not a file of tuned parameters"),
    "no machine": ({"schema": 1, "choices": []}, "not a file of tuned parameters"),
    "one field more": (content(extra=1), "not a file of tuned parameters"),
    "another schema": (content(schema=99), "its schema is 99, expected 1"),
    "another GPU": (content(entry(), machine=MACHINE | {"gpu": "Other"}), "it was measured on .*'Other'"),
    "another driver": (content(entry(), machine=MACHINE | {"driver": "9"}), "it was measured on .*'9'"),
    "another torch": (content(entry(), machine=MACHINE | {"torch": "9"}), "it was measured on"),
    "another Triton": (content(entry(), machine=MACHINE | {"triton": "9"}), "it was measured on"),
    "another version": (content(entry(), machine=MACHINE | {"gpt_kernels": "9"}), "it was measured on"),
    "choices of another type": (content(choices={}), "its choices are not a list"),
    "an entry of another type": (content(7), "entry 0 must have exactly the fields tunable, key"),
    "an entry without a key": (content({k: v for k, v in entry().items() if k != "key"}), "entry 0 must have exactly"),
    "a key of another type": (content(entry() | {"key": 3}), "key of entry 0 must be of type dict, got 3"),
    "a nested key": (content(entry() | {"key": {"N": {}}}), "must be a number, a string"),
    "a time of another type": (content(entry() | {"best_ms": "fast"}), "best_ms of entry 0 must be of type float"),
    "an unknown parameter": (content(entry(FAST | {"evil": 1})), "op with .* has no candidate .*evil"),
    "a missing parameter": (content(entry({"BLOCK": 2})), "has no candidate"),
    "a value outside": (content(entry({"BLOCK": 3, "num_warps": 8})), "has no candidate"),
    "a value of another type": (content(entry({"BLOCK": 2.0, "num_warps": 8})), "has no candidate"),
    "true for 1": (content(entry({"BLOCK": True, "num_warps": 4})), "has no candidate"),
    "a nested value": (content(entry({"BLOCK": {"x": 1}, "num_warps": 8})), "has no candidate"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(fake_gpu, home, name):
    what, reason = REFUSED[name]
    put(what)
    t = tunable()
    with pytest.warns(
        RuntimeWarning, match=f"tuned parameters refused, the defaults serve: .*tuned-.*json: .*{reason}"
    ) as caught:
        assert t("sm_90", **KEY) is SLOW
    assert len(caught) == 1 and str(home) in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        assert tunable()("sm_90", **KEY) is SLOW and tunable(name="another")("sm_90", **KEY) is SLOW
    assert "refused: " in tuned._tuned["sm_90"].status()


@pytest.mark.parametrize("fault", ["world-writable", "symlink", "directory", "folder"])
def test_a_file_that_is_not_private_is_refused(fake_gpu, home, fault):
    put(content(entry()))
    path = home / "gpt_kernels" / Tuned(MACHINE).name
    if fault == "symlink":
        path.rename(home / "elsewhere")
        path.symlink_to(home / "elsewhere")
    elif fault == "directory":
        path.unlink()
        path.mkdir()
    else:
        (path if fault == "world-writable" else path.parent).chmod(0o777)
    with pytest.warns(RuntimeWarning, match="tuned parameters refused.*json: "):
        assert tunable()("sm_90", **KEY) is SLOW


def test_a_refused_file_is_replaced_by_the_next_measurement(fake_gpu, monkeypatch):
    put(b"{")
    autotune(monkeypatch)
    with pytest.warns(RuntimeWarning, match="refused"):
        assert tunable()("sm_90", **KEY) is FAST
    assert len(Tuned(MACHINE)) == 1 and Tuned(MACHINE).refused is None


def test_other_machines_have_other_files():
    names = {Tuned(MACHINE | {field: "x"}).name for field in MACHINE} | {Tuned(MACHINE).name}
    assert len(names) == len(MACHINE) + 1 and all(cache.directory() / n == (cache.directory() / n).resolve() for n in names)
    assert "/" not in Tuned(MACHINE | {"gpu": "../../evil\x00"}).name


def test_spelling_is_exact():
    assert text({"a": 1, "b": torch.float32}) == text({"b": torch.float32, "a": 1}) == '{"a": 1, "b": "torch.float32"}'
    assert len({text({"a": v}) for v in (1, 1.0, True, "1", None)}) == 5
    with pytest.raises(TypeError, match="must be a number, a string, a dtype or None, got Tensor"):
        text({"a": torch.ones(1)})


def test_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test 9000")
    facts = tuned.machine(CPU, "sm_90")
    assert facts["triton"] == str(triton.version()) and facts["torch"] == torch.__version__ and facts["driver"]
    assert facts.keys() == MACHINE.keys() and all(isinstance(v, str) for v in facts.values())


# ---- the command ----


needs_triton = pytest.mark.skipif(triton.absence() is not None, reason=str(triton.absence()))
SMALL = cases.Sizes(2, 16, 32, 2, vocab=100)


@needs_triton
def test_tune_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(tune, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["tune"]) == 2
    assert capsys.readouterr().err == "gpt_kernels tune: torch sees no GPU, and a CPU's times say nothing about one\n"
    monkeypatch.setattr(tune, "INTERPRETED", True)
    assert cli.main(["tune"]) == 2 and "TRITON_INTERPRET is set" in capsys.readouterr().err
    monkeypatch.setattr(tune, "absence", lambda: "Triton is not installed")
    assert cli.main(["tune"]) == 2 and "Triton is not installed" in capsys.readouterr().err
    assert set(cases.SIZES) == {"gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"}


@pytest.mark.parametrize("flag", ["--op", "--dtype", "--sizes"])
def test_tune_refuses_unknown_words(capsys, flag):
    with pytest.raises(SystemExit) as stop:
        cli.main(["tune", flag, "nothing"])
    assert stop.value.code == 2 and f"{flag}: invalid choice: 'nothing'" in capsys.readouterr().err


def test_tune_refuses_an_unknown_architecture(capsys, monkeypatch):
    monkeypatch.setattr(tune, "INTERPRETED", False)
    monkeypatch.setattr(tune, "absence", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GTX 1")
    monkeypatch.setattr(common, "_target_of", lambda index: "sm_75")
    assert cli.main(["tune"]) == 2 and "GTX 1: sm_75 has no matrix instructions" in capsys.readouterr().err


@needs_triton
def test_tune_runs_stores_and_shows(fake_gpu, capsys, monkeypatch):
    """The whole command but for the GPU: jobs found by recording, every winner stored, one table."""
    dropout = importlib.import_module("gpt_kernels.triton.dropout")
    monkeypatch.setattr(tune, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: MACHINE["gpu"])
    monkeypatch.setattr(common, "_target_of", lambda index: "sm_90")
    monkeypatch.setattr(common, "_arch_of", lambda index: "sm_90")
    monkeypatch.setattr(tune, "gpu", lambda arch: CPU)
    monkeypatch.setattr(tune, "SIZES", {"gpt2": SMALL})
    monkeypatch.setattr(tune, "event_timer", lambda device: lambda call: call() and 1.0)
    offers = [{"BLOCK_M": 1, "BLOCK_N": 32, "num_warps": w} for w in (1, 2)]
    monkeypatch.setattr(dropout.DROPOUT, "default", lambda arch, **key: offers[0])
    monkeypatch.setattr(dropout.DROPOUT, "candidates", lambda arch, **key: offers)
    monkeypatch.setattr(dropout.DROPOUT, "problem", lambda device, **key: lambda: dropout.DROPOUT("sm_90", **key))
    monkeypatch.setattr(tune, "event_timer", lambda device: lambda call: 4.0 / call()["num_warps"])
    assert cli.main(["tune", "--op", "dropout", "--dtype", "bfloat16"]) == 0
    output = capsys.readouterr().out
    assert "2.00x" in output and "num_warps 2" in output and "N 32, dtype bfloat16" in output and "1 kernels in" in output
    assert Tuned(MACHINE).find("dropout_fwd", {"N": 32, "dtype": torch.bfloat16}, offers) is offers[1]


def test_tune_tells_what_could_not_be_measured(fake_gpu):
    good, bad = tunable(name="good"), tunable(name="bad", problem=lambda device, **key: lambda: None)
    assert good("sm_90", **KEY) is SLOW
    store = tuned.tuned(CPU, "sm_90")
    rows = tune.run([(bad, KEY), (good, KEY)], "sm_90", CPU, tuning.event_timer(CPU), store)
    assert rows[0][:3] == ("bad", "N 768, dtype bfloat16", "-") and "launches nothing" in rows[0][-1]
    assert rows[1] == ("good", "N 768, dtype bfloat16", "4", "3", "1.33x", "BLOCK 2, num_warps 8") and len(store) == 1
    assert good("sm_90", **KEY) is FAST  # at once, not only in the next process


def test_progress_without_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert tune._progress([1, 2]) == [1, 2]


# ---- every Tunable of the package ----


def every_question():
    """(arch, tunable, key) of every launch of a GPT-2's training step, on every architecture"""
    for arch in ARCHITECTURES:
        for t, key in tune.discover(arch, tune.DTYPES.values(), cases.SIZES.values()):
            yield arch, t, key


@needs_triton
def test_every_tunable_offers_its_default_and_plain_values():
    seen = {}
    for arch, t, key in every_question():
        assert seen.setdefault(t.name, t) is t, f"two Tunables named {t.name}"
        default, candidates = t.default(arch, **key), t.candidates(arch, **key)
        what = f"{t.name} {arch} {text(key)}"
        assert text(default) in [text(c) for c in candidates], f"{what}: the default is not among the candidates"
        assert len({text(c) for c in candidates}) == len(candidates), f"{what}: a candidate twice"
        assert all(c.keys() == default.keys() for c in candidates), f"{what}: candidates have other names than the default"
        assert t.default(arch, **key) == default, f"{what}: the default changes"
    modules = [module for name, module in sys.modules.items() if name.startswith("gpt_kernels.triton.")]
    owned = {v.name for module in modules for v in vars(module).values() if isinstance(v, Tunable)}
    assert owned <= seen.keys(), "a Tunable that no call of the training step asks"


@needs_triton
def test_every_problem_asks_for_its_own_key():
    """On "meta": a problem launches, asks its Tunable under the very key that it was made for, and launches each candidate."""
    for arch in ("sm_90", "gfx942"):
        for t, key in tune.discover(arch, [torch.bfloat16], [cases.SIZES["gpt2"]]):
            with common.recording(arch) as launches, tuning.asked() as questions:
                call = t.problem(torch.device("meta"), **key)
                launches.clear()
                call()
            assert (t.name, text(key)) in questions, f"{t.name}: its problem asks {list(questions)}, not {text(key)}"
            assert launches, t.name
            for candidate in t.candidates(arch, **key):
                with common.recording(arch) as launches, t.override(candidate):
                    call()
                assert launches, f"{t.name} {candidate}"


def test_info_tells_of_tuned_parameters(fake_gpu, monkeypatch):
    assert info()["triton"]["tuned"] == "none: no GPU to launch on"
    module = importlib.import_module("gpt_kernels.info")
    monkeypatch.setattr(module.triton, "INTERPRETED", False)
    monkeypatch.setattr(module.triton, "absence", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(common, "_arch_of", lambda index: "sm_90")
    assert module._tuned() == "none for this GPU, driver and versions: defaults"
