"""Chat endpoints over real HTTP: what is sent, what is accepted, and every way in which an endpoint fails."""

import asyncio

import pytest

pytest.importorskip("aiohttp")
from chat_endpoint import ChatEndpoint, Fault, reply_of  # noqa: E402
from fakes import Script, scripted_family  # noqa: E402

from megatron_tcod.rollout.chat_client import ChatClient, ContextExceeded  # noqa: E402
from megatron_tcod.rollout.chat_engine import UNLIMITED_MESSAGES, ChatEngine, MessageTable, without_ids  # noqa: E402
from megatron_tcod.rollout.engine import Sampling  # noqa: E402
from megatron_tcod.rollout.episodes import Assignment, PlaySettings, collect_episodes  # noqa: E402
from megatron_tcod.rollout.http_json import (  # noqa: E402
    DeadlineExceeded,
    GarbledAnswer,
    ServerError,
    ServerUnreachable,
)
from megatron_tcod.trajectory import Task, TurnWindow  # noqa: E402

SAMPLING = Sampling(max_new_tokens=16, temperature=0.3, top_p=0.9, seed=2**62 + 1)
QUESTION = [{"role": "user", "content": "You are in a room."}]


def ask(endpoint, *, times=1, **options):
    async def talk():
        client = ChatClient(endpoint.url, **{"model": "tiny", "pause_s": 0.01} | options)
        try:
            replies = await asyncio.gather(*(client.complete(QUESTION, SAMPLING) for _ in range(times)))
        finally:
            await client.close()
        return replies, client

    return asyncio.run(talk())


def test_a_request_says_what_is_asked_and_a_reply_what_was_answered():
    with ChatEndpoint(lambda messages, body: reply_of("go to desk 1", finish="length")) as endpoint:
        (reply,), _ = ask(endpoint, api_key="secret", extra={"top_k": 5}, omit=["top_p"])
    body = {"model": "tiny", "messages": QUESTION, "max_tokens": 16, "temperature": 0.3, "seed": 2**62 + 1, "top_k": 5}
    assert endpoint.bodies == [body]
    assert endpoint.headers[0]["Authorization"] == "Bearer secret"
    assert (reply.text, reply.finish_reason, reply.prompt_tokens) == ("go to desk 1", "length", 11)


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_the_address_is_understood_as_people_give_it(suffix):
    with ChatEndpoint(lambda messages, body: "look") as endpoint:
        endpoint.url += suffix
        (reply,), _ = ask(endpoint)
    assert reply.text == "look"


@pytest.mark.parametrize("fault", ["error_500", "error_503", "error_429", "cut", "vanish"])
def test_what_passes_is_asked_again(fault):
    with ChatEndpoint(lambda messages, body: "look") as endpoint:
        endpoint.faults = [fault, fault]
        (reply,), client = ask(endpoint)
    assert reply.text == "look" and client.num_retries == 2 and len(endpoint.bodies) == 3


def test_the_pause_that_an_endpoint_asks_for_is_kept():
    with ChatEndpoint(lambda messages, body: "look") as endpoint:
        endpoint.faults = ["error_429"]
        start = asyncio.new_event_loop().time()
        ask(endpoint)
        assert asyncio.new_event_loop().time() - start >= 0.4


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("error_401", ServerError, "status 401"),
        ("error_404", ServerError, "status 404"),
        ("error_400", ServerError, "status 400"),
        ("too_long", ContextExceeded, "maximum context length"),
        ("redirect", ServerError, "status 307"),
        ("garbage", GarbledAnswer, "not JSON"),
        ("deep", GarbledAnswer, "not JSON"),
        ("html_200", GarbledAnswer, "no chat completion"),
        ("no_choices", GarbledAnswer, "no chat completion"),
        ("content_list", GarbledAnswer, "must be text"),
        ("bad_usage", GarbledAnswer, "must count tokens"),
        ("huge", GarbledAnswer, "more than 16777216 bytes"),
    ],
)
def test_what_does_not_pass_is_a_named_error_without_the_key(fault, error, message):
    with ChatEndpoint(lambda messages, body: "look") as endpoint:
        endpoint.faults = [fault]
        with pytest.raises(error, match=message) as told:
            ask(endpoint, api_key="sesame-1234")
    assert "sesame-1234" not in str(told.value) and len(endpoint.bodies) == 1


def test_an_endpoint_that_hangs_or_is_not_there_ends_by_the_deadline():
    with ChatEndpoint(lambda messages, body: "look") as endpoint:
        endpoint.faults = ["hang"]
        with pytest.raises(DeadlineExceeded, match="0.3 s"):
            ask(endpoint, deadline_s=0.3)
    with pytest.raises(ServerUnreachable):
        ask(endpoint, deadline_s=0.3)


def test_no_more_requests_are_under_way_than_allowed():
    with ChatEndpoint(lambda messages, body: "look", delay_s=0.05) as endpoint:
        ask(endpoint, times=12, max_concurrent=3)
    assert endpoint.most == 3


