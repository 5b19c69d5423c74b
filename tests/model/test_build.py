import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VOCAB, hugging_face_twin, pack_rows, random_rows, tiny_shape

from megatron_tcod.model import build, parallel
from megatron_tcod.model.families.rules import LAYOUTS
from megatron_tcod.model.parallel import ParallelLayout


@pytest.fixture(scope="module", autouse=True)
def world_of_one():
    parallel.initialize(ParallelLayout())
    yield
    parallel.shutdown()


def test_padded_vocabulary_is_the_next_multiple_that_every_rank_shares():
    assert [padded for padded in map(lambda tp: build.padded_vocab_size(507, tp), (1, 2, 4, 8))] == [512, 512, 512, 1024]
    assert build.padded_vocab_size(512, 4) == 512 and build.padded_vocab_size(513, 1) == 640
    assert build.padded_vocab_size(10, 2, divisible_by=3) == 12


@pytest.mark.parametrize(
    ("shape", "layout", "message"),
    [
        ({}, {"tensor_model_parallel_size": 3}, "size 3 does not divide the model's num_attention_heads 4"),
        ({"ffn_hidden_size": 81}, {"tensor_model_parallel_size": 2}, "does not divide the model's ffn_hidden_size 81"),
        (
            {"num_attention_heads": 12, "num_query_groups": 3},
            {"tensor_model_parallel_size": 4},
            "size 4 and the model's num_query_groups 3",
        ),
        ({}, {"pipeline_model_parallel_size": 3}, "num_layers 4 is not a multiple of the 3 pipeline chunks"),
        (
            {},
            {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 4},
            "num_layers 4 is not a multiple of the 8 pipeline chunks",
        ),
    ],
)
def test_shape_that_does_not_divide_is_refused_with_the_size_at_fault(shape, layout, message):
    with pytest.raises(ValueError, match=message):
        build.check_layout(tiny_shape(**{"ffn_hidden_size": 96, **shape}), ParallelLayout(**layout))


def test_query_heads_that_no_equal_groups_hold_are_refused():
    with pytest.raises(ValueError, match="num_attention_heads 4 is not a multiple of num_query_groups 3"):
        tiny_shape(num_query_groups=3)


@settings(deadline=None)
@given(st.sampled_from(["column", "row", "qkv", "gate_up", "replicated"]), st.sampled_from([1, 2, 4]))
def test_uncut_undoes_cut(kind, tp_size):
    full = torch.arange(16 * 8).view(16, 8)
    shards = [LAYOUTS[kind].cut(full, tp_rank=rank, tp_size=tp_size) for rank in range(tp_size)]
    assert torch.equal(LAYOUTS[kind].uncut(shards), full)


def test_every_rank_of_a_gate_up_projection_holds_matching_gates_and_ups():
    full = torch.cat([torch.arange(4), 100 + torch.arange(4)])[:, None]
    second = LAYOUTS["gate_up"].cut(full, tp_rank=1, tp_size=2)
    assert second.flatten().tolist() == [2, 3, 102, 103]


def test_weights_depend_on_seed_and_name_and_on_nothing_else():
    shape = tiny_shape(qk_layernorm=True, add_qkv_bias=True)
    torch.manual_seed(11)
    first = _weights(shape, seed=5)
    torch.manual_seed(12)
    again, other = _weights(shape, seed=5), _weights(shape, seed=6)
    assert all(torch.equal(first[name], again[name]) for name in first)
    for name, weight in first.items():
        if name.endswith("layernorm.weight"):
            assert torch.equal(weight, torch.ones_like(weight))
        elif name.endswith(".bias"):
            assert torch.equal(weight, torch.zeros_like(weight))
        else:
            assert not torch.equal(weight, other[name])
    qkv = [weight for name, weight in first.items() if name.endswith("linear_qkv.weight")]
    assert len(qkv) == 4 and not torch.equal(qkv[0], qkv[1])


