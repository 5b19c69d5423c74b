"""What prefix reuse saves on real SGLang servers on a CPU: the `--engine sglang` part of `bench_rollout.py`.

    python tools/bench_rollout.py --engine sglang                 # after: bash tools/sglang_cpu_env.sh

    score       a frozen teacher scores 8 samples of 64 tokens behind a prefix that it was told ahead; the peer asks with
                logprob_start_len = 0, which takes nothing from the cache. Server CPU time, limit 3x
    b2f         30 steps of the household world back to front: which share of the reusable prefix tokens the student's
                server reuses, new weights and a flush before each step; limit 95 %. The peer does not warm up

CPU time is that of all processes of the servers (they sleep when idle), median of rounds that take turns, each with a prefix
that the server has not seen. The teacher's vocabulary is 32 times its width; in models of 1 to 8 billion weights it is 37
to 74 times, and the peer pays for the output layer on every token of the prompt. Agreement: our scores, the peer's and a
full forward of transformers are within 1e-4, and so are the log-probabilities of the last step's samples.
"""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import tempfile
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import transformers

from megatron_tcod.curriculum import Curriculum, Schedule, make_curriculum
from megatron_tcod.envs.household import Household
from megatron_tcod.packing import WeightedRow, build_microbatch, pack
from megatron_tcod.rollout.chat import TurnTokenizer
from megatron_tcod.rollout.engine import Sampling
from megatron_tcod.rollout.episodes import Assignment, PlaySettings, collect_episodes
from megatron_tcod.rollout.prefix import PrefixReuse, step_prefixes
from megatron_tcod.rollout.sglang_client import SGLangClient
from megatron_tcod.rollout.sglang_engine import SGLangEngine
from megatron_tcod.rollout.sglang_server import Server, launch
from megatron_tcod.rollout.teacher_server import ServerTeacher
from megatron_tcod.rollout.weight_sync import FromTensor
from megatron_tcod.trajectory import Demonstration, Episode, Microbatch, Task, TokenRow

ROOT = Path(__file__).parents[1]
PYTHON = Path(os.environ.get("SGLANG_VENV", ROOT / ".venv-sglang")) / "bin" / "python"
QUICKSTART = ROOT / "examples" / "quickstart" / "sglang_cpu.toml"
FLAGS = tomllib.loads(QUICKSTART.read_text())["rollout"]["server"] | {"max_total_tokens": 65536}
TOLERANCE = 1e-4
ROUNDS = 5
NUM_SAMPLES = 8
SCORED_TOKENS = 64
NUM_STEPS = 30
PEER_STEPS = 10


@dataclass(frozen=True, kw_only=True)
class ScoreCase:
    """Example: `ScoreCase(prefix_tokens=512, limit=3.0)`"""

    prefix_tokens: int
    limit: float


SCORE_CASES = (ScoreCase(prefix_tokens=512, limit=3.0), ScoreCase(prefix_tokens=2048, limit=3.0))
REUSE_LIMIT = 0.95


def build_model(*, hidden: int, layers: int, vocab: int, seed: int) -> transformers.PreTrainedModel:
    config = transformers.Qwen3Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
    )
    torch.manual_seed(seed)
    model = transformers.Qwen3ForCausalLM(config).eval()
    for parameter in model.parameters():  # larger than the default, so that log-probabilities differ
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.06)
    return model


