"""patch(policy="measured") keeps eager where ours is slower, and believes no file that is not its own to the letter."""

import json
import os
import sys
import time
import warnings

import pytest
import torch
from torch import nn

import gpt_kernels
from gpt_kernels import cache, measured, policy
from gpt_kernels.patch import is_patched, register

FASTER = {"eager": 2e-3, "ours": 1e-3, "slower": 0.0}
SLOWER = {"eager": 1e-3, "ours": 2e-3, "slower": 1.0}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.act = nn.LayerNorm(8), nn.Dropout(0.5), nn.GELU()
        self.out = nn.LayerNorm(8)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        return self.out(self.act(self.drop(self.norm(x))))


@pytest.fixture
def model():
    return Block().train()


def x(rows=4):
    return torch.randn(rows, 8)


def says(monkeypatch, entry):
    """What measuring finds: entry of each kind, or the function's answer."""
    asked = []

    def measured_(kind):
        asked.append(kind)
        return entry(kind) if callable(entry) else entry

    monkeypatch.setattr(policy, "measured", measured_)
    return asked


def by_class(**entries):
    return lambda kind: entries.get(type(kind.module).__name__, FASTER)


# ---- the decision ----


def test_what_is_slower_is_kept_with_its_times(model, monkeypatch):
    asked = says(monkeypatch, by_class(LayerNorm=SLOWER))
    plan = gpt_kernels.patch(model, policy="measured", sample=x())
    assert [row.path for row in plan.swapped] == ["drop", "act"]
    reasons = {row.path: row.why for row in plan.kept}
    assert reasons["norm"] == reasons["out"] == "eager was faster here: 1 ms against 2 ms at (4, 8) float32"
    assert len(asked) == 4 and all(k.calls == 1 for k in asked), "norm's input needs no gradient, out's does"
    assert type(model.norm) is nn.LayerNorm and type(model.drop) is not nn.Dropout


def test_what_is_faster_is_swapped_and_dry_run_swaps_nothing(model, monkeypatch):
    says(monkeypatch, FASTER)
    assert len(gpt_kernels.patch(model, dry_run=True, policy="measured", sample=x()).swapped) == 4 and not is_patched(model)
    assert len(gpt_kernels.patch(model, policy="measured", sample=x()).swapped) == 4 and is_patched(model)


def test_slower_in_too_few_rounds_is_noise(model, monkeypatch):
    says(monkeypatch, SLOWER | {"slower": 0.7})
    assert len(gpt_kernels.patch(model, policy="measured", sample=x()).swapped) == 4


def test_a_patched_model_is_unpatched_where_it_is_slower(model, monkeypatch):
    gpt_kernels.patch(model)
    says(monkeypatch, by_class(GELU=SLOWER))
    plan = gpt_kernels.patch(model, policy="measured", sample=x())
    assert type(model.act) is nn.GELU and "act" not in [row.path for row in plan.swapped] and len(plan.swapped) == 3
    assert gpt_kernels.unpatch(model) == 3


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(x).sum() + self.norm(x[:1]).sum()


@pytest.mark.parametrize(
    "one, all_rows, kept",
    [
        ({"eager": 1e-4, "ours": 2e-4}, {"eager": 2e-3, "ours": 1e-3}, False),  # 2.1 ms against 1.2
        ({"eager": 1e-3, "ours": 2e-3}, {"eager": 2e-3, "ours": 2.1e-3}, True),  # 3 ms against 4.1
    ],
)
def test_calls_of_several_shapes_count_by_their_time(monkeypatch, one, all_rows, kept):
    says(monkeypatch, lambda kind: SLOWER | (one if "(1, 8)" in kind.shapes else all_rows))
    plan = gpt_kernels.patch(Twice(), policy="measured", sample=x())
    assert bool(plan.swapped) != kept
    if kept:
        assert plan.kept[-1].why == "eager was faster here: 1 ms against 2 ms at (1, 8) float32"


class Fused(nn.Module):
    """Ours does the activation's work inside."""

    def __init__(self):
        super().__init__()
        self.act = nn.GELU()

    def forward(self, x):
        return self.act(x)


@pytest.fixture
def fused_rule():
    module = sys.modules["gpt_kernels.patch"]  # the name gpt_kernels.patch is the function
    before = list(module._rules)

    @register(Fused, ("gelu",), "both in one", fuses=("act",), serves=lambda module, x: True)
    class Ours:
        def forward(self, x):
            time.sleep(1e-2)
            return gpt_kernels.gelu(x, None, "none")

    yield
    module._rules[:] = before


