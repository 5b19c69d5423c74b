"""What a run would need and how long a step would take: `python -m megatron_tcod.doctor plan run.toml --gpus 64`.

    python -m megatron_tcod.doctor plan run.toml --gpus 64 --device h200 -- --tensor-model-parallel-size 2
    python -m megatron_tcod.doctor plan run.toml --gpus 8,64,512,1024 --table        # one row for each, as Markdown

Reads the settings and the two config.json, no weights, and prints memory of a rank, arithmetic, traffic and seconds of each
phase for the layout of the settings and for the one it would choose: the fastest of those that fit. The work of a step is
taken from the run's own metrics.jsonl where there is one, otherwise assumed from the settings' limits, and every figure of
it can be given. It is a model: `cost_model.py` says what it leaves out, docs/scaling.md what it says up to 1,024 GPUs.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_tcod.assembly import layout_of, recompute_of, teacher_layout_of
from megatron_tcod.config import SGLANG, Config, load_config
from megatron_tcod.cost_model import (
    DEVICES,
    Device,
    Layout,
    MemoryUse,
    Numerics,
    Phase,
    Serving,
    Workload,
    kv_token_bytes,
    memory_parts,
    num_parameters,
    rank_memory,
    step_phases,
)
from megatron_tcod.journal import read_journal
from megatron_tcod.model.build import check_layout, check_recompute
from megatron_tcod.model.experts import check_trainable
from megatron_tcod.model.parallel import ParallelLayout, check_world_size
from megatron_tcod.model.shape import ModelShape
from megatron_tcod.preflight import check_teacher_experts, read_model
from megatron_tcod.serving import is_teacher_served

USABLE = 0.9
"""Of a device's memory; the rest is the framework's."""
MOST = 1e9
"""Of ranks, tokens, turns and GiB that anybody plans with."""
MEASURED_STEPS = 20
"""Newest records of metrics.jsonl that the work of a step is taken from."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is planned: the models, the work and the machine, without a layout."""

    student: ModelShape
    teacher: ModelShape | None
    workload: Workload
    numerics: Numerics
    device: Device
    device_name: str
    sequence_parallel: bool
    is_overlapped: bool
    """Rollouts of coming steps run beside training."""
    ranks_per_server: int
    is_embedded: bool
    max_running: int


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One layout and what it costs."""

    layout: Layout
    serving: Serving
    memory: MemoryUse
    phases: dict[str, Phase]
    is_overlapped: bool
    capacity: float

    @property
    def fits(self) -> bool:
        return self.memory.peak <= USABLE * self.capacity

    @property
    def seconds(self) -> float:
        rest = sum(phase.seconds for name, phase in self.phases.items() if name != "rollout")
        played = self.phases["rollout"].seconds
        return max(played, rest) if self.is_overlapped else played + rest


def answer(question: Question, layout: Layout, servers: int | None = None) -> Answer:
    """`servers` None fills the machine with them. A server keeps as many rows as the models leave room for, at least one."""
    kind = "cpu" if question.device_name == "cpu" else "cuda"
    models = (question.student, question.teacher, layout, question.numerics, question.workload)
    serving = serving_of(question, layout, servers)
    if not question.is_embedded:
        row = kv_token_bytes(question.student, serving.kv_bytes) * question.workload.row_tokens / serving.ranks_per_server
        bare = rank_memory(*models, dataclasses.replace(serving, kv_tokens=0), kind=kind)
        resident = bare.playing if serving.is_released else bare.training
        rows = int((USABLE * question.device.memory - resident) // row)
        rows = max(1, min(rows, serving.kv_tokens // int(question.workload.row_tokens)))
        serving = dataclasses.replace(serving, kv_tokens=round(rows * question.workload.row_tokens), max_running=rows)
    return Answer(
        layout=layout,
        serving=serving,
        memory=rank_memory(*models, serving, kind=kind),
        phases=step_phases(*models, serving, question.device),
        is_overlapped=question.is_overlapped,
        capacity=question.device.memory,
    )


def serving_of(question: Question, layout: Layout, servers: int | None) -> Serving:
    if question.is_embedded:
        servers, ranks, width = layout.world, 1, 4
    else:
        ranks, width = question.ranks_per_server, 2
        servers = max(1, layout.world // ranks) if servers is None else servers
    share = -(-question.workload.episodes // servers)
    running = min(share, question.max_running)
    return Serving(
        servers=servers,
        ranks_per_server=ranks,
        weight_bytes=width,
        kv_bytes=width,
        kv_tokens=round(running * question.workload.row_tokens),
        max_running=question.max_running,
        is_on_host=question.is_embedded,
        is_released=not question.is_embedded and not question.is_overlapped,
    )


def layouts(question: Question, gpus: int) -> Iterator[Layout]:
    """Ways to lay both models out on `gpus` ranks. Tensor and context parallelism stay inside a node; the teacher is cut as
    the student or over more tensor-parallel ranks. Pipelines are also tried interleaved, with two or four chunks a rank."""
    sizes = [size for size in (1, 2, 4, 8) if size <= question.device.per_node]
    stages = range(1, min(question.student.num_layers, 32) + 1)
    for tp, cp, pp in itertools.product(sizes, sizes, stages):
        dp, rest = divmod(gpus, tp * cp * pp)
        if rest or dp > question.workload.episodes or tp * cp > question.device.per_node:
            continue
        is_parallel = question.sequence_parallel and tp > 1
        wider = [size for size in sizes if size > tp] if question.teacher else []
        for ep, chunks, teacher_tp in itertools.product(
            expert_sizes(question.student, cp * dp), (1, 2, 4) if pp > 1 else (1,), (None, *wider)
        ):
            layout = Layout(
                tp=tp, pp=pp, cp=cp, dp=dp, ep=ep, chunks=chunks, sequence_parallel=is_parallel, teacher_tp=teacher_tp
            )
            if is_possible(question, layout):
                yield layout


def expert_sizes(student: ModelShape, ranks: int) -> list[int]:
    """1, and with experts the powers of two that divide the ranks with the same weights."""
    most = student.experts.num_experts if student.experts else 1
    return [ep for ep in (2**power for power in range(most.bit_length())) if ranks % ep == 0]


def is_possible(question: Question, layout: Layout) -> bool:
    try:
        for shape, part in ((question.student, layout), (question.teacher, layout.of_teacher)):
            if shape is not None:
                own = ParallelLayout(
                    tensor_model_parallel_size=part.tp,
                    pipeline_model_parallel_size=part.pp,
                    virtual_pipeline_model_parallel_size=part.chunks if part.chunks > 1 else None,
                    context_parallel_size=part.cp,
                    expert_model_parallel_size=part.ep,
                )
                check_layout(shape, own)
                check_world_size(own, layout.world)
    except ValueError:
        return False
    return True


def choose(question: Question, gpus: int) -> Answer | None:
    """The fastest layout that fits; of two within one percent the one that cuts the model less. None fits: None."""
    fitting = [one for layout in layouts(question, gpus) if (one := answer(question, layout)).fits]
    if not fitting:
        return None
    bound = 1.01 * min(one.seconds for one in fitting)
    close = (one for one in fitting if one.seconds <= bound)
    return min(close, key=lambda one: (cuts_of(one.layout), one.seconds))


def cuts_of(layout: Layout) -> int:
    return layout.tp * layout.pp * layout.chunks * layout.cp * layout.ep * (layout.teacher_tp or layout.tp)


def workload_of(config: Config, options: argparse.Namespace) -> tuple[Workload, str]:
    """The work of a step and where it is known from."""
    rollout = config.rollout
    episodes = rollout.rollout_batch_size * rollout.n_samples_per_prompt
    known = {
        "turns": max(1.0, rollout.max_turns / 2),
        "response_tokens": max(1.0, rollout.rollout_max_response_len / 2),
        "observation_tokens": 100.0,
        "prompt_tokens": 600.0,
    }
    room = rollout.rollout_max_context_len - known["response_tokens"]
    whole = known["prompt_tokens"] + known["turns"] * (known["observation_tokens"] + known["response_tokens"])
    if whole > room:  # as many turns as the context holds
        known["prompt_tokens"] = min(known["prompt_tokens"], room / 4)
        known["turns"] = max(1.0, (room - known["prompt_tokens"]) / (known["observation_tokens"] + known["response_tokens"]))
    source = "assumed from the settings' limits"
    if (measured := measured_work(config)) is not None:
        known, source = known | measured, "from the run's metrics.jsonl"
    given = {name: value for name in known if (value := getattr(options, name)) is not None}
    if given:
        source += f"; given: {', '.join(given)}"
    workload = Workload(
        episodes=episodes,
        samples=rollout.n_samples_per_prompt,
        microbatch_tokens=config.training.max_tokens_per_microbatch,
        **known | given,
    )
    return workload, source


def measured_work(config: Config) -> dict[str, float] | None:
    """Turns and tokens of an episode in the newest steps of the run, None before its first."""
    path = Path(config.training.save) / "metrics.jsonl"
    if not path.exists():
        return None
    records = [one for one in read_journal(path).records if one.get("tokens/trained")][-MEASURED_STEPS:]
    if not records:
        return None

    def per_episode(key: str) -> float:
        return statistics.median(one[key] / one["rollout/episodes"] for one in records)

    turns = max(1.0, statistics.median(one["turns/total"] for one in records))
    read = (per_episode("tokens/packed") - per_episode("tokens/trained")) / (turns + 1)
    return {
        "turns": turns,
        "response_tokens": per_episode("tokens/trained") / turns,
        "observation_tokens": read,
        "prompt_tokens": read,
    }


def question_of(config: Config, options: argparse.Namespace) -> tuple[Question, str]:
    has_teacher = config.objective.objective != "sft" and not is_teacher_served(config)
    student = read_model("student", config.model.student)[1]
    teacher = read_model("teacher", config.model.teacher)[1] if has_teacher else None
    workload, source = workload_of(config, options)
    device = DEVICES[options.device]
    if options.memory_gib is not None:
        device = dataclasses.replace(device, memory=options.memory_gib * 2**30)
    server, parallel = config.rollout.server, config.parallel
    return Question(
        student=student,
        teacher=teacher,
        workload=workload,
        numerics=Numerics(
            weight_bytes=2 if config.training.bf16 else 4,
            is_optimizer_sharded=parallel.use_distributed_optimizer,
            recompute=parallel.recompute_granularity or "none",
            is_teacher_offloaded=parallel.teacher_offload,
        ),
        device=device,
        device_name=options.device,
        sequence_parallel=parallel.sequence_parallel,
        is_overlapped=config.rollout.max_staleness > 0,
        ranks_per_server=int(server.get("tp_size", server.get("tp-size", 1))),
        is_embedded=config.rollout.rollout_engine != SGLANG,
        max_running=config.rollout.max_running_requests,
    ), source


def configured(config: Config, question: Question, gpus: int) -> Answer | str:
    """The settings' own layout, or why it cannot be."""
    parallel = config.parallel
    try:
        check_recompute(question.student, layout_of(parallel), recompute_of(parallel))
        check_trainable(question.student, layout_of(parallel))
        teacher_layout_of(parallel)
        if question.teacher is not None:
            check_teacher_experts(config, question.teacher)
    except ValueError as error:
        return str(error)
    tp, pp, cp = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    dp, rest = divmod(gpus, tp * pp * cp)
    if rest or not dp:
        return f"tp {tp} x pp {pp} x cp {cp} does not divide {gpus} ranks"
    layout = Layout(
        tp=tp,
        pp=pp,
        cp=cp,
        dp=dp,
        ep=parallel.expert_model_parallel_size,
        chunks=parallel.virtual_pipeline_model_parallel_size or 1,
        sequence_parallel=question.sequence_parallel and tp > 1,
        teacher_tp=parallel.teacher_tensor_model_parallel_size,
        teacher_pp=parallel.teacher_pipeline_model_parallel_size,
        teacher_ep=parallel.teacher_expert_model_parallel_size,
    )
    if not is_possible(question, layout):
        return f"{layout.told} does not divide the models' heads, layers and experts, or the ranks"
    return answer(question, layout, servers=dp * config.sglang.servers_per_replica)


