"""Every GPU that Triton compiles for has launch parameters, or the reference with the reason; too large tiles shrink."""

import mmap
import re
from unittest import mock

import pytest
import torch

from gpt_kernels import cases, dispatch, triton
from gpt_kernels.architectures import ARCHITECTURES, family
from gpt_kernels.triton import common, slots

if triton.absence() is not None or triton.INTERPRETED:
    pytest.skip(str(triton.absence() or "the interpreter changes nothing here"), allow_module_level=True)

from triton._C import libtriton  # noqa: E402
from triton.compiler.compiler import make_backend  # noqa: E402
from triton.runtime.errors import OutOfResources  # noqa: E402

from gpt_kernels.triton import attention as fwd  # noqa: E402
from gpt_kernels.triton import attention_bwd as bwd  # noqa: E402
from tools import static_triton  # noqa: E402
from tools.problems import PROBLEMS, Inputs  # noqa: E402

NO_CODE = ("gfx900", "gfx902", "gfx904", "gfx906", "gfx909", "gfx90c", "gfx932")  # Triton's passes know no such GPU
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def known(pattern: bytes) -> list[str]:
    """Architectures that the installed Triton's library names."""
    with open(libtriton.__file__, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return sorted({name.decode() for name in re.findall(pattern, data)})


def amd() -> list[str]:
    return [name for name in known(rb"gfx(?:9|11|12)[0-9a-f]{2}(?=\0)") if name not in NO_CODE]


def nvidia() -> list[str]:
    return sorted(name for name in known(rb"sm_[0-9]{2,3}(?=[af]?\0)") if int(name[3:]) >= 80)


def test_defaults_exist_for_every_architecture():
    archs = [*nvidia(), *amd()]
    assert {*ARCHITECTURES} <= {*archs}
    families = {arch: family(arch) for arch in archs}
    assert all(families.values()) and not any(common.unserved("attention_fwd", arch) for arch in archs)
    nearest = {"sm_87": "sm_80", "sm_103": "sm_100", "sm_110": "sm_100", "sm_121": "sm_120", "gfx908": "gfx90a",
               "gfx950": "gfx942", "gfx1151": "gfx1100", "gfx1200": "gfx1201", "gfx1250": "gfx1201"}  # fmt: skip
    assert nearest.items() <= families.items()
    for dtype in DTYPES:
        calls = [(name, args) for _, name, args in cases.calls(dtype, "meta") if name.startswith("attention")]
        for arch in set(families.values()):
            for name, args in calls:
                with common.recording(arch):
                    slots.launcher(name)(*args)
    for arch in archs:  # the launchers ask by architecture, too
        for name, args in cases.step(cases.Sizes(1, 32, 128, 1, vocab=64), torch.bfloat16, "meta"):
            with common.recording(arch) as launches:
                slots.launcher(name)(*args)
            assert launches, f"{name} {arch}"


@pytest.mark.parametrize("arch, shared, expected", [
    ("sm_87", 163, "sm_80"), ("sm_88", 99, "sm_86"), ("sm_100", 227, "sm_100"), ("sm_110", 99, "sm_86"),
    ("sm_107", 227, "sm_100"), ("sm_130", 99, "sm_120"), ("sm_75", 64, "sm_86"), ("gfx950", 160, "gfx942"),
    ("gfx906", 64, None), ("gfx1310", 64, "gfx1201"), ("xpu", 64, None),
])  # fmt: skip
def test_the_family_is_one_whose_memory_the_gpu_has(arch, shared, expected):
    assert family(arch, shared) == expected


def check_compiles(problem, arch):
    """All of its kernels, in what memory the GPU has."""
    with common.recording(arch) as launches:
        problem.of.launch(Inputs(torch.bfloat16, True))
    for launch in launches:
        compiled = static_triton.compile_launch(launch, arch)
        assert compiled.metadata.shared <= ARCHITECTURES[family(arch)].shared * 1024, f"{compiled.name} {arch}"


@pytest.mark.parametrize("arch", ["sm_121", "gfx1100"])
def test_a_slice_compiles(arch, compiled_here):
    check_compiles(next(p for p in PROBLEMS if p.of.main and p.op == "layer_norm"), arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_87", "sm_103", "sm_110", "sm_121", "gfx908", "gfx950", "gfx1100", "gfx1151", "gfx1200",
                                  "gfx1201", "gfx1250"])  # fmt: skip
def test_training_compiles(arch, compiled_here):
    for problem in PROBLEMS:
        if problem.of.main or problem.of.name == "B2H8T1024D256":  # and the largest head
            check_compiles(problem, arch)


