"""Student and teacher of different kinds: levels, classes, anchors, padding, inheritance."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    CLASSES,
    detector,
    distiller,
    faster_rcnn,
    faster_rcnn_cfg,
    losses_of,
    make_batch,
    save_teacher,
    seen_by,
)
from detectron2.layers import ShapeSpec
from detectron2.modeling import FPN, build_model
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.utils.events import EventStorage

from fgbg_kd import build_teacher, get_fgbg_kd_cfg
from fgbg_kd.data import register_datasets
from fgbg_kd.detectors.dense import DetectorView, FeatureLevel, view
from fgbg_kd.matching import SharedLevel, same_anchors, select, shared_levels
from fgbg_kd.methods import DenseOutput
from fgbg_kd.teacher import padded
from fgbg_kd.utils.errors import ConfigError, TeacherError

# --- FCOS and RetinaNet ---


@pytest.mark.parametrize("kinds", [("RetinaNet", "FCOS"), ("FCOS", "RetinaNet"), ("FCOS", "FCOS")])
def test_fcos_and_retinanet_teach_each_other_both_terms_under_the_gate(kinds):
    student, teacher = (detector(kind, seed=i) for i, kind in enumerate(kinds))
    model = distiller(student, teacher, assign="all")
    with EventStorage(19) as storage:
        losses = model(make_batch())
        assert 0 < storage.latest()["kd/fg_gate"][0] < 1
    of_pair = {"loss_kd_bg_features"} if kinds[0] == kinds[1] else set()
    assert {k for k in losses if "kd" in k} == {"loss_kd_fg", "loss_kd_bg"} | of_pair
    assert losses["loss_kd_fg"] > 0 and losses["loss_kd_bg"] > 0
    (losses["loss_kd_fg"] + losses["loss_kd_bg"]).backward()
    assert student.head.cls_score.weight.grad.abs().sum() > 0
    assert student.backbone.fpn_output3.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("key, value", [("SIZES", [[16], [32], [48]]), ("ASPECT_RATIOS", [[1.0]])])
def test_with_other_anchors_the_background_compares_the_best_of_a_cell(key, value):
    """The loss equals that of two one-anchor detectors with the best logits."""

    def other(cfg):
        cfg.MODEL.ANCHOR_GENERATOR[key] = value

    model = distiller(detector(seed=0), detector(edit=other), gate=False)
    losses, batch = seen_by(model)
    assert not batch.same_anchors

    def best(output):
        return output._replace(
            logits=[x.reshape(len(x), -1, 2, *x.shape[2:]).amax(1) for x in output.logits]
        )

    one = batch._replace(
        student=best(batch.student), teacher=best(batch.teacher), same_anchors=True
    )
    assert torch.equal(model.method(one)[0]["loss_kd_bg"], losses["loss_kd_bg"])
    assert losses["loss_kd_bg"] > 0


def test_a_method_that_compares_logits_one_by_one_refuses_other_anchors():
    with pytest.raises(TeacherError, match=r"different anchors \(2 and 1 per cell\)"):
        distiller(detector(), detector("FCOS"), name="QFL")


# --- levels ---


def set_levels(*names):
    def edit(cfg):
        cfg.MODEL.RETINANET.IN_FEATURES = list(names)
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32], [64]][: len(names)]

    return edit


def test_common_strides_are_used_whatever_the_rest_and_the_log_names_them(caplog):
    with caplog.at_level(logging.INFO, logger="fgbg_kd"):
        student = detector(seed=0)
        teacher = detector(edit=set_levels("p4", "p5", "p6"))
        model = distiller(student, teacher)
    assert "share the strides [16, 32] only" in caplog.text
    assert "p3 (stride 8)" in caplog.text and "p6 (stride 64)" in caplog.text
    losses, batch = seen_by(model)
    assert list(batch.strides) == [16, 32]
    assert [f.shape[1:] for f in batch.student.features] == [(16, 6, 6), (16, 3, 3)]
    assert all(v.isfinite() for v in losses.values()) and losses["loss_kd_fg"] > 0
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_strides_that_do_not_meet_are_an_error_that_names_the_levels():
    student = detector(edit=set_levels("p3", "p4"))
    teacher = detector(edit=set_levels("p5", "p6"))
    with pytest.raises(
        TeacherError,
        match=r"Student: p3 \(stride 8\), p4 \(stride 16\). Teacher: p5 \(stride 32\), p6",
    ):
        distiller(student, teacher)


def test_levels_meet_by_stride_not_by_name():
    student, teacher = detector(), detector()
    shape = {f"level{i}": ShapeSpec(channels=16, stride=8 * 2**i) for i in (2, 0, 1)}
    teacher.backbone.output_shape = lambda: shape
    teacher.head_in_features = list(shape)
    assert [x.place for x in shared_levels(view(student), view(teacher))] == [
        (0, 1),
        (1, 2),
        (2, 0),
    ]


def test_a_shared_level_has_the_place_and_the_channels_that_each_side_gives_it():
    mine = [FeatureLevel("a", 16, 5), FeatureLevel("b", 8, 6), FeatureLevel("c", 64, 7)]
    theirs = [FeatureLevel("d", 4, 1), FeatureLevel("e", 8, 2), FeatureLevel("f", 16, 3)]
    got = shared_levels(SimpleNamespace(levels=mine), SimpleNamespace(levels=theirs))
    assert got == [(8, (1, 1), (6, 2)), (16, (0, 2), (5, 3))]


@pytest.mark.parametrize("stride, meets", [(22, True), (24, False), (12, True), (11, False)])
def test_a_level_of_a_warped_teacher_meets_one_of_the_student_within_half_an_octave(stride, meets):
    mine, theirs = [FeatureLevel("p4", 16, 6)], [FeatureLevel("m", stride, 2)]
    student, teacher = (SimpleNamespace(levels=levels, name="X") for levels in (mine, theirs))
    if meets:
        assert [x.place for x in shared_levels(student, teacher, 1.0001)] == [(0, 0)]
    else:
        with pytest.raises(TeacherError, match="stride"):
            shared_levels(student, teacher, 1.0001)


def test_anchors_are_compared_on_the_levels_of_each_side_and_on_all():
    def views(*anchors):
        anchors = [torch.tensor([[float(x)]]) for x in anchors]
        return SimpleNamespace(cell_anchors=anchors, anchor_offset=0.0)

    levels = [SharedLevel(8, (0, 1), (1, 1)), SharedLevel(16, (1, 2), (1, 1))]
    assert same_anchors(views(1, 2), views(9, 1, 2), levels)
    assert not same_anchors(views(1, 2), views(1, 2, 3), levels)
    assert not same_anchors(views(1, 2), views(9, 1, 3), levels)


def test_levels_go_from_fine_to_coarse_whatever_their_order_in_the_backbone():
    teacher = faster_rcnn()
    shapes = teacher.backbone.output_shape()
    teacher.backbone.output_shape = lambda: dict(sorted(shapes.items(), reverse=True))
    assert [level.stride for level in view(teacher).levels] == [8, 16, 32, 64]


def test_a_backbone_that_takes_any_size_wants_no_padding():
    free = SimpleNamespace(size_divisibility=0)
    assert DetectorView(SimpleNamespace(backbone=free)).size_divisibility == 1


def test_maps_of_other_sizes_keep_their_cells_in_place():
    x = torch.arange(12.0).reshape(1, 1, 3, 4)
    output = DenseOutput([x, x], [x, x], raw="left out")
    (cut,), (same,), raw = select(output, [1], [(2, 3)])
    assert torch.equal(cut, x[..., :2, :3]) and raw is None and torch.equal(same, cut)
    assert select(output._replace(logits=None), [1], [(2, 3)]).logits is None
    (longer,), *_ = select(output, [0], [(4, 4)])
    assert torch.equal(longer[..., :3, :], x) and torch.equal(longer[..., 3, :], x[..., 2, :])


def test_a_users_head_of_the_same_kind_gives_its_own_logits():
    class Shifted(RetinaNetHead):
        def forward(self, features):
            logits, deltas = super().forward(features)
            return [x + 1 for x in logits], deltas

    model = detector().eval()
    model.head.__class__ = Shifted
    images = torch.randn(1, 3, 64, 64)
    full, part = (view(model).run(images, raw=b).logits for b in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(full, part))


# --- padding ---


class Square(FPN):
    """An FPN that needs square inputs, like ViTDet's feature pyramid."""

    padding_constraints = {"square_size": 128}


