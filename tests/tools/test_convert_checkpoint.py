"""The offline converter: bit-identical both ways at every size, and one line for everything that is wrong."""

import json
import os
import shutil
import subprocess
import sys
import types
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_tcod.model.families import FAMILIES, find_family
from megatron_tcod.model.weight_files import write_manifest

TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"
sys.path.insert(0, str(TOOL.parent))
import convert_checkpoint  # noqa: E402

VOCAB = 507
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=True)
LLAMA3_ROPE = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
MODELS = {  # id -> (model_type, tied, more of config.json)
    **{f"{model_type}-{tied}": (model_type, tied == "tied", {}) for model_type in FAMILIES for tied in ("tied", "untied")},
    "llama-scaled": ("llama", True, {"rope_scaling": {"rope_type": "llama3", **LLAMA3_ROPE}}),
    "mistral-window": ("mistral", False, {"sliding_window": 64}),
}


def make_hf(directory, model_type, *, is_tied, dtype=torch.float32, **changes):
    config = dict(
        model_type=model_type,
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=6,
        max_position_embeddings=64,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        tie_word_embeddings=is_tied,
        eos_token_id=3,
        note="kept as it is",
    )
    config.update(EXPERTS if find_family(model_type).expert_fields else {})
    config.update(changes)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text("{}")
    family = find_family(model_type)
    shape = family.read_config(config)
    generator = torch.Generator().manual_seed(5)
    sizes = {name: size for slot in family.slots(shape) for name, size in slot.hf_shapes(shape).items()}
    tensors = {name: torch.randn(size, generator=generator).to(dtype) for name, size in sizes.items()}
    save_file(tensors, directory / "model.safetensors")
    return tensors


def run(direction, source, target, *, tp=None, pp=None, ep=None, part_gb=None):
    arguments = ["--direction", direction, "--input", str(source), "--output", str(target)]
    for name, size in (("tensor", tp), ("pipeline", pp), ("expert", ep)):
        arguments += [] if size is None else [f"--{name}-model-parallel-size", str(size)]
    arguments += [] if part_gb is None else ["--max-part-gb", str(part_gb)]
    return convert_checkpoint.main(arguments)


def refused(capsys, direction, source, target, **sizes):
    """The one line on stderr of a conversion that must fail; nothing may be left behind."""
    capsys.readouterr()
    assert run(direction, source, target, **sizes) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert not target.exists() and not list(target.parent.glob(f".{target.name}*"))
    return lines[0]


