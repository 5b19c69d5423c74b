"""The backend `triton`: its kernels in Triton's interpreter on a CPU, and compiled where there is a GPU.

Triton decides at its first import whether it interprets, so the interpreted cases run in a process of their own, all in
one, which is this file as a program; it prints one JSON line a case.
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from chunk_cases import CASES, bad_arguments, good_arguments

from megatron_tcod.ops import triton_chunk

NAMES = [case.__name__ for case in CASES]


@functools.cache
def interpreted() -> dict[str, str]:
    """Case -> what went wrong in it, empty where nothing did."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("[")]
    assert len(lines) == len(CASES) + 1, run.stderr[-2000:]
    return dict(lines)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("name", [*NAMES, "bad_arguments"])
def test_interpreted_kernels(name: str):
    wrong = interpreted()[name]
    assert not wrong, wrong


def test_without_triton_or_a_device_it_says_why_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reason = triton_chunk.unavailable.__wrapped__()
    if importlib.util.find_spec("triton") is None:
        assert reason == "triton is not installed; pip install triton"
    else:
        assert reason == (None if torch.cuda.is_available() else "torch sees no CUDA device")


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_compiled_kernels(case):
    case(triton_chunk, "cuda")


def refuses_bad_arguments() -> None:
    for change, message in bad_arguments("cpu"):
        with pytest.raises(ValueError, match=message):
            triton_chunk.logits_gradient(**good_arguments("cpu") | change)


def main() -> None:
    torch.set_num_threads(1)
    assert triton_chunk.unavailable() is None
    runs = [(case.__name__, functools.partial(case, triton_chunk, "cpu")) for case in CASES]
    for name, run in [*runs, ("bad_arguments", refuses_bad_arguments)]:
        try:
            run()
            wrong = ""
        except Exception:
            wrong = traceback.format_exc()[-3000:]
        print(json.dumps([name, wrong]), flush=True)


if __name__ == "__main__":
    main()
