"""What README, docs and --help print is what the tools take."""

import argparse
import functools
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import pytest
import yaml
from conftest import ROOT, save_teacher, tiny_cfg

from fgbg_kd import METHOD_REGISTRY, get_fgbg_kd_cfg
from fgbg_kd.config import method_defaults
from fgbg_kd.engine.loader import _leave_interrupts_to_the_training
from fgbg_kd.experiments.compare_methods import fill_document
from fgbg_kd.experiments.method_specs import name_of
from fgbg_kd.utils.config_files import merge_overrides
from fgbg_kd.utils.files import read_rows

TOOLS = sorted(p.name for p in (ROOT / "tools").glob("[a-z]*.py"))
DOCUMENTS = ["README.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]


class Parsed(BaseException):
    """Carries what a tool's own parser made of a command line; the tool goes no further."""


def start(monkeypatch, tool: str, arguments: list[str]) -> None:
    """Runs a tool as a program, in this process, which stays as it was."""
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
        try:
            start(monkeypatch, tool, arguments)
        except Parsed as parsed:
            return parsed.args[0]
    raise AssertionError(f"{tool} parses nothing")


def blocks(document: str, language: str) -> list[str]:
    text = (ROOT / document).read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def lines(text: str) -> list[str]:
    """Command lines, those that go over several joined, without comments."""
    joined = re.sub(r"\s*\\\n\s*", " ", text)
    return [x for x in (re.sub(r"\s+# .*|^#.*", "", x).strip() for x in joined.splitlines()) if x]


@functools.cache
def commands() -> list[tuple[str, str]]:
    """Every command of the documents and of the tools' own examples, with its place."""
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
    return [(place, x) for place, x in found if "[" not in x and "..." not in x.split()]


def check_config(path: str) -> None:
    """A path of this repository must be there; names of the reader's own files are free."""
    if path.startswith("configs/"):
        assert (ROOT / path).is_file(), path


def check_overrides(opts: list[str]) -> None:
    assert len(opts) % 2 == 0, opts
    values = ["0.5" if v == "..." else v for v in opts]
    merge_overrides(get_fgbg_kd_cfg(), values)


def test_every_command_is_one_that_its_tool_takes(monkeypatch):
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    seen = set()
    for place, command in commands():
        words = shlex.split(command)
        if words[0] == "make":
            assert words[1] in targets, (place, command)
            continue
        if words[:2] == ["pip", "install"] or words[1:4] == ["-m", "pip", "install"]:
            continue
        if re.match(r"export \w+=|\w+=\$\(", command):
            continue  # the shell's own
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
        if not str(getattr(args, "config_file", "")).endswith(".py"):
            check_overrides(opts)
    assert seen == set(TOOLS)


def test_the_commands_of_the_guide_do_what_it_says(coco, tmp_path, monkeypatch):
    """In its order, on the smallest data; without the comparison, which trains a dozen times."""
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    cfg = tiny_cfg(coco, "guide")
    cfg.SOLVER.MAX_ITER = 2
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0  # such a student is sure of nothing
    Path("my_student.yaml").write_text(cfg.dump())
    cfg.MODEL.FPN.OUT_CHANNELS = 24
    Path("my_teacher.yaml").write_text(cfg.dump())
    (distilled,) = [b for b in blocks("README.md", "yaml") if "WEIGHTS: teacher.pth" in b]
    weights = re.search(r"`(WEIGHTS: output/\S+)`", (ROOT / "docs/guide.md").read_text())[1]
    Path("my_distilled.yaml").write_text(distilled.replace("WEIGHTS: teacher.pth", weights))
    shutil.copytree(coco[1], "folder")
    image = cv2.imread("folder/1.png")
    cv2.imwrite("photo.jpg", image)
    film = cv2.VideoWriter("film.mp4", cv2.VideoWriter_fourcc(*"mp4v"), 5, image.shape[1::-1])
    film.write(image)
    film.release()
    ran = []
    for command in (x for b in blocks("docs/guide.md", "bash") for x in lines(b)):
        python, tool, *arguments = shlex.split(command)
        if tool == "-m" or tool == "tools/compare.py":
            continue
        monkeypatch.setattr(sys, "argv", [tool, *arguments])
        runpy.run_path(str(ROOT / tool), run_name="__main__")
        ran.append(Path(tool).stem)
    assert ran == [*["train_net"] * 3, "analyze", "visualize", "export", "predict"]
    for name in ("teacher", "student", "distilled"):
        assert Path(f"output/{name}/model_final.pth").is_file()
    assert len(list(Path("output/visualize").glob("*.png"))) == 4
    assert Path("student.onnx").is_file() and Path("student.int8.onnx").is_file()
    made = {p.name for p in Path("predictions").iterdir()}
    assert made == {"photo.jpg", "film.mp4", *(p.name for p in Path("folder").iterdir())}


@pytest.mark.parametrize("document", DOCUMENTS)
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


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_to_a_file_leads_there(document):
    text = (ROOT / document).read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert ((ROOT / document).parent / target).exists(), target


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
def test_ctrl_c_ends_training_without_a_stack_trace(moment, coco, tmp_path):
    cfg = tiny_cfg(coco)
    cfg.MODEL.META_ARCHITECTURE = "FgBgDistiller"
    cfg.MODEL.KD.TEACHER.CONFIG, cfg.MODEL.KD.TEACHER.WEIGHTS = save_teacher(tmp_path)
    cfg.OUTPUT_DIR = str(tmp_path / "run")
    cfg.DATALOADER.NUM_WORKERS = 1  # which gets the signal, too
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
