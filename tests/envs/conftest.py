"""What tests of environments share: ALFWorld games and a shop's catalogue, written once a session by the project's own
tools, and a server of the household."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "make_alfworld_games.py"


@pytest.fixture(scope="session")
def alfworld_games(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with 12 training games and one unseen game, made once for all workers; skips where ALFWorld is not installed."""
    for package in ("alfworld", "textworld", "fast_downward"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install 'megatron_tcod[alfworld]'")
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "alfworld-games"
    counts = ["--train", "12", "--valid-seen", "0", "--valid-unseen", "1"]
    with open(root.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not root.exists():
            subprocess.run([sys.executable, str(TOOL), "--out", str(root), *counts], check=True, timeout=500)
    return root


@pytest.fixture(scope="session")
def small_shop(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Options for `webshop` that launch the project's server over the small shop and a catalogue of 1,000 products."""
    data = tmp_path_factory.mktemp("webshop") / "catalogue"
    tool = Path(__file__).parents[2] / "tools" / "make_webshop_catalogue.py"
    subprocess.run([sys.executable, str(tool), "--out", str(data), "--products", "1000"], check=True, timeout=60)
    return {"webshop": str(Path(__file__).parent / "small_webshop"), "python": sys.executable, "data": str(data)}


@pytest.fixture(scope="session")
def remote_household() -> Iterator[dict[str, str]]:
    """Options for `remote` with a server of the built-in household; skips where aiohttp is not installed."""
    if importlib.util.find_spec("aiohttp") is None:
        pytest.skip("aiohttp is not installed: pip install 'megatron_tcod[dev]'")
    from household_server import FIELDS, serve

    with serve() as url:
        yield {"url": url, **FIELDS}