def describe(one: Answer) -> list[str]:
    layout, serving = one.layout, one.serving
    where = "the CPUs of all ranks"
    if not serving.is_on_host:
        where = f"{serving.servers} servers of {serving.ranks_per_server}, {serving.max_running} rows at a time each"
    parts = ", ".join(f"{name} {gib(size)}" for name, size in memory_parts(one.memory).items())
    verdict = "fits" if one.fits else "DOES NOT FIT"
    lines = [
        f"{layout.told}; rollouts by {where}",
        f"  GiB of a rank: {parts}",
        f"  peak {gib(one.memory.peak)} of {gib(one.capacity)} GiB (training {gib(one.memory.training)}, "
        f"playing {gib(one.memory.playing)}): {verdict}",
        f"  {'phase':<10}{'seconds':>10}{'share':>8}{'PFLOP':>12}{'GB sent by a rank':>20}",
    ]
    for name, phase in one.phases.items():
        share = phase.seconds / sum(each.seconds for each in one.phases.values())
        figures = f"{phase.seconds:>10.2f}{share:>8.0%}{phase.flops / 1e15:>12.3g}{phase.sent / 1e9:>20.3g}"
        lines.append(f"  {name:<10}{figures}")
    overlapped = " (rollouts beside training)" if one.is_overlapped else ""
    return [*lines, f"  {'step':<10}{one.seconds:>10.2f}{overlapped}"]


