"""One training step without rollouts: the teacher scores, the student trains; tokens a second, MFU, peak memory, shares.

    python tools/bench_training.py                                     # on a GPU: Qwen3-1.7B's shape from Qwen3-4B's
    OMP_NUM_THREADS=1 python tools/bench_training.py                   # on a CPU: small shapes, one thread
    python tools/bench_training.py --recompute full --json tools/baselines/training_h200.json

Weights are random; episodes are made up, in rows of the usual proportions: a prompt, then turns of a trained answer and an
observation. Everything else is what a run does: packing, Megatron's schedule, the divergence from hidden states, clipping,
Adam. Where a GPU is, bf16 with fp32 gradients and moments.

    MFU      arithmetic of the models (cost_model.py: three forward passes of the student, one of the teacher, heads at the
             trained positions; what recomputation repeats does not count) over the time, as a share of the roof
    roof     a large product of matrices in the same type, measured in the same run; on a known GPU the data sheet beside it
    memory   peak of allocated device memory beside what cost_model.py expects; on a CPU not measured

Median of steps after a warm-up; wall-clock on a GPU, process CPU time on a CPU. It exits 1 when a step is not finite.
It plays nothing and moves no weights to servers; see bench_rollout.py.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
from bench_packing import episode_of, row_behind  # noqa: E402

from megatron_tcod import cost_model  # noqa: E402
from megatron_tcod.cost_model import DEVICES, Numerics, Serving, Workload  # noqa: E402
from megatron_tcod.model import parallel  # noqa: E402
from megatron_tcod.model.build import Recompute  # noqa: E402
from megatron_tcod.model.mapping import read_hf_config  # noqa: E402
from megatron_tcod.model.parallel import ParallelLayout  # noqa: E402
from megatron_tcod.model.segments import cost_of_pair  # noqa: E402
from megatron_tcod.model.shape import ModelShape  # noqa: E402
from megatron_tcod.model.student import OptimizerSettings, Student  # noqa: E402
from megatron_tcod.model.teacher import Teacher  # noqa: E402
from megatron_tcod.objective import make_objective  # noqa: E402
from megatron_tcod.packing import pack  # noqa: E402
from megatron_tcod.trajectory import Episode  # noqa: E402

SHAPES = ROOT / "examples" / "scaling"
SMALL = ModelShape(
    num_layers=4, hidden_size=128, ffn_hidden_size=384, num_attention_heads=4, num_query_groups=2, kv_channels=32,
    vocab_size=8192, qk_layernorm=True,
)  # fmt: skip


RECOMPUTES = {
    "none": Recompute(),
    "selective": Recompute(granularity="selective"),
    "full": Recompute(granularity="full", method="uniform", num_layers=1),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Example: `Case(student=SMALL, teacher=SMALL, workload=Workload(episodes=8), dtype=torch.float32)`"""

    student: ModelShape
    teacher: ModelShape
    workload: Workload
    dtype: torch.dtype
    steps: int = 5


def case_of(device: str) -> Case:
    if device == "cpu":
        row = dict(turns=6, prompt_tokens=60, observation_tokens=20, response_tokens=12)
        work = Workload(episodes=16, microbatch_tokens=1024, **row)
        return Case(student=SMALL, teacher=replace(SMALL, num_layers=6, hidden_size=192), workload=work, dtype=torch.float32)
    student, teacher = (read_hf_config(SHAPES / name)[1] for name in ("student", "teacher-4b"))
    return Case(student=student, teacher=teacher, workload=Workload(episodes=64), dtype=torch.bfloat16)


def make_episodes(work: Workload, dice: random.Random) -> list[Episode]:
    """Rows of the workload's proportions, tasks all unlike."""
    prompt, turn = int(work.prompt_tokens), (int(work.response_tokens), int(work.observation_tokens))
    ids = range(1000)
    rows = [row_behind(dice, dice.choices(ids, k=prompt), [turn] * int(work.turns)) for _ in range(work.episodes)]
    return [episode_of([row], str(number)) for number, row in enumerate(rows)]


def seconds_of(call: Callable[[], Any], device: str) -> tuple[Any, float]:
    """The result, and wall-clock seconds on a device, CPU seconds without one."""
    if device == "cpu":
        start = time.process_time()
        return call(), time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    found = call()
    torch.cuda.synchronize()
    return found, time.perf_counter() - start


def roof(dtype: torch.dtype, device: str) -> float:
    """FLOPs a second of the best of five products of large matrices."""
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    torch.mm(a, b)
    return 2 * size**3 / min(seconds_of(lambda: torch.mm(a, b), device)[1] for _ in range(5))


def model_flops(case: Case) -> dict[str, float]:
    """Arithmetic of a step by phase, without what recomputation repeats."""
    work = case.workload
    forward = {
        role: cost_model.forward_flops(shape, work.tokens, work.row_tokens)
        for role, shape in (("student", case.student), ("teacher", case.teacher))
    }
    heads = 3 * cost_model.head_flops(case.student, work.trained) + cost_model.head_flops(case.teacher, work.trained)
    return {"teacher": forward["teacher"], "train": 3 * forward["student"] + heads}