class Coarse(FPN):
    size_divisibility = 64
    padding_constraints = {}


@pytest.mark.parametrize("cls, size", [(Square, (128, 128)), (Coarse, (128, 128))])
def test_the_teacher_gets_the_padding_it_wants_and_its_cells_stay_in_place(cls, size):
    student, teacher = detector(seed=0), detector()
    teacher.backbone.__class__ = cls
    model = distiller(student, teacher)
    inputs = []
    teacher.backbone.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    losses, batch = seen_by(model)  # images of 64x80 and 72x56, padded to 96x96 for the student
    images = student.preprocess_image(make_batch()).tensor
    assert images.shape[-2:] == (96, 96) and inputs[0].shape[-2:] == size
    assert torch.equal(inputs[0][..., :96, :96], images)
    assert inputs[0][..., 96:, :].abs().sum() == inputs[0][..., 96:].abs().sum() == 0
    expected = view(teacher).features(inputs[0])
    for got, mine, full in zip(batch.teacher.features, batch.student.features, expected):
        assert got.shape == mine.shape
        assert torch.equal(got, full[..., : got.shape[-2], : got.shape[-1]])
    assert losses["loss_kd_fg"] > 0


def test_an_image_over_the_teachers_square_names_the_key():
    teacher = detector()
    teacher.backbone.__class__ = Square
    with pytest.raises(TeacherError, match="has 130x60: set INPUT.MAX_SIZE_TRAIN 128"):
        padded(view(teacher), torch.zeros(1, 3, 160, 64), [(130, 60)])
    # The student's padding beyond the square is cut.
    assert padded(view(teacher), torch.zeros(1, 3, 160, 64), [(120, 60)]).shape[-2:] == (128, 128)


