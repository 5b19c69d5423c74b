"""Parallel settings that cannot work get one message with the field, what was found and the fix."""

import json
import shutil

import pytest
import safetensors.torch

from megatron_tcod.config import Faults
from megatron_tcod.train import main


def refused(argv):
    """What is at fault, one line each."""
    with pytest.raises(ValueError) as caught:
        main(argv)
    faults = Faults.of(caught.value)
    assert not any("\n" in fault for fault in faults)
    return faults


@pytest.mark.parametrize(
    ("flags", "world", "message"),
    [
        (["--sequence-parallel"], None, "sequence_parallel cuts tokens over the tensor-parallel ranks"),
        (
            ["--context-parallel-size", "3"],
            None,
            "context_parallel_size 3 shares out the student's 2 query and|context_parallel_size 3 shares out the teacher's 4",
        ),
        (["--recompute-granularity", "full"], None, "recompute_granularity full needs recompute_method"),
        (
            ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "3"],
            None,
            "recompute_num_layers 3 with recompute_method uniform does not divide the 2 layers of a model chunk",
        ),
        (["--recompute-method", "block"], None, "set recompute_granularity full"),
        (["--recompute-granularity", "half"], None, "invalid choice 'half' for argument '--recompute-granularity'"),
        (["--teacher-tensor-model-parallel-size", "8"], None, "size 8 does not divide the teacher's num_attention_heads 4"),
        (["--teacher-pipeline-model-parallel-size", "2"], None, "the teacher's num_layers 3 is not a multiple of the 2"),
        (
            ["--tensor-model-parallel-size", "2", "--teacher-pipeline-model-parallel-size", "3"],
            2,
            "teacher_tensor_model_parallel_size 2 x teacher_pipeline_model_parallel_size 3 does not divide the world of 2",
        ),
        (["--expert-model-parallel-size", "0"], None, "--expert-model-parallel-size: Input should be greater than or equal"),
        (["--expert-model-parallel-size", "2"], 2, "expert_model_parallel_size 2 shares out experts and the trained model"),
        (
            ["--expert-model-parallel-size", "3"],
            4,
            "expert_model_parallel_size 3 does not divide the 4 ranks|size 3 shares out experts and the trained model",
        ),
        (["--teacher-expert-model-parallel-size", "2"], 2, "shares out experts and the teacher has none; set it to 1"),
        (
            ["--teacher-expert-model-parallel-size", "2"],
            3,
            "teacher_expert_model_parallel_size 2 (the student's where unset) does not divide the 3 replicas of the teacher|"
            "shares out experts and the teacher has none",
        ),
        (["--context-parallel-size", "2"], 3, r"world size 3 != tp 1 * pp 1 * cp 2 * dp"),
    ],
)
def test_parallel_settings_that_cannot_work(run_flags, monkeypatch, flags, world, message):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world:
        monkeypatch.setenv("WORLD_SIZE", str(world))
    for part, fault in zip(message.split("|"), refused([*run_flags, *flags, "--dry-run"]), strict=True):
        assert part in fault


def test_tensor_parallel_ranks_may_share_a_key_value_head(run_flags, household_models, tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    student = tmp_path / "student"
    shutil.copytree(household_models / "student", student, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((student / "config.json").read_text())
    assert config["num_attention_heads"] == 2
    (student / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 1}))
    flags = ["--student", str(student), "--init", "random", "--tensor-model-parallel-size", "2", "--dry-run"]
    assert main([*run_flags, *flags]) == 0


@pytest.mark.parametrize(
    "flag",
    [["--teacher-offload"], ["--teacher-tensor-model-parallel-size", "2"], ["--teacher-expert-model-parallel-size", "2"]],
)
def test_settings_of_a_local_teacher_with_one_behind_a_server(run_flags, flag):
    flags = ["--teacher", "sglang", "--teacher-url", "http://127.0.0.1:9", *flag]
    (message,) = refused([*run_flags, *flags, "--dry-run"])
    assert flag[0].removeprefix("--").replace("-", "_") in message and "teacher = sglang" in message


@pytest.mark.parametrize("flag", [["--teacher-offload"], ["--teacher-tensor-model-parallel-size", "2"]])
def test_settings_of_a_teacher_for_a_run_without_one(run_flags, flag):
    (message,) = refused([*run_flags, "--objective", "sft", "--demonstrations", "expert", *flag, "--dry-run"])
    assert flag[0].removeprefix("--").replace("-", "_") in message and "objective = sft has none" in message


def test_layouts_of_student_and_teacher_are_described(run_flags, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "6")
    flags = ["--context-parallel-size", "2", "--teacher-pipeline-model-parallel-size", "3", "--bf16", "--teacher-offload"]
    assert main([*run_flags, *flags, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "layout: tp 1, pp 1, cp 2, dp 3" in out and "teacher's layout: tp 1, pp 3" in out
    assert "teacher's weights: in host memory but while it scores" in out


def test_bf16_run_with_an_offloaded_teacher_and_recomputed_layers_trains_and_saves_bf16(
    single_process, run_flags, tmp_path
):
    flags = ["--bf16", "--teacher-offload", "--recompute-granularity", "full", "--recompute-method", "uniform"]
    assert main([*run_flags, *flags, "--recompute-num-layers", "1", "--no-eval-at-end"]) == 0
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2
    saved = [safetensors.torch.load_file(path) for path in (tmp_path / "run" / "checkpoints").rglob("model.safetensors")]
    assert saved and {str(tensor.dtype) for tensors in saved for tensor in tensors.values()} == {"torch.bfloat16"}
