"""The rollout contract, over every engine: the embedded one always, real SGLang servers with `pytest -m sglang`.

References are transformers' forward in float64 and its greedy search. `test_embedded_engine.py` has what only an engine
inside the process can promise.
"""

import asyncio
import dataclasses
import random

import pytest
import torch
from sglang_process import MAX_CONTEXT, launch_on_cpu, served_model

from megatron_tcod.rollout.embedded_engine import EmbeddedEngine
from megatron_tcod.rollout.engine import Sampling

TOLERANCE = 1e-4
ENGINES = ["embedded", pytest.param("sglang", marks=pytest.mark.sglang)]


@pytest.fixture(scope="module")
def model():
    return served_model()


@pytest.fixture(scope="module")
def exact():
    """The same model in float64."""
    return served_model().double()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with launch_on_cpu(tmp_path_factory.mktemp("sglang")) as server:
        yield server


@pytest.fixture(params=ENGINES)
def make_engine(request, model):
    """Engines over `model` as version 0; keyword `vocab_size` leaves padding rows."""
    made = []

    def make(*, vocab_size=97, **options):
        if request.param == "embedded":
            limits = dict(max_running=8, max_total_tokens=8192, max_context=MAX_CONTEXT)
            engine = EmbeddedEngine(model.config.to_dict(), vocab_size=vocab_size, **limits)
        else:
            engine = sglang_engine(request.getfixturevalue("server"), vocab_size=vocab_size, **options)
            made.append(engine)
        engine.load_weights(iter(model.state_dict().items()), version=0)
        return engine

    yield make
    for engine in made:
        engine.close()


def sglang_engine(server, *, sync=None, **options):
    pytest.importorskip("aiohttp")
    from megatron_tcod.rollout.sglang_engine import SGLangEngine
    from megatron_tcod.rollout.weight_sync import FromTensor

    return SGLangEngine(
        [server], sync or FromTensor(), **dict(vocab_size=97, head_rows=97, max_context=MAX_CONTEXT) | options
    )


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


def reference(exact, prompt, token_ids, *, temperature=1.0, num_ids=None):
    """Log-probabilities of `token_ids` after `prompt`, and of the prompt's own tokens but the first, in float64."""
    ids = torch.tensor([prompt + token_ids])
    with torch.no_grad():
        logits = exact(ids).logits[0, :-1, :num_ids] / temperature  # [N - 1, V]
    logprobs = torch.log_softmax(logits, -1).gather(-1, ids[0, 1:, None])[:, 0]
    return logprobs[len(prompt) - 1 :], logprobs[: len(prompt) - 1]


def worst(exact, prompt, completion, **options):
    expected, _ = reference(exact, prompt, completion.token_ids, **options)
    return float((torch.tensor(completion.logprobs, dtype=torch.float64) - expected).abs().max())


def test_logprobs_equal_a_float64_forward_cold_and_cached(make_engine, exact):
    engine = make_engine()
    prompts = prompts_of(1, 2, 37, 120, 64)
    cold, warm = generate(engine, prompts), generate(engine, prompts)
    for prompt, first, second in zip(prompts, cold, warm, strict=True):
        assert worst(exact, prompt, first) <= TOLERANCE and worst(exact, prompt, second) <= TOLERANCE
        assert first.token_ids == second.token_ids and len(first.token_ids) == 8
        assert (first.cached_tokens, second.cached_tokens) == (0, len(prompt) - 1)
        assert (first.prompt_tokens, first.finish_reason, first.weight_version) == (len(prompt), "length", 0)
        assert first.input_logprobs == []


def test_greedy_ids_equal_transformers(make_engine, exact):
    (prompt,) = prompts_of(40)
    expected = exact.generate(torch.tensor([prompt]), max_new_tokens=20, min_new_tokens=20, do_sample=False, pad_token_id=0)
    (completion,) = generate(make_engine(), [prompt], max_new_tokens=20, temperature=0.0)
    assert completion.token_ids == expected[0, 40:].tolist()
    assert worst(exact, prompt, completion) <= TOLERANCE  # greedy reports temperature 1


def test_a_seed_fixes_the_tokens_whatever_else_runs(make_engine):
    engine = make_engine()
    prompts = prompts_of(30, 31, 60, 90, 5, 44)
    together = generate(engine, prompts, max_new_tokens=12)
    for seed, prompt in enumerate(prompts):
        alone = asyncio.run(engine.generate(prompt, Sampling(max_new_tokens=12, seed=seed)))
        assert alone.token_ids == together[seed].token_ids
    same_prompt = generate(engine, [prompts[0]] * 6, max_new_tokens=12)
    assert len({tuple(completion.token_ids) for completion in same_prompt}) == 6
    big = asyncio.run(engine.generate(prompts[0], Sampling(max_new_tokens=12, seed=2**63 - 1)))
    assert big.token_ids != together[0].token_ids