# --- a teacher that is not dense ---


def test_a_two_stage_teacher_teaches_by_its_features_and_the_log_says_why(caplog):
    with caplog.at_level(logging.WARNING, logger="fgbg_kd"):
        model = distiller(detector(seed=0), faster_rcnn())
    assert "GeneralizedRCNN, predicts no classes per cell" in caplog.text
    changes = (
        "BG_WEIGHT 0.0",
        "BG_FEATURE_WEIGHT 0.0",
        "FG_LOSS cosine",
        "ASSIGN scale",
        "GATE False",
    )
    assert ", ".join(f"MODEL.KD.FGBG.{change}" for change in changes) in caplog.text
    losses, batch = seen_by(model)
    assert {k for k in losses if "kd" in k} == {"loss_kd_fg"} and losses["loss_kd_fg"] > 0
    assert batch.teacher.logits is None and list(batch.strides) == [8, 16, 32]
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_two_stage_teacher_by_config_needs_neither_our_classes_nor_our_anchors(
    tmp_path, distil_cfg
):
    torch.save({"model": faster_rcnn().state_dict()}, tmp_path / "teacher.pth")
    cfg = faster_rcnn_cfg()
    cfg.DATASETS.TRAIN = ("coco_2017_train",)
    (tmp_path / "teacher.yaml").write_text(cfg.dump())
    teacher = distil_cfg.MODEL.KD.TEACHER
    teacher.CONFIG, teacher.WEIGHTS = (str(tmp_path / f"teacher.{e}") for e in ("yaml", "pth"))
    assert losses_of(build_model(distil_cfg).train())["loss_kd_fg"] > 0


def test_nothing_left_to_learn_is_an_error():
    with pytest.raises(TeacherError, match="no term left, .*over 0 .MODEL.KD.FGBG.FG_WEIGHT or "):
        distiller(detector(), faster_rcnn(), fg_weight=0.0, bg_feature_weight=0.0)
    with pytest.raises(TeacherError, match="METHOD QFL compares predictions"):
        distiller(detector(), faster_rcnn(), name="QFL")


def test_a_two_stage_student_is_refused():
    with pytest.raises(
        TeacherError, match="GeneralizedRCNN cannot be a student: it must be a one-stage"
    ):
        distiller(faster_rcnn(), detector())


# --- classes ---


