"""Builds a run's collaborators from its configuration, for training, evaluation and demonstration alike.

    run = assemble(config)                  # collective: joins the world, builds student, teacher, engine, ...
    episodes = run.collect(tasks, windows, step=0, curriculum_k=30)

Below this file nothing takes the whole configuration.
"""

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_tcod.config import Config, ObjectiveConfig, ParallelConfig, RolloutConfig
from megatron_tcod.curriculum import Curriculum, Schedule, make_curriculum
from megatron_tcod.envs import load_env
from megatron_tcod.envs.base import EnvironmentFamily
from megatron_tcod.envs.demonstrations import read_demonstrations
from megatron_tcod.model import parallel
from megatron_tcod.model.parallel import ParallelLayout
from megatron_tcod.model.pretrained import PretrainedStudent, load_teacher
from megatron_tcod.model.student import OptimizerSettings
from megatron_tcod.model.teacher import Teacher
from megatron_tcod.model.weight_files import read_json
from megatron_tcod.objective import make_objective
from megatron_tcod.packing import pack
from megatron_tcod.rollout.chat import TurnTokenizer
from megatron_tcod.rollout.embedded_engine import EmbeddedEngine
from megatron_tcod.rollout.engine import RolloutEngine
from megatron_tcod.rollout.episodes import Assignment, PlaySettings, collect_episodes
from megatron_tcod.rollout.supervised import demonstration_episode
from megatron_tcod.trajectory import Demonstration, Episode, Microbatch, Task, TurnWindow, decode, encode

EXPERT_DEMONSTRATIONS = "expert"


@dataclass(kw_only=True)
class Assembly:
    """The collaborators of one run. `teacher` is None and `engine` plays only evaluations for the sft objective."""

    config: Config
    tokenizer: TurnTokenizer
    family: type[EnvironmentFamily]
    demonstrations: dict[str, Demonstration]
    curriculum: Curriculum
    student: PretrainedStudent
    teacher: Teacher | None
    engine: RolloutEngine
    objective: Callable[..., Any]
    """Of training."""
    collect: Callable[..., list[Episode]]
    pack: Callable[[list[Episode]], list[Microbatch]]
    train_tasks: Sequence[Task]
    vocab_size: int
    """Ids that mean something to model and tokenizer: those that are sampled and compared."""

    def tasks_of(self, step: int) -> list[Task]:
        """The step's tasks: each epoch visits every training task once, in an order drawn from the seed."""
        batch, seed = self.config.rollout.rollout_batch_size, self.config.training.seed
        return [self.train_tasks[index] for index in batch_indices(step, batch, len(self.train_tasks), seed)]

    def demonstrations_of(self, step: int) -> list[Episode]:
        """The step's recorded turns as rows to imitate: from the file, or played by the environment's expert now."""
        curriculum = self.config.curriculum
        if curriculum.demonstrations != EXPERT_DEMONSTRATIONS:
            chosen = [self.demonstrations[task.task_id] for task in self.tasks_of(step)]
        else:
            tasks, seed = self.tasks_of(step), self.config.training.seed
            first = (seed << 40) + step * len(tasks)
            chosen = [
                self.family.expert(
                    task, seed=first + index, mistake_rate=curriculum.mistake_rate, **self.config.environment.env_options
                )
                for index, task in enumerate(tasks)
            ]
        max_turns = self.config.rollout.max_turns
        return [demonstration_episode(one, self.tokenizer, step=step, max_turns=max_turns) for one in chosen]

    def objective_named(self, settings: ObjectiveConfig) -> Callable[..., Any]:
        """An objective over the same vocabulary and at the same temperatures."""
        return objective_of(
            settings, temperature=self.config.rollout.rollout_temperature, vocab_size=self.vocab_size
        )

    def play_in_full(
        self, tasks: Sequence[Task], *, temperature: float, seed: int, num_samples: int = 1
    ) -> list[Episode]:
        """The student plays whole episodes, whatever the curriculum, with other sampling than in training. Seeds do not
        depend on the step, so that two plays are paired. Collective."""
        settings = play_settings(self.config.rollout, temperature=temperature, seed=seed)
        collect = make_collect(
            family=self.family,
            engine=self.engine,
            tokenizer=self.tokenizer,
            demonstrations={},
            settings=settings,
            num_samples=num_samples,
            env_options=self.config.environment.env_options,
        )
        horizon = TurnWindow(0, settings.max_turns)
        return collect(tasks, [horizon] * len(tasks), step=0, curriculum_k=settings.max_turns)

    def publish_weights(self, version: int) -> None:
        """Hand the student's weights to the engine. Collective."""
        self.engine.load_weights(self.student.hf_weights(), version=version)


