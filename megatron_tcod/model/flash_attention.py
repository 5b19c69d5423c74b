"""Variable-length FlashAttention where there is a GPU and a kernel for it: rows and prefix forests without padding.

    kernel = find_kernel("cuda", torch.bfloat16)                    # None: take segments.segment_attention
    output = kernel(query, key, value, rows, scale=D**-0.5)         # [T, n, D]

`PackedRows` describes what attends to what in the terms of these kernels (thd): a sequence of queries is a segment, its keys
are the whole path of its row up to its end, and the causal mask is aligned to the bottom right, so that the last query
sees all keys. Rows without shared prefixes have keys where the queries are; for a forest keys and values are gathered path
by path, `kv_index`, and their gradients summed over the paths.

Two sources are tried in turn: the package `flash_attn`, and torch's own `torch.nn.attention.varlen`. A kernel that aligns
its mask otherwise would train on wrong attention in silence, so each is compared with `segments.py` on a small forest before
it is taken. Both run on CUDA alone, in fp16 and bf16: nothing here has run where the tests run, which hold plain-torch
kernels of the same signature against `segments.py`, right ones and wrong ones.

Transformer Engine's own attention would take `PackedRows` where no prefix is shared; for a forest it must be told the mask
`padding_causal_bottom_right`, for which Megatron has no name.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_tcod.model.segments import SegmentPlan, gather_keys, kv_index, path_lengths, segment_attention

if TYPE_CHECKING:
    from megatron_tcod.model.layers import PackedRows

logger = logging.getLogger(__name__)

Kernel = Callable[..., Tensor]
"""`kernel(query, key, value, rows, scale=)` -> [T, n, D]; query [T, n, D], key and value [T, n_kv, D]."""


@functools.lru_cache
def find_kernel(device_type: str, dtype: torch.dtype) -> Kernel | None:
    """The variable-length kernel for tensors of this kind, or None; said once."""
    if device_type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return None
    return choose_kernel({name: adapt() for name, adapt in SOURCES.items()}, device_type, dtype)


def choose_kernel(
    found: Mapping[str, Callable[..., Tensor] | None], device_type: str, dtype: torch.dtype
) -> Kernel | None:
    """The first kernel that is there and attends as `segments.py` does."""
    for name, kernel in found.items():
        if kernel is None:
            continue
        try:
            error = worst_error(kernel, device_type, dtype)
        except RuntimeError as failure:  # built for another GPU, head size or torch
            logger.warning("attention: the kernel of %s fails on a small case and is not used: %s", name, failure)
            continue
        if error <= 8 * torch.finfo(dtype).eps:
            logger.info("attention: variable-length kernel of %s", name)
            return functools.partial(attend, kernel)
        logger.warning("attention: the kernel of %s is off by %.1e on a small case and is not used", name, error)
    logger.info("attention: no variable-length kernel, torch's SDPA on %s instead", device_type)
    return None


def worst_error(kernel: Callable[..., Tensor], device_type: str, dtype: torch.dtype) -> float:
    """Largest difference of outputs from fp32 attention on a forest of 4 segments, values about 1."""
    generator = torch.Generator().manual_seed(0)
    bounds = torch.tensor([0, 40, 47, 60, 65], dtype=torch.int32, device=device_type)
    parents = torch.tensor([-1, 0, 0, 1], device=device_type)
    query, key, value = (
        torch.randn(65, heads, 64, generator=generator).to(device_type, dtype) for heads in (4, 2, 2)
    )
    plan, paths = SegmentPlan.build(bounds, parents), path_lengths(bounds, parents)
    expected = segment_attention(query.float(), key.float(), value.float(), plan, scale=0.125)
    index, cu_seqlens_kv = kv_index(bounds, parents), F.pad(paths.cumsum(0, dtype=torch.int32), (1, 0))
    actual = kernel(query, key[index], value[index], bounds, cu_seqlens_kv, 40, int(paths.max()), 0.125)
    return float((actual.float() - expected).abs().max())


def attend(
    kernel: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, rows: PackedRows, *, scale: float
) -> Tensor:
    """`kernel(query, key, value, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv, scale)` on rows or a forest."""
    if rows.kv_index is not None:
        key, value = gather_keys(key, rows.kv_index), gather_keys(value, rows.kv_index)  # [sum of paths, n_kv, D]
    bounds = rows.cu_seqlens_q, rows.cu_seqlens_kv, rows.max_seqlen_q, rows.max_seqlen_kv
    return kernel(query, key, value, *bounds, scale)


def flash_attn_kernel() -> Callable[..., Tensor] | None:
    """Of the package flash_attn; its causal mask is aligned to the bottom right from 2.1 on."""
    try:
        attention: Any = importlib.import_module("flash_attn").flash_attn_varlen_func
    except (ImportError, AttributeError):  # absent, or built for another torch
        return None

    def kernel(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float) -> Tensor:
        return attention(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=scale, causal=True)

    return kernel


def torch_kernel() -> Callable[..., Tensor] | None:
    """Of torch, where it takes fewer key-value heads than query heads and a window that ends at the query."""
    try:
        varlen_attn: Any = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except ImportError:
        return None
    if not {"window_size", "enable_gqa", "scale"} <= inspect.signature(varlen_attn).parameters.keys():
        return None

    def kernel(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float) -> Tensor:
        return varlen_attn(
            q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=(-1, 0), enable_gqa=q.size(1) != k.size(1)
        )

    return kernel


SOURCES = {"flash_attn": flash_attn_kernel, "torch.nn.attention.varlen": torch_kernel}
