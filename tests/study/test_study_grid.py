"""A grid file becomes the cells that it promises, each with settings that training accepts."""

import importlib.util
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
from study.grid import read_grid
from study.plan import fingerprints, plan, words
from study.run import main
from study.runner import settings_toml

from megatron_tcod.config import Faults, load_config
from megatron_tcod.serving import is_teacher_served

STUDY = Path(__file__).parents[2] / "examples" / "study"
SHIPPED = sorted(path.stem for path in STUDY.glob("*.toml"))

SHAPE = "shape = { hidden_size = 8, num_hidden_layers = 1, intermediate_size = 8, num_attention_heads = 1 }"
SMALL = f"""
[study]
title = "t"
out = "o"
seeds = [1]
[[world]]
name = "household"
corpus = {{ tasks = 4 }}
[world.teacher]
{SHAPE}
[world.students.small]
{SHAPE}
"""


def write(tmp_path, text, name="grid.toml"):
    (tmp_path / name).write_text(text)
    return tmp_path / name


def resolved(command, tmp_path):
    path = tmp_path / "settings.toml"
    path.write_text(settings_toml(command.settings))
    return load_config(["--config", str(path)])


def test_the_full_grid_is_every_method_at_every_size_and_seed():
    study = read_grid(STUDY / "full.toml")
    cells = [cell for cell in study.cells() if not cell.repeat]
    household = Counter(cell.method for cell in cells if cell.world == "household")
    kinds = [f"{curriculum}-{one}" for one in study.objectives for curriculum in ("full", "f2b", "b2f")]
    assert household == {name: 2 * 5 for name in ["sft", *kinds]}
    assert len(study.seeds) >= 5 and set(study.objectives) == {"sampled_token", "reverse_kl", "forward_kl"}
    assert len({cell.name for cell in study.cells()}) == len(study.cells())


def test_seeds_come_one_after_the_other():
    seeds = [cell.seed for cell in read_grid(STUDY / "full.toml").cells() if not cell.repeat]
    assert seeds == sorted(seeds)


def test_the_quick_grid_is_a_part_of_the_full_one():
    full, quick = (read_grid(STUDY / f"{name}.toml") for name in ("full", "quick"))
    assert {cell.name for cell in quick.cells() if not cell.repeat} <= {cell.name for cell in full.cells()}
    assert quick.world("household").teacher == full.world("household").teacher


@pytest.mark.parametrize("name", SHIPPED)
def test_every_run_of_a_shipped_grid_has_sound_settings(name, capsys):
    main(["--grid", str(STUDY / f"{name}.toml"), "--dry-run"])
    assert "train" in capsys.readouterr().out


def test_each_cell_says_its_method_to_training(tmp_path):
    study = read_grid(STUDY / "full.toml")
    for job in plan(study, STUDY / "full.toml", tmp_path / "out"):
        if job.cell is None or job.cell.seed != 1:
            continue
        config = resolved(job.commands[0], tmp_path)
        assert config.objective.objective == job.cell.objective
        assert config.curriculum.curriculum == ("full" if job.cell.curriculum == "sft" else job.cell.curriculum)
        assert bool(config.curriculum.demonstrations) == (job.cell.curriculum in ("sft", "b2f"))
        assert config.training.seed == job.cell.seed
        assert config.training.save.endswith(job.cell.name.partition("/")[2])


def test_methods_of_a_seed_differ_in_their_method_alone(tmp_path):
    jobs = plan(read_grid(STUDY / "full.toml"), STUDY / "full.toml", tmp_path / "out")
    own = [job for job in jobs if job.cell and (job.cell.world, job.cell.size, job.cell.seed) == ("household", "small", 2)]
    seen = set()
    for job in own:
        settings = {part: dict(table) for part, table in job.commands[0].settings.items()}
        del settings["objective"]["objective"], settings["training"]["save"]
        del settings["curriculum"]["curriculum"], settings["curriculum"]["demonstrations"]
        seen.add(str(settings))
    assert len(own) == 10 and len(seen) == 1


def test_a_job_comes_after_those_that_it_needs(tmp_path):
    for name in SHIPPED:
        path = STUDY / f"{name}.toml"
        before = set()
        for job in plan(read_grid(path), path, tmp_path):
            assert set(job.needs) <= before, job.name
            before.add(job.name)