def test_temperature_scales_the_reported_logprobs_and_nuclei_do_not(make_engine, exact):
    (prompt,) = prompts_of(30)
    (completion,) = generate(make_engine(), [prompt], temperature=0.7, top_k=5, top_p=0.9)
    assert worst(exact, prompt, completion, temperature=0.7) <= TOLERANCE
    with torch.no_grad():
        top = exact(torch.tensor([prompt + completion.token_ids])).logits[0, 29:-1].topk(5).indices
    assert all(token in row for token, row in zip(completion.token_ids, top.tolist(), strict=True))


@pytest.mark.parametrize("start,cached", [(-1, 99), (0, 0), (1, 1), (50, 50), (64, 64), (99, 99)])
def test_logprob_start_len_returns_prompt_logprobs_and_limits_reuse(make_engine, exact, start, cached):
    engine = make_engine()
    (prompt,) = prompts_of(100)
    asyncio.run(engine.prewarm([prompt]))
    (completion,) = generate(engine, [prompt], logprob_start_len=start, max_new_tokens=3)
    assert completion.cached_tokens == cached
    assert worst(exact, prompt, completion) <= TOLERANCE
    if start < 0:
        assert completion.input_logprobs == []
        return
    assert completion.input_logprobs[0] is None and len(completion.input_logprobs) == 100 - start
    _, expected = reference(exact, prompt, [])
    found = torch.tensor(completion.input_logprobs[1:], dtype=torch.float64)
    torch.testing.assert_close(found, expected[start:], rtol=0, atol=TOLERANCE)


