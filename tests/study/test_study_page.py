"""A results file becomes comparisons, figures and a page that say what is in it, good and bad."""

import json
import xml.etree.ElementTree as ElementTree

import pytest
from scipy import stats
from study.analysis import Results, comparisons, cost_rows, findings, first_at, method_rows, noise_rows
from study.figures import figures, ticks
from study.page import main, write_page
from study.results import read_results


def test_a_comparison_has_the_sign_of_who_is_first_and_pairs_seed_by_seed(lines):
    row = next(one for one in comparisons(Results(lines)) if one.first.curriculum == "f2b")
    assert (row.num_seeds, row.num_tasks, row.wins, row.verdict) == (3, 60, 3, "better")
    by_seed = [row.first.cells[seed]["success"] - row.second.cells[seed]["success"] for seed in (1, 2, 3)]
    assert row.mean == pytest.approx(sum(by_seed) / 3)
    assert row.interval[0] < row.mean < row.interval[1]
    only = sum(
        a != b for seed in (1, 2, 3)
        for a, b in zip(row.first.cells[seed]["solved"], row.second.cells[seed]["solved"], strict=True)
    )  # fmt: skip
    won = sum(
        a > b for seed in (1, 2, 3)
        for a, b in zip(row.first.cells[seed]["solved"], row.second.cells[seed]["solved"], strict=True)
    )  # fmt: skip
    assert row.mcnemar == pytest.approx(stats.binomtest(won, only).pvalue)


def test_correction_counts_every_comparison(lines):
    rows = comparisons(Results(lines))
    assert len(rows) == 3
    smallest = min(rows, key=lambda row: row.p)
    assert smallest.p_adjusted == pytest.approx(3 * smallest.p)
    assert all(row.p_adjusted >= row.p for row in rows)


def test_a_seed_that_one_side_lacks_is_left_out_of_the_comparison(lines):
    lines.remove(next(line for line in lines if line.get("curriculum") == "f2b" and line["seed"] == 2))
    row = next(one for one in comparisons(Results(lines)) if one.first.curriculum == "f2b")
    assert row.num_seeds == 2
    assert row.p is not None


def test_with_one_seed_nothing_is_claimed(lines):
    one_seed = [line for line in lines if line.get("seed", 1) == 1]
    rows = comparisons(Results(one_seed))
    assert {row.p for row in rows} == {None}
    assert {row.verdict for row in rows} == {"not distinguished"}


def test_cells_that_played_other_tasks_are_not_compared(lines):
    next(line for line in lines if line.get("curriculum") == "f2b")["tasks"] = "others"
    with pytest.raises(ValueError, match="different tasks"):
        comparisons(Results(lines))


def test_repeats_are_noise_and_no_data(lines):
    results = Results(lines)
    assert all(len(group.cells) == 3 for group in results.groups)
    (row,) = noise_rows(results)
    assert row.same
    lines[-1] = {**lines[-1], "solved": "0" * 60}
    assert not noise_rows(Results(lines))[0].same


def test_the_cost_of_a_success_is_that_of_the_first_point_at_or_above_it():
    points = [{"step": 0, "success": 0.1}, {"step": 20, "success": 0.6}, {"step": 40, "success": 0.5}]
    assert first_at(points, 0.5)["step"] == 20
    assert first_at(points, 0.6)["step"] == 20
    assert first_at(points, 0.61) is None


def test_a_success_that_nobody_reaches_has_no_cost(lines):
    rows = [row for row in cost_rows(Results(lines)) if row.target == 0.99]
    assert {(row.num_reached, len(row.costs)) for row in rows} == {(0, 0)}


def test_negative_results_are_said(lines):
    results = Results(lines)
    text = "\n".join(findings(results, comparisons(results)))
    assert "`b2f` against `full`: better in 0, worse in 1" in text
    assert "`b2f-reverse_kl` (household, small) ends below its start in 3 of 3 seeds" in text


def test_intervals_of_methods_hold_their_mean(lines):
    for row in method_rows(Results(lines)):
        assert row.interval[0] <= row.success <= row.interval[1]


def test_figures_are_sound_xml_without_scripts_or_links(lines):
    results = Results(lines)
    made = figures(results, comparisons(results))
    assert set(made) == {"success-by-step-household", "success-by-cpu-household", "kl-household-small", "differences"}
    for svg in made.values():
        kinds = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(svg).iter()}
        assert kinds <= {"svg", "rect", "text", "polyline", "circle"}
        assert "nan" not in svg and "inf" not in svg


