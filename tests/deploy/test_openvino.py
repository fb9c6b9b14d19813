"""An OpenVINO file detects what PyTorch does, and its int8 file about the same."""

import subprocess
import sys
from pathlib import Path

import pytest
from detectron2.structures import pairwise_iou
from small import photo, variant
from test_deploy import assert_same

from fgbg_kd import deploy
from fgbg_kd.utils.errors import DeployError


@pytest.fixture(scope="module")
def openvino_file(tmp_path_factory):
    """An FCOS, its description, and its OpenVINO file, which gives candidates.

    tests/one_command/test_command.py has a file with NMS, in fp16.
    """
    pytest.importorskip("openvino")
    model, about = variant("FCOS")
    path = str(tmp_path_factory.mktemp("openvino") / "fp32.xml")
    deploy.export(model, about, path, photo(56, 64), nms_inside=False)
    return model, about, path


@pytest.mark.slow
def test_a_file_detects_what_pytorch_does_in_other_sizes_than_the_example(openvino_file):
    model, about, path = openvino_file
    exported = deploy.ExportedDetector(path)
    assert exported.about == {**about, "nms_inside": False}
    assert_same(model, exported, about)


@pytest.mark.slow
def test_int8_is_smaller_and_detects_about_the_same(openvino_file, tmp_path, monkeypatch):
    nncf = pytest.importorskip("nncf")
    model, about, source = openvino_file
    output = tmp_path / "int8.xml"
    deploy.quantize(source, str(output), [photo(64, 64, seed) for seed in range(3)])
    names = [tmp_path / "int8.bin", output]
    assert sorted(tmp_path.iterdir()) == names
    sizes = [Path(p).with_suffix(".bin").stat().st_size for p in (output, source)]
    assert sizes[0] < 0.5 * sizes[1]
    quantized = deploy.ExportedDetector(str(output))
    assert quantized.about["categories"] == about["categories"]
    image = photo(72, 90)
    a, b = (deploy.detect(m, about, image) for m in (model, quantized))
    assert (a.scores[:5] - b.scores[:5]).abs().max() < 0.2  # of noise, with 3 images
    best = a[:1]  # the order of the others is noise, because the weights are random
    same_class = best.pred_classes[:, None] == b.pred_classes
    overlap = pairwise_iou(best.pred_boxes, b.pred_boxes) * same_class
    assert (overlap.amax(1) > 0.5).all()

    before = [p.read_bytes() for p in names]
    monkeypatch.setattr(nncf, "quantize", lambda network, *_, **__: network)
    monkeypatch.setattr("openvino.save_model", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        deploy.quantize(source, str(output), [photo(64, 64)])
    assert sorted(tmp_path.iterdir()) == names and [p.read_bytes() for p in names] == before


DETECTORS_END = """
import gc, signal, subprocess, sys
from fgbg_kd.deploy import ExportedDetector
first = ExportedDetector(sys.argv[1])
second = ExportedDetector(sys.argv[1])
del first
gc.collect()
del second
gc.collect()
signal.signal(signal.SIGCHLD, lambda *_: print("a signal came"))  # as PyTorch's DataLoader does
subprocess.run(["true"])
"""


@pytest.mark.slow
def test_a_process_outlives_its_detectors(openvino_file):
    """The last signal came to freed memory if each detector had its own Core of OpenVINO."""
    command = [sys.executable, "-c", DETECTORS_END, openvino_file[2]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "a signal came\n", done.stderr[-2000:]


def test_what_openvino_cannot_do_is_said(tmp_path, monkeypatch):
    with pytest.raises(DeployError, match="OpenVINO has static int8 only"):
        deploy.quantize("a.xml", "b.xml")
    (tmp_path / "a.xml").write_text("<net/>")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(DeployError, match=r"openvino is not installed.*pip install -e '.\[openv"):
        deploy.ExportedDetector(str(tmp_path / "a.xml"))


def test_an_xml_file_of_another_kind_is_refused(tmp_path):
    pytest.importorskip("openvino")
    (tmp_path / "a.xml").write_text("<annotation/>")
    with pytest.raises(DeployError, match="a.xml cannot be read"):
        deploy.ExportedDetector(str(tmp_path / "a.xml"))
