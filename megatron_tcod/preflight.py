"""Checks everything about a run that can be checked before any process group, model or server starts.

    lines = preflight(config, world_size=2)             # Faults, a message each: the field, what was expected, the fix
    found = examine(Findings(), config, world_size=2)   # found.lines and found.faults instead

Launch scripts call it through `python -m megatron_tcod.train --dry-run`, so that a mistake costs seconds and one message
instead of a traceback per rank. It reads configurations, tokenizers and demonstrations, and no weights.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from megatron_tcod import serving
from megatron_tcod.assembly import (
    curriculum_of,
    dtype_of,
    layout_of,
    load_demonstrations,
    needs_file,
    recompute_of,
    teacher_layout_of,
    tokenizer_of,
    train_tasks,
)
from megatron_tcod.config import SGLANG, Config, Faults
from megatron_tcod.envs import check_env_options, load_env
from megatron_tcod.envs.base import EnvironmentFamily
from megatron_tcod.envs.demonstrations import Demonstration
from megatron_tcod.journal import read_journal
from megatron_tcod.model import accelerators
from megatron_tcod.model.build import check_layout, check_recompute
from megatron_tcod.model.experts import check_trainable
from megatron_tcod.model.families.family import Family
from megatron_tcod.model.mapping import check_tensors, read_hf_config
from megatron_tcod.model.parallel import ParallelLayout, check_world_size
from megatron_tcod.model.shape import ModelShape
from megatron_tcod.model.sharded_files import open_weights
from megatron_tcod.model.weight_files import MANIFEST_FILE, verify_manifest
from megatron_tcod.ops import backends
from megatron_tcod.rollout.chat import TurnTokenizer, check_same_tokenizer
from megatron_tcod.trajectory import Task

Found = TypeVar("Found")


@dataclass
class Findings:
    """What checks have said so far. Every one that can be made is, whatever the ones before found."""

    lines: list[str] = field(default_factory=list)
    """What is as it should be."""
    faults: list[str] = field(default_factory=list)
    """One message each: the field, what was expected, the fix."""

    def add(self, check: Callable[..., Found], *args: Any, about: str = "", **options: Any) -> Found | None:
        """What the check returns; None where it finds a fault. `about` names the setting, where the check knows none."""
        try:
            return check(*args, **options)
        except (ValueError, OSError) as error:
            self.tell(f"{about}: {fault}" if about else fault for fault in Faults.of(error))
        return None

    def tell(self, faults: Iterable[str]) -> None:
        """Add messages, each once."""
        self.faults += [fault for fault in dict.fromkeys(faults) if fault not in self.faults]

    def require(self) -> list[str]:
        """The lines; `Faults` where there are any."""
        if self.faults:
            raise Faults(self.faults)
        return self.lines


def preflight(config: Config, *, world_size: int | None, player: str = "student") -> list[str]:
    """What the run consists of, a line each. `world_size` None skips the checks that need it; `player` is the setting that
    names the model which plays, where that is not the student's."""
    return examine(Findings(), config, world_size=world_size, player=player).require()


def examine_training(found: Findings, config: Config, *, world_size: int | None) -> Findings:
    """`examine`, and what only training asks for."""
    examine(found, config, world_size=world_size)
    found.tell(training_faults(config))
    found.add(check_run_directory, config)
    return found


