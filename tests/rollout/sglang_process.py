"""Real SGLang servers on a CPU for tests, and a model directory to serve."""

from pathlib import Path

from sglang_cpu import CPU_FLAGS, LAUNCHER, PYTHON, require_server_environment
from tiny_hf import tiny_model

from megatron_tcod.rollout.sglang_server import Server, launch

MAX_CONTEXT = 256


def served_model(seed: int = 0):
    """A random Qwen3 with no end-of-text id of its own."""
    return tiny_model("qwen3", seed=seed, eos_token_id=None, bos_token_id=None)


def launch_on_cpu(directory: Path, *, model_path: Path | None = None, **flags) -> Server:
    """A server of `served_model()`, with its log and weights below `directory`. Skips where there is no environment."""
    require_server_environment()
    if model_path is None:
        model_path = directory / "model"
        served_model().save_pretrained(model_path)
    return launch(
        str(model_path),
        run_directory=directory / "server",
        flags=CPU_FLAGS | flags,
        environment={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        python=str(PYTHON),
        program=str(LAUNCHER),
        start_timeout_s=300,
    )