def test_the_papers_grid_runs_existing_models_by_its_launcher(tmp_path):
    path = STUDY / "paper.toml"
    study = read_grid(path)
    jobs = plan(study, path, tmp_path)
    job = next(job for job in jobs if job.cell and job.cell.curriculum == "f2b" and job.cell.size == "qwen2.5-7b")
    line = words(job.commands[0], launch=study.launch, settings_path=tmp_path / "s.toml")
    assert line[0] == "torchrun" and line[line.index("-m") + 1] == "megatron_tcod.train"
    assert line[line.index("--student") + 1] == "models/Qwen2.5-7B-Instruct"
    assert line[line.index("--teacher") + 1] == "models/Qwen2.5-7B-Instruct-ALFWorld-RL"
    config = resolved(job.commands[0], tmp_path)
    assert (config.fidelity, config.curriculum.eta, config.training.lr, config.rollout.max_turns) == ("paper", 2, 1e-6, 30)
    assert not any(job.name.startswith("alfworld/start/") and job.name.count("/") > 2 for job in jobs), "one start a size"


def test_the_papers_other_grid_spans_the_three_benchmarks_and_scores_by_a_server(tmp_path):
    path = STUDY / "paper_qwen3.toml"
    study = read_grid(path)
    horizons, servers = {}, set()
    for job in plan(study, path, tmp_path):
        if job.cell is not None and job.cell.curriculum == "b2f":
            config = resolved(job.commands[0], tmp_path)
            horizons[config.environment.env] = (config.rollout.max_turns, config.training.train_iters)
            servers.add((config.model.student or job.cell.size, *config.sglang.sglang_urls))
            assert is_teacher_served(config) and config.sglang.teacher_top_k == 64 and config.curriculum.demonstrations
    assert horizons == {"alfworld": (30, 250), "scienceworld": (30, 250), "webshop": (15, 150)}
    assert len(servers) == 2, "a server holds one student"


def test_changing_the_teacher_changes_every_job_after_it(tmp_path):
    of = {}
    for name, width in (("a", 8), ("b", 16)):
        path = write(tmp_path, SMALL.replace("hidden_size = 8", f"hidden_size = {width}", 1))
        of[name] = fingerprints(plan(read_grid(path), path, tmp_path / "out"))
    same = {job for job in of["a"] if of["a"][job] == of["b"][job]}
    assert same == {"household/expert"}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("seeds = [1]", "sedes = [1]", "did you mean 'seeds'"),
        ("seeds = [1]", "seeds = []", "no seed"),
        ("[study]", "[studdy]", "study"),
        ("[[world]]", "[world]", "unknown key|at least one"),
        ("seeds = [1]", 'seeds = [1]\ncurricula = ["b2ff"]', "did you mean 'b2f'"),
        ("seeds = [1]", 'seeds = [1]\nobjectives = ["reverse_k"]', "did you mean 'reverse_kl'"),
        ("seeds = [1]", 'seeds = [1]\ncurricula = ["sft"]', "add full"),
        ("corpus = { tasks = 4 }", 'sizes = ["smal"]', "did you mean 'small'"),
        (f"[world.teacher]\n{SHAPE}", "[world.teacher]", "shape and model"),
        ("[study]", "study", "not TOML"),
        ('out = "o"', 'out = "o"\nbase = "full.toml"', "full.toml"),
        ('out = "o"', 'out = "o"\nbase = 5', "base must be the name of a grid file, got 5"),
        ('out = "o"', "out = 7", "out: .*string, got 7"),
        ('title = "t"', "", "title"),
        ("seeds = [1]", "seeds = [-1]", "seeds.0: .*greater than or equal to 1, got -1"),
        ("seeds = [1]", "seeds = [1, 1]", "seeds of world household names one twice"),
        ("seeds = [1]", "seeds = [1]\nobjectives = []", "has no objective; add one of"),
        ('name = "household"', 'name = "../../w"', "name: .*pattern.*got '../../w'"),
        ('name = "household"', 'name = ["w"]', r"a \[\[world\]\] needs a name, got"),
        ("[world.students.small]", "[world.students.teacher]", "is called teacher"),
        ('[world.students.small]', '[world.students."../x"]', "students.*pattern.*got '../x'"),
        ("{ tasks = 4 }", '{ tasks = 4 }\nsettings = { training = "x" }', "settings.training: .*dictionary, got 'x'"),
        ('out = "o"', 'out = "o"\nbase = "grid.toml"', "comes back to this file"),
        ("seeds = [1]", 'seeds = "abc"', "seeds: .*tuple, got 'abc'"),
        ("seeds = [1]", "seeds = [1.5]", "seeds.0: .*integer, got 1.5"),
        ("seeds = [1]", "seeds = 3", "seeds: .*tuple, got 3"),
        ("seeds = [1]", "seeds = [1]\nnum_repeats = -2", "num_repeats: .*greater than or equal to 0, got -2"),
        ("seeds = [1]", "seeds = [1]\njobs = 0", "jobs: .*greater than or equal to 1, got 0"),
        ("seeds = [1]", 'seeds = [1]\nlaunch = "torchrun"', "launch: .*tuple, got 'torchrun'"),
        ("seeds = [1]", 'seeds = [1]\nobjectives = "reverse_kl"', "objectives: .*tuple, got 'reverse_kl'"),
        ("seeds = [1]", "seeds = [1]\nsuccess_targets = [40.0]", "success_targets.0: .*less than or equal to 1"),
        ("corpus = { tasks = 4 }", "", "made from a shape, .* give corpus = { tasks = N }"),
        ("{ tasks = 4 }", "5", "corpus: .*got 5"),
        ("{ tasks = 4 }", "{ taks = 4 }", "corpus.tasks: Field required|corpus.taks: Extra"),
        ("{ tasks = 4 }", "{ tasks = 4 }\ngames = { tarin = 4 }", "games.tarin: Extra inputs are not permitted"),
        ("{ tasks = 4 }", "{ tasks = 4 }\nof_curriculum = { f2 = {} }", "'f2' in world household; did you mean 'f2b'"),
        ("{ tasks = 4 }", "{ tasks = 4 }\nsettings = 5", "settings: .*dictionary, got 5"),
        (f"[world.students.small]\n{SHAPE}", "[world.students]\nsmall = 3", "student small must be a table, got 3"),
        ("hidden_size = 8", "hidden_sise = 8", "shape.hidden_size: Field required"),
    ],
)
def test_a_mistake_in_a_grid_file_is_one_message(tmp_path, old, new, said):
    assert old in SMALL
    with pytest.raises(ValueError) as caught:
        read_grid(write(tmp_path, SMALL.replace(old, new, 1)))
    assert any(re.search(said, fault) and "\n" not in fault for fault in Faults.of(caught.value))


