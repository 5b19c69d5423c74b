"""Conversion by NVIDIA's megatron-bridge, for architectures that have no family here: `convert_checkpoint.py --bridge`.

    import_with_bridge(Path("gemma"), Path("gemma-megatron"))
    export_with_bridge(Path("gemma-megatron"), Path("gemma-again"), hf_model=Path("gemma"))

The Megatron side is megatron-bridge's own checkpoint (torch_dist with a run_config.yaml), not the rank files of
`convert_checkpoint.py`, and a model without a family is neither student nor teacher here. The package is the extra
`bridge`; it needs Transformer Engine and CUDA. No code of a model repository is run (trust_remote_code is off).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def auto_bridge() -> Any:
    """megatron-bridge's AutoBridge; ValueError with the reason when it cannot be imported."""
    try:
        from megatron.bridge import AutoBridge
    except ImportError as error:
        raise ValueError(
            f"--bridge needs megatron-bridge and what it imports, which failed: {error}; on a CUDA machine with "
            "Transformer Engine run pip install 'megatron_tcod[bridge]'"
        ) from None
    return AutoBridge


def import_with_bridge(source: Path, target: Path) -> None:
    """Write a Hugging Face directory as a megatron-bridge checkpoint; nothing is left of one that fails."""
    bridge = auto_bridge()
    with _removed_on_failure(target):
        bridge.import_ckpt(hf_model_id=str(source), megatron_path=str(target), trust_remote_code=False)


def export_with_bridge(source: Path, target: Path, *, hf_model: Path) -> None:
    """The inverse; `hf_model` is the directory whose configuration and tokenizer the model had."""
    bridge = auto_bridge().from_hf_pretrained(str(hf_model), trust_remote_code=False)
    with _removed_on_failure(target):
        bridge.export_ckpt(megatron_path=str(source), hf_path=str(target))


@contextmanager
def _removed_on_failure(target: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
