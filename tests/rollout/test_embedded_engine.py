"""The embedded engine against transformers and against SGLang's documented behaviour."""

import asyncio
import random

import pytest
import torch
from tiny_hf import logprobs_of, tiny_model
from torch.overrides import TorchFunctionMode

from megatron_tcod.rollout.embedded_engine import EmbeddedEngine, NonFiniteLogits
from megatron_tcod.rollout.engine import Sampling

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen3")


def engine_of(model, *, version=0, **options):
    limits = dict(max_running=8, max_total_tokens=4096, max_context=256) | options
    engine = EmbeddedEngine(model.config.to_dict(), **limits)
    engine.load_weights(iter(model.state_dict().items()), version)
    return engine


def generate(engine, prompts, **options):
    """Completions of all prompts at once; request i gets seed i."""

    async def play():
        calls = [
            engine.generate(prompt, Sampling(**({"max_new_tokens": 8, "seed": i} | options)))
            for i, prompt in enumerate(prompts)
        ]
        return await asyncio.gather(*calls)

    return asyncio.run(play())


def prompts_of(*lengths, seed=0):
    dice = random.Random(seed)
    return [dice.choices(range(97), k=length) for length in lengths]


class TorchRunsOutOfMemory(TorchFunctionMode):
    """Within it the embedding of forward pass `at_pass` fails."""

    def __init__(self, *, at_pass):
        super().__init__()
        self.passes_left = at_pass

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.embedding:
            self.passes_left -= 1
            if not self.passes_left:
                raise MemoryError("no memory")
        return function(*args, **(kwargs or {}))


def assert_exact(model, prompt, completion):
    expected = logprobs_of(model, prompt + completion.token_ids)[len(prompt) - 1 :]
    torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama3_rope"])
def test_logprobs_equal_transformers_cold_and_from_cache(family):
    model = tiny_model(family)
    engine = engine_of(model)
    prompts = prompts_of(1, 2, 37, 120, 64)
    cold = generate(engine, prompts)
    warm = generate(engine, prompts)
    for prompt, first, second in zip(prompts, cold, warm, strict=True):
        assert_exact(model, prompt, first)
        assert_exact(model, prompt, second)
        assert first.token_ids == second.token_ids
        assert (first.cached_tokens, second.cached_tokens) == (0, len(prompt) - 1)
        assert first.prompt_tokens == len(prompt) and first.finish_reason == "length"


def test_greedy_ids_equal_transformers_generate(model):
    prompt = prompts_of(40)[0]
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=20, min_new_tokens=20, do_sample=False, pad_token_id=0)
    (completion,) = generate(engine_of(model), [prompt], max_new_tokens=20, temperature=0.0)
    assert completion.token_ids == expected[0, 40:].tolist()


