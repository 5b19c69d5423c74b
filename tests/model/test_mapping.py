"""Hugging Face <-> Megatron: logits against transformers and bits against the files, in every layout of four ranks."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from gloo_world import run_ranks
from safetensors.torch import load_file, save_file

from megatron_tcod.model import build, parallel
from megatron_tcod.model.families import kind_of
from megatron_tcod.model.mapping import export_hf, load_hf, load_named, on_rank_zero, read_hf_config, save_hf
from megatron_tcod.model.parallel import ParallelLayout
from megatron_tcod.trajectory import Microbatch

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import convert_checkpoint  # noqa: E402

VOCAB = 507  # no multiple of 128 * tp
LLAMA3_ROPE = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,  # slow, blended and fast channels at head_dim 32
)
MODELS = {
    "qwen2": dict(model_type="qwen2", tie_word_embeddings=False),
    "qwen2_tied": dict(model_type="qwen2", tie_word_embeddings=True),
    "qwen3_tied": dict(model_type="qwen3", tie_word_embeddings=True, head_dim=12, num_key_value_heads=2),
    "llama3_rope": dict(model_type="llama", tie_word_embeddings=True, head_dim=32, rope_scaling=LLAMA3_ROPE),
    "mistral": dict(model_type="mistral", tie_word_embeddings=False, sliding_window=128, num_key_value_heads=2),
    "qwen3_moe": dict(
        model_type="qwen3_moe",
        head_dim=12,
        num_key_value_heads=2,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        norm_topk_prob=True,
    ),
    "llama": dict(model_type="llama", tie_word_embeddings=False),
}
LAYOUTS = [(1, 1, None), (2, 1, None), (4, 1, None), (1, 2, None), (2, 2, None), (1, 4, None), (1, 2, 2), (2, 2, 2)]
SOME = {"llama3_rope", "mistral", "qwen3_moe"}  # what differs in them is not the layout: three layouts are enough
SOME_LAYOUTS = [(4, 1, None), (2, 2, None), (1, 2, 2)]
ROWS = [0, 7, 20]  # two packed rows


def layouts_of(name):
    return SOME_LAYOUTS if name in SOME else LAYOUTS


def make_hf(directory, *, dtype=torch.float32, model_type, **changes):
    """A random model whose every tensor differs from its initial constant (norms, biases), saved by transformers."""
    import transformers

    sizes = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        rope_theta=5000.0,
        initializer_range=0.2,
    )
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({**sizes, **changes, "model_type": model_type}))
    config = transformers.AutoConfig.from_pretrained(directory)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.gate.weight"):  # zeros: every expert alike
                parameter.normal_(0.0, 0.3)
    model.to(dtype).save_pretrained(directory)
    return model.eval()


@torch.no_grad()
def add_reference(directory, model):
    """Token ids of two rows, and the logits that transformers gives for each row alone."""
    tokens = torch.randint(VOCAB, (ROWS[-1],))  # [T]
    rows = [tokens[start:stop] for start, stop in zip(ROWS, ROWS[1:], strict=False)]
    logits = torch.cat([model(row[None]).logits[0] for row in rows])  # [T, V]
    save_file({"tokens": tokens, "logits": logits}, directory / "reference.st")


def megatron_logits(chunks, shape, tokens):
    """[T, V] on every rank, by handing hidden states from chunk to chunk without Megatron's schedules."""
    none = torch.empty(0, dtype=torch.int64)
    batch = Microbatch(
        token_ids=tokens,
        cu_seqlens=torch.tensor(ROWS, dtype=torch.int32),
        positions=none,
        target_ids=none,
        loss_weight=none.float(),
        old_logprobs=none.float(),
        turn_ids=none,
        episode_ids=none,
    )
    pp_size, hidden = parallel.pp_size(), torch.empty(len(tokens), 1, shape.hidden_size)
    num_chunks = pp_size * len(chunks)
    for index in range(num_chunks):
        stage, chunk = index % pp_size, chunks[index // pp_size]
        if stage == parallel.pp_rank():
            if index:
                build.unwrap(chunk).set_input_tensor(hidden)
            hidden = build.forward_hidden(chunk, batch)
        hidden = hidden.reshape(len(tokens), 1, -1).contiguous()
        group = parallel.pp_group()
        dist.broadcast(hidden, dist.get_global_rank(group, stage), group=group)
    logits = torch.zeros(len(tokens), build.padded_vocab_size(VOCAB, parallel.tp_size()))  # [T, V_padded]
    if parallel.is_last_stage():
        head = build.output_head(chunks)  # [V_padded/tp, H]
        shards = [torch.empty(len(tokens), len(head)) for _ in range(parallel.tp_size())]
        dist.all_gather(shards, hidden[:, 0] @ head.T, group=parallel.tp_group())
        logits = torch.cat(shards, 1)
    dist.broadcast(logits, parallel.last_stage_rank(), group=parallel.pp_group())
    return logits[:, :VOCAB]


@torch.no_grad()
def check_layout(root, name, tp, pp, vpp):
    source = root / name
    layout = ParallelLayout(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, virtual_pipeline_model_parallel_size=vpp
    )
    where = f"{name} tp{tp} pp{pp} vpp{vpp} rank{parallel.rank()}"
    family, shape = read_hf_config(source)
    chunks = build.build_model(shape, layout, seed=None, wrap_ddp=False)
    for chunk in chunks:
        chunk.eval()
    for _, parameter in build.named_parameters(chunks):
        parameter.fill_(float("nan"))
    load_hf(chunks, source, family, shape)

    reference = load_file(source / "reference.st")
    error = (megatron_logits(chunks, shape, reference["tokens"]) - reference["logits"]).abs().max().item()
    assert error <= 1e-4, (where, error)
    (root / f"{where.replace(' ', '_')}.error").write_text(str(error))

    original = load_file(source / "model.safetensors")
    exported = {key: tensor.clone() for key, tensor in export_hf(chunks, family, shape)}
    assert exported.keys() == original.keys(), where
    assert all(torch.equal(exported[key], original[key]) for key in original), where
    for key, parameter in build.named_parameters(chunks):  # padding only ever holds zeros
        if kind_of(key) == "vocab":
            real = max(0, min(len(parameter), VOCAB - parallel.tp_rank() * len(parameter)))
            assert not parameter[real:].any(), (where, key)
    if vpp is None:  # what the offline converter wrote for this rank is this rank's state
        ranks = f"tp_{parallel.tp_rank():02d}_pp_{parallel.pp_rank():02d}.safetensors"
        stored = load_file(root / f"{name}_tp{tp}_pp{pp}" / ranks)
        held = dict(build.unwrap(chunks[0]).named_parameters())
        assert stored.keys() == held.keys(), where
        assert all(torch.equal(stored[key], held[key]) for key in held), where
    doubled = {key: tensor * 2 for key, tensor in original.items()}
    load_named(chunks, family, shape, doubled)
    for key, tensor in export_hf(chunks, family, shape, read=lambda parameter: parameter.data + 1):
        assert torch.equal(tensor, original[key] * 2 + 1), (where, key)
    return chunks, family, shape


def all_layouts_worker(root):
    for tp, pp, vpp in LAYOUTS:
        parallel.initialize(
            ParallelLayout(
                tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, virtual_pipeline_model_parallel_size=vpp
            )
        )
        for name in MODELS:
            if (tp, pp, vpp) in layouts_of(name):
                held = check_layout(root, name, tp, pp, vpp)
        if (tp, pp, vpp) == (2, 2, None):
            check_saving(root, *held)
            check_failure_on_one_rank_reaches_all(root)
    parallel.shutdown()


def check_saving(root, chunks, family, shape):
    """`held` is the last model with its weights doubled."""
    source = root / list(MODELS)[-1]
    save_hf(root / "saved", chunks, family, shape, source=source)
    assert read_hf_config(root / "saved") == (family, shape)
    config = json.loads((root / "saved" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    assert (root / "saved" / "tokenizer.json").read_bytes() == b"any bytes"
    original, saved = load_file(source / "model.safetensors"), load_file(root / "saved" / "model.safetensors")
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[key], original[key] * 2) for key in original)
    try:
        save_hf(root / "saved", chunks, family, shape)
    except ValueError as error:
        assert "exists already" in str(error)
    else:
        raise AssertionError("a second save to the same directory must be refused on every rank")


def check_failure_on_one_rank_reaches_all(root):
    """Rank 0 stops half-way through a collective export: nobody hangs, everybody raises."""
    family, shape = read_hf_config(root / "llama")
    layout = ParallelLayout(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    tensors = export_hf(build.build_model(shape, layout, seed=3, wrap_ddp=False), family, shape)

    def fail():
        next(tensors)
        raise OSError("no space left on device")

    try:
        on_rank_zero(fail, drain=[tensors])
    except (OSError, ValueError) as error:
        assert "no space left on device" in str(error)
    else:
        raise AssertionError(f"rank {parallel.rank()} did not hear of the failure")


def test_logits_equal_transformers_and_round_trips_keep_every_bit_in_all_layouts(tmp_path):
    for name, changes in MODELS.items():
        source = tmp_path / name
        add_reference(source, make_hf(source, **changes))
        (source / "tokenizer.json").write_bytes(b"any bytes")
        for tp, pp, vpp in layouts_of(name):
            if vpp is None:
                convert_checkpoint.hf_to_megatron(
                    source, tmp_path / f"{name}_tp{tp}_pp{pp}", convert_checkpoint.RankGrid(tp=tp, pp=pp)
                )
    run_ranks(4, all_layouts_worker, tmp_path)
    errors = [float(path.read_text()) for path in tmp_path.glob("*.error")]
    assert len(errors) == 4 * sum(len(layouts_of(name)) for name in MODELS)
    print(f"largest |logit difference| to transformers: {max(errors):.2e}")
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for name, tensor in load_file(tmp_path / "llama" / "model.safetensors").items():
        assert torch.equal(model.state_dict()[name], tensor * 2), name


@pytest.fixture(scope="module")
def lone_rank():
    parallel.initialize(ParallelLayout())
    yield ParallelLayout()
    parallel.shutdown()


def loaded(directory, layout):
    family, shape = read_hf_config(directory)
    chunks = build.build_model(shape, layout, seed=1, wrap_ddp=False)
    load_hf(chunks, directory, family, shape)
    return chunks, family, shape


def test_unsharded_export_shares_memory_with_the_model(tmp_path, lone_rank):
    make_hf(tmp_path / "hf", model_type="qwen3")
    chunks, family, shape = loaded(tmp_path / "hf", lone_rank)
    storages = {parameter.untyped_storage().data_ptr() for _, parameter in build.named_parameters(chunks)}
    for name, tensor in export_hf(chunks, family, shape):
        is_fused = name.split(".")[-2] in ("q_proj", "k_proj", "v_proj")
        assert (tensor.untyped_storage().data_ptr() in storages) != is_fused, name


def test_bf16_weights_keep_every_bit_and_widen_exactly(tmp_path, lone_rank):
    make_hf(tmp_path / "hf", model_type="qwen2", dtype=torch.bfloat16)
    original = load_file(tmp_path / "hf" / "model.safetensors")
    family, shape = read_hf_config(tmp_path / "hf")
    for dtype in (torch.bfloat16, torch.float32):
        chunks = build.build_model(shape, lone_rank, dtype=dtype, seed=None, wrap_ddp=False)
        load_hf(chunks, tmp_path / "hf", family, shape)
        for name, tensor in export_hf(chunks, family, shape):
            assert tensor.dtype == dtype and torch.equal(tensor, original[name].to(dtype)), name


def test_parts_behind_an_index_load_like_one_file(tmp_path, lone_rank):
    model = make_hf(tmp_path / "hf", model_type="llama")
    model.save_pretrained(tmp_path / "parts", max_shard_size="50KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    one, two = (dict(export_hf(*loaded(tmp_path / name, lone_rank))) for name in ("hf", "parts"))
    assert all(torch.equal(one[name], two[name]) for name in one | two)


def test_a_tied_model_may_carry_its_head_twice_if_both_are_equal(tmp_path, lone_rank):
    make_hf(tmp_path / "hf", model_type="qwen3", tie_word_embeddings=True)
    path = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path)
    exported = dict(export_hf(*loaded(tmp_path / "hf", lone_rank)))
    assert exported.keys() == tensors.keys()
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, path)
    with pytest.raises(ValueError, match="tie_word_embeddings true, but lm_head.weight differs"):
        loaded(tmp_path / "hf", lone_rank)


def test_rotary_frequencies_of_old_exports_are_skipped(tmp_path, lone_rank):
    make_hf(tmp_path / "hf", model_type="llama")
    path = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, path)
    assert dict(export_hf(*loaded(tmp_path / "hf", lone_rank))).keys() == tensors.keys()


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(directory, edit):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def truncate(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


DISAGREEMENTS = {
    "fewer layers in the config": (
        lambda d: edit_config(d, num_hidden_layers=3),
        ["unexpected", "model.layers.3.", "num_hidden_layers", "now 3"],
    ),
    "more layers in the config": (
        lambda d: edit_config(d, num_hidden_layers=5),
        ["model.layers.4.", "missing", "num_hidden_layers", "now 5"],
    ),
    "another width": (lambda d: edit_config(d, hidden_size=64, head_dim=8), ["[507, 64]", "[507, 32]", "hidden_size"]),
    "another vocabulary": (lambda d: edit_config(d, vocab_size=512), ["[512, 32]", "[507, 32]", "vocab_size"]),
    "another ffn width": (
        lambda d: edit_config(d, intermediate_size=96),
        ["intermediate_size", "[96, 32]", "[48, 32]"],
    ),
    "other query groups": (lambda d: edit_config(d, num_key_value_heads=2), ["k_proj", "num_key_value_heads"]),
    "tied in the config only": (lambda d: edit_config(d, tie_word_embeddings=True), ["tie_word_embeddings", "lm_head"]),
    "another family": (lambda d: edit_config(d, model_type="qwen3"), ["q_norm.weight", "missing", "model_type"]),
    "a missing tensor": (
        lambda d: edit_tensors(d, lambda tensors: tensors.pop("model.norm.weight")),
        ["model.norm.weight", "missing"],
    ),
    "a missing head": (
        lambda d: edit_tensors(d, lambda tensors: tensors.pop("lm_head.weight")),
        ["lm_head.weight", "missing", "tie_word_embeddings", "now False"],
    ),
    "an unexpected tensor": (
        lambda d: edit_tensors(d, lambda tensors: tensors.update(extra=torch.ones(2))),
        ["unexpected tensor extra [2]"],
    ),
    "a quantised tensor": (
        lambda d: edit_tensors(
            d, lambda tensors: tensors.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)})
        ),
        ["model.norm.weight", "I8", "unquantised"],
    ),
    "a truncated file": (truncate, ["model.safetensors", "truncated"]),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), ["model.safetensors", "does not exist"]),
    "no config": (lambda d: (d / "config.json").unlink(), ["config.json", "does not exist"]),
    "a torn config": (lambda d: (d / "config.json").write_text('{"model'), ["config.json", "not valid JSON"]),
}


