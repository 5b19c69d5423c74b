"""Weights between Hugging Face directories and this rank's Megatron parameters, at any tp, pp, virtual pp and ep.

    family, shape = read_hf_config(directory)
    chunks = build_model(shape, layout, seed=None, wrap_ddp=True)
    load_hf(chunks, directory, family, shape)                      # every tensor accounted for, or ValueError
    for name, tensor in export_hf(chunks, family, shape): ...      # full tensors on every rank, in a fixed order
    save_hf(directory, chunks, family, shape, source=original)

`export_hf(read=...)` and `load_named(write=...)` move anything shaped like the parameters the same way: Adam's moments,
fp32 master weights. The layouts are declared in `families/`; this file only moves tensors between ranks. It does not
cast on export, keep a second copy, or touch the optimizer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module, Parameter

from megatron_tcod.model import parallel
from megatron_tcod.model.build import named_parameters
from megatron_tcod.model.families import find_family
from megatron_tcod.model.families.family import EMBEDDING, HEAD, Family
from megatron_tcod.model.families.rules import DIMS, LAYOUTS, Slot
from megatron_tcod.model.shape import ModelShape
from megatron_tcod.model.sharded_files import ShardedWeights, open_weights
from megatron_tcod.model.weight_files import (
    SINGLE_FILE,
    TensorWriter,
    WeightFiles,
    copy_tokenizer,
    read_json,
    replaced_directory,
    write_json,
)

CONFIG_FILE = "config.json"
TOKEN_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Fields of config.json that belong to the tokenizer and are carried along from the source directory."""


def read_hf_config(directory: str | Path) -> tuple[Family, ModelShape]:
    """The family and shape of a Hugging Face directory; ValueError names the file, the field and the fix."""
    path = Path(directory) / CONFIG_FILE
    config = read_json(path)
    try:
        family = find_family(config.get("model_type", ""))
        return family, family.read_config(config)
    except ValueError as error:
        raise ValueError(f"{path.parent}: {error}") from None
    except (KeyError, TypeError, AttributeError) as error:  # values of other types than any such file has
        raise ValueError(f"{path} cannot be understood ({type(error).__name__}: {error}); copy it again") from error


def local_parameters(chunks: list[Module], family: Family, shape: ModelShape) -> dict[str, list[Parameter]]:
    """This rank's parameters by slot name; the embedding's list also has a tied model's copy on the last stage.

    ValueError when the model has a parameter that the family does not map, or of another shape.
    """
    slots = {slot.megatron: slot for slot in family.slots(shape)}
    found: dict[str, list[Parameter]] = {}
    for full_name, parameter in named_parameters(chunks):
        name = EMBEDDING if full_name == HEAD and shape.tie_word_embeddings else full_name
        expected = slots[name].shard_shape(shape, parallel.tp_size()) if name in slots else None
        if expected != tuple(parameter.shape):
            raise ValueError(
                f"model parameter {full_name} {list(parameter.shape)}: the {family.model_type} family expects "
                f"{'no such parameter' if expected is None else list(expected)}; build the model from the shape that "
                "read_hf_config returned"
            )
        found.setdefault(name, []).append(parameter)
    return found


def check_tensors(files: WeightFiles | ShardedWeights, family: Family, shape: ModelShape) -> None:
    """ValueError for a tensor that is missing, unexpected or of another shape than config.json says.

    A tied model may carry its head a second time; it must then equal the embedding bit for bit.
    """
    where = files.directory
    expected: dict[str, tuple[tuple[int, ...], str]] = {}
    for slot in family.slots(shape):
        sizes = slot.hf_shapes(shape)
        expected.update({name: (sizes[name], dims) for name, dims in slot.hf.items()})
    for name, (size, dims) in expected.items():
        if name not in files.shapes:
            raise ValueError(f"{where}: tensor {name} {list(size)} is missing; {_presence_hint(name, shape)}")
        if files.shapes[name] != size:
            fields = ", ".join(DIMS[dim][1] for dim in dims.split())
            raise ValueError(
                f"{where}: tensor {name} must be {list(size)} by config.json, got {list(files.shapes[name])}; correct "
                f"config.json ({fields}) or use the weights that belong to it"
            )
    unexpected = [name for name in files if name not in expected and not name.endswith(family.ignored_suffixes)]
    if shape.tie_word_embeddings and "lm_head.weight" in unexpected:
        _check_tied_copy(files)
        unexpected.remove("lm_head.weight")
    if unexpected:
        raise ValueError(
            f"{where}: unexpected tensor {unexpected[0]} {list(files.shapes[unexpected[0]])} ({len(unexpected)} in "
            f"all), expected none of that name; {_presence_hint(unexpected[0], shape)}"
        )


