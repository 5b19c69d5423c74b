"""Where megatron-core assumes CUDA, and what stands there on a host without it.

Call `install()` once before a model is built (`parallel.initialize` does). torch itself stays as it is: each module
in `SITES` gets a private `torch` name whose `cuda.*` bookkeeping is empty and whose factories read `device="cuda"` as
the CPU. Two places call tensor methods, which a module name cannot reach; they get a context manager to hold around
one constructor each: `tensor_cuda_is_identity`, `tensor_type_names_cuda`.

With CUDA available everything here is a no-op. It does not make CUDA-only features (fused kernels, Transformer Engine,
dropout that differs between tensor-parallel ranks) work on a CPU.
"""

from __future__ import annotations

import contextlib
import importlib
import types
from collections.abc import Iterator
from typing import Any

import megatron.core
import torch
import torch.distributed as dist

TESTED_VERSIONS = ("0.16.1",)
"""megatron-core versions whose CUDA call sites were read and run on a CPU."""

SITES = {
    "utils": "GlobalMemoryBuffer and the l2 norm allocate on torch.cuda.current_device()",
    "tensor_parallel.layers": "sequence parallelism allocates the scattered gradient of a layer's input",
    "tensor_parallel.mappings": "sequence parallelism and tp beyond the key-value heads gather into new tensors; expert "
    "parallelism under tp gathers parts of unequal length, which gloo refuses",
    "tensor_parallel.random": "activation recompute reads and sets the CUDA generator",
    "transformer.moe.token_dispatcher": "token counts are copied to the host on a stream of their own",
    "pipeline_parallel.schedules": "the token counter of each schedule is a device='cuda' tensor",
    "pipeline_parallel.p2p_communication": "receive buffers, shape tensors, a synchronize() after each exchange",
    "distributed.param_and_grad_buffer": "gradient buffers are allocated on torch.cuda.current_device()",
    "optimizer.optimizer": "loss scale and overflow flags are device='cuda' tensors",
    "optimizer.clip_grads": "the gradient norm is a device='cuda' tensor",
}
"""Module under `megatron.core` -> the reason why it needs the private `torch` name."""

_CPU = torch.device("cpu")


def _on_cpu(factory: Any) -> Any:
    """The tensor factory with every CUDA `device=` argument read as the CPU."""

    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return staticmethod(make)


class _Stream:
    """Stands for a CUDA stream and its events where every operation is done when it returns."""

    def wait_stream(self, stream: _Stream) -> None:
        pass

    def record_event(self) -> _Stream:
        return self

    def synchronize(self) -> None:
        pass


class _CudaName(types.ModuleType):
    """Stands for `torch.cuda` inside one megatron module; whatever is not listed is the real thing."""

    current_device = staticmethod(lambda: _CPU)
    synchronize = staticmethod(lambda *args, **kwargs: None)
    manual_seed = staticmethod(lambda seed: None)
    get_rng_state = staticmethod(lambda *args, **kwargs: torch.get_rng_state())
    random = types.SimpleNamespace(get_rng_state=get_rng_state)
    Stream = _Stream
    current_stream = staticmethod(lambda *args, **kwargs: _Stream())
    stream = staticmethod(lambda stream: contextlib.nullcontext())

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


class _DistributedName(types.ModuleType):
    """Stands for `torch.distributed` inside one megatron module: these two take parts of unequal length, as NCCL does."""

    @staticmethod
    def all_gather(parts: list[torch.Tensor], tensor: torch.Tensor, group: Any = None) -> None:
        if len({part.shape for part in parts}) == 1:
            dist.all_gather(parts, tensor, group=group)
            return
        padded = tensor.new_zeros(max(len(part) for part in parts), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        gathered = [torch.empty_like(padded) for _ in parts]
        dist.all_gather(gathered, padded, group=group)
        for part, full in zip(parts, gathered, strict=True):
            part.copy_(full[: len(part)])

    @staticmethod
    def reduce_scatter(output: torch.Tensor, parts: list[torch.Tensor], group: Any = None) -> None:
        if len({part.shape for part in parts}) == 1:
            dist.reduce_scatter(output, parts, group=group)
            return
        total = torch.cat(parts)
        dist.all_reduce(total, group=group)
        output.copy_(total.split([len(part) for part in parts])[dist.get_rank(group)])

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)


class _TorchName(types.ModuleType):
    """Stands for `torch` inside one megatron module; whatever is not listed is the real thing."""

    cuda = _CudaName("torch.cuda")
    distributed = _DistributedName("torch.distributed")
    empty, zeros, ones, tensor = (_on_cpu(make) for make in (torch.empty, torch.zeros, torch.ones, torch.tensor))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


_TORCH = _TorchName("torch")


def check_version(version: str) -> None:
    """ValueError unless this megatron-core was tested with the sites above."""
    if version not in TESTED_VERSIONS:
        tested = " or ".join(TESTED_VERSIONS)
        raise ValueError(
            f"megatron-core {version} is not known to run on a CPU host: the CUDA call sites patched by model/cpu.py "
            f"were tested with {tested}; run `pip install megatron-core=={TESTED_VERSIONS[-1]}` or use a CUDA host"
        )


def install() -> bool:
    """Retarget the modules of `SITES` to the CPU; True when that was needed. Calling it again changes nothing."""
    if torch.cuda.is_available():
        return False
    check_version(megatron.core.__version__)
    for name in SITES:
        module = importlib.import_module(f"megatron.core.{name}")
        assert module.torch is torch or module.torch is _TORCH, f"{name} no longer imports torch as `torch`"
        module.torch = _TORCH
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    # The original queues a call for the moment when CUDA initialises, which never comes: the queue only grows.
    random._set_cuda_rng_state = lambda *args, **kwargs: None
    random.initialize_rng_tracker(inference_rng_tracker=True)  # fork() does nothing; all dropout is 0
    dispatcher = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    dispatcher.maybe_move_tensor_to_cpu = _counts_on_host
    return True


def _counts_on_host(tensor: Any, as_numpy: bool = False, **_: Any) -> Any:
    """The original leaves what is on the CPU already as a tensor, which `all_to_all_single` takes for no list of sizes."""
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


@contextlib.contextmanager
def _tensor_method(name: str, method: Any) -> Iterator[None]:
    original = getattr(torch.Tensor, name)
    setattr(torch.Tensor, name, method)
    try:
        yield
    finally:
        setattr(torch.Tensor, name, original)


def tensor_cuda_is_identity() -> contextlib.AbstractContextManager[None]:
    """Hold around GPTModel(...): tying embeddings over pipeline stages calls `weight.data.cuda()`."""
    if torch.cuda.is_available():
        return contextlib.nullcontext()
    return _tensor_method("cuda", lambda self, *args, **kwargs: self)


def tensor_type_names_cuda() -> contextlib.AbstractContextManager[None]:
    """Hold around the bf16 optimizer's constructor: it sorts parameters by the string of `param.type()`."""
    if torch.cuda.is_available():
        return contextlib.nullcontext()
    original = torch.Tensor.type

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return original(self, *args, **kwargs)
        return original(self).replace("torch.", "torch.cuda.", 1)

    return _tensor_method("type", type_name)
