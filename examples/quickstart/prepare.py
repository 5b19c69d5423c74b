"""Model directories for the quickstart: `python examples/quickstart/prepare.py --output runs/quickstart/models`.

Writes `student/` and `teacher/`, each with a config.json of a small Qwen3 and the same byte-pair tokenizer with Qwen's
control tokens, trained on what the household world says and its expert answers. No weights: training draws them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from megatron_tcod.envs.household import Household

VOCAB_SIZE = 512
NUM_EPISODES = 600
SHAPES = {
    "teacher": {"hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 344, "num_attention_heads": 4},
    "student": {"hidden_size": 96, "num_hidden_layers": 2, "intermediate_size": 256, "num_attention_heads": 2},
}
"""Teacher and student differ in width and heads. Two layers are the fewest that can look up a name they have read; a third
costs a small machine more than it brings in the two minutes until the first distillation step."""

HEADERS = ["user\n", "assistant\n", "system\n"]


def world_text() -> str:
    """What a tokenizer should know: observations and commands, one a line, and the chat headers."""
    lines = []
    for index, task in enumerate(Household.tasks("train", count=NUM_EPISODES, mark_wanted=True)):
        for turn in Household.expert(task, seed=index, mistake_rate=0.1).turns:
            lines += [turn.observation, turn.text]
    return "\n".join(lines) + "\n" + "".join(HEADERS) * NUM_EPISODES


def model_config(shape: dict[str, int], vocab_size: int) -> dict[str, object]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **shape,
        "num_key_value_heads": shape["num_attention_heads"],
        "head_dim": shape["hidden_size"] // shape["num_attention_heads"],
        "vocab_size": vocab_size,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    output = parser.parse_args().output
    tool = Path(__file__).parents[2] / "tools" / "make_tokenizer.py"
    staging = output / ".tokenizer"
    command = [sys.executable, str(tool), "--output-dir", str(staging), "--vocab-size", str(VOCAB_SIZE)]
    subprocess.run(command, input=world_text(), text=True, check=True)
    vocab = json.loads((staging / "tokenizer.json").read_text(encoding="utf-8"))
    vocab_size = 1 + max([*vocab["model"]["vocab"].values(), *(token["id"] for token in vocab["added_tokens"])])
    for name, shape in SHAPES.items():
        shutil.copytree(staging, output / name, dirs_exist_ok=True)
        config = json.dumps(model_config(shape, vocab_size), indent=2) + "\n"
        (output / name / "config.json").write_text(config, encoding="utf-8")
    shutil.rmtree(staging)
    print(f"{output}: {', '.join(SHAPES)} with a vocabulary of {vocab_size}")


if __name__ == "__main__":
    main()
