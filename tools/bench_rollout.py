"""Tokens per CPU-second: the embedded engine against `transformers.generate`, same model, same prompts, one run.

    OMP_NUM_THREADS=1 python tools/bench_rollout.py
    OMP_NUM_THREADS=1 python tools/bench_rollout.py --engine sglang       # prefix reuse on real servers: sglang_reuse.py

Prints one line a shape with the peer, the limit and the ratio, and exits 1 when the two disagree or the limit is missed.

    shared prefix   8 samples of one task behind a 512-token prefix, 64 new tokens each; the limit is 2x
    many rows       32 short conversations of the size that the quickstart plays; no limit, the cost of a step

Process CPU time on one thread, median of several rounds that take turns, the engine's prefix work included: its cache
is dropped before each round. Agreement: under greedy decoding both give the same ids, and the engine's
log-probabilities equal those of a full forward pass to 1e-4.

It measures no GPU.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
import transformers  # noqa: E402

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
from megatron_tcod.rollout.embedded_engine import EmbeddedEngine  # noqa: E402
from megatron_tcod.rollout.engine import Completion, Sampling  # noqa: E402

ROUNDS = 5


@dataclass(frozen=True)
class Case:
    """One shape. `num_prompts` prompts of `prompt_tokens` ids; equal ones stand for samples of one task."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    layers: int
    vocab: int
    num_prompts: int
    prompt_tokens: int
    is_shared: bool
    new_tokens: int
    limit: float


CASES = (
    Case("shared prefix", 256, 4, 2, 4, 1024, 8, 512, True, 64, 2.0),
    Case("many rows", 128, 4, 2, 4, 512, 32, 336, False, 64, 0.0),
)


def build_model(case: Case) -> transformers.PreTrainedModel:
    config = transformers.Qwen3Config(
        vocab_size=case.vocab,
        hidden_size=case.hidden,
        intermediate_size=3 * case.hidden,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        head_dim=case.hidden // case.heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(config).eval()
    for parameter in model.parameters():  # larger than the default, so that greedy ids are not near ties
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.06)
    return model


def build_engine(case: Case, model: transformers.PreTrainedModel) -> EmbeddedEngine:
    context = case.prompt_tokens + case.new_tokens
    engine = EmbeddedEngine(
        model.config.to_dict(),
        max_running=case.num_prompts,
        max_total_tokens=2 * case.num_prompts * context,
        max_context=context,
    )
    load(engine, model)
    return engine


def load(engine: EmbeddedEngine, model: transformers.PreTrainedModel) -> None:
    engine.load_weights(iter(model.state_dict().items()), version=0)


def engine_round(engine: EmbeddedEngine, prompts: list[list[int]], case: Case, temperature: float) -> list[Completion]:
    async def play() -> list[Completion]:
        if case.is_shared:
            await engine.prewarm(prompts[:1])
        samplings = (Sampling(max_new_tokens=case.new_tokens, temperature=temperature, seed=i) for i in range(10**6))
        return await asyncio.gather(*(engine.generate(p, s) for p, s in zip(prompts, samplings, strict=False)))

    return asyncio.run(play())


def peer_round(model: transformers.PreTrainedModel, prompts: list[list[int]], case: Case, is_greedy: bool) -> torch.Tensor:
    """New ids [B, N]."""
    ids = torch.tensor(prompts)
    options = dict(do_sample=False) if is_greedy else dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=case.new_tokens,
            min_new_tokens=case.new_tokens,
            use_cache=True,
            **options,
        )
    return out[:, ids.shape[1] :]


def disagreement(engine: EmbeddedEngine, model: transformers.PreTrainedModel, prompts: list, case: Case) -> str:
    """Empty where both give the same; else what differs."""
    ours = engine_round(engine, prompts, case, temperature=0.0)
    ids = torch.tensor([completion.token_ids for completion in ours])  # [B, N]
    theirs = peer_round(model, prompts, case, is_greedy=True)
    if not torch.equal(ids, theirs):
        return f"greedy ids differ in {int((ids != theirs).any(1).sum())} of {len(ids)} rows"
    with torch.inference_mode():
        logits = model(torch.cat([torch.tensor(prompts), ids], dim=1)).logits[:, case.prompt_tokens - 1 : -1]
    expected = torch.log_softmax(logits, -1).gather(-1, ids[..., None])[..., 0]  # [B, N]
    error = (expected - torch.tensor([completion.logprobs for completion in ours])).abs().max().item()
    return "" if error <= 1e-4 else f"log-probabilities differ by {error:.1e}"


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def run_case(case: Case) -> bool:
    """Measure and print one case; True where it agrees and meets its limit."""
    model = build_model(case)
    engine = build_engine(case, model)
    prompts = torch.randint(0, case.vocab, (case.num_prompts, case.prompt_tokens)).tolist()
    prompts = [prompts[0]] * case.num_prompts if case.is_shared else prompts
    problem = disagreement(engine, model, prompts, case)
    ours, theirs = [], []
    for _ in range(ROUNDS):
        load(engine, model)  # drops every cached prefix
        ours.append(cpu_seconds(lambda: engine_round(engine, prompts, case, temperature=1.0)))
        theirs.append(cpu_seconds(lambda: peer_round(model, prompts, case, is_greedy=False)))
    num_tokens = case.num_prompts * case.new_tokens
    ratio = statistics.median(theirs) / statistics.median(ours)
    is_met = not problem and ratio >= case.limit
    print(
        f"{case.name}: B={case.num_prompts} P={case.prompt_tokens} N={case.new_tokens} hidden={case.hidden} "
        f"layers={case.layers} V={case.vocab} | engine {num_tokens / statistics.median(ours):.0f} tokens/CPU-s | "
        f"transformers.generate {num_tokens / statistics.median(theirs):.0f} tokens/CPU-s | {ratio:.2f}x "
        f"(limit {case.limit:.1f}x) | {problem or 'results agree'} | {'ok' if is_met else 'FAILED'}"
    )
    return is_met


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("embedded", "sglang"), default="embedded")
    engine = parser.parse_args().engine
    torch.set_num_threads(1)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(
        f"{platform.machine()} cpu, 1 thread | commit {commit or 'unknown'} | torch {torch.__version__} | "
        f"transformers {transformers.__version__} | median of {ROUNDS} rounds"
    )
    if engine == "sglang":
        import sglang_reuse  # needs aiohttp

        is_met = sglang_reuse.run()
    else:
        is_met = all([run_case(case) for case in CASES])
    if not is_met:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
