"""The simulator itself (csrc/sim): fragment maps against an independent oracle, every fault seeded in tests/sim/selftest.cu
found, counters that say what is known. The ops on it: GPT_KERNELS_TEST_BACKEND=cuda_sim pytest tests -k cuda_sim."""

import concurrent.futures
import ctypes
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig

import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent / "sim"))
import gemm  # noqa: E402
import pybind11  # noqa: E402

from csrc import sim  # noqa: E402
from gpt_kernels import cases  # noqa: E402

ROOT = pathlib.Path(__file__).parents[1]
SEEDS = 12
CXX = os.environ.get("CXX") or shutil.which("g++")
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-DGK_SIM", "-Wno-tsan"]

pytestmark = pytest.mark.skipif(not CXX, reason="no C++ compiler")


def compiled(folder, source, name, *flags):
    subprocess.run([CXX, *FLAGS, *flags, "-c", str(ROOT / source), "-o", str(folder / name)], check=True)
    return str(folder / name)


def linked(objects, library, *flags):
    subprocess.run([CXX, "-shared", *flags, *objects, "-o", str(library)], check=True)
    return library


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """selftest.cu's objects, its launcher with it: the same for the plain library and ThreadSanitizer's"""
    folder = tmp_path_factory.mktemp("selftest")
    sources = ("tests/sim/selftest.cu", "csrc/cuda/launch.cu")
    return [compiled(folder, s, f"{pathlib.Path(s).stem}.o", "-fsanitize=thread", "-x", "c++") for s in sources]


def model(folder, *flags):
    """The model's objects, without its Python face."""
    sources = [p for p in sorted((ROOT / "csrc" / "sim").glob("*.cpp")) if p.stem != "python"]
    return [compiled(folder, p, f"{p.stem}.o", "-O2", *flags) for p in sources]


@pytest.fixture(scope="module")
def face(tmp_path_factory):
    folders = (pybind11.get_include(), sysconfig.get_path("include"))
    flags = [option for folder in folders for option in ("-isystem", folder)]
    return compiled(tmp_path_factory.mktemp("face"), "csrc/sim/python.cpp", "python.o", "-fvisibility=hidden", *flags)


