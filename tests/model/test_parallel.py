import os

import pytest
from gloo_world import run_ranks

from megatron_tcod.model import parallel
from megatron_tcod.model.parallel import ParallelLayout, check_world_size


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tensor_model_parallel_size": 0}, "tensor_model_parallel_size must be at least 1, got 0"),
        ({"context_parallel_size": 0}, "context_parallel_size must be at least 1, got 0"),
        ({"sequence_parallel": True}, "tensor_model_parallel_size is 1; raise"),
        ({"virtual_pipeline_model_parallel_size": 2}, "pipeline_model_parallel_size >= 2, got 1"),
        ({"virtual_pipeline_model_parallel_size": 1, "pipeline_model_parallel_size": 2}, "at least 2 chunks"),
    ],
)
def test_layout_that_cannot_run_is_refused_by_name(sizes, message):
    with pytest.raises(ValueError, match=message):
        ParallelLayout(**sizes)


def test_world_size_that_no_number_of_replicas_fills_names_the_sizes_and_the_fix():
    layout = ParallelLayout(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    assert check_world_size(layout, 8) == 2
    with pytest.raises(ValueError, match=r"world size 6 != tp 2 \* pp 2 \* cp 1 \* dp.*multiple of 4.*nproc-per-node 8"):
        check_world_size(layout, 6)
    with pytest.raises(ValueError, match="nproc-per-node 4"):
        check_world_size(layout, 1)


def test_a_process_without_torchrun_is_a_world_of_one(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    try:
        parallel.initialize(ParallelLayout())
        assert (parallel.world_size(), parallel.dp_size(), parallel.tp_size(), parallel.pp_size()) == (1, 1, 1, 1)
        assert parallel.is_first_stage() and parallel.is_last_stage()
        assert parallel.all_gather_bytes(b"alone") == [b"alone"]
        with pytest.raises(ValueError, match="world size 1"):
            parallel.initialize(ParallelLayout(tensor_model_parallel_size=2))
    finally:
        parallel.shutdown()
    parallel.shutdown()


def _check_mesh() -> None:
    layout = ParallelLayout(tensor_model_parallel_size=2, pipeline_model_parallel_size=1)
    parallel.initialize(layout)
    rank = parallel.rank()
    assert parallel.replica_ranks() == [rank // 2 * 2, rank // 2 * 2 + 1]
    assert (parallel.tp_rank(), parallel.dp_rank()) == (rank % 2, rank // 2)
    sent = bytes(range(rank)) * 50  # rank 0 sends nothing
    assert parallel.all_gather_bytes(sent) == [bytes(range(other)) * 50 for other in range(4)]
    assert parallel.all_gather_bytes(b"") == [b""] * 4
    assert parallel.all_gather_bytes(bytes([rank]), group=parallel.dp_group()) == [bytes([rank % 2]), bytes([rank % 2 + 2])]

    parallel.initialize(ParallelLayout(tensor_model_parallel_size=2, pipeline_model_parallel_size=2))
    assert parallel.dp_size() == 1 and parallel.replica_ranks() == [0, 1, 2, 3]
    assert (parallel.tp_rank(), parallel.pp_rank()) == (rank % 2, rank // 2)
    assert (parallel.is_first_stage(), parallel.is_last_stage()) == (rank < 2, rank >= 2)
    assert parallel.last_stage_rank() == 2 + rank % 2
    source, group = parallel.last_stage_rank(), parallel.pp_group()
    mine = b"from the last stage" if parallel.is_last_stage() else None
    assert parallel.broadcast_bytes(mine, source=source, group=group) == b"from the last stage"
    assert parallel.broadcast_bytes(b"", source=source, group=group) == b""

    threads = []
    for _ in range(3):
        parallel.initialize(layout)
        parallel.build_mesh(ParallelLayout(pipeline_model_parallel_size=2))
        threads.append(len(os.listdir("/proc/self/task")))
    assert threads[0] == threads[2], f"groups of earlier layouts keep their threads: {threads}"
    parallel.shutdown()


def test_ranks_know_their_place_and_exchange_bytes_of_unequal_length():
    run_ranks(4, _check_mesh)
