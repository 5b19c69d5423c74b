"""Students and teachers of other families than the quickstart's, through the whole system."""

import json
import shutil

import pytest
from forked_runs import RunServer

from megatron_tcod.journal import read_journal
from megatron_tcod.train import main

EXPERTS = dict(
    model_type="qwen3_moe", num_experts=6, num_experts_per_tok=2, moe_intermediate_size=64, norm_topk_prob=True
)
SCALED = dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
LLAMA = dict(model_type="llama", rope_scaling=SCALED, tie_word_embeddings=True)
MISTRAL = dict(model_type="mistral", sliding_window=2048)


def remade(source, target, changes, *, seed):
    """The directory's tokenizer and sizes with a random model of another family."""
    import torch
    import transformers

    shutil.copytree(source, target)
    (target / "model.safetensors").unlink()
    config = {**json.loads((source / "config.json").read_text()), "initializer_range": 0.2, **changes}
    del config["architectures"]
    (target / "config.json").write_text(json.dumps(config))
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(target))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.gate.weight"):  # zeros: every expert alike
                parameter.normal_(0.0, 0.2)
    model.save_pretrained(target)


@pytest.mark.parametrize(
    ("student", "teacher"), [(EXPERTS, MISTRAL), (LLAMA, EXPERTS)], ids=["experts-mistral", "llama3-experts"]
)
def test_a_step_trains_what_the_engine_plays_and_the_checkpoint_loads_in_transformers(
    single_process, household_models, run_flags, tmp_path, student, teacher
):
    import transformers
    from safetensors.torch import load_file

    for seed, (name, changes) in enumerate({"student": student, "teacher": teacher}.items()):
        remade(household_models / name, tmp_path / name, changes, seed=seed)
    flags = ["--student", str(tmp_path / "student"), "--teacher", str(tmp_path / "teacher")]
    assert main([*run_flags, *flags, "--train-iters", "2"]) == 0
    second = list(read_journal(tmp_path / "run" / "metrics.jsonl").records)[1]
    assert second["weights/version"] == 1
    assert second["logprob/rollout_gap"] < 1e-4, "step 2 was sampled with the weights that step 2 trained"
    latest = tmp_path / "run" / "checkpoints" / "step_0000002"
    before = load_file(tmp_path / "student" / "model.safetensors")
    transformers.AutoModelForCausalLM.from_pretrained(latest).save_pretrained(tmp_path / "saved")
    after = load_file(tmp_path / "saved" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all((before[name] != after[name]).any() for name in before)
    assert main([*run_flags, *flags, "--train-iters", "3"]) == 0, "it resumes"


def test_two_ranks_that_share_the_experts_train_what_their_engines_play_and_one_process_goes_on(
    household_models, run_flags, tmp_path
):
    for seed, name in enumerate(("student", "teacher")):
        remade(household_models / name, tmp_path / name, EXPERTS, seed=seed)
    flags = ["--student", str(tmp_path / "student"), "--teacher", str(tmp_path / "teacher"), "--no-eval-at-end"]
    with RunServer(tmp_path) as server:
        shared = ["--expert-model-parallel-size", "2", "--use-distributed-optimizer", "--train-iters", "2"]
        run = server.start([*run_flags, *flags, *shared], num_ranks=2)
        assert run.wait(300) == [0, 0], run.said()
        run = server.start([*run_flags, *flags, "--train-iters", "3"])
        assert run.wait(300) == [0], run.said()
    records = list(read_journal(tmp_path / "run" / "metrics.jsonl").records)
    assert [record["weights/version"] for record in records] == [0, 1, 2]
    gaps = [record["logprob/rollout_gap"] for record in records]
    assert max(gaps) < 1e-4, "each step was sampled with the weights that it trained"
