"""Write ALFWorld games locally, in ALFWorld's own format, where its data cannot be downloaded.

    python tools/make_alfworld_games.py --out games --train 60 --valid-seen 12 --valid-unseen 12 --seed 0

The installed `alfworld` package holds the PDDL domain, the text grammar, the goals, what can be put where, and the
floor plans of AI2-THOR's rooms with the objects in each. From these a game draws a room, fills it and asks for one of
the six families in turn. Each game folder is one that ALFWorld itself reads:

    games/train/pick_heat_then_place_in_recep-Apple-None-Shelf-12/trial_T00000003/
        game.tw-pddl        domain, grammar with the task, problem, solvable, walkthrough
        initial_state.pddl  the problem alone
        traj_data.json      task type and its parameters

As in ALFWorld `valid_unseen` uses rooms (floor plans) that `train` and `valid_seen` never use. A game is kept only
when the exploring expert (`megatron_tcod/envs/alfworld_expert.py`) has won it in the engine; its commands are the
walkthrough. Others are drawn again and counted.

It does not reproduce the published games: object positions here are drawn, there they come from the simulator, and
the task is stated by ALFWorld's templates, not by people. Figures on these games are not figures on ALFWorld.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_tcod.envs.alfworld import FAMILIES, GAME_FILE, SPLITS, ALFWorld, task_of
from megatron_tcod.envs.process import WORKERS

MAX_OF_A_KIND = 3
"""Places of one kind in a room: the kitchens' fifteen cabinets would make every search endless."""

PROCESS = {
    "pick_clean_then_place_in_recep": ("Cleanable", "SinkBasin"),
    "pick_heat_then_place_in_recep": ("Heatable", "Microwave"),
    "pick_cool_then_place_in_recep": ("Coolable", "Fridge"),
}
"""Which affordance the object needs, and which place does it."""

BASINS = {"Sink": "SinkBasin", "Bathtub": "BathtubBasin"}
LAMP = "DeskLamp"
LAMP_PLACES = ("Desk", "SideTable", "Dresser", "Shelf", "CoffeeTable", "DiningTable")
NO_PLACES = {"Sink", "Bathtub", "PaintingHanger"}
MAX_DRAWS = 50


@dataclass(frozen=True)
class Room:
    """A floor plan: places by kind, and the kinds of objects that occur in it.

    Example: `Room(12, {"Shelf": ["Shelf|+01.20|+00.50|-00.30"], ...}, ["Apple", ...])`
    """

    number: int
    places: dict[str, list[str]]
    objects: list[str]


