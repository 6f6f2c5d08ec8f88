"""README and docs/ say what the committed results say, plots included; their links, pictures and examples lead somewhere."""

import json
import os
import pathlib
import re

import bench_tools
import families
import pytest

from gpt_kernels import dispatch, library
from gpt_kernels.bench import plots
from tools import docs
from tools.problems import PR_ARCHS

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    ROOT / "csrc/sim/README.md",
    *(ROOT / "docs").glob("*.md"),
]


# ---- what is generated ----


def test_documents_are_what_the_committed_results_say():
    found = docs.blocks(docs.sources())
    assert {file.name for file, _ in found} == {"README.md", "speed.md", "memory.md", "gpu.md"}
    for (file, name), text in found.items():
        assert docs.block(file.read_text(), name) == text, f"{file.name}: python -m tools.docs"


def test_pictures_are_what_the_committed_results_draw():
    names = docs.sources()
    assert docs.drawing(json.loads((ROOT / docs.RESULTS / names["demo"]).read_text())).count("<text") >= 10
    shown = {pathlib.Path(p).stem for page in PAGES for p in re.findall(r"!\[[^]]*\]\(([^)]*/plots/[^)]*)\)", page.read_text())}
    files = {p.stem: p for p in (ROOT / docs.RESULTS / "plots").glob("*.svg")}
    assert shown == files.keys() == {"headline", *docs.PLOTS}
    assert all(p.stat().st_size < 60_000 for p in files.values())
    # a ground of its own, and drawn for a width of 390 pixels: 4 inches at 96 a pixel
    for name, file in files.items():
        svg = file.read_text()
        assert plots.PAPER in svg and float(re.search(r'width="([\d.]+)pt"', svg)[1]) <= 390 * 72 / 96, name


def test_headline_is_drawn_from_the_committed_demo():
    demo = json.loads((ROOT / docs.RESULTS / docs.sources()["demo"]).read_text())
    drawn = re.findall(r">([\d,]+)</text>", (ROOT / docs.RESULTS / "plots/headline.svg").read_text())
    runs = demo["runs"].values()
    assert drawn == [f"{run['ms_per_step']:,.0f}" for run in runs] + [f"{run['peak_bytes'] / 1e6:,.0f}" for run in runs]


def test_numbers_of_a_whole_result():
    demo = json.loads(next((ROOT / docs.RESULTS).glob("*demo*.json")).read_text())
    result, reuse = bench_tools.result(), bench_tools.result()
    for row in reuse["rows"]:
        row |= {} if row["mismatch"] else {"bytes": docs.LARGE, "bound": "copy", "of_limit": 0.875}
    names = {"bench": "a.json", "reuse": "r.json", "demo": "d.json"}
    text = docs.numbers(result, reuse, demo, names, ["speed", "length-memory"])
    assert "`python -m gpt_kernels bench all --quick`: how often faster" in text and "in the same run copy 20 GB/s" in text
    assert "| layer_norm 8192x768, fwd | 2.00x" in text and "`benchmarks/results/r.json`" in text
    assert "![Time of the others over ours](../benchmarks/results/plots/speed.svg)" in text and "length-memory" not in text
    assert "On tiny inputs a call costs 992 µs to 992 µs; in 0 of 1 such rows" in text and not re.search(" $", text, re.M)
    assert re.search(r"\| layer_norm 8192x768, fwd \| (\d+ %|-) / 88 %", text)
    assert docs.small([]) == ""
    text = docs.memory(result, demo, ["speed", "length-memory"])
    assert "T^2.00 (to T = 8192)" in text and "plots/length-memory.svg" in text and "plots/speed.svg" not in text


def test_ratios_on_a_gpu():
    def row(whose, **times):
        return {"op": "attention", "shape": "B2 H2 T4096 D64", "whose": whose, "clock": "fwd graph replays, bwd events"} | times

    rows = [
        row("torch", fwd_us=100.0, bwd_us=150.0),
        row("cuda", fwd_us=50.0, bwd_us=50.0),
        row("triton", fwd_us=200.0, bwd_us=50.0),
    ]
    # so large a call is Triton's on sm_90; PyTorch's 150 us backward are the host's
    assert docs.on_gpu_ratios({"minute": rows}) == [("attention B2 H2 T4096 D64", "triton", 0.5, None)]
    rows[0]["bwd_us"] = 300.0
    assert docs.on_gpu_ratios({"minute": rows})[0][3] == 6.0
    for r in rows:
        r["shape"] = "B1 H1 T128 D64"
    assert docs.on_gpu_ratios({"minute": rows}) == [("attention B1 H1 T128 D64", "cuda", 2.0, 6.0)]


