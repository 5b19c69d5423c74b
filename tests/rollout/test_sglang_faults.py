"""The SGLang client and engine against a server that misbehaves: named errors, in time, and nobody else is hurt."""

import asyncio
import threading
import time

import pytest
import torch

pytest.importorskip("aiohttp")

from fakes import Script, scripted_family  # noqa: E402
from sglang_faults import VOCAB, FaultyServer, expected_ids  # noqa: E402  needs aiohttp
from tokenizer_fixtures import small_tokenizer  # noqa: E402

from megatron_tcod.rollout.engine import Sampling  # noqa: E402
from megatron_tcod.rollout.episodes import Assignment, PlaySettings, collect_episodes  # noqa: E402
from megatron_tcod.rollout.http_json import (  # noqa: E402
    DeadlineExceeded,
    GarbledAnswer,
    LogprobMismatch,
    RolloutError,
    ServerError,
    ServerUnreachable,
    StreamBroken,
    TruncatedAnswer,
    WrongTokenCount,
)
from megatron_tcod.rollout.prefix_router import PrefixRouter  # noqa: E402
from megatron_tcod.rollout.sglang_client import parse_answer  # noqa: E402
from megatron_tcod.rollout.sglang_engine import Probe, SGLangEngine, StaleWeights  # noqa: E402
from megatron_tcod.rollout.sglang_server import Server, attach  # noqa: E402
from megatron_tcod.rollout.weight_proof import UnprovenWeights  # noqa: E402
from megatron_tcod.rollout.weight_sync import FromDisk  # noqa: E402
from megatron_tcod.trajectory import TurnWindow  # noqa: E402

DEADLINE_S = 2.0
FAULTS = {
    "error_500": ServerError,
    "garbage": GarbledAnswer,
    "half_body": TruncatedAnswer,
    "hang": DeadlineExceeded,
    "death": StreamBroken,
    "token_count": WrongTokenCount,
    "logprob_length": LogprobMismatch,
}


class Stage:
    """A faulty server in a thread of its own, and an engine over it that holds version 3."""

    def __init__(self, tmp_path, *, engine_options=None, **server_options) -> None:
        self.server = FaultyServer(**server_options)
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        url = self.run(self.server.start())
        options = dict(vocab_size=97, max_context=256, deadline_s=DEADLINE_S) | (engine_options or {})
        keys = {name: server_options.get(name, "") for name in ("api_key", "admin_key")}
        self.engine = SGLangEngine([attach(url, **keys)], FromDisk(tmp_path / "weights", tmp_path), **options)
        self.engine.load_weights(weights(), version=3)

    def run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    def close(self) -> None:
        self.engine.close()
        self.run(self.server.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@pytest.fixture
def stage(tmp_path, request):
    made = Stage(tmp_path, **getattr(request, "param", {}))
    yield made
    made.close()


def weights():
    yield "model.norm.weight", torch.ones(4)


def gather(engine, prompts, **options):
    """Results or errors of all prompts at once, each with its seconds; request i has seed i."""

    async def timed(prompt, seed):
        started = time.monotonic()
        try:
            result = await engine.generate(prompt, Sampling(**({"max_new_tokens": 5, "seed": seed} | options)))
        except Exception as error:
            result = error
        return result, time.monotonic() - started

    async def play():
        return await asyncio.gather(*(timed(prompt, seed) for seed, prompt in enumerate(prompts)))

    return asyncio.run(play())


def assert_right(prompt, seed, completion, version="3"):
    assert not isinstance(completion, Exception), completion
    assert completion.token_ids == expected_ids(prompt, seed, version, 5)
    assert completion.weight_version == int(version)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_a_named_error_in_time_and_other_requests_do_not_notice(stage, fault):
    stage.server.faults[13] = fault
    prompts = [[1, 2, 3], [13, 4], [5, 6], [7]]
    stage.engine._links[0].client._retry_s = 1.0
    results = gather(stage.engine, prompts)
    error, seconds = results[1]
    assert type(error) is FAULTS[fault], error
    assert error.server == stage.engine._links[0].client.url and len(error.request_id) == 16
    assert seconds < DEADLINE_S + 5
    assert set(stage.server.fired) == {fault}
    assert (len(stage.server.fired) > 1) == (fault == "error_500")  # only what may pass is asked again
    for seed, prompt in enumerate(prompts):
        if prompt[0] != 13:
            assert_right(prompt, seed, results[seed][0])


def test_refused_connections_are_a_named_error_and_running_requests_finish(stage):
    stage.server.delay_s = 1.0
    client = stage.engine._links[0].client
    client._retry_s = 1.0

    async def play():
        running = [asyncio.ensure_future(stage.engine.generate([i], Sampling(max_new_tokens=5, seed=i))) for i in range(3)]
        while stage.server.most_at_once < 3:
            await asyncio.sleep(0.01)
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(stage.server.refuse(), stage.loop))
        started = time.monotonic()
        with pytest.raises(ServerUnreachable, match="cannot connect"):
            await stage.engine.generate([9], Sampling(max_new_tokens=5))
        return await asyncio.gather(*running), time.monotonic() - started

    completions, seconds = asyncio.run(play())
    assert seconds < DEADLINE_S + 5
    assert stage.server.fired == ["refused"] and client.num_retries > 0
    for seed, completion in enumerate(completions):
        assert_right([seed], seed, completion)


