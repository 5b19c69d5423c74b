"""Configuration: precedence, round trip, and one message for each mistake."""

import dataclasses
import random
import subprocess
import sys

import pytest

from megatron_tcod.config import FIDELITY, PARTS, ConfigError, Faults, load_config, to_toml


def write(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text)
    return str(path)


def test_flags_override_the_file_which_overrides_the_preset_which_overrides_the_defaults(tmp_path):
    path = write(tmp_path, 'fidelity = "repo"\n[curriculum]\neta = 7\n[training]\nlr = 2e-4\nseed = 1\n')
    config = load_config(["--config", path, "--lr", "3e-4"])
    assert (config.training.lr, config.training.seed) == (3e-4, 1)
    assert config.curriculum.eta == 7
    assert config.objective.objective == "sampled_token"
    assert config.training.clip_grad == 1.0


def test_a_later_file_overrides_an_earlier_one_key_by_key_and_is_named_where_it_is_wrong(tmp_path):
    first = write(tmp_path, "[training]\nlr = 2e-4\nseed = 1\n[rollout.server]\ntp_size = 2\n")
    second = tmp_path / "machine.toml"
    second.write_text("[training]\nseed = 5\n")
    config = load_config(["--config", first, f"--config={second}", "--lr", "3e-4"])
    assert (config.training.lr, config.training.seed, config.rollout.server) == (3e-4, 5, {"tp_size": 2})
    second.write_text("[training]\nsed = 5\n")
    with pytest.raises(ConfigError, match="machine.toml: unknown key 'sed'"):
        load_config(["--config", first, "--config", str(second)])


def test_sglangs_own_flags_pass_untouched_and_read_back_equal(tmp_path):
    text = (
        "[rollout.server]\ntp_size = 2\nmax_total_tokens = 9\nmem_fraction_static = 0.6\nenable_memory_saver = true\n"
        'lora_paths = ["a", "b"]\njson_model_override_args = { x = { y = [1, 2] } }\n'
        '[sglang.teacher_server]\ndevice = "cpu"\n'
    )
    config = load_config(["--config", write(tmp_path, text), "--max-total-tokens", "77"])
    assert config.rollout.server == {
        "tp_size": 2,
        "max_total_tokens": 9,
        "mem_fraction_static": 0.6,
        "enable_memory_saver": True,
        "lora_paths": ["a", "b"],
        "json_model_override_args": {"x": {"y": [1, 2]}},
    }
    assert config.rollout.max_total_tokens == 77 and config.sglang.teacher_server == {"device": "cpu"}
    assert load_config(["--config", write(tmp_path, to_toml(config))]) == config


@pytest.mark.parametrize("name", FIDELITY)
def test_fidelity_sets_every_switch_it_lists(name):
    config = load_config(["--fidelity", name])
    for part, settings in FIDELITY[name].items():
        for key, value in settings.items():
            assert getattr(getattr(config, part), key) == value


def test_paper_and_released_code_differ_where_the_facts_say():
    paper, repo = load_config(["--fidelity", "paper"]), load_config(["--fidelity", "repo"])
    assert (paper.objective.objective, repo.objective.objective) == ("forward_kl", "sampled_token")
    assert (paper.curriculum.b2f_stop, repo.curriculum.b2f_stop) == ("demonstration", "horizon")
    assert (paper.rollout.history_mode, repo.rollout.history_mode) == ("full", "compact")
    assert (paper.objective.loss_aggregation, repo.objective.loss_aggregation) == ("sequence_sum", "token_mean")


@pytest.mark.parametrize(
    ("flag", "value", "part", "field"),
    [
        ("--opd-curriculum-variant", "f2b", "curriculum", "curriculum"),
        ("--opd-k-start", 3, "curriculum", "k_start"),
        ("--opd-eta", 5, "curriculum", "eta"),
        ("--opd-k-max", 9, "curriculum", "k_max"),
        ("--opd-b2f-trajectory-path", "d.jsonl", "curriculum", "demonstrations"),
        ("--max-tokens-per-gpu", 99, "training", "max_tokens_per_microbatch"),
        ("--hf-checkpoint", "dir", "model", "student"),
    ],
)
def test_names_of_other_frameworks_are_understood(flag, value, part, field):
    assert getattr(getattr(load_config([flag, str(value)]), part), field) == value


def test_environment_options_are_numbers_and_truths_on_the_command_line_too():
    options = load_config(["--env-options", "size", "3", "marked", "true", "root", "games/a"]).environment.env_options
    assert options == {"size": 3, "marked": True, "root": "games/a"}


def test_environment_options_on_the_command_line_come_on_top_of_those_of_a_file(tmp_path):
    path = write(tmp_path, "[environment]\nenv_options = { marked = true, size = 3 }\n")
    options = load_config(["--config", path, "--env-options", "size", "5", "rooms", "2"]).environment.env_options
    assert options == {"marked": True, "size": 5, "rooms": 2}


def test_the_resolved_configuration_reads_back_equal(tmp_path):
    config = load_config(["--fidelity", "paper", "--curriculum", "f2b", "--k-max", "12", "--env-options", "size", "3"])
    assert load_config(["--config", write(tmp_path, to_toml(config))]) == config


