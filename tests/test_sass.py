"""The machine-code reader and its model against closed forms, on tiny kernels that are compiled here."""

import pathlib
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl

from gpt_kernels.architectures import NVIDIA
from gpt_kernels.triton import INTERPRETED
from gpt_kernels.triton.common import Launch
from tools import loops, model, sass
from tools.problems import Inputs
from tools.static_triton import compile_launch

ROOT = pathlib.Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted: nothing is compiled")


@triton.jit
def copy_kernel(y, x, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at))


@triton.jit
def product_kernel(c, a, b, K, BLOCK: tl.constexpr):
    """c = a @ b in a loop over K, one block of rows and columns."""
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    sums = tl.zeros([BLOCK, BLOCK], tl.float32)
    for k in range(0, K, BLOCK):
        sums = tl.dot(tl.load(a + row * K + k + column), tl.load(b + (k + row) * BLOCK + column), sums)
    tl.store(c + row * BLOCK + column, sums)


@triton.jit
def chain_kernel(y, x, a):
    v = tl.load(x)
    for _ in tl.static_range(16):
        v = v * a + v
    tl.store(y, v)


@triton.jit
def two_loops_kernel(y, x, M, N, BLOCK: tl.constexpr):
    """A loop in a loop, and one with more bytes to load after them."""
    at = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    for i in range(M):
        for j in range(N):
            sums += tl.load(x + (i * N + j) * BLOCK + at) * i
    for i in range(M):
        sums += tl.load(y + 2 * i * BLOCK + at) * tl.load(y + (2 * i + 1) * BLOCK + at)
    tl.store(y + at, sums)


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def compiled(kernel, *args, arch="sm_80", **parameters):
    (found,) = sass.read(compile_launch(Launch(kernel, (1,), args, parameters), arch).asm["cubin"])
    return found


def copied(arch="sm_80", aligned=True, dtype=torch.bfloat16, num_warps=4):
    new = Inputs(dtype, aligned)
    return compiled(copy_kernel, new(1024), new(1024), arch=arch, BLOCK=1024, num_warps=num_warps)


def product(arch, dtype=torch.bfloat16, **options):
    new = Inputs(dtype, True)
    c = Inputs(torch.float32, True)(64, 64)
    return compiled(product_kernel, c, new(64, 512), new(512, 64), 512, arch=arch, BLOCK=64, num_warps=4, **options)


@pytest.mark.parametrize("arch", NVIDIA)
def test_copy(arch):
    """1024 bf16 of 4 warps: one 16-byte load and one 16-byte store of a thread."""
    kernel = copied(arch)
    moves = [i for i in kernel.instructions if i.kind == "global"]
    assert [(i.base, i.bytes) for i in moves] == [("LDG", 16), ("STG", 16)]
    assert (kernel.name, f"sm_{kernel.sm}", kernel.threads) == ("copy_kernel", arch, 128)
    assert loops.wide_share(kernel.instructions) == 1.0 and loops.in_flight(kernel.instructions) == 16
    assert kernel.spills == 0 and 0 < kernel.registers < 32 and kernel.matrix == {} and kernel.shared == 0
    assert kernel.code == 16 * len(kernel.instructions)


def test_unaligned_copy():
    """The same from a slice: 2 bytes at a time."""
    kernel = copied(aligned=False)
    assert [i.bytes for i in kernel.instructions if i.kind == "global"] == [2] * 16
    assert loops.wide_share(kernel.instructions) == 0.0