def test_a_wrong_training_setting_names_its_run(tmp_path):
    unknown = "[world.settings.training]\nsede = 1\n[world.settings.rollout]\nmax_truns = 1\n"
    path = write(tmp_path, SMALL + unknown)
    with pytest.raises(Faults) as caught:
        main(["--grid", str(path), "--dry-run"])
    assert [fault.partition(";")[0] for fault in caught.value.faults] == [
        f"household/teacher: its settings: unknown key {key!r} in [{part}]"
        for part, key in (("training", "sede"), ("rollout", "max_truns"))
    ]
    path = write(tmp_path, SMALL + "[world.settings.training]\nlr = -1.0\n")
    with pytest.raises(Faults, match=r"household/teacher: its settings: \[training\] lr"):
        main(["--grid", str(path), "--dry-run"])


def test_models_that_are_not_there_are_named_before_anything_runs(tmp_path, capsys):
    assert main(["--grid", str(STUDY / "paper.toml"), "--dry-run"]) == 0
    assert "not here, so not looked at: models/Qwen2.5-3B-Instruct, " in capsys.readouterr().out
    with pytest.raises(ValueError, match="no config.json in models/Qwen2.5-3B-Instruct, "):
        main(["--grid", str(STUDY / "paper.toml"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_world_that_the_base_lacks_is_refused(tmp_path):
    write(tmp_path, SMALL, "below.toml")
    path = write(tmp_path, '[study]\nbase = "below.toml"\n[[world]]\nname = "household2"\n')
    with pytest.raises(ValueError, match="not in the base file; it has household"):
        read_grid(path)


def test_scripts_of_the_study_say_how_they_are_called():
    for name in ("run", "page", "record_expert", "make_models"):
        spec = importlib.util.spec_from_file_location(f"checked_{name}", STUDY / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert f"examples/study/{name}.py" in module.__doc__
    assert sys.modules["study"].__doc__
