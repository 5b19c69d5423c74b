"""The whole system on a small world, in one process, against transformers and against its own records."""

import json

import pytest
import torch

from megatron_tcod.journal import read_journal
from megatron_tcod.train import main


def records(directory, name):
    reading = read_journal(directory / name)
    assert reading.num_bad == 0
    return list(reading.records)


def reference_kl(student, teacher, token_ids):
    """Reverse KL at every position that predicts a token, in float64, from transformers' logits."""
    ids = torch.tensor([token_ids])
    with torch.no_grad():
        s, t = (model(ids).logits[0, :-1].double().log_softmax(-1) for model in (student, teacher))
    return (s.exp() * (s - t)).sum(-1).tolist(), s.gather(-1, ids[0, 1:, None])[:, 0].tolist()


@pytest.mark.parametrize("history", ["full", "compact"])
def test_recorded_kl_and_log_probabilities_equal_those_of_transformers(
    single_process, household_models, run_flags, tmp_path, history
):
    import transformers

    assert main([*run_flags, "--history-mode", history, "--train-iters", "1"]) == 0
    student, teacher = (
        transformers.Qwen3ForCausalLM.from_pretrained(household_models / name).double() for name in ("student", "teacher")
    )
    episodes = records(tmp_path / "run", "trajectories.jsonl")
    assert len(episodes) == 3
    num_compared = 0
    for episode in episodes:
        by_turn = [value for turn in episode["tokens_kl"] for value in turn]
        at_sampling, expected, expected_logprob = [], [], []
        for row in episode["rows"]:
            kl, logprob = reference_kl(student, teacher, row["token_ids"])
            trained = [at - 1 for at, sampled in enumerate(row["loss_mask"]) if sampled]
            expected += [kl[at] for at in trained]
            expected_logprob += [logprob[at] for at in trained]
            at_sampling += row["logprobs"]
        num_compared += len(expected)
        assert by_turn == pytest.approx(expected, rel=1e-3, abs=1e-4)
        assert at_sampling == pytest.approx(expected_logprob, abs=1e-4)  # the engine's, from its cache
        later = [turn for turn in episode["turns"] if turn["index"] > 0]
        if history == "full":
            assert all(turn["cached_tokens"] > 0 for turn in later)
    assert num_compared > 20


