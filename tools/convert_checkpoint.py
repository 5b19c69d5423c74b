#!/usr/bin/env python3
"""Convert weights offline between a Hugging Face directory and one Megatron file per (tp, pp, ep) rank.

    python tools/convert_checkpoint.py --direction hf-to-megatron --input qwen --output shards \\
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2
    python tools/convert_checkpoint.py --direction megatron-to-hf --input shards --output qwen-again
    python tools/convert_checkpoint.py --direction checkpoint-to-hf --input runs/x/checkpoints/step_0000040 --output agent

The Megatron side holds `tp_00_pp_00.safetensors` and so on (`tp_00_pp_00_ep_00.safetensors` under expert parallelism),
each with the parameter names and shapes of that rank's model (layers count from 0 in every stage and experts in every
expert-parallel rank, as in Megatron's own `named_parameters`; experts are cut over tp as well), config.json, and
manifest.json with a sha256 of every file and every tensor. The inverse checks all of them. Hugging Face directories are
written in parts of at most `--max-part-gb`. Training checkpoints become plain directories for transformers and SGLang.

With --bridge, NVIDIA's megatron-bridge does the work for architectures that have no family here (bridge_conversion.py).

One process, the tensors of one parameter in memory at a time, any sizes; no process groups. Exit code 0, or 2 with one
line that says what to correct. It does not know interleaved pipelines: load the Hugging Face directory at start instead.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from bridge_conversion import export_with_bridge, import_with_bridge

from megatron_tcod.model.build import check_layout
from megatron_tcod.model.families.family import EMBEDDING, HEAD, Family
from megatron_tcod.model.families.rules import LAYOUTS, Slot
from megatron_tcod.model.mapping import CONFIG_FILE, check_tensors, read_hf_config
from megatron_tcod.model.parallel import ParallelLayout
from megatron_tcod.model.parts_writer import PartsWriter
from megatron_tcod.model.shape import ModelShape
from megatron_tcod.model.sharded_files import open_weights
from megatron_tcod.model.weight_files import (
    MANIFEST_FILE,
    TensorWriter,
    WeightFiles,
    copy_tokenizer,
    replaced_directory,
    tensor_bytes,
    verify_manifest,
    write_manifest,
)

FORMAT = "megatron-shards"
SIZES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "ep": "expert_model_parallel_size",
}
"""Field of a RankGrid -> its name in the manifest and, with dashes, on the command line."""


@dataclass(frozen=True, kw_only=True)
class RankGrid:
    """Into how many files a model is cut. Example: `RankGrid(tp=2, pp=4)` is 8 files."""

    tp: int = 1
    pp: int = 1
    ep: int = 1

    def file_name(self, tp_rank: int, pp_rank: int, ep_rank: int) -> str:
        suffix = f"_ep_{ep_rank:02d}" if self.ep > 1 else ""
        return f"tp_{tp_rank:02d}_pp_{pp_rank:02d}{suffix}.safetensors"

    def check(self, shape: ModelShape) -> None:
        """ValueError when the model cannot be cut this way."""
        layout = ParallelLayout(tensor_model_parallel_size=self.tp, pipeline_model_parallel_size=self.pp)
        check_layout(shape, layout)
        num_experts = 1 if shape.experts is None else shape.experts.num_experts
        if self.ep < 1 or num_experts % self.ep:
            raise ValueError(
                f"expert_model_parallel_size {self.ep} does not divide the {num_experts} experts of a layer; choose a "
                "divisor, 1 for a dense model"
            )

    def holds(self, slot: Slot, shape: ModelShape, *, pp_rank: int, ep_rank: int) -> str | None:
        """The parameter name under which those ranks hold `slot`, or None.

        A stage has its layers, the first the embedding, the last the final norm and the head. The head of a tied model
        is a parameter of its own, a copy of the embedding, on a last stage that is not the first.
        """
        parts = slot.megatron.split(".")
        first, last = pp_rank == 0, pp_rank == self.pp - 1
        if parts[:2] == ["decoder", "layers"]:
            stage, layer = divmod(int(parts[2]), shape.num_layers // self.pp)
            if stage != pp_rank:
                return None
            parts[2] = str(layer)
            if slot.expert is not None:
                assert shape.experts is not None
                owner, expert = divmod(slot.expert, shape.experts.num_experts // self.ep)
                if owner != ep_rank:
                    return None
                parts[parts.index("local_experts") + 1] = str(expert)
            return ".".join(parts)
        if slot.megatron != EMBEDDING:
            return slot.megatron if last else None
        if first:
            return EMBEDDING
        return HEAD if last and shape.tie_word_embeddings else None

    def holders(self, slot: Slot, shape: ModelShape) -> list[tuple[int, int, str]]:
        """Every (pp rank, ep rank, name there) that holds `slot`."""
        places = [(pp_rank, ep_rank) for pp_rank in range(self.pp) for ep_rank in range(self.ep)]
        named = [(*place, self.holds(slot, shape, pp_rank=place[0], ep_rank=place[1])) for place in places]
        return [(pp_rank, ep_rank, name) for pp_rank, ep_rank, name in named if name is not None]


def hf_to_megatron(source: Path, target: Path, grid: RankGrid) -> int:
    """Write one file per rank; returns the number of tensors written."""
    family, shape = read_hf_config(source)
    grid.check(shape)
    digests: dict[str, dict[str, str]] = {}
    known: dict[str, str] = {}
    with WeightFiles(source) as files, replaced_directory(target) as staging:
        check_tensors(files, family, shape)
        for pp_rank in range(grid.pp):
            for writer in _write_stage(files, staging, family, shape, grid, pp_rank=pp_rank):
                digests[writer.path.name] = writer.digests
                known[writer.path.name] = writer.sha256
        shutil.copyfile(source / CONFIG_FILE, staging / CONFIG_FILE)
        copy_tokenizer(source, staging)
        content = {
            "format": FORMAT,
            "model": {"model_type": family.model_type, **asdict(shape)},
            **{name: getattr(grid, size) for size, name in SIZES.items()},
            "tensors": digests,
        }
        write_manifest(staging, content, known=known)
    return sum(len(tensors) for tensors in digests.values())


def _write_stage(
    files: WeightFiles, staging: Path, family: Family, shape: ModelShape, grid: RankGrid, *, pp_rank: int
) -> list[TensorWriter]:
    """The files of all ranks of a stage at once, so that each tensor is read once."""
    writers: dict[tuple[int, int], TensorWriter] = {}
    names = [
        {slot.megatron: grid.holds(slot, shape, pp_rank=pp_rank, ep_rank=ep_rank) for slot in family.slots(shape)}
        for ep_rank in range(grid.ep)
    ]
    with ExitStack() as stack:
        for ep_rank, held in enumerate(names):
            plan = [
                (held[slot.megatron], _one_dtype(files, slot), slot.shard_shape(shape, grid.tp))
                for slot in family.slots(shape)
                if held[slot.megatron] is not None
            ]
            for tp_rank in range(grid.tp):
                path = staging / grid.file_name(tp_rank, pp_rank, ep_rank)
                writers[tp_rank, ep_rank] = stack.enter_context(TensorWriter(path, plan))
        for slot in family.slots(shape):
            holders = [(ep_rank, held[slot.megatron]) for ep_rank, held in enumerate(names) if held[slot.megatron]]
            if not holders:
                continue
            full = slot.merge([files[name] for name in slot.hf], shape)
            for tp_rank in range(grid.tp):
                part = slot.cut(full, tp_size=grid.tp, tp_rank=tp_rank)
                for ep_rank, name in holders:
                    writers[tp_rank, ep_rank].write(name, part)
    return list(writers.values())


def _one_dtype(files: WeightFiles, slot: Slot) -> torch.dtype:
    dtypes = {name: files.dtypes[name] for name in slot.hf}
    if len(set(dtypes.values())) > 1:
        raise ValueError(
            f"{files.directory}: {slot.megatron} joins tensors of several dtypes {dtypes}; cast them to one"
        )
    return next(iter(dtypes.values()))


def megatron_to_hf(source: Path, target: Path, given: Mapping[str, int | None], *, max_part_bytes: int) -> int:
    """Write a Hugging Face directory from rank files whose manifest verifies; returns the number of tensors written.

    `given` holds the sizes of the command line, None where the manifest is to say.
    """
    manifest = verify_manifest(source)
    grid = _grid_of(source, manifest, given)
    family, shape = read_hf_config(source)
    grid.check(shape)
    _check_model(source, manifest["model"], {"model_type": family.model_type, **asdict(shape)})
    with ExitStack() as stack:
        ranks = {
            (tp_rank, pp_rank, ep_rank): stack.enter_context(
                WeightFiles(source, file_names=[grid.file_name(tp_rank, pp_rank, ep_rank)])
            )
            for pp_rank in range(grid.pp)
            for ep_rank in range(grid.ep)
            for tp_rank in range(grid.tp)
        }
        reader = _RankFiles(ranks, manifest["tensors"], family, shape, grid)
        plan = reader.plan()
        return _write_hf(source, target, plan, reader.tensors(), max_part_bytes=max_part_bytes)


def _grid_of(source: Path, manifest: Mapping[str, Any], given: Mapping[str, int | None]) -> RankGrid:
    """The sizes of the manifest; ValueError when it is another kind, edited, or not what the command line says."""
    path = source / MANIFEST_FILE
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{source}: not written by hf-to-megatron (format {manifest.get('format')!r}); pass that output"
        )
    manifest = {SIZES["ep"]: 1, **manifest}  # directories of earlier versions do not name it
    sizes = {size: manifest.get(name) for size, name in SIZES.items()}
    for size, name in SIZES.items():
        if not isinstance(sizes[size], int) or isinstance(sizes[size], bool) or sizes[size] < 1:
            raise ValueError(f"{path}: {name} must be an integer > 0, got {sizes[size]!r}; convert again")
    for name in ("model", "tensors"):
        if not isinstance(manifest.get(name), dict):
            raise ValueError(f"{path}: {name} must be an object, got {manifest.get(name)!r}; convert again")
    for size, name in SIZES.items():
        if given[size] not in (None, sizes[size]):
            raise ValueError(
                f"{source}: --{name.replace('_', '-')} {given[size]}, but the files were written with {sizes[size]}; "
                "leave the option out"
            )
    return RankGrid(**sizes)


def _check_model(source: Path, recorded: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    odd = [
        f"{name} {value!r}, expected {recorded.get(name)!r}"
        for name, value in model.items()
        if recorded.get(name) != value
    ]
    if odd:
        raise ValueError(f"{source}: config.json is not the one converted: {', '.join(odd)}; restore config.json")


@dataclass(frozen=True)
class _RankFiles:
    """The files of all ranks, read slot by slot, each tensor checked against its recorded digest."""

    ranks: Mapping[tuple[int, int, int], WeightFiles]
    """By (tp, pp, ep) rank."""
    digests: Mapping[str, Any]
    """File name -> parameter -> sha256, as in the manifest."""
    family: Family
    shape: ModelShape
    grid: RankGrid

    def plan(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """What `tensors` yields. ValueError unless the files hold exactly the parameters that config.json implies."""
        plan = []
        expected: dict[tuple[int, int, int], set[str]] = {rank: set() for rank in self.ranks}
        for slot in self.family.slots(self.shape):
            size = slot.shard_shape(self.shape, self.grid.tp)
            for pp_rank, ep_rank, name in self.grid.holders(slot, self.shape):
                for tp_rank in range(self.grid.tp):
                    rank = (tp_rank, pp_rank, ep_rank)
                    self._check_shape(rank, name, size)
                    expected[rank].add(name)
            dtype = self.ranks[rank].dtypes[name]
            plan += [(name, dtype, size) for name, size in slot.hf_shapes(self.shape).items()]
        for rank, files in self.ranks.items():
            for name in sorted(files.shapes.keys() - expected[rank]):
                self._check_shape(rank, name, None)
        return plan

    def _check_shape(self, rank: tuple[int, int, int], name: str, size: tuple[int, ...] | None) -> None:
        files = self.ranks[rank]
        if files.shapes.get(name) != size:
            raise ValueError(
                f"{files.directory / self.grid.file_name(*rank)}: parameter {name} must be {size or 'absent'} by "
                f"config.json, got {files.shapes.get(name, 'none')}; use the config.json that belongs to the files"
            )

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Full Hugging Face tensors in the order of `plan`; ranks that must hold the same numbers are compared."""
        for slot in self.family.slots(self.shape):
            first, *others = self.grid.holders(slot, self.shape)
            read = [self._read((tp_rank, *first[:2]), first[2]) for tp_rank in range(self.grid.tp)]
            digests = [digest for _, digest in read]
            is_same = LAYOUTS[slot.kind].dim is not None or len(set(digests)) == 1
            for pp_rank, ep_rank, name in others:
                copies = [self._read((tp_rank, pp_rank, ep_rank), name)[1] for tp_rank in range(self.grid.tp)]
                is_same = is_same and copies == digests
            if not is_same:
                raise ValueError(f"{slot.megatron} differs between ranks that must agree on it; convert or save again")
            yield from zip(slot.hf, slot.join([shard for shard, _ in read], self.shape), strict=True)

    def _read(self, rank: tuple[int, int, int], name: str) -> tuple[torch.Tensor, str]:
        """A parameter and its sha256, which must be the recorded one."""
        tensor, file_name = self.ranks[rank][name], self.grid.file_name(*rank)
        recorded = self.digests.get(file_name)
        digest = hashlib.sha256(memoryview(tensor_bytes(tensor))).hexdigest()
        if not isinstance(recorded, dict) or recorded.get(name) != digest:
            path = self.ranks[rank].directory / file_name
            raise ValueError(f"{path}: parameter {name} has another sha256 than manifest.json; convert again")
        return tensor, digest


