"""tools/check_kernels.py on the kernels as they are, and on machine code that breaks each of its limits."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "check_kernels.py"
sys.path.insert(0, str(TOOL.parent))
import check_kernels  # noqa: E402

has_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
can_disassemble = pytest.mark.skipif(check_kernels.Disassembler.find() is None, reason="no nvdisasm and cuobjdump")
has_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")


def check(*flags: str) -> list[str]:
    run = subprocess.run([sys.executable, str(TOOL), *flags], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    return run.stdout.splitlines()


by_architecture = pytest.mark.parametrize(
    "archs", [["90"], pytest.param(["80", "100"], marks=pytest.mark.slow)], ids="+".join
)


@has_triton
@can_disassemble
@by_architecture
def test_triton_kernels_keep_the_limits(archs: list[str]):
    *kernels, last = check("--only", "triton", "--arch", *archs)
    assert last == f"{len(kernels)} kernels, 0 break a limit"
    assert {line.split("sm_")[1][:3].strip() for line in kernels} == set(archs)


@can_disassemble
@has_nvcc
@by_architecture
def test_cuda_kernels_keep_the_limits(archs: list[str]):
    *kernels, last = check("--only", "cuda", "--arch", *archs)
    assert last == f"{len(kernels)} kernels, 0 break a limit"
    assert len(kernels) == 29 * len(archs)  # 9 partial sums, 4 mixtures, 16 gradients


LOOP = (
    *("S2R R0, SR_TID.X", ".L_x_1:"),
    *("LDG.E.128 R4, desc[UR4][R2.64]", "LDG.E.128 R8, desc[UR4][R2.64+0x10]"),
    *("MUFU.EX2 R1, R1", "FADD R1, R1, R4") * 8,
    "BRA `(.L_x_1)",
)


def kernel(sass: tuple[str, ...], **change) -> check_kernels.Kernel:
    resources = {"registers": 32, "local_bytes": 0, "arch": 90, "operands": 2, "item_bytes": 2, "bytes_per_pair": 4.0}
    return check_kernels.Kernel(backend="cuda", name="partial_sums bf16", sass=sass, **resources | change)


def limits_broken(*args, **change) -> list[str]:
    broken_kernel = kernel(*args, **change)
    return check_kernels.limits_broken(broken_kernel, check_kernels.examine(broken_kernel))


def test_a_pair_of_logits_costs_the_loop_divided_by_what_it_loads():
    findings = check_kernels.examine(kernel(LOOP))
    assert (findings.wide_loads, findings.instructions, findings.mufu) == (2, 19 / 8, 1.0)
    assert findings.memory_ms == pytest.approx(1.158, abs=1e-3)  # 4 bytes for each of 8192 x 151,936 pairs at 4.3 TB/s
    assert findings.mufu_ms == pytest.approx(0.298, abs=1e-3)
    assert findings.issue_ms == pytest.approx(0.0884, abs=1e-3)
    assert limits_broken(LOOP) == []


def test_each_limit_is_noticed():
    assert limits_broken(LOOP, local_bytes=8) == ["registers spill"]
    assert limits_broken(("STL [R1], R2", *LOOP)) == ["registers spill"]
    narrow = tuple(entry.replace(".128", ".64") for entry in LOOP)
    assert limits_broken(narrow) == ["no loop with 128-bit loads"]
    assert limits_broken((*LOOP[:-1], "BAR.SYNC.DEFER_BLOCKING 0x0", LOOP[-1])) == ["the main loop synchronises"]
    assert limits_broken((*LOOP[:-1], "SHFL.BFLY PT, R3, R6, 0x10, 0x1f", LOOP[-1])) == ["the main loop synchronises"]
    slow = (*LOOP[:-1], *("FADD R1, R1, R4",) * 240, LOOP[-1])
    assert limits_broken(slow) == ["slower than memory"]
    assert limits_broken(slow, arch=80) == []
    assert limits_broken(("BAR.SYNC.DEFER_BLOCKING 0x0", *LOOP)) == []  # outside the loop


def test_the_main_loop_is_the_innermost_and_cheapest_one_with_exponentials():
    guarded = tuple(entry.replace("_1", "_2") for entry in (*LOOP[1:-1], "FSETP P0, PT, R1, RZ", LOOP[-1]))
    search = (".L_x_3:", *LOOP[2:4], "SHFL.BFLY PT, R3, R6, 0x10, 0x1f", "BRA `(.L_x_3)")
    outer = (".L_x_0:", *guarded, *search, *LOOP, "BRA `(.L_x_0)")
    assert check_kernels.main_loop(outer, 4) == list(LOOP[2:])


def test_nothing_to_check_is_a_failure(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["check_kernels.py", "--only", "cuda", "--arch", "90"])
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(check_kernels, "ROOT", Path("/nonexistent"))
    assert check_kernels.main() == 1
    assert "skipped" in capsys.readouterr().out