def assert_round_trip(root, model, **sizes):
    model_type, is_tied, changes = MODELS[model]
    tensors = make_hf(root / "hf", model_type, is_tied=is_tied, dtype=torch.bfloat16, **changes)
    assert run("hf-to-megatron", root / "hf", root / "shards", **sizes) == 0
    assert run("megatron-to-hf", root / "shards", root / "again") == 0
    again = load_file(root / "again" / "model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) and again[name].dtype == torch.bfloat16 for name in tensors)
    for name in ("config.json", "tokenizer.json"):
        assert (root / "again" / name).read_bytes() == (root / "hf" / name).read_bytes()
    return {path.name for path in (root / "shards").glob("*.safetensors")}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("pp", [1, 2, 4])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_round_trip_keeps_every_bit_and_file(tmp_path, model, tp, pp):
    ranks = assert_round_trip(tmp_path, model, tp=tp, pp=pp)
    assert ranks == {f"tp_{i:02d}_pp_{j:02d}.safetensors" for i in range(tp) for j in range(pp)}
    assert {path.name for path in (tmp_path / "shards").iterdir()} - ranks == {
        "config.json",
        "manifest.json",
        "tokenizer.json",
    }


@pytest.mark.parametrize(("tp", "pp", "ep"), [(1, 1, 2), (2, 1, 4), (1, 2, 4), (4, 4, 2)])
def test_round_trip_over_expert_parallel_ranks_keeps_every_bit(tmp_path, tp, pp, ep):
    ranks = assert_round_trip(tmp_path, "qwen3_moe-untied", tp=tp, pp=pp, ep=ep)
    assert len(ranks) == tp * pp * ep
    assert f"tp_{tp - 1:02d}_pp_{pp - 1:02d}_ep_{ep - 1:02d}.safetensors" in ranks


def test_a_rank_holds_its_experts_counted_from_zero_and_its_part_of_each(tmp_path):
    tensors = make_hf(tmp_path / "hf", "qwen3_moe", is_tied=False)
    run("hf-to-megatron", tmp_path / "hf", tmp_path / "shards", tp=2, pp=2, ep=2)
    held = load_file(tmp_path / "shards" / "tp_01_pp_01_ep_01.safetensors")
    ours, theirs = "decoder.layers.1.mlp.experts.local_experts.0.", "model.layers.3.mlp.experts.2."
    assert torch.equal(held[ours + "linear_fc2.weight"], tensors[theirs + "down_proj.weight"][:, 8:])
    gate_up = [tensors[f"{theirs}{name}_proj.weight"][8:] for name in ("gate", "up")]
    assert torch.equal(held[ours + "linear_fc1.weight"], torch.cat(gate_up))
    assert torch.equal(held["decoder.layers.1.mlp.router.weight"], tensors["model.layers.3.mlp.gate.weight"])
    assert sum("local_experts.2." in name for name in held) == 0


def test_outputs_beyond_the_largest_part_are_split_and_indexed_as_transformers_reads_them(tmp_path):
    import transformers

    tensors = make_hf(tmp_path / "hf", "llama", is_tied=False)
    run("hf-to-megatron", tmp_path / "hf", tmp_path / "shards", tp=2)
    assert run("megatron-to-hf", tmp_path / "shards", tmp_path / "again", part_gb=5e-5) == 0
    parts = sorted((tmp_path / "again").glob("*.safetensors"))
    assert len(parts) == 3 and parts[0].name == "model-00001-of-00003.safetensors"
    index = json.loads((tmp_path / "again" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.numel() * 4 for tensor in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    for part in parts:
        held = load_file(part)
        assert sum(tensor.numel() * 4 for tensor in held.values()) <= 50_000
        assert all(index["weight_map"][name] == part.name for name in held)
    state = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())
    assert run("hf-to-megatron", tmp_path / "again", tmp_path / "shards-again", tp=2) == 0
    for path in (tmp_path / "shards").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "shards-again" / path.name).read_bytes()


def test_manifest_has_the_sha256_of_every_tensor(tmp_path):
    make_hf(tmp_path / "hf", "qwen3", is_tied=False)
    run("hf-to-megatron", tmp_path / "hf", tmp_path / "shards", tp=2, pp=2)
    run("megatron-to-hf", tmp_path / "shards", tmp_path / "again", tp=2, pp=2)
    shards = json.loads((tmp_path / "shards" / "manifest.json").read_text())["tensors"]
    again = {"model.safetensors": json.loads((tmp_path / "again" / "manifest.json").read_text())["tensors"]}
    for directory, listed in ((tmp_path / "shards", shards), (tmp_path / "again", again)):
        assert set(listed) == {path.name for path in directory.glob("*.safetensors")}
        for file_name, digests in listed.items():
            tensors = load_file(directory / file_name)
            assert digests == {name: sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in tensors.items()}


def test_tensors_of_several_dtypes_keep_theirs(tmp_path):
    tensors = make_hf(tmp_path / "hf", "llama", is_tied=False, dtype=torch.bfloat16)
    tensors = {name: tensor.float() if "norm" in name else tensor for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    run("hf-to-megatron", tmp_path / "hf", tmp_path / "shards", tp=2)
    run("megatron-to-hf", tmp_path / "shards", tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[name], tensors[name]) and again[name].dtype == tensors[name].dtype for name in tensors)


def test_one_layer_projections_of_two_dtypes_are_refused(tmp_path, capsys):
    tensors = make_hf(tmp_path / "hf", "llama", is_tied=False)
    name = "model.layers.1.self_attn.k_proj.weight"
    save_file({**tensors, name: tensors[name].bfloat16()}, tmp_path / "hf" / "model.safetensors")
    line = refused(capsys, "hf-to-megatron", tmp_path / "hf", tmp_path / "out")
    assert "layers.1.self_attention.linear_qkv.weight" in line and "cast them" in line


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def reshape_one_tensor(directory):
    tensors = load_file(directory / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    save_file({**tensors, name: tensors[name].T.contiguous()}, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: edit_config(d, num_hidden_layers=2), ["model.layers.2.", "num_hidden_layers"]),
        (lambda d: edit_config(d, hidden_size=32), ["hidden_size", "[507, 32]", "[507, 16]"]),
        (lambda d: edit_config(d, tie_word_embeddings=True), ["tie_word_embeddings"]),
        (lambda d: edit_config(d, vocab_size=500), ["vocab_size", "[500, 16]"]),
        (lambda d: edit_config(d, rope_scaling={"rope_type": "yarn"}), ["rope_scaling"]),
        (lambda d: edit_config(d, model_type="gpt2"), ["'gpt2'", "llama"]),
        (lambda d: truncate(d / "model.safetensors"), ["model.safetensors", "truncated"]),
        (lambda d: (d / "model.safetensors").unlink(), ["model.safetensors", "does not exist", "convert other formats"]),
        (reshape_one_tensor, ["model.layers.1.mlp.down_proj.weight must be [16, 24]", "got [24, 16]"]),
        (lambda d: (d / "config.json").unlink(), ["config.json", "does not exist"]),
    ],
    ids=["layers", "width", "tied", "vocabulary", "rope", "family", "truncated", "no-weights", "shape", "no-config"],
)
def test_a_hugging_face_directory_that_disagrees_is_refused(tmp_path, capsys, damage, words):
    make_hf(tmp_path / "hf", "llama", is_tied=False)
    damage(tmp_path / "hf")
    line = refused(capsys, "hf-to-megatron", tmp_path / "hf", tmp_path / "out", tp=2)
    assert all(word in line for word in words), line


