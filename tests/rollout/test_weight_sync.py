"""What goes to the servers, and what they must hold, without a server."""

import base64
import hashlib
import io
import pickle
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError

pytest.importorskip("aiohttp")

from tiny_hf import tiny_model  # noqa: E402

from megatron_tcod.rollout.sglang_client import ServerFeatures  # noqa: E402
from megatron_tcod.rollout.weight_proof import Expected, UnprovenWeights, gpu_checksum  # noqa: E402

from megatron_tcod.rollout import weight_sync  # noqa: E402  isort: skip
from megatron_tcod.rollout.weight_sync import FromDisk, bucket_payload, buckets  # noqa: E402

FEATURES = ServerFeatures(device="cpu", dtype="float32", has_checksums=True)


@pytest.mark.parametrize("count,checksum", [(1, "3d93a6540b54ef2a"), (5, "aaab2c65b3cfd9a4"), (20000, "9c836addd5575782")])
def test_the_checksum_of_gpus_is_that_of_sglangs_kernel(count, checksum):
    """Recorded from SGLang 0.5.21's Triton kernel under Triton's interpreter; 20,000 values are two tiles."""
    assert gpu_checksum(torch.arange(count, dtype=torch.float32).sqrt().to(torch.bfloat16)) == checksum


def test_buckets_hold_every_tensor_in_order_and_at_most_the_limit():
    tensors = [(str(i), torch.zeros(size)) for i, size in enumerate((3, 3, 3, 9, 1, 1))]
    found = list(buckets(iter(tensors), 24))
    assert [[name for name, _ in bucket] for bucket in found] == [["0", "1"], ["2"], ["3"], ["4", "5"]]


def test_a_bucket_is_what_sglang_reads_and_names_only_what_it_lets_through():
    bucket = [("a", torch.randn(3, 5)), ("b", torch.randn(7).to(torch.bfloat16)), ("c", torch.randn(2, 2).t())]
    loaded, globals_seen = [], set()

    class Watching(pickle.Unpickler):
        def find_class(self, module, name):
            globals_seen.add((module, name))
            return super().find_class(module, name)

    content = Watching(io.BytesIO(base64.b64decode(bucket_payload(bucket)))).load()
    for entry in content["metadata"]:
        assert entry.end_idx - entry.start_idx == entry.numel
        flat = content["flattened_tensor"][entry.start_idx : entry.end_idx]
        loaded.append((entry.name, flat.view(entry.dtype).reshape(entry.shape)))
    for (name, tensor), (found, value) in zip(bucket, loaded, strict=True):
        assert found == name and value.dtype == tensor.dtype and torch.equal(value, tensor)
    assert globals_seen <= {
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch.storage", "_load_from_bytes"),
        ("collections", "OrderedDict"),
        ("types", "SimpleNamespace"),
        ("torch", "float32"),
        ("torch", "bfloat16"),
    }


def served(state, *, dtype=torch.float32):
    """Checksums of the tensors as a server fuses and pads them, written down independently."""
    held = {}
    for name, tensor in state.items():
        prefix = name.rsplit(".", 2)[0]
        if name.endswith("q_proj.weight"):
            parts = [state[f"{prefix}.{part}_proj.weight"] for part in "qkv"]
            held[f"{prefix}.qkv_proj.weight"] = torch.cat(parts)
        elif name.endswith("gate_proj.weight"):
            padded = torch.zeros(2, 96, tensor.shape[1])
            padded[0, :80], padded[1, :80] = tensor, state[f"{prefix}.up_proj.weight"]
            held[f"{prefix}.gate_up_proj.weight"] = padded.reshape(192, -1)
        elif name.endswith("down_proj.weight"):
            held[name] = torch.cat([tensor, torch.zeros(len(tensor), 16)], dim=1)
        elif name in ("model.embed_tokens.weight", "lm_head.weight"):
            held[name] = torch.cat([tensor, torch.zeros(31, tensor.shape[1])])
        elif not name.endswith(("k_proj.weight", "v_proj.weight", "up_proj.weight")):
            held[name] = tensor
    as_bytes = {name: tensor.to(dtype).contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in held.items()}
    return {name: hashlib.sha256(data).digest()[:8].hex() for name, data in as_bytes.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checksums_tell_every_tensor_of_a_dense_model_and_one_wrong_element(dtype):
    state = {name: tensor.detach().clone() for name, tensor in tiny_model("qwen3").state_dict().items()}
    expected = Expected(ServerFeatures(device="cpu", dtype=str(dtype).removeprefix("torch."), has_checksums=True))
    for name, tensor in state.items():
        expected.add(name, tensor)
    assert expected.compare(served(state, dtype=dtype)) == []
    assert expected.compare(served(state, dtype=dtype) | {"strange.weight": "00"}) == ["strange.weight"]
    for name in ("model.layers.1.self_attn.k_proj.weight", "model.layers.2.mlp.up_proj.weight", "model.norm.weight"):
        other = {key: tensor.clone() for key, tensor in state.items()}
        other[name].view(-1)[5] += 1
        with pytest.raises(UnprovenWeights, match="1 of 27 tensors differ"):
            expected.compare(served(other, dtype=dtype))


def test_a_server_that_shares_no_tensor_has_proven_nothing():
    expected = Expected(FEATURES)
    expected.add("model.norm.weight", torch.ones(3))
    with pytest.raises(UnprovenWeights):
        expected.compare({"decoder.norm.weight": "00"})


def test_a_full_disk_is_one_error_that_says_where_and_leaves_nothing(tmp_path, monkeypatch):
    """safetensors tells of it in an error of its own, which is none of the system's."""

    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(weight_sync, "save_file", full)
    sync = FromDisk(tmp_path / "weights", tmp_path)
    with pytest.raises(OSError, match="weights for the servers cannot be written below .*weights: .*No space left"):
        sync.push([SimpleNamespace(features=FEATURES)], iter([("a", torch.ones(1 << 16))]), 3)
    assert not list((tmp_path / "weights").iterdir())