def checkpoint_to_hf(source: Path, target: Path, *, max_part_bytes: int) -> int:
    """Write the model of a training checkpoint as a plain Hugging Face directory; returns the number of tensors."""
    if not (source / MANIFEST_FILE).is_file():
        raise ValueError(f"{source} has no {MANIFEST_FILE}: no training checkpoint; pass a step_* directory of a run")
    verify_manifest(source)
    family, shape = read_hf_config(source)
    with open_weights(source, family, shape) as files:
        check_tensors(files, family, shape)
        names = [(name, size) for slot in family.slots(shape) for name, size in slot.hf_shapes(shape).items()]
        plan = [(name, files.dtypes[name], size) for name, size in names]
        tensors = ((name, files[name]) for name, _ in names)
        return _write_hf(source, target, plan, tensors, max_part_bytes=max_part_bytes)


def _write_hf(
    source: Path,
    target: Path,
    plan: list[tuple[str, torch.dtype, tuple[int, ...]]],
    tensors: Iterator[tuple[str, torch.Tensor]],
    *,
    max_part_bytes: int,
) -> int:
    with replaced_directory(target) as staging:
        with PartsWriter(staging, plan, max_part_bytes=max_part_bytes) as writer:
            for name, tensor in tensors:
                writer.write(name, tensor)
        shutil.copyfile(source / CONFIG_FILE, staging / CONFIG_FILE)
        copy_tokenizer(source, staging)
        write_manifest(staging, {"format": "hf", "tensors": writer.digests}, known=writer.sha256)
    return len(writer.digests)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    directions = ["hf-to-megatron", "megatron-to-hf", "checkpoint-to-hf"]
    parser.add_argument("--direction", required=True, choices=directions)
    parser.add_argument("--input", required=True, type=Path)
    parser.add_argument("--output", required=True, type=Path, help="a directory that does not exist yet")
    for name in SIZES.values():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help="default: 1, or what the manifest says")
    parser.add_argument("--bridge", action="store_true", help="convert with megatron-bridge, the extra `bridge`")
    parser.add_argument("--hf-model", type=Path, help="with --bridge megatron-to-hf: the directory converted from")
    parser.add_argument("--max-part-gb", type=float, default=5.0, help="of one file of a Hugging Face output; default 5")
    return parser.parse_args(arguments)


