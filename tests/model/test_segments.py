"""Attention over packed segments against its definition, one row at a time in float64, forward and backward."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import microbatch_of, tiny_shape

from megatron_tcod.model import build, flash_attention, parallel, segments
from megatron_tcod.model.layers import PackedRows
from megatron_tcod.model.parallel import ParallelLayout
from megatron_tcod.model.segments import SegmentPlan, kv_index, path_lengths, segment_attention


def bounds_of(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def row_attention(query, key, value, scale):
    """Causal softmax attention of one row, from its definition."""
    key, value = (x.repeat_interleave(query.size(1) // key.size(1), 1) for x in (key, value))
    scores = torch.einsum("inh,jnh->nij", query, key) * scale
    scores = scores.masked_fill(torch.ones(len(query), len(query)).triu(1).bool(), -torch.inf)
    return torch.einsum("nij,jnh->inh", scores.softmax(-1), value)


def draw_qkv(num_tokens, num_groups, seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(num_tokens, heads, 8) for heads in (4, num_groups, num_groups)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def assert_rows_attend_alone(rows, qkv, out, seed):
    """`out` [T, n, D] of the packed tokens, and its gradients, are those of each row computed by itself."""
    generator = torch.Generator().manual_seed(seed + 1)
    truth = [x.detach().clone().requires_grad_() for x in qkv]
    loss, expected_loss = 0.0, 0.0
    for tokens in rows:
        expected = row_attention(*(x[tokens] for x in truth), 0.3)
        torch.testing.assert_close(out[tokens], expected, rtol=1e-10, atol=1e-12)
        weight = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
        loss, expected_loss = loss + (out[tokens] * weight).sum(), expected_loss + (expected * weight).sum()
    loss.backward()
    expected_loss.backward()
    for mine, theirs in zip(qkv, truth, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-11)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.sampled_from([1, 2, 4]))
def test_rows_attend_as_if_alone(lengths, num_groups):
    bounds, seed = bounds_of(lengths), sum(lengths)
    qkv = draw_qkv(sum(lengths), num_groups, seed)
    out = segment_attention(*qkv, SegmentPlan.build(bounds), scale=0.3)
    rows = [torch.arange(start, stop) for start, stop in pairwise(bounds.tolist())]
    assert_rows_attend_alone(rows, qkv, out, seed)


FORESTS = st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=14), min_size=1, max_size=8)
"""Rows of three ids: they agree on prefixes of many lengths, on whole rows, or not at all."""


@settings(deadline=None, max_examples=40)
@given(FORESTS, st.sampled_from([1, 2, 4]), st.integers(1, 3))
def test_rows_of_a_forest_attend_as_if_alone(rows, num_groups, least):
    microbatch = microbatch_of(rows, least=least)
    qkv = draw_qkv(microbatch.num_tokens, num_groups, len(rows))
    plan = SegmentPlan.build(microbatch.cu_seqlens, microbatch.parents)
    out = segment_attention(*qkv, plan, scale=0.3)
    assert_rows_attend_alone([place.tokens for place in microbatch.rows()], qkv, out, len(rows))


def bottom_right_attention(query, key, value, cu_seqlens_q, cu_seqlens_kv, scale):
    """What FlashAttention's variable-length kernels define: causal, aligned to the end of each sequence's keys."""
    outputs = []
    for (q_start, q_stop), (k_start, k_stop) in zip(
        pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_kv.tolist()), strict=True
    ):
        q, k, v = query[q_start:q_stop], key[k_start:k_stop], value[k_start:k_stop]
        padded = torch.cat([q.new_zeros(len(k) - len(q), *q.shape[1:]), q])  # the queries are the last of the row
        outputs.append(row_attention(padded, k, v, scale)[len(k) - len(q) :])
    return torch.cat(outputs)


@settings(deadline=None, max_examples=20)
@given(FORESTS, st.integers(1, 3))
def test_the_thd_description_of_a_forest_means_the_same_to_a_variable_length_kernel(rows, least):
    microbatch = microbatch_of(rows, least=least)
    bounds, parents = microbatch.cu_seqlens, microbatch.parents
    query, key, value = draw_qkv(microbatch.num_tokens, 2, 7)
    expected = segment_attention(query, key, value, SegmentPlan.build(bounds, parents), scale=0.3)
    if parents is None:
        index, cu_seqlens_kv = torch.arange(microbatch.num_tokens), bounds
    else:
        index, cu_seqlens_kv = kv_index(bounds, parents), F.pad(path_lengths(bounds, parents).cumsum(0), (1, 0))
    out = bottom_right_attention(query, key[index], value[index], bounds, cu_seqlens_kv, 0.3)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)


def test_padding_segments_to_one_batch_stays_bit_close_to_a_loop_over_rows(monkeypatch):
    lengths = [37, 30, 33, 5, 4, 36]
    query, key, value = (torch.randn(sum(lengths), heads, 8) for heads in (4, 2, 2))
    grouped = SegmentPlan.build(bounds_of(lengths))
    monkeypatch.setattr(segments, "SIMILAR_LENGTH", 2.0)
    looped = SegmentPlan.build(bounds_of(lengths))
    assert len(grouped.groups) == 2 and len(looped.groups) == len(lengths)
    batch, loop = (segment_attention(query, key, value, plan, scale=0.3) for plan in (grouped, looped))
    assert (batch - loop).abs().max() <= 2e-6


def test_siblings_of_similar_length_attend_in_one_call():
    bounds = bounds_of([80, 20, 18, 19, 17, 20, 16, 18, 20])
    plan = SegmentPlan.build(bounds, torch.tensor([-1] + [0] * 8))
    assert [(group.num, group.length, group.before) for group in plan.groups] == [(1, 80, 0), (8, 20, 80)]
    assert plan.groups[0].mask is None and plan.groups[1].mask.shape == (20, 100)


def test_a_pair_costs_its_multiplications_over_those_of_a_token_with_the_layer_s_matrices(single_process):
    parallel.initialize(ParallelLayout())
    shape = tiny_shape(num_layers=1)
    chunks = build.build_model(shape, ParallelLayout(), seed=0, wrap_ddp=False)
    matrices = sum(one.numel() for name, one in build.named_parameters(chunks) if "layers.0" in name and one.ndim == 2)
    query = torch.empty(shape.num_attention_heads, shape.kv_channels)
    assert segments.cost_of_pair(shape) == pytest.approx(2 * query.numel() / matrices)


@given(st.lists(st.integers(0, 300), max_size=40))
def test_every_token_has_one_slot_and_padding_stays_below_the_bound(lengths):
    plan = SegmentPlan.build(bounds_of(lengths))
    assert torch.equal(plan.query_index[plan.slots], torch.arange(sum(lengths)))
    assert len(plan.query_index) <= sum(lengths) / segments.SIMILAR_LENGTH
    assert len(plan.query_index) == sum(group.num * group.length for group in plan.groups)


def test_gradients_of_a_key_that_many_segments_see_are_summed_in_fp32():
    """torch's index_add_ on a CPU sums wide by itself: only on CUDA could a narrow sum fail here."""
    key = torch.zeros(2, 1, 4, dtype=torch.bfloat16, requires_grad=True)
    seen = segments.gather_keys(key, torch.tensor([0] * 4096 + [1]))
    seen.sum().backward()
    assert key.grad[:, 0, 0].tolist() == [4096.0, 1.0], "in bfloat16 256 + 1 is 256"