def test_initial_scale_is_init_std_and_smaller_where_a_layer_adds_to_the_residual_stream():
    shape = tiny_shape(hidden_size=256, ffn_hidden_size=512)
    weights = _weights(shape, seed=0)
    assert weights["embedding.word_embeddings.weight"][:VOCAB].std().item() == pytest.approx(0.1, rel=0.02)
    assert weights["decoder.layers.0.mlp.linear_fc1.weight"].std().item() == pytest.approx(0.1, rel=0.02)
    assert weights["decoder.layers.0.mlp.linear_fc2.weight"].std().item() == pytest.approx(0.1 / math.sqrt(8), rel=0.02)
    assert not weights["embedding.word_embeddings.weight"][VOCAB:].any()


def _weights(shape, *, seed):
    chunks = build.build_model(shape, ParallelLayout(), seed=seed, wrap_ddp=False)
    return {name: parameter.clone() for name, parameter in build.named_parameters(chunks)}


@pytest.mark.parametrize("is_tied", [False, True])
def test_hidden_states_of_packed_rows_times_the_head_equal_the_logits_of_transformers_row_by_row(is_tied):
    shape = tiny_shape(qk_layernorm=True, tie_word_embeddings=is_tied)
    chunks = build.build_model(shape, ParallelLayout(), seed=1, wrap_ddp=False)
    rows = random_rows([1, 17, 4, 40, 40, 3])
    hidden = build.forward_hidden(chunks[0], pack_rows(rows))[0]  # [T, H]
    logits = (hidden @ build.output_head(chunks).T)[:, :VOCAB]  # [T, V]
    twin = hugging_face_twin(chunks, shape, torch.float64)
    with torch.no_grad():
        expected = torch.cat([twin(torch.tensor([ids])).logits[0] for ids, _, _ in rows])
    assert expected.abs().max() > 1
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-5)


def test_one_row_per_turn_and_one_row_per_trajectory_give_the_same_hidden_states():
    shape = tiny_shape()
    chunks = build.build_model(shape, ParallelLayout(), seed=2, wrap_ddp=False)
    ids = random_rows([60])[0][0]
    turns = [10, 25, 60]
    whole = build.forward_hidden(chunks[0], pack_rows([(ids, [], [])]))[0]
    prefixes = build.forward_hidden(chunks[0], pack_rows([(ids[:stop], [], []) for stop in turns]))[0]
    for part, stop in zip(prefixes.split(turns), turns, strict=True):
        torch.testing.assert_close(part, whole[:stop], rtol=0, atol=2e-6)


def test_row_beyond_the_positions_of_the_model_is_refused():
    chunks = build.build_model(tiny_shape(max_position_embeddings=20), ParallelLayout(), seed=2, wrap_ddp=False)
    build.forward_hidden(chunks[0], pack_rows(random_rows([20, 20])))
    with pytest.raises(ValueError, match="a row has 21 tokens, the model knows 20 positions"):
        build.forward_hidden(chunks[0], pack_rows(random_rows([20, 21])))


def test_frozen_model_takes_no_gradient_and_a_wrapped_one_has_fp32_gradient_buffers():
    shape = tiny_shape()
    frozen = build.build_model(shape, ParallelLayout(), seed=0, wrap_ddp=False)
    assert not any(parameter.requires_grad for _, parameter in build.named_parameters(frozen))
    wrapped = build.build_model(shape, ParallelLayout(), dtype=torch.bfloat16, seed=0, wrap_ddp=True)
    for _, parameter in build.named_parameters(wrapped):
        assert parameter.dtype is torch.bfloat16 and parameter.main_grad.dtype is torch.float32


def test_bfloat16_hidden_states_are_as_close_as_those_of_transformers():
    shape = dataclasses.replace(tiny_shape(qk_layernorm=True), init_std=0.05)
    rows = random_rows([33, 20])
    exact = build.build_model(shape, ParallelLayout(), seed=3, wrap_ddp=False)
    rounded = build.build_model(shape, ParallelLayout(), dtype=torch.bfloat16, seed=3, wrap_ddp=False)
    truth = build.forward_hidden(exact[0], pack_rows(rows))[0]
    ours = build.forward_hidden(rounded[0], pack_rows(rows))[0]
    assert ours.dtype is torch.bfloat16
    twin = hugging_face_twin(exact, shape, torch.bfloat16)
    with torch.no_grad():
        theirs = torch.cat([twin.model(torch.tensor([ids])).last_hidden_state[0] for ids, _, _ in rows])
    assert (ours - truth).square().mean() <= 1.2 * (theirs - truth).square().mean()