def test_what_is_really_slower_is_kept_and_what_it_fused_is_looked_at(fused_rule):
    model = Fused()
    assert [row.path for row in gpt_kernels.patch(model, dry_run=True).swapped] == [""]
    plan = gpt_kernels.patch(model, policy="measured", sample=x(4).requires_grad_())
    why = {row.path: row.why for row in plan.rows}
    assert why[""].startswith("eager was faster here:") and "its work is done inside" not in why["act"]
    assert type(model) is Fused


def test_the_reference_would_be_slower_and_is_another_measurement(model, monkeypatch):
    asked = says(monkeypatch, FASTER)
    gpt_kernels.patch(model, dry_run=True, policy="measured", sample=x())
    gpt_kernels.patch(model, dry_run=True, policy="measured", sample=x())
    assert len(asked) == 4, "the second time from the cache"
    with gpt_kernels.use_backend("reference"):
        gpt_kernels.patch(model, dry_run=True, policy="measured", sample=x())
    assert len(asked) == 8


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.eval(),
        lambda model: model.to(torch.float64),
        lambda model: setattr(model.norm, "eps", 1e-3),
        lambda model: model.norm.weight.requires_grad_(False),
        lambda model: torch.set_num_threads(1),
    ],
)
def test_whatever_changes_a_kind_is_measured_again(model, monkeypatch, change):
    asked, threads = says(monkeypatch, FASTER), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        gpt_kernels.patch(model, dry_run=True, policy="measured", sample=x())
        before = len(asked)
        change(model)
        gpt_kernels.patch(model, dry_run=True, policy="measured", sample=x().to(model.norm.weight.dtype))
        assert len(asked) > before
    finally:
        torch.set_num_threads(threads)


def test_without_gradients_it_decides_for_inference(model, monkeypatch):
    asked = says(monkeypatch, FASTER)
    with torch.no_grad():
        gpt_kernels.patch(model, policy="measured", sample=x())
    assert not any(kind.grad for kind in asked)


