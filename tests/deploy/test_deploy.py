"""An exported detector detects the same as PyTorch, and its file describes it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_cfg
from detectron2.data import MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY, RetinaNet
from detectron2.structures import Boxes, Instances
from small import detector, from_function, grey_cfg, photo, variant

from fgbg_kd import deploy
from fgbg_kd.deploy import checks
from fgbg_kd.detectors import RetinaNetView, register_view
from fgbg_kd.utils.errors import CheckpointError

SIZES = ((72, 90), (64, 131), (33, 40))


@META_ARCH_REGISTRY.register()
class FixedSize(RetinaNet):
    """A RetinaNet that takes images of 64x96 pixels only, padded with a grey of 0.5."""

    def forward(self, batched_inputs):
        assert all(x["image"].shape[1:] == (64, 96) for x in batched_inputs)
        return super().forward(batched_inputs)


@register_view(FixedSize)
class FixedSizeView(RetinaNetView):
    input_size = (64, 96)
    pad_value = 0.5


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory):
    """A RetinaNet, its description, and its ONNX file."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    model, about = variant("RetinaNet")
    path = str(tmp_path_factory.mktemp("onnx") / "fp32.onnx")
    deploy.export(model, about, path, photo(56, 64))
    return model, about, path


def assert_same(reference, other, about, sizes=SIZES):
    images = [photo(h, w, seed) for seed, (h, w) in enumerate(sizes)]
    found = deploy.agreement(reference, other, about, images)
    assert found.detections > 10
    assert found.partners == 1
    assert found.score < 1e-5
    assert found.pixels < 1e-2


def in_python(model, about, nms_inside=True):
    deployable = deploy.Deployable(model, nms_inside)
    run = lambda image: [x.numpy() for x in deployable(torch.tensor(image))]  # noqa: E731
    return from_function(run, {**about, "nms_inside": nms_inside})


@pytest.mark.parametrize("name", ("RetinaNet", "BGR", "crowded", "FCOS", "grey"))
@pytest.mark.slow
def test_a_deployable_detects_what_the_detector_does(name):
    model, about = variant(name)
    for nms_inside in (True, False):
        assert_same(model, in_python(model, about, nms_inside), about)


@pytest.mark.slow
def test_a_file_detects_what_pytorch_does_in_other_sizes_than_the_example(onnx_file):
    model, about, path = onnx_file
    exported = deploy.ExportedDetector(path)
    assert exported.about == {**about, "nms_inside": True}
    assert_same(model, exported, about)


