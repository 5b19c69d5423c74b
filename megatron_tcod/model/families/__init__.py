"""The table of model families: which Hugging Face `model_type` is read by which declarative file.

    family = find_family("qwen2")
    kind_of("decoder.layers.3.mlp.linear_fc2.weight")      # "row", a name of LAYOUTS in rules.py

A family is one file with one `Family` and one line here; the contract tests over FAMILIES pick it up. Importing this
table imports no family.
"""

from __future__ import annotations

import functools
import importlib
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_tcod.model.families.family import Family

FAMILIES = {
    "llama": "megatron_tcod.model.families.llama:LLAMA",
    "mistral": "megatron_tcod.model.families.mistral:MISTRAL",
    "qwen2": "megatron_tcod.model.families.qwen2:QWEN2",
    "qwen3": "megatron_tcod.model.families.qwen3:QWEN3",
    "qwen3_moe": "megatron_tcod.model.families.qwen3_moe:QWEN3_MOE",
}


def find_family(model_type: str) -> Family:
    """The family of a config.json `model_type`; ValueError lists the known ones."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"model_type {model_type!r} has no family here, expected one of {sorted(FAMILIES)}; "
            "use such a checkpoint, or add a file under model/families and a line to FAMILIES (to convert only: "
            "tools/convert_checkpoint.py --bridge)"
        )
    module, attribute = FAMILIES[model_type].split(":")
    return getattr(importlib.import_module(module), attribute)


@functools.cache
def _kinds() -> dict[str, str]:
    """Megatron parameter name, every number in it a 0, -> kind, over the rules of all families."""
    kinds: dict[str, str] = {}
    for model_type in FAMILIES:
        for rule in find_family(model_type).rules:
            name = rule.megatron.format(layer=0, expert=0)
            assert kinds.setdefault(name, rule.kind) == rule.kind, f"{model_type} lays {name} out as no other family does"
    return kinds


def kind_of(parameter: str) -> str:
    """How the parameter of that Megatron name is laid out, which is the same in every family that has it."""
    kind = _kinds().get(re.sub(r"\.\d+\.", ".0.", parameter))
    assert kind is not None, f"no family has a rule for parameter {parameter}"
    return kind