@pytest.mark.parametrize("arch, base, count", [("sm_80", "HMMA", 32), ("sm_120", "HMMA", 32), ("sm_90", "HGMMA", 4)])
def test_product(arch, base, count):
    """64x64x64 a pass: 128 HMMA.16816 over 4 warps, or 4 HGMMA.64x64x16 of the warpgroup; the same multiply-adds."""
    kernel = product(arch)
    (hot, *_) = loops.regions(kernel)
    tensor = [i for i in hot if i.kind == "tensor"]
    assert len(tensor) == count and {i.base for i in tensor} == {base}
    assert 4 * sum(i.fma for i in hot) == 64**3
    figures = model.region(kernel, hot, warps=4, ctas=1)
    assert figures.pipes["tensor"] == pytest.approx(64**3 / 4 / kernel.gpu.tensor / (kernel.gpu.sync if base == "HMMA" else 1))
    assert figures.per_mflop == pytest.approx(len(hot) / (2 * 64**3 / 4 / 1e6))
    assert figures.tensor_per_other == pytest.approx(count / (len(hot) - count))
    assert 0 < figures.model <= figures.bound <= 1 and figures.no_overlap <= figures.bound


def test_tcgen05():
    kernel = compiled(
        product_kernel,
        *(Inputs(d, True)(128, n) for d, n in ((torch.float32, 128), (torch.bfloat16, 512), (torch.bfloat16, 512))),
        512,
        arch="sm_100",
        BLOCK=128,
        num_warps=4,
    )
    assert "UTCHMMA" in kernel.matrix
    assert model.region(kernel, loops.regions(kernel)[0], 4, 1).bound is None, "its shape is not in the instruction"


def test_tf32_costs_twice():
    """In the time of bf16 multiply-adds, in which the rates are given."""
    (hot, *_) = loops.regions(product("sm_80", torch.float32))
    assert "TF32" in next(i.op for i in hot if i.kind == "tensor")
    assert 4 * sum(i.fma for i in hot) == 2 * 64**3


def test_copies_in_flight():
    """cp.async of num_stages - 1 tiles of 2 x 64 x 64 bf16 over 128 threads are outstanding before the loop waits."""
    for stages in (3, 4):
        assert loops.in_flight(loops.regions(product("sm_80", num_stages=stages))[0]) == (stages - 1) * 2 * 64 * 64 * 2 // 128


def test_stall_of_a_dependent_chain():
    """An FFMA waits 4 cycles for the one before it, on every NVIDIA GPU since Volta."""
    new = Inputs(torch.float32, True)
    chain = [i for i in compiled(chain_kernel, new(1), new(1), 0.5).instructions if i.base == "FFMA"]
    assert len(chain) == 16 and [i.stall for i in chain[:14]] == [4] * 14  # and something else beside the last


def test_spills_are_seen():
    new, sizes = Inputs(torch.float32, True), {"BLOCK": 8192, "num_warps": 1}
    kernel = compiled(two_loops_kernel, new(8192), new(8192), 8, 8, **sizes)
    assert kernel.spills > 0 and kernel.registers == 255
    assert compiled(two_loops_kernel, new(8192), new(8192), 8, 8, BLOCK=1024, num_warps=1).spills == 0
    assert compiled(two_loops_kernel, new(8192), new(8192), 8, 8, BLOCK=1024, num_warps=1, maxnreg=24).spills > 0


def test_loops():
    """The inner loop and the later one, each unrolled by four with its rest, hottest first; the outer loop is no region."""
    new = Inputs(torch.float32, True)
    kernel = compiled(two_loops_kernel, new(1024), new(1024), 7, 9, BLOCK=512, num_warps=4, num_stages=1)
    loads = [sum(i.base == "LDG" for i in r) for r in loops.regions(kernel)]
    assert loads == [8, 4, 2, 1]
    assert loops.loops(copied()) == [] and len(loops.regions(copied())) == 1
    assert loops.regions(copied())[0][-1].op == "EXIT"


def synthetic(op, args="", stall=1, write=7, read=7, wait=0, predicate=""):
    control = (stall | write << 5 | read << 8 | wait << 11) << 41
    return sass.decode("0000", predicate, op, args, f"{control:016x}")