def test_a_failure_that_passes_costs_only_time(stage):
    stage.server.faults[13], stage.server.num_faults_left = "error_500", 2
    ((completion, _),) = gather(stage.engine, [[13, 4]])
    assert_right([13, 4], 0, completion)
    assert stage.server.fired == ["error_500"] * 2


def test_a_server_that_comes_back_answers_what_was_refused(stage):
    async def play():
        port = stage.server.port
        loop_of = lambda coroutine: asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, stage.loop))  # noqa: E731
        await loop_of(stage.server.refuse())
        await asyncio.sleep(2.1)  # idle connections are older than the client keeps them
        asked = asyncio.ensure_future(stage.engine.generate([9], Sampling(max_new_tokens=5)))
        await asyncio.sleep(0.3)
        assert not asked.done()
        await loop_of(stage.server.listen(port))
        return await asked

    assert_right([9], 0, asyncio.run(play()))


def test_a_refused_key_is_an_error_at_once(tmp_path):
    made = Stage(tmp_path, api_key="right", admin_key="right too")
    try:
        ((completion, _),) = gather(made.engine, [[1]])
        assert_right([1], 0, completion)
        made.engine._links[0].client._api_key = "wrong"
        ((error, seconds),) = gather(made.engine, [[1]])
        assert isinstance(error, ServerError) and error.status == 401 and seconds < 1
    finally:
        made.close()


def test_an_answer_of_other_weights_is_refused_and_counted(stage):
    stage.server.faults[13] = "stale"
    results = gather(stage.engine, [[1, 2], [13, 4], [5]])
    assert isinstance(results[1][0], StaleWeights) and "weights 41, expected 3" in str(results[1][0])
    assert stage.engine.counters.refused_stale == 1 and stage.server.fired == ["stale"]
    assert_right([1, 2], 0, results[0][0])
    assert_right([5], 2, results[2][0])


@pytest.mark.parametrize("stage", [dict(engine_options=dict(max_staleness=1))], indirect=True)
def test_bounded_staleness_accepts_the_version_before_and_no_older_one(stage):
    stage.engine.load_weights(weights(), version=4)
    stage.server.version = "3"
    ((completion, _),) = gather(stage.engine, [[1]])
    assert_right([1], 0, completion, version="3")
    stage.server.version = "2"
    ((error, _),) = gather(stage.engine, [[1]])
    assert isinstance(error, StaleWeights)


