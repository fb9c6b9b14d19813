"""The configs of the quickstart, the cost in its table, and its picture."""

import sys

import pytest
import torch
from conftest import ROOT, make_batch, tiny_cfg
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from fvcore.nn import FlopCountAnalysis

from fgbg_kd import get_fgbg_kd_cfg, student_config
from fgbg_kd.data import register_datasets
from fgbg_kd.detectors import DenseView, register_view
from fgbg_kd.detectors.load import load_detector
from fgbg_kd.experiments import side_by_side
from fgbg_kd.experiments.cost import cost, table
from fgbg_kd.experiments.drawing import draw_boxes
from fgbg_kd.experiments.side_by_side import draw_side_by_side, read_input
from fgbg_kd.utils.errors import CheckpointError


def read_config(name):
    cfg = get_fgbg_kd_cfg()
    cfg.merge_from_file(str(ROOT / "configs" / "quickstart" / f"{name}.yaml"))
    cfg.MODEL.DEVICE, cfg.MODEL.TIMM.WEIGHTS = "cpu", ""
    return cfg


@pytest.mark.parametrize("name", ["digits", "scenes", "trees"])
@pytest.mark.slow
def test_the_quickstarts_three_configs_fit_together(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # paths in the configs are relative to it
    teacher, student, distilled = (
        read_config(f"{name}_{role}") for role in ("teacher", "student", "distilled")
    )
    weights = tmp_path / "teacher.pth"
    torch.save({"model": build_model(teacher).state_dict()}, weights)
    distilled.MODEL.KD.TEACHER.WEIGHTS = str(weights)
    model = build_model(distilled).train()
    plain = build_model(student)
    assert model.student.state_dict().keys() == plain.state_dict().keys()
    ignored = ("META_ARCHITECTURE", "KD")
    alone = student_config(distilled)
    assert {k: v for k, v in alone.MODEL.items() if k not in ignored} == {
        k: v for k, v in student.MODEL.items() if k not in ignored
    }
    assert alone.SOLVER == student.SOLVER and alone.INPUT == student.INPUT
    with EventStorage(0):
        losses = model(make_batch(boxes=(((5, 5, 30, 40),), ())))
    assert all(v.isfinite() for v in losses.values()) and losses["loss_kd_fg"] > 0


class TwoConvolutions(torch.nn.Module):
    """A 1x1 backbone from 3 to 4 channels, and a 1x1 head from 4 to 2 channels, on all pixels."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(4, 2, 1)

    def preprocess_image(self, inputs):
        return ImageList.from_tensors([x["image"].float() for x in inputs])

    def forward(self, inputs):
        return self.head(self.backbone(self.preprocess_image(inputs).tensor))


@register_view(TwoConvolutions)
class TwoConvolutionsView(DenseView):
    def features(self, images):
        return [self.detector.backbone(images)]

    def head(self, features):
        return [self.detector.head(x) for x in features]


def test_cost_counts_a_convolution_by_hand():
    got = cost(TwoConvolutions(), {"image": torch.zeros(3, 64, 64)}, runs=2)
    assert got["gflops"] == round((3 * 4 + 4 * 2) * 64 * 64 / 1e9, 4)
    assert got["parameters_m"] == round((3 * 4 + 4 + 4 * 2 + 2) / 1e6, 3)
    assert got["ms_per_image"] > 0


def test_a_distilled_checkpoint_costs_and_loads_as_the_plain_student(coco, distil_cfg, tmp_path):
    model = build_model(distil_cfg)
    torch.save({"model": model.student.state_dict()}, tmp_path / "s.pth")
    distil_cfg.MODEL.TIMM.WEIGHTS = str(tmp_path / "not_here.pth")  # the checkpoint has the weights
    loaded = load_detector(distil_cfg, str(tmp_path / "s.pth"))
    assert type(loaded) is type(model.student) and not loaded.training
    plain = build_model(tiny_cfg()).eval()
    example = make_batch()[0]
    a, b = cost(loaded, example, runs=1), cost(plain, example, runs=1)
    assert a["parameters_m"] == b["parameters_m"] and a["gflops"] == b["gflops"] > 0
    distil_cfg.MODEL.FPN.OUT_CHANNELS = 24
    with pytest.raises(CheckpointError, match="another shape in the model: backbone.fpn_") as error:
        load_detector(distil_cfg, str(tmp_path / "s.pth"))
    assert "missing" not in str(error.value) and "eacher" not in str(error.value)


def test_the_picture_has_a_panel_each(coco):
    cfg = tiny_cfg(coco)
    register_datasets(cfg)
    model = build_model(cfg).eval()
    record = DatasetCatalog.get(cfg.DATASETS.TEST[0])[3]
    models = {"a": (cfg, model), "b": (cfg, model)}
    picture = draw_side_by_side(cfg, record, models, score=0.5, width=100)
    assert picture.ndim == 3 and picture.shape[1] == 3 * (100 + 4)
    assert (picture[:22] == 0).any()  # the titles
    bare = {key: value for key, value in record.items() if key != "annotations"}
    assert draw_side_by_side(cfg, bare, models, score=0.5, width=100).shape == picture.shape
    inputs = read_input(cfg, record["file_name"])
    assert inputs["image"].shape[0] == 3 and min(inputs["image"].shape[1:]) == 64


def test_the_picture_has_the_best_of_overlapping_detections(coco, monkeypatch):
    cfg = tiny_cfg(coco)
    register_datasets(cfg)
    record = DatasetCatalog.get(cfg.DATASETS.TEST[0])[3]
    found = Instances((64, 64))
    found.pred_boxes = Boxes(torch.tensor([[2.0, 2, 30, 30], [3, 2, 30, 30], [40, 40, 60, 60]]))
    found.scores, found.pred_classes = torch.tensor([0.6, 0.9, 0.7]), torch.tensor([0, 1, 0])
    drawn = []
    monkeypatch.setattr(
        side_by_side, "draw_boxes", lambda *a, **k: (drawn.append(a), draw_boxes(*a, **k))[1]
    )
    draw_side_by_side(cfg, record, {"a": (cfg, lambda _: [{"instances": found}])}, score=0.5)
    (_, truth, *_), (_, _, numbers, *_) = drawn
    assert len(truth) == 3 and numbers.tolist() == [1, 0]


def test_the_table_is_markdown_with_a_line_a_row():
    rows = [{"name": "a", "gflops": 1.0}, {"name": "b", "gflops": 2.0, "AP": 3}]
    head, _, *lines = ([c.strip() for c in x.split("|")[1:-1]] for x in table(rows).splitlines())
    assert head == ["name", "GFLOPs", "AP"]
    assert lines == [["a", "1.0", ""], ["b", "2.0", "3"]]


@pytest.mark.slow
def test_analyze_shows_teacher_student_and_their_ratio(distil_cfg, tmp_path, monkeypatch, capsys):
    import analyze

    config = tmp_path / "distilled.yaml"
    distil_cfg.MODEL.KD.TEACHER.WEIGHTS = ""  # no weights are needed
    config.write_text(distil_cfg.dump())
    monkeypatch.setattr(
        sys, "argv", ["analyze.py", str(config), "--size", "64", "80", "--runs", "1"]
    )
    analyze.main()
    lines = [x for x in capsys.readouterr().out.splitlines() if "|" in x]
    rows = [[cell.strip() for cell in x.split("|")[1:-1]] for x in lines]
    head, _, teacher, student, ratio = rows
    assert head == ["name", "parameters (M)", "GFLOPs", "ms / image"]
    assert teacher[0] == f"teacher of {config}" and student[0] == f"student of {config}"
    plain = cost(build_model(tiny_cfg()).eval(), make_batch()[0], runs=1)  # also 64 x 80
    assert student[1:3] == [str(plain["parameters_m"]), str(plain["gflops"])]
    for i in (1, 2):
        assert float(teacher[i]) > float(student[i])
        assert ratio[i] == f"{float(student[i]) / float(teacher[i]):.2f}"


def test_analyze_says_that_a_device_is_not_there(monkeypatch, capsys):
    import analyze

    monkeypatch.setattr(sys, "argv", ["analyze.py", "absent.yaml", "--device", "cuda:99"])
    with pytest.raises(SystemExit):
        analyze.main()
    assert "error: --device cuda:99: " in capsys.readouterr().err


@pytest.mark.slow
def test_a_two_stage_detector_costs_backbone_and_rpn(tmp_path, monkeypatch, capsys):
    import analyze
    from detectron2 import model_zoo

    cfg = model_zoo.get_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
    cfg.MODEL.DEVICE, cfg.MODEL.FPN.OUT_CHANNELS = "cpu", 16
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    config = tmp_path / "rcnn.yaml"
    config.write_text(cfg.dump())
    arguments = [str(config), "--size", "64", "64", "--runs", "1", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["analyze.py", *arguments])
    analyze.main()
    text = capsys.readouterr().out
    assert "backbone and RPN" in text
    gflops = float(text.splitlines()[4].split(" | ")[2])
    # RPN: a 3x3 convolution of 16 channels, then scores and boxes of 3 anchors, on P2 to P6.
    rpn = (16 * 16 * 9 + 16 * 3 * 5) * (16**2 + 8**2 + 4**2 + 2**2 + 1) / 1e9
    with torch.no_grad():
        rest = FlopCountAnalysis(_Features(build_model(cfg).eval()), torch.zeros(1, 3, 64, 64))
        assert gflops == pytest.approx(rest.total() / 1e9 + rpn, abs=6e-5)


class _Features(torch.nn.Module):
    def __init__(self, detector):
        super().__init__()
        self.backbone = detector.backbone

    def forward(self, images):
        return list(self.backbone(images).values())
