"""The decoder against transformers: every family, packed prompts of odd lengths, then token by token."""

import pytest
import torch
from tiny_hf import FAMILIES, tiny_model, weights_of

from megatron_tcod.rollout.decoder import Decoder, DecoderShape
from megatron_tcod.rollout.kv_slots import DecodeAttention, KVSlots, PrefillAttention


def decoder_of(model, **options):
    decoder = Decoder(DecoderShape.from_hf(model.config.to_dict()), max_positions=129, **options)
    decoder.load_weights(weights_of(model))
    return decoder


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_prefill_in_pieces_and_decoding_equal_one_full_forward_pass(family):
    model = tiny_model(family)
    decoder = decoder_of(model)
    slots = KVSlots(decoder.shape, num_rows=5, num_positions=128, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    lengths, rows = [1, 70, 33], [3, 0, 4]
    ids = [torch.randint(0, 97, (n + 6,), generator=generator) for n in lengths]
    expected = [model(row[None]).logits[0] for row in ids]  # [n + 6, V]
    first = [1, 41, 12]
    seen = prefill(decoder, slots, rows, [0, 0, 0], [row[:n] for row, n in zip(ids, first, strict=True)])
    rest = prefill(decoder, slots, rows[1:], first[1:], [ids[i][first[i] : lengths[i]] for i in (1, 2)])
    for i, start in enumerate(first):
        torch.testing.assert_close(seen[i], expected[i][:start], rtol=0, atol=1e-4)
        if i:
            torch.testing.assert_close(rest[i - 1], expected[i][start : lengths[i]], rtol=0, atol=1e-4)
    attention = DecodeAttention(slots)
    newest, positions = torch.zeros(5, dtype=torch.int64), torch.full((5,), slots.scratch)
    for row, length in zip(rows, lengths, strict=True):
        attention.admit(row, length)
        positions[row] = length
    for step in range(6):
        for row, length, tokens in zip(rows, lengths, ids, strict=True):
            newest[row] = tokens[length + step]
        attention.begin(num_rows=5, positions=positions, num_seen=71 + step)
        logits = decoder.logits(decoder.extend(newest, positions, attention.attend))
        for i, row in enumerate(rows):
            torch.testing.assert_close(logits[row], expected[i][lengths[i] + step], rtol=0, atol=1e-4)
        positions[rows] += 1


@pytest.mark.parametrize("family", ["qwen3", "llama3_rope", "llama_bias"])
@torch.inference_mode()
def test_a_shared_prefix_read_from_one_row_changes_nothing(family):
    model = tiny_model(family)
    decoder = decoder_of(model)
    slots = KVSlots(decoder.shape, num_rows=4, num_positions=64, dtype=torch.float32)
    prefix = torch.randint(0, 97, (33,))
    ids = [torch.cat([prefix, torch.randint(0, 97, (n,))]) for n in (1, 8, 20)]
    rows, lengths = [0, 1, 3], [len(row) - 1 for row in ids]  # row 2 is idle
    prefill(decoder, slots, rows, [0, 0, 0], [row[:-1] for row in ids])
    for row in rows[:1] + rows[2:]:  # only row 1 keeps the prefix
        slots.keys[:, row, :, :33] = 7.0
        slots.values[:, row, :, :33] = 7.0
    attention = DecodeAttention(slots)
    newest, positions = torch.zeros(4, dtype=torch.int64), torch.full((4,), slots.scratch)
    for row, length, tokens in zip(rows, lengths, ids, strict=True):
        attention.admit(row, length)
        newest[row], positions[row] = tokens[-1], length
    attention.begin(num_rows=4, positions=positions, num_seen=max(lengths) + 1, shared=(1, 33))
    logits = decoder.logits(decoder.extend(newest, positions, attention.attend))
    for row, tokens in zip(rows, ids, strict=True):
        torch.testing.assert_close(logits[row], model(tokens[None]).logits[0, -1], rtol=0, atol=1e-4)


def prefill(decoder, slots, rows, starts, ids):
    """Logits [n, V] of each request's new tokens."""
    lengths = [len(row) for row in ids]
    attention = PrefillAttention(slots, rows=rows, starts=starts, lengths=lengths)
    hidden = decoder.extend(torch.cat(ids), attention.positions, attention.attend)
    return decoder.logits(hidden).split(lengths)


def test_weights_are_kept_by_reference_where_nothing_is_fused():
    model = tiny_model("llama")
    decoder, named = decoder_of(model), model.state_dict()
    layer = decoder.layers[1]
    shared = {
        "model.embed_tokens.weight": decoder.embedding,
        "lm_head.weight": decoder.head,
        "model.norm.weight": decoder.final_norm,
        "model.layers.1.self_attn.o_proj.weight": layer.output,
        "model.layers.1.mlp.down_proj.weight": layer.mlp.down,
        "model.layers.1.input_layernorm.weight": layer.input_norm,
    }
    for name, tensor in shared.items():
        assert tensor.data_ptr() == named[name].data_ptr(), name


def test_wrong_weights_are_named_and_leave_the_old_ones():
    model = tiny_model("qwen3")
    decoder, named = decoder_of(model), dict(model.state_dict())
    before = decoder.layers
    wrong = {
        "lack 'model.layers.2.mlp.up_proj.weight'": {"model.layers.2.mlp.up_proj.weight": None},
        r"'model.norm.weight' is \(7,\), the config says \(48,\)": {"model.norm.weight": torch.zeros(7)},
        "no place for: .'model.layers.0.self_attn.q_proj.bias'": {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)},
    }
    for message, changes in wrong.items():
        weights = {name: tensor for name, tensor in (named | changes).items() if tensor is not None}
        with pytest.raises(ValueError, match=message):
            decoder.load_weights(weights.items())
    assert decoder.layers is before
    with pytest.raises(ValueError, match="lack 'model.layers.0.self_attn.q_proj.bias'"):
        qwen2 = tiny_model("qwen2")
        kept = {name: tensor for name, tensor in qwen2.state_dict().items() if not name.endswith("q_proj.bias")}
        Decoder(DecoderShape.from_hf(qwen2.config.to_dict()), max_positions=9).load_weights(kept.items())


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(model_type="mixtral"), "model_type 'mixtral' is not one of"),
        (dict(hidden_act="gelu"), "hidden_act 'gelu'"),
        (dict(use_sliding_window=True), "sliding-window"),
        (dict(model_type="mistral", sliding_window=511), "sliding-window"),
        (dict(model_type="qwen3_moe", moe_intermediate_size=8, mlp_only_layers=[1]), "layers without experts"),
        (dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "rope type 'yarn'"),
    ],
)
def test_configs_that_are_not_computed_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DecoderShape.from_hf(tiny_model("qwen3").config.to_dict() | changes)


def test_the_older_spelling_of_rope_in_config_json_means_the_same():
    config = tiny_model("llama3_rope").config.to_dict()
    rope = dict(config.pop("rope_parameters"))
    older = config | {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    assert DecoderShape.from_hf(older) == DecoderShape.from_hf(config | {"rope_parameters": rope | {"rope_theta": 5000.0}})
