"""A real SGLang server on a CPU as the endpoint that plays, by token ids and as a chat endpoint."""

import json
from contextlib import closing
from dataclasses import replace

import pytest

from megatron_tcod.assembly import assemble
from megatron_tcod.config import load_config
from megatron_tcod.endpoint import seat_endpoint
from megatron_tcod.envs.household import Household
from megatron_tcod.evaluate import main

pytestmark = pytest.mark.sglang


@pytest.fixture(scope="module")
def server(household_models, tmp_path_factory):
    pytest.importorskip("aiohttp")
    from sglang_process import launch_on_cpu

    directory = tmp_path_factory.mktemp("served")
    flags = dict(skip_tokenizer_init=False, max_total_tokens=16384, context_length=640)
    environment = household_models / "student"
    with launch_on_cpu(directory, model_path=environment, **flags) as server:
        yield server


@pytest.fixture
def flags(run_flags, server, monkeypatch):
    monkeypatch.setenv("SERVED_KEY", server.api_key)
    return [*run_flags, "--eval-tasks", "4", "--endpoint-url", server.url, "--endpoint-key-env", "SERVED_KEY"]


def played(config, *, outside):
    tasks = Household.tasks("held_out", count=4)
    if outside:
        run = seat_endpoint(config)
    else:
        run = assemble(replace(config, objective=replace(config.objective, objective="sft"),
                               curriculum=replace(config.curriculum, demonstrations="expert")))  # fmt: skip
    with closing(run):
        if not outside:
            run.publish_weights(0)
        return run.play_in_full(tasks, temperature=0.0, seed=7), run.tokenizer


def test_a_served_model_plays_greedily_as_it_does_in_these_processes(single_process, flags):
    config = load_config([*flags, "--endpoint-api", "sglang"])
    outside, _ = played(config, outside=True)
    inside, _ = played(config, outside=False)
    ids = [[[turn.token_ids for turn in one.turns] for one in episodes] for episodes in (outside, inside)]
    assert ids[0] == ids[1] and all(len(one.turns) == 5 for one in outside)


def test_the_kl_of_a_served_model_to_itself_is_zero_and_to_another_is_not(
    single_process, flags, household_models, tmp_path
):
    warm = ["--endpoint-api", "sglang", "--eval-temperature", "1.0", "--eval-samples", "2"]
    for name in ("student", "teacher"):
        output = tmp_path / f"{name}.json"
        judged = ["--teacher", str(household_models / name), "--output", str(output)]
        assert main([*flags, *warm, *judged]) == 0
        record = json.loads(output.read_text())
        assert record["kl_source"] == "sampled_token" and len(record["kl_by_turn"]) == 5
        worst = max(abs(kl) for one in record["tasks"] for kl in one["kl_by_turn"])
        assert (worst < 1e-3) if name == "student" else (record["kl_trajectory"] > 1)


def test_at_another_temperature_than_is_compared_there_is_no_kl_and_it_says_why(single_process, flags, tmp_path, capsys):
    output = tmp_path / "a.json"
    assert main([*flags, "--endpoint-api", "sglang", "--output", str(output)]) == 0
    record = json.loads(output.read_text())
    assert "kl_by_turn" not in record and "eval_temperature 0.4 must be rollout_temperature 1" in record["not_measured"]["kl"]
    assert "no kl: " in capsys.readouterr().out


def test_as_a_chat_endpoint_it_sees_the_same_prompt_and_says_the_same(single_process, flags):
    """Its answers come without control tokens, so that only first turns are the same conversation."""
    config = load_config([*flags, "--endpoint-model", "default"])
    outside, _ = played(config, outside=True)
    inside, tokenizer = played(config, outside=False)
    for theirs, ours in zip(outside, inside, strict=True):
        assert theirs.outcome == "ok" and len(theirs.turns) == 5 and theirs.rows == []
        text = ours.turns[0].text
        for control in tokenizer.control_ids:
            text = text.replace(control, "")
        assert theirs.turns[0].text.strip() == text.strip()
        assert theirs.turns[0].prompt_tokens == len(tokenizer.prompt(ours.turns[0].observation))


def test_a_wrong_key_is_one_message_without_it(single_process, flags, monkeypatch):
    monkeypatch.setenv("SERVED_KEY", "sesame-1234")
    with pytest.raises(OSError, match="status 401") as told:
        main([*flags, "--endpoint-model", "default"])
    assert "sesame" not in str(told.value)
    with pytest.raises(OSError, match="status 401"):
        main([*flags, "--endpoint-api", "sglang"])
