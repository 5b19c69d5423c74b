"""SGLang serves what the converter writes, with the log-probabilities that transformers gives for the original."""

import json
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
from sglang_process import launch_on_cpu
from tiny_hf import logprobs_of, tiny_model

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import convert_checkpoint  # noqa: E402


def convert(direction, source, target, *options):
    arguments = ["--direction", direction, "--input", str(source), "--output", str(target), *options]
    assert convert_checkpoint.main(arguments) == 0


def served_logprobs(server, ids):
    """Log-probability of each token but the first, as the server scores a prompt."""
    body = {
        "input_ids": ids,
        "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {server.api_key}"}
    request = urllib.request.Request(f"{server.url}/generate", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        scored = json.load(answer)["meta_info"]["input_token_logprobs"]
    assert [token for _, token, _ in scored[1:]] == ids[1:]
    return torch.tensor([logprob for logprob, _, _ in scored[1:]])


@pytest.mark.sglang
@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", ["qwen2", "llama3_rope", "mistral", "qwen3_moe"])
def test_sglang_scores_an_exported_directory_like_transformers_the_original(tmp_path, family):
    model = tiny_model(family, eos_token_id=None, bos_token_id=None)
    model.save_pretrained(tmp_path / "hf")
    sizes = ("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "3")
    experts = ("--expert-model-parallel-size", "2") if family == "qwen3_moe" else ()
    convert("hf-to-megatron", tmp_path / "hf", tmp_path / "shards", *sizes, *experts)
    convert("megatron-to-hf", tmp_path / "shards", tmp_path / "again", "--max-part-gb", "2e-4")
    assert (tmp_path / "again" / "model.safetensors.index.json").exists()
    # Not 96, the last id: SGLang reports it as 0.
    ids = torch.randint(0, 96, (60,), generator=torch.Generator().manual_seed(3)).tolist()
    with launch_on_cpu(tmp_path, model_path=tmp_path / "again") as server:
        torch.testing.assert_close(served_logprobs(server, ids), logprobs_of(model, ids), rtol=0, atol=1e-4)