@pytest.mark.parametrize("name", ("RetinaNet", "FCOS"))
@pytest.mark.parametrize("example", ((160, 200), (33, 40)))
@pytest.mark.slow
def test_an_onnx_file_has_as_many_candidates_as_pytorch_in_any_size(name, example, tmp_path):
    """The number of cells in a level belongs to the image, not to the example (pytorch 71695)."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    model, about = variant(name)
    path = str(tmp_path / "a.onnx")
    deploy.export(model, about, path, photo(*example), nms_inside=False)
    exported, deployable = deploy.ExportedDetector(path), deploy.Deployable(model, False)
    for size in ((33, 40), (64, 64), (400, 64), (160, 200)):
        image = photo(*size)
        expected = [len(x) for x in deployable(torch.tensor(image))]
        assert [len(x) for x in exported.run(image)] == expected


@pytest.mark.parametrize(
    "name, file, nms_inside",
    (
        ("RetinaNet", "a.onnx", False),
        ("crowded", "a.pt", True),
        ("FCOS", "a.onnx", True),
        ("FCOS", "a.pt", False),
        ("grey", "a.onnx", True),
    ),
)
@pytest.mark.slow
def test_so_does_a_file_of_another_kind(name, file, nms_inside, tmp_path):
    if file.endswith(".onnx"):
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnx")
    model, about = variant(name)
    path = str(tmp_path / file)
    deploy.export(model, about, path, photo(56, 64), nms_inside)
    exported = deploy.ExportedDetector(path)
    assert exported.about == {**about, "nms_inside": nms_inside}
    assert_same(model, exported, about)


def test_a_detector_of_one_input_size_gets_that_size_and_its_padding(tmp_path):
    cfg = tiny_cfg()
    cfg.MODEL.META_ARCHITECTURE = "FixedSize"
    model = detector(cfg)
    about = deploy.describe(cfg, model)
    assert about["input_size"] == [64, 96]
    assert deploy.resized(photo(50, 50), about).shape == (64, 96, 3)
    path = str(tmp_path / "a.pt")
    deploy.export(model, about, path, photo(64, 96))
    exported = deploy.ExportedDetector(path)
    assert_same(model, exported, about)
    # An evaluation's mapper may resize in another way. The boxes still fit its image.
    image = torch.as_tensor(photo(128, 96).transpose(2, 0, 1).copy())
    found = exported([{"image": image}])[0]["instances"]
    expected = deploy.detect(exported, about, photo(128, 96))
    assert found.image_size == (128, 96) and len(found) == len(expected) > 0
    assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)


def test_padding_has_the_value_that_the_view_says():
    cfg = tiny_cfg()
    cfg.MODEL.META_ARCHITECTURE, seen = "FixedSize", []
    deployable = deploy.Deployable(detector(cfg))
    hook = lambda _, args: seen.append(args[0])  # noqa: E731
    deployable.detector.backbone.register_forward_pre_hook(hook)
    deployable(torch.from_numpy(photo(50, 60)))
    assert seen[0].shape[2] > 50 and seen[0].shape[3] > 60
    assert (seen[0][:, :, 50:] == 0.5).all() and (seen[0][:, :, :, 60:] == 0.5).all()


def test_a_detector_that_pads_to_a_square_is_deployed_so(monkeypatch):
    model, about = variant("RetinaNet")
    monkeypatch.setattr(RetinaNetView, "square_size", 96)
    deployable, seen = deploy.Deployable(model), []
    model.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    deployable(torch.from_numpy(photo(50, 60)))
    assert seen == [(1, 3, 96, 96)]
    with pytest.raises(deploy.DeployError, match="INPUT.MAX_SIZE_TEST is 1333: set it to 96"):
        deploy.describe(tiny_cfg(), model)


def test_images_that_are_neither_rgb_nor_grey_are_refused_at_the_start():
    cfg = grey_cfg()
    cfg.INPUT.FORMAT = "BGR"
    with pytest.raises(deploy.DeployError, match="takes images of 1 channels in the format BGR"):
        deploy.Deployable(detector(cfg))


def test_an_image_without_detections_gives_none():
    cfg = tiny_cfg()
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 1.0
    boxes, scores, classes = deploy.Deployable(detector(cfg))(torch.from_numpy(photo(40, 40)))
    assert boxes.shape == (0, 4) and scores.shape == classes.shape == (0,)


def test_suppress_keeps_classes_apart_and_boxes_beyond_the_border():
    box = [-50.0, -50.0, 10.0, 10.0]
    boxes = torch.tensor([box, box, box, [-50.0, -50.0, 9.0, 9.0]])
    scores, classes = torch.tensor([0.5, 0.9, 0.04, 0.8]), torch.tensor([0, 1, 2, 1])
    found = deploy.suppress(boxes, scores, classes, score=0.05, iou=0.5, limit=9)
    assert found[1].tolist() == pytest.approx([0.9, 0.5])
    assert found[2].tolist() == [1, 0]


@pytest.mark.parametrize("mode", ("static", "dynamic"))
@pytest.mark.slow
def test_int8_is_smaller_and_detects_about_the_same(mode, onnx_file, tmp_path):
    model, about, source = onnx_file
    output = tmp_path / "int8.onnx"
    images = [photo(64, 64, seed) for seed in range(3)] if mode == "static" else None
    deploy.quantize(source, str(output), images)
    assert output.stat().st_size < 0.6 * Path(source).stat().st_size
    assert list(tmp_path.iterdir()) == [output]
    quantized = deploy.ExportedDetector(str(output))
    assert quantized.about["categories"] == about["categories"]
    image = photo(72, 90)
    a, b = (deploy.detect(m, about, image) for m in (model, quantized))
    assert abs(len(a) - len(b)) <= 0.2 * len(a)
    assert (a.scores[:5] - b.scores[:5]).abs().max() < 0.1


def test_int8_that_is_interrupted_leaves_the_file_that_was_there(onnx_file, tmp_path, monkeypatch):
    quantization = pytest.importorskip("onnxruntime.quantization")
    output = tmp_path / "int8.onnx"
    output.write_text("the last one")

    def interrupted(_, path, **options):
        Path(path).write_text("half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(quantization, "quantize_dynamic", interrupted)
    with pytest.raises(KeyboardInterrupt):
        deploy.quantize(onnx_file[2], str(output))
    assert output.read_text() == "the last one"
    assert list(tmp_path.iterdir()) == [output]


def test_agreement_sees_a_detector_that_differs():
    model, about = variant("RetinaNet")
    other = detector(tiny_cfg())
    other.input_format = "BGR"
    found = deploy.agreement(model, other, about, [photo(72, 90)])
    assert found.partners < 0.99 or found.score > 1e-3


def test_categories_are_those_of_the_data_with_their_ids(coco, tmp_path):
    content = json.loads(Path(coco[0]).read_text())
    content["categories"] = [{"id": 9, "name": "nine"}, {"id": 4, "name": "four"}]
    path = tmp_path / "own.json"
    path.write_text(json.dumps(content))
    cfg = tiny_cfg()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TRAIN_JSON = ("own",), str(path)
    model, _ = variant("RetinaNet")
    about = deploy.describe(cfg, model)
    assert about["categories"] == [{"id": 4, "name": "four"}, {"id": 9, "name": "nine"}]
    assert about["input_size"] is None
    found = Instances((40, 40))
    found.pred_boxes = Boxes(torch.tensor([[1.0, 2.0, 4.0, 8.0], [0.0, 0.0, 9.0, 9.0]]))
    found.scores, found.pred_classes = torch.tensor([0.5, 0.25]), torch.tensor([1, 0])
    assert deploy.coco_results(found, [4, 9], 17) == [
        {"image_id": 17, "category_id": 9, "bbox": [1, 2, 3, 6], "score": 0.5},
        {"image_id": 17, "category_id": 4, "bbox": [0, 0, 9, 9], "score": 0.25},
    ]


@pytest.mark.parametrize("content", (None, {"categories": [{"id": 9, "name": "nine"}]}))
def test_ids_that_the_data_do_not_give_are_not_made_up(content, tmp_path, caplog):
    path, model = tmp_path / "own.json", detector(tiny_cfg())
    if content:
        path.write_text(json.dumps(content))
    cfg = tiny_cfg()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TRAIN_JSON = ("own",), str(path)
    with pytest.raises(
        deploy.DeployError, match="own.json does not exist|1 categories for 2 classes"
    ):
        deploy.describe(cfg, model)
    with caplog.at_level("WARNING", logger="fgbg_kd"):
        about = deploy.describe(cfg, model, need_ids=False)
    assert [c["name"] for c in about["categories"]] == ["class 0", "class 1"]
    assert "COCO ids are not known" in caplog.text


def test_a_registered_set_gives_its_ids_and_one_without_names_is_refused(tmp_path):
    cfg, model = tiny_cfg(), detector(tiny_cfg())
    metadata = MetadataCatalog.get(f"{tmp_path}_own")
    cfg.DATASETS.TRAIN = (metadata.name,)
    with pytest.raises(deploy.DeployError, match="own is not registered with class names"):
        deploy.describe(cfg, model)
    metadata.set(thing_classes=["cat", "dog"])
    expected = [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}]
    assert deploy.describe(cfg, model)["categories"] == expected
    metadata.set(thing_dataset_id_to_contiguous_id={3: 1, 7: 0})
    expected = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]
    assert deploy.describe(cfg, model)["categories"] == expected


def test_the_test_file_does_not_name_the_classes_in_place_of_a_lost_training_file(coco, tmp_path):
    cfg = tiny_cfg(coco)
    model = detector(cfg)
    cfg.DATASETS.TEST_JSON = coco[0]
    cfg.DATASETS.TRAIN_JSON = str(tmp_path / "lost.json")
    with pytest.raises(deploy.DeployError, match="lost.json does not exist"):
        deploy.describe(cfg, model)
    names = [c["name"] for c in deploy.describe(cfg, model, need_ids=False)["categories"]]
    assert names == ["class 0", "class 1"]


@pytest.mark.slow
def test_a_file_is_checked_on_test_images_without_the_training_images(coco, tmp_path):
    cfg = tiny_cfg(coco, "without_training_images")
    torch.save({"model": detector(cfg).state_dict()}, tmp_path / "student.pth")
    cfg.DATASETS.TEST, (cfg.DATASETS.TEST_JSON, cfg.DATASETS.TEST_IMAGES) = ("export_test",), coco
    cfg.DATASETS.TRAIN_IMAGES = "nowhere"
    (tmp_path / "student.yaml").write_text(cfg.dump())
    files = str(tmp_path / "student.yaml"), str(tmp_path / "student.pth"), tmp_path / "student.pt"
    deploy.export_files(*files, say=lambda text: None)
    assert files[2].is_file()


@pytest.mark.slow
def test_a_good_file_stays_until_the_new_one_is_checked(tmp_path, monkeypatch):
    (model, about), file = variant("RetinaNet"), tmp_path / "a.pt"
    file.write_bytes(b"good")
    write = lambda m: deploy.export_checked(m, about, file, [photo(64, 64)])  # noqa: E731
    cfg = tiny_cfg()
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 1.0
    with pytest.raises(deploy.DeployError, match="not written: .* cannot be checked.* --images"):
        write(detector(cfg))
    with monkeypatch.context() as patch:
        patch.setattr(checks, "agreement", lambda *_: deploy.Agreement(9, 0.5, 0.0, 0.0))
        with pytest.raises(deploy.DeployError, match="only 50.00% of its detections"):
            write(model)
    assert file.read_bytes() == b"good"
    write(model)
    assert deploy.ExportedDetector(str(file)).about["categories"] == about["categories"]
    assert list(tmp_path.iterdir()) == [file]
    file.unlink(), file.mkdir()
    with pytest.raises(deploy.DeployError, match="is a folder"):
        write(model)


def test_boxes_are_in_the_pixels_of_the_image_that_is_given():
    _, about = variant("RetinaNet")
    seen = []

    def run(image):
        seen.append(image.shape)
        return [np.float32([[10, 20, 30, 40]]), np.float32([0.9]), np.int64([0])]

    exported = from_function(run, {**about, "nms_inside": True})
    found = deploy.detect(exported, about, photo(128, 160))
    assert seen == [(64, 80, 3)]
    assert found.image_size == (128, 160)
    assert found.pred_boxes.tensor.tolist() == [[20, 40, 60, 80]]


def test_files_of_another_origin_are_refused_with_the_reason(tmp_path):
    torn, other = tmp_path / "torn.pt", tmp_path / "other.pt"
    torn.write_bytes(b"no TorchScript")
    torch.jit.save(torch.jit.trace(torch.nn.Identity(), torch.zeros(1)), str(other))
    for path, reason in (
        (tmp_path / "gone.onnx", "no such file"),
        (torn, "cannot be read"),
        (other, "tools/export.py"),
    ):
        with pytest.raises(deploy.DeployError, match=reason):
            deploy.ExportedDetector(str(path))
    with pytest.raises(deploy.DeployError, match="in .pt"):
        deploy.export(*variant("RetinaNet"), str(tmp_path / "a.bin"), photo(64, 64))


def test_what_cannot_be_deployed_is_refused(teacher_files, tmp_path):
    config = tmp_path / "student.yaml"
    config.write_text(tiny_cfg().dump())
    with pytest.raises(CheckpointError, match="is not a checkpoint of"):
        deploy.load_for_deployment(str(config), teacher_files[1])
    with pytest.raises(deploy.DeployError, match="Only a YAML config can be deployed"):
        deploy.load_for_deployment("lazy.py", "")
