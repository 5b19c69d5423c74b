"""Train a student: `torchrun --nproc-per-node 2 -m megatron_tcod.train --config run.toml [flags]`.

    python -m megatron_tcod.train --config run.toml --print-config      # the resolved settings as TOML
    python -m megatron_tcod.train --config run.toml --dry-run           # check everything that can be checked, then stop

The run directory (`--save`) holds config.toml, metrics.jsonl, trajectories.jsonl, checkpoints/ and evaluation/. The same
command continues an interrupted run from its newest intact checkpoint: records written after it are cut off and made
again, bit for bit where the environment is deterministic. A finished run has nothing left to do. SIGTERM, SIGUSR1 and
Ctrl-C end it with a checkpoint, `stopped.json` and a code of their own (`stop_signals.py`); episodes that are being played
then are given up.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, closing, nullcontext, suppress
from pathlib import Path
from typing import Any

import psutil

from megatron_tcod.assembly import Assembly, assemble
from megatron_tcod.config import Config, load_config, log_to_console, run_entry_point, take_switch, to_dict, to_toml
from megatron_tcod.console import ConsoleWriter
from megatron_tcod.evaluate import evaluate, gather_scores
from megatron_tcod.evaluation import write_evaluation
from megatron_tcod.journal import Journal
from megatron_tcod.metrics import (
    JsonlWriter,
    StepMetrics,
    TensorBoardWriter,
    reduce_sums,
    scores_by_turn,
    trajectory_record,
)
from megatron_tcod.model import parallel
from megatron_tcod.model.segments import cost_of_pair
from megatron_tcod.model.weight_files import SINGLE_FILE
from megatron_tcod.preflight import Findings, examine_training
from megatron_tcod.run_lock import RunLock
from megatron_tcod.stop_signals import EXIT_CODES, Stopped, StopSignals
from megatron_tcod.tcod import sft_step, tcod_step
from megatron_tcod.trajectory import Episode, Microbatch
from megatron_tcod.watchdog import NoWatchdog, Watchdog, watch_ranks

STOPPED_FILE = "stopped.json"

logger = logging.getLogger("megatron_tcod.train")  # also where this module is __main__


class PhaseClock:
    """Wall-clock seconds by phase since the last `take`. Example: `collect = clock.timed("rollout", collect)`.

    `on_enter` is told each phase as it begins.
    """

    _cpu = 0.0

    def __init__(self, on_enter: Callable[[str], None]) -> None:
        self._on_enter = on_enter
        self._seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            self._on_enter(phase)
            try:
                return function(*args, **kwargs)
            finally:
                self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start

        return call

    def take(self) -> dict[str, float]:
        now, cpu = time.perf_counter(), cpu_seconds()
        seconds, self._seconds = {**self._seconds, "step": now - self._since, "cpu": cpu - self._cpu}, {}
        self._since, self._cpu = now, cpu
        return seconds


def cpu_seconds() -> float:
    """CPU time so far of this process and all that it started, ended ones included: games and servers cost as well."""
    ended = os.times()
    alive = 0.0
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it ended meanwhile
            alive += sum(child.cpu_times()[:2])
    return time.process_time() + alive + ended.children_user + ended.children_system


class RunRecords:
    """What a run leaves behind: metrics, trajectories and the console, written by rank 0 alone."""

    def __init__(
        self, config: Config, *, decode_ids: Callable[[list[int]], str], offsets: dict[str, int], pair_cost: float = 0.0
    ) -> None:
        extra = ("loss", "ratio", "clip_fraction", "student_tail", "teacher_tail")
        self._metrics = StepMetrics(
            max_turns=config.rollout.max_turns, extra=extra, num_replicas=parallel.dp_size(), pair_cost=pair_cost
        )
        self._is_sft = config.objective.objective == "sft"
        self._interval = config.training.trajectory_interval
        self._decode_ids = decode_ids
        self._stack = ExitStack()
        self._writers: list[Any] = []
        self._journals: dict[str, Journal] = {}
        if parallel.rank():
            return
        directory = Path(config.training.save)
        jsonl = JsonlWriter(directory / "metrics.jsonl")
        trajectories = Journal(directory / "trajectories.jsonl")
        self._journals = {"metrics": jsonl.journal, "trajectories": trajectories}
        for name, journal in self._journals.items():
            if (surplus := journal.offset - offsets.get(name, 0)) > 0:
                logger.warning("%s.jsonl: cutting %d bytes written after the last checkpoint", name, surplus)
            journal.truncate_to(offsets.get(name, 0))
        console = ConsoleWriter(total_steps=config.training.train_iters, interval=config.training.log_interval)
        self._writers = [jsonl, console]
        if config.training.tensorboard_dir:
            self._writers.append(TensorBoardWriter(config.training.tensorboard_dir))
        for one in (*self._writers, trajectories):
            self._stack.callback(one.close)

    def write_step(
        self,
        step: int,
        episodes: list[Episode],
        microbatches: list[Microbatch],
        stats: Any,
        *,
        seconds: dict[str, float],
        counts: dict[str, int],
    ) -> None:
        """Reduce and write one step. Collective: one reduction for the metrics, one gather for the trajectories."""
        speaks = parallel.is_first_in_replica()
        mine = episodes if parallel.rank() == 0 else []
        own = (microbatches, stats.per_token) if speaks else ([], [])
        sums = reduce_sums(self._metrics.local_sums(mine, *own, counts=counts, replica=parallel.dp_rank()))
        record = self._metrics.finish(
            sums, step=step + 1, seconds=seconds, loss=stats.loss, grad_norm=stats.grad_norm, lr=stats.lr
        )
        if self._is_sft:  # the demonstrations' success says nothing of the student
            record = {key: value for key, value in record.items() if key not in ("rollout/success", "rollout/reward")}
        if not record["tokens/trained"]:
            logger.warning("step %d had nothing to train on: outcomes %s", step + 1, Counter(e.outcome for e in episodes))
        for writer in self._writers:
            writer.write(record)
        if step % self._interval == 0:
            scores = gather_scores(scores_by_turn(*own))
            if trajectories := self._journals.get("trajectories"):
                for index, episode in enumerate(episodes):
                    trajectories.append(trajectory_record(episode, scores.get(index, {}), self._decode_ids))

    def offsets(self) -> dict[str, int]:
        """Where each journal ends, flushed to disk; read on rank 0."""
        for journal in self._journals.values():
            journal.sync()
        return {name: journal.offset for name, journal in self._journals.items()}

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> RunRecords:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def train(config: Config) -> int:
    """The run from its newest checkpoint to `train_iters`, or to a signal; the exit code. Collective over all ranks."""
    limits = config.parallel
    with (
        closing(assemble(config)) as run,
        watch_ranks(
            heartbeat_seconds=limits.heartbeat_timeout_seconds, stall_seconds=60 * limits.distributed_timeout_minutes
        ) as watchdog,
    ):
        return train_assembled(config, run, watchdog)


def train_assembled(config: Config, run: Assembly, watchdog: Watchdog | NoWatchdog) -> int:
    clock = PhaseClock(watchdog.enter)
    time_phases(run, clock)
    directory = Path(config.training.save)
    loaded = run.student.resume(directory / "checkpoints", allow_pickle=config.training.allow_pickle)
    start, state = (loaded.step, loaded.state) if loaded else (0, {})
    if start > config.training.train_iters:
        raise ValueError(
            f"train_iters = {config.training.train_iters}, but {directory} has done {start} steps; raise train_iters or "
            f"give --save another directory"
        )
    run.publish_weights(start)
    run.warm_teacher(start)
    cost, offsets = cost_of_pair(run.student.shape), state.get("journals", {})
    with (
        StopSignals(parallel.open_store("signals", timeout_seconds=60)) as run.stop,
        RunRecords(config, decode_ids=run.tokenizer.decode, offsets=offsets, pair_cost=cost) as records,
    ):
        if parallel.rank() == 0:
            report_start(run, directory, start, state)
        done, received = take_steps(run, records, clock, watchdog, start=start, is_saved=loaded is not None)
        if start == config.training.train_iters and not (loaded and (loaded.path / SINGLE_FILE).exists()):
            save_if_due(run, records, start)
        run.student.finish_saving()
    return report_stop(directory, received, done) if received is not None else 0


def take_steps(
    run: Assembly,
    records: RunRecords,
    clock: PhaseClock,
    watchdog: Watchdog | NoWatchdog,
    *,
    start: int,
    is_saved: bool,
) -> tuple[int, signal.Signals | None]:
    """Steps from `start` to the last, or to a signal, each recorded, evaluated and saved where that is due; how many are
    done, and the signal. `is_saved`: there is a checkpoint of `start`. Collective."""
    done, last = start, run.config.training.train_iters
    try:
        if not evaluation_path(Path(run.config.training.save), start).exists():
            evaluate_if_due(run, start)  # a run that was stopped behind this step left it out
        clock.take()
        while done < last:
            watchdog.enter("preparation", step=done)
            episodes, microbatches, stats = step_of(run, done)
            if not stats.is_finite:
                raise FloatingPointError(
                    f"step {done + 1}: loss {stats.loss}, gradient norm {stats.grad_norm}; no weight was changed. "
                    f"Restart to continue from the last checkpoint, with a lower lr if it comes back"
                )
            watchdog.enter("records, evaluation and checkpoint")
            run.warm_teacher(done + 1)
            records.write_step(
                done, episodes, microbatches, stats, seconds=clock.take(), counts=run.take_prefix_counts()
            )
            done, is_saved = done + 1, False
            if done < last:
                run.stop.check()
            evaluate_if_due(run, done)
            is_saved = save_if_due(run, records, done)
            clock.take()
    except Stopped as signalled:  # between two steps as far as weights and records go
        if not is_saved:
            save_if_due(run, records, done, is_stopping=True)
        return done, signalled.received
    return done, None


def step_of(run: Assembly, step: int) -> tuple[list[Episode], list[Microbatch], Any]:
    """The optimizer step after `step` others: on recorded turns for sft, on the student's own otherwise."""
    if run.config.objective.objective == "sft":
        demonstrations = run.demonstrations_of(step)
        return sft_step(demonstrations, student=run.student, objective=run.objective, pack=run.pack)
    return tcod_step(
        step,
        run.tasks_of(step),
        curriculum=run.curriculum,
        engine=run.engine,
        teacher=run.teacher,
        student=run.student,
        objective=run.objective,
        collect=run.collect,
        pack=run.pack,
    )


