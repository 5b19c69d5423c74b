"""A user's mistake gets one message with the field, what was expected and the fix, before anything starts."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import safetensors.torch

from megatron_tcod.config import Faults
from megatron_tcod.demonstrate import main as demonstrate
from megatron_tcod.envs.demonstrations import write_demonstrations
from megatron_tcod.envs.household import Household
from megatron_tcod.evaluate import main as evaluate
from megatron_tcod.train import main


def refused(argv, entry=main):
    with pytest.raises(ValueError) as caught:
        entry(argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_correct_run_is_described(run_flags, capsys):
    assert main([*run_flags, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "student qwen3: 2 layers" in out and "12 to train on, 3 to evaluate on" in out


def test_world_size_that_does_not_fit(run_flags, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    message = refused([*run_flags, "--tensor-model-parallel-size", "2"])
    assert "world size 3 != tp 2 * pp 1 * cp 1 * dp" in message and "--nproc-per-node" in message


def test_tensor_parallel_size_that_does_not_divide_the_heads(run_flags):
    message = refused([*run_flags, "--tensor-model-parallel-size", "4", "--dry-run"])
    assert "tensor_model_parallel_size 4 does not divide the student's num_attention_heads 2; choose a divisor" in message


def test_pipeline_that_does_not_divide_the_layers(run_flags):
    message = refused([*run_flags, "--pipeline-model-parallel-size", "2", "--dry-run"])
    assert "the teacher's num_layers 3 is not a multiple of the 2 pipeline chunks" in message


def test_teacher_with_another_tokenizer(run_flags, household_models, tmp_path):
    teacher = tmp_path / "other"
    shutil.copytree(household_models / "teacher", teacher)
    tokenizer = json.loads((teacher / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    first, second = list(vocab)[300:302]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (teacher / "tokenizer.json").write_text(json.dumps(tokenizer))
    message = refused([*run_flags, "--teacher", str(teacher), "--dry-run"])
    assert "tokenizer" in message and "differ" in message


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_model_directory_that_is_not_there(run_flags, role):
    assert f"{role} = nowhere: no such directory" in refused([*run_flags, f"--{role}", "nowhere", "--dry-run"])


def test_demonstrations_that_are_not_there(run_flags):
    message = refused([*run_flags, "--curriculum", "b2f", "--demonstrations", "absent.jsonl", "--dry-run"])
    assert "absent.jsonl" in message and "demonstrate" in message


def test_demonstrations_with_a_truncated_line(run_flags, tmp_path):
    from megatron_tcod.envs.demonstrations import write_demonstrations
    from megatron_tcod.envs.household import Household

    path = tmp_path / "cut.jsonl"
    write_demonstrations(path, [Household.expert(task, seed=0) for task in Household.tasks("train", count=3)])
    path.write_bytes(path.read_bytes()[:-40])
    message = refused([*run_flags, "--curriculum", "b2f", "--demonstrations", str(path), "--dry-run"])
    assert f"{path}:" in message


def test_demonstrations_of_no_training_task_and_of_some(run_flags, tmp_path, capsys):
    path = tmp_path / "demonstrations.jsonl"
    tasks = Household.tasks("train", count=3)
    write_demonstrations(path, [Household.expert(task, seed=0) for task in tasks])
    flags = [*run_flags, "--curriculum", "b2f", "--demonstrations", str(path), "--dry-run"]
    assert main(flags) == 0
    assert "replays: 3 of 12 training tasks have a demonstration" in capsys.readouterr().out
    others = [*flags, "--train-split", "held_out"]
    assert "none of the 12 training tasks (env household, train_split held_out) is in it" in refused(others)
    assert main([*others, "--missing-demonstration", "full"]) == 0
    assert "replays: 0 of 12" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("tokenizer.json", {"model": {"vocab": {}, "merges": []}}, "cannot be understood|is no tokenizer"),
        ("tokenizer_config.json", {"eos_token": ["a"]}, r"cannot be understood \(TypeError"),
        ("config.json", {"layer_types": 5}, r"config.json cannot be understood \(TypeError"),
        ("config.json", {"rope_theta": [1]}, r"config.json cannot be understood \(TypeError"),
        ("config.json", {"rope_theta": float("nan")}, "odd: rope_theta nan must be a finite number above 0"),
        ("config.json", {"rope_theta": -1.0}, "odd: rope_theta -1.0 must be a finite number above 0"),
    ],
)
def test_files_of_a_model_with_values_of_another_type(run_flags, household_models, tmp_path, name, change, message):
    student = tmp_path / "odd"
    shutil.copytree(household_models / "student", student)
    content = json.loads((student / name).read_text()) if (student / name).exists() else {}
    (student / name).write_text(json.dumps(content | change))
    assert re.search(message, refused([*run_flags, "--student", str(student), "--dry-run"]))


def test_a_teacher_to_launch_that_is_not_there_is_told_once(run_flags):
    flags = ["--teacher", "sglang", "--teacher-model", "/nowhere", "--dry-run"]
    assert refused([*run_flags, *flags]).startswith("teacher_model = /nowhere: no config.json there")


def test_a_teacher_that_is_to_demonstrate_is_called_one(run_flags, tmp_path):
    flags = [*run_flags, "--demonstrations", str(tmp_path / "d.jsonl")]
    message = refused([*flags, "--teacher", "nowhere"], demonstrate)
    assert message == "teacher = nowhere: no such directory; give --teacher a local Hugging Face directory"
    with pytest.raises(ValueError) as caught:
        demonstrate([*flags, "--rollout-max-context-len", "4096"])
    assert str(caught.value).startswith("rollout_max_context_len = 4096 exceeds the teacher's max_position_embeddings")


def test_settings_are_printed_or_checked(run_flags):
    assert "give one" in refused([*run_flags, "--print-config", "--dry-run"])


def test_a_checkpoint_without_a_shard_or_a_step(single_process, run_flags, tmp_path):
    main([*run_flags, "--train-iters", "2", "--save-interval", "1", "--keep-checkpoints", "2", "--no-eval-at-end"])
    checkpoint = tmp_path / "run" / "checkpoints" / "step_0000001"
    assert not list(checkpoint.glob("*.safetensors")), "its weights are in the shards alone"
    flags = [*run_flags, "--student", str(checkpoint), "--save", str(tmp_path / "other")]
    state, manifest = ((checkpoint / name).read_bytes() for name in ("state.json", "manifest.json"))
    (checkpoint / "state.json").write_text("{}")
    assert "state.json has 2 bytes, expected" in refused(flags, evaluate)
    (checkpoint / "manifest.json").unlink()
    assert "state.json tells no step (KeyError" in refused(flags, evaluate)
    (checkpoint / "manifest.json").write_bytes(manifest)
    shard = next(checkpoint.glob("*.distcp"))
    content = shard.read_bytes()
    shard.write_bytes(content[:100])
    (checkpoint / "state.json").write_bytes(state)
    assert f"{shard.name} has 100 bytes, expected {len(content)}" in refused([*flags, "--dry-run"])
    (checkpoint / "manifest.json").unlink()
    shard.unlink()
    assert f"{shard.name}, which its .metadata names, is missing" in refused([*flags, "--dry-run"])


def test_run_directory_of_another_model(single_process, run_flags, household_models):
    main([*run_flags, "--train-iters", "1"])
    message = refused([*run_flags, "--student", str(household_models / "teacher"), "--dry-run"])
    assert "checkpoint of another model" in message and "hidden_size is 96 there and 128" in message


def test_context_that_the_model_cannot_hold(run_flags):
    with pytest.raises(ValueError) as caught:
        main([*run_flags, "--rollout-max-context-len", "4096", "--dry-run"])
    for fault, role in zip(Faults.of(caught.value), ("student", "teacher"), strict=True):
        assert f"rollout_max_context_len = 4096 exceeds the {role}'s max_position_embeddings = 2048" in fault


def test_what_training_and_the_context_ask_is_told_together_and_once(run_flags):
    wrong = ["--rollout-max-response-len", "4096", "--rollout-max-context-len", "4096", "--lr-warmup-iters", "99"]
    wrong += ["--max-total-tokens", "10"]
    wrong += ["--objective", "sft", "--demonstrations", "expert", "--history-mode", "compact", "--lr-decay-style", "cosine"]
    with pytest.raises(Faults) as caught:
        main([*run_flags, *wrong, "--dry-run"])
    named = [fault.partition(" ")[0] for fault in caught.value.faults]
    of_context = ["rollout_max_context_len", "max_total_tokens", "rollout_max_response_len"]
    assert named == [*of_context, "history_mode", "lr_warmup_iters"]


def test_split_that_the_environment_does_not_have(run_flags):
    for setting in ("--eval-split", "--train-split"):
        message = refused([*run_flags, setting, "unseen", "--dry-run"])
        assert f"{setting[2:].replace('-', '_')} = unseen: " in message and "train or held_out" in message


def test_environment_that_does_not_exist(run_flags):
    assert "did you mean household" in refused([*run_flags, "--env", "houshold", "--dry-run"])


def test_damaged_newest_checkpoint_is_left_to_the_resume(single_process, run_flags, tmp_path):
    main([*run_flags, "--train-iters", "2", "--save-interval", "1"])
    state = tmp_path / "run" / "checkpoints" / "step_0000002" / "state.json"
    state.write_bytes(state.read_bytes()[:-30])
    assert main([*run_flags, "--train-iters", "3", "--save-interval", "1"]) == 0
    assert (tmp_path / "run" / "checkpoints" / "step_0000003").is_dir()


def test_fewer_steps_than_the_run_has_done(single_process, run_flags):
    main([*run_flags, "--train-iters", "2"])
    assert "train_iters = 1, but" in refused([*run_flags, "--train-iters", "1"])


def test_model_without_weights(run_flags, household_models, tmp_path):
    shutil.copytree(household_models / "student", tmp_path / "bare")
    (tmp_path / "bare" / "model.safetensors").unlink()
    assert "safetensors" in refused([*run_flags, "--student", str(tmp_path / "bare"), "--dry-run"])


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"added_tokens": [], "model": {"type": "BPE"}}'])
def test_tokenizer_that_is_none(run_flags, household_models, tmp_path, content):
    shutil.copytree(household_models / "student", tmp_path / "odd")
    (tmp_path / "odd" / "tokenizer.json").write_text(content)
    assert "tokenizer.json" in refused([*run_flags, "--student", str(tmp_path / "odd"), "--dry-run"])


def test_teacher_that_solves_nothing_writes_no_file(single_process, run_flags, tmp_path):
    path = tmp_path / "none.jsonl"
    flags = [*run_flags, "--demonstrations", str(path), "--demonstration-tasks", "2", "--demonstration-samples", "1"]
    assert "solved none of 2 attempts" in refused([*flags, "--teacher-offload"], demonstrate)
    assert not path.exists()


def test_environment_option_that_does_not_exist(run_flags):
    message = refused([*run_flags, "--env-options", "num_place", "8", "--dry-run"])
    assert "num_place" in message and "num_places" in message


def test_demonstrate_does_not_overwrite(run_flags, tmp_path):
    path = tmp_path / "kept.jsonl"
    path.write_text("precious")
    assert "exists; remove it" in refused([*run_flags, "--demonstrations", str(path)], demonstrate)
    assert path.read_text() == "precious"


def test_comparing_what_is_no_evaluation(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    message = refused(["--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")], evaluate)
    assert "is no evaluation record" in message


def from_the_shell(*flags):
    """The lines that training says before it ends with code 2."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-m", "megatron_tcod.train", *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()


