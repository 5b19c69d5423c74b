"""Builds a run's collaborators from its configuration, for training, evaluation and demonstration alike.

    run = assemble(config)                  # collective: joins the world, builds student, teacher, engine, ...
    episodes = run.collect(tasks, windows, step=0, curriculum_k=30)

Below this file nothing takes the whole configuration.
"""

from __future__ import annotations

import asyncio
import functools
import math
import random
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from megatron_tcod import serving
from megatron_tcod.config import SGLANG, Config, EnvironmentConfig, ObjectiveConfig, ParallelConfig, RolloutConfig
from megatron_tcod.curriculum import Curriculum, Schedule, make_curriculum
from megatron_tcod.envs import load_env
from megatron_tcod.envs.base import EnvironmentFamily
from megatron_tcod.envs.demonstrations import read_demonstrations
from megatron_tcod.model import parallel
from megatron_tcod.model.build import Recompute
from megatron_tcod.model.parallel import ParallelLayout
from megatron_tcod.model.pretrained import PretrainedStudent, load_teacher
from megatron_tcod.model.segments import cost_of_pair
from megatron_tcod.model.shape import ModelShape
from megatron_tcod.model.student import OptimizerSettings
from megatron_tcod.model.teacher import Teacher
from megatron_tcod.model.weight_files import read_json
from megatron_tcod.objective import make_objective
from megatron_tcod.packing import pack
from megatron_tcod.rollout.ahead import CollectAhead, play_unless
from megatron_tcod.rollout.chat import TurnTokenizer
from megatron_tcod.rollout.embedded_engine import EmbeddedEngine
from megatron_tcod.rollout.engine import RolloutEngine
from megatron_tcod.rollout.episodes import Assignment, PlaySettings, collect_episodes
from megatron_tcod.rollout.outcomes import check_outcomes
from megatron_tcod.rollout.prefix import PrefixReuse, step_prefixes
from megatron_tcod.rollout.supervised import demonstration_episode
from megatron_tcod.stop_signals import StopSignals
from megatron_tcod.trajectory import Demonstration, Episode, Microbatch, Task, TurnWindow, decode, encode

if TYPE_CHECKING:
    from megatron_tcod.rollout.teacher_server import ServerTeacher

EXPERT_DEMONSTRATIONS = "expert"

Play = Callable[..., Coroutine[Any, Any, list[Episode]]]
"""`play(tasks, windows, step=, curriculum_k=)`: this rank's share of the episodes. Not collective."""


@dataclass(kw_only=True)
class Player:
    """What plays episodes: an engine and whose conversations it continues. Close it to stop the servers it launched."""

    config: Config
    tokenizer: TurnTokenizer
    family: type[EnvironmentFamily]
    engine: RolloutEngine
    players: list[int]
    """Ranks that play episodes."""
    stop: StopSignals | None = None
    """Whose signal ends what is being played."""
    closing: ExitStack = field(default_factory=ExitStack)
    """What to end, last things first."""

    def close(self) -> None:
        """End what plays ahead, connections and launched servers. Not collective."""
        self.closing.close()

    def play_in_full(
        self, tasks: Sequence[Task], *, temperature: float, seed: int, num_samples: int = 1
    ) -> list[Episode]:
        """Plays whole episodes, whatever the curriculum, with other sampling than in training. Seeds do not
        depend on the step, so that two plays are paired. Collective."""
        settings = play_settings(self.config, temperature=temperature, seed=seed)
        play = make_play(
            family=self.family,
            engine=self.engine,
            tokenizer=self.tokenizer,
            demonstrations={},
            settings=settings,
            num_samples=num_samples,
            environment=self.config.environment,
            players=self.players,
        )
        horizon = TurnWindow(0, settings.max_turns)
        whole = play(tasks, [horizon] * len(tasks), step=0, curriculum_k=settings.max_turns)
        own = asyncio.run(play_unless(whole, self.is_stopping))
        return self.gather(own, num_tasks=len(tasks), num_samples=num_samples)

    def is_stopping(self) -> bool:
        """Whether this rank is to give up what it plays."""
        return self.stop is not None and self.stop.is_received

    def gather(self, own: list[Episode] | None, *, num_tasks: int, num_samples: int) -> list[Episode]:
        """The episodes of all players, in task order, on every rank; `Stopped` on all where one rank was told to stop.
        Collective."""
        if self.stop is not None:
            self.stop.check()
        return gather_episodes(own or [], num_tasks=num_tasks, num_samples=num_samples, players=self.players)