def test_trained_weights_reach_engine_and_checkpoint(single_process, household_models, run_flags, tmp_path):
    from safetensors.torch import load_file

    assert main([*run_flags, "--train-iters", "2"]) == 0
    first, second = records(tmp_path / "run", "metrics.jsonl")
    assert (first["weights/version"], second["weights/version"]) == (0, 1)
    assert second["logprob/rollout_gap"] < 1e-4, "step 2 was sampled with the weights that step 2 trained"
    latest = tmp_path / "run" / "checkpoints" / "step_0000002"
    before = load_file(household_models / "student" / "model.safetensors")
    after = load_file(latest / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_f2b_grows_the_window_with_the_step(single_process, run_flags, tmp_path):
    main([*run_flags, "--curriculum", "f2b", "--eta", "1", "--k-start", "2", "--train-iters", "3"])
    episodes = records(tmp_path / "run", "trajectories.jsonl")
    for episode in episodes:
        k = 2 + episode["step"]
        assert episode["curriculum_k"] == k and episode["window"] == {"start": 0, "stop": min(k, 5)}
        assert len(episode["turns"]) == min(k, 5) and episode["end_reason"] in ("window", "max_turns")
        assert episode["weight_version"] == episode["step"]
    assert [record["curriculum/k"] for record in records(tmp_path / "run", "metrics.jsonl")] == [2, 3, 4]


def test_b2f_replays_the_teacher_and_trains_only_the_student(single_process, run_flags, tmp_path):
    from megatron_tcod.envs.demonstrations import write_demonstrations
    from megatron_tcod.envs.household import Household

    tasks = Household.tasks("train", count=12)
    demonstrations = {task.task_id: Household.expert(task, seed=0) for task in tasks}
    path = tmp_path / "demonstrations.jsonl"
    write_demonstrations(path, demonstrations.values())
    flags = [*run_flags, "--max-turns", "24", "--curriculum", "b2f", "--k-start", "2", "--demonstrations", str(path)]
    flags += ["--rollout-max-context-len", "1024"]
    main([*flags, "--train-iters", "3"])
    episodes = records(tmp_path / "run", "trajectories.jsonl")
    assert {episode["outcome"] for episode in episodes} == {"ok"}
    for episode in episodes:
        recorded = demonstrations[episode["task"]["task_id"]].turns
        start = len(recorded) - 2 - episode["step"] // 2
        assert episode["window"]["start"] == start
        replayed = [turn for turn in episode["turns"] if turn["actor"] == "teacher"]
        assert [turn["action"] for turn in replayed] == [turn.action for turn in recorded[:start]]
        (row,) = episode["rows"]
        trained = [turn for turn, sampled in zip(row["turn_ids"], row["loss_mask"], strict=True) if sampled]
        assert min(trained) == start
        sampled = [token for turn in episode["turns"] if turn["actor"] == "student" for token in turn["token_ids"]]
        masked = [token for token, mask in zip(row["token_ids"], row["loss_mask"], strict=True) if mask]
        assert masked == sampled


@pytest.mark.parametrize("history", ["full", "compact"])
def test_prefix_trees_train_the_same_on_fewer_tokens_and_say_how_many(single_process, run_flags, tmp_path, history):
    from megatron_tcod.envs.demonstrations import write_demonstrations
    from megatron_tcod.envs.household import Household

    tasks = Household.tasks("train", count=12)
    path = tmp_path / "demonstrations.jsonl"
    write_demonstrations(path, [Household.expert(task, seed=0) for task in tasks])
    flags = [*run_flags, "--max-turns", "24", "--curriculum", "b2f", "--demonstrations", str(path), "--train-iters", "2"]
    flags += ["--rollout-max-context-len", "1024", "--n-samples-per-prompt", "4", "--history-mode", history]
    flags += ["--b2f-stop", "demonstration", "--k-start", "2"]
    apart, tree = [], []
    for found, flag in ((apart, "--no-prefix-tree"), (tree, "--prefix-tree")):
        main([*flags, flag, "--save", str(tmp_path / flag)])
        found += records(tmp_path / flag, "metrics.jsonl")
    for expected, actual in zip(apart, tree, strict=True):
        assert actual["tokens/unshared"] == expected["tokens/unshared"] == expected["tokens/packed"]
        assert actual["tokens/packed"] < expected["tokens/packed"] / (2 if history == "full" else 1.2)
        assert actual["packing/saving"] == actual["tokens/unshared"] / actual["tokens/packed"]
        for key in ("train/loss", "train/grad_norm", "kl/token", "tokens/trained"):
            assert actual[key] == pytest.approx(expected[key], rel=1e-4), key


def test_b2f_counts_tasks_without_a_demonstration_or_plays_them_in_full(single_process, run_flags, tmp_path):
    from megatron_tcod.envs.demonstrations import write_demonstrations
    from megatron_tcod.envs.household import Household

    first, *others = Household.tasks("train", count=3)
    path = tmp_path / "demonstrations.jsonl"
    write_demonstrations(path, [Household.expert(first, seed=0)])
    flags = [*run_flags, "--train-tasks", "3", "--max-turns", "20", "--curriculum", "b2f", "--demonstrations", str(path)]
    main([*flags, "--train-iters", "1"])
    main([*flags, "--train-iters", "1", "--missing-demonstration", "full", "--save", str(tmp_path / "full")])
    (record,) = records(tmp_path / "run", "metrics.jsonl")
    assert (record["rollout/ok"], record["rollout/outcome/no_demonstration"]) == (1, 2)
    played = {one["task"]["task_id"]: one for one in records(tmp_path / "full", "trajectories.jsonl")}
    assert all(played[task.task_id]["window"] == {"start": 0, "stop": 20} for task in others)
    assert played[first.task_id]["window"]["start"] > 0


def test_a_task_that_is_drawn_twice_in_a_step_is_played_twice(single_process, run_flags, tmp_path):
    main([*run_flags, "--train-tasks", "2", "--rollout-batch-size", "4", "--train-iters", "1"])
    episodes = records(tmp_path / "run", "trajectories.jsonl")
    assert sorted((one["task"]["task_id"], one["sample"]) for one in episodes) == sorted(
        (one["task"]["task_id"], sample) for one in episodes[:2] for sample in (0, 1)
    )
    texts = {(one["task"]["task_id"], one["sample"]): [turn["token_ids"] for turn in one["turns"]] for one in episodes}
    assert len({str(tokens) for tokens in texts.values()}) == 4


def test_ids_that_the_tokenizer_does_not_have_are_neither_sampled_nor_compared(
    single_process, household_models, run_flags, tmp_path
):
    import shutil

    import transformers

    tokenizer = json.loads((household_models / "student" / "tokenizer.json").read_text())
    num_known = 1 + max(*tokenizer["model"]["vocab"].values(), *(token["id"] for token in tokenizer["added_tokens"]))
    for seed, name in enumerate(("student", "teacher")):
        shutil.copytree(household_models / name, tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text()) | {"vocab_size": num_known + 300 + 100 * seed}
        torch.manual_seed(seed)
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**config | {"initializer_range": 0.2}))
        model.save_pretrained(tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    flags = ["--student", str(tmp_path / "student"), "--teacher", str(tmp_path / "teacher"), "--train-iters", "1"]
    main([*run_flags, *flags])
    (record,) = records(tmp_path / "run", "metrics.jsonl")
    turns = [turn for one in records(tmp_path / "run", "trajectories.jsonl") for turn in one["turns"]]
    sampled = [token for turn in turns for token in turn["token_ids"]]
    assert len(sampled) > 50 and max(sampled) < num_known
    assert record["logprob/rollout_gap"] < 1e-4


@pytest.mark.parametrize("objective", ["forward_kl", "jsd", "sampled_token"])
def test_every_objective_trains(single_process, run_flags, tmp_path, objective):
    main([*run_flags, "--objective", objective, "--train-iters", "1"])
    (record,) = records(tmp_path / "run", "metrics.jsonl")
    assert record["kl/token"] > 0 and record["train/grad_norm"] > 0


def test_sft_learns_what_it_is_shown(single_process, run_flags, tmp_path):
    flags = [*run_flags, "--objective", "sft", "--demonstrations", "expert", "--train-tasks", "3", "--max-turns", "24"]
    main([*flags, "--train-iters", "30", "--lr", "3e-3"])
    losses = [record["train/loss"] for record in records(tmp_path / "run", "metrics.jsonl")]
    assert losses[-1] < 0.5 * losses[0]


def test_evaluation_in_training_plays_the_weights_of_the_checkpoint(single_process, run_flags, tmp_path):
    from megatron_tcod.evaluate import main as evaluate

    flags = [*run_flags, "--objective", "sft", "--demonstrations", "expert", "--max-turns", "24"]
    main([*flags, "--train-iters", "20", "--lr", "3e-3", "--eval-tasks", "6"])
    (during,) = (tmp_path / "run" / "evaluation").glob("*.json")
    checkpoint = tmp_path / "run" / "checkpoints" / "step_0000020"
    output = tmp_path / "after.json"
    evaluate([*flags, "--eval-tasks", "6", "--student", str(checkpoint), "--output", str(output)])
    assert json.loads(during.read_text())["tasks"] == json.loads(output.read_text())["tasks"]
    untrained = tmp_path / "before.json"
    evaluate([*flags, "--eval-tasks", "6", "--output", str(untrained)])
    assert json.loads(untrained.read_text())["tasks"] != json.loads(output.read_text())["tasks"]


def test_a_checkpoint_without_hugging_face_weights_is_evaluated_like_any_model(single_process, run_flags, tmp_path):
    from megatron_tcod.evaluate import main as evaluate

    main([*run_flags, "--save-interval", "1", "--eval-interval", "1"])
    checkpoint = tmp_path / "run" / "checkpoints" / "step_0000001"
    assert not (checkpoint / "model.safetensors").exists()
    assert (checkpoint.with_name("step_0000002") / "model.safetensors").exists(), "the last one always has them"
    evaluate([*run_flags, "--student", str(checkpoint), "--output", str(tmp_path / "after.json")])
    during, after = (
        json.loads(path.read_text())
        for path in (tmp_path / "run" / "evaluation" / "step_0000001.json", tmp_path / "after.json")
    )
    assert (after["step"], after["tasks"]) == (1, during["tasks"])


def test_without_eval_at_end_a_finished_run_is_saved_and_not_evaluated(single_process, run_flags, tmp_path):
    for _ in range(2):  # the second finds the run finished
        main([*run_flags, "--no-eval-at-end"])
        assert not list((tmp_path / "run").glob("evaluation/*"))
        assert (tmp_path / "run" / "checkpoints" / "step_0000002" / "state.json").is_file()


def test_evaluations_of_one_run_are_paired_and_have_intervals(single_process, run_flags, tmp_path, capsys):
    from megatron_tcod.evaluate import main as evaluate

    main([*run_flags, "--eval-interval", "1"])
    files = sorted((tmp_path / "run" / "evaluation").glob("*.json"))
    assert [json.loads(path.read_text())["step"] for path in files] == [1, 2]
    first, second = (json.loads(path.read_text()) for path in files)
    assert [task["task_id"] for task in first["tasks"]] == [task["task_id"] for task in second["tasks"]]
    low, high = first["interval"]
    assert low <= first["success"] <= high
    capsys.readouterr()
    assert evaluate(["--compare", *map(str, files)]) == 0
    assert "McNemar" in capsys.readouterr().out


def test_printed_configuration_reads_back_equal(run_flags, tmp_path, capsys):
    from megatron_tcod.config import load_config

    assert main([*run_flags, "--print-config"]) == 0
    path = tmp_path / "printed.toml"
    path.write_text(capsys.readouterr().out)
    assert load_config(["--config", str(path)]) == load_config(run_flags)
