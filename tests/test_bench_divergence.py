"""The benchmark of the divergence: it runs and agrees, it fails on a wrong backend, and its memory figures are real."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_tcod.ops import logits_chunk

TOOLS = Path(__file__).parents[1] / "tools"


@pytest.fixture
def bench(monkeypatch):
    """The tool as a module; it takes one thread, which is given back."""
    monkeypatch.syspath_prepend(str(TOOLS))
    import bench_divergence

    num_threads = torch.get_num_threads()
    yield bench_divergence
    torch.set_num_threads(num_threads)


class Off:
    """The torch backend with a factor on some of its values."""

    name = "off"

    def __init__(self, *, sums: float = 1.0, gradient: float = 1.0):
        self._sums, self._gradient = sums, gradient

    unavailable = staticmethod(logits_chunk.unavailable)
    mixture_sums = staticmethod(logits_chunk.mixture_sums)

    def partial_sums(self, *tensors, **options):
        sums = logits_chunk.partial_sums(*tensors, **options)
        sums[10] *= self._sums  # the excess, of which the reverse KL is made
        return sums

    def logits_gradient(self, *tensors, out, **options):
        logits_chunk.logits_gradient(*tensors, out=out, **options)
        out[-1] *= self._gradient


def test_tiny_shapes_run_agree_and_are_written_down(tmp_path):
    figures = tmp_path / "new" / "figures.json"
    flags = ["--shapes", "40x507", "32x503x64", "40x507x16x24", "--providers", "eager", "torch", "op", "megatron-ce"]
    command = [sys.executable, str(TOOLS / "bench_divergence.py"), *flags, "--json", str(figures)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    written = json.loads(figures.read_text())
    assert {"device", "torch", "threads", "commit", "roof", "rows"} <= set(written) and written["roof"]["copy_gbps"] > 0
    found = {(row["label"], row["provider"]) for row in written["rows"]}
    for dtype in ("bf16", "fp32"):
        assert {(f"logits jsd T=40 V=507 {dtype}", name) for name in ("eager", "torch", "op")} <= found
        assert (f"logits reverse_kl T=40 V=507 {dtype}", "megatron-ce") in found
    assert {("hidden jsd T=40 V=507 H=16/24 fp32", name) for name in ("eager", "torch", "torch-packed")} <= found
    errors = {row["provider"]: row["gradient_error"] for row in written["rows"] if "KL=2e-04" in row["label"]}
    assert errors["torch"] < 1e-3 < errors["torch-packed"] < 0.01 < 0.4 < errors["bf16-logits"]


def test_wrong_backends_end_the_run_with_exit_code_1_and_are_named(bench, capsys):
    backends = {"steep": Off(gradient=1.001), "nan": Off(gradient=float("nan")), "high": Off(sums=1.001), "right": Off()}
    flags = ["--shapes", "40x507", "--providers", *backends, "--rows", "reverse_kl", "fp32"]
    with pytest.raises(SystemExit, match="1"):
        bench.main(flags, backends=backends)
    printed = capsys.readouterr().out.splitlines()
    for mark in (lambda line: line.startswith("FAILED"), lambda line: line.endswith("WRONG")):
        named = [line for line in printed if mark(line)]
        assert [name for line in named for name in backends if f" {name}" in line] == ["steep", "nan", "high"]
        assert all("logits reverse_kl T=40 V=507 fp32" in line for line in named)


def test_a_run_that_measures_nothing_is_no_success(bench, capsys):
    with pytest.raises(SystemExit, match="1"):
        bench.main(["--shapes", "8x11", "--rows", "no such row"])
    assert "FAILED nothing was measured" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--shapes", "8by11"])
    assert "'8by11' is no TxV, TxVxH or TxVxHsxHt" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_peak_memory_counts_what_lives_at_one_time(bench):
    block = torch.ones(16 << 20)  # 64 MiB

    def peak_of(step) -> float:
        return bench.measure("cpu", lambda i: (block,), step, warm=lambda: step(block[:2]))[2] / block.nbytes

    assert peak_of(lambda x: x.mul_(1.0)) < 0.05
    assert peak_of(lambda x: x + 1) == pytest.approx(1, abs=0.05)
    assert peak_of(lambda x: ((x + 1) * 2).sum()) == pytest.approx(2, abs=0.05)
    assert peak_of(lambda x: (x + 1).sum() + (x + 2).sum()) == pytest.approx(1, abs=0.05)
