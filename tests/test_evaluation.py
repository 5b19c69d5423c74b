"""Evaluations: figures against hand counts, endpoints against the same model in these processes, and damaged files."""

import json
from contextlib import closing
from dataclasses import replace

import pytest

from megatron_tcod.assembly import assemble
from megatron_tcod.config import EvaluationConfig, load_config
from megatron_tcod.endpoint import seat_endpoint
from megatron_tcod.envs.household import Household
from megatron_tcod.evaluate import main
from megatron_tcod.evaluation import comparison_lines, evaluation_record, read_evaluation, summary_lines, write_evaluation
from megatron_tcod.trajectory import Episode, Task, Turn, TurnWindow


def episode(task_id, success, *, family="heat", sample=0, accepted=(True,), outcome="ok"):
    turns = [
        Turn(index=index, actor="student", observation="o", text="a", action="a", is_accepted=one)
        for index, one in enumerate(accepted)
    ]
    task = Task(env="household", task_id=task_id, split="held_out", family=family)
    return Episode(
        task=task, sample=sample, step=0, weight_version=0, curriculum_k=9, window=TurnWindow(0, 9), turns=turns, rows=[],
        outcome=outcome, end_reason="done", success=success,
    )  # fmt: skip


def record_of(episodes, scores=None, **settings):
    config = EvaluationConfig(**settings)
    return evaluation_record(0, episodes, scores or {}, config=config, max_turns=9, player="a", seconds=1.0)


def test_figures_are_those_of_a_hand_count():
    episodes = [
        *(episode("heat/1", solved, sample=index, accepted=(True, False)) for index, solved in enumerate((1, 0, 0, 1))),
        *(episode("heat/2", False, sample=index, accepted=(None, True)) for index in range(4)),
        *(episode("cool/1", True, sample=index, family="cool", accepted=(False,) * 5) for index in range(4)),
    ]
    scores = {0: {0: {"reverse_kl": [0.5, 0.25]}, 1: {"reverse_kl": [1.0]}}, 2: {0: {"reverse_kl": [0.25]}}}
    record = record_of(episodes, scores, eval_samples=4)
    assert record["success"] == pytest.approx(6 / 12)
    # heat/1 has two successes in four tries: two of them hold one with probability 1 - 1/6
    assert record["pass_at"] == pytest.approx({"1": 0.5, "2": (5 / 6 + 0 + 1) / 3, "4": 2 / 3})
    assert record["families"]["heat"]["success"] == pytest.approx(2 / 8)
    assert record["families"]["cool"]["invalid_actions"] == 1
    assert record["invalid_actions"] == pytest.approx((4 + 0 + 20) / (8 + 4 + 20))
    assert record["mean_turns"] == pytest.approx((8 + 8 + 20) / 12)
    assert record["mean_turns_solved"] == pytest.approx((4 + 20) / 6)
    assert record["kl_by_turn"] == pytest.approx([(0.75 + 0.25) / 2, 1.0])
    assert record["kl_trajectory"] == pytest.approx((1.75 + 0.25) / 2)


def test_what_was_not_measured_is_absent_and_named():
    record = record_of([episode("a", True, accepted=(None, None))])
    assert not {"kl_trajectory", "kl_by_turn", "invalid_actions", "kl_source"} & record.keys()
    assert "invalid_actions" in record["not_measured"] and "kl_by_turn" not in record["tasks"][0]
    assert "no invalid_actions: the environment does not say" in "\n".join(summary_lines("a", record))


def test_a_fault_is_not_a_success_and_is_told():
    record = record_of([episode("a", True), episode("b", True, outcome="env_fault"), episode("c", False)])
    assert record["success"] == pytest.approx(1 / 3)
    assert "env_fault: 1 episodes, counted as not solved" in "\n".join(summary_lines("a", record))


