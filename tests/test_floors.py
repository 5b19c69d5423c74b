"""The floors of the house: imports go down only, and each outside system has one room that knows it."""

import ast
from pathlib import Path

import megatron_tcod

ROOT = Path(megatron_tcod.__file__).parent
FLOORS = [
    {"trajectory", "config", "metrics", "journal", "significance", "console"},
    {"envs", "ops", "curriculum", "packing", "prefix_tree", "objective"},
    {"rollout", "model"},
    {"tcod"},
]  # everything else is an entry point above them
SIBLINGS = {("rollout", "model"), ("model", "rollout"), ("envs", "ops"), ("ops", "envs")}


def imports():
    """(file, its room, imported module) for every import of the package, nested ones included."""
    for path in sorted(ROOT.rglob("*.py")):
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                for name in node.names:
                    yield path.relative_to(ROOT), room, name.name
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path} uses a relative import"
                yield path.relative_to(ROOT), room, node.module
                if node.module == "megatron_tcod":
                    yield from ((path.relative_to(ROOT), room, f"megatron_tcod.{name.name}") for name in node.names)


def floor(room):
    return next((number for number, rooms in enumerate(FLOORS) if room in rooms), len(FLOORS))


def test_imports_go_down_only():
    for path, room, module in imports():
        parts = module.split(".")
        if parts[0] == "megatron_tcod" and len(parts) > 1 and room != "__init__":
            assert floor(parts[1]) <= floor(room), f"{path} imports {module}, which lies above it"
            assert (room, parts[1]) not in SIBLINGS, f"{path} imports its sibling {module}"


def test_megatron_is_known_below_model_only():
    for path, room, module in imports():
        if module.split(".")[0] == "megatron":
            assert room == "model", f"{path} imports {module}"
            assert module.startswith("megatron.core"), f"{path} imports {module}: only megatron.core ships everywhere"


def test_sglang_is_known_to_its_engine_only():
    assert not [str(path) for path, _, module in imports() if module.split(".")[0] == "sglang"]


def test_environments_do_not_know_torch():
    assert not [str(path) for path, room, module in imports() if room == "envs" and module.split(".")[0] == "torch"]


def test_nothing_unpickles():
    found = {str(path) for path, _, module in imports() if module.split(".")[0] in ("pickle", "dill", "cloudpickle")}
    assert found == {"model/safe_reader.py"}, "only the allowlist unpickler may know pickle"