def expected_memory(case: Case, recompute: str) -> float:
    width = case.dtype.itemsize
    numerics = Numerics(weight_bytes=width, recompute=recompute)
    nobody = Serving(servers=1, weight_bytes=0, kv_bytes=0)
    layout = cost_model.Layout()
    return cost_model.rank_memory(case.student, case.teacher, layout, numerics, case.workload, nobody).training


def run(case: Case, device: str, recompute: str) -> dict[str, Any]:
    """The figures of one case."""
    layout, work = ParallelLayout(), case.workload
    settings = RECOMPUTES[recompute]
    teacher = Teacher(case.teacher, layout, seed=1, dtype=case.dtype)
    teacher.align_vocabulary(case.student)
    student = Student(
        case.student, layout, OptimizerSettings(lr=1e-6), seed=0, dtype=case.dtype, recompute=settings
    )
    objective = make_objective(
        "reverse_kl", vocab_size=min(case.student.vocab_size, case.teacher.vocab_size), backend="auto",
        student_temperature=1.0, teacher_temperature=1.0, is_packed=False,
    )  # fmt: skip
    seconds: dict[str, list[float]] = {"pack": [], "teacher": [], "train": []}
    losses = []
    for step in range(case.steps + 1):
        episodes = make_episodes(work, random.Random(step))
        if step == 1 and device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        packing = dict(max_tokens=work.microbatch_tokens, pair_cost=cost_of_pair(case.student), device=parallel.device())
        microbatches, packed = seconds_of(lambda: pack(episodes, **packing), device)  # noqa: B023
        targets, scored = seconds_of(lambda: teacher.score(microbatches), device)  # noqa: B023
        stats, trained = seconds_of(lambda: student.train_step(microbatches, targets, objective), device)  # noqa: B023
        losses.append(stats.loss)
        if step:
            for name, value in (("pack", packed), ("teacher", scored), ("train", trained)):
                seconds[name].append(value)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    total = sum(medians.values())
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    flops, best = model_flops(case), roof(case.dtype, device)
    return {
        "tokens": work.tokens, "trained": work.trained, "microbatches": len(microbatches),
        "tokens_per_second": work.tokens / total,
        "share": {name: value / total for name, value in medians.items()},
        "flops": flops, "roof": best, "mfu": sum(flops.values()) / total / best,
        "mfu_by_phase": {name: flops[name] / medians[name] / best for name in flops},
        "peak_bytes": peak, "expected_bytes": expected_memory(case, recompute), "is_finite": all(map(math.isfinite, losses)),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recompute", choices=RECOMPUTES, default="none")
    parser.add_argument("--episodes", type=int, help="rows of a step")
    parser.add_argument("--steps", type=int, help="steps after the warm-up")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args()
    if min(options.episodes or 1, options.steps or 1) < 1:
        parser.error("--episodes and --steps: expected at least 1")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} 1 thread"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    header = {"device": name, "commit": commit or "unknown", "torch": torch.__version__, "recompute": options.recompute}
    print(f"# {' | '.join(f'{key} {value}' for key, value in header.items())}")
    case = case_of(device)
    case = replace(case, workload=replace(case.workload, episodes=options.episodes or case.workload.episodes))
    case = replace(case, steps=options.steps or case.steps)
    parallel.initialize(ParallelLayout())
    try:
        figures = run(case, device, options.recompute)
    finally:
        parallel.shutdown()
    for line in told(case, figures, name):
        print(line)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**header, **figures}, indent=1) + "\n")
    return 0 if figures["is_finite"] else 1


def told(case: Case, figures: dict[str, Any], device_name: str) -> list[str]:
    billions = [cost_model.num_parameters(shape) / 1e9 for shape in (case.student, case.teacher)]
    sheet = next((one.flops for key, one in DEVICES.items() if key != "cpu" and key in device_name.lower()), None)
    lines = [
        f"student {billions[0]:.3g}B from teacher {billions[1]:.3g}B, {case.dtype}: {figures['tokens']:.0f} tokens, "
        f"{figures['trained']:.0f} trained, {figures['microbatches']} microbatches | "
        f"{figures['tokens_per_second']:.0f} tokens/s",
        " | ".join(f"{phase} {100 * share:.0f} %" for phase, share in figures["share"].items()),
        f"MFU {100 * figures['mfu']:.0f} % of a measured product's {figures['roof'] / 1e12:.3g} TFLOP/s"
        + (f" ({100 * figures['mfu'] * figures['roof'] / sheet:.0f} % of the data sheet's)" if sheet else "")
        + "".join(f" | {phase} {100 * share:.0f} %" for phase, share in figures["mfu_by_phase"].items()),
    ]
    expected = figures["expected_bytes"] / 2**30
    if figures["peak_bytes"] is not None:
        peak = figures["peak_bytes"] / 2**30
        lines.append(f"peak {peak:.1f} GiB | the model expects {expected:.1f} GiB, {expected / peak:.2f}x")
    else:
        lines.append(f"peak not measured on a CPU | the model expects {expected:.2f} GiB")
    return lines if figures["is_finite"] else [*lines, "FAILED: a loss is not finite"]


if __name__ == "__main__":
    raise SystemExit(main())