@pytest.fixture(scope="module")
def lib(kernels, face, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    library = ctypes.CDLL(str(linked([*kernels, *model(folder), face], folder / "selftest.so")))
    for name in ("gemm", "mma", "ldmatrix", "warp", "cp_async", "named", "last", "banks", "wrong", "size"):
        getattr(library, f"test_{name}").restype = ctypes.c_char_p
    library.sim = sim.load(folder / "selftest.so")
    return library


@pytest.fixture
def seeds(lib):
    """Sets the schedule to each in turn; in order again at the end."""

    def each():
        for seed in range(SEEDS):
            lib.sim.dials.seed = seed
            yield seed

    yield each
    lib.sim.dials.seed = 0


def pointer(t):
    assert t.is_contiguous()
    return ctypes.c_void_p(t.data_ptr())


# ---- maps, against the layouts of the tensor-layouts package ----


tensor_layouts = pytest.importorskip("tensor_layouts", reason="the oracle is not installed: pip install tensor-layouts")
from tensor_layouts import atoms_nv as atoms  # noqa: E402, I001


MMA = {
    "bf16": (0, torch.bfloat16, "SM80_16x8x16_F32BF16BF16F32_TN"),
    "f16": (1, torch.float16, "SM80_16x8x16_F32F16F16F32_TN"),
    "tf32": (2, torch.float32, "SM80_16x8x8_F32TF32TF32F32_TN"),
}


@pytest.mark.parametrize("kind", MMA)
def test_mma_maps(lib, kind):
    """Operands dealt to registers as the oracle's layouts say, products of integers: D comes back exact by its layout of C."""
    number, dtype, name = MMA[kind]
    atom = getattr(atoms, name)
    M, N, K = atom.shape_mnk
    a, b, c = (
        torch.randint(-8, 9, (M, K)).to(dtype),
        torch.randint(-8, 9, (N, K)).to(dtype),
        torch.randint(-8, 9, (M, N)).float(),
    )

    def places(layout, rows):  # (lane, value) -> (row, column) of a column-major matrix
        values = range(tensor_layouts.size(layout) // 32)
        return torch.tensor([[divmod(layout(lane, value), rows)[::-1] for value in values] for lane in range(32)])

    def dealt(matrix, layout):
        at = places(layout, matrix.shape[0])
        return matrix[at[..., 0], at[..., 1]].contiguous()

    ra, rb, rd = dealt(a, atom.a_layout), dealt(b, atom.b_layout), dealt(c, atom.c_layout)
    assert lib.test_mma(pointer(rd), pointer(ra), pointer(rb), number) is None
    d, at = torch.empty(M, N), places(atom.c_layout, M)
    d[at[..., 0], at[..., 1]] = rd
    assert torch.equal(d, a.float() @ b.float().T + c)


def test_tf32_reads_no_more_than_tf32(lib):
    """1 + 2^-11 is 1 to the unit, 1 + 2^-10 is not."""
    for value, expected in ((1 + 2**-11, 1.0), (1 + 2**-10, 1 + 2**-10)):
        a, b, d = torch.full((32, 4), value), torch.ones(32, 2), torch.zeros(32, 4)
        assert lib.test_mma(pointer(d), pointer(a), pointer(b), 2) is None
        assert (d == 8 * expected).all()


@pytest.mark.parametrize("transposed", (False, True))
@pytest.mark.parametrize("count", (1, 2, 4))
def test_ldmatrix_maps(lib, count, transposed):
    """As the oracle's LDSM atoms map bits of shared memory to (lane, register)."""
    kind = {1: "2", 2: "4", 4: "8"}[count] if transposed else count
    atom = getattr(atoms, f"SM75_U16x{kind}_LDSM_T" if transposed else f"SM75_U32x{kind}_LDSM_N")
    matrices = torch.arange(256, dtype=torch.int16)
    out = torch.zeros(32, 4, 2, dtype=torch.int16)
    assert lib.test_ldmatrix(pointer(out), pointer(matrices), count, int(transposed)) is None
    # both layouts map (thread, bit) to the same bit space: the register element of (thread, v) is the memory element there
    source = {atom.src_layout_bits(lane, 16 * e): lane * 8 + e for lane in range(8 * count) for e in range(8)}
    for lane in range(32):
        for value in range(2 * count):
            expected = source[atom.dst_layout_bits(lane, 16 * value)]
            assert out[lane, value // 2, value % 2] == expected, (lane, value)


def test_shuffles_and_votes(lib, seeds):
    for _ in seeds():
        out = torch.zeros(32, 6, dtype=torch.int32)
        assert lib.test_warp(pointer(out)) is None
        for lane, got in enumerate(out.tolist()):
            votes = sum(1 << i for i in range(0, 32, 3))
            assert [g & 0xFFFFFFFF for g in got] == [
                lane ^ 5,
                lane + 3 if lane < 29 else lane,
                lane - 3 if lane >= 3 else lane,
                3,
                votes,
                1 + 4,
            ]


@pytest.mark.parametrize("valid", ((4, 8, 16), (3, 5, 7), (0, 0, 0)))
def test_copies_fill_with_zeros(lib, valid):
    data, out = torch.arange(1, 65, dtype=torch.uint8)[:48], torch.full((3, 16), 7, dtype=torch.uint8)
    assert lib.test_cp_async(pointer(out), pointer(data), *valid) is None
    for row, size, n in zip(out, (4, 8, 16), valid, strict=True):
        assert row.tolist() == [*range(1, n + 1), *[0] * (size - n), *[255] * (16 - size)]  # the rest is poison


# ---- synchronisation ----


@pytest.mark.parametrize("fault", gemm.FAULTS)
def test_faults_show_in_values(lib, fault):
    wrong = gemm.wrong(lib, fault, 20)
    assert wrong == 0 if fault == "none" else wrong > 0


@pytest.fixture(scope="module")
def under_tsan(kernels, tmp_path_factory):
    """(ThreadSanitizer's runtime, the library made for it)"""
    runtime = subprocess.run([CXX, "-print-file-name=libtsan.so"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(runtime):
        pytest.skip("no ThreadSanitizer runtime")
    folder = tmp_path_factory.mktemp("tsan")
    return runtime, linked([*kernels, *model(folder, "-DGK_SIM_TSAN")], folder / "selftest.so", "-fsanitize=thread")


@pytest.mark.parametrize("fault", gemm.FAULTS)
def test_faults_show_to_thread_sanitizer(under_tsan, fault):
    """A report for each missing wait or barrier, whatever the values; none for a right kernel."""
    runtime, library = under_tsan
    done = subprocess.run(
        [sys.executable, gemm.__file__, str(library), fault, "4"],
        env={**os.environ, "LD_PRELOAD": runtime},
        capture_output=True,
        text=True,
        timeout=120,
    )
    reports = done.stderr.count("WARNING: ThreadSanitizer: data race")
    assert (reports == 0) is (fault in ("none", "swapped_accumulators")), done.stderr[-3000:]
    assert done.returncode == (66 if reports else 0), done.stderr[-3000:]


def test_named_barriers(lib, seeds):
    for _ in seeds():
        for warps in (2, 4):
            out = torch.zeros(32 * (warps - 1), dtype=torch.int32)
            assert lib.test_named(pointer(out), 5, warps) is None
            assert torch.equal(out, (1000 + 5 * torch.arange(31, -1, -1, dtype=torch.int32)).repeat(warps - 1))


def test_the_last_block_sees_all(lib, seeds):
    for _ in seeds():
        out, partial, arrived = (torch.zeros(n, dtype=torch.int32) for n in (1, 9, 1))
        assert lib.test_last(pointer(out), pointer(partial), pointer(arrived), 9, 1) is None
        assert out.item() == 45


def test_the_last_block_is_not_the_highest(lib, seeds):
    """A kernel that takes the block of the highest index for the last one is right in order, and wrong in another order."""
    results = set()
    for _ in seeds():
        out, partial, arrived = (torch.zeros(n, dtype=torch.int32) for n in (1, 9, 1))
        assert lib.test_last(pointer(out), pointer(partial), pointer(arrived), 9, 0) is None
        results.add(out.item() == 45)
    assert results == {True, False}


WRONG = {
    0: r"deadlock\n  warp 0: lanes 0-31 wait at barrier 0 \(32 of 64 threads arrived\)\n  warp 1: lanes 0-31 have exited",
    1: "warp 0: lanes 0-15 wait for the whole warp at shfl.bfly",
    2: "lane 1: is at shfl.bfly while other lanes of its warp are at __syncwarp",
    3: "lane 0: access of 4 bytes at shared offset 256, past the 256 bytes of the block",
    4: "misaligned access of 16 bytes",
    5: "exits while a cp.async of its own is in flight",
    6: "cp.async: misaligned source",
    7: "barrier 1: for 32 threads here, 64 elsewhere",
    10: "past the 256 bytes of the block",
    11: "misaligned access of 16 bytes",
    12: r"block \(0, 0, 0\), warp 1, lane 8: __trap\(\)",
}


@pytest.mark.parametrize("what", WRONG)
def test_reports(lib, what):
    message = lib.test_wrong(pointer(torch.zeros(128)), what).decode()
    assert message.startswith("simulator: kernel gk::wrong, block (0, 0, 0)") and re.search(WRONG[what], message), message
    report = lib.sim.take_report()
    assert report.text == message and report.kernel == "gk::wrong" and report.block == (0, 0, 0)
    assert bool(report.waits) is (report.what == "deadlock") is (report.warp < 0)
    assert lib.test_wrong(pointer(torch.zeros(128)), 99) is None  # and the next launch works
    assert lib.sim.take_report() is None


def test_a_deadlock_raises_with_what_each_lane_waits_for(lib):
    """The README's story."""

    def launch():
        if text := lib.test_wrong(pointer(torch.zeros(128)), 0):
            raise RuntimeError(text.decode())  # as torch hands it on

    with pytest.raises(sim.Deadlock, match="deadlock") as caught:
        sim.reporting(lib.sim, launch)()
    first, second = caught.value.waits
    assert (first.warp, first.at, first.barrier, first.arrived, first.expected) == (0, "barrier", 0, 32, 64)
    assert (second.warp, second.at, second.lanes) == (1, "", list(range(32)))

    def fault():
        raise RuntimeError(lib.test_wrong(pointer(torch.zeros(128)), 3).decode())

    with pytest.raises(sim.Fault, match="past the 256 bytes") as caught:
        sim.reporting(lib.sim, fault)()
    assert not isinstance(caught.value, sim.Deadlock)
    assert (caught.value.kernel, caught.value.warp, caught.value.lane) == ("gk::wrong", 0, 0)


@pytest.fixture
def size(lib):
    """(kernel, x, y, z, threads, bytes) -> None or the report"""
    lib.test_size.argtypes = [ctypes.c_int, *[ctypes.c_uint] * 4, ctypes.c_size_t]
    yield lambda *args: (lib.test_size(*args) or b"").decode() or None
    lib.sim.dials.arch = 80


def test_the_runtime_refuses_what_a_driver_refuses(size):
    assert size(1, 1, 1, 1, 64, 0) is None and size(1, 2, 3, 4, 1024, 0) is None
    for grid in ((1, 65536, 1), (1, 1, 65536)):
        assert "launch of gk::declares<1> refused: invalid configuration argument" in size(1, *grid, 64, 0)
    assert "invalid configuration" in size(1, 1, 1, 1, 1056, 0)
    limit = 163 << 10
    assert size(1, 1, 1, 1, 64, limit - 256) is None and "refused: invalid argument" in size(1, 1, 1, 1, 64, limit - 240)


def test_what_a_kernel_declares_counts_in_the_48_kb_that_are_free(size):
    """Who has not asked has 48 KB, declared and dynamic together; the launcher asks for all there is."""
    most = (48 << 10) - 256
    for shared in (most, most + 16, 48 << 10):
        assert size(2, 1, 1, 1, 64, shared) is None
        assert size(0, 1, 1, 1, 64, shared) == (None if shared == most else "cudaErrorInvalidValue")


def test_each_gpu_is_asked(lib, size):
    """The attribute is of a kernel on one GPU; the model plays one for each architecture."""
    for arch, limit in ((86, 99), (90, 227), (80, 163), (86, 99)):
        lib.sim.dials.arch = arch
        assert size(3, 1, 1, 1, 64, (limit << 10) - 256) is None


def test_threads_launch_one_kernel_with_different_sizes(size):
    """None takes back what another has asked for."""
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        sizes = [(50 + 28 * (i % 5)) << 10 for i in range(100)]
        assert set(pool.map(lambda shared: size(4, 1, 1, 1, 64, shared), sizes)) == {None}


def test_fresh_shared_memory_is_nan(lib):
    out = torch.zeros(64)
    assert lib.test_wrong(pointer(out), 8) is None
    assert out.isnan().all()


def test_lanes_of_a_warp_are_not_in_step(lib, seeds):
    """A lane that reads what its neighbour writes, without a barrier, reads it too early in every schedule."""
    for _ in seeds():
        out = torch.zeros(64)
        assert lib.test_wrong(pointer(out), 9) is None
        assert out.isnan().any()


# ---- counters ----


@pytest.mark.parametrize("stride, ways", ((0, 1), (1, 1), (2, 2), (4, 4), (8, 8), (32, 32), (33, 1)))
def test_bank_conflicts(lib, stride, ways):
    lib.sim.take_counters()
    lib.sim.dials.count = 1
    assert lib.test_banks(pointer(torch.zeros(32)), stride) is None
    lib.sim.dials.count = 0
    (counters,) = lib.sim.take_counters().values()
    writes = 33
    assert counters.shared_requests == writes + 1
    assert counters.shared_wavefronts == writes + ways
    assert (counters.global_requests, counters.global_sectors, counters.global_ideal) == (1, 4, 4)


# ---- the ops under sanitizers ----


def environment(build, *runtimes):
    """that of a process under the sanitizer whose build of the ops it loads"""
    found = [subprocess.run([CXX, f"-print-file-name={r}"], capture_output=True, text=True).stdout.strip() for r in runtimes]
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": "detect_leaks=0",
        "GPT_KERNELS_SIM_LIBRARY": str(ROOT / "gpt_kernels" / f"_cuda_{build}.so"),
    }


def built(build):
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "GPT_KERNELS_BUILD": build}, check=True)


def relinked(build, changed, folder):
    """A library of that build in which some sources are compiled by a changed command: {source's stem: command -> command}."""
    built(build)
    (at,) = ROOT.glob("build/temp*/sim")
    said = subprocess.run(["ninja", "-t", "commands"], cwd=at, capture_output=True, text=True, check=True).stdout
    *compiles, link = said.splitlines()
    for stem, change in changed.items():
        (command,) = (c for c in compiles if c.endswith(f"-o {stem}.o"))
        new = f"{folder}/{stem}.o"
        command = re.sub(r"-o \S+", f"-o {new}", re.sub(r"-MF \S+", f"-MF {new}.d", change(command)))
        subprocess.run(command, shell=True, cwd=at, check=True)
        link = re.sub(rf"(?<= ){stem}\.o", new, link)
    library = folder / f"_cuda_{build}.so"
    subprocess.run(re.sub(r"-o \S+", f"-o {library}", link), shell=True, cwd=at, check=True)
    return str(library)


def run_ops(env, *ops):
    command = [sys.executable, str(ROOT / "tests" / "sim" / "ops.py"), *ops]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1200)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.xdist_group("sim builds")  # both builds share their objects
@pytest.mark.parametrize("build, runtimes", (("sim_tsan", ["libtsan.so"]), ("sim_asan", ["libasan.so", "libstdc++.so"])))
def test_ops_under_sanitizers(build, runtimes):
    """No race and no missing wait, no byte out of range, no undefined behaviour."""
    built(build)
    done = run_ops(environment(build, *runtimes))
    assert done.returncode == 0 and "Sanitizer" not in done.stderr and "runtime error" not in done.stderr, done.stderr[-4000:]
    shapes = sum(len(watched.shapes) for op in cases.families() for watched in cases.of(op).watched())
    # three schedules, two dtypes
    assert f"{6 * shapes} calls of {', '.join(cases.families())}" in done.stdout


BARRIERS = {  # op: its file, and what stands before the barriers that are left out
    "gelu": ("gelu.cu", r"= sums\[k\];\s+"),
    "attention": ("attention.cu", r"cp_async_wait<\d>\(\);\s+"),
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.xdist_group("sim builds")
@pytest.mark.parametrize("op", BARRIERS)
def test_an_op_without_a_barrier_is_reported(op, tmp_path):
    """The sanitizer's build of an op sees what is missing: its 0 reports mean something."""
    name, before = BARRIERS[op]
    source = ROOT / "csrc" / "cuda" / name
    text, count = re.subn(rf"({before})__syncthreads\(\);", r"\1", source.read_text())
    assert count
    (tmp_path / name).write_text(text)
    changed = {source.stem: lambda command: command.replace(f"-c {source}", f"-I {source.parent} -c {tmp_path / name}")}
    done = run_ops(
        {**environment("sim_tsan", "libtsan.so"), "GPT_KERNELS_SIM_LIBRARY": relinked("sim_tsan", changed, tmp_path)}, op
    )
    assert "WARNING: ThreadSanitizer: data race" in done.stderr, done.stderr[-3000:]


# ---- the tiles of later architectures ----


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.xdist_group("sim builds")
@pytest.mark.parametrize("arch", (90, 100))
def test_attention_in_the_tiles_of(arch, tmp_path):
    """What sm_90a and sm_100a are compiled with, exact on integers, with edges inside a tile and in any split."""
    changed = dict.fromkeys(("attention", "attention_bwd"), lambda command: f"{command} -DGK_TILE_ARCH={arch}")
    env = {**os.environ, "GPT_KERNELS_TEST_BACKEND": "cuda_sim", "GPT_KERNELS_SIM_LIBRARY": relinked("sim", changed, tmp_path)}
    chosen = "integers_are_exact or edges or splits or tuned_and_general or bank_conflicts or schedules"
    command = [sys.executable, "-m", "pytest", "-q", "tests/test_cuda_sim_attention.py", "-k", chosen, "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
