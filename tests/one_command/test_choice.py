"""What the student takes from its teacher, and which candidate is taken."""

import dataclasses
import json
import sys
from operator import attrgetter

import numpy as np
import pytest
import torch
import yaml
from conftest import (
    detector,
    faster_rcnn,
    faster_rcnn_cfg,
    losses_of,
    make_batch,
    tiny_cfg,
    tiny_ssd,
    tiny_ssd_cfg,
    tiny_yolo_cfg,
)
from detectron2.config import CfgNode
from detectron2.data.detection_utils import build_augmentation
from detectron2.modeling import build_model

from fgbg_kd import Teacher
from fgbg_kd.config import get_fgbg_kd_cfg
from fgbg_kd.detectors.dense import view
from fgbg_kd.detectors.load import build_detector, read_detector_config
from fgbg_kd.matching import same_anchors, shared_levels
from fgbg_kd.one_command import measure
from fgbg_kd.one_command.choose import RUNTIMES, Wish, choose, refined, table, verdict
from fgbg_kd.one_command.measure import image_size, measured
from fgbg_kd.one_command.students import (
    CANDIDATES,
    Candidate,
    Setting,
    candidate_of,
    candidates_for,
    config_of,
    finer,
    model_settings,
    spoken,
    yaml_of,
)
from fgbg_kd.one_command.teacher_facts import facts_of
from fgbg_kd.utils.config_files import merge_yaml
from fgbg_kd.utils.errors import ConfigError

SMALL = Candidate("test_resnet", 32, 1)
PYTHON_TEACHER = """
from detectron2.config import LazyCall as L
from detectron2.data.transforms import ResizeShortestEdge

def loader(resize):
    return {"mapper": {"augmentations": [resize]}}

dataloader = {
    "train": loader(
        L(ResizeShortestEdge)(short_edge_length=(64, 96), sample_style="range", max_size=160)
    ),
    "test": loader(L(ResizeShortestEdge)(short_edge_length=[80, 80], max_size=128)),
}
model = {}
"""


def facts(tmp_path, cfg, model):
    path = tmp_path / "teacher.yaml"
    path.write_text(cfg.dump())
    return facts_of(str(path), Teacher(model.eval()))


def student_of(found):
    return view(build_detector(config_of(model_settings(found, SMALL, 2))))


def test_a_retinanet_gets_a_retinanet_with_its_levels_anchors_and_sizes(tmp_path):
    cfg, teacher = tiny_cfg(), detector()
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST, cfg.INPUT.RANDOM_FLIP = 0.3, "none"
    found = facts(tmp_path, cfg, teacher)
    student = student_of(found)
    assert student.name == "RetinaNet" and [x.stride for x in student.levels] == [8, 16, 32]
    levels = shared_levels(student, view(teacher))
    assert len(levels) == 3 and same_anchors(student, view(teacher), levels)
    assert student.suppression["score"] == 0.3
    made = config_of(model_settings(found, SMALL, 2))
    assert made.INPUT.MIN_SIZE_TEST == 64 and made.INPUT.RANDOM_FLIP == "none"


def test_anchors_that_the_config_does_not_name_are_read_from_the_detector(tmp_path):
    teacher = detector()
    found = facts(tmp_path, get_fgbg_kd_cfg(), teacher)  # Detectron2's default anchors
    assert found.own_anchors
    for mine, theirs in zip(student_of(found).cell_anchors, view(teacher).cell_anchors):
        assert mine.allclose(theirs, atol=1e-2)


def test_one_anchor_per_cell_and_an_offset_are_taken_from_a_retinanet(tmp_path):
    cfg = tiny_cfg()
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[12], [24], [48]]
    cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [[1.0]]
    cfg.MODEL.ANCHOR_GENERATOR.OFFSET = 0.5
    teacher = build_detector(cfg)
    student = student_of(facts(tmp_path, cfg, teacher))
    levels = shared_levels(student, view(teacher))
    assert student.cell_anchors[1].tolist() == [[-12, -12, 12, 12]]
    assert same_anchors(student, view(teacher), levels)
    cfg.MODEL.ANCHOR_GENERATOR.OFFSET = 0.0
    assert not same_anchors(student, view(build_detector(cfg)), levels)


