"""The study by one command: `python examples/study/run.py --quick`, `--full`, or `--grid FILE`.

    bash examples/study/run.sh --full                             # from a clean clone: makes the environment first
    python examples/study/run.py --full --page docs/study.md      # and write the page of the repository
    python examples/study/run.py --full --dry-run                 # check every run's settings, say what would run
    python examples/study/run.py --grid examples/study/paper.toml --dry-run

Trains teachers, warm starts and one run a cell of the grid, in parallel, then writes OUT/results.jsonl and, from
that file alone, OUT/study.md with its figures. Interrupted in whatever way, the same command goes on: what is finished
is not run again, what was killed resumes. Exit code 1 when a run failed; the page then says which cells are missing.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from megatron_tcod.config import SGLANG, Faults, load_config, run_entry_point  # noqa: E402
from study.grid import Study, read_grid  # noqa: E402
from study.page import write_page  # noqa: E402
from study.plan import Command, Job, plan, words  # noqa: E402
from study.results import write_results  # noqa: E402
from study.runner import Runner, settings_toml  # noqa: E402

HERE = Path(__file__).parent
NAMED = {HERE / "quick.toml": "--quick", HERE / "full.toml": "--full"}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--quick", dest="grid", action="store_const", const=HERE / "quick.toml", help="minutes")
    which.add_argument("--full", dest="grid", action="store_const", const=HERE / "full.toml", help="hours")
    which.add_argument("--grid", type=Path, help="a grid file of your own")
    parser.add_argument("--out", type=Path, help="where everything goes; by default the grid's `out`")
    parser.add_argument("--jobs", type=int, help="runs at a time; by default the grid's")
    parser.add_argument("--page", type=Path, help="write the page here too, and its figures and results beside it")
    parser.add_argument("--dry-run", action="store_true", help="check and list, run nothing")
    given = parser.parse_args(argv)
    if given.jobs is not None and given.jobs < 1:
        raise ValueError(f"--jobs {given.jobs}: expected at least 1")
    return given


def say(line: str) -> None:
    print(line, flush=True)


def check_jobs(jobs: list[Job]) -> None:
    """Resolve the settings of every kind of run as its program will, before hours go into the first ones."""
    checked = set()
    for job in jobs:
        for command in job.commands:
            training = command.settings.get("training", {}) | {"save": "", "seed": 0}  # these cannot be wrong
            kind = json.dumps({**command.settings, "training": training}, sort_keys=True)
            if command.settings and kind not in checked:
                checked.add(kind)
                check_settings(job.name, command)


def show_plan(study: Study, jobs: list[Job], out: Path) -> None:
    """What there is to do, and one command line."""
    kinds = Counter("cells" if job.cell else job.name.split("/")[1] for job in jobs)
    say(f"{study.title}: {', '.join(f'{count} x {kind}' for kind, count in kinds.items())}, into {out}")
    for job in jobs:
        say(f"  {job.name}" + (f"  after {', '.join(job.needs)}" if job.needs else ""))
    last = jobs[-1].commands[0]
    named = {flag: (lambda: "MODEL") for flag in last.models}
    shown = replace(last, models=named)
    say(f"the last one: {shlex.join(words(shown, launch=study.launch, settings_path=Path('SETTINGS')))}")


def check_settings(name: str, command: Command) -> None:
    """`Faults` name the job beside what is wrong with its settings."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "settings.toml"
        path.write_text(settings_toml(command.settings), encoding="utf-8")
        try:
            load_config(["--config", str(path)])
        except ValueError as error:
            raise Faults(f"{name}: {fault.replace(str(path), 'its settings')}" for fault in Faults.of(error)) from None


def missing_models(study: Study) -> list[str]:
    """Directories of models that exist already, by the grid, and do not."""
    models = [model.model for world in study.worlds for model in (world.teacher, *world.students.values())]
    return sorted({model for model in models if model and model != SGLANG and not Path(model, "config.json").is_file()})


def main(argv: list[str]) -> int:
    given = parse(argv)
    study = read_grid(given.grid)
    out = given.out or Path(study.out)
    jobs = plan(study, given.grid, out)
    check_jobs(jobs)
    missing = missing_models(study)
    if given.dry_run:
        show_plan(study, jobs, out)
        if missing:
            say(f"not here, so not looked at: {', '.join(missing)}")
        return 0
    if missing:
        raise ValueError(f"{given.grid}: no config.json in {', '.join(missing)}; put the models there, or name others")
    num_slots = given.jobs or study.jobs
    runner = Runner(jobs, out=out, launch=study.launch, num_slots=num_slots, say=say)
    try:
        failed = runner.run()
    except KeyboardInterrupt as signal_name:
        say(f"stopped by {signal_name}; the same command goes on")
        return 130
    for name in failed:
        say(f"not done: {name}")
    which = NAMED.get(given.grid, f"--grid {given.grid}")
    found = write_results(study, jobs, out, command=f"python examples/study/run.py {which}", num_slots=num_slots)
    for page in (out / "study.md", given.page):
        if page:
            write_page(found, page)
            say(f"wrote {page}")
    return 1 if failed else 0


if __name__ == "__main__":
    run_entry_point(main)
