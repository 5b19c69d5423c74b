"""The games that the ALFWorld tests share: two of each family, written once a session by the project's own tool."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "make_alfworld_games.py"


@pytest.fixture(scope="session")
def alfworld_games(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with 12 training games and one unseen game; skips where ALFWorld is not installed."""
    for package in ("alfworld", "textworld", "fast_downward"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install 'megatron_tcod[alfworld]'")
    root = tmp_path_factory.mktemp("alfworld") / "games"
    counts = ["--train", "12", "--valid-seen", "0", "--valid-unseen", "1"]
    subprocess.run([sys.executable, str(TOOL), "--out", str(root), *counts], check=True, timeout=500)
    return root