@dataclass(kw_only=True)
class Assembly(Player):
    """The collaborators of one run. `teacher` is None and `engine` plays only evaluations for the sft objective."""

    demonstrations: dict[str, Demonstration]
    curriculum: Curriculum
    student: PretrainedStudent
    teacher: Teacher | ServerTeacher | None
    objective: Callable[..., Any]
    """Of training."""
    play: Play
    """This rank's share of a step's episodes, in their windows."""
    ahead: CollectAhead[list[Episode]] | None
    """Who plays them before they are asked for, with staleness."""
    pack: Callable[[list[Episode]], list[Microbatch]]
    train_tasks: Sequence[Task]
    vocab_size: int
    """Ids that mean something to model and tokenizer: those that are sampled and compared."""

    def tasks_of(self, step: int) -> list[Task]:
        """The step's tasks: each epoch visits every training task once, in an order drawn from the seed."""
        return tasks_of_step(self.config, self.train_tasks, step)

    def collect(
        self, tasks: Sequence[Task], windows: Sequence[TurnWindow], *, step: int, curriculum_k: int
    ) -> list[Episode]:
        """A `tcod.Collect`: plays, or hands out what was played ahead."""
        if self.ahead is not None:
            own = self.ahead.take(step, is_stopping=self.is_stopping)
        else:
            windowed = self.play(tasks, windows, step=step, curriculum_k=curriculum_k)
            own = asyncio.run(play_unless(windowed, self.is_stopping))
        episodes = self.gather(own, num_tasks=len(tasks), num_samples=self.config.rollout.n_samples_per_prompt)
        environment = self.config.environment
        check_outcomes(episodes, max_diverged=environment.max_diverged, max_env_faults=environment.max_env_faults)
        return episodes

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
        return objective_of(settings, self.config.rollout, vocab_size=self.vocab_size)

    def publish_weights(self, version: int) -> None:
        """Hand the student's weights to the engine unless it has them. Collective."""
        if self.engine.version != version:
            self.engine.load_weights(self.student.hf_weights(), version=version)

    def take_prefix_counts(self) -> dict[str, int]:
        """This rank's share of `metrics.PREFIX_COUNTS` since the last call."""
        counts = prefix_counts("prefix", self.engine.take_prefix_reuse())
        if serving.is_teacher_served(self.config):
            scored = self.teacher.take_counts()
            counts |= prefix_counts("teacher_prefix", self.teacher.take_prefix_reuse())
            counts |= {"teacher_prefix/scored": scored.tokens, "teacher_prefix/computed": scored.computed}
        return counts

    def warm_teacher(self, step: int) -> None:
        """Have a teacher's server compute, in the background, the replayed prefixes that `step` will score."""
        if not serving.is_teacher_served(self.config) or step >= self.config.training.train_iters:
            return
        rollout = self.config.rollout
        prefixes = step_prefixes(
            step,
            self.tasks_of(step),
            curriculum=self.curriculum,
            demonstrations=self.demonstrations,
            tokenizer=self.tokenizer,
            history_mode=rollout.history_mode,
            compact_turns=rollout.history_length,
        )
        self.teacher.warm_ahead(prefixes[parallel.dp_rank() :: parallel.dp_size()])


def prefix_counts(who: str, reuse: PrefixReuse) -> dict[str, int]:
    return {
        f"{who}/reusable": reuse.reusable_tokens,
        f"{who}/reused": reuse.reused_tokens,
        f"{who}/recomputed": reuse.recomputed_tokens,
        f"{who}/warmed": reuse.warmed_tokens,
    }


def tasks_of_step(config: Config, train_tasks: Sequence[Task], step: int) -> list[Task]:
    batch, seed = config.rollout.rollout_batch_size, config.training.seed
    return [train_tasks[index] for index in batch_indices(step, batch, len(train_tasks), seed)]


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
        expert_model_parallel_size=config.expert_model_parallel_size,
        sequence_parallel=config.sequence_parallel,
    )


