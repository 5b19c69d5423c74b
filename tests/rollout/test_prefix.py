"""The plan of prefixes against a brute-force cache that knows single tokens, and its counts against a set of all prefixes."""

import asyncio
import dataclasses
import itertools
import random
import sys
import threading
from collections import Counter

import pytest
from fakes import DiceEngine, Script, demonstration_of, scripted_family
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_hf import tiny_model
from tokenizer_fixtures import small_tokenizer

from megatron_tcod.curriculum import Schedule, make_curriculum
from megatron_tcod.rollout.embedded_engine import EmbeddedEngine
from megatron_tcod.rollout.engine import Completion, Sampling
from megatron_tcod.rollout.episodes import Assignment, PlaySettings, collect_episodes, play_episode
from megatron_tcod.rollout.prefix import (
    PrefixLedger,
    PrefixReuse,
    plan_prefixes,
    replayed_prefix,
    step_prefixes,
    warm_waves,
)
from megatron_tcod.trajectory import TurnWindow

EXAMPLES = settings(max_examples=150, deadline=None)
PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=9)


def every_prefix(prompts):
    """Each token of a forest, told by the path to it."""
    return {tuple(p[:n]) for p in prompts for n in range(1, len(p) + 1)}


class TokenCache:
    """A radix cache without radix: one entry a token, the least recently used entry without successors goes first."""

    def __init__(self, capacity=10**9):
        self.capacity, self.clock, self.last_use, self.num_entered, self.peak = capacity, 0, {}, {}, 0

    def matched(self, prompt):
        return next((n for n in range(len(prompt), 0, -1) if tuple(prompt[:n]) in self.last_use), 0)

    def ask(self, *prompts):
        """Compute prompts in one pass: none sees what the others compute. Returns the tokens that each had to compute."""
        computed = [len(p) - min(self.matched(p), len(p) - 1) for p in prompts]
        missing = {id(p): [tuple(p[:n]) for n in range(self.matched(p) + 1, len(p) + 1)] for p in prompts}
        self.clock += 1
        for prompt in prompts:
            for n in range(1, len(prompt) + 1):
                if tuple(prompt[:n]) in self.last_use:
                    self.last_use[tuple(prompt[:n])] = self.clock
        for prompt in prompts:
            for token in missing[id(prompt)]:
                self.num_entered[token] = self.num_entered.get(token, 0) + 1
                if token not in self.last_use:
                    self.make_room()
                self.last_use[token] = self.clock
        self.peak = max(self.peak, len(self.last_use))
        return computed

    def make_room(self):
        while len(self.last_use) >= self.capacity:
            inner = {token[:-1] for token in self.last_use}
            leaves = [token for token in self.last_use if token not in inner and self.last_use[token] < self.clock]
            del self.last_use[min(leaves, key=lambda token: self.last_use[token])]


def completion_of(prompt, token_ids=(), cached=0):
    return Completion(
        token_ids=list(token_ids), logprobs=[-1.0] * len(token_ids), finish_reason="length", cached_tokens=cached,
        prompt_tokens=len(prompt), weight_version=0,
    )  # fmt: skip


@EXAMPLES
@given(PROMPTS)
def test_the_plan_warms_what_several_prompts_share_and_nothing_else(prompts):
    users = {token: sum(tuple(p[: len(token)]) == token for p in prompts) for token in every_prefix(prompts)}
    (group,) = plan_prefixes(prompts)
    assert every_prefix(group.prefixes) == {token for token, count in users.items() if count > 1}
    assert not [1 for a, b in itertools.permutations(group.prefixes, 2) if b[: len(a)] == a], "a prefix of another one"
    assert sorted(group.members) == list(range(len(prompts))) and group.num_tokens == len(users)


@EXAMPLES
@given(PROMPTS)
def test_waves_compute_each_token_once_though_a_pass_shares_nothing(prompts):
    cache, waves = TokenCache(), warm_waves(prompts)
    computed = sum(sum(cache.ask(*wave)) for wave in waves)
    assert set(cache.num_entered) == every_prefix(prompts) and set(cache.num_entered.values()) == {1}
    assert computed == len(every_prefix(prompts))
    assert all(waves)