def _presence_hint(name: str, shape: ModelShape) -> str:
    if name == "lm_head.weight":
        return f"set tie_word_embeddings in config.json (now {shape.tie_word_embeddings}) to what the weights are"
    if name.startswith("model.layers."):
        return f"set num_hidden_layers in config.json (now {shape.num_layers}), or model_type, to what the weights are"
    return "set model_type in config.json to what the weights are, or export the weights again"


def _check_tied_copy(files: WeightFiles | ShardedWeights) -> None:
    head, embedding = files["lm_head.weight"], files["model.embed_tokens.weight"]
    if not torch.equal(head, embedding):
        raise ValueError(
            f"{files.directory}: config.json has tie_word_embeddings true, but lm_head.weight differs from "
            "model.embed_tokens.weight; set tie_word_embeddings to false, or remove lm_head.weight"
        )


def copy_into(parameter: Parameter, shard: Tensor) -> None:
    """The default `write`: fill the parameter in place, in its own precision."""
    parameter.data.copy_(shard)


def load_hf(chunks: list[Module], directory: str | Path, family: Family, shape: ModelShape) -> None:
    """Fill this rank's parameters from a Hugging Face directory, or from a training checkpoint, one slot in memory at a
    time. No communication.

    Rows of vocabulary padding become zero. ValueError, before anything is changed, when files, config.json and model
    do not agree.
    """
    with open_weights(directory, family, shape) as files:
        check_tensors(files, family, shape)
        load_named(chunks, family, shape, files)


def load_named(
    chunks: list[Module],
    family: Family,
    shape: ModelShape,
    tensors: Mapping[str, Tensor],
    *,
    write: Callable[[Parameter, Tensor], None] = copy_into,
) -> None:
    """Give `write` this rank's part of full, Hugging Face named tensors, for every parameter. No communication.

    Tensors are looked up one slot at a time, so `tensors` may read from disk. ValueError for a missing or wrong one.
    """
    parameters = local_parameters(chunks, family, shape)
    for slot in family.slots(shape):
        if slot.megatron not in parameters:
            continue  # another pipeline stage has it, or another rank the expert
        full = [_lookup(tensors, name, size) for name, size in slot.hf_shapes(shape).items()]
        part = slot.shard(full, shape, tp_size=parallel.tp_size(), tp_rank=parallel.tp_rank())
        for parameter in parameters[slot.megatron]:
            write(parameter, part)


def _lookup(tensors: Mapping[str, Tensor], name: str, size: tuple[int, ...]) -> Tensor:
    try:
        tensor = tensors[name]
    except KeyError:
        raise ValueError(f"tensor {name} {list(size)} is missing; pass every tensor of the model") from None
    if tuple(tensor.shape) != size or not tensor.is_floating_point():
        raise ValueError(
            f"tensor {name} must be floating point {list(size)}, got {tensor.dtype} {list(tensor.shape)}; use the "
            "unquantised weights of this model"
        )
    return tensor


