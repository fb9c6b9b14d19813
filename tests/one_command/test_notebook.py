"""docs/one_command.ipynb runs from top to bottom."""

import json
import subprocess

import pytest
import torch
from conftest import ROOT, tiny_cfg
from test_command import few_candidates, without_onnx  # noqa: F401

from fgbg_kd.detectors.load import build_detector
from fgbg_kd.engine import read_config
from fgbg_kd.one_command import outcome
from fgbg_kd.one_command.training import BarRunner

CELLS = json.loads((ROOT / "docs" / "one_command.ipynb").read_text())["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(coco, without_onnx, tmp_path, monkeypatch):  # noqa: F811
    """With the smallest data, detectors and trainings in place of those of its first cell."""
    cfg = tiny_cfg(coco, name="notebook")
    cfg.SOLVER.STEPS = ()
    (tmp_path / "teacher.yaml").write_text(cfg.dump())
    own = {
        "TRAIN": coco,
        "TEST": coco,
        "TEACHER": str(tmp_path / "teacher.yaml"),
        "OUTPUT": str(tmp_path / "output"),
        "ITERATIONS": 2,
        "PARAMETERS": 0.5,
    }
    made, run = [], subprocess.run

    def prepare(command, **options):
        if "tools/prepare_data.py" not in command:
            return run(command, **options)
        made.append(command[-1])

    def untrained(self, name, config, folder, *rest):  # test_command trains one
        folder.mkdir(exist_ok=True)
        student = build_detector(read_config(str(config.with_name("student.yaml")))).state_dict()
        torch.save({"model": student}, folder / "model_final.pth")
        return {"AP": 1.0, "AP50": 2.0}

    monkeypatch.setattr(subprocess, "run", prepare)
    monkeypatch.setattr(BarRunner, "run", untrained)
    monkeypatch.setattr(outcome, "installed", lambda *names: False)  # OpenVINO is slow to export
    monkeypatch.setattr("fgbg_kd.one_command.command.write_onnx", lambda *a: None)
    monkeypatch.setattr("fgbg_kd.one_command.backbone._downloaded", lambda *a: False)
    monkeypatch.chdir(ROOT)
    names: dict = {}
    exec(CODE[0], names)
    assert own.keys() == names.keys() - {"__builtins__"}
    names |= own
    for source in CODE[1:]:
        exec(source, names)
    assert made == ["digits", "pretrained"]
    assert names["done"].rows[-1]["name"] == "distilled"
    assert len(list((tmp_path / "output" / "predictions").iterdir())) == 3


def test_the_notebook_holds_no_outputs():
    code = [cell for cell in CELLS if cell["cell_type"] == "code"]
    assert code and all(c["outputs"] == [] and c["execution_count"] is None for c in code)