@EXAMPLES
@given(PROMPTS)
def test_after_the_warm_up_no_two_requests_compute_the_same_token(prompts):
    cache, (group,) = TokenCache(), plan_prefixes(prompts)
    for wave in warm_waves(group.prefixes):
        cache.ask(*wave)
    computed = cache.ask(*(prompts[i] for i in group.members))
    assert set(cache.num_entered) == every_prefix(prompts) and set(cache.num_entered.values()) == {1}
    ends_inside = sum(users > 1 for users in (sum(q[: len(p)] == p for q in prompts) for p in prompts))
    alone = len(every_prefix(prompts)) - len(every_prefix(group.prefixes))
    assert sum(computed) == alone + ends_inside  # a prompt's last token is always computed


@EXAMPLES
@given(PROMPTS, st.integers(9, 30), st.integers(0, 3))
def test_under_a_budget_each_token_is_computed_once_and_the_cache_never_holds_more(prompts, budget, room):
    cache = TokenCache(budget)
    groups = plan_prefixes(prompts, budget=budget, room=room)
    assert sorted(i for group in groups for i in group.members) == list(range(len(prompts)))
    for group in groups:
        own = len(every_prefix([prompts[i] for i in group.members]))
        assert group.num_tokens == own + room * len(group.members)
        assert group.num_tokens <= budget or len(group.members) == 1
        for prefix in itertools.chain(*warm_waves(group.prefixes)):
            cache.ask(prefix)
        for i in group.members:
            cache.ask(prompts[i])
    assert set(cache.num_entered) == every_prefix(prompts) and set(cache.num_entered.values()) == {1}
    assert cache.peak <= budget


def test_the_order_of_the_brute_force_cache_matters_without_a_plan():
    """The witness of the test above: round-robin over two prompts that do not fit together computes everything again."""
    cache = TokenCache(12)
    for prompt in [[1] * 8, [2] * 8] * 3:
        cache.ask(prompt)
    assert max(cache.num_entered.values()) == 3


@EXAMPLES
@given(PROMPTS, st.randoms(), st.integers(9, 30))
def test_the_order_depends_on_the_prompts_alone(prompts, dice, budget):
    shuffled = dice.sample(prompts, len(prompts))
    one, other = plan_prefixes(prompts, budget=budget), plan_prefixes(shuffled, budget=budget)
    assert [[prompts[i] for i in g.members] for g in one] == [[shuffled[i] for i in g.members] for g in other]
    assert [g.prefixes for g in one] == [g.prefixes for g in other]
    assert warm_waves(prompts) == warm_waves(shuffled)


def test_a_prefix_is_warmed_where_it_saves_enough():
    trunk, tail = list(range(100)), [7, 8, 9]
    prompts = [trunk + tail + [1]] * 2 + [trunk + [50]]
    assert plan_prefixes(prompts, worth=1)[0].prefixes == [trunk + tail + [1]]
    assert plan_prefixes(prompts, worth=5)[0].prefixes == [trunk]  # the tail saves 1 x 4 tokens, the trunk 2 x 100
    assert plan_prefixes(prompts, worth=201)[0].prefixes == []
    assert plan_prefixes([], worth=1) == []
    with pytest.raises(ValueError, match="worth"):
        plan_prefixes(prompts, worth=0)


def test_nested_prefixes_are_one_request_and_short_runs_are_not_waited_for():
    chain = [list(range(n)) for n in (10, 20, 40)]
    assert warm_waves(chain) == [[list(range(40))]]
    fork = [[1, 2, 3, 4], [1, 2, 9, 9]]
    assert warm_waves(fork) == [[fork[0]], [fork[1]]]
    assert warm_waves(fork, least=3) == [fork]


REQUESTS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 1), min_size=1, max_size=8),  # prompt
        st.lists(st.integers(0, 1), max_size=4),  # sampled
        st.integers(-1, 7),  # logprob_start_len
        st.sampled_from(["ask", "ask", "ask", "flush"]),
    ),
    max_size=12,
)


def test_counts_are_neither_lost_nor_doubled_when_taken_by_another_thread():
    ledger, prompt = PrefixLedger(), [1, 2, 3]
    asked, done = ledger.submit(prompt, Sampling(max_new_tokens=1)), threading.Event()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def finish() -> None:
        for _ in range(4000):
            ledger.finish(asked, completion_of(prompt, [], 0))
        done.set()

    try:
        thread, total = threading.Thread(target=finish), PrefixReuse()
        thread.start()
        while not done.is_set():
            total += ledger.take()
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert (total + ledger.take()).requests == 4000


