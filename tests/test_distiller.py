import copy

import pytest
import torch
from conftest import (
    FGBG_OFF,
    KD_LOSSES,
    detector,
    distiller,
    make_batch,
    save_teacher,
    seen_by,
    tiny_cfg,
    tiny_ssd,
)
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from omegaconf import OmegaConf

from fgbg_kd.data import usual_size
from fgbg_kd.detectors.dense import DenseView
from fgbg_kd.detectors.load import starts_trained, without_pretrained
from fgbg_kd.engine.non_finite import not_finite
from fgbg_kd.utils.errors import TeacherError


def losses_of(model, batch, iteration=0):
    with EventStorage(iteration):
        return model.train()(batch)


def test_adds_three_losses_and_keeps_the_students_own(distil_cfg):
    distil_cfg.MODEL.KD.FGBG.GATE = False  # a random teacher need not be better
    torch.manual_seed(3)
    distiller = build_model(distil_cfg)
    torch.manual_seed(3)
    plain = build_model(tiny_cfg())
    losses, own = losses_of(distiller, make_batch()), losses_of(plain, make_batch())
    assert set(losses) == {"loss_cls", "loss_box_reg", *KD_LOSSES}
    for name, value in own.items():
        assert torch.equal(losses[name], value)
    assert all(losses[name] > 0 for name in KD_LOSSES)


def test_gradients_reach_student_and_adapters_and_never_the_teacher(distil_cfg):
    distil_cfg.MODEL.KD.FGBG.GATE, distil_cfg.MODEL.KD.FGBG.ASSIGN = False, "all"
    model = build_model(distil_cfg)
    losses = losses_of(model, make_batch())
    (losses["loss_kd_fg"] + losses["loss_kd_bg"]).backward()
    assert all(a.weight.grad.abs().sum() > 0 for a in model.method.adapters)
    assert model.student.backbone.fpn_output3.weight.grad.abs().sum() > 0
    assert model.student.head.cls_score.weight.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in model.teacher.detector.parameters())


def test_teacher_is_invisible_frozen_and_follows_the_device(distil_cfg):
    model = build_model(distil_cfg)
    before = copy.deepcopy(model.teacher.detector.state_dict())
    assert not any("teacher" in k for k in model.state_dict())
    assert not any("teacher" in k for k, _ in model.named_parameters())
    assert not any("teacher" in k for k, _ in model.named_modules())
    model.train()
    assert not any(m.training for m in model.teacher.detector.modules())
    losses_of(model, make_batch())
    assert all(torch.equal(v, before[k]) for k, v in model.teacher.detector.state_dict().items())
    assert {p.dtype for p in model.double().teacher.detector.parameters()} == {torch.float64}
    assert model.to("meta").teacher.detector.pixel_mean.is_meta


def test_inference_is_the_student(distil_cfg):
    model = build_model(distil_cfg).eval()
    torch.nn.init.normal_(model.student.head.cls_score.weight, std=0.3)
    batch = make_batch()
    with torch.no_grad():
        ours, plain = model(batch), model.student(batch)
    for a, b in zip(ours, plain):
        assert len(a["instances"]) > 0
        assert torch.equal(a["instances"].pred_boxes.tensor, b["instances"].pred_boxes.tensor)


@pytest.mark.parametrize("key", ["weights", "teacher"])
def test_without_weights_or_teacher_nothing_is_added(distil_cfg, key):
    if key == "teacher":
        distil_cfg.MODEL.KD.TEACHER.CONFIG = distil_cfg.MODEL.KD.TEACHER.WEIGHTS = ""
    else:
        distil_cfg.MODEL.KD.FGBG.update({k.upper(): v for k, v in FGBG_OFF.items()})
    model = build_model(distil_cfg)
    assert model.teacher is None and model.method is None
    assert set(losses_of(model, make_batch())) == {"loss_cls", "loss_box_reg"}


def test_no_boxes_in_the_batch_is_a_normal_input(distil_cfg):
    model = build_model(distil_cfg)
    losses = losses_of(model, make_batch(boxes=((), ())))
    assert losses["loss_kd_fg"] == 0
    some = losses_of(build_model(distil_cfg), make_batch())
    assert losses["loss_kd_bg"] < some["loss_kd_bg"]  # no unit to divide by, no explosion
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_warm_up_and_stop_scale_all_terms(distil_cfg):
    distil_cfg.MODEL.KD.WARMUP_ITERS, distil_cfg.MODEL.KD.STOP_ITER = 10, 20
    model = build_model(distil_cfg)
    first, full, after = (losses_of(model, make_batch(), i) for i in (0, 9, 20))
    for name in KD_LOSSES:
        # BatchNorm in training mode sees the same batch: the terms differ by the scale alone.
        torch.testing.assert_close(first[name] * 10, full[name], rtol=1e-4, atol=1e-6)
        assert after[name] == 0
    sum(after.values()).backward()
    assert all(p.grad is not None for p in model.parameters())  # or DDP would wait for them


