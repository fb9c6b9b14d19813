"""README, docs and --help name only commands, flags, keys and files that exist."""

import argparse
import ast
import functools
import os
import re
import runpy
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import cv2
import pytest
import timm
import torch
import yaml
from conftest import CLASSES, ROOT, save_teacher, tiny_cfg
from detectron2 import model_zoo
from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from torch import nn

from fgbg_kd import METHOD_REGISTRY, get_fgbg_kd_cfg
from fgbg_kd.config import method_defaults
from fgbg_kd.engine import read_config
from fgbg_kd.engine.loader import _leave_interrupts_to_the_training
from fgbg_kd.experiments.compare_methods import fill_document
from fgbg_kd.experiments.method_specs import name_of
from fgbg_kd.experiments.paired_statistics import mean_interval
from fgbg_kd.utils.config_files import merge_overrides
from fgbg_kd.utils.files import read_rows

TOOLS = sorted(p.name for p in (ROOT / "tools").glob("[a-z]*.py"))
PAGES = sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *PAGES]
# Rows of results name the keys that their runs had.
KEY_DOCUMENTS = [d for d in DOCUMENTS if not d.startswith("docs/results")]


class Parsed(BaseException):
    """Carries the parsed command line and stops the tool after its parser."""


def start(monkeypatch, tool: str, arguments: list[str]) -> None:
    """Runs a tool as a program in this process, and then restores the process's state."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [tool, *arguments])
        patch.setattr(sys, "excepthook", sys.excepthook)
        try:
            runpy.run_path(str(ROOT / "tools" / tool), run_name="__main__")
        finally:
            for s, handler in handlers.items():
                signal.signal(s, handler)


def parse(monkeypatch, tool: str, arguments: list[str]) -> argparse.Namespace:
    original = argparse.ArgumentParser.parse_args

    def stop(self, *args, **kwargs):
        raise Parsed(original(self, *args, **kwargs))

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr("_arguments.import_user_module", lambda name: None)  # of a page's own file
        try:
            start(monkeypatch, tool, arguments)
        except Parsed as parsed:
            return parsed.args[0]
    raise AssertionError(f"{tool} parses nothing")


def blocks(document: str, language: str) -> list[str]:
    text = (ROOT / document).read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def lines(text: str) -> list[str]:
    """Command lines without comments. Continued lines are joined."""
    joined = re.sub(r"\s*\\\n\s*", " ", text)
    return [x for x in (re.sub(r"\s+# .*|^#.*", "", x).strip() for x in joined.splitlines()) if x]


@functools.cache
def commands() -> list[tuple[str, str]]:
    """Every command in the documents and in the tools' examples, with its location."""
    found = [(d, x) for d in DOCUMENTS for b in blocks(d, "bash") for x in lines(b)]
    for d in DOCUMENTS:  # those inside of a sentence, but not those with [options]
        prose = re.sub(r"```.*?```", "", (ROOT / d).read_text(), flags=re.DOTALL)
        inline = [" ".join(x.split()) for x in re.findall(r"`([^`]+)`", prose)]
        found += [(d, x) for x in inline if re.match(r"(\S*python )?tools/\w+\.py ", x)]
    for tool in TOOLS:
        doc = (ROOT / "tools" / tool).read_text().split('"""')[1].replace("\\\\", "\\")
        examples = re.sub(r" {3,}(?=\S).*| {4,}.*$", "", "\n".join(map(str.strip, lines(doc))))
        pattern = r"^(?:example: )?(?:\S*python )?(tools/\S+\.py\b.*?)(?: {3,}.*)?$"
        mine = re.findall(pattern, examples, re.MULTILINE)
        assert any(x.split()[0] == f"tools/{tool}" for x in mine), f"{tool} has no example"
        found += [(tool, x) for x in mine]
    return [(place, x) for place, x in found if "..." not in x.split()]


def check_config(path: str) -> None:
    """A path in this repository must exist. Names of the reader's own files may be anything."""
    if path.startswith("configs/"):
        assert (ROOT / path).is_file(), path


def check_overrides(opts: list[str]) -> None:
    assert len(opts) % 2 == 0, opts
    values = ["0.5" if v == "..." else v for v in opts]
    merge_overrides(get_fgbg_kd_cfg(), values)


def is_no_tool(words: list[str]) -> bool:
    """Commands of other programs: pip, python -c, sphinx, the shell's own."""
    return (
        words[0].endswith(("pip", "pre-commit"))
        or words[1:2] == ["-c"]
        or words[1:3] == ["-m", "pip"]
        or re.match(r"\w+=\$\(", words[0]) is not None
        or words[0] == "export"
    )


