"""Contract of every family in FAMILIES: config.json both ways, and tensor layouts against loops over heads and rows."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tcod.model.build import padded_vocab_size
from megatron_tcod.model.families import FAMILIES, find_family, kind_of
from megatron_tcod.model.families.rules import Slot
from megatron_tcod.model.shape import RopeScaling, rotary_frequencies
from megatron_tcod.model.weight_files import WeightFiles

each_family = pytest.mark.parametrize("model_type", sorted(FAMILIES))

TRANSFORMERS_4 = dict(
    vocab_size=507,
    hidden_size=48,
    intermediate_size=72,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=10,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    rope_theta=5e5,
    rope_scaling=None,
    hidden_act="silu",
    tie_word_embeddings=True,
    initializer_range=0.03,
    torch_dtype="bfloat16",
)


EXPERTS = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True)
LLAMA3_ROPE = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=256)


def old_config(model_type, **changes):
    experts = EXPERTS if find_family(model_type).expert_fields else {}
    return {**TRANSFORMERS_4, **experts, "model_type": model_type, **changes}


def new_config(model_type, **changes):
    """The same model in the spelling of transformers 5."""
    config = old_config(model_type, rope_parameters={"rope_type": "default", "rope_theta": 5e5}, **changes)
    return {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling")}


def transformers_config(tmp_path, config):
    import transformers

    (tmp_path / "config.json").write_text(json.dumps(config))
    return transformers.AutoConfig.from_pretrained(tmp_path)


def transformers_model(config):
    import transformers

    return transformers.AutoModelForCausalLM.from_config(config)


@each_family
def test_both_spellings_of_config_describe_the_same_shape(model_type):
    family = find_family(model_type)
    shape = family.read_config(old_config(model_type))
    assert shape == family.read_config(new_config(model_type))
    assert (shape.rotary_base, shape.layernorm_epsilon, shape.init_std) == (5e5, 1e-5, 0.03)
    assert (shape.num_layers, shape.num_query_groups, shape.kv_channels, shape.vocab_size) == (3, 4, 10, 507)
    assert shape.tie_word_embeddings


@each_family
def test_written_config_reads_back_and_transformers_builds_the_mapped_tensors_from_it(model_type, tmp_path):
    family = find_family(model_type)
    for is_tied in (False, True):
        shape = family.read_config(old_config(model_type, tie_word_embeddings=is_tied))
        written = family.write_config(shape, dtype=torch.float32)
        assert family.read_config(json.loads(json.dumps(written))) == shape
        config = transformers_config(tmp_path, written)
        assert config.rope_parameters["rope_theta"] == 5e5
        assert config.architectures == [family.architecture]
        transformers_model(config).save_pretrained(tmp_path)
        with WeightFiles(tmp_path) as files:
            expected = dict(files.shapes)
        mapped = {name: size for slot in family.slots(shape) for name, size in slot.hf_shapes(shape).items()}
        assert mapped == expected  # tied parameters are written once by transformers


@each_family
def test_the_scaling_of_llama_3_is_read_and_written_in_both_spellings_and_turns_as_in_transformers(model_type, tmp_path):
    family = find_family(model_type)
    old = old_config(model_type, rope_scaling={"rope_type": "llama3", **LLAMA3_ROPE})
    new = new_config(model_type)
    new["rope_parameters"] = {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3_ROPE}
    shape = family.read_config(old)
    assert shape == family.read_config(new) and shape.rope_scaling == RopeScaling(**LLAMA3_ROPE)
    written = family.write_config(shape, dtype=torch.float32)
    assert family.read_config(json.loads(json.dumps(written))) == shape
    four = {key: value for key, value in written.items() if key != "rope_parameters"}
    for config in (four, written):
        rotary = transformers_model(transformers_config(tmp_path, config)).model.rotary_emb
        ours = rotary_frequencies(shape.kv_channels, shape.rotary_base, shape.rope_scaling)
        torch.testing.assert_close(ours, rotary.inv_freq, rtol=1e-6, atol=0)
        plain = rotary_frequencies(shape.kv_channels, shape.rotary_base, None)
        kept = (ours / plain).tolist()
        assert kept[0] == 1.0 and kept[-1] == 1 / 8 and any(1 / 8 < share < 1 for share in kept)


def test_every_parameter_name_has_one_layout_in_all_families_and_an_unknown_one_has_none():
    for model_type in FAMILIES:
        family = find_family(model_type)
        for slot in family.slots(family.read_config(old_config(model_type, tie_word_embeddings=False))):
            assert kind_of(slot.megatron) == slot.kind
    with pytest.raises(AssertionError, match="no family has a rule for parameter decoder.layers.0.mlp.linear_fc3.weight"):
        kind_of("decoder.layers.0.mlp.linear_fc3.weight")


@each_family
def test_a_config_saved_by_transformers_is_read(model_type, tmp_path):
    family = find_family(model_type)
    config = transformers_config(tmp_path, old_config(model_type))
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert family.read_config(saved) == family.read_config(old_config(model_type))


def test_qwen3_without_head_dim_has_the_default_of_transformers_and_llama_divides_the_width(tmp_path):
    for model_type in FAMILIES:
        given = {key: value for key, value in old_config(model_type).items() if key != "head_dim"}
        shape = find_family(model_type).read_config(given)
        attention = transformers_model(transformers_config(tmp_path, given)).model.layers[0].self_attn
        assert shape.kv_channels == attention.head_dim


@each_family
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["rope_scaling.low_freq_factor", "got None"]),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3_ROPE, "beta": 1}}, ["rope_scaling", "beta", "llama3"]),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, ["rope_scaling", "yarn"]),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}}, ["rope_parameters", "linear"]),
        ({"rope_parameters": {"rope_theta": 1e4}}, ["rope_theta", "10000.0, 500000.0"]),
        ({"rope_theta": None}, ["rope_theta", "got []"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
        ({"use_sliding_window": True, "sliding_window": 64}, ["use_sliding_window", "64"]),
        ({"sliding_window": 64}, ["sliding_window", "64"]),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, ["layer_types"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "'gelu'", "'silu'"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", "got 0"]),
        ({"hidden_size": "48"}, ["hidden_size", "'48'"]),
        ({"tie_word_embeddings": 1}, ["tie_word_embeddings", "got 1"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads 3", "num_attention_heads 8"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_the_model_would_not_compute_is_refused_by_name(model_type, change, words):
    with pytest.raises(ValueError) as caught:
        find_family(model_type).read_config(old_config(model_type, **change))
    for word in ("config.json", *words):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "field"), [("llama", "attention_bias"), ("llama", "mlp_bias"), ("qwen3", "attention_bias")]
)
def test_biases_without_a_place_are_refused(model_type, field):
    with pytest.raises(ValueError, match=f"{field} True, expected False"):
        find_family(model_type).read_config(old_config(model_type, **{field: True}))


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_heads_that_do_not_divide_the_width_need_a_head_dim(model_type):
    config = old_config(model_type, head_dim=None, num_attention_heads=7, num_key_value_heads=7)
    with pytest.raises(ValueError, match="hidden_size 48.*num_attention_heads 7.*add head_dim"):
        find_family(model_type).read_config(config)


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if not find_family(name).expert_fields])
def test_experts_of_a_dense_family_are_refused(model_type):
    with pytest.raises(ValueError, match="config.json: num_experts 8: experts are not supported; use a dense model"):
        find_family(model_type).read_config(old_config(model_type, num_experts=8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts_per_tok": 7}, "num_experts_per_token 7 exceeds num_experts 6"),
        ({"num_experts_per_tok": 1}, "no gradient to its router"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size must be an integer > 0, got None"),
        ({"norm_topk_prob": 1}, "norm_topk_prob must be true or false, got 1"),
        ({"num_local_experts": 8}, r"num_experts and num_local_experts disagree: \[6, 8\]"),
        ({"mlp_only_layers": [1]}, r"mlp_only_layers \[1\], expected \[\]"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step 2, expected 1"),
    ],
)
def test_experts_that_are_not_computed_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        find_family("qwen3_moe").read_config(old_config("qwen3_moe", **change))


def test_a_window_that_holds_every_position_is_full_attention_and_a_smaller_one_is_refused():
    family = find_family("mistral")
    full = family.read_config(old_config("mistral", sliding_window=None))
    assert family.read_config(old_config("mistral", sliding_window=512)) == full
    with pytest.raises(ValueError, match="sliding_window 511, max_position_embeddings 512.*lower max_position_embeddings"):
        family.read_config(old_config("mistral", sliding_window=511))
    with pytest.raises(ValueError, match="sliding_window 511"):  # transformers' Mistral knows no such switch
        family.read_config(old_config("mistral", sliding_window=511, use_sliding_window=False))
    assert family.write_config(full, dtype=torch.float32)["sliding_window"] is None


def test_an_unknown_model_type_lists_the_known_ones():
    with pytest.raises(ValueError, match="'mixtral'.*llama.*qwen2.*qwen3"):
        find_family("mixtral")


def naive_shard(slot, tensors, shape, tp_size, tp_rank):
    """The layouts again, row by row: an independent statement of what Megatron expects on a rank."""
    head, groups = shape.kv_channels, shape.num_query_groups
    if slot.kind == "replicated":
        return tensors[0]
    if slot.kind == "row":
        width = tensors[0].shape[1] // tp_size
        return torch.stack([row[tp_rank * width : (tp_rank + 1) * width] for row in tensors[0]])
    if slot.kind == "qkv":
        query, key, value = tensors
        per_group = shape.num_attention_heads // groups
        rows = []
        for group in range(groups):
            for index in range(group * per_group, (group + 1) * per_group):
                rows += list(query[index * head : (index + 1) * head])
            rows += list(key[group * head : (group + 1) * head]) + list(value[group * head : (group + 1) * head])
        size = len(rows) // tp_size
        return torch.stack(rows[tp_rank * size : (tp_rank + 1) * size])
    if slot.kind == "gate_up":
        size = tensors[0].shape[0] // tp_size
        return torch.stack([row for part in tensors for row in part[tp_rank * size : (tp_rank + 1) * size]])
    rows = list(tensors[0])
    if slot.kind == "vocab":
        rows += [torch.zeros(shape.hidden_size)] * (padded_vocab_size(shape.vocab_size, tp_size) - shape.vocab_size)
    size = len(rows) // tp_size
    return torch.stack(rows[tp_rank * size : (tp_rank + 1) * size])


@each_family
@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
def test_shards_are_what_megatron_expects_and_join_to_the_same_bits(model_type, tp_size):
    family = find_family(model_type)
    shape = family.read_config(old_config(model_type, tie_word_embeddings=False))
    generator = torch.Generator().manual_seed(1)
    for rule in family.rules:
        slot = Slot.of(rule, layer=2, expert=1)
        tensors = [torch.randn(size, generator=generator) for size in slot.hf_shapes(shape).values()]
        shards = [slot.shard(tensors, shape, tp_size=tp_size, tp_rank=rank) for rank in range(tp_size)]
        for rank, shard in enumerate(shards):
            assert torch.equal(shard, naive_shard(slot, tensors, shape, tp_size, rank)), (slot.megatron, rank)
            assert tuple(shard.shape) == slot.shard_shape(shape, tp_size)
        joined = slot.join(shards, shape)
        assert all(torch.equal(mine, full) for mine, full in zip(joined, tensors, strict=True)), slot.megatron


@settings(max_examples=60, deadline=None)
@given(
    vocab_size=st.integers(1, 700),
    groups=st.sampled_from([1, 2, 4]),
    per_group=st.integers(1, 3),
    head_dim=st.sampled_from([2, 4]),
    tp_size=st.sampled_from([1, 2, 4]),
)
def test_shard_then_join_is_the_identity_for_any_vocabulary_and_heads(vocab_size, groups, per_group, head_dim, tp_size):
    family = find_family("qwen2")
    shape = family.read_config(
        old_config(
            "qwen2",
            vocab_size=vocab_size,
            num_attention_heads=groups * per_group,
            num_key_value_heads=groups,
            head_dim=head_dim,
            hidden_size=8,
            intermediate_size=16,
            tie_word_embeddings=False,
        )
    )
    for rule in family.rules:
        slot = Slot.of(rule, layer=0)
        tensors = [torch.randn(size) for size in slot.hf_shapes(shape).values()]
        if slot.kind in ("qkv", "row") and groups * per_group * head_dim % tp_size:
            continue
        if slot.kind == "qkv" and groups * (per_group + 2) * head_dim % tp_size:
            with pytest.raises(ValueError, match="tensor-model-parallel-size"):
                slot.shard(tensors, shape, tp_size=tp_size, tp_rank=0)
            continue
        shards = [slot.shard(tensors, shape, tp_size=tp_size, tp_rank=rank) for rank in range(tp_size)]
        assert all(torch.equal(a, b) for a, b in zip(slot.join(shards, shape), tensors, strict=True)), slot.megatron


@each_family
def test_unsharded_join_copies_only_what_is_interleaved(model_type):
    family = find_family(model_type)
    shape = family.read_config(old_config(model_type))
    for slot in family.slots(shape):
        parameter = torch.randn(slot.shard_shape(shape, 1))
        for tensor in slot.join([parameter], shape):
            shares = tensor.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
            assert shares == (slot.kind != "qkv"), slot.megatron