def gib(size: float) -> str:
    return f"{size / 2**30:.2f}" if size < 10 * 2**30 else f"{size / 2**30:.0f}"


def report(path: str, config: Config, question: Question, source: str, gpus: int) -> list[str]:
    work = question.workload
    lines = [
        f"plan of {path} for {gpus} x {question.device_name}: a model, not a measurement",
        models(question),
        f"a step: {work.episodes} episodes of {work.turns:.1f} turns and {work.row_tokens:.0f} tokens, "
        f"{work.trained / work.episodes:.0f} of them trained ({source})",
    ]
    if question.is_embedded and question.device_name != "cpu":
        lines.append("rollout_engine = embedded decodes on the CPU; set rollout_engine = sglang to use the GPUs")
    own = configured(config, question, gpus)
    lines += ["", "layout of the settings: " + (own if isinstance(own, str) else describe(own)[0])]
    lines += [] if isinstance(own, str) else describe(own)[1:]
    best = choose(question, gpus)
    if best is None:
        advice = "try --bf16, --use-distributed-optimizer, --recompute-granularity full, a smaller batch, or more ranks"
        return [*lines, "", f"layout it would choose: none fits; {advice}"]
    if isinstance(own, Answer) and own.layout == best.layout and own.serving == best.serving:
        return [*lines, "", "layout it would choose: the same"]
    return [*lines, "", "layout it would choose: " + describe(best)[0], *describe(best)[1:]]