def test_scoring_asks_for_no_token_and_is_of_temperature_one(make_engine, exact):
    (prompt,) = prompts_of(40)
    (completion,) = generate(make_engine(), [prompt], logprob_start_len=0, max_new_tokens=0, temperature=0.3)
    assert (completion.token_ids, completion.logprobs, completion.finish_reason) == ([], [], "length")
    _, expected = reference(exact, prompt, [])
    found = torch.tensor(completion.input_logprobs[1:], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


def test_sampled_tokens_but_the_last_are_cached_for_the_next_turn(make_engine, exact):
    engine = make_engine()
    history, cached = prompts_of(50)[0], []
    for turn in range(4):
        (completion,) = generate(engine, [history], max_new_tokens=6)
        assert worst(exact, history, completion) <= TOLERANCE
        cached.append(completion.cached_tokens)
        history = history + completion.token_ids + prompts_of(9, seed=turn)[0]
    assert cached == [0, 55, 70, 85]


def test_a_prewarmed_prefix_is_reused_whole_by_all_its_samples(make_engine, exact):
    engine = make_engine()
    (task,) = prompts_of(100)
    prompts = [task + tail for tail in prompts_of(5, 6, 7, 8, seed=3)]
    asyncio.run(engine.prewarm([task, task[:40], task]))
    for prompt, completion in zip(prompts, generate(engine, prompts), strict=True):
        assert completion.cached_tokens == 100
        assert worst(exact, prompt, completion) <= TOLERANCE
    reuse = engine.take_prefix_reuse()
    assert (reuse.requests, reuse.reused_tokens, reuse.recomputed_tokens, reuse.warmed_tokens) == (4, 400, 0, 100)


def test_a_stop_token_ends_its_completion_as_the_last_id(make_engine):
    engine = make_engine()
    prompts = prompts_of(20, 21, 22, 23)
    free = generate(engine, prompts, max_new_tokens=24)
    stops = (free[0].token_ids[3], free[2].token_ids[11])
    for long, short in zip(free, generate(engine, prompts, max_new_tokens=24, stop_token_ids=stops), strict=True):
        at = next((i for i, token in enumerate(long.token_ids) if token in stops), None)
        assert short.token_ids == (long.token_ids if at is None else long.token_ids[: at + 1])
        assert short.finish_reason == ("length" if at is None else "stop")
        assert len(short.logprobs) == len(short.token_ids)


def test_new_weights_drop_every_cached_prefix(make_engine):
    engine, newer = make_engine(), served_model(seed=9)
    prompts = prompts_of(60, 61)
    assert [completion.weight_version for completion in generate(engine, prompts)] == [0, 0]
    engine.load_weights(iter(newer.state_dict().items()), version=1)
    assert engine.version == 1
    newer = newer.double()
    for prompt, completion in zip(prompts, generate(engine, prompts), strict=True):
        assert (completion.weight_version, completion.cached_tokens) == (1, 0)
        assert worst(newer, prompt, completion) <= TOLERANCE


def test_released_then_loaded_it_answers_again(make_engine, model, exact):
    engine = make_engine()
    (prompt,) = prompts_of(60)
    generate(engine, [prompt])
    with engine.released():
        with pytest.raises(RuntimeError):
            generate(engine, [prompt])
        with pytest.raises(RuntimeError, match="leave the block first"):
            engine.load_weights(iter(model.state_dict().items()), version=1)
    with pytest.raises(RuntimeError, match="call load_weights first"):
        generate(engine, [prompt])
    engine.load_weights(iter(model.state_dict().items()), version=1)
    (completion,) = generate(engine, [prompt])
    assert (completion.cached_tokens, completion.weight_version) == (0, 1)
    assert worst(exact, prompt, completion) <= TOLERANCE


def test_padding_rows_of_the_head_are_no_part_of_the_distribution(make_engine, exact):
    engine = make_engine(vocab_size=90)
    prompt = [token % 90 for token in prompts_of(30)[0]]
    completions = generate(engine, [prompt] * 8, max_new_tokens=20, temperature=3.0)
    assert max(token for completion in completions for token in completion.token_ids) < 90
    for completion in completions:
        assert worst(exact, prompt, completion, temperature=3.0, num_ids=90) <= TOLERANCE


@pytest.mark.parametrize(
    "prompt,options,message",
    [
        ([], {}, "at least one id"),
        ([1, 97], {}, r"must lie in \[0, 97\)"),
        ([-1], {}, r"must lie in \[0, 97\)"),
        ([1] * (MAX_CONTEXT - 5), {}, f"must fit max_context {MAX_CONTEXT}"),
        ([1], {"max_new_tokens": -1}, "max_new_tokens -1"),
        ([1], {"logprob_start_len": 1}, "logprob_start_len 1 must lie in"),
        ([1], {"temperature": -1.0}, "temperature -1.0"),
        ([1], {"top_p": 0.0}, "top_p 0.0"),
        ([1], {"top_k": 0}, "top_k 0"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_and_hurts_nobody(make_engine, exact, prompt, options, message):
    engine = make_engine()

    async def play():
        good = asyncio.ensure_future(engine.generate(prompts_of(20)[0], Sampling(max_new_tokens=8)))
        with pytest.raises(ValueError, match=message):
            await engine.generate(prompt, Sampling(**({"max_new_tokens": 8} | options)))
        return await good

    assert worst(exact, prompts_of(20)[0], asyncio.run(play())) <= TOLERANCE


def test_the_longest_request_that_is_promised_is_served(make_engine, exact):
    (prompt,) = prompts_of(MAX_CONTEXT - 8)
    (completion,) = generate(make_engine(), [prompt])
    assert len(completion.token_ids) == 8 and worst(exact, prompt, completion) <= TOLERANCE


def test_weights_cannot_change_under_a_running_request(make_engine, model):
    engine = make_engine()

    async def play():
        task = asyncio.ensure_future(engine.generate(prompts_of(20)[0], Sampling(max_new_tokens=20)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="cannot take weights while 1 requests are in flight"):
            engine.load_weights(iter(model.state_dict().items()), version=1)
        return await task

    assert asyncio.run(play()).weight_version == 0


# What only servers can get wrong.


@pytest.mark.sglang
@pytest.mark.parametrize("path", ["disk", "tensor", "distributed"])
def test_each_way_of_updating_gives_the_new_models_logprobs(server, path, tmp_path):
    from megatron_tcod.rollout.weight_sync import FromDisk, FromDistributed, FromTensor

    sync = {
        "disk": lambda: FromDisk(tmp_path / "weights", tmp_path, shard_bytes=100_000),
        "tensor": lambda: FromTensor(bucket_bytes=50_000),
        "distributed": lambda: FromDistributed(backend="gloo", bucket_bytes=50_000),
    }[path]()
    engine = sglang_engine(server, sync=sync)
    prompts = prompts_of(60, 33)
    for version, seed in enumerate((21, 22, 23)):
        newer = served_model(seed=seed)
        engine.load_weights(iter(newer.state_dict().items()), version=version)
        newer = newer.double()
        for _ in ("cold", "cached"):
            for prompt, completion in zip(prompts, generate(engine, prompts), strict=True):
                assert worst(newer, prompt, completion) <= TOLERANCE and completion.weight_version == version
    assert engine.counters.unproven_updates == 0
    if path == "disk":
        assert [directory.name for directory in (tmp_path / "weights").iterdir()] == ["2"]  # older ones are gone
    engine.close()


def forgetful_client(*, has_salt):
    """A client that loses flushes; without salt nothing then keeps the old weights' prefixes out."""
    from megatron_tcod.rollout.sglang_client import SGLangClient

    class Forgetful(SGLangClient):
        async def flush(self, timeout_s):
            pass

        async def features(self):
            features = await super().features()
            return features if has_salt else dataclasses.replace(features, salt_field="")

    return Forgetful


@pytest.mark.sglang
@pytest.mark.parametrize("has_salt", [True, False])
def test_a_lost_flush_is_harmless_with_the_salt_and_shows_without(server, model, has_salt):
    engine, newer = sglang_engine(server, client_type=forgetful_client(has_salt=has_salt)), served_model(seed=9)
    (prompt,) = prompts_of(80, seed=17 + has_salt)
    engine.load_weights(iter(model.state_dict().items()), version=100)
    generate(engine, [prompt])
    engine.load_weights(iter(newer.state_dict().items()), version=101)
    (completion,) = generate(engine, [prompt])
    error = worst(newer.double(), prompt, completion)
    if has_salt:
        assert completion.cached_tokens == 0 and error <= TOLERANCE
    else:
        assert completion.cached_tokens == 79 and error > 1000 * TOLERANCE
    engine.close()


@pytest.mark.sglang
def test_one_wrong_element_in_the_server_is_found_and_the_weights_refused(server, model):
    from megatron_tcod.rollout.weight_proof import UnprovenWeights
    from megatron_tcod.rollout.weight_sync import FromTensor

    class Corrupting(FromTensor):
        def push(self, links, weights, version):
            expected = super().push(links, weights, version)
            name = "model.layers.1.self_attn.v_proj.weight"
            wrong = model.state_dict()[name].clone()
            wrong[3, 4] += 1e-6
            self._copy.tensors = [(name, wrong)]
            self.restore(links[0], version)
            return expected

    engine = sglang_engine(server, sync=Corrupting())
    with pytest.raises(UnprovenWeights, match="1 of 27 tensors differ.*layers.1.self_attn.qkv_proj"):
        engine.load_weights(iter(model.state_dict().items()), version=5)
    with pytest.raises(RuntimeError, match="no proven weights"):
        generate(engine, prompts_of(5))
    engine.close()


@pytest.mark.sglang
def test_a_probe_finds_what_the_server_computes_otherwise(server, model, exact):
    from megatron_tcod.rollout.sglang_engine import Probe
    from megatron_tcod.rollout.weight_proof import UnprovenWeights

    (prompt,) = prompts_of(50)
    _, expected = reference(exact, prompt, [])
    shift = [0.0, 1e-3]
    engine = sglang_engine(
        server, probe=lambda: Probe(token_ids=prompt, logprobs=(expected + shift[0]).tolist(), tolerance=TOLERANCE)
    )
    engine.load_weights(iter(model.state_dict().items()), version=0)
    shift.pop(0)
    with pytest.raises(UnprovenWeights, match="1.00e-03 from the trainer's"):
        engine.load_weights(iter(model.state_dict().items()), version=1)
    engine.close()


@pytest.mark.sglang
def test_samples_of_one_prompt_compute_it_once(server, model, exact):
    engine = sglang_engine(server)
    engine.load_weights(iter(model.state_dict().items()), version=0)
    (prompt,) = prompts_of(90, seed=5)
    samplings = [Sampling(max_new_tokens=6, seed=seed) for seed in range(4)]
    completions = asyncio.run(engine.generate_samples(prompt, samplings))
    assert [completion.cached_tokens for completion in completions] == [89] * 4
    assert len({tuple(completion.token_ids) for completion in completions}) == 4
    for completion in completions:
        assert worst(exact, prompt, completion) <= TOLERANCE
    assert engine.take_prefix_reuse().warmed_tokens == 90
    engine.close()


@pytest.mark.sglang
def test_running_requests_survive_an_update_and_mixed_samples_are_refused_or_named(server, model):
    """With staleness 0 an update waits for nobody and is refused; with 1 the sample carries its oldest version."""
    engine, newer = sglang_engine(server, max_staleness=1), served_model(seed=9)
    engine.load_weights(iter(model.state_dict().items()), version=0)

    async def play():
        sampling = Sampling(max_new_tokens=180, seed=4)
        task = asyncio.ensure_future(engine.generate(prompts_of(20)[0], sampling))
        await asyncio.sleep(0.3)
        assert not task.done()
        await asyncio.to_thread(engine.load_weights, iter(newer.state_dict().items()), 1)
        return await task

    completion = asyncio.run(play())
    assert (completion.weight_version, len(completion.token_ids), engine.version) == (0, 180, 1)
    engine.close()