def test_table_of_determinism_names_every_op():
    header, _, *rows = docs.block(docs.DETERMINISM.read_text(), "determinism").splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert {op for op, *_ in cells} == {re.sub(r"_(fwd|bwd).*", "", op) for op in dispatch.ops()}
    assert "1, 2 and 4 threads" in header and {threads for _, threads, _ in cells} == {"the same bits"}


@pytest.mark.slow
@pytest.mark.skipif(library.best_isa() != library.ISA_LEVELS[-1], reason="the table is of a CPU with every instruction set")
def test_table_of_determinism_is_what_runs():
    assert docs.block(docs.DETERMINISM.read_text(), "determinism") == docs.determinism()


def test_table_of_families_is_what_the_tests_wrote():
    found = json.loads(docs.FAMILIES_FOUND.read_text())
    assert found["families"].keys() == families.FAMILIES.keys()
    assert docs.block(docs.FAMILIES.read_text(), "families") == docs.families(found), "python -m tools.docs"
    assert docs.block(docs.README.read_text(), "families") == docs.families_in_short(found), "python -m tools.docs"
    for name, shown in found["families"].items():
        assert shown["forward"] and shown["backward"], name
        assert not families.FAMILIES[name].generates or shown["generate greedy"], name


def test_a_line_of_a_family():
    lines = ['["A", "forward", ["gelu", "rotary"]]', '["A", "forward", ["dropout"]]', '["A", "generate greedy", ["gelu"]]',
             '["A", "LoRA, then patch", ["gelu"]]', '["A", "patch, then LoRA", ["gelu"]]', '["A", "checkpointing", true]',
             '["B", "backward", ["gelu"]]', '["B", "LoRA, then patch", ["gelu"]]']  # fmt: skip
    found = docs.families_found(lines)
    assert found["families"]["A"]["forward"] == ["dropout", "gelu", "rotary"]
    shown = [line for line in docs.families(found).splitlines() if line.startswith(("| family", "| A", "| B"))]
    assert shown[:3] == ["| family | dropout | gelu | rotary |", "| A | f | fgl | f |", "| B | - | b | - |"]
    assert shown[4:] == ["| A | - | greedy | checkpointing | - |", "| B | - | - | - | - |"]
    assert "Of 2 families" in docs.families_in_short(found) and "LoRA, forward and backward 1." in docs.families_in_short(found)


def test_other_bits_are_told():
    import torch

    a, b = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0 + 2**-22])
    assert docs.same_bits([[a], [a.clone()]]) and not docs.same_bits([[a], [a], [b]])


def test_a_missing_marker_is_named():
    with pytest.raises(ValueError, match="expected one <!-- speed --> and one <!-- /speed -->"):
        docs.block("<!-- speed -->\n1\n", "speed")


# ---- what is written by hand ----


def anchors(page):
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: os.path.relpath(page, ROOT))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_every_page_is_linked_from_readme():
    linked = {(ROOT / target).resolve() for target in re.findall(r"\]\(([\w/.]+\.md)\)", (ROOT / "README.md").read_text())}
    assert {page.resolve() for page in (ROOT / "docs").glob("*.md")} <= linked


def test_how_far_the_triton_kernels_were_taken():
    page = " ".join(docs.GPU.read_text().split())
    told = re.search(r"executed under Triton's interpreter.*?, compiled for (.*?) in `make test`", page)
    assert told and re.findall(r"\w+_?\d+a?", told[1]) == list(PR_ARCHS)


def test_readme_examples_run(tmp_path):
    """Every Python block of the README, in order, with a small GPT-2 in the place of the path."""
    transformers = pytest.importorskip("transformers")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2)).save_pretrained(tmp_path)
    code = "".join(blocks).replace("path/to/gpt2", str(tmp_path)).replace("1024, 12, 64", "64, 2, 16")
    code = code.replace('preset("gpt2",', 'preset("gpt2", n_layer=1, n_embd=32, n_head=2,')
    names = {}
    exec(code, names)
    assert names["report"].ok and names["plan"].swapped and names["tokens"].shape == (1, 21)