def test_a_part_that_is_missing_cut_or_not_in_the_index_is_refused(tmp_path, capsys):
    make_hf(tmp_path / "hf", "llama", is_tied=False)
    run("hf-to-megatron", tmp_path / "hf", tmp_path / "shards")
    run("megatron-to-hf", tmp_path / "shards", tmp_path / "parts", part_gb=5e-5)
    second = tmp_path / "parts" / "model-00002-of-00003.safetensors"
    data = second.read_bytes()
    truncate(second)
    line = refused(capsys, "hf-to-megatron", tmp_path / "parts", tmp_path / "out")
    assert f"{second} is damaged or truncated" in line
    second.unlink()
    line = refused(capsys, "hf-to-megatron", tmp_path / "parts", tmp_path / "out")
    assert f"{second} does not exist; model.safetensors.index.json lists it" in line
    second.write_bytes(data)
    index = tmp_path / "parts" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    lost = next(name for name, part in content["weight_map"].items() if part == second.name)
    del content["weight_map"][lost]
    index.write_text(json.dumps(content))
    line = refused(capsys, "hf-to-megatron", tmp_path / "parts", tmp_path / "out")
    assert lost in line and "disagree" in line


def test_sizes_that_do_not_divide_the_model_are_refused(tmp_path, capsys):
    make_hf(tmp_path / "hf", "llama", is_tied=False)
    line = refused(capsys, "hf-to-megatron", tmp_path / "hf", tmp_path / "out", tp=3)
    assert "tensor_model_parallel_size 3" in line and "num_attention_heads 8" in line
    line = refused(capsys, "hf-to-megatron", tmp_path / "hf", tmp_path / "out", pp=3)
    assert "num_layers 4" in line
    line = refused(capsys, "hf-to-megatron", tmp_path / "hf", tmp_path / "out", tp=0)
    assert "tensor_model_parallel_size" in line and "0" in line
    line = refused(capsys, "hf-to-megatron", tmp_path / "hf", tmp_path / "out", ep=2)
    assert "expert_model_parallel_size 2 does not divide the 1 experts" in line
    make_hf(tmp_path / "moe", "qwen3_moe", is_tied=False)
    line = refused(capsys, "hf-to-megatron", tmp_path / "moe", tmp_path / "out", ep=3)
    assert "expert_model_parallel_size 3 does not divide the 4 experts" in line
    line = refused(capsys, "hf-to-megatron", tmp_path / "moe", tmp_path / "out", ep=0)
    assert "expert_model_parallel_size 0" in line


