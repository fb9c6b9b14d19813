"""A comparison of methods: the names of methods, refused comparisons, and the tool."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, row, tiny_cfg
from detectron2.structures import Boxes, Instances

from fgbg_kd.data import register_datasets
from fgbg_kd.engine import FgBgTrainer, load_lazy_config, read_config
from fgbg_kd.experiments.compare_methods import Comparison
from fgbg_kd.experiments.method_specs import method_overrides, one_spelling
from fgbg_kd.experiments.runner import Runner
from fgbg_kd.experiments.settings import task_of
from fgbg_kd.experiments.teacher_runs import teacher_evaluation, train_or_find_teacher
from fgbg_kd.utils.config_files import merge_overrides
from fgbg_kd.utils.errors import ConfigError, RunError
from fgbg_kd.utils.files import read_rows


def compare(monkeypatch, *arguments: str) -> None:
    """Runs tools/compare.py in this process."""
    import compare

    monkeypatch.setattr(sys, "argv", ["compare.py", *arguments])
    compare.main()


@pytest.mark.parametrize(
    "spec, expected",
    [
        ("plain", ["MODEL.META_ARCHITECTURE", "RetinaNet"]),
        ("PKD WEIGHT=2", ["MODEL.KD.PKD.WEIGHT", "2"]),
        ("PKD WARMUP_ITERS=5", ["MODEL.KD.WARMUP_ITERS", "5"]),
        (
            "FgBg GATE=False BG_WEIGHT=0",
            ["MODEL.KD.FGBG.GATE", "False", "MODEL.KD.FGBG.BG_WEIGHT", "0"],
        ),
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
    "typed, name",
    [
        ("FGD  WEIGHT=3e-3", "FGD WEIGHT=0.003"),
        ("PKD WEIGHT=20.0", "PKD WEIGHT=20"),
        ("FgBg GATE=False BG_WEIGHT=0", "FgBg GATE=False BG_WEIGHT=0"),
        ("PKD WEIGHT=1.2345678e-1", "PKD WEIGHT=0.12345678"),  # all its digits
        ("FgBg SOLVER.MAX_ITER=1000000", "FgBg SOLVER.MAX_ITER=1000000"),  # a whole number
        ("PKD WEIGHT", "PKD WEIGHT"),
    ],
)
def test_a_method_has_one_name_however_its_numbers_are_written(typed, name):
    assert one_spelling(typed) == name


@pytest.mark.parametrize(
    "spec, message",
    [
        ("Magic", "no method 'Magic': choose from plain, CWD"),
        ("PKD WEIGHT", "'WEIGHT' has no value: write WEIGHT=VALUE"),
        ("PKD MAGIC=1", "PKD does not read MAGIC: its options are .*WEIGHT"),
        ("PKD KD=1", "PKD does not read KD"),
        # The run would not read the key, so its row would have a wrong name.
        ("plain WEIGHT=1", "plain does not read WEIGHT: it has no options of its own"),
        ("PKD GATE=False", "PKD does not read GATE: its options"),
        ("PKD MODEL.KD.FGBG.FG_WEIGHT=9", "PKD does not read MODEL.KD.FGBG.FG_WEIGHT"),
        ("plain MODEL.KD.FGBG.FG_WEIGHT=9", "plain does not read"),
        # Keys that the comparison sets.
        ("FgBg SEED=5", "SEED is not an option of a method"),
        ("FgBg METHOD=PKD", "METHOD is not an option"),
        ("FgBg TEACHER.WEIGHTS=b.pth", "TEACHER.WEIGHTS is not an option"),
        ("plain MODEL.META_ARCHITECTURE=FCOS", "MODEL.META_ARCHITECTURE is not an option"),
    ],
)
def test_what_is_no_method_or_option_is_named_with_the_reason(distil_cfg, spec, message):
    with pytest.raises(ConfigError, match=message):
        method_overrides(distil_cfg, spec)


def test_the_task_is_the_settings_that_all_runs_share(coco, distil_cfg, tmp_path):
    weights = tmp_path / "t.pth"
    weights.write_bytes(b"1")
    task, others = task_of(distil_cfg, weights), set()
    for key, value in [("SEED", 3), ("MODEL.KD.METHOD", "PKD"), ("MODEL.KD.FGBG.FG_WEIGHT", 9.0)]:
        other = distil_cfg.clone()
        other.merge_from_list([key, value])
        assert task_of(other, weights) == task
    for key, value in [("SOLVER.BASE_LR", 0.7), ("MODEL.KD.WARMUP_ITERS", 7)]:
        other = distil_cfg.clone()
        other.merge_from_list([key, value])
        others.add(task_of(other, weights))
    weights.write_bytes(b"2")
    others.add(task_of(distil_cfg, weights))
    assert len(others | {task}) == 4


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
    cfg.MODEL.WEIGHTS = str(weights)  # the weights that the teacher's config names
    (tmp_path / "teacher.yaml").write_text(cfg.dump())
    assert train_or_find_teacher(Cannot(), cfg) == weights
    kd.CONFIG = ""
    with pytest.raises(RunError, match="TEACHER.CONFIG is empty"):
        train_or_find_teacher(Cannot(), cfg)


@pytest.mark.slow
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

    # A set with the classes of COCO: the file and weights of the zoo, and a Python config.
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
    assert list(evaluator.evaluate()) == ["bbox"]  # its test set has no masks


def test_a_teacher_that_cannot_be_evaluated_leaves_the_comparison_of_students(
    distil_cfg, tmp_path, monkeypatch, capsys
):
    def run(runner, name, *_, **__):
        if name == "teacher":
            raise RunError("its last lines\nteacher: failed, see train.txt")
        return {
            k: v for k, v in row(name, 0, 1.0).items() if k.startswith(("AP", "mem", "gpu"))
        } | {"seconds_per_step": 1.0, "commit": "x"}

    monkeypatch.setattr(Runner, "run", run)
    (tmp_path / "c.yaml").write_text(distil_cfg.dump())
    arguments = ["--config-file", str(tmp_path / "c.yaml"), "--methods", "plain", "PKD"]
    compare(monkeypatch, *arguments, "--seeds", "1", "--output", str(tmp_path / "out"))
    printed = capsys.readouterr().out
    assert "The teacher is not evaluated: teacher: failed, see train.txt\n" in printed
    assert "its last lines" not in printed and "| +0.00 " in printed
    rows = read_rows(tmp_path / "out" / "results.jsonl")
    assert sorted(r["method"] for r in rows) == ["PKD", "plain"]


def test_settings_that_changed_are_refused_before_any_run(distil_cfg, tmp_path, monkeypatch):
    trained = []

    def run(runner, name, config, output, *_, **__):
        trained.append(name)
        output.mkdir(parents=True, exist_ok=True)
        (output / "settings.json").write_text('{"SOLVER.BASE_LR": 0.5}')
        return {
            k: v for k, v in row(name, 0, 1.0).items() if k.startswith(("AP", "mem", "gpu"))
        } | {"seconds_per_step": 1.0, "commit": "x"}

    monkeypatch.setattr(Runner, "run", run)
    (tmp_path / "c.yaml").write_text(distil_cfg.dump())
    output = str(tmp_path / "out")
    arguments = ["--methods", "plain", "--output", output, "--config-file"]
    compare(monkeypatch, *arguments, str(tmp_path / "c.yaml"), "--seeds", "1")
    assert trained == ["teacher", "plain, seed 0"]
    table = (tmp_path / "out" / "results.md").read_text()
    with pytest.raises(RunError, match="holds a run of other settings: .*SOLVER.BASE_LR was 0.5"):
        compare(monkeypatch, *arguments, str(tmp_path / "c.yaml"), "--seeds", "3")
    assert len(trained) == 2 and (tmp_path / "out" / "results.md").read_text() == table


def test_a_config_has_one_name_however_its_path_is_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    typed = ("d.yaml", "./d.yaml", str(tmp_path / "d.yaml"), "a/../d.yaml")
    names = {Comparison(path, [], tmp_path).config for path in typed}
    assert names == {"d.yaml"}
    elsewhere = {Comparison(path, [], tmp_path).config for path in ("../e.yaml", "/e.yaml")}
    assert elsewhere == {str(tmp_path.parent / "e.yaml"), "/e.yaml"}


def test_a_comparison_that_would_mean_nothing_is_refused_before_a_run(
    coco, distil_cfg, tmp_path, monkeypatch
):
    monkeypatch.setattr(Runner, "run", None)
    (tmp_path / "c.yaml").write_text(distil_cfg.dump())
    data = json.loads(Path(coco[0]).read_text())
    data["annotations"] = [{**a, "iscrowd": 1} for a in data["annotations"]]
    (tmp_path / "crowds.json").write_text(json.dumps(data))
    arguments = ["--config-file", str(tmp_path / "c.yaml"), "--output", str(tmp_path / "out")]
    crowds = ["DATASETS.TEST", "('crowds',)", "DATASETS.TEST_JSON", str(tmp_path / "crowds.json")]
    none = ["DATASETS.TEST", "()", "DATASETS.TEST_JSON", ""]
    for more, error, message in [
        (["plain", "--set", *crowds], RunError, "no box that counts"),
        (["plain", "--set", "SEED", "3"], RunError, "--set SEED: compare.py sets it"),
        (["plain", "--set", *none], RunError, "DATASETS.TEST names 0 sets"),
        (["FgBg KL=none"], ValueError, "MODEL.KD.FGBG.KL is 'none': choose from"),
    ]:
        with pytest.raises(error, match=message):
            compare(monkeypatch, *arguments, "--methods", *more)


@pytest.fixture
def their_module(tmp_path, monkeypatch):
    """A module outside the package: the method of docs/extending.md, which has one option."""
    page = (ROOT / "docs" / "extending.md").read_text()
    (tmp_path / "l1.py").write_text(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1])
    yield "l1.py"
    sys.modules.pop("l1", None)


@pytest.mark.slow
def test_the_tool_trains_compares_and_does_nothing_twice_with_a_method_from_outside(
    distil_cfg, their_module, tmp_path, monkeypatch, capsys
):
    (tmp_path / "c.yaml").write_text(distil_cfg.dump())
    monkeypatch.chdir(tmp_path)

    def tool(*arguments):
        compare(monkeypatch, *arguments)
        return capsys.readouterr().out

    arguments = ["--config-file", "c.yaml", "--seeds", "1", "--jobs", "2", "--output", "out"]
    arguments += ["--import", their_module]
    arguments += ["--methods", "plain", "L1  WEIGHT=2", "--set", "SOLVER.MAX_ITER", "2"]
    text = tool(*arguments)
    results = Path("out/results.jsonl")
    rows = read_rows(results)
    assert sorted((r["method"], r["seed"]) for r in rows if r["seed"] == 0) == [
        ("L1 WEIGHT=2", 0),
        ("plain", 0),
    ]
    assert [r["method"] for r in rows if r["seed"] is None] == ["teacher"]
    theirs = next(r for r in rows if r["method"].startswith("L1"))
    assert theirs["options"] == {"weight": 2.0} and theirs["overrides"] == ["SOLVER.MAX_ITER", "2"]
    assert theirs["memory_mb"] > 100
    assert theirs["threads"] and theirs["hardware"] and theirs["versions"]
    trained = yaml.safe_load(Path(theirs["folder"], "config.yaml").read_text())
    assert trained["SEED"] == 0 and trained["MODEL"]["KD"]["METHOD"] == "L1"
    assert "| L1 WEIGHT=2 | 0." in " ".join(text.split())

    results.write_text(results.read_text() + '{"method": "torn')
    monkeypatch.setattr(Runner, "_follow", lambda *_: pytest.fail("it is done"))
    tool(*arguments)
    assert read_rows(results) == rows
    assert "| L1 WEIGHT=2 " in tool("--table-only", "out/results.jsonl")
    document = Path("document.md")
    tables = "<!-- table: out/results.jsonl summary plot -->\nnot run\n<!-- end of table -->\n"
    document.write_text(tables + tables.replace("out/", "elsewhere/"))
    printed = tool("--fill", "document.md")
    assert "out/results.jsonl: made anew" in printed
    assert "elsewhere/results.jsonl: no rows" in printed
    assert document.read_text().count("| L1 WEIGHT=2 ") == 1
    (picture,) = Path("document").glob("results_*.png")  # with the name of the file of rows
    assert f"](document/{picture.name})" in document.read_text()
    assert document.read_text().endswith(tables.replace("out/", "elsewhere/"))

    pytest.importorskip("tidecv")
    assert "| dAP50 " in tool(*arguments, "--errors")
    more = read_rows(results)
    assert len(more) == 2 * len(rows) and all(r.pop("errors") for r in more[len(rows) :])
    assert sorted(map(str, more[len(rows) :])) == sorted(map(str, rows))

    # The code of the method is part of the settings. After a change, the run is not finished.
    Path(their_module).write_text(Path(their_module).read_text() + "# changed")
    with pytest.raises(RunError, match="sha256 of the file of L1 was"):
        tool(*arguments)