def teacher_layout_of(config: ParallelConfig) -> ParallelLayout | None:
    """The teacher's own layout, or None where it is cut like the student."""
    kinds = ("tensor", "pipeline", "expert")
    student = [getattr(config, f"{kind}_model_parallel_size") for kind in kinds]
    own = [getattr(config, f"teacher_{kind}_model_parallel_size") for kind in kinds]
    tp, pp, ep = [size or default for size, default in zip(own, student, strict=True)]
    if [tp, pp, ep] == student:
        return None
    return ParallelLayout(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
        sequence_parallel=config.sequence_parallel and tp > 1,
    )


def recompute_of(config: ParallelConfig) -> Recompute:
    return Recompute(
        granularity=config.recompute_granularity,
        method=config.recompute_method,
        num_layers=config.recompute_num_layers,
    )


def dtype_of(config: Config) -> torch.dtype:
    return torch.bfloat16 if config.training.bf16 else torch.float32


def tokenizer_of(config: Config, directory: str) -> TurnTokenizer:
    model = config.model
    return TurnTokenizer.from_directory(
        directory, chat_template=model.chat_template, system_prompt=model.system_prompt
    )


def play_settings(config: Config, *, temperature: float, seed: int) -> PlaySettings:
    rollout = config.rollout
    return PlaySettings(
        max_turns=rollout.max_turns,
        max_new_tokens=rollout.rollout_max_response_len,
        max_context=rollout.rollout_max_context_len,
        temperature=temperature,
        top_p=rollout.rollout_top_p,
        seed=seed,
        history_mode=rollout.history_mode,
        compact_turns=rollout.history_length,
        action_format=rollout.action_format,
        max_observation_bytes=config.environment.max_observation_bytes,
        stuck_after=config.environment.stuck_after,
    )


def load_demonstrations(config: Config) -> dict[str, Demonstration]:
    """Demonstrations by task id, successes only; empty where the run replays and imitates none."""
    if not needs_file(config):
        return {}
    root = config.environment.env_options.get("root")
    if root is not None and not isinstance(root, str):
        raise ValueError(f"env_options root = {root!r} must be the directory of the games, as text")
    environment = config.environment
    found = read_demonstrations(
        config.curriculum.demonstrations, environment.env, env_options=environment.env_options
    )
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


def objective_of(settings: ObjectiveConfig, rollout: RolloutConfig, *, vocab_size: int) -> Callable[..., Any]:
    chosen: dict[str, Any] = {"vocab_size": vocab_size, "backend": settings.divergence_backend}
    if settings.objective != "sft":
        chosen |= {
            "student_temperature": rollout.rollout_temperature,
            "teacher_temperature": settings.teacher_temperature,
            "is_packed": settings.divergence_packed,
        }
    if settings.objective == "jsd":
        chosen["beta"] = settings.beta
    if settings.objective == "sampled_token":
        chosen |= {name: getattr(settings, name) for name in ("kl_coef", "eps_clip", "eps_clip_high", "eps_clip_c")}
        chosen["is_advantage_current"] = rollout.max_staleness > 0
    return make_objective(settings.objective, **chosen)


def make_play(
    *,
    family: type[EnvironmentFamily],
    engine: RolloutEngine,
    tokenizer: TurnTokenizer,
    demonstrations: Mapping[str, Demonstration],
    settings: PlaySettings,
    num_samples: int,
    environment: EnvironmentConfig,
    players: list[int],
) -> Play:
    """Plays this rank's share of the tasks, which are dealt over `players`.

    All samples of a task stay on one rank, which computes their shared prompt once.
    """
    if parallel.rank() not in players:
        return play_nothing
    first, stride = players.index(parallel.rank()), len(players)

    async def play(
        tasks: Sequence[Task], windows: Sequence[TurnWindow], *, step: int, curriculum_k: int
    ) -> list[Episode]:
        earlier = [tasks[:index].count(task) for index, task in enumerate(tasks)]  # a batch may hold a task twice
        shares = (tasks[first::stride], windows[first::stride], earlier[first::stride])
        mine = [
            Assignment(
                task=task,
                window=window,
                sample=before * num_samples + sample,
                demonstration=demonstrations.get(task.task_id),
                curriculum_k=curriculum_k,
            )
            for task, window, before in zip(*shares, strict=True)
            for sample in range(num_samples)
        ]
        return await collect_episodes(
            family,
            mine,
            engine=engine,
            tokenizer=tokenizer,
            settings=settings,
            step=step,
            env_options=environment.env_options,
            max_open=environment.max_open_environments,
            prefix_budget=engine.cache_tokens // 2 if engine.cache_tokens else None,  # later turns need room too
        )

    return play