def test_the_model_is_left_as_it_was(model):
    sample, state = x(), torch.get_rng_state()
    modes = [m.training for m in model.modules()]
    gpt_kernels.patch(model, policy="measured", sample=sample)
    assert torch.equal(torch.get_rng_state(), state) and model.seen == 0
    assert [m.training for m in model.modules()] == modes and all(p.grad is None for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_what_cannot_be_called_again_stays_as_patch_has_it():
    class Odd:
        def __deepcopy__(self, memo):
            raise TypeError("no")

    class Given(nn.Module):
        def forward(self, x, what):
            return x

    given = Given()
    (kind,) = measured.met(given, {given: Given}, (x(), Odd()), {})
    assert "cannot be copied: TypeError" in kind.problem and measured.timed(kind, measured.both(kind)).slower is None
    assert policy.measured(kind) is None


@pytest.mark.parametrize(
    "options, words",
    [
        ({"policy": "measured"}, "policy='measured' needs sample="),
        ({"policy": "guessed", "sample": 1}, "unknown policy 'guessed', expected one of measured"),
        ({"sample": 1}, "sample is there to be measured"),
    ],
)
def test_errors(model, options, words):
    with pytest.raises(ValueError, match=words):
        gpt_kernels.patch(model, **options)
    assert not is_patched(model)


def test_a_sample_that_is_none(model):
    with pytest.raises(TypeError, match="patch: batch must be a dict"):
        gpt_kernels.patch(model, policy="measured", sample=3)
    assert not is_patched(model)


# ---- the file ----


def path_of():
    (path,) = cache.directory().glob("policy-*.json")
    return path


def test_the_file_is_private_and_believed(model, monkeypatch):
    asked = says(monkeypatch, SLOWER)
    gpt_kernels.patch(model, policy="measured", sample=x())
    assert os.stat(path_of()).st_mode & 0o777 == 0o600 and os.stat(cache.directory()).st_mode & 0o777 == 0o700
    assert len(json.loads(path_of().read_text())["kinds"]) == 4
    count = len(asked)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not gpt_kernels.patch(Block(), policy="measured", sample=x()).swapped
    assert len(asked) == count


def broken(change):
    content = json.loads(path_of().read_text())
    change(content)
    return json.dumps(content)


BROKEN = {
    "half": lambda: path_of().read_text()[:-40],
    "none of ours": lambda: "[]",
    "empty": lambda: "",
    "another machine": lambda: broken(lambda c: c["machine"].update(threads="99")),
    "another schema": lambda: broken(lambda c: c.update(schema=0)),
    "a field more": lambda: broken(lambda c: c.update(more=1)),
    "kinds that are a list": lambda: broken(lambda c: c.update(kinds=[])),
    "a name": lambda: broken(lambda c: c["kinds"].update(norm=FASTER)),
    "negative": lambda: broken(lambda c: next(iter(c["kinds"].values())).update(ours=-1.0)),
    "NaN": lambda: broken(lambda c: next(iter(c["kinds"].values())).update(ours=float("nan"))),
    "a bool": lambda: broken(lambda c: next(iter(c["kinds"].values())).update(slower=True)),
    "a share of 2": lambda: broken(lambda c: next(iter(c["kinds"].values())).update(slower=2.0)),
    "a text": lambda: broken(lambda c: next(iter(c["kinds"].values())).update(eager="1")),
    "deep": lambda: "[" * 100000,
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_file_is_refused_with_a_warning_and_replaced(model, monkeypatch, how):
    asked = says(monkeypatch, FASTER)
    gpt_kernels.patch(model, dry_run=True, policy="measured", sample=x())
    good = path_of().read_text()
    path_of().write_text(BROKEN[how]())
    with pytest.warns(RuntimeWarning, match=f"refused, everything is measured again: .*{path_of().name}"):
        plan = gpt_kernels.patch(model, dry_run=True, policy="measured", sample=x())
    assert len(asked) == 8 and len(plan.swapped) == 4 and path_of().read_text() == good


@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_others_could_have_written_is_refused(model, monkeypatch, what):
    asked = says(monkeypatch, FASTER)
    gpt_kernels.patch(model, dry_run=True, policy="measured", sample=x())
    path = path_of() if what == "file" else cache.directory()
    path.chmod(0o666 if what == "file" else 0o777)
    with pytest.warns(RuntimeWarning, match="can be written by other users"):
        gpt_kernels.patch(model, dry_run=True, policy="measured", sample=x())
    assert len(asked) == 8


def test_a_link_is_refused(model, monkeypatch, tmp_path):
    says(monkeypatch, FASTER)
    gpt_kernels.patch(model, dry_run=True, policy="measured", sample=x())
    path = path_of()
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.warns(RuntimeWarning, match="symbolic link"):
        gpt_kernels.patch(model, dry_run=True, policy="measured", sample=x())


def test_no_place_for_a_cache_is_no_error(model, monkeypatch):
    def nowhere():
        raise cache.NoHome("none")

    says(monkeypatch, FASTER)
    monkeypatch.setattr(cache, "directory", nowhere)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(gpt_kernels.patch(model, policy="measured", sample=x()).swapped) == 4


def test_an_error_while_it_is_written_leaves_the_file_whole(model, monkeypatch):
    says(monkeypatch, FASTER)
    gpt_kernels.patch(model, dry_run=True, policy="measured", sample=x())
    good = path_of().read_text()

    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.os, "replace", full)
    with pytest.warns(RuntimeWarning, match="not kept: .*No space left"):
        assert len(gpt_kernels.patch(model, policy="measured", sample=x(5)).swapped) == 4
    assert path_of().read_text() == good and len(list(cache.directory().iterdir())) == 1


# ---- a cache of keys and values ----


def test_an_argument_that_grows_is_given_as_it_was():
    class Growing(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self, x, seen):
            seen.rows = torch.cat([seen.rows, x * self.weight])
            lengths.append(len(seen.rows))
            return seen.rows.sum()

    class Seen:
        rows = torch.zeros(0, 8)

    lengths, model = [], Growing()
    (kind,) = measured.met(model, {model: Growing}, (x(), Seen()), {})
    for _ in range(3):
        forward, backward = measured.once_through(kind, measured.both(kind)["eager"])
        assert forward > 0 and backward > 0
    assert lengths == [4, 4, 4, 4]


def test_keep_still_keeps(model, monkeypatch):
    says(monkeypatch, FASTER)
    plan = gpt_kernels.patch(model, keep=(m for m in [model.norm]), policy="measured", sample=x())
    assert [row.path for row in plan.swapped] == ["drop", "act", "out"]