def test_limits_and_sampling_of_the_teacher_are_taken(tmp_path):
    cfg = tiny_cfg()
    cfg.TEST.DETECTIONS_PER_IMAGE, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = 500, False
    cfg.DATALOADER.SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
    cfg.DATALOADER.REPEAT_THRESHOLD = 0.5
    found = facts(tmp_path, cfg, detector())
    made = config_of(model_settings(found, SMALL, 2))
    for key in found.further:
        assert attrgetter(key)(made) == attrgetter(key)(cfg) != attrgetter(key)(get_fgbg_kd_cfg())
    assert len(found.further) == 4
    assert facts(tmp_path, get_fgbg_kd_cfg(), detector()).further == {}


def test_limits_of_a_python_teacher_are_taken(tmp_path):
    teacher = build_detector(tiny_cfg())
    teacher.max_detections_per_image = 300
    text = PYTHON_TEACHER + 'dataloader["train"]["dataset"] = {"filter_empty": False}'
    (tmp_path / "teacher.py").write_text(text)
    found = facts_of(str(tmp_path / "teacher.py"), Teacher(teacher.eval()))
    assert found.further == {
        "DATALOADER.FILTER_EMPTY_ANNOTATIONS": False,
        "TEST.DETECTIONS_PER_IMAGE": 300,
    }


def test_an_fcos_gets_an_fcos_without_anchor_keys(tmp_path):
    found = facts(tmp_path, tiny_cfg(), detector("FCOS"))
    assert found.anchors == {}
    settings = {s.key: s.value for s in model_settings(found, SMALL, 2)}
    assert settings["MODEL.FCOS.INITIAL_DISTANCE"] == 1.0
    assert student_of(found).name == "FCOS"


@pytest.mark.parametrize(
    "cfg, build, size", [(tiny_ssd_cfg, tiny_ssd, 96), (faster_rcnn_cfg, faster_rcnn, 64)]
)
def test_other_teachers_get_a_retinanet_with_common_levels(cfg, build, size, tmp_path):
    teacher = build()
    found = facts(tmp_path, cfg(), teacher)
    student = student_of(found)
    assert student.name == "RetinaNet" and found.test_size == size
    assert len(shared_levels(student, view(teacher))) >= 1
    assert not found.own_anchors and {len(a) for a in student.cell_anchors} == {9}


def test_the_student_of_a_teacher_with_one_input_size_draws_no_size_from_a_range(tmp_path):
    cfg = tiny_ssd_cfg()
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = (64, 96), "range"
    cfg.INPUT.RANDOM_FLIP = "none"
    made = config_of(model_settings(facts(tmp_path, cfg, tiny_ssd()), SMALL, 2))
    assert made.INPUT.MIN_SIZE_TRAIN == (96,) and made.INPUT.RANDOM_FLIP == "none"
    assert len(build_augmentation(made, is_train=True)) == 1  # it asserts that a range has two


