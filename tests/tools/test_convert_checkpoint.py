"""The offline converter: bit-identical both ways at every size, and one line for everything that is wrong."""

import json
import os
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_tcod.model.families import find_family
from megatron_tcod.model.weight_files import write_manifest

TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"
sys.path.insert(0, str(TOOL.parent))
import convert_checkpoint  # noqa: E402

VOCAB = 507
MODELS = {"qwen2": True, "qwen3": True, "llama": False}  # model_type -> tied


def make_hf(directory, model_type, *, is_tied, dtype=torch.float32):
    config = dict(
        model_type=model_type,
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        max_position_embeddings=64,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        tie_word_embeddings=is_tied,
        eos_token_id=3,
        note="kept as it is",
    )
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


def run(direction, source, target, *, tp=None, pp=None):
    arguments = ["--direction", direction, "--input", str(source), "--output", str(target)]
    for name, size in (("tensor", tp), ("pipeline", pp)):
        arguments += [] if size is None else [f"--{name}-model-parallel-size", str(size)]
    return convert_checkpoint.main(arguments)


def refused(capsys, direction, source, target, **sizes):
    """The one line on stderr of a conversion that must fail; nothing may be left behind."""
    capsys.readouterr()
    assert run(direction, source, target, **sizes) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert not target.exists() and not list(target.parent.glob(f".{target.name}*"))
    return lines[0]


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_round_trip_keeps_every_bit_and_file(tmp_path, model_type, tp, pp):
    tensors = make_hf(tmp_path / "hf", model_type, is_tied=MODELS[model_type], dtype=torch.bfloat16)
    assert run("hf-to-megatron", tmp_path / "hf", tmp_path / "shards", tp=tp, pp=pp) == 0
    ranks = {f"tp_{i:02d}_pp_{j:02d}.safetensors" for i in range(tp) for j in range(pp)}
    assert {path.name for path in (tmp_path / "shards").iterdir()} == {
        *ranks,
        "config.json",
        "manifest.json",
        "tokenizer.json",
    }
    assert run("megatron-to-hf", tmp_path / "shards", tmp_path / "again") == 0
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) and again[name].dtype == torch.bfloat16 for name in tensors)
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()


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
        (lambda d: (d / "config.json").unlink(), ["config.json", "does not exist"]),
    ],
    ids=["layers", "width", "tied", "vocabulary", "rope", "family", "truncated", "no-config"],
)
def test_a_hugging_face_directory_that_disagrees_is_refused(tmp_path, capsys, damage, words):
    make_hf(tmp_path / "hf", "llama", is_tied=False)
    damage(tmp_path / "hf")
    line = refused(capsys, "hf-to-megatron", tmp_path / "hf", tmp_path / "out", tp=2)
    assert all(word in line for word in words), line


def test_sizes_that_do_not_divide_the_model_are_refused(tmp_path, capsys):
    make_hf(tmp_path / "hf", "llama", is_tied=False)
    line = refused(capsys, "hf-to-megatron", tmp_path / "hf", tmp_path / "out", tp=3)
    assert "tensor_model_parallel_size 3" in line and "num_attention_heads 4" in line
    line = refused(capsys, "hf-to-megatron", tmp_path / "hf", tmp_path / "out", pp=3)
    assert "num_layers 4" in line
    line = refused(capsys, "hf-to-megatron", tmp_path / "hf", tmp_path / "out", tp=0)
    assert "tensor_model_parallel_size" in line and "0" in line


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


def test_sizes_other_than_the_manifest_says_are_refused(tmp_path, capsys, good_shards):
    line = refused(capsys, "megatron-to-hf", good_shards, tmp_path / "out", tp=4)
    assert "--tensor-model-parallel-size 4" in line and "with 2" in line


def test_a_hugging_face_directory_is_no_input_for_the_inverse(tmp_path, capsys, good_shards):
    run("megatron-to-hf", good_shards, tmp_path / "hf")
    assert "format 'hf'" in refused(capsys, "megatron-to-hf", tmp_path / "hf", tmp_path / "out")


def test_the_command_line_refuses_an_existing_output_without_a_traceback(tmp_path):
    make_hf(tmp_path / "hf", "llama", is_tied=False)
    command = [sys.executable, str(TOOL), "--direction", "hf-to-megatron", "--input", str(tmp_path / "hf")]
    environment = {**os.environ, "PYTHONPATH": str(TOOL.parents[1]), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([*command, "--output", str(tmp_path / "hf")], capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "exists already" in done.stderr
