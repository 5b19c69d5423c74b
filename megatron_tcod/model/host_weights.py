"""Frozen weights that live in host memory and visit the device for the time of a pass.

    weights = HostWeights(chunks)         # copies them to the host, once, and frees the device
    with weights.on_device():
        run_schedule(chunks, ...)

They never change, so leaving the device costs nothing but forgetting them. On the way in, with CUDA, each block (the
embedding, each layer, the head) is copied from pinned memory on a stream of its own, and its forward pass waits for its
own copy alone: the first layers compute while the later ones still travel. Without CUDA host and device are one memory:
the parameters are emptied and pointed back, and nothing is copied.

Not here: gradients and optimizer states, and weights larger than the device (all blocks are there at the end of a pass).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_tcod.model.build import unwrap


class HostWeights:
    """The weights of frozen chunks in host memory; `chunks` have none on the device until `on_device`."""

    def __init__(self, chunks: list[torch.nn.Module]) -> None:
        self._blocks = [block for chunk in chunks for block in _blocks(chunk)]
        known = {id(parameter) for block in self._blocks for parameter in block.parameters()}
        assert known == {id(parameter) for chunk in chunks for parameter in chunk.parameters()}, "a block is missing"
        self._device = next(chunks[0].parameters()).device
        has_cuda = self._device.type == "cuda"
        self._stream = torch.cuda.Stream(self._device) if has_cuda else None
        self._host: dict[torch.nn.Parameter, Tensor] = {}
        for block in self._blocks:
            for parameter in block.parameters():
                host = parameter.data.cpu()
                self._host[parameter] = host.pin_memory() if has_cuda else host
        self._arrived: dict[torch.nn.Module, torch.cuda.Event] = {}
        if has_cuda:
            for block in self._blocks:
                block.register_forward_pre_hook(self._wait_for)
        self._leave()

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        """The chunks can compute inside. A tensor that is kept from inside, the head say, keeps its own storage."""
        self._enter()
        try:
            yield
        finally:
            for block in self._arrived:
                self._wait_for(block)
            self._leave()

    def _enter(self) -> None:
        if self._stream is None:
            for parameter, host in self._host.items():
                parameter.data = host
            return
        for parameter, host in self._host.items():  # allocated on the stream that will use and free it
            parameter.data = torch.empty_like(host, device=self._device)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for block in self._blocks:
                for parameter in block.parameters():
                    parameter.data.copy_(self._host[parameter], non_blocking=True)
                self._arrived[block] = self._stream.record_event()

    def _leave(self) -> None:
        self._arrived.clear()
        for parameter in self._host:
            parameter.data = parameter.data.new_empty(0)

    def _wait_for(self, block: torch.nn.Module, *_: object) -> None:
        if block in self._arrived:
            torch.cuda.current_stream(self._device).wait_event(self._arrived[block])


def _blocks(chunk: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules that run one after another, in that order."""
    model = unwrap(chunk)
    named = [model.decoder.final_layernorm, getattr(model, "output_layer", None)]
    found = [getattr(model, "embedding", None), *model.decoder.layers, *named]
    return [block for block in found if block is not None]