def test_anchors_begin_with_the_smallest_of_a_two_stage_teacher(tmp_path):
    cfg = faster_rcnn_cfg()
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[8], [24], [48]]
    with torch.random.fork_rng():
        teacher = build_model(cfg)
    found = facts(tmp_path, cfg, teacher)
    assert found.strides[0] == 8 and found.anchors["SIZES"][0] == [8.0, 10.08, 12.7]
    assert found.anchors["SIZES"][1] == [16.0, 20.16, 25.4]
    with torch.random.fork_rng():  # of COCO: those of RetinaNet
        coco = build_detector(read_detector_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"))
    sizes = facts_of("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", Teacher(coco)).anchors["SIZES"]
    assert [level[0] for level in sizes] == [32.0, 64.0, 128.0, 256.0]


def test_anchors_have_the_sizes_of_a_teacher_with_the_same_levels(tmp_path):
    cfg = tiny_yolo_cfg(network="yolov3")
    teacher = build_detector(cfg)
    found = facts(tmp_path, cfg, teacher)
    assert found.strides == [8, 16, 32] and found.family != found.name
    boxes = [[(10, 13), (16, 30), (33, 23)], [(30, 61), (62, 45), (59, 119)],
             [(116, 90), (156, 198), (373, 326)]]  # fmt: skip
    expected = [sorted(round((w * h) ** 0.5, 1) for w, h in level) for level in boxes]
    assert found.anchors == {"SIZES": expected, "ASPECT_RATIOS": [[0.5, 1.0, 2.0]]}


@pytest.mark.parametrize(
    "strides", [(16, 32), (8, 16, 32, 64), (4, 8, 16, 32), (16, 32, 64), (8, 16, 32, 64, 128)]
)
def test_every_parameter_of_a_student_is_trained(strides, tmp_path):
    found = facts(tmp_path, tiny_cfg(), detector())
    anchors = {"SIZES": [[4 * s] for s in strides], "ASPECT_RATIOS": [[1.0]]}
    found = dataclasses.replace(found, strides=list(strides), anchors=anchors)
    student = build_detector(config_of(model_settings(found, SMALL, 2))).train()
    sum(losses_of(student, make_batch(sizes=((128, 128),) * 2)).values()).backward()
    unused = [n for n, p in student.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused  # DistributedDataParallel stops at such a parameter


def test_sizes_and_flips_of_a_python_teacher_are_taken(tmp_path):
    config = tmp_path / "teacher.py"
    config.write_text(PYTHON_TEACHER)
    found = facts_of(str(config), Teacher(detector()))
    assert (found.train_sizes, found.train_limit) == ([64, 96], 160)
    assert (found.test_size, found.test_limit) == (80, 128)
    assert found.input == {"MIN_SIZE_TRAIN_SAMPLING": "range", "RANDOM_FLIP": "none"}


@pytest.mark.parametrize(
    "resize, sizes, limit, sampling",
    [
        ("short_edge_length=(64, 96)", [64, 96], sys.maxsize, "range"),
        ('short_edge_length=[64, 96, 128], sample_style="choice"', [64, 96, 128], sys.maxsize, ""),
        ('short_edge_length=800, sample_style="range", max_size=160', [800], 160, ""),
    ],
)
def test_the_defaults_of_the_resizing_of_a_python_teacher_are_detectron2s(
    resize, sizes, limit, sampling, tmp_path
):
    old = 'short_edge_length=(64, 96), sample_style="range", max_size=160'
    config = tmp_path / "teacher.py"
    config.write_text(PYTHON_TEACHER.replace(old, resize))
    found = facts_of(str(config), Teacher(detector()))
    assert (found.train_sizes, found.train_limit) == (sizes, limit)
    assert found.input.get("MIN_SIZE_TRAIN_SAMPLING", "") == sampling


@pytest.mark.slow
@pytest.mark.parametrize("name", ["retinanet_R_50_FPN_1x.yaml", "retinanet_R_50_FPN_1x.py"])
def test_teachers_of_the_zoo_give_p3_to_p7_and_equal_anchors(name):
    from fgbg_kd.detectors.load import read_detector_config

    config = f"COCO-Detection/{name}"
    teacher = build_detector(read_detector_config(config)).eval()
    found = facts_of(config, Teacher(teacher))
    assert (found.test_size, found.test_limit, found.iterations) == (800, 1333, 90000)
    assert found.train_sizes == [640, 672, 704, 736, 768, 800]
    student = view(build_detector(config_of(model_settings(found, SMALL, 80))))
    levels = shared_levels(student, view(teacher))
    assert len(levels) == 5 and same_anchors(student, view(teacher), levels)


def test_every_candidate_is_a_timm_model_with_weights_and_the_list_grows():
    import timm

    for candidate in CANDIDATES:
        assert timm.models.is_model_pretrained(candidate.backbone)
        assert candidate.width % 32 == 0  # groups of FCOS's GroupNorm
    assert [c.width for c in CANDIDATES] == sorted(c.width for c in CANDIDATES)


def test_a_timm_model_of_the_user_has_several_shapes_and_a_wrong_name_is_refused():
    assert {c.backbone for c in candidates_for("resnet18")} == {"resnet18"}
    with pytest.raises(ConfigError, match="--student resnet1888: .*similar names: .*resnet"):
        candidates_for("resnet1888")


def test_the_yaml_holds_every_setting_and_each_reason_as_a_comment(tmp_path):
    settings = [
        Setting("MODEL.TIMM.NAME", "resnet18", "a reason"),
        Setting("MODEL.MASK_ON", False),
        Setting("INPUT.MIN_SIZE_TRAIN", (64, 72), "the teacher's"),
    ]
    text = yaml_of(["A title."], settings)
    assert text.startswith("# A title.\n") and "NAME: resnet18  # a reason" in text
    assert yaml.safe_load(text)["INPUT"] == {"MIN_SIZE_TRAIN": [64, 72]}
    (tmp_path / "s.yaml").write_text(text)
    cfg = get_fgbg_kd_cfg()
    merge_yaml(cfg, str(tmp_path / "s.yaml"))
    assert cfg.MODEL.TIMM.NAME == "resnet18" and isinstance(cfg, CfgNode)
    assert spoken(settings)[0] == "MODEL.TIMM.NAME resnet18: a reason"


def rows(onnx=True):
    names = ("teacher", "small", "middle", "large")
    values = ((30, 40.0, 90.0, 60.0), (1, 1.0, 10.0, 4.0), (4, 5.0, 25.0, 12.0), (12, 9, 44, 30.0))
    return [
        {
            "name": name,
            "parameters_m": float(p),
            "gflops": float(g),
            "ms": ms,
            "onnx_ms": o if onnx else None,
            "speedup": round(90.0 / ms, 2),
        }
        for name, (p, g, ms, o) in zip(names, values)
    ]


@pytest.mark.parametrize(
    "wish, taken",
    [
        ({"speedup": 3}, "middle"),
        ({"speedup": 3.7}, "small"),
        ({"latency": 50}, "large"),
        ({"latency": 25}, "middle"),
        ({"parameters": 5}, "middle"),
        ({"speedup": 2, "parameters": 3}, "small"),
        ({"latency": 12, "runtime": "onnx"}, "middle"),
        ({"speedup": 6, "runtime": "onnx"}, "small"),
        ({}, "large"),
    ],
)
def test_the_largest_that_meets_the_wish_is_taken(wish, taken):
    assert choose(rows(), Wish(**wish))["name"] == taken


@pytest.mark.parametrize(
    "wish, message",
    [
        (
            {"speedup": 20},
            "No candidate meets --speedup 20: the fastest, small, takes 10.0 ms, 9.0 times as fast",
        ),
        ({"latency": 5}, "No candidate meets --latency 5: the fastest, small, takes 10.0 ms"),
        ({"parameters": 0.5}, "at most 0.5 M parameters: the smallest, small, has 1.0 M"),
        (
            {"latency": 1, "parameters": 5},
            "No candidate meets --latency 1 --parameters 5: the f",
        ),
    ],
)
def test_a_wish_that_nothing_meets_names_the_nearest(wish, message):
    with pytest.raises(ConfigError, match=message):
        choose(rows(), Wish(**wish))


def test_onnx_as_the_runtime_needs_onnx_and_a_teacher_with_a_file(monkeypatch):
    monkeypatch.setattr("fgbg_kd.one_command.choose.has_onnx", lambda: False)
    with pytest.raises(ConfigError, match=r"--runtime onnx needs .* pip install -e '.\[export\]'"):
        Wish(latency=10, runtime="onnx").check()
    with pytest.raises(ConfigError, match="no candidate can be exported to ONNX"):
        choose(rows(onnx=False), Wish(latency=10, runtime="onnx"))
    of_two_stages = [rows()[0] | {"onnx_ms": None}, *rows()[1:]]
    with pytest.raises(ConfigError, match="the teacher has no ONNX file.*--latency"):
        choose(of_two_stages, Wish(speedup=2, runtime="onnx"))
    assert choose(of_two_stages, Wish(latency=12, runtime="onnx"))["name"] == "middle"
    with pytest.raises(ConfigError, match="the fastest, small, takes 4.0 ms. Lower --speedup"):
        choose(of_two_stages, Wish(latency=1, runtime="onnx"))


@pytest.mark.parametrize(
    "wish, message",
    [
        ({"speedup": 0}, "--speedup is 0: give a number over 0"),
        ({"latency": -1}, "--latency is -1"),
        ({"parameters": float("nan")}, "--parameters is nan"),
        ({"runtime": "tflite"}, "--runtime is 'tflite': choose from"),
    ],
)
def test_a_wish_that_is_no_wish_is_refused(wish, message):
    with pytest.raises(ConfigError, match=message):
        Wish(**wish).check()


@pytest.mark.parametrize("wish", [{"speedup": 3}, {"speedup": 6, "runtime": "onnx"}])
def test_candidates_between_two_of_the_list_come_close_to_the_wish(wish):
    """Times are made of the products in FPN and head. The machine is twice as slow later."""
    outputs, measured_names = 2 * 6, []

    def row(name, slow=1):
        c = candidate_of(name)
        gflops = c.width * (c.width * (1 + 2 * c.depth) + outputs) / 2e4
        ms = slow * (10 + gflops * 4)
        return {"name": name, "parameters_m": 1 + c.width * c.depth / 100, "gflops": gflops,
                "ms": ms, "onnx_ms": ms / 2, "speedup": 0}  # fmt: skip

    def measure_again(names):
        measured_names.extend(names)
        slower = {key: 2 * teacher[key] for key in ("ms", "onnx_ms")}
        return [teacher | slower, *(row(name, slow=2) for name in names)]

    teacher = row("resnet50, FPN 256, head 4") | {"name": "teacher", "ms": 240.0, "onnx_ms": 240.0}
    coarse = [teacher, row("lcnet_100, FPN 32, head 1"), row("lcnet_100, FPN 96, head 2"),
              row("resnet18, FPN 256, head 4")]  # fmt: skip
    larger = lambda name: [str(c) for c in finer(candidate_of(name), outputs)]  # noqa: E731
    before = choose(coarse, Wish(**wish))
    rows = refined(coarse, Wish(**wish), larger, measure_again)
    taken = choose(rows, Wish(**wish))
    column = RUNTIMES[wish.get("runtime", "pytorch")]
    asked = wish["speedup"]
    assert asked <= teacher[column] / taken[column] < 1.15 * asked
    assert teacher[column] / before[column] > 1.15 * asked
    assert 0 < len(measured_names) <= 6 and before["name"] not in measured_names
    assert candidate_of(taken["name"]).backbone == "lcnet_100"
    assert rows[: len(coarse)] == coarse


def test_the_verdict_says_whether_the_trained_student_meets_the_wish():
    teacher, _, student, _ = rows()
    assert verdict(student, teacher, Wish()) == ""
    said = verdict(student, teacher, Wish(speedup=3, parameters=5))
    assert said == (
        "The student meets --speedup 3 --parameters 5 (--runtime pytorch): 4.0 M parameters, "
        "25.0 ms, 3.60 times as fast as the teacher."
    )
    said = verdict(student, teacher, Wish(latency=10, runtime="onnx"))
    assert "does not meet --latency 10 (--runtime onnx)" in said and "12.0 ms, 5.00 times" in said
    said = verdict(student | {"onnx_ms": None}, teacher, Wish(latency=99))
    assert "The student meets --latency 99" in said


def test_no_candidate_is_added_without_a_wish_for_speed_or_without_a_choice():
    for wish in (Wish(), Wish(parameters=5), Wish(speedup=99)):
        assert refined(rows(), wish, lambda name: ["x"], None) == rows()


def test_finer_candidates_grow_and_keep_the_backbone():
    start = Candidate("resnet18", 128, 4)
    found = finer(start, outputs=9 * 84)
    assert start not in found and {c.backbone for c in found} == {"resnet18"}
    assert found[-1] == Candidate("resnet18", 256, 4) and len(set(found)) == len(found)
    assert all(c.width % 32 == 0 for c in found)
    assert [candidate_of(str(c)) for c in found] == found
    assert finer(found[-1], outputs=9 * 84) == []


def test_the_table_marks_what_is_taken():
    lines = table([r | {"onnx_ms": None} for r in rows()], "middle").splitlines()
    assert [x for x in lines if "<- taken" in x] == [x for x in lines if "middle" in x]
    assert "ms, ONNX Runtime" in lines[0] and "–" in lines[2]


def test_the_image_has_the_median_proportions_of_the_set():
    images = [{"height": h, "width": 100} for h in (50, 50, 100, 200, 200)]
    assert image_size({"images": images}, 64, 1000) == (64, 64)
    assert image_size({"images": images[:2]}, 64, 100) == (50, 100)
    assert image_size({"images": images}, 0, 1000) == (100, 100)  # images are not resized


def test_a_table_is_measured_once_for_each_machine_and_size(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(measure, "measure", lambda *a, **k: calls.append(a) or rows())
    said = []

    def get(size=(64, 64), classes=2):
        about = {"classes": classes}
        sizes = {"teacher": size}
        return measured(tmp_path / "m.json", about, {"teacher": None}, sizes, "cpu", said.append)

    assert get() == rows() == get() and len(calls) == 1
    assert "measured before" in said[-1]
    get(size=(64, 96))
    get(classes=3)
    monkeypatch.setattr(measure, "surroundings", lambda *a, **k: {"hardware": "another machine"})
    get()
    assert len(calls) == 4
    assert len(json.loads((tmp_path / "m.json").read_text())) == 4


def test_another_time_for_the_same_teacher_in_an_earlier_table_is_said(tmp_path, monkeypatch):
    said = []

    def get(ms, students, **about):
        new = [{**row, "ms": ms if row["name"] == "teacher" else 1.0} for row in rows()]
        monkeypatch.setattr(measure, "measure", lambda *_: new)
        sizes = {"teacher": (64, 64), students: (64, 64)}
        detectors = dict.fromkeys(sizes)
        measured(tmp_path / "m.json", about, detectors, sizes, "cpu", said.append)
        return [x for x in said if "other work disturbed" in x]

    assert not get(100.0, "a", weights="w")
    assert not get(120.0, "b", weights="w")
    assert not get(300.0, "c", weights="of another teacher")
    assert get(200.0, "d", weights="w") == [
        "teacher takes 200.0 ms now. Another table in measured_students.json has 100.0 ms: other "
        "work disturbed one of them. Remove measured_students.json, and measure again on an idle "
        "machine."
    ]


def pixels_for(detectors, *size):
    return dict.fromkeys(detectors, np.zeros((*size, 3), np.uint8))


def test_a_disturbed_measurement_is_said(monkeypatch):
    monkeypatch.setattr(measure, "has_onnx", lambda: False)
    for slow, said in ((10.0, 0), (20.0, 1)):
        times = {("teacher", "ms"): [10.0] * 5 + [slow] * 5, ("student", "ms"): [5.0] * 10}
        monkeypatch.setattr(measure, "times_in_turn", lambda *a, times=times, **k: times)
        lines = []
        built = {"teacher": detector, "student": detector}
        found = measure.measure(built, pixels_for(built, 64, 64), "cpu", lines.append)
        assert [r["ms"] for r in found] == [10.0, 5.0] and found[1]["speedup"] == 2.0
        assert sum("other work disturbs the measurement" in x for x in lines) == said


@pytest.mark.slow
def test_a_detector_is_measured_in_both_runtimes_and_a_two_stage_teacher_in_one(monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(measure, "_RUNS", 1)
    built = {"teacher": faster_rcnn, "student": detector, "ssd": tiny_ssd}
    teacher, student, ssd = measure.measure(built, pixels_for(built, 64, 96), "cpu")
    assert teacher["onnx_ms"] is None and student["onnx_ms"] > 0 and ssd["onnx_ms"] > 0
    assert student["speedup"] == pytest.approx(teacher["ms"] / student["ms"], abs=0.02)