@pytest.mark.parametrize("kind", ["RetinaNet", "FCOS"])
def test_the_students_classes_are_found_by_name(kind):
    def three(cfg):
        cfg.MODEL.RETINANET.NUM_CLASSES = cfg.MODEL.FCOS.NUM_CLASSES = 3

    teacher = detector(kind, edit=three)
    names = ["stripe", "disc", "square"]
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    full = view(teacher.eval()).run(images).logits
    distiller(detector(seed=0), teacher, classes=["square", "stripe"], teacher_classes=names)
    kept = view(teacher).run(images).logits
    anchors = len(view(teacher).cell_anchors[0])
    for level, before in zip(kept, full):
        before = before.unflatten(1, (-1, 3))
        expected = torch.stack([before[:, :, 2], before[:, :, 0]], dim=2).flatten(1, 2)
        torch.testing.assert_close(level, expected)
    assert teacher.num_classes == teacher.head.cls_score.out_channels // anchors == 2
    assert not any(p.requires_grad for p in teacher.parameters())
    with torch.no_grad():
        teacher([{"image": torch.zeros(3, 64, 64)}])  # detects as a detector of two classes


def test_the_same_number_of_other_classes_is_no_match():
    teacher = detector()
    names = ["square", "disc"]
    with pytest.raises(TeacherError) as error:
        distiller(detector(), teacher, classes=["square", "stripe"], teacher_classes=names)
    for text in ("does not know ['stripe']", "square, stripe", "square, disc", "TEACHER.CLASSES"):
        assert text in str(error.value)


def test_a_repeated_class_name_of_the_teacher_is_refused():
    names = {"classes": ["square", "stripe"], "teacher_classes": ["square", "stripe", "stripe"]}
    with pytest.raises(TeacherError, match=r"\['stripe'\] more than once"):
        distiller(detector(), detector(), **names)


def test_without_names_the_numbers_must_agree_and_a_warning_says_so(caplog):
    def three(cfg):
        cfg.MODEL.RETINANET.NUM_CLASSES = 3

    with pytest.raises(TeacherError, match="2 classes, but the teacher has 3: name the teacher's"):
        distiller(detector(), detector(edit=three), classes=["square", "stripe"])
    with caplog.at_level(logging.WARNING, logger="fgbg_kd"):
        model = distiller(detector(), detector(), classes=["square", "stripe"])
    assert model.teacher.view.num_classes == 2
    assert "names of the teacher's classes are not known" in caplog.text
    assert "right only if their order is square, stripe." in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="fgbg_kd"):
        distiller(detector(), detector())
    assert "for all 2 classes. thing_classes" in caplog.text  # no names, so no order


def test_a_student_with_another_number_of_classes_than_its_data_is_told_the_number():
    names = {"classes": ["disc", "square", "stripe"], "teacher_classes": ["stripe", "square"]}
    with pytest.raises(
        ConfigError, match="3 classes, but the student has 2: set NUM_CLASSES .num_classes. 3 for"
    ):
        distiller(detector(), detector(), **names)


def test_the_warning_about_unknown_names_says_where_to_set_them(caplog):
    for names, key in (
        ({"classes": ["square", "stripe"]}, "MODEL.KD.TEACHER.CLASSES sets"),
        ({"teacher_classes": ["square", "stripe"]}, "metadata of DATASETS.TRAIN sets"),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="fgbg_kd"):
            distiller(detector(), detector(), **names)
        assert key in caplog.text


@pytest.mark.parametrize("source", ["key", "file", "registered set"])
@pytest.mark.slow
def test_the_teachers_names_come_from_key_file_or_registered_set(
    coco, distil_cfg, tmp_path, source
):
    def edit(cfg):
        cfg.MODEL.RETINANET.NUM_CLASSES = 80 if source == "registered set" else 2
        if source == "file":
            cfg.DATASETS.TRAIN, cfg.DATASETS.TRAIN_JSON = ("elsewhere",), coco[0]
        elif source == "registered set":
            cfg.DATASETS.TRAIN = ("coco_2017_train",)

    files = save_teacher(tmp_path, edit=edit)
    kd = distil_cfg.MODEL.KD
    kd.TEACHER.CONFIG, kd.TEACHER.WEIGHTS = files
    if source == "key":
        assert build_teacher(*files).class_names is None
        kd.TEACHER.CLASSES = ["stripe", "square"]
        before = build_teacher(*files).detector.head.cls_score.weight
        after = build_model(distil_cfg).teacher.detector.head.cls_score.weight
        assert torch.equal(after[0], before[1]) and torch.equal(after[1], before[0])
    elif source == "file":
        assert build_teacher(*files).class_names == list(CLASSES)
        build_model(distil_cfg)
    else:
        with pytest.raises(TeacherError, match="does not know .*'square', 'stripe'"):
            build_model(distil_cfg)