@pytest.fixture(scope="module")
def good_shards(tmp_path_factory):
    root = tmp_path_factory.mktemp("good")
    make_hf(root / "hf", "qwen2", is_tied=True)
    run("hf-to-megatron", root / "hf", root / "shards", tp=2, pp=2)
    return root / "shards"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: flip(d / "manifest.json", 40), ["manifest.json"]),
        (lambda d: truncate(d / "manifest.json"), ["manifest.json"]),
        (lambda d: (d / "manifest.json").unlink(), ["manifest.json", "does not exist"]),
        (lambda d: flip(d / "tp_01_pp_00.safetensors", -20), ["tp_01_pp_00.safetensors", "sha256"]),
        (lambda d: truncate(d / "tp_00_pp_01.safetensors"), ["tp_00_pp_01.safetensors", "bytes"]),
        (lambda d: (d / "tp_00_pp_01.safetensors").unlink(), ["tp_00_pp_01.safetensors", "missing"]),
        (lambda d: edit_config(d, num_hidden_layers=2), ["config.json"]),
    ],
    ids=["manifest-bit", "manifest-cut", "manifest-gone", "weights-bit", "weights-cut", "weights-gone", "config"],
)
def test_shards_that_changed_are_refused(tmp_path, capsys, good_shards, damage, words):
    shutil.copytree(good_shards, tmp_path / "shards")
    damage(tmp_path / "shards")
    line = refused(capsys, "megatron-to-hf", tmp_path / "shards", tmp_path / "out")
    assert all(word in line for word in words), line


def rewrite_manifest(directory, **changes):
    """A manifest that fits the files again, as an editor of the files would make it."""
    content = {**json.loads((directory / "manifest.json").read_text()), **changes}
    for made_anew in ("files", "manifest_sha256"):
        del content[made_anew]
    for path in directory.glob("*.safetensors"):
        tensors = load_file(path)
        content["tensors"][path.name] = {name: sha256(t.numpy().tobytes()).hexdigest() for name, t in tensors.items()}
    write_manifest(directory, content)


@pytest.mark.parametrize(
    ("field", "name", "value"),
    [
        ("num_hidden_layers", "num_layers", 2),
        ("hidden_size", "hidden_size", 32),
        ("tie_word_embeddings", "tie_word_embeddings", False),
        ("vocab_size", "vocab_size", 500),
        ("rope_theta", "rotary_base", 5.0),
        ("model_type", "model_type", "llama"),
    ],
)
def test_another_config_beside_the_shards_is_refused_by_field(tmp_path, capsys, good_shards, field, name, value):
    shutil.copytree(good_shards, tmp_path / "shards")
    edit_config(tmp_path / "shards", **{field: value})
    rewrite_manifest(tmp_path / "shards")
    line = refused(capsys, "megatron-to-hf", tmp_path / "shards", tmp_path / "out")
    assert f"{name} {value!r}, expected" in line