def test_an_answer_without_text_is_an_empty_one():
    with ChatEndpoint(lambda messages, body: reply_of(None, finish="content_filter")) as endpoint:
        (reply,), _ = ask(endpoint)
    assert (reply.text, reply.finish_reason) == ("", "content_filter")


def test_half_of_a_pair_which_json_can_spell_does_not_end_the_run():
    with ChatEndpoint(lambda messages, body: reply_of("a\ud83d \U0001f600", finish="\udc00" * 99)) as endpoint:
        (reply,), _ = ask(endpoint)
    assert reply.text == "a\ufffd \U0001f600" and reply.finish_reason == "\ufffd" * 40


def play(endpoint, scripts, *, system_prompt="", **settings):
    """All scripts played over the endpoint; two samples each."""
    messages = MessageTable(system_prompt=system_prompt)
    engine = ChatEngine(ChatClient(endpoint.url, deadline_s=2, pause_s=0.01), messages)
    tasks = [Task(env="scripted", task_id=name, split="train") for name in scripts]
    assignments = [Assignment(task=task, window=TurnWindow(0, 9), sample=sample) for task in tasks for sample in (0, 1)]
    settings = PlaySettings(**{"max_turns": 9, "max_new_tokens": 16, "max_context": UNLIMITED_MESSAGES} | settings)
    try:
        found = asyncio.run(
            collect_episodes(
                scripted_family(scripts), assignments, engine=engine, tokenizer=messages, settings=settings, step=0
            )
        )
    finally:
        engine.close()
    return [without_ids(episode) for episode in found]


def count_up(messages, body):
    return f" act {sum(message['role'] == 'assistant' for message in messages)}\n"


def test_an_endpoint_sees_the_whole_conversation_and_its_answers_are_played():
    scripts = {"a": Script(observations=["one", "two", "three"], done_after=3)}
    with ChatEndpoint(count_up) as endpoint:
        episodes = play(endpoint, scripts, system_prompt="Be brief.")
    for episode in episodes:
        assert episode.outcome == "ok" and episode.end_reason == "done" and episode.success
        assert [(turn.observation, turn.action) for turn in episode.turns] == [
            ("one", "act 0"), ("two", "act 1"), ("three", "act 2"),
        ]  # fmt: skip
        assert episode.rows == [] and all(turn.token_ids == [] and turn.prompt_tokens == 11 for turn in episode.turns)
    longest = max((body["messages"] for body in endpoint.bodies), key=len)
    assert [message["role"] for message in longest] == ["system", *["user", "assistant"] * 2, "user"]
    assert [message["content"] for message in longest] == ["Be brief.", "one", " act 0\n", "two", " act 1\n", "three"]
    assert len({body["seed"] for body in endpoint.bodies}) == len(endpoint.bodies) == 6


def test_compact_history_is_one_message():
    with ChatEndpoint(lambda messages, body: "look") as endpoint:
        play(endpoint, {"a": Script(observations=["one", "two"], done_after=2)}, history_mode="compact")
    assert [len(body["messages"]) for body in endpoint.bodies] == [1] * 4
    assert "Observation 2: two" in endpoint.bodies[-1]["messages"][0]["content"]


def test_a_conversation_that_no_longer_fits_ends_its_episode_and_a_broken_one_is_counted():
    longer = []  # the first conversation that comes back for its second turn is too long

    def answer(messages, body):
        if messages[0]["content"] != "good":
            return {"choices": "broken"}
        if len(messages) > 1:
            longer.append(messages)
        return Fault("too_long") if len(messages) > 1 and len(longer) == 1 else "x" * 9

    with ChatEndpoint(answer) as endpoint:
        scripts = {"a": Script(observations=["good", "on"], done_after=4), "b": Script(observations=["bad"])}
        episodes = play(endpoint, scripts)
    assert sorted(episode.outcome for episode in episodes) == ["engine_fault", "engine_fault", "ok", "ok"]
    ended = {episode.end_reason for episode in episodes if episode.outcome == "ok"}
    assert ended == {"context_length", "done"}
    assert all("GarbledAnswer" in one.detail for one in episodes if one.outcome == "engine_fault")


def test_an_endpoint_that_answers_nobody_is_an_error_and_not_a_success_of_zero():
    with ChatEndpoint(lambda messages, body: {"choices": "broken"}) as endpoint:
        with pytest.raises(GarbledAnswer):
            play(endpoint, {"a": Script(observations=["one"])})


@pytest.mark.parametrize(
    ("models", "message"), [((), "serves 0 models"), (("a", "b"), r"2 models \(a, b\)"), (("\x1b[2J",), "no names")]
)
def test_a_model_is_asked_for_where_the_endpoint_has_several(models, message):
    with ChatEndpoint(count_up, models=models) as endpoint:
        with pytest.raises((ValueError, GarbledAnswer), match=message):
            play(endpoint, {"a": Script(observations=["one"])})
