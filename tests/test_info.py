"""info(): true facts, JSON-ready, with a table for people with and without rich; the private cache."""

import json
import os
import pathlib
import re
import stat
import subprocess
import sys

import pytest
import torch

import gpt_kernels
from csrc import sim
from gpt_kernels import cache, cli, dispatch, library, triton
from gpt_kernels.info import CUDA_DTYPES, _in_triton, support
from gpt_kernels.names import families, family
from gpt_kernels.table import print_table


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_info_is_json_and_true(home):
    facts = gpt_kernels.info()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["gpt_kernels"] == gpt_kernels.__version__ and facts["torch"] == torch.__version__
    assert facts["cpu"]["threads"] == torch.get_num_threads() and facts["cpu"]["isa"] == gpt_kernels.isa()
    assert {op: {k: str(dispatch.Served(**s)) for k, s in of.items()} for op, of in facts["ops"].items()} == {
        op: {k: str(s) for k, s in gpt_kernels.where(op).items()} for op in dispatch.ops()
    }
    assert facts["gpu"]["archs_built"] == (library.cuda_archs() or "").split()
    assert bool(facts["gpu"]["archs_built"]) is (facts["gpu"]["problem"] is None)
    if library.cpu:
        assert facts["library"]["torch_stable_abi"] == "2.10" and facts["library"]["compiler"]
    with gpt_kernels.use_isa("base") if library.cpu else gpt_kernels.use_backend("reference"):
        changed = gpt_kernels.info()
    assert (changed["cpu"]["isa"] == "base") if library.cpu else "pushed" in changed["ops"]["layer_norm_fwd"]["CPU"]["reason"]


def test_info_reports_the_cache(home):
    (entry,) = gpt_kernels.info()["caches"].values()
    assert entry == {"path": str(home / "gpt_kernels"), "files": 0, "bytes": 0, "problem": None}
    assert not (home / "gpt_kernels").exists()  # looking creates nothing
    cache.write("a", b"123")
    (entry,) = gpt_kernels.info()["caches"].values()
    assert (entry["files"], entry["bytes"]) == (1, 3)


def test_info_finds_compilers_on_the_path(tmp_path, monkeypatch):
    tool = tmp_path / "nvcc"
    tool.write_text("#!/bin/sh\necho first line\necho release 99.9\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    # the scripts' own echo is built into the shell
    assert gpt_kernels.info()["compilers"] == {"g++": None, "nvcc": f"release 99.9 ({tool})"}


def test_info_prints_a_table_and_json(home, capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    expected = (
        torch.__version__,
        "instruction set",
        "GPT_KERNELS_ISA=",
        "layer_norm_fwd",
        "Triton kernels",
        "tuned",
        str(home),
    )
    assert all(words in text for words in expected)
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gpt_kernels"] == gpt_kernels.__version__


def test_table_without_rich(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    print_table(["", "x"], [("a", "1.5"), ("long name", "12.25")], title="t", right=[1])
    assert capsys.readouterr().out == "\nt\n               x\na            1.5\nlong name  12.25\n"


def test_table_shows_brackets_as_they_are(capsys):
    print_table(["", "x"], [("GPT_KERNELS_ISA=[base]", "[/]")])
    assert "GPT_KERNELS_ISA=[base]" in capsys.readouterr().out


# ---- cache ----


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def test_cache_is_private(home, monkeypatch):
    previous = os.umask(0)
    try:
        assert cache.read("a") is None
        cache.write("a", b"one")
        cache.write("a", b"two")
    finally:
        os.umask(previous)
    assert cache.read("a") == b"two"
    assert mode(home / "gpt_kernels") == 0o700 and mode(home / "gpt_kernels" / "a") == 0o600
    assert os.listdir(home / "gpt_kernels") == ["a"]


def test_cache_folder_follows_the_environment(home, monkeypatch):
    assert cache.directory() == home / "gpt_kernels"
    for value in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        monkeypatch.setenv("HOME", str(home))
        assert cache.directory() == home / ".cache" / "gpt_kernels"


@pytest.mark.parametrize("what", ["folder", "file"])
@pytest.mark.parametrize("fault", ["symlink", "group-writable", "world-writable", "foreign"])
def test_cache_refuses_what_others_could_have_written(home, monkeypatch, what, fault):
    cache.write("a", b"one")
    path = home / "gpt_kernels" if what == "folder" else home / "gpt_kernels" / "a"
    if fault == "symlink":
        path.rename(home / "elsewhere")
        path.symlink_to(home / "elsewhere")
    elif fault == "foreign":
        lstat = os.lstat
        fake = lambda p: os.stat_result((*lstat(p)[:4], os.getuid() + (str(p) == str(path)), *lstat(p)[5:]))  # noqa: E731
        monkeypatch.setattr(os, "lstat", fake)
    else:
        path.chmod(0o720 if fault == "group-writable" else 0o702)
    words = {"symlink": "is a symbolic link", "foreign": "belongs to another user"}.get(fault, "can be written by other users")
    with pytest.raises(PermissionError, match=f"cache refused: {re.escape(str(path))} {words}"):
        cache.read("a")
    if what == "folder":
        with pytest.raises(PermissionError, match="cache refused"):
            cache.write("a", b"two")
        (entry,) = gpt_kernels.info()["caches"].values()
        assert str(path) in entry["problem"]


def test_atomic_write_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "f"
    cache.write_atomically(path, b"old", mode=0o644)
    assert mode(path) == 0o644
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        cache.write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["f"]


def test_module_entry_point():
    done = subprocess.run([sys.executable, "-m", "gpt_kernels", "--version"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, f"gpt_kernels {gpt_kernels.__version__}\n")


# ---- documents ----


@pytest.mark.skipif(library.cpu is None, reason="the C++ kernels are not built")
@pytest.mark.skipif(triton.absence() is not None, reason=str(triton.absence()))
@pytest.mark.parametrize("isa", ["base", library.best_isa()])
def test_table_of_support_is_what_runs(isa):
    page = (pathlib.Path(__file__).parents[1] / "docs" / "support.md").read_text()
    table = page.partition("<!-- support -->\n")[2].partition("\n<!-- /support -->")[0]
    with gpt_kernels.use_isa(isa):
        assert support() == table
    # every op that is defined has its line: attention_fwd, attention_bwd -> attention
    assert {family(op) for op in dispatch.ops()} == set(families())


PROBE = """
import contextlib, gpt_kernels, torch
from csrc import sim
from gpt_kernels import cases
from gpt_kernels.info import DTYPES
sim.register()
for op in cases.families():
    for dtype in DTYPES:
        with gpt_kernels.use_backend("cuda_sim"), contextlib.suppress(RuntimeError):
            for e in cases.of(op).small(dtype):
                given = [a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in e.args]
                e.ours(*given).sum().backward()
            print(op, str(dtype).removeprefix("torch."))
"""


@pytest.mark.skipif(not sim.PATH.exists(), reason="the CUDA kernels were not built for the simulator")
def test_support_table_tells_what_the_cuda_kernels_take():
    """Forward and backward of each op, run on the simulator."""
    root = pathlib.Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")])}
    done = subprocess.run([sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, timeout=300)
    ran = [line.split() for line in done.stdout.splitlines()]
    assert ran == [[op, dtype] for op in families() for dtype in CUDA_DTYPES], done.stderr


def test_without_triton_the_table_claims_nothing(monkeypatch):
    monkeypatch.setattr(triton, "absence", lambda: "Triton is not installed")
    assert not any(_in_triton().values())
