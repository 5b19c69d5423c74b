"""The random number generators of a process, as plain values: Python's, NumPy's, torch's, CUDA's, Megatron's tracker.

    saved = rng_state()             # tensors, numbers and tuples: weights_only reads it back
    set_rng_state(saved)

The project's own draws are seeded by step and name and need none of this; what a user's environment or a dropout draws
from the global generators does.
"""

from __future__ import annotations

import random
import sys
from typing import Any

import torch
from megatron.core import tensor_parallel


def rng_state() -> dict[str, Any]:
    """Where every generator stands now."""
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {"python": (version, torch.tensor(words), gauss), "torch": torch.get_rng_state()}
    if (numpy := sys.modules.get("numpy")) is not None:
        kind, keys, position, has_gauss, cached = numpy.random.get_state()
        state["numpy"] = (kind, torch.tensor(keys.tolist()), int(position), int(has_gauss), float(cached))
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
        tracked = tensor_parallel.get_cuda_rng_tracker().get_states()
        state["tracker"] = {name: value for name, value in tracked.items() if isinstance(value, torch.Tensor)}
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Put every generator back that `state` knows and this process has."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    torch.set_rng_state(state["torch"])
    if "numpy" in state and (numpy := sys.modules.get("numpy")) is not None:
        kind, keys, position, has_gauss, cached = state["numpy"]
        numpy.random.set_state((kind, keys.numpy().astype("uint32"), position, has_gauss, cached))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
        tracker = tensor_parallel.get_cuda_rng_tracker()
        tracker.set_states({**tracker.get_states(), **state["tracker"]})