def test_a_ledger_that_is_never_flushed_holds_no_more_than_its_limit():
    """A teacher's: with compact history every turn of every step has a prompt of its own."""
    ledger = PrefixLedger(limit=1000)
    for number in range(200):
        ledger.submit([number, *range(1000, 1040)], Sampling(max_new_tokens=0))
        assert ledger._tree.num_tokens <= 1000
    newest = ledger.submit([199, *range(1000, 1040)], Sampling(max_new_tokens=1))
    oldest = ledger.submit([0, *range(1000, 1040)], Sampling(max_new_tokens=1))
    assert (newest.reusable, oldest.reusable) == (40, 0)


@EXAMPLES
@given(REQUESTS)
def test_the_ledger_counts_what_an_unbounded_cache_would_have_served(requests):
    seen, ledger = set(), PrefixLedger()
    expected = dict(requests=0, prompt_tokens=0, reusable_tokens=0, reused_tokens=0, warmed_tokens=0)
    for number, (prompt, sampled, start, kind) in enumerate(requests):
        if kind == "flush":
            ledger.flush()
            seen = set()
        start = min(start, len(prompt) - 1)
        limit = len(prompt) - 1 if start < 0 else start
        reusable = max(n for n in range(limit + 1) if n == 0 or tuple(prompt[:n]) in seen)
        served = reusable * (number % 3) // 2 if number % 3 < 2 else reusable + 1  # a cache that forgets, or knows more
        asked = ledger.submit(prompt, Sampling(max_new_tokens=len(sampled), logprob_start_len=start))
        ledger.finish(asked, completion_of(prompt, sampled, served))
        seen |= every_prefix([prompt + sampled[:-1]])
        if not sampled and start < 0:
            expected["warmed_tokens"] += len(prompt) - served
        else:
            now = (1, len(prompt), reusable, min(served, reusable), 0)
            expected = {key: value + more for (key, value), more in zip(expected.items(), now, strict=True)}
    reuse = ledger.take()
    assert reuse == PrefixReuse(**expected)
    assert reuse.recomputed_tokens == reuse.reusable_tokens - reuse.reused_tokens >= 0
    assert ledger.take() == PrefixReuse() and PrefixReuse().rate == 1