@pytest.mark.parametrize("stage", [dict(engine_options=dict(max_staleness=1), has_spans=False)], indirect=True)
def test_without_spans_a_sample_counts_as_old_as_the_version_that_was_asked(stage):
    stage.server.delay_s = 0.4

    async def play():
        task = asyncio.ensure_future(stage.engine.generate([1], Sampling(max_new_tokens=5)))
        while not stage.server.most_at_once:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(stage.engine.load_weights, weights(), 4)
        return await task

    completion = asyncio.run(play())
    assert completion.token_ids == expected_ids([1], 0, "4", 5)  # the server answered with the new weights
    assert completion.weight_version == 3


@pytest.mark.parametrize("stage", [dict(engine_options=dict(max_concurrent=3))], indirect=True)
def test_no_more_requests_than_allowed_are_with_the_server(stage):
    stage.server.delay_s = 0.05
    prompts = [[i, i] for i in range(20)]
    for seed, (completion, _) in enumerate(gather(stage.engine, prompts)):
        assert_right(prompts[seed], seed, completion)
    assert stage.server.most_at_once == 3


def test_cancelled_callers_give_their_place_back(stage):
    stage.server.faults[13] = "hang"

    async def play():
        task = asyncio.ensure_future(stage.engine.generate([13], Sampling(max_new_tokens=5)))
        while not stage.server.fired:
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        while stage.engine._num_in_flight:
            await asyncio.sleep(0.01)
        return await stage.engine.generate([1], Sampling(max_new_tokens=5))

    assert_right([1], 0, asyncio.run(asyncio.wait_for(play(), 10)))
    assert stage.engine._links[0].client.num_in_flight == 0


@pytest.mark.parametrize("is_new", [True, False])
def test_an_update_pauses_flushes_and_resumes_in_the_order_that_the_server_survives(tmp_path, is_new):
    made = Stage(tmp_path, is_new=is_new)
    try:
        order = ["pause_generation", "update_weights_from_disk", "flush_cache", "continue_generation"]
        assert made.server.calls == order
        gather(made.engine, [[1]])
        assert made.server.salts == ["v3"]
        assert made.engine._links[0].features.has_update_session == is_new
    finally:
        made.close()


@pytest.mark.parametrize("has_memory_saver", [True, False])
def test_released_resumes_only_what_it_released(tmp_path, has_memory_saver):
    made = Stage(tmp_path, has_memory_saver=has_memory_saver)
    try:
        made.server.calls.clear()
        with made.engine.released():
            with pytest.raises(RuntimeError, match="no proven weights"):
                asyncio.run(made.engine.generate([1], Sampling(max_new_tokens=5)))
            with pytest.raises(RuntimeError, match="leave the block first"):
                made.engine.load_weights(weights(), version=4)
        memory = ["release_memory_occupation", "resume_memory_occupation"] if has_memory_saver else []
        assert made.server.calls == ["flush_cache", *memory]
        with pytest.raises(RuntimeError, match="call load_weights first"):
            asyncio.run(made.engine.generate([1], Sampling(max_new_tokens=5)))
        made.engine.load_weights(weights(), version=4)
        ((completion, _),) = gather(made.engine, [[1]])
        assert_right([1], 0, completion, version="4")
    finally:
        made.close()


def test_weights_that_fail_the_probe_are_not_used(stage):
    stage.engine._probe = lambda: Probe(token_ids=[1, 2, 3], logprobs=[-1.0, -1.2], tolerance=1e-4)
    with pytest.raises(UnprovenWeights, match="2.00e-01 from the trainer's"):
        stage.engine.load_weights(weights(), version=4)
    with pytest.raises(RuntimeError, match="no proven weights"):
        asyncio.run(stage.engine.generate([1], Sampling(max_new_tokens=5)))
    stage.engine._probe = lambda: Probe(token_ids=[1, 2, 3], logprobs=[-1.0, -1.0], tolerance=1e-4)
    stage.engine.load_weights(weights(), version=5)
    assert_right([1], 0, gather(stage.engine, [[1]])[0][0], version="5")


