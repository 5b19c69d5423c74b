"""KV rows: what is copied out and in, and that unused rows cost no memory."""

import psutil
import torch
from tiny_hf import tiny_model

from megatron_tcod.rollout.decoder import DecoderShape
from megatron_tcod.rollout.kv_slots import KVSlots

SHAPE = DecoderShape.from_hf(tiny_model("qwen3").config.to_dict())


def test_a_segment_is_a_copy_that_can_be_cut_and_put_into_another_row():
    slots = KVSlots(SHAPE, num_rows=3, num_positions=20, dtype=torch.float32)
    slots.keys.copy_(torch.randn_like(slots.keys))
    slots.values.copy_(torch.randn_like(slots.values))
    segment = slots.segment(0, 4, 12)
    keys, values = slots.keys[:, 0, :, 4:12].clone(), slots.values[:, 0, :, 4:12].clone()
    slots.clear(0)
    slots.write(2, 1, segment.segment(2, 8), 5)
    assert torch.equal(slots.keys[:, 2, :, 1:6], keys[:, :, 2:7])
    assert torch.equal(slots.values[:, 2, :, 1:6], values[:, :, 2:7])
    assert not slots.keys[:, 0].any() and not slots.values[:, 0].any()


def test_rows_take_memory_only_where_they_are_written():
    process = psutil.Process()
    before = process.memory_info().rss
    slots = KVSlots(SHAPE, num_rows=64, num_positions=40_000, dtype=torch.bfloat16)
    total = slots.keys.nbytes + slots.values.nbytes
    slots.keys[:, 3, :, :100] = 1
    assert total > 900 * 2**20
    assert process.memory_info().rss - before < 50 * 2**20
    assert float(slots.keys.dtype.itemsize) == 2 and not slots.values[:, 63, :, -1].any()