def edit_shard(directory, edit):
    path = directory / "tp_01_pp_01.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t.pop("decoder.final_layernorm.weight"), ["tp_01_pp_01", "final_layernorm.weight", "(16,)", "none"]),
        (lambda t: t.update(extra=torch.ones(2)), ["tp_01_pp_01", "extra", "absent"]),
        (lambda t: t.update({"output_layer.weight": torch.ones(255, 16)}), ["output_layer", "(256, 16)", "(255, 16)"]),
        (lambda t: t["decoder.final_layernorm.weight"].add_(1), ["final_layernorm", "differs"]),
        (lambda t: t["output_layer.weight"].add_(1), ["word_embeddings", "differs"]),
    ],
    ids=["missing", "unexpected", "shape", "replicas", "tied-copies"],
)
def test_shards_that_do_not_form_a_model_are_refused(tmp_path, capsys, good_shards, edit, words):
    shutil.copytree(good_shards, tmp_path / "shards")
    edit_shard(tmp_path / "shards", edit)
    rewrite_manifest(tmp_path / "shards")
    line = refused(capsys, "megatron-to-hf", tmp_path / "shards", tmp_path / "out")
    assert all(word in line for word in words), line


def test_a_tensor_digest_that_does_not_fit_is_refused(tmp_path, capsys, good_shards):
    shutil.copytree(good_shards, tmp_path / "shards")
    manifest = json.loads((good_shards / "manifest.json").read_text())
    del manifest["files"], manifest["manifest_sha256"]
    manifest["tensors"]["tp_00_pp_00.safetensors"]["embedding.word_embeddings.weight"] = "0" * 64
    write_manifest(tmp_path / "shards", manifest)
    line = refused(capsys, "megatron-to-hf", tmp_path / "shards", tmp_path / "out")
    assert "word_embeddings.weight has another sha256" in line


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tensor_model_parallel_size": None}, "tensor_model_parallel_size must be an integer > 0, got None"),
        ({"pipeline_model_parallel_size": "2"}, "pipeline_model_parallel_size must be an integer > 0, got '2'"),
        ({"expert_model_parallel_size": 0}, "expert_model_parallel_size must be an integer > 0, got 0"),
        ({"model": None}, "model must be an object, got None"),
        ({"tensors": []}, "tensors must be an object, got []"),
        ({"tensors": {}}, "another sha256 than manifest.json"),
    ],
)
def test_a_manifest_edited_by_hand_is_refused_by_field(tmp_path, capsys, good_shards, changes, words):
    shutil.copytree(good_shards, tmp_path / "shards")
    content = json.loads((good_shards / "manifest.json").read_text())
    del content["files"], content["manifest_sha256"]
    content.update(changes)
    write_manifest(tmp_path / "shards", {key: value for key, value in content.items() if value is not None})
    assert words in refused(capsys, "megatron-to-hf", tmp_path / "shards", tmp_path / "out")


def test_a_training_checkpoint_becomes_a_directory_that_transformers_loads(tmp_path, capsys):
    import transformers

    tensors = make_hf(tmp_path / "step_0000040", "qwen3", is_tied=True)
    save_file({"exp_avg.x": torch.ones(3)}, tmp_path / "step_0000040" / "optimizer.safetensors")
    line = refused(capsys, "checkpoint-to-hf", tmp_path / "step_0000040", tmp_path / "agent")
    assert "no training checkpoint" in line
    write_manifest(tmp_path / "step_0000040", {"step": 40})
    assert run("checkpoint-to-hf", tmp_path / "step_0000040", tmp_path / "agent") == 0
    assert {path.name for path in (tmp_path / "agent").iterdir()} == {
        "config.json",
        "manifest.json",
        "model.safetensors",
        "tokenizer.json",
    }
    state = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "agent").state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())
    flip(tmp_path / "step_0000040" / "optimizer.safetensors", -1)
    assert "sha256" in refused(capsys, "checkpoint-to-hf", tmp_path / "step_0000040", tmp_path / "other")