def test_every_command_is_one_that_its_tool_takes(monkeypatch):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    seen = set()
    for place, command in commands():
        words = shlex.split(command)
        if words[0] == "make":
            assert words[1] in targets, (place, command)
            continue
        if is_no_tool(words):
            continue
        while words and not re.fullmatch(r"tools/\w+\.py", words[0]):  # python, torchrun --x 1
            words = words[1:]
        assert words, (place, command)
        tool = words[0].split("/")[1]
        assert tool in TOOLS, (place, command)
        seen.add(tool)
        try:
            args = parse(monkeypatch, tool, words[1:])
        except SystemExit as error:
            raise AssertionError(f"{place}: {command}") from error
        check_config(getattr(args, "config_file", None) or "")
        given = (getattr(args, name, None) for name in ("opts", "set"))
        opts = [x for values in given if isinstance(values, list) for x in values]
        is_python = str(getattr(args, "config_file", "")).endswith(".py")
        if not is_python and "--import" not in words:  # an imported module has keys of its own
            check_overrides(opts)
    assert seen == set(TOOLS)


@pytest.mark.slow
def test_the_commands_of_the_readme_do_what_it_says(coco, tmp_path, monkeypatch):
    """From a teacher of Detectron2's zoo to predictions, on the smallest data."""
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    write_readme_teacher()
    (student, distilled) = blocks("README.md", "yaml")
    for old, new in zip(("data/train.json", "data/train"), coco):
        student = student.replace(f"TRAIN_JSON: {old}", f"TRAIN_JSON: {new}")
        student = student.replace(f"TRAIN_IMAGES: {old}", f"TRAIN_IMAGES: {new}")
    for old, new in zip(("data/test.json", "data/test"), coco):
        student = student.replace(f"TEST_JSON: {old}", f"TEST_JSON: {new}")
        student = student.replace(f"TEST_IMAGES: {old}", f"TEST_IMAGES: {new}")
    Path("my_student.yaml").write_text(student)
    Path("my_distilled.yaml").write_text(distilled)
    cv2.imwrite("photo.jpg", cv2.imread(f"{coco[1]}/1.png"))
    ran = []
    for command in (x for b in blocks("README.md", "bash") for x in lines(b)):
        words = shlex.split(command)
        if words[0] != ".venv/bin/python" or not words[1].startswith("tools/"):
            continue
        if words[1] == "tools/distill.py":  # tests/one_command runs it
            continue
        monkeypatch.setattr(sys, "argv", words[1:])
        runpy.run_path(str(ROOT / words[1]), run_name="__main__")
        ran.append(Path(words[1]).stem)
    assert ran == ["train_net", "train_net", "export", "predict"]
    for name in ("student", "distilled"):
        assert Path(f"output/{name}/model_final.pth").is_file()
    assert Path("student.onnx").is_file()
    assert Path("predictions/photo.jpg").is_file()


# What the README says about the checkpoint; each sentence is followed to the letter.
PROMISES = (
    "The checkpoint holds the student's tensors under Detectron2's own names.",
    "The student above has a timm backbone, so your code must `import fgbg_kd`.",
    "Stock Detectron2 loads a student that has a Detectron2 backbone and a config without this "
    "package's keys.",
)
LOAD = """
import sys
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_model

class Strict(DetectionCheckpointer):
    def _load_model(self, checkpoint):
        report = super()._load_model(checkpoint)
        assert not report.missing_keys and not report.unexpected_keys, report
        assert not report.incorrect_shapes, report

def load(cfg, kind):
    cfg.merge_from_file(f"{kind}.yaml")
    model = build_model(cfg).eval()
    Strict(model).load(f"{kind}/model_final.pth")
    return model

@torch.no_grad()
def detections(model):
    image = torch.randint(0, 256, (3, 64, 80), generator=torch.Generator().manual_seed(0))
    return model([{"image": image.byte()}])[0]["instances"]

found = detections(load(get_cfg(), "stock"))
assert "fgbg_kd" not in sys.modules
import fgbg_kd
load(fgbg_kd.get_fgbg_kd_cfg(), "timm")
ours = detections(load(fgbg_kd.get_fgbg_kd_cfg(), "stock"))
assert len(found) > 0 and torch.equal(found.pred_boxes.tensor, ours.pred_boxes.tensor)
assert torch.equal(found.scores, ours.scores)
assert torch.equal(found.pred_classes, ours.pred_classes)
"""