@torch.no_grad()
def export_hf(
    chunks: list[Module],
    family: Family,
    shape: ModelShape,
    *,
    read: Callable[[Parameter], Tensor] = lambda parameter: parameter.data,
) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face names and full, unpadded tensors, on every rank, in the order of `family.slots`.

    Collective over tensor, pipeline and expert ranks: every rank must take every item. `read` picks what is exported and
    must return the parameter's shape and one dtype. Where no rank but this one is needed tensors are views of the parameters
    if the layout allows (all but query, key and value): use them before the next optimizer step and do not write to them.
    """
    parameters = local_parameters(chunks, family, shape)
    slots = family.slots(shape)
    dtype = read(next(iter(parameters.values()))[0]).dtype
    for slot, (stage, holder) in zip(slots, _owners(slots, parameters), strict=True):
        part, size = None, slot.shard_shape(shape, parallel.tp_size())
        if stage == parallel.pp_rank():
            part = read(parameters[slot.megatron][0]) if slot.megatron in parameters else None
            if slot.expert is not None:
                part = _from_rank(part, holder, parallel.ep_group(), size, dtype)
        part = _from_rank(part, stage, parallel.pp_group(), size, dtype)
        yield from zip(slot.hf, slot.join(_all_shards(part, slot), shape), strict=True)


def _owners(slots: list[Slot], parameters: Collection[str]) -> list[tuple[int, int]]:
    """The first pipeline stage that has each parameter (the last stage's tied copy of the embedding never wins), and the
    first expert-parallel rank that has it there."""
    ep, none = parallel.ep_size(), parallel.pp_size() * parallel.ep_size()
    if none == 1:
        return [(0, 0)] * len(slots)
    mine = parallel.pp_rank() * ep + parallel.ep_rank()
    first = torch.tensor([mine if slot.megatron in parameters else none for slot in slots]).to(parallel.device())
    for group in (parallel.pp_group(), parallel.ep_group()):
        dist.all_reduce(first, dist.ReduceOp.MIN, group=group)
    places = first.tolist()
    assert max(places) < none, [slot.megatron for slot, place in zip(slots, places, strict=True) if place == none]
    return [divmod(place, ep) for place in places]


def _from_rank(
    part: Tensor | None, owner: int, group: dist.ProcessGroup, size: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """The tensor of `group`'s rank `owner`, on all its ranks."""
    if dist.get_world_size(group) == 1:
        assert part is not None
        return part
    part = torch.empty(size, dtype=dtype, device=parallel.device()) if part is None else part.contiguous()
    assert part.dtype == dtype, (part.dtype, dtype)
    dist.broadcast(part, dist.get_global_rank(group, owner), group=group)
    return part


def _all_shards(part: Tensor, slot: Slot) -> list[Tensor]:
    if parallel.tp_size() == 1 or LAYOUTS[slot.kind].dim is None:
        return [part]
    shards = [torch.empty_like(part) for _ in range(parallel.tp_size())]
    dist.all_gather(shards, part.contiguous(), group=parallel.tp_group())
    return shards


def hf_plan(family: Family, shape: ModelShape, dtype: torch.dtype) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Name, dtype and shape of what `export_hf` yields, in its order."""
    return [(name, dtype, size) for slot in family.slots(shape) for name, size in slot.hf_shapes(shape).items()]


def write_hf_directory(
    directory: Path,
    tensors: Iterable[tuple[str, Tensor]],
    family: Family,
    shape: ModelShape,
    *,
    dtype: torch.dtype,
    source: str | Path | None = None,
) -> TensorWriter:
    """config.json, model.safetensors and `source`'s tokenizer files into an existing empty directory. One process.

    `tensors` is what `export_hf` yields, all of `dtype`. Returns the finished writer, for its digests.
    """
    write_hf_config(directory, family, shape, dtype=dtype, source=source)
    with TensorWriter(directory / SINGLE_FILE, hf_plan(family, shape, dtype)) as writer:
        for name, tensor in tensors:
            writer.write(name, tensor)
    return writer


def write_hf_config(
    directory: Path, family: Family, shape: ModelShape, *, dtype: torch.dtype, source: str | Path | None = None
) -> None:
    """config.json, and `source`'s tokenizer files: all of a Hugging Face directory but its weights."""
    config = family.write_config(shape, dtype=dtype)
    if source is not None:
        copy_tokenizer(Path(source), directory)
        given = read_json(Path(source) / CONFIG_FILE) if (Path(source) / CONFIG_FILE).exists() else {}
        config.update({name: given[name] for name in TOKEN_FIELDS if name in given})
    write_json(directory / CONFIG_FILE, config)


def save_hf(
    directory: str | Path,
    chunks: list[Module],
    family: Family,
    shape: ModelShape,
    *,
    source: str | Path | None = None,
) -> None:
    """Write the weights as a Hugging Face directory that appears whole or not at all. Collective over all ranks.

    Global rank 0 writes in the model's own dtype, with the tokenizer files of `source`. ValueError, on every rank, when
    `directory` exists already; an error while writing is raised on every rank too.
    """
    target = Path(directory)
    tensors = export_hf(chunks, family, shape)
    dtype = next(iter(named_parameters(chunks)))[1].dtype

    def write() -> None:
        if target.exists():
            raise ValueError(f"{target} exists already; choose another directory or remove it")
        with replaced_directory(target) as staging:
            write_hf_directory(staging, tensors, family, shape, dtype=dtype, source=source)

    on_rank_zero(write, drain=[tensors])


def on_rank_zero(work: Callable[[], None], *, drain: list[Iterator[object]]) -> None:
    """Run `work` on global rank 0 while the other ranks take part in its collectives; returns on all ranks together.

    `drain` are the collective iterators `work` consumes, in order: other ranks run through them, and so does rank 0
    with the rest when `work` fails, so that no rank waits for ever. The error is then raised on every rank.
    """
    steps: list[Callable[[], object]] = [work] if parallel.rank() == 0 else []
    steps += [partial(deque, iterator, 0) for iterator in drain]  # a deque of length 0 runs an iterator through
    error: Exception | None = None
    for step in steps:
        try:
            step()
        except Exception as caught:  # noqa: BLE001  raised below, when the other ranks are released
            error = error or caught
    messages = parallel.all_gather_bytes(str(error or "").encode())
    if error is not None:
        raise error
    for rank, message in enumerate(messages):
        if message:
            raise ValueError(f"rank {rank}: {message.decode()}")
