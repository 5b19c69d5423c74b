#!/usr/bin/env python3
"""Convert weights offline between a Hugging Face directory and one Megatron file per (tp, pp) rank.

    python tools/convert_checkpoint.py --direction hf-to-megatron --input qwen --output shards \\
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2
    python tools/convert_checkpoint.py --direction megatron-to-hf --input shards --output qwen-again

The Megatron side holds `tp_00_pp_00.safetensors` and so on, each with the parameter names and shapes of that rank's
model (layers count from 0 in every stage, as in Megatron's own `named_parameters`), config.json, and manifest.json
with a sha256 of every file and every tensor. The inverse checks all of them first. One process, one parameter in
memory at a time, any tp and pp; no process groups. Exit code 0, or 2 with one line that says what to correct.

It does not convert training state (`model/checkpoint.py` does not need converting), and it does not know interleaved
pipelines: load the Hugging Face directory at start instead.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from megatron_tcod.model.build import ModelShape, check_layout
from megatron_tcod.model.families.family import EMBEDDING, HEAD, Family
from megatron_tcod.model.families.rules import LAYOUTS, Slot
from megatron_tcod.model.mapping import CONFIG_FILE, check_tensors, read_hf_config
from megatron_tcod.model.parallel import ParallelLayout
from megatron_tcod.model.weight_files import (
    SINGLE_FILE,
    TensorWriter,
    WeightFiles,
    copy_tokenizer,
    replaced_directory,
    tensor_bytes,
    verify_manifest,
    write_manifest,
)

FORMAT = "megatron-shards"


def rank_file(tp_rank: int, pp_rank: int) -> str:
    return f"tp_{tp_rank:02d}_pp_{pp_rank:02d}.safetensors"


@dataclass(frozen=True)
class Placed:
    """A slot under the parameter name it has on one pipeline stage."""

    name: str
    slot: Slot


def stage_slots(family: Family, shape: ModelShape, *, pp_size: int, pp_rank: int) -> list[Placed]:
    """What one stage holds: its layers, the embedding on the first, final norm and head on the last.

    The head of a tied model is its own parameter, a copy of the embedding, on a last stage that is not the first.
    """
    per_stage = shape.num_layers // pp_size
    first, last = pp_rank == 0, pp_rank == pp_size - 1
    placed = []
    for slot in family.slots(shape):
        parts = slot.megatron.split(".")
        if parts[:2] == ["decoder", "layers"]:
            stage, parts[2] = int(parts[2]) // per_stage, str(int(parts[2]) % per_stage)
            if stage == pp_rank:
                placed.append(Placed(".".join(parts), slot))
            continue
        if slot.megatron == EMBEDDING:
            if first:
                placed.append(Placed(EMBEDDING, slot))
            if last and not first and shape.tie_word_embeddings:
                placed.append(Placed(HEAD, slot))
        elif last:
            placed.append(Placed(slot.megatron, slot))
    return placed


def hf_to_megatron(source: Path, target: Path, *, tp_size: int, pp_size: int) -> int:
    """Write one file per rank; returns the number of tensors written."""
    family, shape = read_hf_config(source)
    check_layout(shape, ParallelLayout(tensor_model_parallel_size=tp_size, pipeline_model_parallel_size=pp_size))
    digests: dict[str, dict[str, str]] = {}
    known: dict[str, str] = {}
    with WeightFiles(source) as files, replaced_directory(target) as staging:
        check_tensors(files, family, shape)
        for pp_rank in range(pp_size):
            placed = stage_slots(family, shape, pp_size=pp_size, pp_rank=pp_rank)
            for writer in _write_stage(files, staging, placed, shape, tp_size=tp_size, pp_rank=pp_rank):
                digests[writer.path.name] = writer.digests
                known[writer.path.name] = writer.sha256
        shutil.copyfile(source / CONFIG_FILE, staging / CONFIG_FILE)
        copy_tokenizer(source, staging)
        content = {
            "format": FORMAT,
            "model": {"model_type": family.model_type, **asdict(shape)},
            "tensor_model_parallel_size": tp_size,
            "pipeline_model_parallel_size": pp_size,
            "tensors": digests,
        }
        write_manifest(staging, content, known=known)
    return sum(len(tensors) for tensors in digests.values())


def _write_stage(
    files: WeightFiles, staging: Path, placed: list[Placed], shape: ModelShape, *, tp_size: int, pp_rank: int
) -> list[TensorWriter]:
    """The files of all tensor-parallel ranks of a stage at once, so that each tensor is read once."""
    plan = [(item.name, _one_dtype(files, item.slot), item.slot.shard_shape(shape, tp_size)) for item in placed]
    with ExitStack() as stack:
        writers = [
            stack.enter_context(TensorWriter(staging / rank_file(tp_rank, pp_rank), plan)) for tp_rank in range(tp_size)
        ]
        for item in placed:
            tensors = [files[name] for name in item.slot.hf]
            for tp_rank, writer in enumerate(writers):
                writer.write(item.name, item.slot.shard(tensors, shape, tp_size=tp_size, tp_rank=tp_rank))
    return writers


def _one_dtype(files: WeightFiles, slot: Slot) -> torch.dtype:
    dtypes = {name: files.dtypes[name] for name in slot.hf}
    if len(set(dtypes.values())) > 1:
        raise ValueError(
            f"{files.directory}: {slot.megatron} joins tensors of several dtypes {dtypes}; cast them to one"
        )
    return next(iter(dtypes.values()))


def megatron_to_hf(source: Path, target: Path, *, tp_size: int | None, pp_size: int | None) -> int:
    """Write a Hugging Face directory from rank files whose manifest verifies; returns the number of tensors written."""
    manifest = verify_manifest(source)
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{source}: not written by hf-to-megatron (format {manifest.get('format')!r}); pass that output"
        )
    sizes = {}
    for name, given in (("tensor_model_parallel_size", tp_size), ("pipeline_model_parallel_size", pp_size)):
        sizes[name] = manifest[name]
        if given not in (None, manifest[name]):
            raise ValueError(
                f"{source}: --{name.replace('_', '-')} {given}, but the files were written with {manifest[name]}; "
                "leave the option out"
            )
    family, shape = read_hf_config(source)
    check_layout(shape, ParallelLayout(**sizes))
    model, recorded = {"model_type": family.model_type, **asdict(shape)}, manifest["model"]
    odd = [
        f"{name} {value!r}, expected {recorded.get(name)!r}"
        for name, value in model.items()
        if recorded.get(name) != value
    ]
    if odd:
        raise ValueError(f"{source}: config.json is not the one converted: {', '.join(odd)}; restore config.json")
    with ExitStack() as stack:
        stages = [
            [
                stack.enter_context(WeightFiles(source, file_names=[rank_file(tp_rank, pp_rank)]))
                for tp_rank in range(sizes["tensor_model_parallel_size"])
            ]
            for pp_rank in range(sizes["pipeline_model_parallel_size"])
        ]
        _check_ranks(stages, manifest["tensors"], family, shape)
        staging = stack.enter_context(replaced_directory(target))
        writer = _write_hf(staging / SINGLE_FILE, _places(stages, family, shape), family, shape)
        shutil.copyfile(source / CONFIG_FILE, staging / CONFIG_FILE)
        copy_tokenizer(source, staging)
        write_manifest(staging, {"format": "hf", "tensors": writer.digests}, known={SINGLE_FILE: writer.sha256})
    return len(writer.digests)


def _write_hf(path: Path, places: dict[str, Places], family: Family, shape: ModelShape) -> TensorWriter:
    plan = []
    for slot in family.slots(shape):
        ranks, stored = places[slot.megatron][0]
        plan += [(name, ranks[0].dtypes[stored], size) for name, size in slot.hf_shapes(shape).items()]
    with TensorWriter(path, plan) as writer:
        for slot in family.slots(shape):
            for name, tensor in zip(slot.hf, _join(slot, places[slot.megatron], shape), strict=True):
                writer.write(name, tensor)
    return writer


def _check_ranks(
    stages: list[list[WeightFiles]], digests: dict[str, dict[str, str]], family: Family, shape: ModelShape
) -> None:
    """Every rank file holds exactly the parameters that config.json implies, of the shapes and bytes it should."""
    for pp_rank, ranks in enumerate(stages):
        expected = {
            item.name: item.slot.shard_shape(shape, len(ranks))
            for item in stage_slots(family, shape, pp_size=len(stages), pp_rank=pp_rank)
        }
        for tp_rank, files in enumerate(ranks):
            path = files.directory / rank_file(tp_rank, pp_rank)
            for name in sorted(expected.keys() | files.shapes.keys()):
                if expected.get(name) != files.shapes.get(name):
                    raise ValueError(
                        f"{path}: parameter {name} must be {expected.get(name, 'absent')} by config.json, got "
                        f"{files.shapes.get(name, 'none')}; use the config.json that belongs to the files"
                    )
                if hashlib.sha256(memoryview(tensor_bytes(files[name]))).hexdigest() != digests[path.name].get(name):
                    raise ValueError(f"{path}: parameter {name} has another sha256 than manifest.json; convert again")


Places = list[tuple[list[WeightFiles], str]]
"""Where a slot is stored: per holding stage, the files of its tensor-parallel ranks and the parameter name there."""


def _places(stages: list[list[WeightFiles]], family: Family, shape: ModelShape) -> dict[str, Places]:
    places: dict[str, Places] = {}
    for pp_rank, ranks in enumerate(stages):
        for item in stage_slots(family, shape, pp_size=len(stages), pp_rank=pp_rank):
            places.setdefault(item.slot.megatron, []).append((ranks, item.name))
    return places


def _join(slot: Slot, places: Places, shape: ModelShape) -> list[torch.Tensor]:
    """The full Hugging Face tensors of one slot; ranks that must hold the same numbers are compared."""
    shards, *copies = [[files[name] for files in ranks] for ranks, name in places]
    same = [(shards[0], shard) for shard in shards] if LAYOUTS[slot.kind].dim is None else []
    same += [pair for copy in copies for pair in zip(shards, copy, strict=True)]
    if not all(torch.equal(one, other) for one, other in same):
        raise ValueError(f"{slot.megatron} differs between ranks that must agree on it; convert or save again")
    return slot.join(shards, shape)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--direction", required=True, choices=["hf-to-megatron", "megatron-to-hf"])
    parser.add_argument("--input", required=True, type=Path)
    parser.add_argument("--output", required=True, type=Path, help="a directory that does not exist yet")
    parser.add_argument("--tensor-model-parallel-size", type=int, help="default: 1, or what the manifest says")
    parser.add_argument("--pipeline-model-parallel-size", type=int, help="default: 1, or what the manifest says")
    return parser.parse_args(arguments)


def convert(options: argparse.Namespace) -> int:
    """Run one conversion; returns the number of tensors written. ValueError when input, sizes or output are unfit."""
    if not options.input.is_dir():
        raise ValueError(f"--input {options.input} is not a directory; pass the directory that holds config.json")
    if options.output.exists():
        raise ValueError(f"--output {options.output} exists already; choose another or remove it")
    tp_size, pp_size = options.tensor_model_parallel_size, options.pipeline_model_parallel_size
    if options.direction == "megatron-to-hf":
        return megatron_to_hf(options.input, options.output, tp_size=tp_size, pp_size=pp_size)
    tp_size, pp_size = (1 if size is None else size for size in (tp_size, pp_size))
    return hf_to_megatron(options.input, options.output, tp_size=tp_size, pp_size=pp_size)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        num_tensors = convert(options)
    except (ValueError, OSError) as error:
        print(f"convert_checkpoint: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{options.output}: {num_tensors} tensors, manifest.json with a sha256 for each")
    return 0


if __name__ == "__main__":
    sys.exit(main())