def test_several_samples_are_compared_by_task_and_single_ones_by_mcnemar():
    solves = {"a": (3, 0), "b": (3, 1), "c": (2, 0), "d": (3, 1), "e": (0, 1)}
    records = {
        name: record_of([
            episode(task, index < counts[which], sample=index) for task, counts in solves.items() for index in range(3)
        ])
        for which, name in enumerate("xy")
    }  # fmt: skip
    (line,) = comparison_lines(records)
    # differences in thirds 3 2 2 2 -1; of 32 sign choices those with |total| >= 8: 8 and 10 either way
    assert "differs by +53.3%" in line and "p = 0.1250" in line
    single = {name: record_of(first_samples(record)) for name, record in records.items()}
    assert comparison_lines(single) == [
        "x against y on 5 shared tasks: only the first solves 2, only the second 1; exact McNemar p = 1.0000"
    ]


def first_samples(record):
    return [episode(entry["task_id"], entry["success"]) for entry in record["tasks"] if entry["sample"] == 0]


def test_unlike_settings_are_told_with_a_comparison():
    cold, hot = (record_of([episode("a", True)], eval_temperature=heat) for heat in (0.0, 1.0))
    assert any("temperature 0.0 against 1.0" in line for line in comparison_lines({"a": cold, "b": hot}))


def test_a_file_reads_back_equal_and_the_first_version_is_still_read(tmp_path):
    record = record_of([episode("a", True), episode("b", False)], {0: {0: {"reverse_kl": [float("nan")]}}})
    write_evaluation(tmp_path / "a.json", record)
    read = read_evaluation(str(tmp_path / "a.json"))
    assert read["tasks"][1] == record["tasks"][1] and read["tasks"][0]["kl_by_turn"] == [None]
    assert "by turn: -" not in "\n".join(summary_lines("a", read))
    first = {"task_id": "a", "family": "", "success": True, "turns": 3, "outcome": "ok", "kl_by_turn": [0.1]}
    old = {"step": 4, "split": "held_out", "temperature": 0.4, "success": 1.0, "interval": [0.2, 1.0], "mean_turns": 3.0,
           "kl_trajectory": 0.1, "seconds": 1.0, "tasks": [first]}  # fmt: skip
    (tmp_path / "old.json").write_text(json.dumps(old))
    old = read_evaluation(str(tmp_path / "old.json"))
    assert "trajectory KL 0.100; by turn: 0.100" in "\n".join(summary_lines("old", old))
    assert "1 shared tasks" in comparison_lines({"old": old, "new": read})[0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:-20], "is no JSON"),
        (lambda text: "", "is no JSON"),
        (lambda text: "[1, 2]", "is no evaluation record"),
        (lambda text: "[" * 100_000, "is no JSON"),
        (lambda text: text.replace('"success":true', '"success":"yes"'), r"`\$.tasks\[0\].success`"),
        (lambda text: text.replace('"turns":1', '"turns":-1.5'), r"`\$.tasks\[0\].turns`"),
        (lambda text: text.replace('"version":2', '"version":3'), "version 3, expected at most 2"),
        (lambda text: text.replace('"version":2', '"version":"2"'), "version '2', expected"),
        (lambda text: text.replace('"interval":[', '"interval":[0.0,'), "interval"),
        (lambda text: text.replace('"b"', '"a"'), "task 'a', sample 0 is there twice"),
        (lambda text: json.dumps(json.loads(text) | {"tasks": []}), "holds no task"),
    ],
)
def test_a_damaged_file_is_one_message_that_names_the_field(tmp_path, damage, message):
    path = tmp_path / "a.json"
    write_evaluation(path, record_of([episode("a", True), episode("b", False)]))
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match=message):
        read_evaluation(str(path))


@pytest.fixture
def endpoint_flags(run_flags):
    return [*run_flags, "--max-turns", "9", "--eval-tasks", "6", "--eval-samples", "2", "--eval-temperature", "0.7"]


def said(episodes):
    return [
        [(turn.observation, turn.text, turn.action, turn.is_accepted, turn.finish_reason) for turn in one.turns]
        for one in episodes
    ]


