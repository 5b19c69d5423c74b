"""Environments: the table of names, and the contract in `base`."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from megatron_tcod.envs.base import EnvironmentFamily

ENVS = {
    "household": "megatron_tcod.envs.household:Household",
    "alfworld": "megatron_tcod.envs.alfworld:ALFWorld",
    "scienceworld": "megatron_tcod.envs.scienceworld:ScienceWorld",
    "webshop": "megatron_tcod.envs.webshop:WebShop",
    "remote": "megatron_tcod.envs.remote:Remote",
}


def load_env(name: str) -> type[EnvironmentFamily]:
    """The environment class behind a name of ENVS; ValueError suggests the nearest name."""
    if name not in ENVS:
        near = difflib.get_close_matches(name, ENVS, 1)
        raise ValueError(f"env {name!r} is unknown; did you mean {near[0] if near else sorted(ENVS)}?")
    module, _, attribute = ENVS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def check_env_options(name: str, options: Mapping[str, Any]) -> None:
    """ValueError for an option that the family does not take; it suggests the nearest one."""
    parameters = inspect.signature(load_env(name).tasks).parameters
    known = sorted(set(parameters) - {"split", "count", "first"})
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, 1)
            raise ValueError(f"env {name} has no option {option!r}; did you mean {near[0] if near else known}?")
