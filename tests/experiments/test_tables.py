"""Rows of runs, statistics over seeds, and tables."""

import math

import pytest
from conftest import row

from fgbg_kd.experiments.method_specs import name_of
from fgbg_kd.experiments.paired_statistics import mean_interval, paired_difference
from fgbg_kd.experiments.result_rows import add_result, group, reference
from fgbg_kd.experiments.tables import (
    comparison_tables,
    fill,
    plot,
    without_folders,
)
from fgbg_kd.utils.errors import RunError
from fgbg_kd.utils.files import read_rows
from fgbg_kd.utils.markdown import markdown_table


def cells(markdown: str) -> list[list[str]]:
    """The cells of all table rows in a text."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def aps(methods: dict) -> dict:
    return {name: {s: r["AP"] for s, r in by_seed.items()} for name, by_seed in methods.items()}


def test_an_interval_is_that_of_students_t():
    mean, half = mean_interval([1.0, 2.0, 3.0])  # standard deviation 1, 2 degrees of freedom
    assert mean == 2 and half == pytest.approx(4.303 / math.sqrt(3))
    assert mean_interval([5.0]) == (5.0, None)
    assert mean_interval([0.0, 1.0] * 50)[1] == pytest.approx(2.042 * 0.5025 / 10, rel=1e-3)


def test_differences_are_paired_by_seed():
    a, b = {0: 10.0, 1: 20.0, 2: 99.0}, {0: 9.0, 1: 17.0, 3: 0.0}
    mean, half = paired_difference(a, b)  # of seeds 0 and 1
    assert mean == 2 and half == pytest.approx(12.706 * math.sqrt(2) / math.sqrt(2))
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_a_table_of_any_rows_keeps_its_cells():
    text = markdown_table(["name", "AP"], [["a", 1.50], ["longer name", "–"]])
    head, _, *rows = cells(text)
    assert head == ["name", "AP"] and rows == [["a", "1.5"], ["longer name", "–"]]
    assert len({len(line) for line in text.splitlines()}) == 1  # aligned


def test_rows_are_grouped_by_comparison_method_and_seed_and_the_later_row_counts():
    rows = [
        row("FgBg", 2, 1.0, options={"gate": True, "bg_weight": 1.0}),
        row("FgBg", 0, 2.0, options={"gate": True}),
        row("FgBg GATE=True", 0, 3.0, options={"gate": True}),
        row("PKD MODEL.KD.PKD.WEIGHT=2 SOLVER.MAX_ITER=9", 0, 5.0, options={"weight": 2.0}),
        row("FgBg MODEL.KD.FGBG.BG_WEIGHT=2", 0, 7.0, options={"bg_weight": 2.0}),
        row("FgBg", 0, 6.0, overrides=["SEED", "1"]),
    ]
    groups = group(rows)
    assert list(groups) == ["c.yaml", "c.yaml SEED 1"]
    assert aps(groups["c.yaml"]) == {
        "FgBg": {0: 3.0, 2: 1.0},
        "FgBg BG_WEIGHT=2": {0: 7.0},
        "PKD WEIGHT=2 SOLVER.MAX_ITER=9": {0: 5.0},
    }


def test_a_row_keeps_its_meaning_when_a_default_changes():
    typed_without_options = row("FgBg", 0, 4.0, options={"gate": False, "bg_weight": 3.0})
    assert name_of(typed_without_options) == "FgBg GATE=False BG_WEIGHT=3"


def test_a_table_begins_with_teacher_plain_and_fgbg_and_then_has_the_best_peer():
    rows = [row("PKD", 0, 5.0), row("FgBg GATE=False", 0, 7.0, options={"gate": False})]
    rows += [row("MGD WEIGHT=1", 0, 6.0, options={"weight": 1.0}), row("plain", 0, 1.0)]
    rows += [row("FgBg", 0, 2.0), row("teacher", None, 9.0), row("MGD", 0, 3.0)]
    order = ["teacher", "plain", "FgBg", "FgBg GATE=False", "MGD", "MGD WEIGHT=1", "PKD"]
    assert list(group(rows)["c.yaml"]) == order


def test_rows_of_other_files_under_the_same_names_are_left_out():
    rows = [row("plain", seed, 10.0, task="old") for seed in range(3)]
    rows += [row("PKD", 0, 11.0, task="old"), row("plain", 0, 30.0, task="new")]
    assert aps(group(rows)["c.yaml"]) == {"plain": {0: 30.0}}


def test_a_result_is_added_once_and_keeps_its_machine_and_hour(tmp_path):
    file = tmp_path / "results.jsonl"
    first = add_result(file, row("PKD", 0, 11.0, task="a", hardware="this"))
    again = row("PKD", 0, 11.0, task="a", hardware="that", finished="later")
    assert add_result(file, again) == first and read_rows(file) == [first]
    with_errors = add_result(file, {**again, "errors": {"Cls": 1.0}})
    assert with_errors == {**first, "errors": {"Cls": 1.0}}
    assert add_result(file, again) == with_errors and read_rows(file) == [first, with_errors]
    for other in ({"seed": 1}, {"AP": 12.0}, {"commit": "y"}, {"task": "b"}):
        assert add_result(file, {**again, **other})["hardware"] == "that"
    assert len(read_rows(file)) == 6


def test_a_return_to_earlier_files_adds_the_rows_again(tmp_path):
    file = tmp_path / "results.jsonl"
    for task in ("a", "b", "a"):
        add_result(file, row("PKD", 0, 11.0, task=task))
    assert [r["task"] for r in read_rows(file)] == ["a", "b", "a"]


def test_the_summary_by_hand(tmp_path):
    rows = [row("teacher", None, 30.0)]
    for seed, (plain, fgbg, pkd) in enumerate([(10, 16, 12), (10, 18, 12), (10, 20, 12)]):
        rows += [row("plain", seed, plain), row("FgBg", seed, fgbg), row("PKD", seed, pkd)]
    methods = group(rows)["c.yaml"]
    table = cells(comparison_tables(methods))
    half = f"{4.303 * 2 / math.sqrt(3):.2f}"
    assert table[0][3:] == ["AP − plain", "FgBg − method", "gap closed"]
    assert ["teacher", "30.00", "–", "–", "–", "–"] in table
    assert ["FgBg", "18.00", "16.0, 18.0, 20.0", f"+8.00 ± {half}", "–", "40 %"] in table
    assert ["PKD", "12.00", "12.0, 12.0, 12.0", "+2.00 ± 0.00", f"+6.00 ± {half}", "10 %"] in table
    # All metrics: AP, AP50, AP75, APs, APm, APl, seconds, memory.
    assert ["FgBg", *["18.0"] * 5, "–", "0.500", "100"] in table
    plot(methods, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_without_plain_runs_the_summary_has_no_differences():
    text = comparison_tables(group([row("FgBg", 0, 20.0)])["c.yaml"], ["summary"])
    assert cells(text) == [["method", "AP", "each seed"], cells(text)[1], ["FgBg", "20.00", "–"]]


def test_without_plain_runs_fgbg_is_still_compared_with_the_others():
    rows = [row("FgBg", s, 20.0 + s) for s in range(2)] + [row("PKD", s, 18.0) for s in range(2)]
    table = cells(comparison_tables(group(rows)["c.yaml"], ["summary"]))
    assert table[0] == ["method", "AP", "each seed", "FgBg − method"]
    assert table[3] == ["PKD", "18.00", "18.0, 18.0", "+2.50 ± 6.35"]
    alone = comparison_tables(group(rows[:2])["c.yaml"])
    assert "±" not in alone  # nor is it explained


def test_the_gap_is_that_of_the_seeds_that_both_have():
    rows = [row("teacher", None, 30.0), row("FgBg", 0, 20.0)]
    rows += [row("plain", seed, ap) for seed, ap in enumerate((10.0, 20.0, 20.0))]
    table = cells(comparison_tables(group(rows)["c.yaml"]))
    assert ["FgBg", "20.00", "–", "+10.00", "–", "50 %"] in table


def test_tuning_has_one_row_a_method_with_the_best_choice_in_bold():
    rows = [row(f"PKD WEIGHT={w}", 0, ap, options={"weight": w, "x": 1}) for w, ap in
            ((10.0, 5.0), (0.5, 7.0), (2.0, 6.0))]  # fmt: skip
    rows += [row("plain", 0, 1.0), row("CWD", 0, 2.0, options={"weight": 10.0})]
    table = cells(comparison_tables(group(rows)["c.yaml"], ["tuning"]))[2:]
    assert table == [
        ["PKD", "WEIGHT=0.5: **7.0**; WEIGHT=2: 6.0; WEIGHT=10: 5.0"],
        ["CWD", "as given: **2.0**"],
    ]


def test_tuning_names_keys_that_are_no_options_of_the_method():
    rows = [row(f"PKD SOLVER.BASE_LR={x}", 0, ap, options={"weight": 2.0}) for x, ap in
            (("0.01", 5.0), ("0.02", 7.0))]  # fmt: skip
    table = cells(comparison_tables(group(rows)["c.yaml"], ["tuning"]))[2:]
    assert table == [["PKD", "SOLVER.BASE_LR=0.01: 5.0; SOLVER.BASE_LR=0.02: **7.0**"]]


def test_a_row_is_named_by_what_its_title_does_not_say():
    node = "MODEL.KD.FGBG"
    shared = {"overrides": [f"{node}.KL", "softmax", f"{node}.TEMPERATURE", "2"]}
    options = {"kl": "softmax", "temperature": 2.0, "fg_weight": 8.0}
    other = {"kl": "sigmoid", "temperature": 1.0, "fg_weight": 3.0}
    assert name_of(row("FgBg", 0, 1.0, options=options, **shared)) == "FgBg"
    typed = "FgBg FG_WEIGHT=3 KL=sigmoid TEMPERATURE=1"
    named = name_of(row(typed, 0, 1.0, options=other, **shared))
    assert named == "FgBg KL=sigmoid TEMPERATURE=1 FG_WEIGHT=3"
    weight = {"overrides": ["MODEL.KD.PKD.WEIGHT", "2"], "options": {"weight": 2.0}}
    assert name_of(row("PKD", 0, 9.0, **weight)) == "PKD"
    assert name_of(row("PKD WEIGHT=2", 0, 9.0, options={"weight": 2.0})) == "PKD WEIGHT=2"


def test_a_method_whose_module_is_not_imported_is_named_as_it_was_typed():
    assert name_of(row("Theirs WEIGHT=2", 0, 1.0, options={"weight": 2.0})) == "Theirs WEIGHT=2"


@pytest.mark.parametrize("with_variant", (False, True))
def test_others_are_compared_with_fgbg_as_the_config_makes_it(with_variant):
    rows = [row("plain", 0, 10.0), row("PKD", 0, 12.0)]
    rows += [row("FgBg", 0, 15.0, options={"fg_weight": 5.0})]
    if with_variant:
        variant = {"fg_weight": 5.0, "gate": False}
        rows.append(row("FgBg GATE=False", 0, 14.0, options=variant))
    methods = group(rows)["c.yaml"]
    assert reference(methods) == "FgBg FG_WEIGHT=5"
    table = cells(comparison_tables(methods))
    assert table[0][3:5] == ["AP − plain", "FgBg FG_WEIGHT=5 − method"]
    assert ["PKD", "12.00", "–", "+2.00", "+3.00", "–"] in table


def test_the_note_names_every_commit():
    rows = [row("plain", 0, 1.0, commit="abc"), row("plain", 1, 1.0, commit="def+")]
    rows += [row("plain", 2, 1.0, commit="abc, 123")]  # a run that was resumed with another commit
    assert "commit abc, def+, 123." in comparison_tables(group(rows)["c.yaml"])


def test_the_note_says_where_means_are_over_other_seeds_and_where_nothing_was_detected():
    rows = [row("plain", 0, 10.0), row("plain", 1, 12.0), row("FgBg", 0, 15.0)]
    seeds = "Means are over the seeds of each method, differences over the shared seeds."
    assert seeds in comparison_tables(group(rows)["c.yaml"])
    assert seeds not in comparison_tables(group(rows[::2])["c.yaml"])
    rows.append(row("PKD", 1, 0.0, detections=0))
    text = comparison_tables(group(rows)["c.yaml"])
    assert "AP 0 because nothing was detected: PKD, seed 1." in text


def test_a_title_has_no_folders_of_a_machine():
    title = (
        "/home/me/c.yaml MODEL.KD.TEACHER.WEIGHTS /home/me/t.pth DATASETS.TEST_JSON data/val.json"
    )
    named = "c.yaml MODEL.KD.TEACHER.WEIGHTS t.pth DATASETS.TEST_JSON data/val.json"
    assert without_folders(title) == named


@pytest.mark.parametrize(
    "text, message",
    [
        ("<!-- table: x -->\nold\n# heading\n<!-- table: y -->\n<!-- end of table -->", "table: x"),
        ("<!--table: x -->\n<!-- end of table -->", "does not start a table: write"),
        ("<!-- table: x sumary -->\n<!-- end of table -->", "no part sumary: choose from summary"),
    ],
)
def test_a_marker_that_is_not_complete_is_named_and_no_text_is_lost(text, message):
    with pytest.raises(RunError, match=message):
        fill(text, lambda file, parts: "new")


def test_a_document_gets_its_tables_and_keeps_the_rest():
    text = "a\n<!-- table: x -->\nold\n<!-- end of table -->\nb\n<!-- table: y note -->\nnot run\n"
    text += "<!-- end of table -->\nc\n"
    asked = []

    def tables(file, parts):
        asked.append((file, parts))
        return {"x": "| new |\n", "y": ""}[file]

    made = fill(text, tables)
    assert made == text.replace("old", "| new |\n") and fill(made, tables) == made
    assert asked[:2] == [("x", ["summary", "metrics", "errors", "note"]), ("y", ["note"])]
