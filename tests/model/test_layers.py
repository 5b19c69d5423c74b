import types

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tcod.model import layers
from megatron_tcod.model.layers import PackedRows


def _bounds(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def _rows(lengths, dtype=torch.float64):
    return PackedRows.build(_bounds(lengths), head_dim=8, rotary_base=10_000.0, dtype=dtype)


def _row_by_row(query, key, value, lengths, scale):
    """Causal softmax attention of each row on its own, from its definition."""
    heads_per_group = query.size(1) // key.size(1)
    outputs = []
    for q, k, v in zip(*(x.split(lengths) for x in (query, key, value)), strict=True):
        k, v = (x.repeat_interleave(heads_per_group, 1) for x in (k, v))
        scores = torch.einsum("inh,jnh->nij", q, k) * scale
        scores = scores.masked_fill(torch.ones(len(q), len(q)).triu(1).bool(), -torch.inf)
        outputs.append(torch.einsum("nij,jnh->inh", scores.softmax(-1), v))
    return torch.cat(outputs)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.sampled_from([1, 2, 4]))
def test_packed_attention_equals_the_definition_row_by_row_forward_and_backward(lengths, num_groups):
    generator = torch.Generator().manual_seed(sum(lengths))
    shapes = [(sum(lengths), heads, 8) for heads in (4, num_groups, num_groups)]
    ours = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    truth = [x.detach().clone().requires_grad_() for x in ours]
    weight = torch.randn(shapes[0], generator=generator, dtype=torch.float64)
    out = layers.packed_attention(*ours, _rows(lengths), scale=0.3)
    expected = _row_by_row(*truth, lengths, 0.3)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    for mine, theirs in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-11)


def test_padding_rows_to_one_batch_stays_bit_close_to_a_loop_over_rows(monkeypatch):
    lengths = [37, 30, 33, 5, 4, 36]
    query, key, value = (torch.randn(sum(lengths), heads, 8) for heads in (4, 2, 2))
    grouped = _rows(lengths, torch.float32)
    monkeypatch.setattr(layers, "SIMILAR_LENGTH", 2.0)
    looped = _rows(lengths, torch.float32)
    assert len(grouped.groups) == 2 and len(looped.groups) == len(lengths)
    batch = layers.packed_attention(query, key, value, grouped, scale=0.3)
    loop = layers.packed_attention(query, key, value, looped, scale=0.3)
    assert (batch - loop).abs().max() <= 2e-6


@given(st.lists(st.integers(0, 300), max_size=40))
def test_every_token_has_one_slot_and_padding_stays_below_the_bound(lengths):
    rows = _rows(lengths)
    tokens = torch.cat([group.tokens for group in rows.groups]) if rows.groups else torch.empty(0, dtype=torch.int64)
    assert sorted(tokens.tolist()) == list(range(sum(lengths)))
    if rows.restore is not None:
        assert torch.equal(tokens[rows.restore], torch.arange(sum(lengths)))
    padded = sum(group.num_rows * group.length for group in rows.groups)
    assert padded <= sum(lengths) / layers.SIMILAR_LENGTH
    for group in rows.groups:
        assert torch.equal(group.gather[group.slots], group.tokens)


def test_positions_restart_in_every_row_and_turn_by_the_angle_of_the_formula():
    rows = _rows([3, 2])
    x = torch.randn(5, 1, 8, dtype=torch.float64)
    turned = layers._Rotate.apply(x, rows.cos, rows.sin)
    for token, position in enumerate([0, 1, 2, 0, 1]):
        for pair in range(4):
            angle = torch.tensor(position * 10_000.0 ** (-2 * pair / 8))
            plane = torch.complex(x[token, 0, pair], x[token, 0, pair + 4])
            expected = plane * torch.polar(torch.tensor(1.0), angle)
            actual = torch.complex(turned[token, 0, pair], turned[token, 0, pair + 4])
            assert (actual - expected).abs() < 1e-6  # the angle is fp32, as in transformers


def test_gradients_of_rotation_norm_and_swiglu_are_those_of_finite_differences():
    rows = _rows([3, 2])
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True)

    assert torch.autograd.gradcheck(lambda x: layers._Rotate.apply(x, rows.cos, rows.sin), (draw(5, 2, 8),))
    assert torch.autograd.gradcheck(lambda x, w: layers._RMSNorm.apply(x, w, 1e-6), (draw(5, 2, 8), draw(8)))
    assert torch.autograd.gradcheck(layers._SwiGLU.apply, (draw(5, 1, 12),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_swiglu_err_no_more_than_torch_does(dtype):
    config = types.SimpleNamespace(params_dtype=dtype, sequence_parallel=False)
    x = (3 * torch.randn(64, 1, 48)).to(dtype)
    norm = layers.RMSNorm(config, 48, eps=1e-6)
    norm.weight.data.uniform_(0.5, 1.5)
    truth = F.rms_norm(x.double(), (48,), norm.weight.double(), 1e-6)
    stock = F.rms_norm(x, (48,), norm.weight, 1e-6)
    _no_worse(norm(x), stock, truth)
    gate, up = x.chunk(2, -1)
    _no_worse(layers.SwiGLU(config)(x), F.silu(gate) * up, F.silu(gate.double()) * up.double())


def _no_worse(ours, stock, truth):
    assert ours.dtype is stock.dtype
    assert (ours - truth).abs().mean() <= 1.3 * (stock - truth).abs().mean() + 1e-12


def test_norm_of_huge_and_zero_rows_is_finite():
    norm = layers.RMSNorm(types.SimpleNamespace(params_dtype=torch.float32, sequence_parallel=False), 8, eps=1e-6)
    x = torch.tensor([[1e15] * 8, [0.0] * 8], requires_grad=True)
    out = norm(x)
    out.sum().backward()
    assert torch.allclose(out[0], torch.ones(8)) and not out[1].any()
    assert x.grad.isfinite().all()