def test_a_model_behind_an_endpoint_plays_as_it_does_in_these_processes(single_process, household_models, endpoint_flags):
    """The same seeds give the same words, over HTTP as text and here as tokens."""
    pytest.importorskip("aiohttp")
    import transformers
    from chat_endpoint import ChatEndpoint, ModelAnswers

    from megatron_tcod.rollout.chat import TurnTokenizer

    config = load_config([*endpoint_flags, "--objective", "sft", "--demonstrations", "expert"])
    tasks = Household.tasks("held_out", count=6)
    with closing(assemble(config)) as run:
        run.publish_weights(0)
        inside = run.play_in_full(tasks, temperature=0.7, seed=7, num_samples=2)
    directory = household_models / "student"
    answers = ModelAnswers(
        transformers.Qwen3ForCausalLM.from_pretrained(directory), TurnTokenizer.from_directory(directory),
        max_running=16, max_total_tokens=16384, max_context=512,
    )  # fmt: skip
    with ChatEndpoint(answers) as endpoint:
        served = replace(config, endpoint=replace(config.endpoint, endpoint_url=endpoint.url))
        with closing(seat_endpoint(served)) as player:
            outside = player.play_in_full(tasks, temperature=0.7, seed=7, num_samples=2)
    assert said(outside) == said(inside) and len(outside) == 12
    assert len({tuple(turn[1] for turn in one) for one in said(inside)}) == 12, "samples differ, so that the seeds matter"
    assert all(one.rows == [] for one in outside)


def test_evaluating_an_endpoint_gives_every_figure_but_those_of_tokens(
    single_process, run_flags, tmp_path, capsys, monkeypatch
):
    pytest.importorskip("aiohttp")
    from chat_endpoint import ChatEndpoint, one_solves_one_looks

    monkeypatch.setenv("A_KEY", "sesame-1234")
    output = tmp_path / "out" / "a.json"
    flags = [*run_flags, "--max-turns", "20", "--eval-tasks", "6", "--eval-samples", "2", "--output", str(output)]
    flags += ["--tensor-model-parallel-size", "2"]  # of a training run, and nothing to a model that is elsewhere
    with ChatEndpoint(one_solves_one_looks()) as endpoint:
        assert main([*flags, "--endpoint-url", endpoint.url, "--endpoint-key-env", "A_KEY"]) == 0
    record = read_evaluation(str(output))
    assert record["success"] == 0.5 and record["pass_at"] == {"1": 0.5, "2": 1.0}
    assert len(record["families"]) == 6 and all(one["pass_at"]["2"] == 1 for one in record["families"].values())
    assert record["invalid_actions"] == 0 and record["player"].startswith("tiny at http://127.0.0.1")
    assert "kl_trajectory" not in record and set(record["not_measured"]) == {"kl", "generated_tokens"}
    assert endpoint.headers[0]["Authorization"] == "Bearer sesame-1234"
    out = capsys.readouterr()
    assert "pass@1 50.0%, pass@2 100.0%" in out.out and "no kl: the endpoint tells no token ids" in out.out
    assert "sesame" not in out.out + out.err + output.read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--endpoint-url", "host:1"], "no server address"),
        (["--endpoint-url", "http://u:p@127.0.0.1:1"], "and the key by endpoint_key_env"),
        (["--endpoint-url", "http://127.0.0.1:1", "--endpoint-key-env", "NOT_THERE"], "no such environment variable"),
        (["--endpoint-url", "http://127.0.0.1:1", "--endpoint-timeout", "0.2"], "cannot connect"),
        (["--endpoint-url", "http://127.0.0.1:1", "--env", "housebold"], "did you mean household"),
    ],
)
def test_a_mistake_about_the_endpoint_is_one_message(single_process, run_flags, flags, message):
    pytest.importorskip("aiohttp")
    with pytest.raises((ValueError, OSError), match=message):
        main([*run_flags, *flags])
