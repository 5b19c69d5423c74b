import io
import math
import re

import pytest

from megatron_tcod.console import ConsoleWriter, clock, sparkline


def record(step, **changes):
    return {
        "step": step,
        "curriculum/k": 3.0,
        "train/loss": 0.7,
        "rollout/success": 0.125,
        "kl/token": 0.53211,
        "kl/trajectory": 14.2,
        "tokens/per_second": 1813.4,
        "seconds/step": 2.0,
    } | changes


def test_a_file_gets_one_aligned_line_a_step():
    file = io.StringIO()
    with ConsoleWriter(total_steps=100, file=file) as console:
        for step in range(1, 4):
            console.write(record(step))
    lines = file.getvalue().splitlines()
    assert lines[0].split() == ["step", "k", "loss", "success", "KL", "traj", "KL", "tok/s", "s/step", "ETA"]
    assert lines[1].split() == ["1", "3", "0.7000", "12.5%", "0.5321", "14.20", "1,813", "2.00", "03:18"]
    assert [line.split()[0] for line in lines[1:]] == ["1", "2", "3"]
    assert len({len(line) for line in lines}) == 1
    assert "\x1b" not in file.getvalue()


def test_an_interval_leaves_rows_out_but_neither_the_first_nor_the_last():
    file = io.StringIO()
    with ConsoleWriter(total_steps=12, interval=5, file=file) as console:
        for step in range(1, 13):
            console.write(record(step))
    assert [line.split()[0] for line in file.getvalue().splitlines()[1:]] == ["1", "5", "10", "12"]


def test_the_header_comes_again_on_a_long_run():
    file = io.StringIO()
    with ConsoleWriter(total_steps=60, file=file) as console:
        for step in range(1, 61):
            console.write(record(step))
    headers = [line for line in file.getvalue().splitlines() if "success" in line]
    assert len(headers) == 3
    assert len(file.getvalue().splitlines()) == 63


def test_missing_and_non_finite_figures_are_visible_and_do_not_break_the_eta():
    file = io.StringIO()
    with ConsoleWriter(total_steps=4, file=file) as console:
        console.write(record(1))
        console.write({"step": 2, "kl/token": math.nan, "seconds/step": 4.0})
        console.write({"step": 4})
    lines = file.getvalue().splitlines()
    assert lines[2].split() == ["2", "-", "-", "-", "nan", "-", "-", "4.00", "00:06"]
    assert lines[3].split() == ["4", "-", "-", "-", "-", "-", "-", "-", "00:00"]


def test_a_terminal_ends_with_the_last_steps_and_the_progress_on_screen():
    file = io.StringIO()
    console = ConsoleWriter(total_steps=40, file=file, force_live=True)
    for step in range(1, 41):
        console.write(record(step, **{"kl/trajectory": 50.0 - step}))
    console.close()
    console.close()
    last_frame = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", file.getvalue().rsplit("step", 1)[1])
    steps = [int(match) for match in re.findall(r"^\s*(\d+)\s+3 ", last_frame, re.MULTILINE)]
    assert steps == list(range(29, 41))
    assert "40/40" in last_frame
    assert "█▇" in last_frame or "██" in last_frame


@pytest.mark.parametrize(
    ("values", "expected"), [([], ""), ([1.0], "▁"), ([2.0, 2.0], "▁▁"), ([0, 1, 0.5], "▁█▅"), ([5, 4, -2], "█▇▁")]
)
def test_sparkline_spans_lowest_to_highest(values, expected):
    assert sparkline(values) == expected


@pytest.mark.parametrize(("seconds", "expected"), [(0, "00:00"), (59.6, "01:00"), (3599, "59:59"), (3661, "1:01:01")])
def test_clock(seconds, expected):
    assert clock(seconds) == expected