async def play_nothing(
    tasks: Sequence[Task], windows: Sequence[TurnWindow], *, step: int, curriculum_k: int
) -> list[Episode]:
    """The share of a rank that does not play."""
    return []


def gather_episodes(own: list[Episode], *, num_tasks: int, num_samples: int, players: list[int]) -> list[Episode]:
    """The episodes of all players, in task order, on every rank. Collective."""
    parts = [decode(part, list[Episode]) for part in parallel.all_gather_bytes(encode(own))]
    episodes = []
    for index in range(num_tasks):
        first = index // len(players) * num_samples
        episodes += parts[players[index % len(players)]][first : first + num_samples]
    return episodes


def play_ahead(
    config: Config, play: Play, curriculum: Curriculum, train_tasks: Sequence[Task]
) -> CollectAhead[list[Episode]]:
    """Steps to come, whose tasks and windows follow from their number."""

    def play_step(step: int) -> Coroutine[Any, Any, list[Episode]]:
        tasks = tasks_of_step(config, train_tasks, step)
        windows = [curriculum.window(step, task) for task in tasks]
        return play(tasks, windows, step=step, curriculum_k=curriculum.depth(step))

    return CollectAhead(play_step, max_staleness=config.rollout.max_staleness, stop=config.training.train_iters)


def embedded_engine(config: Config, student: PretrainedStudent, vocab_size: int) -> EmbeddedEngine:
    return EmbeddedEngine(
        read_json(student.directory / "config.json"),
        max_running=config.rollout.max_running_requests,
        max_total_tokens=config.rollout.max_total_tokens,
        max_context=config.rollout.rollout_max_context_len,
        vocab_size=vocab_size,
    )


def collective_minutes(config: Config) -> int:
    """How long a collective waits: a minute more than the watchdog, where there is one, which can say who is at fault."""
    return config.parallel.distributed_timeout_minutes + (config.parallel.heartbeat_timeout_seconds > 0)


def join_world(config: Config) -> ParallelLayout:
    """Collective over all ranks. Ranks that play nothing wait for those that do, and for servers to start."""
    layout, minutes = layout_of(config.parallel), collective_minutes(config)
    if serving.uses_servers(config):
        minutes = max(minutes, 1 + math.ceil(config.sglang.server_start_timeout / 60))
    parallel.initialize(layout, seed=config.training.seed, timeout_minutes=minutes)
    return layout


def assemble(config: Config) -> Assembly:
    """Join the world and build everything. Collective over all ranks; `preflight` has found the user's mistakes.

    Servers start first, because they size their cache by the memory that they find free.
    """
    serving.check_attached(config)
    layout = join_world(config)
    with ExitStack() as closing:
        servers = [closing.enter_context(server) for server in serving.rollout_servers(config)]
        run = build_run(config, layout, servers, closing)
        run.closing = closing.pop_all()  # from here on the run's to close
    return run


