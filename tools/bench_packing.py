"""What packing as prefix trees saves: tokens and time of one gradient against rows one behind the other, same gradient.

    OMP_NUM_THREADS=1 python tools/bench_packing.py
    python tools/bench_packing.py runs/tcod/trajectories.jsonl      # what it saves, or would save, on a recorded run

Prints one line a shape and exits 1 when the gradients disagree by more than 1e-5 or the saving misses its limit.

    shared prefix    8 samples of one task behind a replayed prefix of 80 % of their tokens; the limit is 3x fewer tokens
    late branches    8 samples that play the first turns of their window alike, two by two
    rows a turn      16 turns of one episode, each a row with all that came before
    nothing shared   24 rows of unlike tasks; no limit, and no price

Process CPU time on one thread of a forward and backward pass with the head at the trained positions, median of rounds that
take turns. tokens are what went through attention and MLP; pairs are query-key pairs, the work of attention itself. For a
recorded run every step's episodes are packed both ways at the default budget, without a model.

It measures no GPU.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import msgspec  # noqa: E402
import torch  # noqa: E402

sys.path[:0] = [str(Path(__file__).parents[1])]
from megatron_tcod.config import TrainingConfig  # noqa: E402
from megatron_tcod.journal import read_journal  # noqa: E402
from megatron_tcod.model import build, parallel  # noqa: E402
from megatron_tcod.model.parallel import ParallelLayout  # noqa: E402
from megatron_tcod.model.shape import ModelShape  # noqa: E402
from megatron_tcod.model.student import OptimizerSettings, Student  # noqa: E402
from megatron_tcod.objective import make_objective  # noqa: E402
from megatron_tcod.packing import pack  # noqa: E402
from megatron_tcod.trajectory import Episode, Microbatch, Task, TokenRow, TurnWindow  # noqa: E402

VOCAB = 1000
ROUNDS = 3
TOLERANCE = 1e-5
SHAPE = ModelShape(
    num_layers=4, hidden_size=128, ffn_hidden_size=384, num_attention_heads=4, num_query_groups=2, kv_channels=32,
    vocab_size=VOCAB, qk_layernorm=True,
)  # fmt: skip


def row_behind(dice: random.Random, prefix: TokenRow | list[int], turns: Sequence[tuple[int, int]]) -> TokenRow:
    """`prefix`, a row or replayed ids, then (sampled, observed) numbers of tokens, turn after turn."""
    ids, mask = (list(prefix), [0] * len(prefix)) if isinstance(prefix, list) else (prefix.token_ids[:], prefix.loss_mask[:])
    for sampled, observed in turns:
        ids += dice.choices(range(VOCAB), k=sampled + observed)
        mask += [1] * sampled + [0] * observed
    return TokenRow(token_ids=ids, turn_ids=[0] * len(ids), loss_mask=mask, logprobs=[-1.0] * sum(mask))


def episode_of(rows: list[TokenRow], task_id: str = "task") -> Episode:
    return Episode(
        task=Task(env="none", task_id=task_id, split="train"), sample=0, step=0, weight_version=0, curriculum_k=1,
        window=TurnWindow(0, 1), turns=[], rows=rows, outcome="ok", end_reason="window",
    )  # fmt: skip


def shared_prefix(dice: random.Random) -> list[Episode]:
    prefix = dice.choices(range(VOCAB), k=800)
    return [episode_of([row_behind(dice, prefix, [(20, 30)] * 4)]) for _ in range(8)]


def late_branches(dice: random.Random) -> list[Episode]:
    prefix = dice.choices(range(VOCAB), k=500)
    firsts = [row_behind(dice, prefix, [(20, 80)] * 2) for _ in range(4)]
    return [episode_of([row_behind(dice, first, [(20, 80)] * 2)]) for first in firsts * 2]


def rows_a_turn(dice: random.Random) -> list[Episode]:
    rows, ids = [], dice.choices(range(VOCAB), k=100)
    for _ in range(16):
        rows.append(row_behind(dice, ids, [(20, 0)]))
        ids = rows[-1].token_ids + dice.choices(range(VOCAB), k=30)
    return [episode_of(rows)]


def nothing_shared(dice: random.Random) -> list[Episode]:
    lengths = [dice.randrange(10, 40) for _ in range(24)]
    return [episode_of([row_behind(dice, [number], [(20, 10)] * n)], str(number)) for number, n in enumerate(lengths, 1)]


CASES = {
    "shared prefix": (shared_prefix, 3.0),
    "late branches": (late_branches, 2.0),
    "rows a turn": (rows_a_turn, 8.0),
    "nothing shared": (nothing_shared, None),
}
"""Name -> episodes, and how many times fewer tokens there must be."""


def gradient_of(student: Student, microbatches: list[Microbatch]) -> tuple[torch.Tensor, float]:
    """All gradients as one vector, and CPU seconds."""
    start = time.process_time()
    student.compute_gradients(microbatches, [None] * len(microbatches), make_objective("sft", vocab_size=VOCAB))
    seconds = time.process_time() - start
    return torch.cat([one.main_grad.flatten().double() for _, one in build.named_parameters(student.chunks)]), seconds


def run_case(name: str, student: Student) -> bool:
    """Measure and print one case; True where the gradients agree and the limit is met."""
    make, limit = CASES[name]
    episodes = make(random.Random(name))
    apart, tree = (pack(episodes, max_tokens=16384, prefix_tree=flag) for flag in (False, True))
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        gradients = []
        for packed, into in zip((apart, tree), times, strict=True):
            gradient, seconds = gradient_of(student, packed)
            gradients.append(gradient)
            into.append(seconds)
    error = float((gradients[1] - gradients[0]).norm() / gradients[0].norm())
    tokens = [sum(one.num_tokens for one in packed) for packed in (apart, tree)]
    pairs = [sum(one.num_pairs for one in packed) for packed in (apart, tree)]
    saving = tokens[0] / tokens[1]
    milliseconds = [1e3 * statistics.median(one) for one in times]
    is_met = error <= TOLERANCE and (limit is None or saving >= limit)
    print(
        f"{name}: rows={sum(len(one.rows()) for one in tree)} | tokens {tokens[0]} -> {tokens[1]} {saving:.2f}x"
        f"{f' (limit {limit:g}x)' if limit else ''} | pairs {pairs[0] / pairs[1]:.2f}x | "
        f"{milliseconds[0]:.0f} -> {milliseconds[1]:.0f} ms {milliseconds[0] / milliseconds[1]:.2f}x | "
        f"gradient differs by {error:.1e}{'' if is_met else ' | FAILED'}"
    )
    return is_met


def report_run(path: Path) -> None:
    """One line for each recorded step, and one for all."""
    episodes = (msgspec.convert(record, Episode) for record in read_journal(path).records)
    total = [0, 0]
    for step, together in groupby(episodes, lambda episode: episode.step):
        packed = pack(list(together), max_tokens=TrainingConfig().max_tokens_per_microbatch, prefix_tree=True)
        counts = [sum(one.num_row_tokens for one in packed), sum(one.num_tokens for one in packed)]
        total = [old + new for old, new in zip(total, counts, strict=True)]
        print(f"step {step}: {saving_line(counts)}")
    print(f"all: {saving_line(total)}")


def saving_line(counts: Sequence[int]) -> str:
    unshared, tokens = counts
    return f"tokens {unshared} -> {tokens} {unshared / max(tokens, 1):.2f}x"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trajectories", nargs="?", type=Path, help="trajectories.jsonl of a run")
    trajectories = parser.parse_args().trajectories
    if trajectories:
        report_run(trajectories)
        return 0
    torch.set_num_threads(1)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(f"# {platform.machine()} 1 thread | commit {commit or 'unknown'} | torch {torch.__version__}")
    parallel.initialize(ParallelLayout())
    student = Student(SHAPE, ParallelLayout(), OptimizerSettings(lr=1e-3), seed=0)
    gradient_of(student, pack(nothing_shared(random.Random(0))[:2], max_tokens=16384))  # warm up
    results = [run_case(name, student) for name in CASES]
    parallel.shutdown()
    return 0 if all(results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
