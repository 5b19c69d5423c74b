"""Episodes: the six outcomes, who may be trained, windows, both histories, seeds, and one run of the real thing."""

import asyncio
import random
import threading

import pytest
from fakes import DiceEngine, SayingEngine, Script, demonstration_of, scripted_family
from tokenizer_fixtures import small_tokenizer

import megatron_tcod.rollout.episodes as rollout_episodes
from megatron_tcod.rollout.episodes import (
    Assignment,
    PlaySettings,
    collect_episodes,
    parse_action,
    play_episode,
    turn_seed,
)
from megatron_tcod.trajectory import Task, TurnWindow

OBSERVATIONS = [f"You are in room {i}. Doors lead on." for i in range(8)]
ACTIONS = [f"go to room {i + 1}" for i in range(8)]
TASK = Task(env="scripted", task_id="t", split="train")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"), system_prompt="You act.")


def settings(**changes):
    return PlaySettings(**{"max_turns": 6, "max_new_tokens": 12, "max_context": 2000} | changes)


def play(tokenizer, script, window, *, recorded=0, engine=None, demonstration=None, **changes):
    """One episode of `script` with a demonstration of `recorded` actions, made in the script's own world."""
    if demonstration is None and recorded:
        demonstration = demonstration_of(TASK, script, ACTIONS[:recorded])
    assignment = Assignment(task=TASK, window=window, demonstration=demonstration, curriculum_k=3, sample=2)
    family = scripted_family({"t": script})
    episode = asyncio.run(
        play_episode(
            family,
            assignment,
            engine=engine or SayingEngine(tokenizer, ["look"]),
            tokenizer=tokenizer,
            settings=settings(**changes),
            step=5,
        )
    )
    for environment in family.made:
        assert environment.num_closed == 1
    return episode, family.made[0] if family.made else None


def trained_ids(row):
    return [token for token, is_trained in zip(row.token_ids, row.loss_mask, strict=True) if is_trained]


def test_ok_replays_then_samples_and_ends_when_done(tokenizer):
    script = Script(observations=OBSERVATIONS, done_after=4)
    episode, environment = play(tokenizer, script, TurnWindow(2, 6), recorded=4)
    assert (episode.outcome, episode.end_reason, episode.success, episode.reward) == ("ok", "done", True, 1.0)
    assert environment.actions == [*ACTIONS[:2], "look", "look"]
    assert [turn.actor for turn in episode.turns] == ["teacher", "teacher", "student", "student"]
    assert [turn.observation for turn in episode.turns] == OBSERVATIONS[:4]
    assert (episode.step, episode.sample, episode.curriculum_k, episode.window) == (5, 2, 3, TurnWindow(2, 6))


def test_failing_the_task_is_an_ok_episode_without_success(tokenizer):
    episode, _ = play(tokenizer, Script(observations=OBSERVATIONS, done_after=2, is_success=False), TurnWindow(0, 6))
    assert (episode.outcome, episode.end_reason, episode.success, episode.reward) == ("ok", "done", False, 0.0)


def test_solved_in_replay(tokenizer):
    script = Script(observations=OBSERVATIONS, done_after=2)
    demonstration = demonstration_of(TASK, Script(observations=OBSERVATIONS), ACTIONS[:4])
    episode, _ = play(tokenizer, script, TurnWindow(3, 6), demonstration=demonstration)
    assert (episode.outcome, episode.end_reason, episode.success) == ("solved_in_replay", "done", True)
    assert len(episode.turns) == 2 and episode.rows == []


@pytest.mark.parametrize("turn", [0, 1, 2])
def test_diverged_names_the_turn_and_both_observations(tokenizer, turn):
    recorded = [f"{o} A cat." if i == turn else o for i, o in enumerate(OBSERVATIONS)]
    demonstration = demonstration_of(TASK, Script(observations=recorded), ACTIONS[:4])
    episode, environment = play(tokenizer, Script(observations=OBSERVATIONS), TurnWindow(2, 6), demonstration=demonstration)
    assert (episode.outcome, episode.end_reason, episode.rows) == ("diverged", "not_played", [])
    assert f"turn {turn}" in episode.detail and "A cat" in episode.detail and OBSERVATIONS[turn] in episode.detail
    assert len(environment.actions) == turn


