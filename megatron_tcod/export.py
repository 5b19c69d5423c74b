"""A training checkpoint as a Hugging Face directory: `python -m megatron_tcod.export --checkpoint DIR --output DIR`.

One process, no GPU, one layer's tensor in memory at a time; the checkpoint may be of any layout. The output holds
config.json, tokenizer files and model.safetensors and is what `transformers` and SGLang load. Every file is verified
against the checkpoint's manifest first; what cannot be read without pickle is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from megatron_tcod.config import ConfigError, run_entry_point, take_flag
from megatron_tcod.model.mapping import check_tensors, hf_plan, read_hf_config, write_hf_directory
from megatron_tcod.model.sharded_files import open_weights
from megatron_tcod.model.weight_files import replaced_directory, verify_manifest

USAGE = "give --checkpoint runs/x/checkpoints/step_0000100 --output DIRECTORY"


def export_checkpoint(checkpoint: Path, output: Path) -> None:
    """Write `output`; ValueError when it exists already or the checkpoint is damaged."""
    if output.exists():
        raise ValueError(f"output = {output} exists already; choose another directory or remove it")
    verify_manifest(checkpoint)
    family, shape = read_hf_config(checkpoint)
    with open_weights(checkpoint, family, shape) as weights:
        check_tensors(weights, family, shape)
        dtype = next(iter(weights.dtypes.values()))

        def in_order() -> Iterator[tuple[str, Tensor]]:
            for name, _, _ in hf_plan(family, shape, dtype):
                yield name, weights[name]

        with replaced_directory(output) as staging:
            write_hf_directory(staging, in_order(), family, shape, dtype=dtype, source=checkpoint)


def main(argv: list[str]) -> int:
    checkpoint, argv = take_flag(argv, "--checkpoint")
    output, argv = take_flag(argv, "--output")
    if argv or not checkpoint or not output:
        raise ConfigError(f"unknown arguments {argv}; {USAGE}" if argv else USAGE)
    export_checkpoint(Path(checkpoint), Path(output))
    print(f"wrote {output}")
    return 0


if __name__ == "__main__":
    run_entry_point(main)
