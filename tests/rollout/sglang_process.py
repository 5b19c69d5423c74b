"""Real SGLang servers on a CPU for tests: which interpreter, which flags, and a model directory to serve."""

from pathlib import Path

import pytest
from tiny_hf import tiny_model

from megatron_tcod.rollout.sglang_server import Server, launch

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-sglang" / "bin" / "python"
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
MAX_CONTEXT = 256


def served_model(seed: int = 0):
    """A random Qwen3 with no end-of-text id of its own."""
    return tiny_model("qwen3", seed=seed, eos_token_id=None, bos_token_id=None)


def launch_on_cpu(directory: Path, *, model_path: Path | None = None, **flags) -> Server:
    """A server of `served_model()`, with its log and weights below `directory`. Skips where there is no environment."""
    if not PYTHON.exists():
        pytest.skip("needs .venv-sglang; make it with: bash tools/sglang_cpu_env.sh")
    if model_path is None:
        model_path = directory / "model"
        served_model().save_pretrained(model_path)
    return launch(
        str(model_path),
        run_directory=directory / "server",
        flags=CPU_FLAGS | flags,
        environment={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        python=str(PYTHON),
        program=str(ROOT / "tools" / "sglang_cpu_launcher.py"),
        start_timeout_s=300,
    )