def convert(options: argparse.Namespace) -> str:
    """Run one conversion; returns what was written. ValueError when input, sizes or output are unfit."""
    if not options.input.is_dir():
        raise ValueError(f"--input {options.input} is not a directory; pass the directory that holds config.json")
    if options.output.exists() or options.output.is_symlink():
        raise ValueError(f"--output {options.output} exists already; choose another or remove it")
    if not 0 < options.max_part_gb < 1e6:
        raise ValueError(f"--max-part-gb {options.max_part_gb}: expected a number above 0 and below a million")
    given = {size: getattr(options, name) for size, name in SIZES.items()}
    if options.bridge:
        return _convert_with_bridge(options, given)
    max_part_bytes = int(options.max_part_gb * 10**9)
    if options.direction == "hf-to-megatron":
        grid = RankGrid(**{size: 1 if value is None else value for size, value in given.items()})
        num_tensors = hf_to_megatron(options.input, options.output, grid)
    elif options.direction == "megatron-to-hf":
        num_tensors = megatron_to_hf(options.input, options.output, given, max_part_bytes=max_part_bytes)
    elif sizes := [name for name, value in given.items() if value is not None]:
        raise ValueError(f"--{SIZES[sizes[0]].replace('_', '-')} says nothing with checkpoint-to-hf; leave it out")
    else:
        num_tensors = checkpoint_to_hf(options.input, options.output, max_part_bytes=max_part_bytes)
    return f"{num_tensors} tensors, manifest.json with a sha256 for each"


def _convert_with_bridge(options: argparse.Namespace, given: Mapping[str, int | None]) -> str:
    sizes = [f"--{SIZES[size].replace('_', '-')}" for size, value in given.items() if value not in (None, 1)]
    if sizes:
        raise ValueError(f"{sizes[0]} has no meaning with --bridge, whose checkpoints fit every layout; leave it out")
    if options.direction == "hf-to-megatron":
        import_with_bridge(options.input, options.output)
    elif options.direction == "megatron-to-hf" and options.hf_model is not None:
        export_with_bridge(options.input, options.output, hf_model=options.hf_model)
    else:
        raise ValueError("--bridge converts hf-to-megatron, and megatron-to-hf given --hf-model; correct the options")
    return "written by megatron-bridge"


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        written = convert(options)
    except (ValueError, OSError) as error:
        print(f"convert_checkpoint: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{options.output}: {written}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
