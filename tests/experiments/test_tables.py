"""Comparisons: what a method's name means, the arithmetic of the table, and the tool itself."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import row, tiny_cfg
from detectron2.structures import Boxes, Instances

from fgbg_kd.data import register_datasets
from fgbg_kd.engine import FgBgTrainer, load_lazy_config, read_config
from fgbg_kd.experiments.settings import task_of
from fgbg_kd.experiments.tables import (
    as_recorded,
    fill,
    group,
    heading,
    interval,
    is_kept,
    markdown,
    method_overrides,
    paired,
    plot,
)
from fgbg_kd.experiments.teacher_runs import teacher_evaluation, train_or_find_teacher
from fgbg_kd.utils.config_files import merge_overrides
from fgbg_kd.utils.errors import RunError
from fgbg_kd.utils.files import read_rows


@pytest.fixture
def compare_tool(monkeypatch):
    import compare

    return compare


@pytest.mark.parametrize(
    "spec, expected",
    [
        ("plain", ["MODEL.META_ARCHITECTURE", "RetinaNet"]),
        ("PKD WEIGHT=2", ["MODEL.KD.PKD.WEIGHT", "2"]),
        ("PKD WARMUP_ITERS=5", ["MODEL.KD.WARMUP_ITERS", "5"]),
        ("FgBg GATE=off BG_WEIGHT=0", ["MODEL.KD.GATE", "off", "MODEL.KD.BG_WEIGHT", "0"]),
        ("FgBg SOLVER.BASE_LR=1", ["SOLVER.BASE_LR", "1"]),
        ("plain SOLVER.MAX_ITER=3", ["SOLVER.MAX_ITER", "3"]),
    ],
)
def test_a_method_and_its_options_become_overrides(distil_cfg, spec, expected):
    overrides = method_overrides(distil_cfg, spec)
    assert overrides[-len(expected) :] == expected
    merge_overrides(distil_cfg, overrides)
    assert spec.startswith("plain") or distil_cfg.MODEL.KD.METHOD == spec.split()[0]


@pytest.mark.parametrize(
    "spec",
    ["Magic", "PKD MAGIC=1", "PKD WEIGHT", "plain WEIGHT=1", "PKD KD=1"]
    # What the run would not read, or the comparison sets itself: a row under a wrong name.
    + ["PKD GATE=off", "PKD MODEL.KD.FG_WEIGHT=9", "plain MODEL.KD.FG_WEIGHT=9", "FgBg SEED=5"]
    + ["FgBg METHOD=PKD", "FgBg TEACHER.WEIGHTS=b.pth", "plain MODEL.META_ARCHITECTURE=FCOS"],
)
def test_what_is_no_method_or_option_is_named(distil_cfg, spec):
    with pytest.raises(ValueError, match=spec.split()[-1]):
        method_overrides(distil_cfg, spec)


def test_interval_by_hand():
    mean, half = interval([1.0, 2.0, 3.0])  # sd 1; t of 2 degrees of freedom
    assert mean == 2 and half == pytest.approx(4.303 / math.sqrt(3))
    assert interval([5.0]) == (5.0, None)
    assert interval([0.0, 1.0] * 50)[1] == pytest.approx(2.042 * 0.5025 / 10, rel=1e-3)


def test_differences_are_paired_by_seed():
    a, b = {0: 10.0, 1: 20.0, 2: 99.0}, {0: 9.0, 1: 17.0, 3: 0.0}
    mean, half = paired(a, b)  # 1 and 3
    assert mean == 2 and half == pytest.approx(12.706 * math.sqrt(2) / math.sqrt(2))
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_the_footnote_names_every_commit():
    rows = [row("plain", 0, 1.0, commit="abc"), row("plain", 1, 1.0, commit="def+")]
    rows += [row("plain", 2, 1.0, commit="abc, 123")]  # resumed under another
    assert "commit abc, def+, 123." in markdown(group(rows)["c.yaml"])


def test_of_two_rows_the_later_counts_and_a_row_keeps_its_meaning_when_a_default_changes():
    rows = [
        row("FgBg", 2, 1.0, "2026-01-01", {"gate": "cell", "bg_weight": 1.0}),
        row("FgBg", 0, 2.0, "2026-01-01", {"gate": "cell"}),
        row("FgBg GATE=cell", 0, 3.0, "2026-01-02", {"gate": "cell"}),
        row("FgBg", 0, 4.0, "2026-01-01", {"gate": "off", "bg_weight": 3.0}),
        row("PKD MODEL.KD.PKD.WEIGHT=2 SOLVER.MAX_ITER=9", 0, 5.0, options={"weight": 2.0}),
        row("FgBg MODEL.KD.BG_WEIGHT=2", 0, 7.0, options={"bg_weight": 2.0}),
        row("FgBg", 0, 6.0, "2026-01-03", overrides=["SEED", "1"]),
    ]
    groups = group(rows)
    assert list(groups["c.yaml"])[-1].startswith("PKD")  # after all variants of FgBg
    assert list(groups) == ["c.yaml", "c.yaml SEED 1"]
    assert {
        name: {s: r["AP"] for s, r in by_seed.items()} for name, by_seed in groups["c.yaml"].items()
    } == {
        "FgBg": {0: 3.0, 2: 1.0},
        "FgBg GATE=off BG_WEIGHT=3": {0: 4.0},
        "FgBg BG_WEIGHT=2": {0: 7.0},
        "PKD WEIGHT=2 SOLVER.MAX_ITER=9": {0: 5.0},
    }


def test_rows_of_other_settings_under_the_same_names_are_left_out():
    rows = [row("plain", seed, 10.0, task="old") for seed in range(3)]
    rows += [row("PKD", 0, 11.0, task="old"), row("plain", 0, 30.0, task="new")]
    rows += [row("FgBg", 0, 12.0)]  # of before rows told their task
    by_name = {n: {s: r["AP"] for s, r in x.items()} for n, x in group(rows)["c.yaml"].items()}
    assert by_name == {"plain": {0: 30.0}, "FgBg": {0: 12.0}}
    assert is_kept(rows[4], rows) and not is_kept({**rows[4], "AP": 1.0}, rows)
    assert not is_kept(rows[0], rows)  # so a return to settings of old adds it again


def test_a_run_that_the_rows_have_stays_as_it_was_recorded():
    first = row("PKD", 0, 11.0, hardware="this", errors={"Cls": 1.0})
    old = row("PKD", 0, 11.0, hardware="that")
    again = {**first, "task": "new"}
    assert as_recorded(again, [old]) == {**old, "task": "new", "errors": {"Cls": 1.0}}
    assert as_recorded({**again, "errors": None}, [old, first]) == {**first, "task": "new"}
    for other in (row("PKD", 1, 11.0), row("PKD", 0, 12.0), row("PKD", 0, 11.0, commit="y")):
        assert as_recorded(again, [other]) == again


def test_the_task_is_what_runs_share(coco, distil_cfg, tmp_path):
    weights = tmp_path / "t.pth"
    weights.write_bytes(b"1")
    task, told = task_of(distil_cfg, weights), set()
    for key, value in [("SEED", 3), ("MODEL.KD.METHOD", "PKD"), ("MODEL.KD.FG_WEIGHT", 9.0)]:
        other = distil_cfg.clone()
        other.merge_from_list([key, value])
        assert task_of(other, weights) == task
    for key, value in [("SOLVER.BASE_LR", 0.7), ("MODEL.KD.WARMUP_ITERS", 7)]:
        other = distil_cfg.clone()
        other.merge_from_list([key, value])
        told.add(task_of(other, weights))
    weights.write_bytes(b"2")
    told.add(task_of(distil_cfg, weights))
    assert len(told | {task}) == 4


def test_the_table_by_hand(tmp_path):
    rows = [row("teacher", None, 30.0)]
    for seed, (plain, ours, pkd) in enumerate([(10, 16, 12), (10, 18, 12), (10, 20, 12)]):
        rows += [row("plain", seed, plain), row("FgBg", seed, ours), row("PKD", seed, pkd)]
    methods = group(rows)["c.yaml"]
    lines = markdown(methods).splitlines()
    assert "| teacher | **30.00** | – | – | 30.0 | 30.0 | 30.0 | 30.0 | – | 0.500 | 100 |" in lines
    assert any(x.startswith("| FgBg | **18.00** | 2.00 | 16.0, 18.0, 20.0 |") for x in lines)
    half = f"{4.303 * 2 / math.sqrt(3):.2f}"
    assert f"| FgBg | +8.00 ± {half} | – | 40 % |" in lines
    assert f"| PKD | +2.00 ± 0.00 | +6.00 ± {half} | 10 % |" in lines
    plot(methods, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_the_gap_is_that_of_the_seeds_that_both_have():
    rows = [row("teacher", None, 30.0), row("FgBg", 0, 20.0)]
    rows += [row("plain", seed, ap) for seed, ap in enumerate((10.0, 20.0, 20.0))]
    assert "| FgBg | +10.00 | – | 50 % |" in markdown(group(rows)["c.yaml"])


def test_a_row_is_named_by_what_its_title_does_not_tell():
    told = {"overrides": ["MODEL.KD.GATE_QUALITY", "box", "MODEL.KD.GATE_MARGIN", "0"]}
    options = {"gate_quality": "box", "gate_margin": 0.0, "fg_weight": 8.0}
    other = {**options, "gate_quality": "score", "gate_margin": -0.2, "fg_weight": 3.0}
    rows = [
        row("FgBg", 0, 20.0, options=options, **told),
        row("FgBg FG_WEIGHT=3 GATE_QUALITY=score GATE_MARGIN=-0.2", 0, 21.0, options=other, **told),
        row("PKD WEIGHT=2", 0, 9.0, options={"weight": 2.0}, **told),
    ]
    (methods,) = group(rows).values()
    assert [*methods] == [
        "FgBg",
        "FgBg GATE_QUALITY=score GATE_MARGIN=-0.2 FG_WEIGHT=3",
        "PKD WEIGHT=2",
    ]
    weight = {"overrides": ["MODEL.KD.PKD.WEIGHT", "2"]}
    (methods,) = group([row("PKD", 0, 9.0, options={"weight": 2.0}, **weight)]).values()
    assert [*methods] == ["PKD"]


def test_a_row_of_before_the_gate_had_a_quality_is_none_of_today():
    before = [row("FgBg", 0, 20.0, options={"gate": "cell"})]
    before += [row("FgBg", 0, 10.0, options={"gate": "off"})]
    for old in before:
        del old["options"]["gate_quality"]
    (methods,) = group([*before, row("FgBg", 0, 30.0)]).values()
    assert {name: by_seed[0]["AP"] for name, by_seed in methods.items()} == {
        "FgBg GATE_QUALITY=box": 20.0,
        "FgBg": 30.0,
        "FgBg GATE=off": 10.0,
    }


def test_the_one_variant_of_ours_is_compared_when_the_config_changes_the_default():
    rows = [row("plain", 0, 10.0), row("PKD", 0, 12.0)]
    rows += [row("FgBg", 0, 15.0, options={"fg_weight": 5.0})]
    # A variant of it does not make it another.
    variant = row("FgBg GATE=off", 0, 14.0, options={"fg_weight": 5.0, "gate": "off"})
    for compared in (rows, [*rows, variant]):
        table = markdown(group(compared)["c.yaml"])
        assert "| method | AP − plain | FgBg FG_WEIGHT=5 − method |" in table
        assert "| PKD | +2.00 | +3.00 | – |" in table


def test_a_table_of_unlike_seeds_says_what_its_means_are_over():
    rows = [row("plain", 0, 10.0), row("plain", 1, 12.0), row("FgBg", 0, 15.0)]
    note = "Means are over the seeds of each method, differences over the shared ones."
    assert note in markdown(group(rows)["c.yaml"])
    assert note not in markdown(group(rows[::2])["c.yaml"])


def test_a_heading_tells_no_machines_folders():
    title = (
        "/home/me/c.yaml MODEL.KD.TEACHER.WEIGHTS /home/me/t.pth DATASETS.TEST_JSON data/val.json"
    )
    named = "c.yaml MODEL.KD.TEACHER.WEIGHTS t.pth DATASETS.TEST_JSON data/val.json"
    assert heading(title) == named


def test_a_document_gets_its_tables_and_keeps_the_rest():
    text = "a\n<!-- table: x -->\nold\n<!-- end of table -->\nb\n<!-- table: y -->\nnot run\n" + (
        "<!-- end of table -->\nc\n"
    )
    made = fill(text, {"x": "| new |\n", "y": ""}.get)
    assert made == text.replace("old", "| new |\n")
    assert fill(made, {"x": "| new |\n", "y": ""}.get) == made


def test_a_teacher_that_is_not_there_is_trained_from_its_own_config(tmp_path):
    class Trains:
        def run(self, name, config, output, opts):
            assert (config, opts) == (str(tmp_path / "teacher.yaml"), [])
            output.mkdir()
            (output / "model_final.pth").touch()

    class Cannot:
        def run(self, *_):
            raise AssertionError("it is there")

    weights = tmp_path / "teacher" / "model_final.pth"
    cfg = tiny_cfg()
    cfg.OUTPUT_DIR = str(weights.parent)
    (tmp_path / "teacher.yaml").write_text(cfg.dump())
    kd = cfg.MODEL.KD.TEACHER
    kd.CONFIG, kd.WEIGHTS = str(tmp_path / "teacher.yaml"), str(weights)
    assert train_or_find_teacher(Trains(), cfg) == weights
    assert train_or_find_teacher(Cannot(), cfg) == weights
    kd.WEIGHTS = str(tmp_path / "elsewhere.pth")
    with pytest.raises(RunError, match="elsewhere.pth: there is no such file"):
        train_or_find_teacher(Cannot(), cfg)
    kd.WEIGHTS = ""
    assert train_or_find_teacher(Cannot(), cfg) is None
    cfg.MODEL.WEIGHTS = str(weights)  # what the teacher's config names is a part of the settings
    (tmp_path / "teacher.yaml").write_text(cfg.dump())
    assert train_or_find_teacher(Cannot(), cfg) == weights
    kd.CONFIG = ""
    with pytest.raises(RunError, match="TEACHER.CONFIG is empty"):
        train_or_find_teacher(Cannot(), cfg)


def test_how_a_teacher_is_evaluated_on_the_students_test_set(coco, distil_cfg, tmp_path):
    evaluation, kd = teacher_evaluation, distil_cfg.MODEL.KD.TEACHER
    distil_cfg.DATASETS.TEST = ("tiny_evaluated",)
    register_datasets(distil_cfg)
    file, opts = evaluation(distil_cfg, Path(kd.WEIGHTS))
    assert file == kd.CONFIG
    evaluated = read_config(file, opts)
    assert evaluated.MODEL.WEIGHTS == kd.WEIGHTS
    assert evaluated.DATASETS.TEST == ("tiny_evaluated",)
    assert (evaluated.DATASETS.TEST_JSON, evaluated.DATASETS.TEST_IMAGES) == coco

    kd.CLASSES = ["stripe", "square"]
    with pytest.raises(RunError, match="2 classes are not the 2 of tiny_evaluated"):
        evaluation(distil_cfg, None)
    kd.CLASSES, kd.WEIGHTS = [], ""
    kd.CONFIG = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
    with pytest.raises(RunError, match="80 classes are not the 2 of tiny_evaluated"):
        evaluation(distil_cfg, None)

    # A set of COCO's classes: the zoo's own file and weights, and a Python config.
    distil_cfg.DATASETS.TEST_JSON, distil_cfg.DATASETS.TEST = "", ("coco_2017_val_100",)
    file, opts = evaluation(distil_cfg, None)
    assert Path(file).is_file() and read_config(file, opts).MODEL.WEIGHTS.startswith("https://")
    kd.CONFIG = str(tmp_path / "teacher.py")
    Path(kd.CONFIG).write_text(
        "from detectron2 import model_zoo\n"
        "_zoo = model_zoo.get_config('COCO-Detection/retinanet_R_50_FPN_1x.py')\n"
        "model, dataloader, train = _zoo.model, _zoo.dataloader, _zoo.train\n"
    )
    file, opts = evaluation(distil_cfg, tmp_path / "a=b.pth")
    cfg = load_lazy_config(file, [*opts, "train.output_dir='c=d e'"])
    assert cfg.dataloader.test.dataset.names == cfg.dataloader.evaluator.dataset_name
    assert cfg.dataloader.evaluator.dataset_name == "coco_2017_val_100"
    assert cfg.dataloader.evaluator.output_dir == "c=d e/inference"
    assert cfg.dataloader.evaluator.tasks == ["bbox"]
    assert cfg.train.init_checkpoint == str(tmp_path / "a=b.pth")


def test_of_a_teacher_with_masks_the_boxes_are_evaluated(distil_cfg, tmp_path):
    distil_cfg.OUTPUT_DIR = str(tmp_path)
    register_datasets(distil_cfg)
    evaluator = FgBgTrainer.build_evaluator(distil_cfg, distil_cfg.DATASETS.TEST[0])
    found = Instances((64, 80), pred_boxes=Boxes(torch.tensor([[5.0, 5.0, 30.0, 40.0]])))
    found.scores, found.pred_classes = torch.ones(1), torch.zeros(1, dtype=torch.long)
    found.pred_masks = torch.ones(1, 64, 80, dtype=torch.bool)
    evaluator.reset()
    evaluator.process([{"image_id": 1}], [{"instances": found}])
    assert list(evaluator.evaluate()) == ["bbox"]  # its set has no masks


def test_without_the_teachers_row_the_students_are_compared(
    distil_cfg, compare_tool, tmp_path, monkeypatch, capsys
):
    def run(runner, name, *_, **__):
        if name == "teacher":
            raise RunError("its last lines\nteacher: failed, see train.txt")
        return {
            k: v for k, v in row(name, 0, 1.0).items() if k.startswith(("AP", "mem", "gpu"))
        } | {"seconds_per_step": 1.0, "commit": "x"}

    monkeypatch.setattr(compare_tool.Runner, "run", run)
    (tmp_path / "c.yaml").write_text(distil_cfg.dump())
    command = ["compare.py", "--config-file", str(tmp_path / "c.yaml"), "--methods", "plain", "PKD"]
    monkeypatch.setattr(sys, "argv", [*command, "--seeds", "1", "--output", str(tmp_path / "out")])
    compare_tool.main()
    told = capsys.readouterr().out
    assert "The teacher is not evaluated: teacher: failed, see train.txt\n" in told
    assert "its last lines" not in told and "| PKD | +0.00 | – | – |" in told
    rows = read_rows(tmp_path / "out" / "results.jsonl")
    assert sorted(r["method"] for r in rows) == ["PKD", "plain"]


def test_what_would_end_in_a_meaningless_table_is_refused_before_a_run(
    coco, teacher_files, tmp_path, monkeypatch, compare_tool
):
    monkeypatch.setattr(compare_tool.Runner, "run", None)
    cfg = tiny_cfg(coco)
    cfg.MODEL.META_ARCHITECTURE = "FgBgDistiller"
    cfg.MODEL.KD.TEACHER.CONFIG, cfg.MODEL.KD.TEACHER.WEIGHTS = teacher_files
    (tmp_path / "c.yaml").write_text(cfg.dump())
    data = json.loads(Path(coco[0]).read_text())
    data["annotations"] = [{**a, "iscrowd": 1} for a in data["annotations"]]
    (tmp_path / "crowds.json").write_text(json.dumps(data))
    command = ["compare.py", "--config-file", str(tmp_path / "c.yaml"), "--methods", "plain"]
    command += ["--output", str(tmp_path / "out"), "--set"]
    for options, message in [
        (
            ["DATASETS.TEST", "('crowds',)", "DATASETS.TEST_JSON", str(tmp_path / "crowds.json")],
            "no box to be found",
        ),
        (["SEED", "3"], "--set SEED: compare.py sets it"),
    ]:
        monkeypatch.setattr(sys, "argv", [*command, *options])
        with pytest.raises(RunError, match=message):
            compare_tool.main()


def test_the_tool_trains_compares_and_does_nothing_twice(
    coco, teacher_files, tmp_path, monkeypatch, capsys, compare_tool
):
    cfg = tiny_cfg(coco)
    cfg.MODEL.META_ARCHITECTURE = "FgBgDistiller"
    cfg.MODEL.KD.TEACHER.CONFIG, cfg.MODEL.KD.TEACHER.WEIGHTS = teacher_files
    (tmp_path / "c.yaml").write_text(cfg.dump())
    monkeypatch.chdir(tmp_path)

    def tool(*arguments):
        monkeypatch.setattr(sys, "argv", ["compare.py", *arguments])
        compare_tool.main()
        return capsys.readouterr().out

    arguments = ["--config-file", "c.yaml", "--seeds", "1", "--jobs", "2", "--output", "out"]
    arguments += ["--methods", "plain", "PKD  WEIGHT=1", "--set", "SOLVER.MAX_ITER", "2"]
    text = tool(*arguments)
    results = Path("out/results.jsonl")
    rows = read_rows(results)
    assert sorted((r["method"], r["seed"]) for r in rows if r["seed"] == 0) == [
        ("PKD WEIGHT=1", 0),
        ("plain", 0),
    ]
    assert [r["method"] for r in rows if r["seed"] is None] == ["teacher"]
    pkd = next(r for r in rows if r["method"].startswith("PKD"))
    assert pkd["options"]["weight"] == 1.0 and pkd["overrides"] == ["SOLVER.MAX_ITER", "2"]
    assert pkd["memory_mb"] > 100 and pkd["threads"] and pkd["hardware"] and pkd["versions"]
    trained = yaml.safe_load(Path(pkd["folder"], "config.yaml").read_text())
    assert trained["SEED"] == 0 and trained["MODEL"]["KD"]["METHOD"] == "PKD"
    assert "| PKD WEIGHT=1 | **0" in text

    results.write_text(results.read_text() + '{"method": "torn')
    monkeypatch.setattr(compare_tool.Runner, "_follow", lambda *_: pytest.fail("it is done"))
    tool(*arguments)
    assert read_rows(results) == rows
    assert "| PKD WEIGHT=1 |" in tool("--table-only", "out/results.jsonl")
    document = Path("document.md")
    tables = "<!-- table: out/results.jsonl -->\nnot run\n<!-- end of table -->\n"
    document.write_text(tables + tables.replace("out/", "elsewhere/"))
    told = tool("--fill", "document.md")
    assert "out/results.jsonl: made anew" in told and "elsewhere/results.jsonl: no rows" in told
    assert document.read_text().count("| PKD WEIGHT=1 | **0") == 1
    assert document.read_text().endswith(tables.replace("out/", "elsewhere/"))

    pytest.importorskip("tidecv")
    assert "| dAP50 | Cls |" in tool(*arguments, "--errors")
    more = read_rows(results)
    assert len(more) == 2 * len(rows) and all(r.pop("errors") for r in more[len(rows) :])
    assert sorted(map(str, more[len(rows) :])) == sorted(map(str, rows))

    old = [{k: v for k, v in r.items() if k != "task"} for r in read_rows(results)[len(rows) :]]
    results.write_text("".join(json.dumps(r) + "\n" for r in old))  # of before rows told their task
    tool(*arguments)
    new = read_rows(results)[len(old) :]
    assert len(new) == len(old) and all(r.pop("task") == rows[0]["task"] for r in new)
    for rows in (new, old):
        rows.sort(key=lambda r: r["folder"])
    assert new == old