def test_from_the_shell_a_mistake_is_one_line_and_exit_code_2():
    lines = from_the_shell("--tensor-paralel-size", "2")
    assert lines[-1] == "error: unknown flag --tensor-paralel-size; did you mean '--tensor-model-parallel-size'?"


def test_from_the_shell_several_mistakes_are_a_line_each(run_flags):
    lines = from_the_shell(*run_flags, "--student", "nowhere", "--eval-split", "unseen", "--dry-run")
    told = [line for line in lines if line.startswith("error: ")]
    assert len(told) == 2 and "student = nowhere" in told[0] and "train or held_out" in told[1]


@pytest.mark.parametrize(
    ("save", "message"),
    [
        ("", "save is empty; give a directory"),
        ("file", "file is there and is no directory"),
        ("file/run", "file is there and is no directory"),
        ("/proc/run", "/proc keeps no files"),
    ],
)
def test_a_save_that_cannot_be_written_is_named_before_anything_starts(run_flags, tmp_path, monkeypatch, save, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert message in refused([*run_flags, "--save", save, "--dry-run"])


def test_records_whose_checkpoints_are_gone_are_not_cut_off(single_process, run_flags, tmp_path):
    main([*run_flags, "--train-iters", "3", "--save-interval", "1"])
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "elsewhere")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    message = refused([*run_flags, "--train-iters", "3", "--save-interval", "1"])
    assert "has records of 3 steps and no checkpoint" in message and "put its checkpoints back" in message
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_damaged_state_of_a_checkpoint_is_left_to_the_resume(single_process, run_flags, tmp_path, caplog):
    main([*run_flags, "--train-iters", "2", "--save-interval", "1"])
    (tmp_path / "run" / "checkpoints" / "step_0000002" / "state.json").write_text('{"shape": []}')
    assert main([*run_flags, "--train-iters", "2", "--save-interval", "1"]) == 0
    assert "falling back to checkpoint step_0000001" in caplog.text


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_weights_that_are_no_numbers_end_an_evaluation_in_one_message(
    single_process, run_flags, household_models, tmp_path, role
):
    shutil.copytree(household_models / role, tmp_path / "broken")
    tensors = safetensors.torch.load_file(tmp_path / "broken" / "model.safetensors")
    tensors["model.norm.weight"].fill_(float("nan"))
    safetensors.torch.save_file(tensors, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FloatingPointError, match="are not finite" if role == "student" else "teacher = .*broken: the KL"):
        evaluate([*run_flags, f"--{role}", str(tmp_path / "broken"), "--eval-tasks", "2"])