def evaluate_if_due(run: Assembly, done: int) -> None:
    """Evaluate after `done` steps where the interval or the end says so. Collective."""
    evaluation, path = run.config.evaluation, evaluation_path(Path(run.config.training.save), done)
    is_last = done == run.config.training.train_iters
    is_due = done and evaluation.eval_interval and done % evaluation.eval_interval == 0
    if (is_last and evaluation.eval_at_end) or is_due:
        result = evaluate(run, step=done)
        if parallel.rank() == 0:
            write_evaluation(path, result)
        run.take_prefix_counts()  # the evaluation's are no step's


def save_if_due(run: Assembly, records: RunRecords, done: int, *, is_stopping: bool = False) -> bool:
    """Write a checkpoint where the interval, the end or a signal says so, and whether it did; `done` counts the finished
    steps. Collective."""
    training = run.config.training
    is_last = done == training.train_iters
    if not (is_last or is_stopping or done % training.save_interval == 0):
        return False
    run.student.save(
        Path(training.save) / "checkpoints",
        step=done,
        state={"journals": records.offsets(), "config": to_dict(run.config), **position(run, done)},
        keep=training.keep_checkpoints,
        with_hf_weights=is_last or training.save_hf,
        in_background=training.async_save and not is_last,
    )
    return True


