"""Weights as Hugging Face stores them: model.safetensors, or numbered parts and an index where one file would be large.

    with PartsWriter(directory, plan) as writer:
        for name, tensor in tensors:                  # in the order of plan; one tensor in memory at a time
            writer.write(name, tensor)
    write_manifest(directory, {"tensors": writer.digests}, known=writer.sha256)

`WeightFiles` reads either form. It writes no config.json and makes no directory.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import torch

from megatron_tcod.model.weight_files import INDEX_FILE, SINGLE_FILE, TensorWriter, write_json

MAX_PART_BYTES = 5 * 10**9
"""As in transformers: what file systems and mirrors take without complaint."""

Plan = Sequence[tuple[str, torch.dtype, Sequence[int]]]


class PartsWriter:
    """A `TensorWriter` over model.safetensors, or over parts with an index where that would exceed `max_part_bytes`.

    A tensor larger than that is a part by itself. `digests` holds every tensor's sha256, `sha256` every file's.
    """

    def __init__(
        self,
        directory: Path,
        plan: Plan,
        *,
        max_part_bytes: int = MAX_PART_BYTES,
    ) -> None:
        self.digests: dict[str, str] = {}
        self.sha256: dict[str, str] = {}
        self._directory = directory
        self._parts = _split_plan(plan, max_part_bytes)
        self._writer: TensorWriter | None = None
        self._stack = ExitStack()
        self._weight_map: dict[str, str] = {}
        self._num_bytes = 0

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """The next tensor of the plan, from any device."""
        if self._writer is None:
            part, count = self._parts[len(self.sha256)], len(self._parts)
            file_name = SINGLE_FILE if count == 1 else f"model-{len(self.sha256) + 1:05d}-of-{count:05d}.safetensors"
            self._writer = self._stack.enter_context(TensorWriter(self._directory / file_name, part))
        self._writer.write(name, tensor)
        self._weight_map[name] = self._writer.path.name
        self._num_bytes += tensor.numel() * tensor.element_size()
        if self._writer.is_full:
            self._close_part()

    def _close_part(self) -> None:
        assert self._writer is not None
        self._stack.close()
        self.digests.update(self._writer.digests)
        self.sha256[self._writer.path.name] = self._writer.sha256
        self._writer = None

    def __enter__(self) -> PartsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if kind is not None:
            self._stack.__exit__(kind, error, trace)
            return
        assert len(self.sha256) == len(self._parts), f"{self._directory}: tensors of the plan were not written"
        if len(self._parts) > 1:
            index = {"metadata": {"total_size": self._num_bytes}, "weight_map": self._weight_map}
            write_json(self._directory / INDEX_FILE, index)


def _split_plan(plan: Plan, max_part_bytes: int) -> list[Plan]:
    parts: list[list[tuple[str, torch.dtype, Sequence[int]]]] = [[]]
    filled = 0
    for entry in plan:
        size = entry[1].itemsize * torch.Size(entry[2]).numel()
        if parts[-1] and filled + size > max_part_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(entry)
        filled += size
    return parts
