"""What the core imports, and how its files depend on each other."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "fgbg_kd"
FILES = sorted(PACKAGE.rglob("*.py"))
CORE = [f for f in FILES if "experiments" not in f.parts]


IMPORTS = """
import logging, random, resource, sys
from importlib.util import find_spec
import cv2, numpy, torch
from conftest import build_model, losses_of, tiny_cfg, tiny_fcos_cfg, tiny_yolox_cfg
import fgbg_kd.engine, fgbg_kd.deploy

def state():
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    root = logging.root.level, list(logging.root.handlers), sys.stdout, sys.stderr
    drawn = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    return root, cv2.getNumThreads(), cv2.ocl.useOpenCL(), limits, drawn

for cfg in (tiny_cfg(), tiny_fcos_cfg()):
    losses_of(build_model(cfg).train())
cfg.MODEL.META_ARCHITECTURE = "FgBgDistiller"
build_model(cfg)
assert not [m for m in sys.modules if m.startswith("fgbg_kd.experiments")]
assert "yolox" not in sys.modules and "loguru" not in sys.modules
if find_spec("yolox"):
    before = state()
    import yolox.models
    assert state() == before
    model = build_model(tiny_yolox_cfg()).train()
    before = state()
    losses_of(model)
    assert state() == before
"""


@pytest.mark.slow
def test_a_process_imports_what_it_needs_and_nothing_else():
    """The core never imports experiments, and only a YOLOX imports its package.

    That import changes no loggers, output streams, threads of OpenCV, limits of open files, or
    random numbers.
    """
    command = [sys.executable, "-c", IMPORTS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "tests")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def imported(file: Path, everywhere: bool) -> set[Path]:
    """The files of this package that a file imports.

    Args:
        everywhere: also inside functions.
    """
    tree = ast.parse(file.read_text())
    found = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        folder = file.parent
        for _ in range(node.level - 1):
            folder = folder.parent
        base = folder.joinpath(*(node.module or "").split(".")) if node.module else folder
        names = [base.with_suffix(".py")] if node.module else []
        names += [base / f"{a.name}.py" for a in node.names]
        real = [n for n in names if n.is_file()]
        found.update(real or ([base / "__init__.py"] if (base / "__init__.py").is_file() else []))
    return found - {file}


def test_there_is_no_circle_of_imports_between_files():
    """A package's __init__ counts as the files that it imports."""
    graph = {f: imported(f, everywhere=True) for f in FILES}
    done: set[Path] = set()

    def visit(file: Path, path: tuple[Path, ...]) -> None:
        if file in path:
            circle = [str(f.relative_to(PACKAGE)) for f in path[path.index(file) :]]
            pytest.fail(f"circle: {' -> '.join(circle)}")
        if file not in done:
            for other in graph[file]:
                visit(other, (*path, file))
            done.add(file)

    for file in FILES:
        visit(file, ())


def test_no_function_of_the_core_is_over_60_lines_and_no_file_over_350():
    long = []
    for file in CORE:
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name != "compare_kernel":
                if node.end_lineno - node.lineno + 1 > 60:
                    long.append(f"{file.relative_to(PACKAGE)}: {node.name}")
        lines = len(file.read_text().splitlines())
        if lines > 350:
            long.append(f"{file.relative_to(PACKAGE)}: {lines} lines")
    assert not long


@pytest.mark.parametrize("name", ["RetinaNet", "FCOS", "SSD", "YOLOX", "YOLO"])
@pytest.mark.slow
def test_one_file_knows_the_detectors_by_name(name):
    """Code outside detectors/ never names a detector. Docstrings may name them."""
    known = []
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            used = isinstance(node, ast.Name) and node.id == name
            named = isinstance(node, ast.Constant) and node.value == name
            if (used or named) and file.parent.name != "detectors":
                known.append(f"{file.relative_to(PACKAGE)}:{node.lineno}")
    assert [k for k in known if not k.startswith("config.py")] == []