def position(run: Assembly, done: int) -> dict[str, Any]:
    """Where the curriculum and the task order stand before step `done`: both are functions of the step."""
    return {
        "curriculum": {"name": run.config.curriculum.curriculum, "k": run.curriculum.depth(done)},
        "data_order": {"num_tasks": len(run.train_tasks), "next_tasks": [task.task_id for task in run.tasks_of(done)]},
    }


def evaluation_path(directory: Path, step: int) -> Path:
    return directory / "evaluation" / f"step_{step:07d}.json"


def time_phases(run: Assembly, clock: PhaseClock) -> None:
    """Measure the phases of a step from outside, so that the algorithm holds no timers."""
    run.collect = clock.timed("rollout", run.collect)
    run.student.train_step = clock.timed("train", run.student.train_step)
    run.engine.load_weights = clock.timed("weights", run.engine.load_weights)
    if run.teacher is not None:
        run.teacher.score = clock.timed("teacher", run.teacher.score)


def report_stop(directory: Path, received: signal.Signals, done: int) -> int:
    """Leave word of a signal's end for launchers that hide exit codes; the exit code."""
    code = EXIT_CODES[received]
    if parallel.rank() == 0:
        record = {"signal": received.name, "step": done, "exit_code": code}
        (directory / STOPPED_FILE).write_text(json.dumps(record) + "\n", encoding="utf-8")
        logger.warning("%s: saved step %d in %s, leaving with code %d", received.name, done, directory, code)
    return code


def report_start(run: Assembly, directory: Path, start: int, state: dict[str, Any]) -> None:
    """Say where the run stands, and what differs from what the checkpoint was made with."""
    config = run.config
    directory.mkdir(parents=True, exist_ok=True)
    (directory / STOPPED_FILE).unlink(missing_ok=True)
    (directory / "config.toml").write_text(to_toml(config), encoding="utf-8")
    if not start:
        logger.info("training from step 0 to %d in %s", config.training.train_iters, directory)
        return
    logger.info("resuming %s at step %d of %d", directory, start, config.training.train_iters)
    now, before = to_dict(config), state.get("config", {})
    for part, settings in now.items():
        if isinstance(settings, dict):
            for key, value in settings.items():
                if (old := before.get(part, {}).get(key)) != value:
                    logger.warning("%s was %r when the checkpoint was made and is %r now", key, old, value)
    for name, expected in position(run, start).items():
        if (saved := state.get(name, expected)) != expected:
            logger.warning("%s: the checkpoint was about to go on with %s, this run does with %s", name, saved, expected)


def main(argv: list[str]) -> int:
    print_config, argv = take_switch(argv, "--print-config")
    dry_run, argv = take_switch(argv, "--dry-run")
    if print_config and dry_run:
        raise ValueError("--print-config prints the settings and checks nothing, --dry-run checks them; give one")
    config = load_config(argv, prog="python -m megatron_tcod.train")
    if print_config:
        print(to_toml(config), end="")
        return 0
    log_to_console()
    is_unlaunched = dry_run and "WORLD_SIZE" not in os.environ
    checked = examine_training(Findings(), config, world_size=None if is_unlaunched else world_size()).require()
    if dry_run:
        print("\n".join(checked))
        return 0
    with RunLock(config.training.save) if os.environ.get("RANK", "0") == "0" else nullcontext():
        code = train(config)
        parallel.shutdown()
    return code


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


if __name__ == "__main__":
    run_entry_point(main)