@pytest.mark.parametrize("key, expected", [(-1, 7), (0, 0), (3, 3)])
def test_the_warm_up_is_as_long_as_the_learning_rates_unless_set(distil_cfg, key, expected):
    distil_cfg.SOLVER.WARMUP_ITERS = 7
    distil_cfg.MODEL.KD.WARMUP_ITERS = key
    assert build_model(distil_cfg).warmup_iters == expected


@pytest.mark.parametrize("weights, expected", [("", "cosine"), ("backbone.pth", "mse")])
def test_the_loss_of_features_depends_on_the_weights_that_the_student_starts_from(
    distil_cfg, weights, expected
):
    distil_cfg.MODEL.WEIGHTS = weights
    assert build_model(distil_cfg).method.fg_loss == expected
    distil_cfg.MODEL.WEIGHTS, distil_cfg.MODEL.TIMM.WEIGHTS = "", weights
    kept = distil_cfg.MODEL.BACKBONE.NAME
    distil_cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"  # it does not read them
    assert not starts_trained(distil_cfg)
    assert not starts_trained(without_pretrained(distil_cfg))
    distil_cfg.MODEL.BACKBONE.NAME = kept
    replayed = build_model(without_pretrained(distil_cfg))  # as tools/replay.py builds it
    assert replayed.method.fg_loss == expected


def test_a_share_of_no_cells_is_left_out_of_the_log(distil_cfg):
    model = build_model(distil_cfg)
    with EventStorage(19) as storage:
        model.train()(make_batch(boxes=((), ())))
        assert "kd/fg_gate" not in storage.latest() and "kd/bg_gate" in storage.latest()


@pytest.mark.parametrize("key", ["WARMUP_ITERS", "STOP_ITER"])
def test_iterations_under_0_are_named(distil_cfg, key):
    distil_cfg.MODEL.KD[key] = -2 if key == "WARMUP_ITERS" else -1
    with pytest.raises(ValueError, match=f"MODEL.KD.{key} is -"):
        build_model(distil_cfg)


def test_a_method_that_is_off_drops_the_teacher_that_is_given():
    model = distiller(detector(), detector(), **FGBG_OFF)
    assert model.teacher is None and model.method is None


def test_the_method_sees_the_normaliser_of_the_students_own_losses():
    student = detector(seed=0)
    _, batch = seen_by(distiller(student, detector()))
    assert batch.loss_normalizer == student.loss_normalizer != 1


def test_gate_shares_reach_the_event_storage(distil_cfg):
    model = build_model(distil_cfg)
    with EventStorage(19) as storage:
        model.train()(make_batch())
        assert 0 <= storage.latest()["kd/fg_gate"][0] <= 1
        assert 0 <= storage.latest()["kd/bg_gate"][0] <= 1


def test_padding_is_neither_foreground_nor_background(distil_cfg):
    """In a batch with a large image, predictions on a small image's padding change no term."""
    distil_cfg.MODEL.KD.FGBG.GATE = False
    model = build_model(distil_cfg)
    seen = []
    hook = model.method.register_forward_pre_hook(lambda _, args: seen.append(args))
    losses_of(model, make_batch(sizes=((64, 64), (128, 128)), boxes=(((8, 8, 40, 40),), ())))
    hook.remove()
    batch = seen[0][0]
    student = batch.student
    padded, inside = [], []
    for level in student.logits:
        half = level.shape[-1] // 2  # the small image fills the upper left quarter
        padded.append(level.clone())
        padded[-1][0, :, half:], padded[-1][0, :, :, half:] = 50.0, 50.0
        inside.append(level.clone())
        inside[-1][0, :, :half, :half] = 50.0
    value = [
        model.method(batch._replace(student=student._replace(logits=logits)))[0]["loss_kd_bg"]
        for logits in (student.logits, padded, inside)
    ]
    assert value[0] > 0 and value[2] > 2 * value[0]
    torch.testing.assert_close(value[1], value[0])


def test_teacher_with_other_pixel_statistics_gets_its_own_input(tmp_path, distil_cfg):
    def rgb(cfg):
        cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN = "RGB", [1.0, 2.0, 3.0]

    kd = distil_cfg.MODEL.KD.TEACHER
    kd.CONFIG, kd.WEIGHTS = save_teacher(tmp_path, edit=rgb)
    model = build_model(distil_cfg)
    seen = []
    model.teacher.detector.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    batch = make_batch(boxes=((), ()))
    losses_of(model, batch)
    expected = model.teacher.detector.preprocess_image(
        [{"image": x["image"].flip(0)} for x in batch]
    ).tensor
    torch.testing.assert_close(seen[0], expected)


def test_without_gate_and_background_the_teachers_head_is_not_run(distil_cfg):
    distil_cfg.MODEL.KD.FGBG.update(BG_WEIGHT=0.0, GATE=False, ASSIGN="scale")
    model = build_model(distil_cfg)
    calls = []
    model.teacher.detector.head.register_forward_hook(lambda *_: calls.append(1))
    assert losses_of(model, make_batch())["loss_kd_fg"] > 0
    assert not calls


