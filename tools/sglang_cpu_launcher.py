"""Starts a real SGLang server on a CPU: stands in for the few things that only its CUDA packages bring.

    .venv-sglang/bin/python tools/sglang_cpu_launcher.py --model-path /abs/model --device cpu ...

`bash tools/sglang_cpu_env.sh` makes the environment. The arguments are those of `python -m sglang.launch_server`; the
rollout server (megatron_tcod/rollout/sglang_server.py) adds keys, host and port. SGLang's worker processes import this file
again, so the stand-ins hold there too. Each of them covers something that a CPU lacks:

* `sgl_kernel`, compiled CUDA kernels: importable, any use raises;
* the schemas of two torchvision operators, without which a CUDA build of torchvision cannot be imported on a CPU torch;
* the hash behind `sampling_seed`: the same numbers as SGLang's kernel, in plain torch;
* `torch.cuda.synchronize`, which SGLang's weight checksums call: nothing to wait for;
* `--enable-deterministic-inference` with `torch_native` attention: SGLang's batch-invariant kernels need a GPU, so here a
  seed fixes the draw, while rounding may still depend on the batch.

Nothing else of SGLang is changed, and a GPU machine does not need this file.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
import types

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # compiling would take longer than small models run

import torch  # noqa: E402  after the environment it reads

KEPT: list[object] = []
"""Libraries of operators live as long as this list."""


class _AbsentKernel:
    """A kernel, or a table of them, that is not there: importable and readable, never callable."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> _AbsentKernel:
        if name.startswith("__"):
            raise AttributeError(name)
        return _AbsentKernel(f"{self._name}.{name}")

    def __call__(self, *_: object, **__: object) -> None:
        raise NotImplementedError(f"{self._name} needs SGLang's compiled kernels; there are none on this CPU")


class _AbsentModule(types.ModuleType):
    __path__: list[str] = []

    def __getattr__(self, name: str) -> _AbsentKernel:
        if name.startswith("__"):
            raise AttributeError(name)
        return _AbsentKernel(f"{self.__name__}.{name}")


class _AbsentFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        is_kernel = name == "sgl_kernel" or name.startswith("sgl_kernel.")
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if is_kernel else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _AbsentModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def murmur_hash32(seed: torch.Tensor, positions: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """MurmurHash3 (x86, 32 bit) of (seed as two words, position, column): [n], [n], [m] -> uint32 [n, m]."""
    mask = 0xFFFFFFFF

    def rotated(x: torch.Tensor, bits: int) -> torch.Tensor:
        return ((x << bits) | (x >> (32 - bits))) & mask

    def mixed(state: torch.Tensor, word: torch.Tensor) -> torch.Tensor:
        word = rotated(word * 0xCC9E2D51 & mask, 15) * 0x1B873593 & mask
        return (rotated(state ^ word, 13) * 5 + 0xE6546B64) & mask

    words = seed.view(torch.int64)
    state = torch.zeros_like(words)
    for word in (words & mask, (words >> 32) & mask, positions.to(torch.int64) & mask):
        state = mixed(state, word)
    state = mixed(state[:, None], columns.to(torch.int64)[None] & mask) ^ 16
    state = (state ^ (state >> 16)) * 0x85EBCA6B & mask
    state = (state ^ (state >> 13)) * 0xC2B2AE35 & mask
    return (state ^ (state >> 16)).to(torch.uint32)


def stand_in() -> None:
    """Install all of it; harmless to call in every process."""
    sys.meta_path.insert(0, _AbsentFinder())
    vision = torch.library.Library("torchvision", "DEF")
    vision.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    vision.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    kernels = torch.library.Library("sgl_kernel", "FRAGMENT")
    kernels.define("murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor columns) -> Tensor")
    kernels.impl("murmur_hash32_cpu", murmur_hash32, "CPU")
    KEPT.extend((vision, kernels))
    if torch.cuda.is_available():
        raise SystemExit("error: this machine has a GPU; start SGLang itself: python -m sglang.launch_server")
    torch.cuda.synchronize = lambda *_: None

    import sglang.srt.batch_invariant_ops as batch_invariant
    from sglang.srt import server_args

    batch_invariant.enable_batch_invariant_mode = lambda *_, **__: None
    server_args.DETERMINISTIC_ATTENTION_BACKEND_CHOICES.append("torch_native")
    server_args.RADIX_SUPPORTED_DETERMINISTIC_ATTENTION_BACKEND.append("torch_native")


stand_in()

if __name__ == "__main__":
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    try:
        run_server(prepare_server_args(sys.argv[1:]))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)