def serve(model: transformers.PreTrainedModel, directory: Path, name: str, **flags: object) -> Server:
    model.save_pretrained(directory / name)
    return launch(
        str(directory / name),
        run_directory=directory,
        name=name,
        flags=FLAGS | flags,
        environment={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        python=str(PYTHON),
        program=str(ROOT / "tools" / "sglang_cpu_launcher.py"),
        start_timeout_s=300,
    )


def server_cpu_seconds() -> float:
    """CPU time so far of every process below this one."""
    parents, seconds = {}, {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                fields = Path(entry.path, "stat").read_text().rpartition(")")[2].split()
            except OSError:  # ended meanwhile
                continue
            parents[int(entry.name)] = int(fields[1])
            seconds[int(entry.name)] = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    below, found = {os.getpid()}, 0.0
    while new := {pid for pid, parent in parents.items() if parent in below} - below:
        below |= new
        found += sum(seconds[pid] for pid in new)
    return found


def logprobs_of(model: transformers.PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """[N - 1] of each token but the first, by one forward pass."""
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, :-1]
    return torch.log_softmax(logits, -1).gather(-1, torch.tensor(ids)[1:, None])[:, 0]


def score_rows(prefix: list[int], dice: random.Random, vocab: int) -> list[list[int]]:
    return [prefix + dice.choices(range(vocab), k=SCORED_TOKENS) for _ in range(NUM_SAMPLES)]


def as_microbatch(rows: list[list[int]], num_prefix: int) -> Microbatch:
    mask = [0] * num_prefix + [1] * (len(rows[0]) - num_prefix)
    made = [TokenRow(token_ids=row, turn_ids=[0] * len(row), loss_mask=mask, logprobs=[0.0] * sum(mask)) for row in rows]
    return build_microbatch([WeightedRow(row, [1.0] * sum(mask), i) for i, row in enumerate(made)])


def peer_scores(server: Server, rows: list[list[int]]) -> tuple[torch.Tensor, list[int]]:
    """Log-probabilities [B, N - 1] of whole rows and what came from the cache, one request a row, all at once."""

    async def ask() -> list:
        client = SGLangClient(server.url, api_key=server.api_key, admin_key=server.admin_key)
        try:
            features, sampling = await client.features(), Sampling(max_new_tokens=0, logprob_start_len=0)
            calls = [client.generate(row, sampling, request_id=str(i), features=features) for i, row in enumerate(rows)]
            return [answer for (answer,) in await asyncio.gather(*calls)]
        finally:
            await client.close()

    answers = asyncio.run(ask())
    return torch.tensor([a.input_logprobs[1:] for a in answers]), [a.cached_tokens for a in answers]


def run_score(case: ScoreCase, server: Server, teacher: ServerTeacher, model: transformers.PreTrainedModel) -> bool:
    """Measure and print one case; True where all agree and the limit is met."""
    dice, vocab, num_prefix = random.Random(case.prefix_tokens), model.config.vocab_size, case.prefix_tokens
    ours, warm, theirs, problems = [], [], [], []
    for number in range(ROUNDS + 1):  # the first round is not counted
        rows = score_rows(dice.choices(range(vocab), k=num_prefix), dice, vocab)
        before = server_cpu_seconds()
        peer, peer_cached = peer_scores(server, rows)
        theirs.append(server_cpu_seconds() - before)
        rows = rows if number == 0 else score_rows(dice.choices(range(vocab), k=num_prefix), dice, vocab)
        teacher.take_counts()
        before = server_cpu_seconds()
        teacher.warm_ahead([rows[0][:num_prefix]])
        teacher.score([])  # waits for it
        between = server_cpu_seconds()
        (target,) = teacher.score([as_microbatch(rows, num_prefix)])
        ours.append(server_cpu_seconds() - between)
        warm.append(between - before)
        counts = teacher.take_counts()
        num_cached = (counts.tokens - counts.computed) / counts.rows
        if number == 0:
            exact = torch.stack([logprobs_of(model, row)[num_prefix - 1 :] for row in rows])
            scored = target.logprob.view(NUM_SAMPLES, SCORED_TOKENS)
            errors = [(one - exact).abs().max().item() for one in (peer[:, num_prefix - 1 :], scored)]
            problems += [f"scores differ by {max(errors):.1e}"] if max(errors) > TOLERANCE else []
        elif num_cached != num_prefix - 1:
            problems.append(f"cached {num_cached} tokens a request, not {num_prefix - 1}")
        if any(peer_cached):
            problems.append("the peer used the cache")
    cost, peer_cost, warm_cost = (statistics.median(times[1:]) for times in (ours, theirs, warm))
    ratio = peer_cost / cost
    is_met = not problems and ratio >= case.limit
    print(
        f"score: G={NUM_SAMPLES} P={num_prefix} N={SCORED_TOKENS} | start 0 {peer_cost:.2f} server CPU-s, cached 0 | ours "
        f"{cost:.2f} CPU-s, cached {num_prefix - 1} a request | {ratio:.2f}x (limit {case.limit:.1f}x), with the warm-up's "
        f"{warm_cost:.2f} CPU-s {peer_cost / (cost + warm_cost):.2f}x | {'; '.join(problems) or 'results agree'} | "
        f"{'ok' if is_met else 'FAILED'}",
        flush=True,
    )
    return is_met


class UnwarmedEngine(SGLangEngine):
    """What peers do: samples go out together, and who comes first computes."""

    async def prewarm(self, prefixes: Iterable[list[int]]) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class World:
    """What a b2f run is about. Example: `World(tokenizer=..., tasks=..., demonstrations=..., curriculum=...)`"""

    tokenizer: TurnTokenizer
    tasks: list[Task]
    demonstrations: dict[str, Demonstration]
    curriculum: Curriculum
    settings: PlaySettings

    @staticmethod
    def build(directory: Path) -> World:
        """Three tasks; k grows by a turn every three steps."""
        from make_tokenizer import train_tokenizer

        tasks = Household.tasks("train", count=3)
        demonstrations = {task.task_id: Household.expert(task, seed=i) for i, task in enumerate(tasks)}
        texts = [text for one in demonstrations.values() for turn in one.turns for text in (turn.observation, turn.text)]
        train_tokenizer([*texts, "user", "assistant", "system"], 400, directory)
        lengths = {task_id: len(one.turns) for task_id, one in demonstrations.items()}
        curriculum = make_curriculum(
            "b2f",
            schedule=Schedule(k_start=1, eta=3),
            max_turns=30,
            lengths=lengths,
            stop="demonstration",
            missing="outcome",
        )
        settings = PlaySettings(max_turns=30, max_new_tokens=6, max_context=3000, seed=1)
        return World(
            tokenizer=TurnTokenizer.from_directory(directory),
            tasks=tasks,
            demonstrations=demonstrations,
            curriculum=curriculum,
            settings=settings,
        )

    def play(self, engine: SGLangEngine, step: int) -> list[Episode]:
        assignments = [
            Assignment(
                task=task,
                window=self.curriculum.window(step, task),
                sample=sample,
                demonstration=self.demonstrations[task.task_id],
            )
            for task in self.tasks
            for sample in range(NUM_SAMPLES)
        ]
        return asyncio.run(
            collect_episodes(
                Household, assignments, engine=engine, tokenizer=self.tokenizer, settings=self.settings, step=step
            )
        )

    def prefixes(self, step: int) -> list[list[int]]:
        return step_prefixes(
            step,
            self.tasks,
            curriculum=self.curriculum,
            demonstrations=self.demonstrations,
            tokenizer=self.tokenizer,
        )


def run_b2f(world: World, server: Server, teacher: ServerTeacher, models: dict) -> bool:
    """Play, score and print; True where all agree and the limit is met."""
    student = models["student"]
    options = dict(vocab_size=student.config.vocab_size, max_context=world.settings.max_context)
    weights = list(student.state_dict().items())
    teacher.take_prefix_reuse()
    engine = SGLangEngine([server], FromTensor(), **options)
    try:
        teacher.warm_ahead(world.prefixes(0))
        for step in range(NUM_STEPS):
            engine.load_weights(iter(weights), version=step)
            episodes = world.play(engine, step)
            microbatches = pack(episodes, max_tokens=8192)
            targets = teacher.score(microbatches)
            teacher.warm_ahead(world.prefixes(step + 1))
        ours = engine.take_prefix_reuse()
    finally:
        engine.close()
    peer = run_peer(world, server, weights, options)
    problem = b2f_disagreement(models, episodes, microbatches, targets)
    counts, scored = teacher.take_counts(), teacher.take_prefix_reuse()
    is_met = not problem and ours.rate >= REUSE_LIMIT
    print(
        f"b2f: {NUM_STEPS} steps, {len(world.tasks)} tasks x {NUM_SAMPLES} | unwarmed, {PEER_STEPS} steps: "
        f"{told(peer)} | ours: {told(ours)}, warmed {ours.warmed_tokens} | {ours.rate / peer.rate:.2f}x "
        f"(limit {REUSE_LIMIT:.0%} reused) | {problem or 'results agree'} | {'ok' if is_met else 'FAILED'}"
    )
    print(
        f"b2f teacher: {counts.rows} rows | {told(scored)}, warmed {scored.warmed_tokens} | computed {counts.computed} of "
        f"{counts.tokens} tokens, projected {counts.projected}, trained {counts.trained}",
        flush=True,
    )
    return is_met


def run_peer(world: World, server: Server, weights: list, options: dict) -> PrefixReuse:
    """The same run without warm-ups, on every third step."""
    engine = UnwarmedEngine([server], FromTensor(), **options)
    try:
        for step in range(0, NUM_STEPS, NUM_STEPS // PEER_STEPS):
            engine.load_weights(iter(weights), version=step)
            world.play(engine, step)
        return engine.take_prefix_reuse()
    finally:
        engine.close()


def told(reuse: PrefixReuse) -> str:
    return f"{reuse.requests} requests reused {reuse.reused_tokens} of {reuse.reusable_tokens} ({reuse.rate:.1%})"


def b2f_disagreement(models: dict, episodes: list[Episode], microbatches: list[Microbatch], targets: list) -> str:
    """Empty where the last step's log-probabilities are those of transformers; else what differs."""
    worst = {"student": 0.0, "teacher": 0.0}
    for episode in episodes:
        assert episode.outcome == "ok", f"{episode.outcome}: {episode.detail}"
        (row,) = episode.rows
        trained = torch.tensor(row.loss_mask[1:], dtype=torch.bool)
        error = logprobs_of(models["student"], row.token_ids)[trained] - torch.tensor(row.logprobs)
        worst["student"] = max(worst["student"], error.abs().max().item())
    for microbatch, target in zip(microbatches, targets, strict=True):
        bounds = microbatch.cu_seqlens.tolist()
        pieces = [logprobs_of(models["teacher"], microbatch.token_ids[a:b].tolist()) for a, b in pairwise(bounds)]
        exact = torch.cat([torch.nn.functional.pad(piece, (0, 1)) for piece in pieces])[microbatch.positions]
        worst["teacher"] = max(worst["teacher"], (exact - target.logprob).abs().max().item())
    return ", ".join(f"the {name}'s log-probabilities differ by {e:.1e}" for name, e in worst.items() if e > TOLERANCE)


def run() -> bool:
    """All cases; True where every one agrees and meets its limit."""
    if not PYTHON.exists():
        raise SystemExit(f"{PYTHON} is not there; make the servers' environment with: bash tools/sglang_cpu_env.sh")
    with tempfile.TemporaryDirectory() as directory:
        world = World.build(Path(directory) / "tokenizer")
        models = {
            "teacher": build_model(hidden=256, layers=4, vocab=8192, seed=0),
            "student": build_model(hidden=128, layers=2, vocab=world.tokenizer.vocab_size, seed=1),
        }
        teacher = server = None
        try:
            server = serve(models["teacher"], Path(directory), "teacher", enable_session_radix_cache=True)
            own = dict(api_key=server.api_key, admin_key=server.admin_key)
            teacher = ServerTeacher(lambda: SGLangClient(server.url, **own), vocab_size=world.tokenizer.vocab_size)
            is_met = [run_score(case, server, teacher, models["teacher"]) for case in SCORE_CASES]
            with serve(models["student"], Path(directory), "student") as student_server:
                is_met.append(run_b2f(world, student_server, teacher, models))
            return all(is_met)
        finally:
            if teacher is not None:
                teacher.close()
            if server is not None:
                server.stop()
