"""The launch path of a GPU machine, walked without a GPU: Triton's own launcher under a driver that runs nothing."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from gpt_kernels import triton

HERE = pathlib.Path(__file__).parent
pytestmark = [
    pytest.mark.skipif(triton.absence() is not None, reason=str(triton.absence())),
    pytest.mark.skipif(triton.INTERPRETED, reason="kernels are interpreted: nothing is launched"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler for the pretended driver, nor for Triton's launcher"),
]
ROW_BUDGET, ATTENTION_BUDGET = 12, 15  # microseconds of a call on an idle machine, where a Python kernel in a slot takes 2


@pytest.fixture(scope="module")
def pretended(tmp_path_factory):
    """run(arch, what, environment) -> walk.py's answer"""
    import triton as installed

    place = tmp_path_factory.mktemp("driver")
    library = place / "libcuda.so.1"
    headers = pathlib.Path(installed.__file__).parent / "backends" / "nvidia" / "include"
    build = ["cc", "-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{headers}", "pretended_gpu/cuda.c", "-o", library]
    subprocess.run(build, cwd=HERE, check=True)

    def run(arch: str, what: str, **environment: str) -> dict:
        env = os.environ | {
            "TRITON_LIBCUDA_PATH": str(place),
            "TRITON_CACHE_DIR": str(place / "cache"),
            "PYTHONPATH": os.pathsep.join([*filter(None, [environment.pop("PYTHONPATH", "")]), str(HERE.parent), str(HERE)]),
        }
        command = [sys.executable, HERE / "pretended_gpu" / "walk.py", library, arch, what]
        done = subprocess.run(command, env=env | environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


def check(found: dict, all_ops: bool = True) -> None:
    assert not found["faults"], "\n".join(found["faults"][:5])
    assert found["launches"] > 10 and found["replayed"] > 10
    # a sum over a broadcast bias's tiles is torch's own
    assert set(found["ordinary"]) <= {"attention_bwd"}


def test_a_training_step_on_hopper(pretended):
    found = pretended("sm_90", "steps")
    check(found)
    assert {"attention_fwd_kernel", "attention_bwd_dq_kernel", "norm_bwd_kernel", "reduce_kernel"} <= {*found["kernels"]}
    assert not found["ordinary"]
    times = pretended("sm_90", "host")  # its kernels are compiled by now, but for other sizes' few
    for name, (again, launched) in times["ops"].items():
        budget = {"attention_fwd": ATTENTION_BUDGET, "attention_bwd": 3 * ATTENTION_BUDGET}.get(name, ROW_BUDGET)
        # a slow or busy machine is slow for the slot, too
        assert again < 2 * budget * max(1, times["slot"] / 2), f"{name}: {again:.1f} us, slot {times['slot']:.1f} us"
        assert again < 0.75 * launched, f"{name}: {again:.1f} us replayed, {launched:.1f} us launched"


def test_what_is_a_kind(pretended):
    seen = pretended("sm_80", "kinds")
    assert seen[:14] == [
        [what, n, 0]
        for what, n in [("first", 1), ("same", 1), ("option", 2), ("bias", 3), ("shape", 4), ("alignment", 5), ("dtype", 6)]
        for _ in range(2)
    ]
    assert seen[14:19] == [["hook", 6, 1], ["no hook", 6, 0], ["parameters changed", 7, 0], *[["refused", 7, 0]] * 2]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120"])
def test_every_call(pretended, arch):
    check(pretended(arch, "all"))