def test_a_set_that_the_students_config_registered_does_not_name_the_teachers_classes(
    coco, distil_cfg, caplog
):
    """The user's own training may have had another set of this name."""
    kd = distil_cfg.MODEL.KD
    cfg = get_fgbg_kd_cfg()
    cfg.merge_from_file(kd.TEACHER.CONFIG)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TRAIN_JSON = distil_cfg.DATASETS.TRAIN, ""
    Path(kd.TEACHER.CONFIG).write_text(cfg.dump())
    distil_cfg.DATASETS.TRAIN_JSON, distil_cfg.DATASETS.TRAIN_IMAGES = coco
    register_datasets(distil_cfg)
    assert build_teacher(kd.TEACHER.CONFIG, kd.TEACHER.WEIGHTS).class_names is None
    with caplog.at_level(logging.WARNING, logger="fgbg_kd"):
        build_model(distil_cfg)
    assert "names of the teacher's classes are not known" in caplog.text


def test_a_number_of_names_that_is_not_the_teachers_is_named(teacher_files):
    with pytest.raises(TeacherError, match="CLASSES has 3 names, but the teacher has 2 classes"):
        build_teacher(*teacher_files, classes=["a", "b", "c"])


# --- inheritance ---


def test_what_fits_is_inherited_as_it_was_before_folding(caplog):
    def norm(cfg):
        cfg.MODEL.FPN.NORM = "BN"

    def plain_head(cfg):
        norm(cfg)
        cfg.MODEL.RETINANET.NUM_CONVS = 2

    student, teacher = detector(edit=plain_head, seed=0), detector(edit=norm)
    for module in teacher.backbone.modules():
        if hasattr(module, "running_var"):
            module.running_var.uniform_(0.5, 2)
    saved = {k: v.clone() for k, v in teacher.state_dict().items()}
    mine = {k: v.clone() for k, v in student.state_dict().items()}
    with caplog.at_level(logging.INFO, logger="fgbg_kd"):
        model = distiller(student, teacher, inherit=["fpn", "head"])
        assert all(torch.equal(v, mine[k]) for k, v in student.state_dict().items())  # not yet
        model.inherit()
    inherited = {k for k, v in student.state_dict().items() if torch.equal(v, saved.get(k, 0 * v))}
    assert {"backbone.fpn_output3.weight", "backbone.fpn_lateral4.norm.running_var"} <= inherited
    assert {"head.cls_subnet.0.weight", "head.cls_score.bias"} <= inherited
    for k, v in student.state_dict().items():
        part = not k.startswith("backbone.bottom_up.")
        assert torch.equal(v, saved[k] if part and k in saved else mine[k]), k
    assert "Inherited from the teacher: backbone.fpn_lateral3.weight" in caplog.text
    assert "Not inherited, head: head.cls_subnet.2.weight" in caplog.text


def test_weights_are_inherited_once():
    student = detector(seed=0)
    model = distiller(student, detector(), inherit=["head"])
    model.inherit()
    torch.nn.init.zeros_(student.head.cls_score.weight)
    model.inherit()
    assert (student.head.cls_score.weight == 0).all()


def test_parts_of_another_kind_or_name_are_an_error():
    with pytest.raises(TeacherError, match="'head': no weight of the teacher's FCOSHead fits"):
        distiller(detector(), detector("FCOS"), inherit=["head"])
    batch_norm, wider = (
        lambda cfg, c=c: cfg.MODEL.FPN.update(NORM="BN", OUT_CHANNELS=c) for c in (16, 32)
    )
    with pytest.raises(TeacherError, match="'fpn': no weight of the teacher's FPN fits"):
        distiller(detector(edit=batch_norm), detector(edit=wider), inherit=["fpn"])  # counters only
    with pytest.raises(ValueError, match="INHERIT names 'neck'"):
        distiller(detector(), detector(), inherit=["neck"])


def test_equal_names_in_modules_of_another_class_are_not_inherited():
    class OtherHead(RetinaNetHead):
        pass

    teacher = detector()
    teacher.head.__class__ = OtherHead
    with pytest.raises(TeacherError, match="'head': no weight of the teacher's OtherHead fits"):
        distiller(detector(), teacher, inherit=["head"])


def test_plain_training_inherits_nothing_and_says_so():
    with pytest.raises(ConfigError, match="INHERIT copies head .* weights of FgBg are 0"):
        distiller(detector(), detector(), inherit=["head"], fg_weight=0.0, bg_weight=0.0)