@pytest.mark.parametrize(
    "stage,waits", [(dict(engine_options=dict(max_staleness=1)), True), ({}, False)], indirect=["stage"]
)
def test_requests_that_come_during_an_update_wait_for_it_with_staleness_and_are_refused_without(stage, waits):
    is_reading, may_go_on = threading.Event(), threading.Event()

    def slow_weights():
        is_reading.set()
        assert may_go_on.wait(10)
        yield from weights()

    async def play():
        update = asyncio.create_task(asyncio.to_thread(stage.engine.load_weights, slow_weights(), 4))
        await asyncio.to_thread(is_reading.wait, 10)
        request = asyncio.create_task(stage.engine.generate([1], Sampling(max_new_tokens=5)))
        done, _ = await asyncio.wait([request], timeout=0.2)
        may_go_on.set()
        await update
        return bool(done), (await asyncio.gather(request, return_exceptions=True))[0]

    is_done, result = asyncio.run(play())
    assert is_done != waits
    if waits:
        assert_right([1], 0, result, version="4")
        with stage.engine.released():  # the servers go on while the trainer trains
            assert_right([2], 1, gather(stage.engine, [[1], [2]])[1][0], version="4")
    else:
        assert "no proven weights" in str(result)


@pytest.mark.parametrize("stage", [dict(engine_options=dict(max_staleness=1, max_concurrent=1))], indirect=True)
def test_an_update_overtakes_the_queue_and_those_in_it_are_asked_under_the_new_version(stage):
    """The proof needs no place, and the salt is that of the moment in which a request is sent."""
    stage.server.delay_s = 0.4
    stage.engine._probe = lambda: Probe(token_ids=[1, 2, 3], logprobs=[-1.0, -1.0], tolerance=1e-4)

    async def play():
        asked = [asyncio.ensure_future(stage.engine.generate([i], Sampling(max_new_tokens=5, seed=i))) for i in range(6)]
        while not stage.server.most_at_once:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(stage.engine.load_weights, weights(), 4)
        num_answered = sum(one.done() for one in asked)
        return num_answered, await asyncio.gather(*asked)

    num_answered, completions = asyncio.run(play())
    assert num_answered <= 2
    assert stage.server.salts == ["v3", *["v4"] * 6]  # one was sent before, five after, and the probe
    for seed, completion in enumerate(completions[1:], 1):
        assert_right([seed], seed, completion, version="4")


@pytest.mark.parametrize("stage", [dict(engine_options=dict(vocab_size=60, head_rows=97))], indirect=True)
def test_an_id_that_the_tokenizer_does_not_have_is_an_engine_fault(stage):
    prompts = [[seed] for seed in range(8)]
    is_outside = [max(expected_ids(prompt, seed, "3", 5)) >= 60 for seed, prompt in enumerate(prompts)]
    assert 0 < sum(is_outside)
    for (result, _), outside in zip(gather(stage.engine, prompts), is_outside, strict=True):
        assert isinstance(result, GarbledAnswer) == outside
        assert not outside or "of which the tokenizer has 60" in str(result)


def test_every_server_goes_on_after_an_update_that_one_did_not_survive(tmp_path):
    """Attached servers are somebody else's: none may be left paused."""
    stages = [Stage(tmp_path / str(number)) for number in range(2)]
    links = [attach(one.engine._links[0].client.url) for one in stages]
    engine = SGLangEngine(links, FromDisk(tmp_path / "weights", tmp_path), vocab_size=97, max_context=256)
    try:
        for one in stages:
            one.server.calls.clear()

        def breaking():
            yield from weights()
            stages[0].run(stages[0].server.stop())

        with pytest.raises(RolloutError) as caught:
            engine.load_weights(breaking(), version=4)
        assert "update_weights_from_disk" in str(caught.value) or "connect" in str(caught.value)
        assert stages[1].server.calls[-1] == "continue_generation"
    finally:
        engine.close()
        for one in stages:
            one.close()


def test_broken_connections_to_a_server_that_lives_are_looked_into_once(stage):
    """A launched server gets 15 s to be gone; the requests that broke together wait for that together."""

    class Launched(Server):
        is_ours = True

    url = stage.engine._links[0].client.url
    engine = SGLangEngine([Launched(url, "", "")], None, vocab_size=97, max_context=256, deadline_s=DEADLINE_S)
    stage.server.faults[13] = "death"
    results = gather(engine, [[13, 1], [13, 2], [13, 3], [1]])
    engine.close()
    assert all(isinstance(error, StreamBroken) for error, _ in results[:3])
    assert max(seconds for _, seconds in results) < 25


