"""The table of model families: which Hugging Face `model_type` is read by which declarative file.

    family = find_family("qwen2")

A family is one file with one `Family` and one line here; the contract tests over FAMILIES pick it up. Importing this
table imports no family.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_tcod.model.families.family import Family

FAMILIES = {
    "llama": "megatron_tcod.model.families.llama:LLAMA",
    "qwen2": "megatron_tcod.model.families.qwen2:QWEN2",
    "qwen3": "megatron_tcod.model.families.qwen3:QWEN3",
}


def find_family(model_type: str) -> Family:
    """The family of a config.json `model_type`; ValueError lists the known ones."""
    if model_type not in FAMILIES:
        raise ValueError(
            f"model_type {model_type!r} has no family here, expected one of {sorted(FAMILIES)}; "
            "use such a checkpoint, or add a file under model/families and a line to FAMILIES"
        )
    module, attribute = FAMILIES[model_type].split(":")
    return getattr(importlib.import_module(module), attribute)