def test_flat_flag_names_are_unique_over_all_parts():
    names = [field.name for kind in PARTS.values() for field in dataclasses.fields(kind)]
    assert len(names) == len(set(names))


def test_every_field_is_documented():
    for kind in PARTS.values():
        for name, field in kind.__pydantic_fields__.items():
            assert field.description, f"{kind.__name__}.{name} has no docstring"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[curriculum]\neeta = 3\n", "unknown key 'eeta' in \\[curriculum\\]; did you mean 'eta'"),
        ("[curriculum]\nlr = 3\n", "'lr' in \\[curriculum\\]; it belongs under \\[training\\]"),
        ("eta = 3\n", "'eta'; it belongs under \\[curriculum\\]"),
        ("[curiculum]\neta = 3\n", "did you mean 'curriculum'"),
        ("[curriculum]\neta = 'many'\n", "\\[curriculum\\] eta: .*integer.*'many'"),
        ("[curriculum]\neta = 0\n", "eta: .*greater than or equal to 1, got 0"),
        ("curriculum = 3\n", "must be a table"),
        ("[curriculum\n", "is not TOML"),
        ("[training]\ntrain_iters = true\n", "train_iters: .*integer"),
        ('fidelity = "papper"\n', "did you mean 'paper'"),
        ("[curriculum]\ncurriculum = 'b2f'\n", "demonstrations is empty"),
    ],
)
def test_a_mistake_in_the_file_gets_one_message(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(["--config", write(tmp_path, text)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("eta = 3\nrollout = 4\n[curriculum]\neeta = 3\nlr = 3\n[traning]\nx = 1\n", "eta rollout eeta lr traning"),
        ("[curriculum]\neta = 0\nk_start = 0\n[training]\nlr = 'x'\n", "lr k_start eta"),
        ("[curriculum]\ncurriculum = 'b2f'\nk_start = 99\n[training]\nmin_lr = 1.0\n", "demonstrations k_start min_lr"),
    ],
)
def test_mistakes_of_one_kind_are_told_together(tmp_path, text, named):
    with pytest.raises(Faults) as caught:
        load_config(["--config", write(tmp_path, text)])
    for fault, name in zip(caught.value.faults, named.split(), strict=True):
        assert name in fault and "\n" not in fault


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tensor-paralel-size", "2"], "did you mean '--tensor-model-parallel-size'"),
        (["--zzzzqqq"], "unknown flag --zzzzqqq; --help lists the flags"),
        (["--eta", "x"], "--eta: invalid literal"),
        (["--eta", "0"], "--eta: Input should be greater than or equal to 1, got 0"),
        (["--curriculum", "both"], "'both'.*'full', 'f2b', 'b2f'"),
        (["--config"], "--config needs a value"),
        (["--config", "absent.toml"], "absent.toml: No such file"),
        (["--curriculum", "f2b", "--k-start", "31"], "k_start = 31 exceeds max_turns = 30: every window"),
        (["--k-max", "5", "--k-start", "6"], "k_max = 5 is below k_start = 6"),
        (["--curriculum", "f2b", "--k-max", "31"], "k_max = 31 exceeds max_turns = 30"),
        (["--objective", "sft"], "demonstrations is empty"),
        (["--fidelity", "paper", "--fidelity=repo"], "--fidelity is given twice"),
        (["--hf-checkpoint", "x", "--eta", "many"], "invalid literal for int"),
        (["--lr", "inf"], "finite"),
        (["--eps-clip-c", "1.1"], "eps_clip_c = 1.1 must exceed"),
        (["--demonstrations", "expert"], "objective = sft"),
        (["--min-lr", "1"], "min_lr = 1.0 exceeds lr"),
        (["--max-staleness", "1"], "max_staleness = 1 plays while the trainer trains.*rollout_engine = sglang"),
        (["--server", "tp_size", "2"], r"--server is no flag: give \[rollout.server\] in a file"),
        (["--teacher", "sglang"], "needs one of teacher_url .* and teacher_model"),
        (["--teacher", "sglang", "--teacher-url", "http://a:1", "--teacher-model", "m"], "give exactly one"),
        (["--teacher", "sglang", "--teacher-url", "http://a:1", "--teacher-top-k", "0"], "set objective = sampled_token"),
        (["--teacher", "sglang", "--teacher-url", "http://a:1", "--teacher-temperature", "2"], "temperature 1"),
    ],
)
def test_a_mistake_on_the_command_line_gets_one_message(argv, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(argv)
    assert "\n" not in str(caught.value)


def test_mutated_files_never_raise_anything_else(tmp_path):
    text = to_toml(load_config([]))
    rng = random.Random(0)
    refused = 0
    for _ in range(300):
        at, length = rng.randrange(len(text)), rng.randrange(1, 8)
        mutated = text[:at] + "".join(rng.choice("ab=[]'\"\n9.-{}") for _ in range(length)) + text[at + length :]
        try:
            load_config(["--config", write(tmp_path, mutated)])
        except ConfigError:
            refused += 1
    assert refused > 150


def test_reading_the_configuration_imports_neither_torch_nor_megatron():
    code = "import sys, megatron_tcod.config; sys.exit(any(m.split('.')[0] in ('torch', 'megatron') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