def batch_indices(step: int, batch: int, num_tasks: int, seed: int) -> list[int]:
    """Indices of a step's tasks; a pure function, so that a resumed run sees the same order."""
    indices = []
    for position in range(step * batch, (step + 1) * batch):
        epoch, at = divmod(position, num_tasks)
        indices.append(epoch_order(num_tasks, seed, epoch)[at])
    return indices


@functools.lru_cache(maxsize=2)
def epoch_order(num_tasks: int, seed: int, epoch: int) -> list[int]:
    order = list(range(num_tasks))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def layout_of(config: ParallelConfig) -> ParallelLayout:
    return ParallelLayout(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline_model_parallel_size,
        context_parallel_size=config.context_parallel_size,
    )


def tokenizer_of(config: Config, directory: str) -> TurnTokenizer:
    model = config.model
    return TurnTokenizer.from_directory(
        directory, chat_template=model.chat_template, system_prompt=model.system_prompt
    )


def play_settings(config: RolloutConfig, *, temperature: float, seed: int) -> PlaySettings:
    return PlaySettings(
        max_turns=config.max_turns,
        max_new_tokens=config.rollout_max_response_len,
        max_context=config.rollout_max_context_len,
        temperature=temperature,
        top_p=config.rollout_top_p,
        seed=seed,
        history_mode=config.history_mode,
        compact_turns=config.history_length,
        action_format=config.action_format,
    )


def load_demonstrations(config: Config) -> dict[str, Demonstration]:
    """Demonstrations by task id, successes only; empty where the run replays and imitates none."""
    if not needs_file(config):
        return {}
    root = config.environment.env_options.get("root")
    if root is not None and not isinstance(root, str):
        raise ValueError(f"env_options root = {root!r} must be the directory of the games, as text")
    found = read_demonstrations(config.curriculum.demonstrations, config.environment.env, root=root)
    return {one.task.task_id: one for one in found if one.success}


def curriculum_of(config: Config, demonstrations: Mapping[str, Demonstration]) -> Curriculum:
    settings = config.curriculum
    return make_curriculum(
        settings.curriculum,
        schedule=Schedule(
            k_start=settings.k_start, eta=settings.eta, k_max=settings.k_max, step_origin=settings.step_origin
        ),
        max_turns=config.rollout.max_turns,
        lengths={task_id: len(one.turns) for task_id, one in demonstrations.items()},
        stop=settings.b2f_stop,
        missing=settings.missing_demonstration,
    )


def train_tasks(
    config: Config, family: type[EnvironmentFamily], demonstrations: Mapping[str, Demonstration]
) -> Sequence[Task]:
    """Training tasks in their fixed order: the split's, or for sft on a file those that were demonstrated."""
    if config.objective.objective == "sft" and needs_file(config):
        return [demonstrations[task_id].task for task_id in sorted(demonstrations)]
    environment = config.environment
    return family.tasks(environment.train_split, count=environment.train_tasks, **environment.env_options)


def objective_of(settings: ObjectiveConfig, *, temperature: float, vocab_size: int) -> Callable[..., Any]:
    chosen: dict[str, Any] = {"vocab_size": vocab_size, "backend": settings.divergence_backend}
    if settings.objective != "sft":
        chosen |= {
            "student_temperature": temperature,
            "teacher_temperature": settings.teacher_temperature,
            "is_packed": settings.divergence_packed,
        }
    if settings.objective == "jsd":
        chosen["beta"] = settings.beta
    if settings.objective == "sampled_token":
        chosen |= {name: getattr(settings, name) for name in ("kl_coef", "eps_clip", "eps_clip_high", "eps_clip_c")}
    return make_objective(settings.objective, **chosen)