def test_observations_are_compared_after_the_environments_own_normalisation(tokenizer):
    recorded = [f"  {o.upper()}\n" for o in OBSERVATIONS]
    demonstration = demonstration_of(TASK, Script(observations=recorded), ACTIONS[:3])
    episode, _ = play(tokenizer, Script(observations=OBSERVATIONS), TurnWindow(2, 6), demonstration=demonstration)
    assert episode.outcome == "ok"


def test_the_final_observation_is_compared_where_the_window_starts_behind_the_recording(tokenizer):
    demonstration = demonstration_of(TASK, Script(observations=[*OBSERVATIONS[:2], "other"]), ACTIONS[:2])
    episode, _ = play(tokenizer, Script(observations=OBSERVATIONS), TurnWindow(2, 6), demonstration=demonstration)
    assert episode.outcome == "diverged"


def test_rejected_action(tokenizer):
    script = Script(observations=["start", "Nothing happens."], refused=frozenset({ACTIONS[1]}))
    demonstration = demonstration_of(TASK, Script(observations=["start", "Nothing happens.", "room 2"]), ACTIONS[:3])
    episode, _ = play(tokenizer, script, TurnWindow(3, 6), demonstration=demonstration)
    assert (episode.outcome, episode.end_reason) == ("rejected_action", "not_played")
    assert ACTIONS[1] in episode.detail


def test_a_refusal_that_the_recording_shows_too_is_replayed(tokenizer):
    script = Script(observations=OBSERVATIONS, refused=frozenset({ACTIONS[1]}))
    episode, _ = play(tokenizer, script, TurnWindow(3, 6), recorded=4)
    assert episode.outcome == "ok" and len(episode.turns) == 6


@pytest.mark.parametrize("recorded", [0, 2])
def test_no_demonstration_where_the_window_starts_behind_what_is_recorded(tokenizer, recorded):
    episode, environment = play(tokenizer, Script(observations=OBSERVATIONS), TurnWindow(3, 6), recorded=recorded)
    assert (episode.outcome, episode.end_reason) == ("no_demonstration", "not_played")
    assert environment is None and episode.turns == []


@pytest.mark.parametrize("fault_at,turns", [("make", 0), ("reset", 0), (ACTIONS[1], 1), ("look", 3)])
def test_env_fault_keeps_the_turns_so_far(tokenizer, fault_at, turns):
    script = Script(observations=OBSERVATIONS, fault_at=fault_at)
    demonstration = demonstration_of(TASK, Script(observations=OBSERVATIONS), ACTIONS[:2])
    episode, _ = play(tokenizer, script, TurnWindow(2, 6), demonstration=demonstration)
    assert (episode.outcome, episode.rows) == ("env_fault", [])
    assert len(episode.turns) == turns and episode.detail


def test_a_fault_while_closing_spoils_nothing(tokenizer):
    episode, _ = play(tokenizer, Script(observations=OBSERVATIONS, fault_at="close"), TurnWindow(0, 2))
    assert episode.outcome == "ok" and len(episode.rows) == 1


@pytest.mark.parametrize(
    "window,end_reason,num_turns",
    [(TurnWindow(0, 3), "window", 3), (TurnWindow(0, 6), "max_turns", 6), (TurnWindow(0, 30), "max_turns", 6)]
    + [(TurnWindow(2, 4), "window", 4), (TurnWindow(2, 2), "window", 2), (TurnWindow(0, 0), "window", 0)],
)
def test_the_window_bounds_what_the_student_plays(tokenizer, window, end_reason, num_turns):
    episode, _ = play(tokenizer, Script(observations=OBSERVATIONS), window, recorded=window.start)
    assert (episode.outcome, episode.end_reason, len(episode.turns)) == ("ok", end_reason, num_turns)
    assert all((turn.actor == "student") == (turn.index in window) for turn in episode.turns)
    assert len(episode.rows) == (window.start < min(window.stop, 6))


