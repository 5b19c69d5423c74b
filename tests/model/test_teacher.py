import pytest
import torch
from tiny_models import VOCAB, hugging_face_twin, pack_rows, random_rows, tiny_shape

from megatron_tcod.model import build, parallel
from megatron_tcod.model.parallel import ParallelLayout
from megatron_tcod.model.teacher import Teacher


@pytest.fixture(scope="module", autouse=True)
def world_of_one():
    parallel.initialize(ParallelLayout())
    yield
    parallel.shutdown()


def test_target_times_head_equals_the_logits_of_transformers_at_the_trained_positions():
    shape = tiny_shape(num_layers=2, hidden_size=64, num_attention_heads=8, num_query_groups=4, qk_layernorm=True)
    teacher = Teacher(shape, ParallelLayout(), seed=5)
    twin = hugging_face_twin(teacher.chunks, shape, torch.float64)
    all_rows = [random_rows([12, 3, 30], seed=1), random_rows([25], seed=2)]
    targets = teacher.score([pack_rows(rows) for rows in all_rows])
    for rows, target in zip(all_rows, targets, strict=True):
        with torch.no_grad():
            expected = torch.cat([twin(torch.tensor([ids])).logits[0, positions] for ids, positions, _ in rows])
        logits = (target.hidden @ target.head.T)[:, :VOCAB]  # [S, V]
        torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-5)


def test_scoring_keeps_no_graph_and_changes_nothing():
    teacher = Teacher(tiny_shape(), ParallelLayout(), seed=5)
    before = [parameter.clone() for _, parameter in build.named_parameters(teacher.chunks)]
    microbatches = [pack_rows(random_rows([12, 3], seed=1))]
    first, again = teacher.score(microbatches)[0], teacher.score(microbatches)[0]
    assert torch.equal(first.hidden, again.hidden)
    assert not first.hidden.requires_grad and not first.head.requires_grad
    weight = torch.ones(first.hidden.size(1), requires_grad=True)
    (first.hidden @ weight).sum().backward()  # a saved target must be usable in a graph
    after = [parameter for _, parameter in build.named_parameters(teacher.chunks)]
    assert all(torch.equal(old, new) and new.grad is None for old, new in zip(before, after, strict=True))


def test_rows_without_trained_positions_and_empty_lists_are_scored_as_nothing():
    teacher = Teacher(tiny_shape(), ParallelLayout(), seed=5)
    assert teacher.score([]) == []
    silent = teacher.score([pack_rows([([1, 2, 3], [], [])])])[0]
    assert silent.hidden.shape == (0, 48) and silent.head.shape == (512, 48)
