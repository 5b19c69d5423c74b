import pytest
import torch
from tiny_models import VOCAB, hugging_face_twin, pack_rows, random_rows, tiny_shape

from megatron_tcod.model import build, parallel
from megatron_tcod.model.parallel import ParallelLayout
from megatron_tcod.model.teacher import Teacher, deal


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


def test_offloaded_weights_leave_the_device_and_change_no_target():
    shape = tiny_shape(tie_word_embeddings=True)
    stays, leaves = (Teacher(shape, ParallelLayout(), seed=5) for _ in range(2))
    leaves.offload()
    microbatches = [pack_rows(random_rows([12, 3], seed=1)), pack_rows(random_rows([7], seed=2))]
    for _ in range(2):
        assert not any(parameter.numel() for _, parameter in build.named_parameters(leaves.chunks))
        for mine, theirs in zip(leaves.score(microbatches), stays.score(microbatches), strict=True):
            assert torch.equal(mine.hidden, theirs.hidden) and torch.equal(mine.head, theirs.head)


def test_offloaded_weights_leave_even_when_scoring_fails():
    teacher = Teacher(tiny_shape(), ParallelLayout(), seed=5)
    teacher.offload()
    beyond = pack_rows([([VOCAB + 10_000, 1, 2], [0], [1.0])])
    with pytest.raises((IndexError, RuntimeError)):
        teacher.score([beyond])
    assert not any(parameter.numel() for _, parameter in build.named_parameters(teacher.chunks))
    good = [pack_rows(random_rows([12, 3], seed=1))]
    assert torch.equal(teacher.score(good)[0].hidden, Teacher(tiny_shape(), ParallelLayout(), seed=5).score(good)[0].hidden)


def test_microbatches_are_dealt_by_tokens_each_to_one_replica():
    assert deal([5, 100, 40, 60, 3], 2) == [0, 0, 1, 1, 1]
    assert deal([], 3) == [] and deal([7], 3) == [0]


def test_teacher_of_its_own_layout_refuses_context_parallelism_by_name():
    with pytest.raises(ValueError, match="context_parallel_size 2, expected 1"):
        Teacher(tiny_shape(), ParallelLayout(), seed=5, mesh=parallel.Mesh(ParallelLayout(context_parallel_size=2), {}))
