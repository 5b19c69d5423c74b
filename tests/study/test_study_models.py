"""What a study makes before it trains: recorded experts, and models of a tokenizer that knows their words."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from study.grid import read_grid
from study.plan import Paths, plan
from study.results import read_results, write_results
from tokenizers import Tokenizer

from megatron_tcod.envs.demonstrations import read_demonstrations

ROOT = Path(__file__).parents[2]
SHAPE = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32, "num_attention_heads": 2}


def run_script(name, *arguments):
    line = [sys.executable, str(ROOT / "examples" / "study" / name), *map(str, arguments)]
    return subprocess.run(line, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "expert.jsonl"
    run_script("record_expert.py", "--env", "household", "--tasks", 12, "--mistake-rate", 0.1, "--output", path)
    return path


def test_models_of_a_recorded_corpus_spell_it_without_unknown_words(corpus, tmp_path):
    models = tmp_path / "models"
    shapes = json.dumps({"teacher": SHAPE, "small": SHAPE})
    run_script("make_models.py", "--corpus", corpus, "--vocab-size", 300, "--shapes", shapes, "--output", models)
    assert sorted(path.name for path in models.iterdir()) == ["small", "teacher"]
    tokenizer = Tokenizer.from_file(str(models / "small" / "tokenizer.json"))
    episodes = read_demonstrations(corpus, None)
    assert len(episodes) == 12
    for text in (text for episode in episodes for turn in episode.turns for text in (turn.observation, turn.text)):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    config = json.loads((models / "teacher" / "config.json").read_text())
    assert config["vocab_size"] == tokenizer.get_vocab_size() and config["hidden_size"] == 16


def test_demonstrations_are_counted_without_the_line_that_closes_their_file(corpus, tmp_path):
    grid = ROOT / "examples" / "study" / "quick.toml"
    study = read_grid(grid)
    demonstrations = Paths(root=tmp_path / "household").demonstrations
    demonstrations.parent.mkdir()
    demonstrations.write_bytes(corpus.read_bytes())
    found = write_results(study, plan(study, grid, tmp_path), tmp_path, command="none", num_slots=1)
    told, world = read_results(found)
    assert (world["num_demonstrations"], told["jobs"]) == (12, 1)