@pytest.mark.slow
def test_the_checkpoint_loads_where_the_readme_says(coco, tmp_path, monkeypatch):
    text = " ".join((ROOT / "README.md").read_text().split())
    assert [x for x in PROMISES if x not in text] == []
    monkeypatch.chdir(tmp_path)
    write_readme_teacher()
    (student, distilled) = blocks("README.md", "yaml")
    content = yaml.safe_load(student)
    data = ("TRAIN_JSON", "TRAIN_IMAGES", "TEST_JSON", "TEST_IMAGES")
    for key in data:  # keys of this package; they go to the command line
        content["DATASETS"].pop(key)
    values = [f"DATASETS.{k}={v}".split("=", 1) for k, v in zip(data, [*coco, *coco])]
    overrides = [x for pair in values for x in pair]
    for kind in ("timm", "stock"):
        if kind == "stock":
            content["MODEL"].pop("TIMM")
            content["MODEL"]["BACKBONE"] = {"NAME": "build_retinanet_resnet_fpn_backbone"}
        student_config, output = f"{kind}.yaml", ["OUTPUT_DIR", kind]
        Path(student_config).write_text(yaml.safe_dump(content))
        Path("my_distilled.yaml").write_text(distilled.replace("my_student.yaml", student_config))
        start(
            monkeypatch,
            "train_net.py",
            ["--config-file", "my_distilled.yaml", *overrides, *output],
        )
    done = subprocess.run([sys.executable, "-c", LOAD], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def write_readme_teacher() -> None:
    """Writes the files that the README's reader has: config and checkpoint of a RetinaNet, here
    with ResNet-18, and timm weights, which are random here."""
    cfg = model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    cfg.MODEL.RETINANET.NUM_CLASSES = len(CLASSES)
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0  # such a student is sure of nothing
    cfg.MODEL.RETINANET.TOPK_CANDIDATES_TEST = 10
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (64,), 64
    cfg.DATALOADER.NUM_WORKERS = 0
    # An untrained student has many nearly equal scores, and rounding may change their order. With
    # this seed the detections stay the same if all weights change by 1e-6 of their value.
    cfg.SEED = 0
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER = 2, 2
    cfg.DATASETS.TRAIN = ("a_name_that_is_not_registered_here",)
    Path("my_teacher.yaml").write_text(cfg.dump())
    torch.save({"model": build_model(cfg).state_dict()}, "model_final.pth")
    backbone = timm.create_model("mobilenetv3_large_100").train()
    for norm in (m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = 1.0  # the statistics of one batch: frozen, they keep features in range
    backbone(torch.randn(8, 3, 64, 64))
    torch.save(backbone.state_dict(), "mobilenetv3.pth")


@pytest.mark.parametrize("document", KEY_DOCUMENTS)
def test_every_yaml_has_keys_that_exist(document):
    for block in blocks(document, "yaml"):
        content = yaml.safe_load(block)
        base = content.pop("_BASE_", None)
        assert base is None or isinstance(base, str)
        known = get_fgbg_kd_cfg()

        def check(node, known, block=block):
            for key, value in node.items():
                assert key in known, (document, key, block)
                if isinstance(value, dict):
                    check(value, known[key])

        check(content, known)


def is_key(name: str) -> bool:
    node = get_fgbg_kd_cfg()
    for part in name.split("."):
        if not isinstance(node, CN) or part not in node:
            return False
        node = node[part]
    return True


@pytest.mark.parametrize("document", KEY_DOCUMENTS)
def test_every_key_that_is_named_exists(document):
    code = " ".join(re.findall(r"`([^`]+)`", (ROOT / document).read_text()))
    groups = "MODEL|SOLVER|DATASETS|INPUT|DATALOADER|TEST"
    named = set(re.findall(rf"\b(?:{groups})(?:\.[A-Z][A-Z0-9_]*)+\b", code))
    named = {name for name in named if not name.startswith("MODEL.KD.L1")}  # of extending.md
    assert [name for name in sorted(named) if not is_key(name)] == []


def leaves(node: CN, prefix: str = "") -> dict:
    found = {}
    for key, value in node.items():
        inner = leaves(value, f"{prefix}{key}.") if isinstance(value, CN) else {prefix + key: value}
        found.update(inner)
    return found


def test_the_page_of_the_configuration_has_every_key_and_its_default():
    added = {k: v for k, v in leaves(get_fgbg_kd_cfg()).items() if k not in leaves(get_cfg())}
    text = (ROOT / "docs/configuration.md").read_text()
    rows = re.findall(r"^\| `([A-Z][\w.]+)` \| `([^`]*)` \|", text, re.MULTILINE)
    listed = {key: ast.literal_eval(default) for key, default in rows}
    assert listed == {k: list(v) if isinstance(v, tuple) else v for k, v in added.items()}


def slug(heading: str) -> str:
    """The anchor that GitHub and MyST give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "").strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("document", [*DOCUMENTS, "CHANGELOG.md"])
def test_every_link_leads_somewhere(document):
    text = (ROOT / document).read_text()
    for target, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([^)]*))?\)", text):
        file = (ROOT / document).parent / target if target else ROOT / document
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)", file.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), (target, anchor)


def test_the_site_has_every_page():
    listed = re.findall(r"^(\w+)$", (ROOT / "docs/index.md").read_text(), re.MULTILINE)
    assert {f"docs/{name}.md" for name in listed} == set(PAGES) - {"docs/index.md"}


def test_the_readme_is_short_and_has_no_open_place():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert re.findall(r"@[A-Z]+@", text) == []


def pair_line(runs: list[dict]) -> str:
    """The line of a pair in docs/results.md."""
    ap = defaultdict(dict)  # by method, by seed
    for run in runs:
        ap[run["method"]][run["seed"]] = run["AP"]
    plain, distilled = ([ap[m][s] for s in sorted(ap[m])] for m in ("plain", "FgBg"))
    each = [", ".join(f"{x:.1f}" for x in values) for values in (plain, distilled)]
    mean, half = mean_interval([ap["FgBg"][s] - ap["plain"][s] for s in ap["FgBg"]])
    gain = f"{mean:+.1f}" + (f" ± {half:.1f}" if half is not None else "")
    name = " ".join([Path(runs[0]["config"]).stem, *runs[0]["overrides"]])
    (teacher,) = ap["teacher"].values()
    return f"| `{name}` | {teacher:.1f} | {each[0]} | {each[1]} | {gain} |"


FAMILIES = {
    "faster_rcnn": "Faster R-CNN",
    "fcos": "FCOS",
    "fcos_large": "large FCOS",
    "mobilenet_ssd": "MobileNet-SSD",
    "retinanet": "RetinaNet",
    "ssdlite": "SSDlite",
    "yolo": "YOLOv3",
    "yolox": "YOLOX",
}


def readme_line(runs: list[dict]) -> str:
    """The line of a pair in README."""
    photos, pair = Path(runs[0]["config"]).stem.split("_", 1)
    teacher, student = (FAMILIES[name] for name in pair.split("_to_"))
    ap = defaultdict(list)
    for run in runs:
        ap[run["method"]].append(run["AP"])
    means = [f"{statistics.fmean(ap[name]):.1f}" for name in ("teacher", "plain", "FgBg")]
    gain = pair_line(runs).split(" | ")[-1]
    cfg = read_config(str(ROOT / runs[0]["config"]), runs[0]["overrides"])
    cells = [f"| {teacher}", student, photos, f"{cfg.SOLVER.MAX_ITER:,}", str(len(ap["FgBg"]))]
    return " | ".join([*cells, *means, gain])


def test_the_measured_pairs_are_those_of_their_rows():
    pairs = defaultdict(list)
    for row in read_rows(ROOT / "docs" / "results" / "pairs.jsonl"):
        pairs[(row["config"], *row["overrides"])].append(row)
    text = (ROOT / "docs" / "results.md").read_text()
    text = text.split("## Real photos")[1].split("\n## ")[0]
    printed = re.findall(r"^\| `.*$", text, re.MULTILINE)
    assert sorted(printed) == sorted(map(pair_line, pairs.values()))
    text = (ROOT / "README.md").read_text()
    printed = re.findall(r"^\| .* \| (?:aquarium|voc07) \| .*$", text, re.MULTILINE)
    several = [rows for rows in pairs.values() if len({row["seed"] for row in rows}) > 2]
    assert sorted(printed) == sorted(map(readme_line, several))  # the teacher's seed is None


# Here: the test that runs the text of docs/extending.md.


@pytest.mark.parametrize("tool", TOOLS)
def test_help_has_an_example(tool, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(monkeypatch, tool, ["--help"])
    assert stop.value.code == 0
    assert f"tools/{tool}" in capsys.readouterr().out.split("usage:")[1].split("\n", 1)[1]


@pytest.mark.parametrize(
    "command, named",
    [
        ("report.py run -o folder", "folder"),
        ("report.py torn", "torn/done.json is damaged"),
        ("compare.py --fill gone.md", "gone.md"),
        ("compare.py --config-file c.yaml --methods plain --output c.yaml/in", "c.yaml/in"),
        ("quickstart.py scenes --output c.yaml/in", "c.yaml/in"),
    ],
)
def test_a_file_that_cannot_be_read_or_written_is_named_in_a_line(
    command, named, distil_cfg, tmp_path, monkeypatch, caplog
):
    for name in ("run", "torn"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text('{"iteration": 1, "total_loss": 1}\n')
    for file in ("c.yaml", "run/config.yaml", "torn/config.yaml"):
        (tmp_path / file).write_text(distil_cfg.dump())
    (tmp_path / "torn" / "done.json").write_text('{"AP": 1')
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: None)  # of quickstart.py's data
    for name in ("fgbg_kd", "fgbg_kd.engine"):
        caplog.set_level("INFO", name)  # and as it was, after the tool's own setting
    tool, *arguments = command.split()
    with pytest.raises(SystemExit, match=f"{tool[:-3]}: .*{named}"):
        start(monkeypatch, tool, arguments)


@pytest.mark.parametrize("name", ["results.md", "results_details.md"])
def test_the_tables_of_results_are_those_of_their_rows(name, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs" / name).read_text()
    copy, filled = tmp_path / name, []
    copy.write_text(text)
    fill_document(copy, filled.append)
    assert copy.read_text() == text, f"run tools/compare.py --fill docs/{name}"
    assert filled and all(line.endswith("made anew") for line in filled)


@pytest.mark.parametrize("file", sorted((ROOT / "docs" / "results").glob("*.jsonl")), ids=str)
@pytest.mark.slow
def test_a_published_row_has_a_method_options_and_keys_of_today(file):
    for row in read_rows(file):
        name = row["method"].split()[0]
        known = set(method_defaults(name)) if name in METHOD_REGISTRY else set()
        assert set(row["options"]) <= known, row["method"]
        merge_overrides(get_fgbg_kd_cfg(), row["overrides"])
        assert name != "FgBg" or row["method"] == name_of(row)


@pytest.mark.parametrize("tool", [t for t in TOOLS if t != "install_detectron2.py"])
def test_no_slow_import_comes_before_that_of_quiet(tool):
    text = (ROOT / "tools" / tool).read_text()
    modules = re.findall(r"^\s*(?:import|from) (\w+)", text, re.MULTILINE)
    before = modules[: modules.index("_quiet")]
    assert set(before) <= sys.stdlib_module_names


@pytest.mark.parametrize("moment", ("importing", "training"))
@pytest.mark.slow
def test_ctrl_c_ends_training_without_a_stack_trace(moment, coco, tmp_path):
    cfg = tiny_cfg(coco)
    cfg.MODEL.META_ARCHITECTURE = "FgBgDistiller"
    cfg.MODEL.KD.TEACHER.CONFIG, cfg.MODEL.KD.TEACHER.WEIGHTS = save_teacher(tmp_path)
    cfg.OUTPUT_DIR = str(tmp_path / "run")
    cfg.DATALOADER.NUM_WORKERS = 1  # which gets the signal, too
    cfg.SOLVER.BASE_LR = 1e-4  # with a random teacher, a larger one diverges before the signal
    config = tmp_path / "distilled.yaml"
    config.write_text(cfg.dump())
    tool = str(ROOT / "tools" / "train_net.py")
    with open(tmp_path / "log.txt", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-u", tool, "--config-file", str(config)],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        written = tmp_path / "run" / "metrics.json"
        until = time.monotonic() + 60
        maps = Path(f"/proc/{process.pid}/maps")  # what has been imported so far
        while process.poll() is None and time.monotonic() < until:
            if moment == "training" and written.exists() and written.stat().st_size:
                break
            if moment == "importing" and "libtorch" in maps.read_text():
                break
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(30) == -signal.SIGINT
    text = (tmp_path / "log.txt").read_text()
    assert text.endswith("stopped\n")
    assert "Traceback" not in text


@pytest.mark.parametrize("error, told", [(EOFError, 0), (ConnectionResetError, 0), (OSError, 1)])
def test_a_loading_process_is_silent_when_the_training_ends(error, told, monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "excepthook", lambda *report: seen.append(report))
    before = signal.getsignal(signal.SIGINT)
    try:
        _leave_interrupts_to_the_training(0)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        sys.excepthook(error, error(), None)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(seen) == told
