"""What this machine offers: `python -m megatron_tcod.doctor`.

    python -m megatron_tcod.doctor launch --gpus-per-node 8 -- --config run.toml     # can this node start the run?
    python -m megatron_tcod.doctor plan run.toml --gpus 64 --device h200             # memory, time and layout of a run

One line per fact: interpreter, packages with their versions, accelerators, and what their absence costs. It imports
nothing that may be missing before it has said so, changes nothing, needs no network, and exits with 1 when something
that every run needs is missing.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import sys

REQUIRED = ("torch", "megatron-core", "transformers", "tokenizers", "safetensors", "msgspec", "pydantic", "tyro", "rich")
COMMANDS = {"launch": "megatron_tcod.launch_checks", "plan": "megatron_tcod.plan"}
"""Each has a `main(argv)` and is imported only when it is asked for."""
TESTED_MEGATRON = "0.16.1"
OPTIONAL = {
    "alfworld": "the alfworld environment cannot be used; pip install '.[alfworld]'",
    "scienceworld": "the scienceworld environment cannot be used; pip install '.[scienceworld]'",
    "tensorboard": "metrics go to JSONL alone; pip install '.[tensorboard]'",
}


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def package_lines() -> tuple[list[str], int]:
    """Lines about packages, and how many required ones are missing or of another version than tested."""
    lines, faults = [], 0
    for package in REQUIRED:
        found = version_of(package)
        note = ""
        if found is None:
            faults, note = faults + 1, "MISSING; pip install ."
        elif package == "megatron-core" and found != TESTED_MEGATRON:
            faults, note = faults + 1, f"tested with {TESTED_MEGATRON} only; pip install megatron-core=={TESTED_MEGATRON}"
        lines.append(f"{package:<20} {found or '-':<14} {note}".rstrip())
    for module, cost in OPTIONAL.items():
        if importlib.util.find_spec(module) is not None:
            lines.append(f"{module:<20} {version_of(module) or 'found'}")
        else:
            lines.append(f"{module:<20} {'-':<14} {cost}")
    return lines, faults


def accelerator_lines() -> list[str]:
    """Transformer Engine and Apex; needs torch alone."""
    from megatron_tcod.model import accelerators

    rows = accelerators.describe(accelerators.find())
    return [f"{name:<20} {told}{'; ' + effect if effect else ''}" for name, told, effect in rows]


def device_lines() -> list[str]:
    import torch

    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
        return [f"{'device':<20} {torch.cuda.device_count()} x {', '.join(sorted(names))}, backend nccl"]
    reason = "this torch is a CPU build" if torch.version.cuda is None else "no CUDA device answers"
    return [f"{'device':<20} CPU with {os.cpu_count()} cores, backend gloo ({reason})"]


def native_lines() -> list[str]:
    """What the build left, and who will do the arithmetic on logits."""
    import torch

    from megatron_tcod.ops import backends, native

    lines = []
    for module, cost in (("_C", "plain torch is slower on a CPU"), ("_C_cuda", "Triton or plain torch take its place")):
        reason, info = native.missing(module), native.build_info().get(module, {})
        if reason is not None:
            lines.append(f"{module:<20} {'-':<14} {reason}; {cost}")
        elif module == "_C":
            kernels = native.load(module)
            threads = "OpenMP" if kernels.has_openmp else "no OpenMP, so one thread"
            lines.append(f"{module:<20} {kernels.isa():<14} of {', '.join(kernels.isas())}; {threads}")
        else:
            lines.append(f"{module:<20} {'CUDA ' + info.get('toolkit', '?'):<14} for {', '.join(info.get('archs', ['?']))}")
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        backend = backends.choose("auto", device=device, dtype=torch.float32)
        lines.append(f"{'divergence':<20} {backend.name:<14} on {device}")
    return lines


def main(argv: list[str]) -> int:
    if argv in (["--help"], ["-h"]):
        print(__doc__)
        return 0
    if argv and argv[0] in COMMANDS:
        from megatron_tcod.config import run_entry_point

        run_entry_point(lambda _: importlib.import_module(COMMANDS[argv[0]]).main(argv[1:]))
    if argv:
        print(f"error: doctor takes {' or '.join(COMMANDS)} or nothing, got {' '.join(argv)}", file=sys.stderr)
        return 2
    lines, faults = package_lines()
    print(f"{'python':<20} {sys.version.split()[0]}")
    print("\n".join(lines))
    if version_of("torch"):
        print("\n".join(device_lines() + accelerator_lines() + native_lines()))
    if not faults:
        from megatron_tcod.envs import ENVS

        print(f"{'environments':<20} {', '.join(ENVS)}")
    return int(faults > 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
