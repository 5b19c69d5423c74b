"""How tests reach real SGLang servers on a CPU: which interpreter, which launcher, which flags."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = ROOT / ".venv-sglang" / "bin" / "python"
LAUNCHER = ROOT / "tools" / "sglang_cpu_launcher.py"
CPU_FLAGS = dict(
    device="cpu",
    attention_backend="torch_native",
    dtype="float32",
    max_total_tokens=8192,
    cuda_graph_backend_decode="disabled",
    cuda_graph_backend_prefill="disabled",
    skip_server_warmup=True,
    skip_tokenizer_init=True,
    disable_overlap_schedule=True,
    enable_deterministic_inference=True,
)


def require_server_environment() -> None:
    """Skips where there is none."""
    if not PYTHON.exists():
        pytest.skip("needs .venv-sglang; make it with: bash tools/sglang_cpu_env.sh")