def varlen_kernel(q, k, v, cu_q, cu_k, max_q, max_k, scale):
    """A stand-in with a kernel's signature: right, and slow."""
    assert max_q == cu_q.diff().max() and max_k == cu_k.diff().max()
    return bottom_right_attention(q.float(), k.float(), v.float(), cu_q, cu_k, scale).to(q.dtype)


def top_left_kernel(q, k, v, cu_q, cu_k, max_q, max_k, scale):
    """The mask of FlashAttention before 2.1: query i sees the first i + 1 keys."""
    outputs = []
    for (q_start, q_stop), (k_start, _) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        keys = slice(k_start, k_start + q_stop - q_start)
        outputs.append(row_attention(q[q_start:q_stop].float(), k[keys].float(), v[keys].float(), scale).to(q.dtype))
    return torch.cat(outputs)


def broken_kernel(*args):
    raise RuntimeError("no kernel image is available for execution on the device")


def test_only_a_kernel_that_attends_right_is_taken_and_the_others_are_named(caplog):
    wrong = {"absent": None, "top left": top_left_kernel, "broken": broken_kernel}
    assert flash_attention.choose_kernel(wrong, "cpu", torch.bfloat16) is None
    assert [record.args[0] for record in caplog.records if record.levelname == "WARNING"] == ["top left", "broken"]
    assert flash_attention.choose_kernel({**wrong, "right": varlen_kernel}, "cpu", torch.bfloat16) is not None
    assert flash_attention.find_kernel("cpu", torch.bfloat16) is None
    assert flash_attention.find_kernel("cuda", torch.float32) is None


@pytest.mark.parametrize("least", [1, None])
def test_a_kernel_gets_rows_and_forests_so_that_outputs_and_gradients_are_those_of_the_reference(least):
    microbatch = microbatch_of([[1, 2, 3, 4], [1, 2, 3, 5, 6], [1, 2], [7, 8, 9], [1, 2, 3, 4, 4]], least=least)
    bounds, parents = microbatch.cu_seqlens, microbatch.parents
    rows = PackedRows.build(bounds, parents, head_dim=8, rotary_base=1e4, dtype=torch.float64)
    qkv = draw_qkv(microbatch.num_tokens, 2, 3)

    def kernel(q, k, v, cu_q, cu_k, max_q, max_k, scale):
        return bottom_right_attention(q, k, v, cu_q, cu_k, scale)

    out = flash_attention.attend(kernel, *qkv, rows, scale=0.3)
    assert_rows_attend_alone([place.tokens for place in microbatch.rows()], qkv, out, 3)