def examine(found: Findings, config: Config, *, world_size: int | None, player: str = "student") -> Findings:
    """Add everything that `preflight` checks, with all faults."""
    own, teacher_layout = found.add(layout_of, config.parallel), found.add(teacher_layout_of, config.parallel)
    layout = own or ParallelLayout()  # models are read against some layout, where this one contradicts itself
    dp = found.add(check_world_size, own, world_size) if own and world_size is not None else None
    found.add(accelerators.choose, config.model.transformer_impl, accelerators.find())
    tokenizer = examine_player(found, config, layout, player)
    found.lines += found.add(serving.check_servers, config, dp_size=dp) or []
    if serving.is_teacher_served(config):
        examine_served_teacher(found, config, tokenizer)
    elif config.objective.objective == "sft":
        found.add(check_no_local_teacher, config, "objective = sft has none; leave it unset")
    else:
        if teacher_layout is not None and world_size is not None:
            found.add(check_teacher_world_size, teacher_layout, world_size)
        whole_stages = dataclasses.replace(layout, virtual_pipeline_model_parallel_size=None)
        examine_teacher(found, config, teacher_layout or whole_stages, tokenizer)
    examine_tasks(found, config)
    cp = f"cp {layout.context_parallel_size}, " if layout.context_parallel_size > 1 else ""
    found.lines.append(f"layout: {spread(layout)}, {cp}dp {'as launched' if dp is None else dp}{experts_over(layout)}")
    if teacher_layout is not None:
        found.lines.append(f"teacher's layout: {spread(teacher_layout)}{experts_over(teacher_layout)}")
    if config.parallel.teacher_offload:
        cost = "" if torch.cuda.is_available() else "; without CUDA they are there anyway and nothing is copied"
        found.lines.append(f"teacher's weights: in host memory but while it scores{cost}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = found.add(backends.choose, config.objective.divergence_backend, device=device, dtype=dtype_of(config))
    if backend is not None:
        found.lines.append(f"divergence: {backend.name} on {device}")
    return found


def examine_player(found: Findings, config: Config, layout: ParallelLayout, role: str) -> TurnTokenizer | None:
    """The directory of the model that plays, and is trained if any is, against the layout; its tokenizer."""
    recompute = found.add(recompute_of, config.parallel)
    model = found.add(read_model, role, config.model.student)
    if model is None:
        return None
    family, shape = model
    found.lines.append(f"{role} {family.model_type}: {describe(shape)}")
    if config.model.init == "load":
        found.add(check_weights, config.model.student, family, shape)
    found.add(check_layout, shape, layout, whose=f"the {role}'s")
    found.add(check_trainable, shape, layout)
    if recompute is not None:
        found.add(check_recompute, shape, layout, recompute)
    found.tell(context_faults(role, config, shape))
    tokenizer = found.add(tokenizer_of, config, config.model.student)
    if tokenizer is not None:
        found.add(check_vocabulary, role, shape, tokenizer)
    return tokenizer


def examine_served_teacher(found: Findings, config: Config, tokenizer: TurnTokenizer | None) -> None:
    found.add(check_served_teacher, config)
    directory = config.sglang.teacher_model
    if tokenizer is None or (directory and not (Path(directory) / "config.json").is_file()):  # as serving's check says
        return
    found.add(serving.check_teacher_model, config, tokenizer)
    if directory:
        own = found.add(tokenizer_of, config, directory)
        if own is not None:
            found.add(check_same_tokenizer, tokenizer, own)


def examine_teacher(
    found: Findings, config: Config, layout: ParallelLayout, tokenizer: TurnTokenizer | None
) -> None:
    """The directory of a teacher in these processes against its layout and the student's tokenizer."""
    model = found.add(read_model, "teacher", config.model.teacher)
    if model is None:
        return
    family, shape = model
    found.lines.append(f"teacher {family.model_type}: {describe(shape)}")
    found.add(check_weights, config.model.teacher, family, shape)
    found.tell(context_faults("teacher", config, shape))
    found.add(check_layout, shape, layout, whose="the teacher's")
    found.add(check_teacher_experts, config, shape)
    own = found.add(tokenizer_of, config, config.model.teacher)
    if own is None:
        return
    found.add(check_vocabulary, "teacher", shape, own)
    if tokenizer is not None:
        found.add(check_same_tokenizer, tokenizer, own)


def examine_tasks(found: Findings, config: Config) -> None:
    """Environment, demonstrations, tasks and the curriculum over them."""
    environment = found.add(load_usable_env, config)
    if environment is None:
        if needs_file(config) and not Path(config.curriculum.demonstrations).exists():
            found.add(read_demonstrations_of, config)  # without its environment a file cannot be read; that it is there can
        return
    demonstrations = found.add(read_demonstrations_of, config)
    split, count = config.evaluation.eval_split, config.evaluation.eval_tasks
    evaluated = found.add(
        partial(environment.tasks, split, count=count, **config.environment.env_options), about=f"eval_split = {split}"
    )
    if demonstrations is None:
        return
    where = f"train_split = {config.environment.train_split}"
    trained = found.add(train_tasks, config, environment, demonstrations, about=where)
    if trained is not None and evaluated is not None:
        counts = f"{len(trained)} to train on, {len(evaluated)} to evaluate on, {len(demonstrations)} demonstrations"
        found.lines.append(f"tasks: {counts}")
    curriculum = found.add(curriculum_of, config, demonstrations)
    if curriculum is not None:
        depths = [curriculum.depth(step) for step in (0, max(config.training.train_iters - 1, 0))]
        found.lines.append(f"curriculum {config.curriculum.curriculum}: k {depths[0]} -> {depths[1]}")
        if trained is not None and curriculum.needs_demonstrations:
            found.lines += found.add(check_coverage, config, trained, demonstrations) or []


def check_coverage(config: Config, tasks: Sequence[Task], demonstrations: Mapping[str, Demonstration]) -> list[str]:
    """How many training tasks a curriculum that replays can replay; ValueError for none where the others are left out."""
    num_known = sum(task.task_id in demonstrations for task in tasks)
    if not num_known and config.curriculum.missing_demonstration == "outcome":
        environment = config.environment
        raise ValueError(
            f"demonstrations = {config.curriculum.demonstrations}: none of the {len(tasks)} training tasks (env "
            f"{environment.env}, train_split {environment.train_split}) is in it, e.g. not {tasks[0].task_id}; give the file "
            f"that was recorded from them, or set missing_demonstration = full"
        )
    return [f"replays: {num_known} of {len(tasks)} training tasks have a demonstration"]


def load_usable_env(config: Config) -> type[EnvironmentFamily]:
    environment = load_env(config.environment.env)
    environment.require()
    check_env_options(config.environment.env, config.environment.env_options)
    return environment


def read_demonstrations_of(config: Config) -> Mapping[str, Demonstration]:
    demonstrations = load_demonstrations(config)
    if needs_file(config) and not demonstrations:
        raise ValueError(
            f"demonstrations = {config.curriculum.demonstrations}: the file holds no successful demonstration; "
            f"collect some with python -m megatron_tcod.demonstrate"
        )
    return demonstrations


def training_faults(config: Config) -> Iterator[str]:
    """What only training asks of the settings."""
    training, objective = config.training, config.objective
    if objective.objective == "sft" and config.rollout.history_mode == "compact":
        yield "history_mode = compact is not supported by objective = sft; use history_mode = full"
    if training.lr_decay_style != "constant" and training.lr_warmup_iters >= training.train_iters > 0:
        yield (
            f"lr_warmup_iters = {training.lr_warmup_iters} leaves no step to decay in train_iters = "
            f"{training.train_iters}; lower lr_warmup_iters"
        )
    if training.tensorboard_dir and importlib.util.find_spec("tensorboard") is None:
        yield "tensorboard_dir is set but tensorboard is not installed; pip install '.[tensorboard]'"


def read_model(role: str, directory: str) -> tuple[Family, ModelShape]:
    if not directory:
        raise ValueError(f"{role} is empty; give --{role} a Hugging Face directory with config.json and tokenizer.json")
    if not Path(directory).is_dir():
        raise ValueError(f"{role} = {directory}: no such directory; give --{role} a local Hugging Face directory")
    return read_hf_config(directory)


def describe(shape: ModelShape) -> str:
    return (
        f"{shape.num_layers} layers, hidden {shape.hidden_size}, {shape.num_attention_heads} heads, "
        f"vocabulary {shape.vocab_size}"
    )


def spread(layout: ParallelLayout) -> str:
    return f"tp {layout.tensor_model_parallel_size}, pp {layout.pipeline_model_parallel_size}"


def experts_over(layout: ParallelLayout) -> str:
    ep = layout.expert_model_parallel_size
    return f", experts over {ep} of the ranks with the same weights" if ep > 1 else ""


def check_teacher_world_size(layout: ParallelLayout, world_size: int) -> None:
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    if world_size % layout.model_parallel_size:
        raise ValueError(
            f"teacher_tensor_model_parallel_size {tp} x teacher_pipeline_model_parallel_size {pp} does not divide the "
            f"world of {world_size} ranks that it shares with the student; change one of them or start other ranks"
        )
    ep, dp = layout.expert_model_parallel_size, world_size // layout.model_parallel_size
    if dp % ep:
        raise ValueError(
            f"teacher_expert_model_parallel_size {ep} (the student's where unset) does not divide the {dp} replicas of the "
            f"teacher in a world of {world_size} ranks (tp {tp}, pp {pp}); choose a divisor, 1 for a teacher without experts"
        )


def check_teacher_experts(config: Config, teacher: ModelShape) -> None:
    ep = config.parallel.teacher_expert_model_parallel_size or 1
    if ep > 1 and teacher.experts is None:
        raise ValueError(
            f"teacher_expert_model_parallel_size {ep} shares out experts and the teacher has none; set it to 1"
        )


def check_no_local_teacher(config: Config, why: str) -> None:
    """ValueError for settings of a teacher in these processes, where there is none."""
    kinds = ("tensor", "pipeline", "expert")
    for name in (*(f"teacher_{kind}_model_parallel_size" for kind in kinds), "teacher_offload"):
        if getattr(config.parallel, name):
            told = f"{name} = {getattr(config.parallel, name)} is about a teacher in these processes"
            raise ValueError(f"{told}, but {why}")


def check_served_teacher(config: Config) -> None:
    """A server knows nothing of a teacher's layout, and scores whole rows."""
    check_no_local_teacher(config, f"teacher = {SGLANG}; leave it unset and pass the server's own flags")
    if config.parallel.context_parallel_size > 1:
        raise ValueError(
            f"context_parallel_size = {config.parallel.context_parallel_size} is not supported with teacher = {SGLANG}; "
            f"set it to 1, or --teacher to a directory"
        )


def check_vocabulary(role: str, shape: ModelShape, tokenizer: TurnTokenizer) -> None:
    if tokenizer.vocab_size > shape.vocab_size:
        raise ValueError(
            f"{role} vocab_size = {shape.vocab_size} is smaller than its tokenizer's {tokenizer.vocab_size} ids; "
            f"resize the embeddings or use the tokenizer that belongs to the model"
        )


def check_weights(directory: str, family: Family, shape: ModelShape) -> None:
    """Headers and sizes only: every tensor is there and has the shape that config.json says, every file its length."""
    if (Path(directory) / MANIFEST_FILE).is_file():
        verify_manifest(Path(directory), is_hashed=False)
    with open_weights(directory, family, shape) as files:
        check_tensors(files, family, shape)


def context_faults(role: str, config: Config, shape: ModelShape) -> Iterator[str]:
    context = config.rollout.rollout_max_context_len
    if context > shape.max_position_embeddings:
        yield (
            f"rollout_max_context_len = {context} exceeds the {role}'s max_position_embeddings = "
            f"{shape.max_position_embeddings}; lower rollout_max_context_len"
        )
    if config.rollout.rollout_engine != SGLANG and config.rollout.max_total_tokens < context:
        yield (
            f"max_total_tokens = {config.rollout.max_total_tokens} cannot hold one episode of rollout_max_context_len = "
            f"{context}; raise max_total_tokens"
        )
    if config.rollout.rollout_max_response_len >= context:
        yield (
            f"rollout_max_response_len = {config.rollout.rollout_max_response_len} leaves no room for a prompt in "
            f"rollout_max_context_len = {context}; lower it"
        )


def check_writable(setting: str, path: str) -> Path:
    """The directory of a setting, or the nearest one above that is there; ValueError where nothing can be written to it."""
    if not path:
        raise ValueError(f"{setting} is empty; give a directory")
    directory = Path(path).absolute()
    while not directory.is_dir():
        if directory.exists() or directory.is_symlink():
            raise ValueError(f"{setting} = {path}: {directory} is there and is no directory; choose another path")
        directory = directory.parent
    if not os.access(directory, os.W_OK | os.X_OK) or os.statvfs(directory).f_flag & os.ST_RDONLY:
        raise ValueError(f"{setting} = {path}: {directory} cannot be written; choose another or change its owner")
    if directory.is_relative_to("/proc") or directory.is_relative_to("/sys"):
        raise ValueError(f"{setting} = {path}: {directory} keeps no files; choose another path")
    return directory


def check_checkpoints_are_there(config: Config) -> None:
    """ValueError for records of steps whose checkpoints are gone: a run that began anew would cut the records off."""
    save, interval = Path(config.training.save), config.training.save_interval
    if not (save / "metrics.jsonl").is_file() or any((save / "checkpoints").glob("step_*")):
        return
    steps = max((one.get("step", 0) for one in read_journal(save / "metrics.jsonl").records), default=0)
    if steps > 2 * interval:  # the first may have been in the making until the second, in the background
        raise ValueError(
            f"save = {save} has records of {steps} steps and no checkpoint, although one was due every {interval}: put its "
            f"checkpoints back, or choose another path"
        )


def check_run_directory(config: Config) -> None:
    """What is wrong with `save`, found before the ranks load anything. A checkpoint of another model is; damaged ones are
    left to the resume, which falls back to an intact one."""
    check_writable("save", config.training.save)
    for name in ("checkpoints", "evaluation"):
        if (path := Path(config.training.save) / name).exists() and not path.is_dir():
            raise ValueError(f"save = {config.training.save}: {path} is no directory; remove it, or choose another path")
    check_checkpoints_are_there(config)
    shape = dataclasses.asdict(read_model("student", config.model.student)[1])
    states = sorted((Path(config.training.save) / "checkpoints").glob("step_*/state.json"))
    for path in states[-1:]:
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))["shape"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
            continue
        if not isinstance(saved, dict):
            continue
        odd = [name for name, value in saved.items() if shape.get(name, value) != value]
        if odd:
            told = ", ".join(f"{name} is {saved[name]} there and {shape[name]} in the student" for name in odd)
            raise ValueError(
                f"save = {config.training.save} holds a checkpoint of another model: {told}; "
                f"give --save an empty directory or --student the model it was made with"
            )