@dataclass(frozen=True)
class Game:
    """One drawn game: the goal's parameters and where every object starts."""

    family: str
    room: Room
    object: str
    target: str
    """Kind of the target place; empty in `look_at_obj_in_light`."""
    toggle: str
    contents: dict[str, str]
    """Object to place."""

    @property
    def folder(self) -> str:
        return f"{self.family}-{self.object}-None-{self.target or self.toggle}-{self.room.number}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist yet")
    parser.add_argument("--train", type=int, default=60, help="games of each split, the six families in turn")
    parser.add_argument("--valid-seen", type=int, default=12)
    parser.add_argument("--valid-unseen", type=int, default=12)
    told = "turns; games that take the expert more are drawn again (at the usual horizon of 30 some of 50 are out of reach)"
    parser.add_argument("--max-walkthrough", type=int, default=50, help=told)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        ALFWorld.require()
        counts = {split: getattr(arguments, split) for split in SPLITS}
        make_games(arguments.out, counts, max_turns=arguments.max_walkthrough, seed=arguments.seed)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def make_games(out: Path, counts: dict[str, int], *, max_turns: int, seed: int) -> None:
    """Write the games of all splits into `out`, a new folder that appears with all of them or not at all."""
    if out.exists():
        raise ValueError(f"{out} is there already; expected a new folder: name another --out or remove it")
    staging = out.with_name(f"{out.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    for split, count in counts.items():
        num_turns, num_unfit, num_lost = [], 0, 0
        rooms = load_rooms(split)
        for index in range(count):
            rng = random.Random(f"{seed}/{split}/{index}")
            for _ in range(MAX_DRAWS):
                walkthrough = write_game(staging, split, index, rooms, rng, max_turns=max_turns)
                if walkthrough:
                    break
                num_unfit, num_lost = num_unfit + (walkthrough is None), num_lost + (walkthrough == [])
            else:
                raise ValueError(f"{MAX_DRAWS} draws gave no solvable {split} game {index}; try another --seed")
            num_turns.append(len(walkthrough))
        mean = sum(num_turns) / max(1, count)
        print(
            f"{split}: {count} games, walkthrough {mean:.1f} turns on average; of the draws {num_unfit} fitted no room and "
            f"{num_lost} were not won by the expert"
        )
    WORKERS.close()
    staging.rename(out)


def write_game(
    out: Path, split: str, index: int, rooms: list[Room], rng: random.Random, *, max_turns: int
) -> list[str] | None:
    """Draw and write one game; its walkthrough, none (and no files) when the engine does not win it. None: no room fits."""
    game = draw_game(FAMILIES[index % len(FAMILIES)], rooms, rng)
    if game is None:
        return None
    trial = f"trial_T{index:08d}"
    folder = out / split / game.folder / trial
    folder.mkdir(parents=True)
    description = describe(game, rng)
    trajectory = {
        "task_type": game.family,
        "task_id": trial,
        "pddl_params": {
            "object_target": game.object,
            "parent_target": game.target,
            "toggle_target": game.toggle,
            "mrecep_target": "",
            "object_sliced": False,
        },
        "scene": {"floor_plan": f"FloorPlan{game.room.number}", "scene_num": game.room.number},
        "turk_annotations": {"anns": [{"task_desc": description}]},
    }
    (folder / "traj_data.json").write_text(json.dumps(trajectory, indent=1))
    problem = problem_of(game)
    (folder / "initial_state.pddl").write_text(problem)
    domain, grammar = load_logic()
    data = {
        "pddl_domain": domain,
        "grammar": grammar.replace("UNKNOWN GOAL", description),
        "pddl_problem": problem,
        "solvable": None,
        "walkthrough": None,
    }
    (folder / GAME_FILE).write_text(json.dumps(data))
    walkthrough = solve(folder, out, max_turns)
    if not walkthrough:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
        return []
    (folder / GAME_FILE).write_text(json.dumps({**data, "solvable": True, "walkthrough": walkthrough}))
    return walkthrough


def solve(folder: Path, out: Path, max_turns: int) -> list[str]:
    """The exploring expert's commands, if they win the game in the engine; else nothing."""
    task = task_of((folder / GAME_FILE).relative_to(out).as_posix())
    demonstration = ALFWorld.expert(task, seed=0, root=str(out), max_turns=max_turns)
    return [turn.action for turn in demonstration.turns] if demonstration.success else []


def load_logic() -> tuple[str, str]:
    """ALFWorld's domain and grammar as its package holds them."""
    from alfworld.info import ALFRED_PDDL_PATH, ALFRED_TWL2_PATH

    return Path(ALFRED_PDDL_PATH).read_text(), Path(ALFRED_TWL2_PATH).read_text()


def load_rooms(split: str) -> list[Room]:
    """The floor plans of a split, in the order of their numbers."""
    from alfworld.gen import constants

    numbers = constants.TEST_SCENE_NUMBERS if split == "valid_unseen" else constants.TRAIN_SCENE_NUMBERS
    layouts = Path(constants.__file__).parent / "layouts"
    return [room for number in sorted(numbers) if (room := _load_room(layouts, number)) is not None]


def _load_room(layouts: Path, number: int) -> Room | None:
    from alfworld.gen import constants

    points, kinds = (layouts / f"FloorPlan{number}-{part}.json" for part in ("openable", "objects"))
    if not points.is_file() or not kinds.is_file():
        return None
    static = set(constants.STATIC_RECEPTACLES) - NO_PLACES
    places: dict[str, list[str]] = {}
    for name in sorted(json.loads(points.read_text())):
        kind = name.split("|")[0]
        if kind in BASINS:
            places.setdefault(BASINS[kind], []).append(f"{name}|{BASINS[kind]}")
        elif kind in static:
            places.setdefault(kind, []).append(name)
    present = set(json.loads(kinds.read_text()))
    for index, kind in enumerate(sorted(present & static - set(places))):
        basin = {basin: sink for sink, basin in BASINS.items()}.get(kind)
        name = f"{basin or kind}|-09.00|+00.00|+{index:02d}.00"
        places[kind] = [f"{name}|{kind}" if basin else name]
    places = {kind: sorted(names)[:MAX_OF_A_KIND] for kind, names in sorted(places.items())}
    containable = {name for kind in places for name in constants.VAL_RECEPTACLE_OBJECTS.get(kind, ())}
    lamps = {LAMP} & present
    return Room(number, places, sorted((present & containable - {"Box"}) | lamps))


def draw_game(family: str, rooms: list[Room], rng: random.Random) -> Game | None:
    """A goal that some room allows, and a filled room; None when this draw cannot be completed."""
    from alfworld.gen import constants

    scenes = {number for name in constants.GOALS_VALID[family] for number in constants.SCENE_TYPE[name]}
    affordance, appliance = PROCESS.get(family, (None, None))
    is_light = family == "look_at_obj_in_light"
    rooms = [
        room
        for room in rooms
        if room.number in scenes
        and (appliance is None or appliance in room.places)
        and (not is_light or (LAMP in room.objects and any(kind in room.places for kind in LAMP_PLACES)))
    ]
    room = choose(rng, rooms)
    objects = [
        name
        for name in room.objects
        if name != LAMP and (affordance is None or name in constants.VAL_ACTION_OBJECTS[affordance])
    ]
    targets = {
        name: [kind for kind in room.places if kind != appliance and name in _holds(kind)] for name in objects
    }
    objects = [name for name in objects if is_light or targets[name]]
    if not objects:
        return None
    name = choose(rng, objects)
    target = "" if is_light else choose(rng, targets[name])
    contents = fill_room(room, rng, goal_object=name, target=target, is_pair=family == "pick_two_obj_and_place")
    if contents is None:
        return None
    return Game(family, room, name, target, LAMP if is_light else "", contents)


def fill_room(
    room: Room, rng: random.Random, *, goal_object: str, target: str, is_pair: bool
) -> dict[str, str] | None:
    """A place for one or two objects of every kind; none of the goal's kind on the target. None: it fits nowhere."""
    contents: dict[str, str] = {}
    for kind in room.objects:
        if kind == LAMP:
            allowed = [place for place in LAMP_PLACES if place in room.places]
        else:
            allowed = [place for place in room.places if kind in _holds(place)]
        if kind == goal_object:
            allowed = [place for place in allowed if place != target]
        spots = [spot for place in allowed for spot in room.places[place]]
        count = 1 if kind == LAMP else 2 if kind == goal_object and is_pair else 1 + int(rng.random() < 0.3)
        if not spots and kind == goal_object:
            return None
        for number in range(count if spots else 0):
            contents[f"{kind}|+{number:02d}.00|+00.90|-{len(contents):02d}.00"] = choose(rng, spots)
    return contents


def describe(game: Game, rng: random.Random) -> str:
    """The task in one of ALFWorld's own templates."""
    from alfworld.gen import goal_library

    template = choose(rng, goal_library.gdict[game.family]["templates"])
    return template.format(
        obj=game.object.lower(), recep=game.target.lower(), toggle=game.toggle.lower(), mrecep=""
    )


def problem_of(game: Game) -> str:
    """The PDDL problem: everything in the room, where it is, what can be done to it, and the goal."""
    from alfworld.gen import constants, goal_library

    room = game.room
    place_kinds = {name: kind for kind, names in room.places.items() for name in names}
    object_kinds = {name: name.split("|")[0] for name in game.contents}
    location = {name: f"loc|{index}|0|0|0" for index, name in enumerate(place_kinds, start=1)}
    start = "loc|0|0|0|0"
    otypes = sorted({*object_kinds.values(), "Knife", "ButterKnife"})
    rtypes = sorted({*place_kinds.values(), "SinkBasin", "Microwave", "Fridge"})
    lines = ["(define (problem plan_0)", "(:domain alfred)", "(:objects"]
    lines += ["agent1 # agent", *(f"{name} # object" for name in object_kinds)]
    lines += [f"{kind}Type # otype" for kind in otypes] + [f"{kind}Type # rtype" for kind in rtypes]
    lines += [f"{name} # receptacle" for name in place_kinds]
    lines += [f"{name} # location" for name in (start, *location.values())]
    lines += [")", "(:init", f"(atLocation agent1 {start})"]
    for name, kind in place_kinds.items():
        lines += [f"(receptacleType {name} {kind}Type)", f"(receptacleAtLocation {name} {location[name]})"]
        if kind in constants.OPENABLE_CLASS_SET:
            lines.append(f"(openable {name})")
    for name, kind in object_kinds.items():
        place = game.contents[name]
        lines += [f"(objectType {name} {kind}Type)", f"(inReceptacle {name} {place})"]
        lines.append(f"(objectAtLocation {name} {location[place]})")
        lines += [f"({label.lower()} {name})" for label in _affordances(kind)]
        if kind in constants.MOVABLE_RECEPTACLES_SET:
            lines.append(f"(isReceptacleObject {name})")
    lines += [
        f"(canContain {place}Type {kind}Type)"
        for place in sorted(set(place_kinds.values()))
        for kind in sorted(set(object_kinds.values()) & _holds(place))
    ]
    goal = goal_library.gdict[game.family]["pddl"].format(obj=game.object, recep=game.target, toggle=game.toggle)
    return escape("\n".join([*lines, ")"]) + goal)


def _affordances(kind: str) -> Iterable[str]:
    from alfworld.gen import constants

    if kind != LAMP:
        yield "pickupable"
    yield from sorted(label for label, kinds in constants.VAL_ACTION_OBJECTS.items() if kind in kinds)


def _holds(place: str) -> set[str]:
    """The kinds of objects that a kind of place can hold."""
    from alfworld.gen import constants

    return set(constants.VAL_RECEPTACLE_OBJECTS.get(place, ())) - {LAMP}


def escape(pddl: str) -> str:
    """ALFWorld's spelling of the simulator's names: `|` is `_bar_` and so on; `#` stands for the type's hyphen."""
    for character, spelling in (
        ("-", "_minus_"),
        ("#", "-"),
        ("|", "_bar_"),
        ("+", "_plus_"),
        (".", "_dot_"),
        (",", "_comma_"),
    ):
        pddl = pddl.replace(character, spelling)
    return pddl


def choose(rng: random.Random, items: list) -> object:
    """One item, through `random()`: the one draw that Python keeps stable over its versions."""
    return items[int(rng.random() * len(items))]


if __name__ == "__main__":
    main()
