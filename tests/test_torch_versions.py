"""What is promised of torch's versions, as far as this torch is enough to see it (test_public_install.py takes the others)."""

import pathlib
import re

import pytest

from gpt_kernels.triton import PAIRS

ROOT = pathlib.Path(__file__).parents[1]
# a comment, or a string
PROSE = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.S)
# of C++: macros, members, and what is torch's by its name
NAMES = re.compile(r"\b(aoti_\w+|\w*TORCH_\w+|[A-Z][A-Z0-9_]{3,}|torch(?:_\w+|::[\w:]+))|(?:\.|->)(\w+)\(")
NEWER = set((ROOT / "tests" / "torch_newer_names.txt").read_text().split())
OLDEST = min(PAIRS, key=lambda minor: int(minor.split(".")[1]))


def newer_names(text):
    found = [name for match in NAMES.findall(PROSE.sub('""', text)) for name in "::".join(match).split("::")]
    return sorted(NEWER.intersection(found) - {"append", "count"})  # the standard library's


def test_sources_name_nothing_newer_than_the_oldest_torch():
    """NEWER: the names in the headers that csrc/torch.h includes, of every torch, that the oldest one's lack."""
    sources = [p for p in (ROOT / "csrc").rglob("*.*") if p.suffix != ".md"]
    assert {p.name: names for p in sources if (names := newer_names(p.read_text()))} == {}


@pytest.mark.parametrize(
    "text, names",
    [
        ("STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));", ["STABLE_TORCH_ERROR_CODE_CHECK"]),
        ("getCurrentStream(i).nativeHandle()", ["nativeHandle"]),
        ("torch::stable::permute(t, order); // t.is_pinned()", ["permute"]),
        ('TORCH_ERROR_CODE_CHECK(a); fail("STABLE_TORCH_ERROR_CODE_CHECK"); permute(v, from);', []),
    ],
)
def test_newer_names_are_seen(text, names):
    assert newer_names(text) == names


def test_the_pinned_pair_is_one_that_pypi_has():
    """torch's CUDA build asks for one Triton; the CPU build, which some indexes give first, for none."""
    lines = (ROOT / "requirements-dev.txt").read_text()
    torch, triton = (re.search(rf"^{name}==([\w.]+)", lines, re.M)[1] for name in ("torch", "triton"))
    assert PAIRS[torch.rpartition(".")[0]] == triton


def test_the_oldest_torch_is_the_same_everywhere():
    assert f"torch>={OLDEST}" in (ROOT / "pyproject.toml").read_text()
    major, minor = map(int, OLDEST.split("."))
    assert f"TORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000" in (ROOT / "setup.py").read_text()
