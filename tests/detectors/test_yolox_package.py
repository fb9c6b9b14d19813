"""The package pixeltable-yolox is optional, and its import changes nothing else."""

import subprocess
import sys

import pytest
from conftest import ROOT, tiny_yolox_cfg
from detectron2.modeling import build_model

from fgbg_kd.utils.errors import ConfigError


def test_without_the_package_the_message_says_how_to_install_it(monkeypatch):
    for name in ("yolox", "yolox.models"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "fgbg_kd.detectors.yolox_network", raising=False)
    with pytest.raises(ConfigError, match="pip install --no-deps pixeltable-yolox==0.4.3"):
        build_model(tiny_yolox_cfg())


CODE = """
import logging, random, resource, sys
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
assert "yolox" not in sys.modules and "loguru" not in sys.modules
before = state()
import yolox.models
assert state() == before
model = build_model(tiny_yolox_cfg()).train()
before = state()
losses_of(model)
assert state() == before
"""


@pytest.mark.slow
def test_only_a_yolox_imports_it_and_the_process_stays_as_it_was():
    """Loggers, output streams, OpenCV's threads, the limit of open files, random numbers."""
    pytest.importorskip("yolox")
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "tests")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
