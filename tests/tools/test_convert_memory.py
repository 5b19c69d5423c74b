"""How much memory a conversion holds: processes of their own, which report the high-water mark of their resident set."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_tcod.model.families import find_family
from megatron_tcod.model.parts_writer import PartsWriter
from megatron_tcod.model.shape import ModelShape

TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"
MEASURED = """
import os, runpy, sys
tool = sys.argv.pop(1)
sys.path.insert(0, os.path.dirname(tool))  # as for any script
try:
    runpy.run_path(tool, run_name="__main__")
finally:
    print("peak", open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""

QWEN2_5_3B = ModelShape(
    num_layers=36,
    hidden_size=2048,
    ffn_hidden_size=11008,
    num_attention_heads=16,
    num_query_groups=2,
    kv_channels=128,
    vocab_size=151_936,
    rotary_base=1e6,
    tie_word_embeddings=True,
    add_qkv_bias=True,
)
SMALL = ModelShape(
    num_layers=8,
    hidden_size=512,
    ffn_hidden_size=4096,
    num_attention_heads=8,
    num_query_groups=2,
    kv_channels=64,
    vocab_size=20_000,
    tie_word_embeddings=True,
    add_qkv_bias=True,
)
TINY = ModelShape(
    num_layers=2,
    hidden_size=16,
    ffn_hidden_size=16,
    num_attention_heads=2,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=64,
    tie_word_embeddings=True,
    add_qkv_bias=True,
)


def write_random(directory: Path, shape: ModelShape, *, part_bytes: int) -> dict[str, str]:
    """A bf16 Qwen2 of that shape in parts, one tensor in memory at a time; the sha256 of every tensor."""
    family = find_family("qwen2")
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(family.write_config(shape, dtype=torch.bfloat16)))
    generator = torch.Generator().manual_seed(0)
    plan = [
        (name, torch.bfloat16, size) for slot in family.slots(shape) for name, size in slot.hf_shapes(shape).items()
    ]
    with PartsWriter(directory, plan, max_part_bytes=part_bytes) as writer:
        for name, _, size in plan:  # bit patterns of numbers in [0, 1)
            bits = torch.empty(size, dtype=torch.int16).random_(0, 0x3F80, generator=generator)
            writer.write(name, bits.view(torch.bfloat16))
    return writer.digests


def peak_bytes(direction: str, source: Path, target: Path, **sizes: int) -> int:
    arguments = ["--direction", direction, "--input", str(source), "--output", str(target)]
    for name, size in sizes.items():
        arguments += [f"--{name.replace('_', '-')}", str(size)]
    command = [sys.executable, "-W", "ignore", "-c", MEASURED, str(TOOL), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split("peak")[1]) * 1024


def round_trip_peaks(root: Path, shape: ModelShape, *, part_bytes: int) -> tuple[int, int, int]:
    """Number of parts, and the peaks of both directions; every tensor must come back with its digest."""
    digests = write_random(root / "hf", shape, part_bytes=part_bytes)
    num_parts = len(list((root / "hf").glob("*.safetensors")))
    sizes = dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    there = peak_bytes("hf-to-megatron", root / "hf", root / "shards", **sizes)
    for path in (root / "hf").glob("*.safetensors"):
        path.unlink()  # the disk need not hold three copies
    back = peak_bytes("megatron-to-hf", root / "shards", root / "again")
    assert json.loads((root / "again" / "manifest.json").read_text())["tensors"] == digests
    return num_parts, there, back


@pytest.mark.slow
def test_a_conversion_holds_less_than_two_parts_beyond_what_its_imports_take(tmp_path):
    for name in ("tiny", "small"):
        (tmp_path / name).mkdir()
    _, *idle = round_trip_peaks(tmp_path / "tiny", TINY, part_bytes=10**6)
    part_bytes = 40 * 10**6
    num_parts, *peaks = round_trip_peaks(tmp_path / "small", SMALL, part_bytes=part_bytes)
    assert num_parts >= 4
    for peak, base in zip(peaks, idle, strict=True):
        print(f"peak {peak / 1e6:.0f} MB, of which {base / 1e6:.0f} MB without weights; parts of {part_bytes / 1e6:.0f} MB")
        assert peak - base <= 2 * part_bytes


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_three_billion_parameters_convert_within_eight_gibibytes(tmp_path):
    num_parts, there, back = round_trip_peaks(tmp_path, QWEN2_5_3B, part_bytes=2 * 10**9)
    print(f"{num_parts} parts; peak {there / 2**30:.2f} GiB there, {back / 2**30:.2f} GiB back")
    assert num_parts == 4
    assert max(there, back) <= 4 * 10**9 <= 8 * 2**30  # two parts, well below the limit