def test_decoding():
    i = synthetic("LDG.E.64", "R2, [R4.64]", stall=3, write=2, read=1, wait=0b101)
    assert (i.stall, i.write, i.read, i.wait, i.bytes, i.kind) == (3, 2, 1, 0b101, 8, "global")
    assert synthetic("LDG.E.64", predicate="@!PT").bytes == 0, "never executed"
    assert synthetic("LDSM.16.M88.4").shared == 4 * 4 * 32
    assert synthetic("STL.128").kind == "local" and synthetic("UMOV").kind == "uniform" and synthetic("LOP3.LUT").kind == "alu"


def test_replay_of_known_programs():
    gpu = NVIDIA["sm_90"]
    chain = [synthetic("FFMA", stall=4) for _ in range(50)]
    assert model.replay(gpu, chain, 1, 1) == pytest.approx(200), "one warp waits for its own results"
    assert model.replay(gpu, chain, 8, 1) == pytest.approx(400, rel=0.05), "eight fill every cycle"
    assert model.replay(gpu, [synthetic("MUFU.EX2")] * 50, 4, 1) == pytest.approx(4 * 50 * 8, rel=0.1), "4 lanes a quarter"
    load, use = synthetic("LDG.E.128", write=0), synthetic("FADD", wait=1)
    one = model.replay(gpu, [load, use], 1, 1, dram=1.0)
    assert one == pytest.approx(gpu.dram_latency + 512 / (gpu.dram / 4), rel=0.02), (
        "latency, then 512 bytes of a quarter's share"
    )
    many = model.replay(gpu, [load, use], 64, 1, dram=1.0)
    assert many == pytest.approx(64 * 512 / (gpu.dram / 4), rel=0.1), "bandwidth hides latency"


def test_little():
    """One warp in flight with 16 bytes of a thread: the bound is bytes over latency times bandwidth."""
    kernel = copied(arch="sm_90")
    figures = model.region(kernel, loops.regions(kernel)[0], warps=4, ctas=1)
    assert figures.in_flight_sm == 4 * 32 * 16
    assert figures.bound == pytest.approx(4 * 32 * 16 / (kernel.gpu.dram * kernel.gpu.dram_latency) * 2)
    halved = model.region(kernel, loops.regions(kernel)[0], warps=4, ctas=1, useful=0.5)
    assert halved.bound == pytest.approx(figures.bound / 2)


@pytest.mark.parametrize(
    "sm, registers, threads, shared, expected",
    [
        (80, 255, 128, 0, (2, "registers")),
        (80, 32, 128, 0, (16, "warps")),
        (80, 16, 32, 0, (32, "CTAs")),
        (90, 64, 128, 100 * 1024, (2, "shared memory")),
        (90, 64, 128, 228 * 1024, (0, "shared memory")),
        (86, 128, 1024, 0, (0, "registers")),
    ],
)
def test_occupancy(sm, registers, threads, shared, expected):
    assert sass.occupancy(NVIDIA[f"sm_{sm}"], registers, threads, shared) == expected


def test_command(tmp_path):
    new = Inputs(torch.bfloat16, True)
    cubin = compile_launch(Launch(copy_kernel, (1,), (new(1024), new(1024)), {"BLOCK": 1024}), "sm_80").asm["cubin"]
    (tmp_path / "k.cubin").write_bytes(cubin)
    (tmp_path / "no.cubin").write_bytes(b"no")

    def run(*args):
        file, *flags = args
        command = [sys.executable, "-m", "tools.cubin", tmp_path / file, *flags]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)

    good = run("k.cubin")
    assert good.returncode == 0 and "copy_kernel: sm_80 (A100)" in good.stdout and "bound" in good.stdout, good
    for args, why in (
        (["no.cubin"], "no kernel found"),
        (["none.cubin"], "No such file"),
        (["k.cubin", "-k", "z"], "in none of"),
    ):
        bad = run(*args)
        assert bad.returncode == 2 and why in bad.stderr, bad