def test_a_turn_that_nobody_trained_stays_white(lines):
    results = Results(lines)
    svg = figures(results, [])["kl-household-small"]
    rectangles = [one for one in ElementTree.fromstring(svg).iter() if one.tag.endswith("rect")]
    drawn = [one for one in rectangles if one.get("width") == "125.00"]
    assert len(drawn) == 3 * 3, "three panels of two turns and two bins, one cell of each untrained"


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0.073), (-12.0, 12.0), (0, 48), (0, 3e5)])
def test_axes_have_few_round_ticks_within_the_range(low, high):
    found = ticks(low, high)
    assert 3 <= len(found) <= 8
    assert all(low <= tick <= high for tick in found)


def test_the_page_follows_from_the_file_alone(results_path, tmp_path):
    main([str(results_path), "--output", str(tmp_path / "a" / "study.md")])
    first = (tmp_path / "a" / "study.md").read_text()
    write_page(tmp_path / "a" / "study" / "results.jsonl", tmp_path / "b" / "study.md")
    assert (tmp_path / "b" / "study.md").read_text() == first
    main([str(tmp_path / "a" / "study" / "results.jsonl"), "--output", str(tmp_path / "a" / "study.md")])  # as the page says
    assert (tmp_path / "a" / "study.md").read_text() == first
    assert "12 of 12 runs" in first and "not finished" not in first
    for name in ("differences.svg", "kl-household-small.svg", "results.jsonl"):
        assert f"](study/{name})" in first
        assert (tmp_path / "a" / "study" / name).is_file()
    assert "3 comparisons were planned" in first and "corrected for the 3 tests" in first


def test_a_method_that_takes_other_steps_is_named(lines, results_path, tmp_path):
    write_page(results_path, tmp_path / "study.md")
    assert "* 40 steps of 16 episodes" in (tmp_path / "study.md").read_text()
    for line in lines:
        if line.get("curriculum") == "sft":
            line["points"][-1]["step"] = 80
    results_path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_page(results_path, tmp_path / "study.md")
    assert "* 40 (sft 80) steps of 16 episodes" in (tmp_path / "study.md").read_text()


def test_an_unfinished_study_says_so(lines, tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines if line.get("curriculum") != "f2b"))
    write_page(path, tmp_path / "study.md")
    assert "9 of 12 runs are in it. **It is not finished.**" in (tmp_path / "study.md").read_text()


def test_a_page_of_a_study_without_any_cell_is_written(lines, tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[:2]))
    write_page(path, tmp_path / "study.md")
    assert "Nothing yet" in (tmp_path / "study.md").read_text()


def test_files_of_others_beside_the_page_stay(lines, tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "thesis.txt").write_text("mine")
    write_page(path, tmp_path / "study.md")
    assert (tmp_path / "study" / "thesis.txt").read_text() == "mine" and (tmp_path / "study" / "results.jsonl").exists()
    for name in ("study", "page.txt"):
        with pytest.raises(ValueError, match=r"expected the name of a file that ends in \.md"):
            write_page(path, tmp_path / name)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"repeat": 0', '"repeat": null', ":.*expected repeat of type int, got None"),
        ('"num_cells": ', '"cells": ', ":.*expected num_cells of type int, got None"),
        ('"settings": {', '"set": {', ":.*expected settings of type dict, got None"),
        ('"seed": 1', '"seed": "1"', ":.*expected seed of type int, got '1'"),
        ('"points": [', '"points": 3, "": [', ":.*expected points of type list, got 3"),
        ('"kind": "cell"', '"kind": "cel"', r":.*expected a JSON object with a kind \(study, world, start, cell\)"),
    ],
)
def test_a_line_that_nothing_can_be_made_of_is_named(lines, tmp_path, old, new, said):
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines).replace(old, new, 1))
    with pytest.raises(ValueError, match=rf"results.jsonl:\d+{said}"):
        read_results(path)


@pytest.mark.parametrize("text", ["", "no json\n", '{"kind": "cell"}\n', "[1]\n"])
def test_a_file_that_is_no_results_is_refused(text, tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match="results.jsonl"):
        read_results(path)