def test_context_length_ends_the_episode_before_it_overflows(tokenizer):
    script = Script(observations=OBSERVATIONS)
    episode, _ = play(tokenizer, script, TurnWindow(0, 6), max_context=150)
    assert (episode.outcome, episode.end_reason) == ("ok", "context_length")
    assert 0 < len(episode.turns) < 6
    longest = max(turn.prompt_tokens for turn in episode.turns)
    assert longest + 12 <= 150 < longest + len(episode.turns[0].token_ids) + 12 + 40
    nothing, _ = play(tokenizer, script, TurnWindow(0, 6), max_context=20)
    assert (nothing.outcome, nothing.end_reason, nothing.rows) == ("ok", "context_length", [])


def test_full_history_is_one_row_with_teacher_turns_masked(tokenizer):
    episode, _ = play(tokenizer, Script(observations=OBSERVATIONS), TurnWindow(2, 4), recorded=3)
    (row,) = episode.rows
    expected = "<|im_start|>system\nYou act.<|im_end|>\n"
    answers = [*ACTIONS[:2], "look", "look"]
    for observation, answer in zip(OBSERVATIONS, answers, strict=False):
        expected += f"<|im_start|>user\n{observation}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
    assert tokenizer.decode(row.token_ids) == expected.removesuffix("\n")
    assert tokenizer.decode(trained_ids(row)) == "look<|im_end|>look<|im_end|>"
    assert row.logprobs == [-0.5] * sum(row.loss_mask)
    by_turn = {t: [i for i, turn in zip(row.token_ids, row.turn_ids, strict=True) if turn == t] for t in range(-1, 4)}
    assert tokenizer.decode(by_turn[-1]) == "<|im_start|>system\nYou act.<|im_end|>\n"
    assert tokenizer.decode(by_turn[0]).startswith("<|im_start|>user\nYou are in room 0")
    assert row.turn_ids == sorted(row.turn_ids)
    assert [turn.cached_tokens for turn in episode.turns[2:]] == [turn.prompt_tokens // 2 for turn in episode.turns[2:]]


def test_compact_history_is_one_row_a_student_turn_with_task_and_last_lines(tokenizer):
    engine = SayingEngine(tokenizer, ["look", "wait"])
    episode, _ = play(
        tokenizer, Script(observations=OBSERVATIONS), TurnWindow(1, 4), recorded=2, engine=engine, history_mode="compact"
    )
    assert len(episode.rows) == 3
    shown = [tokenizer.decode(row.token_ids) for row in episode.rows]
    opening = f"<|im_start|>system\nYou act.<|im_end|>\n<|im_start|>user\n{OBSERVATIONS[0]}\n\n"
    closing = "<|im_end|>\n<|im_start|>assistant\n"
    assert shown[0] == f"{opening}Action 1: {ACTIONS[0]}\nObservation 2: {OBSERVATIONS[1]}{closing}look<|im_end|>"
    assert shown[2] == (
        f"{opening}Observation 2: {OBSERVATIONS[1]}\nAction 2: look\nObservation 3: {OBSERVATIONS[2]}\nAction 3: wait\n"
        f"Observation 4: {OBSERVATIONS[3]}{closing}look<|im_end|>"
    )
    for turn, row in enumerate(episode.rows, start=1):
        assert trained_ids(row) == episode.turns[turn].token_ids
        assert set(row.turn_ids) == {-1, turn}
        assert engine.prompts[turn - 1] == row.token_ids[: -len(trained_ids(row))]


def test_trained_tokens_are_exactly_the_sampled_ones_in_10000_conversations(tokenizer):
    random_text = random.Random(0)
    alphabet = ["<|im_end|>", "<|im_start|>", "\n", " ", "a", "door", "{{ x }}", "é", "猫", "<think>", "assistant"]
    scripts = {
        str(i): Script(observations=[f"{i} " + "".join(random_text.choices(alphabet, k=6)) for _ in range(3)])
        for i in range(5000)
    }
    family = scripted_family(scripts)
    for history_mode in ("full", "compact"):
        engine = DiceEngine(tokenizer.vocab_size, seed=1)
        assignments = [Assignment(task=task, window=TurnWindow(0, 3)) for task in family.tasks("train")]
        episodes = asyncio.run(
            collect_episodes(
                family,
                assignments,
                engine=engine,
                tokenizer=tokenizer,
                settings=settings(max_turns=3, max_new_tokens=6, history_mode=history_mode),
                step=0,
            )
        )
        sampled = {tuple(prompt): c for prompt, c in zip(engine.prompts, engine.completions, strict=True)}
        for episode in episodes:
            assert [token for row in episode.rows for token in trained_ids(row)] == [
                token for turn in episode.turns for token in turn.token_ids
            ]
            for row in episode.rows:  # every sampled span follows, in the row, the very prompt it was sampled from
                starts = [i for i, m in enumerate(row.loss_mask) if m and not row.loss_mask[i - 1]]
                logprobs = []
                for start in starts:
                    completion = sampled[tuple(row.token_ids[:start])]
                    assert row.token_ids[start : start + len(completion.token_ids)] == completion.token_ids
                    logprobs += completion.logprobs
                assert row.logprobs == logprobs


def test_an_answer_cut_by_length_is_closed_with_an_untrained_token(tokenizer):
    engine = DiceEngine(tokenizer.vocab_size, seed=11, avoid=tokenizer.control_ids.values())
    engine._random.random = lambda: 0.9  # never a stop id
    episode, _ = play(tokenizer, Script(observations=OBSERVATIONS), TurnWindow(0, 3), engine=engine)
    (row,) = episode.rows
    assert [turn.finish_reason for turn in episode.turns] == ["length"] * 3
    end = tokenizer.end_of_turn_id
    closing = [m for token, m in zip(row.token_ids, row.loss_mask, strict=True) if token == end]
    assert closing == [0] * len(closing) and end not in trained_ids(row)
    assert tokenizer.decode(row.token_ids).count("<|im_end|>\n<|im_start|>user") == 3  # after the system prompt and twice


def test_results_do_not_depend_on_what_else_is_played(tokenizer):
    seeds = {turn_seed(s, step, TASK, k, turn) for s in (0, 1) for step in (0, 1) for k in (0, 1) for turn in range(5)}
    assert len(seeds) == 40 and all(0 <= seed < 2**63 for seed in seeds)
    other = Task(env="scripted", task_id="u", split="train")
    assert turn_seed(0, 0, TASK, 0, 0) != turn_seed(0, 0, other, 0, 0)
    assert turn_seed(0, 0, TASK, 0, 0) == 5247775602106224663  # on every rank, run and machine


def test_samples_of_a_task_share_a_warmed_prompt(tokenizer):
    long = {name: f"{name}: You are in a hall. " * 8 for name in "ab"}
    scripts = {name: Script(observations=[text] * 3) for name, text in long.items()}
    family, engine = scripted_family(scripts), SayingEngine(tokenizer, ["look"])
    assignments = [Assignment(task=t, window=TurnWindow(0, 2), sample=s) for t in family.tasks("train") for s in (0, 1)]
    episodes = asyncio.run(
        collect_episodes(family, assignments, engine=engine, tokenizer=tokenizer, settings=settings(), step=0)
    )
    assert [(e.task.task_id, e.sample) for e in episodes] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    assert engine.prewarmed == [tokenizer.prompt(long["a"]), tokenizer.prompt(long["b"])]


def test_blocking_environments_run_beside_each_other(tokenizer):
    barrier = threading.Barrier(4, timeout=20)

    class Slow(scripted_family({str(i): Script(observations=OBSERVATIONS) for i in range(4)}, blocking=True)):
        @classmethod
        def make(cls, task):
            barrier.wait()  # passes only when all four are being made at once
            return super().make(task)

    assignments = [Assignment(task=task, window=TurnWindow(0, 2)) for task in Slow.tasks("train")]
    engine = SayingEngine(tokenizer, ["look"])
    episodes = asyncio.run(
        collect_episodes(Slow, assignments, engine=engine, tokenizer=tokenizer, settings=settings(), step=0)
    )
    assert [e.outcome for e in episodes] == ["ok"] * 4


@pytest.mark.parametrize(("blocking", "max_open", "most"), [(False, 3, 3), (True, 3, 3), (True, None, 5), (False, None, 7)])
def test_at_most_max_open_environments_are_open(tokenizer, monkeypatch, blocking, max_open, most):
    """By default all of them, of processes a fixed number."""
    family = scripted_family({str(i): Script(observations=OBSERVATIONS) for i in range(7)})
    open_at_once = []
    monkeypatch.setattr(rollout_episodes, "OPEN_PROCESSES", 5)

    class Counted(family):
        @classmethod
        def make(cls, task):
            environment = super().make(task)
            open_at_once.append(sum(not e.num_closed for e in cls.made))
            return environment

    Counted.blocking = blocking
    assignments = [Assignment(task=task, window=TurnWindow(0, 2)) for task in Counted.tasks("train")]
    engine = SayingEngine(tokenizer, ["look"])
    episodes = asyncio.run(
        collect_episodes(
            Counted, assignments, engine=engine, tokenizer=tokenizer, settings=settings(), step=0, max_open=max_open
        )
    )
    assert max(open_at_once) == most and [e.task.task_id for e in episodes] == [str(i) for i in range(7)]


def test_a_bug_in_an_environment_propagates_and_closes_all(tokenizer):
    family = scripted_family({"a": Script(observations=OBSERVATIONS), "b": Script(observations=OBSERVATIONS)})

    class Broken(family):
        @classmethod
        def make(cls, task):
            environment = super().make(task)
            if task.task_id == "b":
                environment.step = lambda action: 1 / 0
            return environment

    assignments = [Assignment(task=task, window=TurnWindow(0, 2)) for task in Broken.tasks("train")]
    engine = SayingEngine(tokenizer, ["look"])
    with pytest.raises(ZeroDivisionError):
        asyncio.run(collect_episodes(Broken, assignments, engine=engine, tokenizer=tokenizer, settings=settings(), step=0))
    assert [e.num_closed for e in Broken.made] == [1, 1]


def test_a_recorders_own_ids_are_used_where_they_spell_the_text(tokenizer):
    script = Script(observations=OBSERVATIONS)
    demonstration = demonstration_of(TASK, script, ["go go"])
    spelled = [*tokenizer.encode_plain("go"), *tokenizer.encode_plain(" "), *tokenizer.encode_plain("go")]
    forged = [*spelled, tokenizer.end_of_turn_id, *tokenizer.encode_plain("x")]
    for token_ids, expected in ((spelled, spelled), (forged, tokenizer.encode_plain("go go")), ([10**6], None)):
        turn = demonstration.turns[0].__class__(observation=OBSERVATIONS[0], action="go", text="go go", token_ids=token_ids)
        changed = demonstration.__class__(task=TASK, turns=[turn], success=True, source="x")
        episode, environment = play(tokenizer, script, TurnWindow(1, 3), demonstration=changed)
        expected = expected or tokenizer.encode_plain("go go")
        assert episode.turns[0].token_ids == [*expected, tokenizer.end_of_turn_id]
        assert environment.actions[0] == "go"


@pytest.mark.parametrize(
    "text,action",
    [
        ("<think>hm</think><action> go to desk 1 </action>", "go to desk 1"),
        ("<think>\nmaybe <action>x</action>?\n</think>\n<action>look</action>\n", "look"),
        ("<action>look</action>", "look"),
        ("<think>hm</think> go to desk 1", ""),
        ("<action>look", ""),
        ("look</action>", ""),
        ("<action>a</action><action>b</action>", ""),
        ("<action>a<action>b</action></action>", ""),
        ("<action></action>", ""),
        ("", ""),
    ],
)
def test_tags_give_one_action_or_none(text, action):
    assert parse_action(text, "tags") == action


def test_plain_actions_are_the_stripped_text():
    assert parse_action("  go to desk 1\n", "plain") == "go to desk 1"
    with pytest.raises(ValueError, match="action_format"):
        parse_action("x", "json")


def test_settings_refuse_what_they_do_not_know():
    with pytest.raises(ValueError, match="history_mode 'ful' is none of"):
        settings(history_mode="ful")
    with pytest.raises(ValueError, match="max_turns must be at least 1"):
        settings(max_turns=0)
