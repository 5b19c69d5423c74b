"""The benchmark of a training step tells figures that hang together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "bench_training.py"


@pytest.mark.slow
def test_the_figures_of_a_step_hang_together(tmp_path):
    path = tmp_path / "figures.json"
    command = [sys.executable, str(TOOL), "--steps", "1", "--recompute", "full", "--json", str(path)]
    said = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert said.returncode == 0, said.stderr
    figures = json.loads(path.read_text())
    assert sum(figures["share"].values()) == pytest.approx(1)
    seconds = figures["tokens"] / figures["tokens_per_second"]
    assert figures["mfu"] == pytest.approx(sum(figures["flops"].values()) / seconds / figures["roof"])
    of_phases = [figures["mfu_by_phase"][phase] * figures["share"][phase] for phase in ("teacher", "train")]
    assert figures["mfu"] == pytest.approx(sum(of_phases))
    assert 0.01 < figures["mfu"] < 2 and figures["is_finite"]  # a busy machine may slow the measured roof
    assert f"MFU {100 * figures['mfu']:.0f} %" in said.stdout and figures["commit"] in said.stdout
