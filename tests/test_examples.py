"""The run lines that open the example files are ones that the configuration understands."""

import re
import shlex
from pathlib import Path

import pytest

from megatron_tcod.config import load_config

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(path for path in (ROOT / "examples").rglob("*.toml") if "megatron_tcod.train" in path.read_text())


@pytest.mark.parametrize("path", EXAMPLES, ids=[str(path.relative_to(ROOT)) for path in EXAMPLES])
def test_the_run_line_of_an_example_gives_a_sound_configuration(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    joined = re.sub(r"\\\n#\s*", "", header)
    (command,) = re.findall(r"# ?.*(torchrun .* -m megatron_tcod\.train .*)", joined)
    arguments = shlex.split(command)
    arguments = arguments[arguments.index("megatron_tcod.train") + 1 :]
    assert str(path.relative_to(ROOT)) in arguments, "the run line names another file"
    config = load_config(arguments)
    assert config.model.student and config.training.save