def test_sizes_other_than_the_manifest_says_are_refused(tmp_path, capsys, good_shards):
    line = refused(capsys, "megatron-to-hf", good_shards, tmp_path / "out", tp=4)
    assert "--tensor-model-parallel-size 4" in line and "with 2" in line


def test_a_hugging_face_directory_is_no_input_for_the_inverse(tmp_path, capsys, good_shards):
    run("megatron-to-hf", good_shards, tmp_path / "hf")
    assert "format 'hf'" in refused(capsys, "megatron-to-hf", tmp_path / "hf", tmp_path / "out")


class StandInBridge:
    """megatron-bridge's two calls, which note what they were given."""

    calls: list = []

    @classmethod
    def import_ckpt(cls, **arguments):
        cls.calls.append(("import", arguments))
        Path(arguments["megatron_path"]).mkdir()
        if "broken" in arguments["hf_model_id"]:
            raise OSError("half a checkpoint")

    @classmethod
    def from_hf_pretrained(cls, path, **arguments):
        cls.calls.append(("model", {"path": path, **arguments}))
        return cls()

    def export_ckpt(self, **arguments):
        self.calls.append(("export", arguments))
        Path(arguments["hf_path"]).mkdir()


def bridge(direction, source, target, *more):
    arguments = ["--bridge", "--direction", direction, "--input", str(source), "--output", str(target), *more]
    return convert_checkpoint.main(arguments)


def test_bridge_calls_megatron_bridge_without_remote_code_and_leaves_nothing_of_a_failure(tmp_path, capsys, monkeypatch):
    stand_in = types.ModuleType("megatron.bridge")
    stand_in.AutoBridge = StandInBridge
    monkeypatch.setitem(sys.modules, "megatron.bridge", stand_in)
    monkeypatch.setattr(StandInBridge, "calls", [])
    hf, broken = tmp_path / "gemma", tmp_path / "broken"
    hf.mkdir()
    broken.mkdir()
    assert bridge("hf-to-megatron", hf, tmp_path / "megatron") == 0
    assert bridge("megatron-to-hf", tmp_path / "megatron", tmp_path / "again", "--hf-model", str(hf)) == 0
    assert StandInBridge.calls == [
        ("import", {"hf_model_id": str(hf), "megatron_path": str(tmp_path / "megatron"), "trust_remote_code": False}),
        ("model", {"path": str(hf), "trust_remote_code": False}),
        ("export", {"megatron_path": str(tmp_path / "megatron"), "hf_path": str(tmp_path / "again")}),
    ]
    assert bridge("hf-to-megatron", broken, tmp_path / "other") == 2 and not (tmp_path / "other").exists()
    capsys.readouterr()
    assert bridge("megatron-to-hf", tmp_path / "megatron", tmp_path / "other") == 2
    assert bridge("hf-to-megatron", hf, tmp_path / "other", "--tensor-model-parallel-size", "2") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "--hf-model" in lines[0] and "--tensor-model-parallel-size has no meaning" in lines[1]


def test_bridge_says_what_to_install_where_it_cannot_be_imported(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron.bridge", None)  # importing it fails
    assert bridge("hf-to-megatron", tmp_path, tmp_path / "out") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "pip install 'megatron_tcod[bridge]'" in lines[0]


def test_the_command_line_refuses_an_existing_output_without_a_traceback(tmp_path):
    make_hf(tmp_path / "hf", "llama", is_tied=False)
    command = [sys.executable, str(TOOL), "--direction", "hf-to-megatron", "--input", str(tmp_path / "hf")]
    environment = {**os.environ, "PYTHONPATH": str(TOOL.parents[1]), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([*command, "--output", str(tmp_path / "hf")], capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "exists already" in done.stderr