def test_temperature_scales_the_reported_logprobs(model):
    prompt = prompts_of(30)[0]
    (completion,) = generate(engine_of(model), [prompt], temperature=0.7, top_k=5, top_p=0.9)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion.token_ids])).logits[0, 29:-1]
    expected = torch.log_softmax(logits / 0.7, -1).gather(-1, torch.tensor(completion.token_ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=TOLERANCE)


def test_sampled_tokens_but_the_last_enter_the_cache_for_the_next_turn(model):
    engine = engine_of(model)
    history, cached = prompts_of(50)[0], []
    for turn in range(4):
        (completion,) = generate(engine, [history], max_new_tokens=6)
        assert_exact(model, history, completion)
        cached.append(completion.cached_tokens)
        end = len(history) + 5  # prompt and five of six sampled tokens
        history = history + completion.token_ids + prompts_of(9, seed=turn)[0]
    assert cached == [0, 55, 70, 85] and end == 100


def test_a_continued_turn_is_right_when_another_request_took_its_row(model):
    engine = engine_of(model, max_running=1)
    history = prompts_of(40)[0]
    for turn in range(3):
        (completion,) = generate(engine, [history])
        assert_exact(model, history, completion)
        (other,) = generate(engine, prompts_of(90, seed=100 + turn))
        assert_exact(model, prompts_of(90, seed=100 + turn)[0], other)
        history = history + completion.token_ids + [1, 2, 3]
    assert generate(engine, [history])[0].cached_tokens == len(history) - 4


def test_prewarmed_prefixes_are_computed_once(model):
    engine = engine_of(model)
    task = prompts_of(100)[0]
    prompts = [task + tail for tail in prompts_of(5, 6, 7, 8, seed=3)]
    asyncio.run(engine.prewarm([task, task]))
    assert engine.counters.computed_tokens == 100 and engine.num_held_tokens == 100
    for prompt, completion in zip(prompts, generate(engine, prompts), strict=True):
        assert completion.cached_tokens == 100
        assert_exact(model, prompt, completion)
    assert engine.counters.computed_tokens == 100 + 26


def test_prewarm_computes_what_all_prefixes_share_once(model):
    engine = engine_of(model)
    system = prompts_of(64)[0]
    asyncio.run(engine.prewarm([system + tail for tail in prompts_of(10, 20, 30, seed=4)]))
    assert engine.counters.computed_tokens == 64 + 60


def test_equal_cold_prompts_wait_for_the_first(model):
    engine = engine_of(model)
    prompt = prompts_of(120)[0]
    completions = generate(engine, [prompt] * 4)
    assert [c.cached_tokens for c in completions] == [0, 119, 119, 119]
    assert len({tuple(c.token_ids) for c in completions}) == 4  # their seeds differ
    for completion in completions:
        assert_exact(model, prompt, completion)


@pytest.mark.parametrize("start,cached", [(-1, 99), (0, 0), (1, 1), (50, 50), (63, 63), (64, 64), (80, 80), (99, 99)])
def test_logprob_start_len_limits_reuse_and_returns_prompt_logprobs(model, start, cached):
    engine = engine_of(model)
    prompt = prompts_of(100)[0]
    asyncio.run(engine.prewarm([prompt]))
    (completion,) = generate(engine, [prompt], logprob_start_len=start, max_new_tokens=3)
    assert completion.cached_tokens == cached
    assert_exact(model, prompt, completion)
    if start < 0:
        assert completion.input_logprobs == []
        return
    assert completion.input_logprobs[0] is None and len(completion.input_logprobs) == 100 - start
    expected = logprobs_of(model, prompt)[start:]
    torch.testing.assert_close(torch.tensor(completion.input_logprobs[1:]), expected, rtol=0, atol=TOLERANCE)


def test_input_logprobs_are_those_of_temperature_one(model):
    prompt = prompts_of(40)[0]
    (completion,) = generate(engine_of(model), [prompt], logprob_start_len=0, max_new_tokens=0, temperature=0.3)
    assert (completion.token_ids, completion.logprobs, completion.finish_reason) == ([], [], "length")
    expected = logprobs_of(model, prompt)
    torch.testing.assert_close(torch.tensor(completion.input_logprobs[1:]), expected, rtol=0, atol=TOLERANCE)


def test_a_prompt_longer_than_one_pass_is_computed_in_pieces(model):
    engine = engine_of(model, prefill_tokens=48)
    prompts = prompts_of(200, 7, 111)
    completions = generate(engine, prompts, logprob_start_len=3)
    assert engine.counters.prefill_passes >= 7
    for prompt, completion in zip(prompts, completions, strict=True):
        assert_exact(model, prompt, completion)
        expected = logprobs_of(model, prompt)[3:]
        torch.testing.assert_close(torch.tensor(completion.input_logprobs[1:]), expected, rtol=0, atol=TOLERANCE)


def test_a_completion_does_not_depend_on_what_else_runs(model):
    prompts = prompts_of(30, 31, 60, 90, 5, 44, 17, 80, 71, 12, 33, 40)
    together = generate(engine_of(model), prompts, max_new_tokens=12)
    for i, prompt in enumerate(prompts):
        engine = engine_of(model, max_running=1)
        alone = asyncio.run(engine.generate(prompt, Sampling(max_new_tokens=12, seed=i)))
        assert alone.token_ids == together[i].token_ids
        torch.testing.assert_close(torch.tensor(alone.logprobs), torch.tensor(together[i].logprobs), rtol=0, atol=1e-5)


def test_the_same_requests_give_bit_identical_results(model):
    prompts = prompts_of(30, 31, 60, 90, 5, 44, 17, 80, 71, 12, 33, 40)
    first, second = (generate(engine_of(model), prompts, max_new_tokens=12) for _ in range(2))
    assert first == second


def test_stop_tokens_end_a_row_while_others_go_on(model):
    engine = engine_of(model)
    prompts = prompts_of(20, 20, 20, 20)
    free = generate(engine, prompts, max_new_tokens=30)
    stops = (free[0].token_ids[3], free[2].token_ids[11])
    stopped = generate(engine_of(model), prompts, max_new_tokens=30, stop_token_ids=stops)
    for long, short in zip(free, stopped, strict=True):
        at = next((i for i, token in enumerate(long.token_ids) if token in stops), None)
        expected = long.token_ids if at is None else long.token_ids[: at + 1]
        assert short.token_ids == expected
        assert short.finish_reason == ("length" if at is None else "stop")


def test_a_tiny_budget_evicts_and_stays_exact(model):
    engine = engine_of(model, max_running=3, max_total_tokens=130, max_context=120)
    dice = random.Random(5)
    tasks = prompts_of(40, 50, 60, seed=6)
    for round_number in range(6):
        prompts = [dice.choice(tasks) + prompts_of(dice.randint(1, 30), seed=dice.random())[0] for _ in range(7)]
        completions = generate(engine, prompts)
        assert engine.num_held_tokens <= 130, round_number
        for prompt, completion in zip(prompts, completions, strict=True):
            assert_exact(model, prompt, completion)
    assert engine._num_reserved == 0 and engine._tree.num_pinned_tokens == 0
    assert engine._tree.num_evicted_tokens > 0
    assert engine.counters.cached_tokens > 0


def test_new_weights_drop_every_cached_prefix_and_answer_like_the_new_model(model):
    engine, newer = engine_of(model), tiny_model("qwen3", seed=9)
    prompts = prompts_of(60, 61)
    assert [c.weight_version for c in generate(engine, prompts)] == [0, 0]
    engine.load_weights(iter(newer.state_dict().items()), version=1)
    assert (engine.version, engine.num_held_tokens) == (1, 0)
    for prompt, completion in zip(prompts, generate(engine, prompts), strict=True):
        assert (completion.weight_version, completion.cached_tokens) == (1, 0)
        assert_exact(newer, prompt, completion)


def test_released_holds_neither_cache_nor_weights(model):
    engine = engine_of(model)
    generate(engine, prompts_of(60))
    with engine.released():
        assert engine.num_held_tokens == 0 and not engine._decoder.layers and engine._rows is None
        with pytest.raises(RuntimeError, match="holds no weights"):
            generate(engine, prompts_of(10))
        with pytest.raises(RuntimeError, match="leave the block first"):
            engine.load_weights(iter(model.state_dict().items()), version=1)
    with pytest.raises(RuntimeError, match="call load_weights first"):
        generate(engine, prompts_of(10))
    engine.load_weights(iter(model.state_dict().items()), version=1)
    assert_exact(model, prompts_of(10)[0], generate(engine, prompts_of(10))[0])


def test_padding_rows_of_the_head_are_no_part_of_the_distribution(model):
    engine = engine_of(model, vocab_size=90)
    prompt = [token % 90 for token in prompts_of(30)[0]]
    completions = generate(engine, [prompt] * 8, max_new_tokens=20, temperature=3.0)
    assert max(token for c in completions for token in c.token_ids) < 90
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completions[0].token_ids])).logits[0, 29:-1, :90]
    expected = torch.log_softmax(logits / 3.0, -1).gather(-1, torch.tensor(completions[0].token_ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(completions[0].logprobs), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "prompt,options,message",
    [
        ([], {}, "at least one id"),
        ([1, 97], {}, r"must lie in \[0, 97\)"),
        ([-1], {}, r"must lie in \[0, 97\)"),
        ([1] * 250, {}, "must fit max_context 256"),
        ([1], {"max_new_tokens": -1}, "max_new_tokens -1"),
        ([1], {"logprob_start_len": 1}, "logprob_start_len 1 must lie in"),
        ([1], {"temperature": -1.0}, "temperature -1.0"),
        ([1], {"top_p": 0.0}, "top_p 0.0"),
        ([1], {"top_k": 0}, "top_k 0"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_and_hurts_nobody(model, prompt, options, message):
    engine = engine_of(model)

    async def play():
        good = asyncio.ensure_future(engine.generate(prompts_of(20)[0], Sampling(max_new_tokens=8)))
        with pytest.raises(ValueError, match=message):
            await engine.generate(prompt, Sampling(**({"max_new_tokens": 8} | options)))
        return await good

    assert_exact(model, prompts_of(20)[0], asyncio.run(play()))


def test_a_request_the_model_breaks_on_fails_alone():
    broken = tiny_model("qwen3")
    with torch.no_grad():
        broken.model.embed_tokens.weight[13] = float("nan")
    engine = engine_of(broken)
    good, bad = [token for token in prompts_of(60)[0] if token != 13][:40], [5] * 45 + [13]

    async def play():
        sampling = Sampling(max_new_tokens=6, seed=1, top_k=1)
        calls = [engine.generate(prompt, sampling) for prompt in (good, bad, good[:20], bad[1:])]
        return await asyncio.gather(*calls, return_exceptions=True)

    for _ in range(2):  # the second time in rows that held what is no number
        first, second, third, fourth = asyncio.run(play())
        assert isinstance(second, NonFiniteLogits) and isinstance(fourth, NonFiniteLogits)
        assert_exact(broken, good, first)
        assert_exact(broken, good[:20], third)
    engine.load_weights(iter(tiny_model("qwen3").state_dict().items()), version=1)
    assert_exact(tiny_model("qwen3"), bad, generate(engine, [bad])[0])


def test_an_error_in_the_loop_reaches_everyone_who_waits_and_the_engine_recovers(model):
    engine = engine_of(model, max_running=2)

    async def play():
        calls = [engine.generate(p, Sampling(max_new_tokens=8)) for p in prompts_of(20, 21, 22, 23)]
        with TorchRunsOutOfMemory(at_pass=4):
            return await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), timeout=20)

    assert [type(result) for result in asyncio.run(play())] == [MemoryError] * 4
    prompt = prompts_of(33)[0]
    assert_exact(model, prompt, generate(engine, [prompt])[0])


def test_cancelled_callers_leave_nothing_behind(model):
    engine = engine_of(model, max_running=2)

    async def play():
        tasks = [
            asyncio.ensure_future(engine.generate(p, Sampling(max_new_tokens=100, seed=i)))
            for i, p in enumerate(prompts_of(20, 21, 22, 23))
        ]
        for _ in range(5):
            await asyncio.sleep(0)
        tasks[0].cancel()
        tasks[3].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    results = asyncio.run(play())
    assert [isinstance(r, asyncio.CancelledError) for r in results] == [True, False, False, True]
    assert_exact(model, prompts_of(20, 21)[1], results[1])
    assert engine._num_reserved == 0 and engine._tree.num_pinned_tokens == 0


def test_a_dying_event_loop_leaves_a_usable_engine(model):
    engine = engine_of(model)

    async def give_up():
        task = asyncio.ensure_future(engine.generate(prompts_of(20)[0], Sampling(max_new_tokens=200)))
        await asyncio.sleep(0.01)
        assert not task.done()

    asyncio.run(give_up())
    assert_exact(model, prompts_of(20)[0], generate(engine, prompts_of(20))[0])


def test_weights_cannot_change_under_a_running_request(model):
    engine = engine_of(model)

    async def play():
        task = asyncio.ensure_future(engine.generate(prompts_of(20)[0], Sampling(max_new_tokens=20)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="cannot take weights while 1 requests are in flight"):
            engine.load_weights(iter(model.state_dict().items()), version=1)
        with pytest.raises(RuntimeError, match="cannot be released"), engine.released():
            pass
        return await task

    assert asyncio.run(play()).weight_version == 0


def test_limits_that_cannot_work_are_refused(model):
    config = model.config.to_dict()
    with pytest.raises(ValueError, match="cannot hold one request"):
        EmbeddedEngine(config, max_running=1, max_total_tokens=10, max_context=20)
    with pytest.raises(ValueError, match="max_running >= 1"):
        EmbeddedEngine(config, max_running=0, max_total_tokens=20, max_context=20)
    with pytest.raises(ValueError, match="vocab_size 98 must lie in"):
        EmbeddedEngine(config, max_running=1, max_total_tokens=20, max_context=20, vocab_size=98)


def test_many_random_turns_of_many_callers_stay_exact(model):
    """Staggered multi-turn callers over few rows and a small budget: every mixture of waiting, parked and evicted."""
    engine = engine_of(model, max_running=3, max_total_tokens=400, max_context=200)
    results = []

    async def caller(number):
        dice = random.Random(number)
        history = prompts_of(30, seed=number % 3)[0]
        for turn in range(5):
            sampling = Sampling(max_new_tokens=dice.randint(1, 9), seed=10 * number + turn, stop_token_ids=(3, 50))
            completion = await engine.generate(history, sampling)
            results.append((history, completion))
            history = history + completion.token_ids + dice.choices(range(97), k=dice.randint(1, 14))

    async def play():
        await asyncio.gather(*(caller(number) for number in range(9)))

    asyncio.run(play())
    assert len(results) == 45
    for history, completion in results:
        assert_exact(model, history, completion)
    assert engine.counters.cached_tokens > engine.counters.prompt_tokens / 3
    assert engine._num_reserved == 0 and engine.num_held_tokens <= 400
