"""How tests reach real SGLang servers on a CPU: which interpreter, which launcher, which flags."""

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = ROOT / ".venv-sglang" / "bin" / "python"
LAUNCHER = ROOT / "tools" / "sglang_cpu_launcher.py"
QUICKSTART = ROOT / "examples" / "quickstart" / "sglang_cpu.toml"
CPU_FLAGS = tomllib.loads(QUICKSTART.read_text())["rollout"]["server"] | {"max_total_tokens": 8192}


def require_server_environment() -> None:
    """Skips where there is none."""
    if not PYTHON.exists():
        pytest.skip("needs .venv-sglang; make it with: bash tools/sglang_cpu_env.sh")
