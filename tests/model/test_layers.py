import types

import pytest
import torch
import torch.nn.functional as F

from megatron_tcod.model import layers
from megatron_tcod.model.layers import PackedRows


def _bounds(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def _rows(lengths, dtype=torch.float64):
    return PackedRows.build(_bounds(lengths), head_dim=8, rotary_base=10_000.0, dtype=dtype)


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


def test_a_segment_turns_on_from_the_one_that_it_continues():
    bounds, parents = torch.tensor([0, 3, 5, 6, 8], dtype=torch.int32), torch.tensor([-1, 0, 1])  # the last is a root too
    forest = PackedRows.build(bounds, parents, head_dim=8, rotary_base=10_000.0, dtype=torch.float64)
    row = _rows([6])
    expected = torch.tensor([0, 1, 2, 3, 4, 5, 0, 1])
    assert torch.equal(forest.cos, row.cos[expected]) and torch.equal(forest.sin, row.sin[expected])
    assert forest.cu_seqlens_kv.tolist() == [0, 3, 8, 14, 16] and forest.max_seqlen_q == 3 and forest.max_seqlen_kv == 6


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