def test_the_teachers_box_branch_is_not_run(distil_cfg):
    model, runs, batch = build_model(distil_cfg), [], make_batch()
    images = model.teacher.detector.preprocess_image(batch).tensor
    teacher = model.teacher.view
    expected = teacher.run(images).logits
    model.teacher.detector.head.bbox_subnet.register_forward_hook(lambda *_: runs.append(1))
    got = teacher.run(images, raw=False).logits
    assert losses_of(model, batch)["loss_kd_bg"] > 0
    assert not runs
    for a, b in zip(got, expected):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name, dtype", [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_the_teacher_runs_in_its_own_precision(distil_cfg, name, dtype):
    distil_cfg.MODEL.KD.TEACHER.PRECISION = name
    distil_cfg.MODEL.KD.FGBG.GATE = False  # a random teacher need not be better
    model = build_model(distil_cfg)
    seen = []
    model.teacher.detector.head.cls_score.register_forward_hook(lambda *a: seen.append(a[2].dtype))
    other = torch.float32 if name == "bf16" else torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=other == torch.bfloat16):
        losses = losses_of(model, make_batch())
    assert set(seen) == {dtype}
    assert losses["loss_kd_fg"].dtype == torch.float32 and losses["loss_kd_fg"] > 0


def test_a_fault_is_searched_in_the_precision_in_which_the_teacher_was_run(distil_cfg):
    distil_cfg.MODEL.KD.TEACHER.PRECISION = "bf16"
    model, seen = build_model(distil_cfg), []
    model.teacher.detector.head.cls_score.register_forward_hook(lambda *a: seen.append(a[2].dtype))
    not_finite(model, make_batch())
    assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize("method", ["PKD", "FgBg"])
def test_the_students_logits_are_computed_only_for_a_method_that_needs_them(method):
    model, seen = distiller(tiny_ssd(1), tiny_ssd(2), name=method), []
    run = DenseView.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DenseView, "run", lambda *a, **k: seen.append(run(*a, **k)) or seen[-1])
        losses_of(model, make_batch())
    assert [x.logits is not None for x in seen] == [method == "FgBg"] * 2  # student and teacher


def test_an_unknown_precision_is_named(distil_cfg):
    distil_cfg.MODEL.KD.TEACHER.PRECISION = "int4"
    with pytest.raises(ValueError, match="PRECISION is 'int4'"):
        build_model(distil_cfg)


def test_one_option_that_does_not_exist_is_an_error(distil_cfg):
    distil_cfg.MODEL.KD.FGBG.GATE = "maybe"
    with pytest.raises(ValueError, match="MODEL.KD.FGBG.GATE is 'maybe'"):
        build_model(distil_cfg)


def test_bfloat16_autocast_trains(distil_cfg):
    model = build_model(distil_cfg)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = losses_of(model, make_batch())
    assert losses["loss_kd_fg"].dtype == losses["loss_kd_bg"].dtype == torch.float32
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_unknown_method_is_named_with_the_choices(distil_cfg):
    distil_cfg.MODEL.KD.METHOD = "Magic"
    with pytest.raises(ValueError, match="METHOD is 'Magic': choose from .*FgBg"):
        build_model(distil_cfg)


@pytest.mark.parametrize(
    "sizes, sampling, largest, usual",
    [
        ((128, 160, 192), "choice", 400, (160, 213)),
        ((128, 192), "range", 400, (160, 213)),
        ((512,), "choice", 512, (384, 512)),
        ((0,), "choice", 1333, None),
    ],
)
def test_the_usual_size_is_that_of_an_image_with_sides_3_to_4(sizes, sampling, largest, usual):
    cfg = tiny_cfg()
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = sizes, sampling
    cfg.INPUT.MAX_SIZE_TRAIN = largest
    assert usual_size(cfg) == usual
    resize = {"short_edge_length": sizes, "sample_style": sampling, "max_size": largest}
    loader = {"mapper": {"augmentations": [{"flip": True}, resize]}}
    assert usual_size(OmegaConf.create({"dataloader": {"train": loader}})) == usual


def test_a_python_config_without_resizing_has_no_usual_size():
    assert usual_size(OmegaConf.create({"dataloader": {"train": {"mapper": {}}}})) is None


def test_only_rgb_and_bgr_are_converted_into_each_other(distil_cfg):
    distil_cfg.INPUT.FORMAT = "HSV"
    with pytest.raises(TeacherError, match="The student reads HSV images, the teacher BGR"):
        build_model(distil_cfg)


def test_a_grey_teacher_of_a_colour_student_is_refused():
    def grey(cfg):
        cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD, cfg.INPUT.FORMAT = [128.0], [58.0], "L"
        cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
        cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
        cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]

    with pytest.raises(TeacherError, match="images with 3 channels, the teacher with 1"):
        distiller(detector(), detector(edit=grey))
    distiller(detector(edit=grey), detector(edit=grey))