@pytest.fixture(scope="module")
def llama_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama") / "hf"
    make_hf(directory, model_type="llama")
    return directory


@pytest.mark.parametrize("case", DISAGREEMENTS)
def test_a_directory_that_disagrees_is_refused_before_anything_changes(case, tmp_path, lone_rank, llama_directory):
    damage, words = DISAGREEMENTS[case]
    directory = tmp_path / "hf"
    shutil.copytree(llama_directory, directory)
    _, shape = read_hf_config(directory)
    damage(directory)
    with pytest.raises(ValueError) as caught:
        family, shape = read_hf_config(directory)
        chunks = build.build_model(shape, lone_rank, seed=1, wrap_ddp=False)
        before = {name: tensor.clone() for name, tensor in export_hf(chunks, family, shape)}
        try:
            load_hf(chunks, directory, family, shape)
        finally:
            assert all(torch.equal(tensor, before[name]) for name, tensor in export_hf(chunks, family, shape))
    for word in (str(directory), *words):
        assert word in str(caught.value)


def test_an_index_cannot_point_outside_its_directory(tmp_path, lone_rank, llama_directory):
    directory = tmp_path / "hf"
    shutil.copytree(llama_directory, directory)
    shutil.move(directory / "model.safetensors", tmp_path / "outside.safetensors")
    index = {"weight_map": {"model.norm.weight": "../outside.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="plain file name"):
        loaded(directory, lone_rank)


def test_a_model_of_another_shape_is_named(tmp_path, lone_rank, llama_directory):
    family, shape = read_hf_config(llama_directory)
    other = build.ModelShape(**{**vars(shape), "ffn_hidden_size": 64})
    chunks = build.build_model(other, lone_rank, seed=1, wrap_ddp=False)
    with pytest.raises(ValueError, match=r"linear_fc1.weight \[128, 32\].*expects \[96, 32\]"):
        load_hf(chunks, llama_directory, family, shape)
