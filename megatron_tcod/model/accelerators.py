"""Transformer Engine and NVIDIA's Apex: what is importable, what it is used for, and what takes its place.

    found = accelerators.find()                              # looks once a process; never raises
    impl = accelerators.choose("auto", found)                # "transformer_engine" or "local"
    config = TransformerConfig(..., **accelerators.config_settings(impl, found))
    accelerators.fit_layer(layer_spec, impl)                 # Megatron's local layer -> its modules of `impl`
    accelerators.log_choice(impl, found)                     # once, on the first rank

Three things depend on them. The layers: with `transformer_engine` the matrix products and norms are its modules, unfused, so
that parameters keep the names of the local layer and checkpoints and mappings do not depend on it; core attention and
activation stay ours. The optimizer: megatron-core takes the FusedAdam of Transformer Engine, else of Apex, else torch's
AdamW, when it is imported. Gradient accumulation inside the weight's matrix product: only with Apex's kernel
`fused_weight_gradient_mlp_cuda`, since the output layer is Megatron's own under either `impl`.

The package `apex` of the Python index is another project, not NVIDIA's; it is told by what lies in its directory, without
running it. Without CUDA nothing of this is used. None of it has run on a GPU with either library: see the README.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_tcod.model.experts import expert_mlp

logger = logging.getLogger(__name__)

Impl = Literal["transformer_engine", "local"]
APEX_SOURCE = "https://github.com/NVIDIA/apex"
WGRAD_KERNEL = "fused_weight_gradient_mlp_cuda"
_told: set[str] = set()


@dataclass(frozen=True, kw_only=True)
class Library:
    """One library. Example: `Library(name="apex", is_usable=False, told="not installed")`"""

    name: str
    is_usable: bool
    told: str
    """Version where it is usable, otherwise why it is not and what to do."""


@dataclass(frozen=True, kw_only=True)
class Found:
    transformer_engine: Library
    apex: Library
    wgrad_kernel: Library
    has_cuda: bool

    @property
    def fused_adam(self) -> str:
        """Who brings the optimizer's step."""
        usable = [library.name for library in (self.transformer_engine, self.apex) if library.is_usable]
        return usable[0] if usable else "torch"

    @property
    def fuses_accumulation(self) -> bool:
        return self.has_cuda and self.wgrad_kernel.is_usable


@functools.cache
def find() -> Found:
    """What this process can import."""
    return Found(
        transformer_engine=find_transformer_engine(),
        apex=find_apex(),
        wgrad_kernel=find_wgrad_kernel(),
        has_cuda=torch.cuda.is_available(),
    )


def find_transformer_engine() -> Library:
    name = "transformer_engine"
    if importlib.util.find_spec(name) is None:
        return absent(name, "not installed; on a GPU host pip install 'transformer-engine[pytorch]'")
    if (error := import_error("transformer_engine.pytorch")) is not None:
        return absent(name, f"installed, but its PyTorch part does not import: {error}")
    return Library(name=name, is_usable=True, told=version_of("transformer-engine") or "unknown version")


def find_apex() -> Library:
    """NVIDIA's has `multi_tensor_apply` and the kernels of `amp_C`; the index's package of that name has neither."""
    name = "apex"
    spec = importlib.util.find_spec(name)
    if spec is None:
        return absent(name, f"not installed; it is built from {APEX_SOURCE}")
    places = [Path(place) for place in spec.submodule_search_locations or ()]
    if not any((place / "multi_tensor_apply").is_dir() for place in places):
        return absent(name, f"the Python index's apex, another project; pip uninstall apex, then build {APEX_SOURCE}")
    if importlib.util.find_spec("amp_C") is None:
        return absent(name, f"NVIDIA's without its kernels (no amp_C); build {APEX_SOURCE} with --cpp_ext --cuda_ext")
    if (error := import_error("apex.optimizers")) is not None:
        return absent(name, f"NVIDIA's, but it does not import: {error}")
    return Library(name=name, is_usable=True, told=version_of(name) or "unknown version")


def find_wgrad_kernel() -> Library:
    if importlib.util.find_spec(WGRAD_KERNEL) is None:
        return absent(WGRAD_KERNEL, f"not installed; it comes with {APEX_SOURCE} built with --wgrad_accumulation")
    if (error := import_error(WGRAD_KERNEL)) is not None:
        return absent(WGRAD_KERNEL, f"installed, but it does not import: {error}")
    return Library(name=WGRAD_KERNEL, is_usable=True, told="found")


def absent(name: str, told: str) -> Library:
    return Library(name=name, is_usable=False, told=told)


def import_error(module: str) -> str | None:
    """Why a module does not import, in one line; None where it does. Native libraries fail in many ways."""
    try:
        importlib.import_module(module)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    return None


def version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def choose(requested: str, found: Found) -> Impl:
    """The layers' implementation. ValueError where `transformer_engine` is asked for and cannot be."""
    engine = found.transformer_engine
    if requested == "transformer_engine":
        if not engine.is_usable:
            raise ValueError(f"transformer_impl = transformer_engine: {engine.told}; or set transformer_impl = local")
        if not found.has_cuda:
            raise ValueError(
                "transformer_impl = transformer_engine needs a CUDA device and torch sees none; set transformer_impl = local"
            )
    if requested == "local":
        return "local"
    return "transformer_engine" if engine.is_usable and found.has_cuda else "local"


def config_settings(impl: Impl, found: Found) -> dict[str, Any]:
    """The fields of Megatron's TransformerConfig that depend on the choice."""
    return {"transformer_impl": impl, "gradient_accumulation_fusion": found.fuses_accumulation}


def fit_layer(layer: Any, impl: Impl) -> None:
    """Put the matrix products and norms of `impl` into a layer of Megatron's local specification, in place."""
    if impl == "local":
        return
    # Not importable without Transformer Engine; the names are megatron-core's.
    modules = importlib.import_module("megatron.core.extensions.transformer_engine")
    parts = layer.submodules
    attention, mlp = parts.self_attention.submodules, expert_mlp(parts.mlp).submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = modules.TENorm
    attention.linear_qkv, attention.linear_proj = modules.TEColumnParallelLinear, modules.TERowParallelLinear
    mlp.linear_fc1, mlp.linear_fc2 = modules.TEColumnParallelLinear, modules.TERowParallelLinear


def describe(found: Found) -> list[tuple[str, str, str]]:
    """Name, what there is, and what it means for a run: for `doctor`."""
    engine, apex, kernel = found.transformer_engine, found.apex, found.wgrad_kernel
    usable = "transformer_impl = auto takes it for the layers" if found.has_cuda else "not used: no CUDA device"
    rows = [
        (engine.name, engine.told, usable if engine.is_usable else "layers run on megatron-core's local modules"),
        (apex.name, apex.told, "its FusedAdam steps unless Transformer Engine's does" if apex.is_usable else ""),
        (kernel.name, kernel.told, "" if found.fuses_accumulation else "gradients are added up after the product, not in it"),
    ]
    return [*rows, ("optimizer", f"Adam of {found.fused_adam}", "")]


def log_choice(impl: Impl, found: Found) -> None:
    """Say once what is used, and for what reason something is not."""
    missing = [library for library in (found.transformer_engine, found.apex, found.wgrad_kernel) if not library.is_usable]
    reasons = f" ({'; '.join(f'{one.name}: {one.told}' for one in missing)})" if missing and found.has_cuda else ""
    added = "inside" if found.fuses_accumulation else "after"
    line = f"layers: {impl}; optimizer: Adam of {found.fused_adam}; gradients added up {added} the product{reasons}"
    if line not in _told:
        _told.add(line)
        logger.info(line)