def models(question: Question) -> str:
    sizes = f"student {num_parameters(question.student) / 1e9:.3g} B parameters"
    if question.teacher:
        sizes += f", teacher {num_parameters(question.teacher) / 1e9:.3g} B"
    numerics = question.numerics
    told = ["bf16 with fp32 gradients and moments" if numerics.weight_bytes == 2 else "fp32"]
    told += ["optimizer sharded"] if numerics.is_optimizer_sharded else []
    told += [f"recompute {numerics.recompute}"] if numerics.recompute != "none" else []
    return f"{sizes}; {', '.join(told)}"


def table(question: Question, counts: Sequence[int]) -> list[str]:
    """One row for each number of GPUs, with the layout it would choose."""
    phases = ("rollout", "teacher", "train", "weights")
    columns = ["GPUs", "tp", "pp", "cp", "dp", "teacher tp", "GiB of a rank", *(f"{name} s" for name in phases)]
    columns += ["step s", "tokens/s", "rollout"]
    head = f"| {' | '.join(columns)} |"
    lines = [head, "|" + "---:|" * (head.count("|") - 1)]
    for gpus in counts:
        if (one := choose(question, gpus)) is None:
            lines.append(f"| {gpus:,} | none fits |" + " |" * 10)
            continue
        seconds = [one.phases[name].seconds if name in one.phases else 0.0 for name in phases]
        layout = one.layout
        stages = f"{layout.pp} x {layout.chunks}" if layout.chunks > 1 else layout.pp
        cells = [f"{gpus:,}", layout.tp, stages, layout.cp, f"{layout.dp:,}", layout.of_teacher.tp, gib(one.memory.peak)]
        cells += [f"{each:.3g}" for each in (*seconds, one.seconds)]
        cells += [f"{question.workload.tokens / one.seconds:,.0f}", f"{seconds[0] / sum(seconds):.0%}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def positive(text: str) -> float:
    """A number above 0 that computers can count to, for argparse."""
    value = float(text)
    if not 0 < value < MOST:
        raise argparse.ArgumentTypeError(f"{text} is no number above 0 and below {MOST:.0e}")
    return value


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_tcod.doctor plan",
        description="Memory, traffic, time and layout of a run, from formulas.",
        epilog="After -- come the flags of megatron_tcod.train.",
    )
    parser.add_argument("config", help="TOML file of the run")
    parser.add_argument("--gpus", required=True, help="number of ranks; several with commas for --table")
    parser.add_argument("--device", choices=DEVICES, default="h200")
    parser.add_argument("--memory-gib", type=positive, help="of a device, instead of what it is sold with")
    parser.add_argument("--table", action="store_true", help="Markdown, a row for each number of ranks")
    parser.add_argument("--json", action="store_true", help="the layout it would choose, for programs")
    for name in ("turns", "prompt_tokens", "observation_tokens", "response_tokens"):
        parser.add_argument("--" + name.replace("_", "-"), type=positive)
    own = list(argv[: argv.index("--")]) if "--" in argv else list(argv)
    return parser.parse_args(own), list(argv[len(own) + 1 :])


def main(argv: Sequence[str]) -> int:
    options, flags = parse(argv)
    try:
        counts = [int(part) for part in options.gpus.split(",")]
    except ValueError:
        counts = [0]
    if not 1 <= min(counts) <= max(counts) < MOST or (len(counts) > 1 and not options.table):
        raise ValueError(f"--gpus {options.gpus}: expected a number of ranks, or with --table several joined by commas")
    config = load_config(["--config", options.config, *flags], prog="megatron_tcod.train")
    question, source = question_of(config, options)
    if options.table:
        print("\n".join(table(question, counts)))
    elif options.json:
        best = choose(question, counts[0])
        print(json.dumps(None if best is None else dataclasses.asdict(best) | {"seconds": best.seconds}))
    else:
        print("\n".join(report(options.config, config, question, source, counts[0])))
    return 0
