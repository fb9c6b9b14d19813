"""An exported YOLOX detects what PyTorch does, in other sizes than its example."""

import pytest
from conftest import tiny_yolox_cfg, yolox_detector
from small import photo

from fgbg_kd import deploy

pytest.importorskip("yolox")


@pytest.mark.parametrize(
    "file, one_class", (("a.onnx", True), ("a.onnx", False), ("a.pt", True), ("a.xml", True))
)
@pytest.mark.slow
def test_a_file_detects_what_pytorch_does(file, one_class, tmp_path):
    if file.endswith(".onnx"):
        pytest.importorskip("onnx")
        pytest.importorskip("onnxruntime")
    if file.endswith(".xml"):
        pytest.importorskip("openvino")
    model = yolox_detector(lambda cfg: cfg.MODEL.YOLOX.update(ONE_CLASS_PER_BOX=one_class)).eval()
    about = deploy.describe(tiny_yolox_cfg(), model)
    path = str(tmp_path / file)
    deploy.export(model, about, path, photo(56, 64))
    images = [photo(h, w, seed) for seed, (h, w) in enumerate(((72, 90), (64, 131), (33, 40)))]
    found = deploy.agreement(model, deploy.ExportedDetector(path), about, images)
    assert found.detections > 100 and found.partners == 1
    assert found.score < 1e-4 and found.pixels < 1e-2
