"""The pictures show the terms of the losses."""

import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from conftest import detector, distiller, faster_rcnn, make_batch, tiny_cfg
from detectron2.modeling import build_model
from detectron2.structures import Instances

from fgbg_kd.experiments import cell_maps as cell_maps_module
from fgbg_kd.experiments import drawing
from fgbg_kd.experiments.angle_and_kl import Vectors, collect
from fgbg_kd.experiments.cell_maps import cell_maps, fit_adapters, load_student, run_both
from fgbg_kd.experiments.drawing import confident, draw_panels
from fgbg_kd.matching import SharedLevel
from fgbg_kd.methods import Batch, DenseOutput
from fgbg_kd.ops import compare_features
from fgbg_kd.utils.errors import CheckpointError, FgBgError

OPTIONS = [
    {},  # random weights: cosine
    {"fg_loss": "mse"},
    {"kl": "softmax", "temperature": 2.0},
    {"assign": "all"},
    {"gate": False},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.slow
def test_the_maps_are_those_of_the_losses(distil_cfg, options):
    for key, value in options.items():
        distil_cfg.MODEL.KD.FGBG[key.upper()] = value
    torch.manual_seed(1)
    model = build_model(distil_cfg).eval()
    inputs = make_batch()[0]
    maps = cell_maps(model, inputs)
    batch, cells = run_both(model, inputs), maps.cells
    losses, shares = model.method(batch)
    foreground, background = cells.foreground, cells.background
    if model.method.assign == "teacher":
        cells = cells.weighted(model.method.compare(batch, cells).teacher_quality)
    kd = distil_cfg.MODEL.KD.FGBG
    gate = (foreground | background).float() if options.get("gate") is False else maps.gate
    weight = cells.weight / cells.weight.sum()
    features = [phi(f) for phi, f in zip(model.method.adapters, batch.student.features)]
    distance = compare_features(features, batch.teacher.features, cells.real, cells.real).distance
    error = distance if options.get("fg_loss") == "mse" else 1 - maps.cosine
    fg = (weight * gate * error).sum()
    torch.testing.assert_close(kd.FG_WEIGHT * fg, losses["loss_kd_fg"])
    bg = (background * gate * (1 - maps.cosine)).sum() / background.sum()
    mean_gate = shares["kd/fg_gate"]
    both_retinanet = 32 * mean_gate * bg
    torch.testing.assert_close(both_retinanet, losses["loss_kd_bg_features"])
    torch.testing.assert_close(mean_gate * maps.kl.sum() / foreground.sum(), losses["loss_kd_bg"])
    torch.testing.assert_close((weight * gate).sum(), shares["kd/fg_gate"])
    assert 0 < maps.gate.mean() < 1  # a gate that is off shows where it would be open
    assert "gate" in drawing._columns({"student": maps})


def test_a_teacher_without_predictions_has_split_and_cosine_only(distil_cfg):
    model = distiller(build_model(tiny_cfg()), faster_rcnn())
    maps = cell_maps(model, make_batch()[0])
    assert maps.gate is None and maps.kl is None and maps.cosine.abs().max() > 0
    assert list(drawing._columns({"student": maps})) == ["split", "cosine, student"]


@pytest.mark.slow
def test_each_cell_is_drawn_where_it_is(distil_cfg):
    model = build_model(distil_cfg).eval()
    inputs = make_batch(sizes=((64, 80),), boxes=(((5, 5, 30, 40),),))[0]
    maps = cell_maps(model, inputs)
    (h, w), *_ = maps.cells.level_shapes
    assert h * 8 == 64 and w * 8 > 80  # padded

    def picture(*cells):
        gate = torch.zeros_like(maps.gate)
        gate[0, list(cells)] = 1
        return draw_panels(inputs, "BGR", {"student": maps._replace(gate=gate)}, {}).astype(int)

    closed = picture()

    def turned_orange(*cells):
        """The box around the pixels that change when the gate opens in these cells."""
        change = picture(*cells) - closed
        y, x = np.nonzero((change[..., 0] > 100) & (change[..., 2] < -60))
        return np.array([x.min(), y.min(), x.max() + 1, y.max() + 1])

    level = turned_orange(*range(h * w))  # of stride 8: the panel's 80 x 64 pixels of the image
    cell = turned_orange(1 * w + 7)  # x 56..64, y 8..16
    scale = (level[2] - level[0]) / 80
    pixels = (cell - np.tile(level[:2], 2)) / scale
    np.testing.assert_allclose(pixels, [56, 8, 64, 16], atol=1)


def test_a_two_stage_teacher_with_other_classes_is_not_drawn():
    inputs = make_batch(sizes=((64, 80),), boxes=(((5, 5, 30, 40),),))[0]
    model = distiller(detector(), faster_rcnn()).eval()
    assert model.teacher.detector.roi_heads.num_classes == 80
    assert drawing.confident_teacher(model, inputs, "BGR") == {}
    model.teacher.detector.roi_heads.num_classes = 2
    monkey = Instances((64, 80))
    monkey.scores = torch.ones(1)
    model.teacher.detector.forward = lambda _: [{"instances": monkey}]
    assert len(drawing.confident_teacher(model, inputs, "BGR")["teacher"]) == 1


def test_fitted_adapters_find_the_linear_map(monkeypatch):
    torch.manual_seed(0)
    true = torch.nn.Conv2d(3, 5, 1)
    features = torch.randn(4, 3, 8, 8)
    batches = [
        Batch(
            student=DenseOutput([f[None]]),
            teacher=DenseOutput([true(f[None])]),
            gt_boxes=[torch.tensor([[0.0, 0, 40, 64]])],
            gt_classes=[torch.tensor([0])],
            image_sizes=[(64, 64)],
            strides=[8],
            num_classes=2,
        )
        for f in features
    ]
    monkeypatch.setattr(cell_maps_module, "run_both", lambda _, number: batches[number])
    fake = SimpleNamespace(levels=[SharedLevel(8, (0, 0), (3, 5))], device=torch.device("cpu"))
    (phi,) = fit_adapters(fake, range(4))
    torch.testing.assert_close(phi.weight, true.weight, atol=0.01, rtol=0)
    torch.testing.assert_close(phi.bias, true.bias, atol=0.01, rtol=0)


def test_a_plain_student_gets_adapters_and_a_distilled_one_keeps_its_own(tmp_path, distil_cfg):
    model = build_model(distil_cfg).eval()
    other = build_model(distil_cfg).eval()
    torch.save({"model": other.student.state_dict()}, tmp_path / "plain.pth")
    method = {k: v + 1 for k, v in other.method.state_dict().items()}
    torch.save({"model": other.student.state_dict(), "method": method}, tmp_path / "distilled.pth")
    fitted = load_student(model, str(tmp_path / "plain.pth"), make_batch()[:1])
    plain = model.student
    assert load_student(model, str(tmp_path / "plain.pth"), None) is None  # no maps, no adapters
    own = load_student(model, str(tmp_path / "distilled.pth"), [])
    assert torch.equal(own[0].weight, method["adapters.0.weight"])
    assert not torch.equal(fitted[0].weight, own[0].weight)
    for key, value in other.student.state_dict().items():
        assert torch.equal(plain.state_dict()[key], value)
    wide = detector(edit=lambda cfg: setattr(cfg.MODEL.FPN, "OUT_CHANNELS", 24))
    without = distiller(build_model(tiny_cfg()), wide, name="QFL")  # it has no adapters
    torch.save({"model": without.student.state_dict(), "method": {}}, tmp_path / "qfl.pth")
    found = load_student(without, str(tmp_path / "qfl.pth"), make_batch()[:1])
    assert len(found) == len(without.levels)
    torch.save({"model": faster_rcnn().state_dict()}, tmp_path / "rcnn.pth")
    with pytest.raises(CheckpointError, match=r"not a checkpoint of this RetinaNet:\s+\d+ missing"):
        load_student(model, str(tmp_path / "rcnn.pth"), [])


def test_a_detector_of_the_other_channel_order_gets_its_own():
    model = build_model(tiny_cfg()).eval()
    image = make_batch()[0]["image"]
    seen = []
    model.preprocess_image, keep = (
        (lambda x: seen.append(x[0]["image"]) or keep(x)),
        (model.preprocess_image),
    )
    confident(model, {"image": image}, "BGR")
    confident(model, {"image": image.flip(0)}, "RGB")
    assert torch.equal(seen[0], image) and torch.equal(seen[1], image)


def test_the_most_telling_cell_has_the_largest_angle_among_the_smallest_kl(distil_cfg):
    kl = torch.arange(100.0)
    angle = torch.zeros(100)
    angle[[1, 50]] = torch.tensor([80.0, 120.0])
    assert Vectors([], [], kl, angle, []).most_telling() == 1
    model = build_model(distil_cfg).eval()
    vectors = collect(model, make_batch(), model.method.adapters)
    i = vectors.most_telling()
    s, t = vectors.student[i].double(), vectors.teacher[i].double()
    expected = (t.softmax(0) * (t.softmax(0) / s.softmax(0)).log()).sum()
    assert abs(vectors.kl[i] - expected) < 1e-5
    assert (
        abs(np.cos(np.deg2rad(float(vectors.angle[i]))) - float(s @ t / s.norm() / t.norm())) < 1e-5
    )
    number, stride, y, x = vectors.place[i]
    assert number == 0  # image 1 has no object
    assert (
        run_both(model, make_batch()[0])
        .teacher.features[int(np.log2(stride)) - 3][0, :, y, x]
        .allclose(vectors.teacher[i])
    )
    with pytest.raises(ValueError, match="None of the images has an object"):
        collect(model, make_batch()[1:], model.method.adapters)


def run_tool(monkeypatch, tmp_path, cfg, *arguments):
    import visualize

    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("seen_train",), ("seen_test",)
    (tmp_path / "distilled.yaml").write_text(cfg.dump())
    config = ["--config-file", str(tmp_path / "distilled.yaml")]
    monkeypatch.setattr(sys, "argv", ["visualize.py", *config, *arguments])
    visualize.main()


@pytest.mark.slow
def test_the_tool_draws_files_of_a_registered_set(tmp_path, monkeypatch, distil_cfg):
    torch.save({"model": build_model(tiny_cfg()).state_dict()}, tmp_path / "plain.pth")
    weights, output = str(tmp_path / "plain.pth"), tmp_path / "out"
    distil_cfg.MODEL.TIMM.WEIGHTS = str(
        tmp_path / "not_here.pth"
    )  # the checkpoints have the weights
    also = ["--weights", weights, "--output", str(output)]
    also_before = [*also, "--before", weights, "--image", "3.png", "MODEL.KD.FGBG.GATE", "False"]
    run_tool(monkeypatch, tmp_path, distil_cfg, *also_before)
    run_tool(monkeypatch, tmp_path, distil_cfg, *also, "--count", "1", "--set", "seen_train")
    assert sorted(p.name for p in output.iterdir()) == ["1.png", "3.png"]
    two, one = (cv2.imread(str(output / name)) for name in ("3.png", "1.png"))
    assert two.shape[1] > one.shape[1]  # a column for each student
    file = tmp_path / "angle.png"
    run_tool(monkeypatch, tmp_path, distil_cfg, "--weights", weights, "--angle-and-kl", str(file))
    assert cv2.imread(str(file)) is not None
    file, also_plain = tmp_path / "found.jpg", ["--weights", weights, "--before", weights]
    both = [*also_plain, "--count", "2", "--detections", str(file)]
    run_tool(monkeypatch, tmp_path, distil_cfg, *both)
    panels, rows = 4, 2
    height, width = cv2.imread(str(file)).shape[:2]
    assert width == panels * (320 + 4) and height > rows * 100
    for arguments, message in (
        (["--image", "absent.png"], "absent.png is not in the set seen_test"),
        (["--set", "absent"], "There is no set 'absent': choose from seen_train, seen_test"),
        (["MODEL.META_ARCHITECTURE", "RetinaNet"], "does not distil"),
        (["DATASETS.TEST", "()", "DATASETS.TEST_JSON", "", "DATASETS.TEST_IMAGES", ""], "--set"),
        (["--config-file", "absent.py"], "there is no such config"),
        (["--output", weights], "File exists"),
    ):
        with pytest.raises((FgBgError, FileExistsError), match=message):
            run_tool(monkeypatch, tmp_path, distil_cfg, *also, *arguments)
    with pytest.raises(FgBgError, match="ends in .png"):
        run_tool(monkeypatch, tmp_path, distil_cfg, *also[:2], "--angle-and-kl", "a.txt")


def test_images_of_one_name_get_a_picture_each():
    from fgbg_kd.experiments.visualize import path_of_its_own

    folder, drawn = Path("out"), set()
    for file in ("a/1.png", "b/1.jpg", "c/1.png"):
        drawn.add(path_of_its_own(folder, file, drawn))
    assert drawn == {folder / name for name in ("1.png", "1_2.png", "1_3.png")}