@pytest.fixture
def compiled_here(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


# ---- the precision of products ----


@pytest.fixture
def tf32():
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


def test_tf32_only_for_float32_where_the_target_has_it(tf32):
    for arch in ("sm_80", "sm_103", "sm_121", *amd()):
        for dtype in DTYPES:
            with common.recording(arch) as launches:
                for name, args in attention_calls(dtype):
                    slots.launcher(name)(*args)
            with static_triton.pretending(arch):
                target = static_triton.driver.active.get_current_target()
            allowed = make_backend(target).parse_options({}).allowed_dot_input_precisions
            wanted = {launch.parameters["PRECISION"] for launch in launches if "PRECISION" in launch.parameters}
            assert wanted <= set(allowed), f"{arch} {dtype}"
            has = arch.startswith("sm_") or arch == "gfx942"
            assert wanted == {"tf32" if has and dtype == torch.float32 else "ieee"}, f"{arch} {dtype}"


def attention_calls(dtype=torch.bfloat16, device="meta"):
    q = torch.zeros(1, 2, 200, 64, dtype=dtype, device=device)
    lse = torch.zeros(1, 2, 200, device=device)
    options = (None, None, None, 0.1, 0.0, 0.0, 0, -1, 0)
    yield "attention_fwd", (q, q, q, *options)
    yield "attention_bwd", (q, q, q, q, q, lse, *options, False)


# ---- a GPU with less memory, or none of our kind ----


@pytest.fixture(autouse=True)
def nothing_declined(monkeypatch):
    monkeypatch.setattr(slots, "_declined", {})


@pytest.fixture
def tiny(monkeypatch):
    """A GPU that refuses tiles of more than `limit[0]` scores, times stages; what was launched on it, and tried."""
    launched, tried, limit = [], [], [1024]

    def launch(kernel, grid, like, *args, **p):
        tried.append(kernel.__name__)
        needs = p["BLOCK_M"] * p.get("BLOCK_N", 1) * p.get("num_stages", 1)
        if needs > limit[0]:
            raise OutOfResources(needs, limit[0], "shared memory")
        launched.append((kernel.__name__, p["BLOCK_M"], p.get("BLOCK_N")))

    for module in (fwd, bwd):
        monkeypatch.setattr(module, "launch", launch)
    for tunable in (fwd.ATTENTION_FWD, bwd.ATTENTION_BWD_DKV, bwd.ATTENTION_BWD_DQ):
        monkeypatch.setattr(tunable, "_chosen", {})
    return launched, tried, limit


def test_a_tile_that_does_not_fit_is_made_smaller_once(tiny):
    launched, tried, _ = tiny
    for name, args in attention_calls():
        slots.launcher(name)(*args)
    first, tries = launched.copy(), len(tried)
    assert {name for name, *_ in first} == {f"attention_{k}_kernel" for k in ("fwd", "bwd_delta", "bwd_dkv", "bwd_dq")}
    assert all(columns is None or (rows >= 16 and 512 <= rows * columns <= 1024) for _, rows, columns in first)
    for name, args in attention_calls():
        slots.launcher(name)(*args)
    assert launched[len(first) :] == first and len(tried) == tries + len(first), "what fits is remembered"


def test_a_candidate_that_does_not_fit_is_none(tiny):
    """Measuring must not time another tile in its name."""
    (name, args), _ = attention_calls()
    with fwd.ATTENTION_FWD.override({"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}):
        with pytest.raises(OutOfResources):
            slots.launcher(name)(*args)


def test_where_nothing_fits_the_reference_serves_and_says_so(tiny):
    tiny[2][0] = 200
    for name, args in attention_calls(device="cpu"):
        call = dispatch.kernel_of(name, "triton")
        results = call(*args)
        expected = dispatch.reference(name)(*args)
        for result, want in zip(results, expected, strict=True):
            assert torch.equal(result, want)
        check_where(name, "does not fit on sm_80")
        with mock.patch.object(dispatch, "_pushed", [("triton", frozenset({name}))]):
            with pytest.raises(RuntimeError, match=f"{name}: the Triton kernels cannot serve it: .* does not fit on sm_80"):
                call(*args)


def triton_in_the_slot(name):
    """As with a GPU."""
    return mock.patch.object(dispatch._ops[name], "cuda", "triton")


def check_where(name, reason):
    with triton_in_the_slot(name):
        found = dispatch.where(name)["CUDA"]
    assert found.backend == "reference" and reason in found.reason


@pytest.mark.parametrize(
    "arch, ops, reason",
    [
        ("sm_75", ("attention_fwd", "attention_bwd"), "sm_75 has no matrix instructions"),
        ("gfx906", ("attention_fwd", "layer_norm_fwd"), "gfx906: Triton compiles for no architecture of its kind"),
    ],
)
def test_where_names_the_gpu_that_is_left_to_the_reference(arch, ops, reason, monkeypatch):
    """Before any call; and a call is the reference's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(common, "_target_of", lambda index: arch)
    for name in ops:
        check_where(name, reason)
    if arch == "sm_75":
        with triton_in_the_slot("gelu_fwd"):
            assert dispatch.where("gelu_fwd")["CUDA"].backend == "triton"
        with common.use_arch(arch):
            for name, args in attention_calls(device="cpu"):
                assert len(dispatch.kernel_of(name, "triton")(*args)) in (2, 4)
