"""Model directories without weights for a study: one tokenizer, trained on recorded episodes, and a config.json a shape.

    python examples/study/make_models.py --corpus expert.jsonl --vocab-size 512 --output models \
        --shapes '{"teacher": {"hidden_size": 128, "num_hidden_layers": 2, ...}}'

The families are small Qwen3; training draws their weights. The output appears complete or not at all.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1]
sys.path.insert(0, str(EXAMPLES))

from quickstart.prepare import HEADERS, model_config  # noqa: E402

from megatron_tcod.envs.demonstrations import read_demonstrations  # noqa: E402


def corpus_text(path: Path) -> str:
    """What a tokenizer should know: observations and commands of the recorded episodes, and the chat headers."""
    episodes = read_demonstrations(path, None)
    lines = [text for episode in episodes for turn in episode.turns for text in (turn.observation, turn.text)]
    return "\n".join(lines) + "\n" + "".join(HEADERS) * len(episodes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, required=True)
    parser.add_argument("--shapes", type=json.loads, required=True, help="JSON: name -> fields of config.json")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    staging = given.output.with_name(f"{given.output.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    tokenizer = staging / "tokenizer"
    tool = EXAMPLES.parent / "tools" / "make_tokenizer.py"
    command = [sys.executable, str(tool), "--output-dir", str(tokenizer), "--vocab-size", str(given.vocab_size)]
    subprocess.run(command, input=corpus_text(given.corpus), text=True, check=True)
    vocab = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    vocab_size = 1 + max([*vocab["model"]["vocab"].values(), *(token["id"] for token in vocab["added_tokens"])])
    for name, shape in given.shapes.items():
        shutil.copytree(tokenizer, staging / name)
        config = json.dumps(model_config(shape, vocab_size), indent=2) + "\n"
        (staging / name / "config.json").write_text(config, encoding="utf-8")
    shutil.rmtree(tokenizer)
    staging.rename(given.output)
    print(f"{given.output}: {', '.join(given.shapes)} with a vocabulary of {vocab_size}")


if __name__ == "__main__":
    main()