def test_a_scored_prompt_may_come_with_the_number_of_an_id_that_was_sampled_and_dropped():
    """What SGLang 0.5.21 answers to a probe or a teacher's row that shares a prefill batch with requests that sample."""
    meta = {
        "finish_reason": {"type": "length", "length": 0},
        "prompt_tokens": 3,
        "completion_tokens": 0,
        "cached_tokens": 0,
        "input_token_logprobs": [[None, 5, None], [-1.0, 6, None], [-2.0, 7, None]],
        "output_token_logprobs": [[-0.5, 9, None]],
    }
    scoring = Sampling(max_new_tokens=0, logprob_start_len=0)
    answer = parse_answer({"output_ids": [], "meta_info": meta}, [5, 6, 7], scoring, server="s")
    assert (answer.logprobs, answer.input_logprobs) == ([], [None, -1.0, -2.0])


def collected(stage, tokenizer, letters):
    """Two turns for each letter, which its second observation holds."""
    scripts = {letter: Script(observations=["You are here.", f"It says {letter}.", "end"]) for letter in letters}
    family = scripted_family(scripts)
    assignments = [Assignment(task=task, window=TurnWindow(0, 2)) for task in family.tasks("train")]
    play = PlaySettings(max_turns=2, max_new_tokens=5, max_context=200)
    engine = SGLangEngine(
        [attach(stage.engine._links[0].client.url)],
        None,
        vocab_size=tokenizer.vocab_size,
        max_context=200,
        deadline_s=DEADLINE_S,
    )
    try:
        return asyncio.run(
            collect_episodes(family, assignments, engine=engine, tokenizer=tokenizer, settings=play, step=0)
        )
    finally:
        engine.close()


def test_a_request_that_fails_ends_its_episode_by_name_and_no_other(stage, tmp_path):
    """Every fault in the second turn of one episode of a collection, beside one without."""
    tokenizer = small_tokenizer(tmp_path / "tokenizer")
    letters = "ðñòóôõö÷"  # their last byte's id is above what the server samples
    undisturbed = collected(stage, tokenizer, letters)
    assert [episode.outcome for episode in undisturbed] == ["ok"] * 8
    for letter, name in zip(letters, FAULTS, strict=False):
        poison = tokenizer.answer(letter)[-2]
        assert poison >= VOCAB
        stage.server.poison[poison] = name
    started = time.monotonic()
    disturbed = collected(stage, tokenizer, letters)
    assert time.monotonic() - started < DEADLINE_S + 5
    assert set(stage.server.fired) == set(FAULTS)
    assert [episode.outcome for episode in disturbed] == ["engine_fault"] * 7 + ["ok"]
    for episode, before, error in zip(disturbed, undisturbed, FAULTS.values(), strict=False):
        assert episode.detail.startswith(error.__name__) and episode.rows == []
        assert [turn.token_ids for turn in episode.turns] == [before.turns[0].token_ids]
    assert disturbed[7] == undisturbed[7]


def test_a_collection_of_which_nothing_is_left_ends_with_the_engines_message(stage, tmp_path):
    tokenizer = small_tokenizer(tmp_path / "tokenizer")
    stage.server.poison[tokenizer.answer("à")[-2]] = "garbage"
    with pytest.raises(GarbledAnswer, match="not JSON"):
        collected(stage, tokenizer, "à")


def test_a_prompt_goes_where_most_of_it_was_computed_unless_that_server_is_busy():
    router, task = PrefixRouter(2), list(range(640))
    assert router.choose(task, [0, 0]) == 0
    assert router.choose([*range(64), *range(1000, 1576)], [1, 0]) == 1  # shares a system prompt only
    assert router.choose([*task, 7, 8], [5, 0]) == 0
    assert router.choose([*task, 7, 8], [20, 0]) == 1
