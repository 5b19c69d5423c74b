import pytest
import torch
from gloo_world import run_ranks
from tiny_models import pack_rows, random_rows, tiny_shape

from megatron_tcod.model import build, parallel
from megatron_tcod.model.build import Recompute
from megatron_tcod.model.context import own_part, own_span, to_heads, to_tokens
from megatron_tcod.model.parallel import ParallelLayout


def test_without_context_or_sequence_parallel_a_microbatch_is_left_as_it_is():
    microbatch = pack_rows(random_rows([7, 4], seed=1))
    assert own_part(microbatch, ParallelLayout()) is microbatch
    assert own_span(microbatch, ParallelLayout()) == slice(0, len(microbatch.positions))


@pytest.mark.parametrize("lengths", [[7, 4], [1], [3, 5, 4], [2] * 9])
def test_padding_is_a_row_of_its_own_behind_all_others(lengths):
    microbatch = pack_rows(random_rows(lengths, seed=2))
    layout = ParallelLayout(tensor_model_parallel_size=4, sequence_parallel=True)
    part = own_part(microbatch, layout)
    missing = -sum(lengths) % 4
    assert part.num_tokens == sum(lengths) + missing
    assert torch.equal(part.token_ids[: sum(lengths)], microbatch.token_ids)
    assert part.cu_seqlens.tolist() == microbatch.cu_seqlens.tolist() + ([sum(lengths) + missing] if missing else [])
    assert torch.equal(part.positions, microbatch.positions) and part.loss_weight is microbatch.loss_weight


def _check_exchange() -> None:
    layout = ParallelLayout(context_parallel_size=4)
    parallel.initialize(layout)
    group, rank = parallel.cp_group(), parallel.cp_rank()
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(12, 8, 6, generator=generator)  # [T, n, D]
    grad = torch.randn(12, 8, 6, generator=generator)
    mine = whole[rank * 3 : rank * 3 + 3].clone().requires_grad_()
    heads = to_heads(mine, group)
    assert torch.equal(heads, whole[:, rank * 2 : rank * 2 + 2]), "all tokens of two heads"
    back = to_tokens(heads, group)
    assert torch.equal(back, mine), "the way there and back changes nothing"
    back.backward(grad[rank * 3 : rank * 3 + 3])
    assert torch.equal(mine.grad, grad[rank * 3 : rank * 3 + 3])

    few = whole[:, :2]  # two key-value heads over four ranks: each is read by two of them
    mine = few[rank * 3 : rank * 3 + 3].clone().requires_grad_()
    heads = to_heads(mine, group)
    assert torch.equal(heads, few[:, rank // 2 : rank // 2 + 1])
    heads.backward(grad[:, rank : rank + 1])
    expected = torch.stack([grad[:, 0] + grad[:, 1], grad[:, 2] + grad[:, 3]], 1)  # both readers' gradients
    torch.testing.assert_close(mine.grad, expected[rank * 3 : rank * 3 + 3])

    for seed, lengths in enumerate([[14, 3, 22], [1], [2, 2], [9, 1, 1, 30]]):
        microbatch = pack_rows(random_rows(lengths, seed=seed))
        part, span = own_part(microbatch, layout), own_span(microbatch, layout)
        assert part.num_tokens == -(-sum(lengths) // 4)
        first = rank * part.num_tokens
        assert torch.equal(part.positions + first, microbatch.positions[span])
        assert torch.equal(part.loss_weight, microbatch.loss_weight[span])
        ids = parallel.all_gather_bytes(part.token_ids.numpy().tobytes())
        spans = parallel.all_gather_bytes(bytes([span.start, span.stop]))
        joined = torch.cat([torch.frombuffer(bytearray(each), dtype=torch.int64) for each in ids])
        assert torch.equal(joined[: sum(lengths)], microbatch.token_ids) and not joined[sum(lengths) :].any()
        bounds = [0, *(each[1] for each in spans)]
        assert [each[0] for each in spans] == bounds[:-1] and bounds[-1] == len(microbatch.positions), "each exactly once"
    parallel.shutdown()


def test_ranks_trade_tokens_for_heads_and_hold_every_token_and_trained_position_exactly_once():
    run_ranks(4, _check_exchange)


@pytest.mark.parametrize(
    ("tp", "cp", "message"),
    [
        (1, 3, "context_parallel_size 3 shares out the model's 8 query and 2 key-value heads"),
        (4, 4, "context_parallel_size 4 shares out the model's 2 query and 1 key-value heads"),
    ],
)
def test_context_parallel_size_that_does_not_fit_the_heads_is_refused_by_name(tp, cp, message):
    shape = tiny_shape(num_attention_heads=8, num_query_groups=2)
    with pytest.raises(ValueError, match=message):
        build.check_layout(shape, ParallelLayout(tensor_model_parallel_size=tp, context_parallel_size=cp))
    build.check_layout(shape, ParallelLayout(tensor_model_parallel_size=2, context_parallel_size=4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"granularity": "half"}, "recompute_granularity 'half' is neither"),
        ({"method": "uniform"}, "set recompute_granularity full"),
        ({"granularity": "selective", "num_layers": 1}, "set recompute_granularity full"),
        ({"granularity": "full"}, "needs recompute_method uniform or block, got None"),
        ({"granularity": "full", "method": "block"}, "recompute_num_layers of at least 1, got None"),
    ],
)
def test_recompute_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Recompute(**settings)