def build_run(config: Config, layout: ParallelLayout, servers: list[Any], closing: ExitStack) -> Assembly:
    """Models, engine and teacher over servers that run already; what must be ended goes to `closing`. Collective."""
    training, rollout = config.training, config.rollout
    tokenizer = tokenizer_of(config, config.model.student)
    family = load_env(config.environment.env)
    demonstrations = load_demonstrations(config)
    student = PretrainedStudent(
        config.model.student,
        layout,
        optimizer_settings(config),
        init=config.model.init,
        seed=training.seed,
        dtype=dtype_of(config),
        recompute=recompute_of(config.parallel),
        transformer_impl=config.model.transformer_impl,
    )
    vocab_size = min(tokenizer.vocab_size, student.shape.vocab_size)  # a model may have more rows than tokens
    teacher = teacher_of(config, layout, student, tokenizer, vocab_size, closing)
    engine = engine_of(config, student, servers, vocab_size)
    closing.callback(engine.close)
    curriculum, tasks = curriculum_of(config, demonstrations), train_tasks(config, family, demonstrations)
    players = serving.player_ranks(config)
    play = make_play(
        family=family,
        engine=engine,
        tokenizer=tokenizer,
        demonstrations=demonstrations,
        settings=play_settings(config, temperature=rollout.rollout_temperature, seed=training.seed),
        num_samples=rollout.n_samples_per_prompt,
        environment=config.environment,
        players=players,
    )
    ahead = play_ahead(config, play, curriculum, tasks) if rollout.max_staleness else None
    if ahead is not None:
        closing.callback(ahead.close)
    return Assembly(
        config=config,
        tokenizer=tokenizer,
        family=family,
        demonstrations=demonstrations,
        curriculum=curriculum,
        student=student,
        teacher=teacher,
        engine=engine,
        players=players,
        objective=objective_of(config.objective, rollout, vocab_size=vocab_size),
        play=play,
        ahead=ahead,
        pack=make_pack(config, student.shape),
        train_tasks=tasks,
        vocab_size=vocab_size,
        closing=closing,
    )


def assemble_served_teacher(config: Config) -> Player:
    """A teacher behind a server in the student's seat: it plays and nothing is trained. Collective."""
    serving.check_attached(config)
    join_world(config)
    tokenizer = tokenizer_of(config, config.model.student)
    with ExitStack() as closing:
        url, key, server = serving.teacher_address(config)
        if server is not None:
            closing.enter_context(server)
        engine = serving.engine_over(config, url, key, tokenizer)
        closing.callback(engine.close)
        return Player(
            config=config,
            tokenizer=tokenizer,
            family=load_env(config.environment.env),
            engine=engine,
            players=list(range(parallel.world_size())),
            closing=closing.pop_all(),
        )


def engine_of(config: Config, student: PretrainedStudent, servers: list[Any], vocab_size: int) -> RolloutEngine:
    if config.rollout.rollout_engine != SGLANG:
        return embedded_engine(config, student, vocab_size)
    head_rows = student.shape.vocab_size
    probe = serving.make_probe(
        student,
        vocab_size=vocab_size,
        head_rows=head_rows,
        max_context=config.rollout.rollout_max_context_len,
        tolerance=config.sglang.weight_probe_tolerance,
    )
    return serving.served_engine(config, servers, vocab_size=vocab_size, head_rows=head_rows, probe=probe)


def teacher_of(
    config: Config,
    layout: ParallelLayout,
    student: PretrainedStudent,
    tokenizer: TurnTokenizer,
    vocab_size: int,
    closing: ExitStack,
) -> Teacher | ServerTeacher | None:
    """The teacher in these processes or behind a server, or none for sft. Collective."""
    if config.objective.objective == "sft":
        return None
    if not serving.is_teacher_served(config):
        return load_teacher(
            config.model.teacher,
            layout,
            student=student.shape,
            dtype=dtype_of(config),
            own_layout=teacher_layout_of(config.parallel),
            offload=config.parallel.teacher_offload,
            transformer_impl=config.model.transformer_impl,
            timeout_minutes=collective_minutes(config),
        )
    url, key, server = serving.teacher_address(config)
    if server is not None:
        closing.enter_context(server)
    teacher = serving.served_teacher(config, url, key, vocab_size=vocab_size)
    closing.callback(teacher.close)
    teacher.check(tokenizer, max_context=config.rollout.rollout_max_context_len)
    return teacher


def needs_file(config: Config) -> bool:
    """Whether demonstrations come from a file."""
    return config.curriculum.demonstrations not in ("", EXPERT_DEMONSTRATIONS)


def make_pack(config: Config, shape: ModelShape) -> Callable[[list[Episode]], list[Microbatch]]:
    def pack_share(episodes: list[Episode]) -> list[Microbatch]:
        return pack(
            episodes,
            max_tokens=config.training.max_tokens_per_microbatch,
            aggregation=config.objective.loss_aggregation,
            prefix_tree=config.training.prefix_tree,
            pair_cost=cost_of_pair(shape),
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
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
    )