OBSERVATIONS = [f"You are in room {i}. Doors lead on." for i in range(9)]
ACTIONS = [f"go to room {i + 1}" for i in range(8)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"), system_prompt="You act.")


def recorded_world(name="t"):
    """A scripted family with one task, and the demonstration of all its turns."""
    script = Script(observations=OBSERVATIONS)
    family = scripted_family({name: script})
    (task,) = family.tasks("train")
    return family, task, demonstration_of(task, script, ACTIONS)


@pytest.mark.parametrize("history_mode", ["full", "compact"])
@pytest.mark.parametrize("start", [0, 1, 5, 8])
def test_a_planned_prefix_is_what_the_student_is_asked_first(tokenizer, history_mode, start):
    family, task, demonstration = recorded_world()
    engine = DiceEngine(tokenizer.vocab_size)
    play = PlaySettings(max_turns=20, max_new_tokens=6, max_context=4000, history_mode=history_mode, compact_turns=3)
    assignment = Assignment(task=task, window=TurnWindow(start, 20), demonstration=demonstration)
    asyncio.run(play_episode(family, assignment, engine=engine, tokenizer=tokenizer, settings=play, step=0))
    planned = replayed_prefix(demonstration, start, tokenizer, history_mode=history_mode, compact_turns=3)
    assert planned == engine.prompts[0]


def test_a_demonstration_without_observations_is_planned_as_far_as_it_is_known(tokenizer):
    _, _, demonstration = recorded_world()
    known = dataclasses.replace(
        demonstration,
        turns=[*demonstration.turns[:2], *(dataclasses.replace(t, observation="") for t in demonstration.turns[2:])],
    )
    ids = replayed_prefix(known, 5, tokenizer)
    whole = replayed_prefix(demonstration, 5, tokenizer)
    assert whole[: len(ids)] == ids and len(ids) > len(replayed_prefix(demonstration, 1, tokenizer))
    assert replayed_prefix(known, 5, tokenizer, history_mode="compact") == []


def test_the_prefixes_of_later_b2f_steps_nest_in_those_of_earlier_ones(tokenizer):
    _, task, demonstration = recorded_world()
    schedule = Schedule(k_start=1, eta=2)
    curriculum = make_curriculum(
        "b2f", schedule=schedule, max_turns=20, lengths={"t": 8}, stop="horizon", missing="outcome"
    )
    unknown = dataclasses.replace(task, task_id="never recorded")

    def prefixes(step):
        return step_prefixes(
            step, [task, unknown, task], curriculum=curriculum, demonstrations={"t": demonstration}, tokenizer=tokenizer
        )

    steps = [prefixes(step) for step in range(20)]
    assert all(len(step) == 1 for step in steps)
    assert len({len(step[0]) for step in steps}) == 8
    for earlier, later in itertools.pairwise(steps):
        assert earlier[0][: len(later[0])] == later[0]
    assert len(warm_waves([step[0] for step in steps])) == 1  # a chain is one request


def test_the_embedded_engine_reports_the_counts_of_a_brute_force_cache():
    """A tree too small for all prompts, new weights in between: what was served is what completions say."""
    model = tiny_model("qwen3")
    engine = EmbeddedEngine(model.config.to_dict(), max_running=4, max_total_tokens=256, max_context=120)
    dice = random.Random(0)
    trunk = dice.choices(range(97), k=40)
    prompts = [trunk + dice.choices(range(97), k=k) for k in (3, 30, 50, 50, 60, 50)] * 3
    seen, expected = set(), Counter()
    for number, prompt in enumerate(prompts):
        if number % 9 == 0:
            engine.load_weights(iter(model.state_dict().items()), version=number)
            seen = set()
            asyncio.run(engine.prewarm([trunk]))
            seen |= every_prefix([trunk])
        completion = asyncio.run(engine.generate(prompt, Sampling(max_new_tokens=4, seed=number)))
        reusable = max(n for n in range(len(prompt)) if n == 0 or tuple(prompt[:n]) in seen)
        expected.update(reusable=reusable, reused=completion.cached_tokens, prompt=len(prompt), requests=1)
        seen |= every_prefix([prompt + completion.token_ids[:-1]])
    reuse = engine.take_prefix_reuse()
    assert (reuse.requests, reuse.prompt_tokens) == (expected["requests"], expected["prompt"])
    assert (reuse.reusable_tokens, reuse.reused_tokens) == (expected["reusable"], expected["reused"])
    assert reuse.warmed_tokens == 2 * len(trunk)
    assert reuse.recomputed_tokens > 0, "nothing was evicted: the case does not show what it should"


@pytest.mark.parametrize("is_planned", [True, False])
def test_a_collection_that_does_not_fit_the_cache_recomputes_nothing_in_groups(tokenizer, is_planned):
    """Ten prompts, each of four samples over two turns, in a tree that holds a part of them. The witness: all at once."""
    observations = [f"{chr(97 + i) * 7} " * 6 + str(i) for i in range(10)]
    scripts = {str(i): Script(observations=[text, "Go on.", "end"]) for i, text in enumerate(observations)}
    family = scripted_family(scripts)
    play = PlaySettings(max_turns=2, max_new_tokens=4, max_context=160)
    model = tiny_model("qwen3", vocab_size=tokenizer.vocab_size)
    engine = EmbeddedEngine(model.config.to_dict(), max_running=4, max_total_tokens=480, max_context=160)
    engine.load_weights(iter(model.state_dict().items()), version=0)
    tasks = family.tasks("train")
    assignments = [Assignment(task=t, window=TurnWindow(0, 2), sample=s) for s in range(4) for t in tasks]
    budget = 200 if is_planned else None  # 480 less what second turns add
    episodes = asyncio.run(
        collect_episodes(
            family, assignments, engine=engine, tokenizer=tokenizer, settings=play, step=0, prefix_budget=budget
        )
    )
    assert [(e.task, e.sample) for e in episodes] == [(a.task, a.sample) for a in assignments]
    reuse = engine.take_prefix_reuse()
    assert reuse.requests == 80
    assert (reuse.rate >= 0.99) == is_planned, f"{reuse}"