def make_collect(
    *,
    family: type[EnvironmentFamily],
    engine: RolloutEngine,
    tokenizer: TurnTokenizer,
    demonstrations: Mapping[str, Demonstration],
    settings: PlaySettings,
    num_samples: int,
    env_options: dict[str, Any],
) -> Callable[..., list[Episode]]:
    """A `tcod.Collect` that deals the tasks over all ranks and gathers the episodes, in task order, on every one.

    All samples of a task stay on one rank, which computes their shared prompt once.
    """

    def collect(
        tasks: Sequence[Task], windows: Sequence[TurnWindow], *, step: int, curriculum_k: int
    ) -> list[Episode]:
        rank, world = parallel.rank(), parallel.world_size()
        earlier = [tasks[:index].count(task) for index, task in enumerate(tasks)]  # a batch may hold a task twice
        mine = [
            Assignment(
                task=task,
                window=window,
                sample=before * num_samples + sample,
                demonstration=demonstrations.get(task.task_id),
                curriculum_k=curriculum_k,
            )
            for task, window, before in zip(tasks[rank::world], windows[rank::world], earlier[rank::world], strict=True)
            for sample in range(num_samples)
        ]
        played = asyncio.run(
            collect_episodes(
                family, mine, engine=engine, tokenizer=tokenizer, settings=settings, step=step,
                env_options=env_options,
            )
        )
        parts = [decode(part, list[Episode]) for part in parallel.all_gather_bytes(encode(played))]
        episodes = []
        for index in range(len(tasks)):
            first = index // world * num_samples
            episodes += parts[index % world][first : first + num_samples]
        return episodes

    return collect


def embedded_engine(config: Config, student: PretrainedStudent, vocab_size: int) -> EmbeddedEngine:
    return EmbeddedEngine(
        read_json(student.directory / "config.json"),
        max_running=config.rollout.max_running_requests,
        max_total_tokens=config.rollout.max_total_tokens,
        max_context=config.rollout.rollout_max_context_len,
        vocab_size=vocab_size,
    )


def assemble(config: Config) -> Assembly:
    """Join the world and build everything. Collective over all ranks; `preflight` has found the user's mistakes."""
    training, layout = config.training, layout_of(config.parallel)
    parallel.initialize(layout, seed=training.seed)
    tokenizer = tokenizer_of(config, config.model.student)
    family = load_env(config.environment.env)
    demonstrations = load_demonstrations(config)
    student = PretrainedStudent(
        config.model.student, layout, optimizer_settings(config), init=config.model.init, seed=training.seed
    )
    needs_teacher = config.objective.objective != "sft"
    teacher = load_teacher(config.model.teacher, layout, student=student.shape) if needs_teacher else None
    vocab_size = min(tokenizer.vocab_size, student.shape.vocab_size)  # a model may have more rows than tokens
    engine = embedded_engine(config, student, vocab_size)
    settings = play_settings(config.rollout, temperature=config.rollout.rollout_temperature, seed=training.seed)
    return Assembly(
        config=config,
        tokenizer=tokenizer,
        family=family,
        demonstrations=demonstrations,
        curriculum=curriculum_of(config, demonstrations),
        student=student,
        teacher=teacher,
        engine=engine,
        objective=objective_of(
            config.objective,
            temperature=config.rollout.rollout_temperature,
            vocab_size=vocab_size,
        ),
        collect=make_collect(
            family=family,
            engine=engine,
            tokenizer=tokenizer,
            demonstrations=demonstrations,
            settings=settings,
            num_samples=config.rollout.n_samples_per_prompt,
            env_options=config.environment.env_options,
        ),
        pack=make_pack(config),
        train_tasks=train_tasks(config, family, demonstrations),
        vocab_size=vocab_size,
    )


def needs_file(config: Config) -> bool:
    """Whether demonstrations come from a file."""
    return config.curriculum.demonstrations not in ("", EXPERT_DEMONSTRATIONS)


def make_pack(config: Config) -> Callable[[list[Episode]], list[Microbatch]]:
    def pack_share(episodes: list[Episode]) -> list[Microbatch]:
        return pack(
            episodes,
            max_tokens=config.training.max_tokens_per_microbatch,
            aggregation=config.objective.loss_aggregation,
            dp_rank=parallel.dp_rank(),
            dp_size=parallel.dp_size(),
            device=parallel.device(),
        )

    return pack_share


def optimizer_settings(config: Config) -> OptimizerSettings:
    training = config.training
    return OptimizerSettings(
        lr=training.lr,
        min_lr=training.min_lr,
        lr_decay_style=training.lr_decay_style,
        lr_decay_iters=training.train_iters,
        lr_warmup_iters=training.lr_warmup_iters,
        weight_decay=training.weight_decay,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        adam_eps=training.adam_eps,
        clip_grad=training.clip_grad,
    )
