"""Photos without labels: which of the teacher's detections are used, and what they change."""

import itertools
import json
import logging
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import (
    FGBG_OFF,
    detector,
    distiller,
    faster_rcnn,
    losses_of,
    make_batch,
    make_trainer,
    seen_by,
    tiny_cfg,
    tiny_ssd,
    tiny_yolo_cfg,
    train,
    weights,
    write_coco,
    yolox_detector,
)
from detectron2.engine import HookBase
from detectron2.modeling import build_model
from detectron2.structures import BoxMode
from detectron2.utils.events import EventStorage
from omegaconf import OmegaConf
from PIL import Image

from fgbg_kd import Teacher
from fgbg_kd.data.unlabeled import find_photos
from fgbg_kd.detectors.dense import DenseOutput, view
from fgbg_kd.engine import FgBgTrainer, unlabeled
from fgbg_kd.engine.loader import _Marking
from fgbg_kd.engine.resume import warm_up
from fgbg_kd.engine.unlabeled import check_teacher, score_threshold
from fgbg_kd.experiments.method_specs import method_overrides
from fgbg_kd.utils.config_files import expand_paths, merge_overrides
from fgbg_kd.utils.errors import ConfigError, DataError, TeacherError

# --- which detections are believed ---


def record(*boxes, crowd=()):
    """An image of 100x100 with objects of class 0. ``crowd``: places of those that are crowds."""
    objects = [
        {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, "iscrowd": int(i in crowd)}
        for i, box in enumerate(boxes)
    ]
    return {"file_name": "a.jpg", "height": 100, "width": 100, "annotations": objects}


def found(score, box, image=0, category=0):
    """A detection; the box is XYXY."""
    x, y, x2, y2 = box
    bbox = [x, y, x2 - x, y2 - y]
    return {"image_id": image, "category_id": category, "bbox": bbox, "score": score}


A, B, C = (0, 0, 20, 20), (40, 40, 60, 60), (70, 0, 90, 20)
RECORDS = [record(A, B), record(A, C)]
FOUND = [
    found(0.9, A),
    found(0.8, (40, 40, 60, 58)),  # IoU 0.9
    found(0.7, (0, 0, 20, 9), image=1),  # IoU 0.45
    found(0.6, A, image=1),
    found(0.5, C, image=1),
    found(0.4, B, category=1),  # the wrong class
    found(0.3, A),  # an object that is found already
]


@pytest.mark.parametrize("precision, expected", [(1.0, 0.8), (0.8, 0.5), (0.6, 0.4), (0.5, 0.3)])
def test_the_threshold_is_the_lowest_score_from_which_on_enough_detections_are_right(
    precision, expected
):
    """Right are 1/1, 2/2, 2/3, 3/4, 4/5, 4/6 and 4/7 of the detections."""
    assert score_threshold(FOUND[::-1], RECORDS, precision) == expected


def test_detections_with_equal_scores_are_kept_or_left_out_together():
    pair = [found(0.9, A), found(0.8, B), found(0.8, C)]
    assert score_threshold(pair, [record(A, B)], 0.9) == 0.9


def test_a_detection_of_a_crowd_is_neither_right_nor_wrong():
    pair = [found(0.9, B), found(0.8, A)]
    assert score_threshold(pair, [record(A, B, crowd=(1,))], 1.0) == 0.8


@pytest.mark.parametrize(
    "detections, message",
    [
        ([], "there are none"),
        ([found(0.9, C), found(0.8, A)], "at most 0.50 of them are right .*lower PRECISION"),
    ],
)
def test_a_teacher_that_is_wrong_too_often_is_refused(detections, message):
    with pytest.raises(TeacherError, match=message):
        score_threshold(detections, [record(A)], 0.8)


# --- the photos ---


@pytest.fixture
def photos(tmp_path):
    """A folder with six photos, one of them in a subfolder, and two files that are not photos."""
    _, images = write_coco(tmp_path / "made", 6, seed=9)
    folder = tmp_path / "photos"
    shutil.move(images, folder)
    (folder / "more").mkdir()
    (folder / "5.png").rename(folder / "more" / "5.PNG")
    (folder / "readme.txt").write_text("not a photo")
    (folder / "._0.png").write_bytes(b"of macOS")
    return folder


def test_photos_are_found_with_their_upright_sizes(photos):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (30, 20)).save(photos / "turned.jpg", exif=exif)
    seen = {p["file_name"]: (p["width"], p["height"]) for p in find_photos([str(photos)])}
    assert len(seen) == 7
    assert seen[str(photos / "0.png")] == (80, 64)
    assert seen[str(photos / "more" / "5.PNG")] == (56, 72)
    assert seen[str(photos / "turned.jpg")] == (20, 30)


def test_photos_of_the_training_and_test_set_are_left_out_and_counted(photos, tmp_path, caplog):
    """They are the same by content, whatever their names."""
    shutil.copy(photos / "1.png", tmp_path / "training.png")
    shutil.copy(photos / "2.png", tmp_path / "test.png")
    sets = [[{"file_name": str(tmp_path / f"{name}.png")}] for name in ("training", "test")]
    with caplog.at_level(logging.WARNING):
        kept = [p["file_name"] for p in find_photos([str(photos), str(photos)], *sets)]
    assert [p[len(str(photos)) + 1 :] for p in kept] == ["0.png", "3.png", "4.png", "more/5.PNG"]
    assert "1 of 6 photos of DATASETS.UNLABELED are also in the training set" in caplog.text
    assert "1 of 5 photos of DATASETS.UNLABELED are also in the test set" in caplog.text
    everything = [{"file_name": p["file_name"]} for p in find_photos([str(photos)])]
    with pytest.raises(DataError, match="all photos are in the training or test set"):
        find_photos([str(photos)], everything)


def test_a_photo_that_cannot_be_used_is_named(photos, tmp_path):
    with pytest.raises(ConfigError, match="'nowhere': there is no such folder"):
        find_photos(["nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty has no photos. .*end in .bmp"):
        find_photos([str(photos), str(tmp_path / "empty")])
    (photos / "broken.jpg").write_bytes(b"no")
    Image.new("RGB", (900, 2)).save(photos / "narrow.png")
    with pytest.raises(DataError, match=r"2 of 8 photos(.|\n)*broken.jpg(.|\n)*too narrow"):
        find_photos([str(photos)], longest=100)


# --- the batches ---


@pytest.fixture
def believing(monkeypatch):
    """Random teachers are believed, and what they are asked is counted."""
    asked = []
    detections = unlabeled.detections

    def counted(detector, records, *args, **options):
        asked.append(len(records))
        return detections(detector, records, *args, **options)

    monkeypatch.setattr(unlabeled, "detections", counted)
    monkeypatch.setattr(unlabeled, "score_threshold", lambda *args: 0.3)
    return asked


@pytest.fixture
def photo_cfg(distil_cfg, photos):
    distil_cfg.DATASETS.UNLABELED = (str(photos),)
    distil_cfg.SOLVER.IMS_PER_BATCH = 4
    distil_cfg.SOLVER.CHECKPOINT_PERIOD = 2
    distil_cfg.DATASETS.TEST, distil_cfg.DATASETS.TEST_JSON = (), ""
    return distil_cfg


def first(loader, count):
    return list(itertools.islice(iter(loader), count))


@pytest.mark.parametrize("share, number", [(0.5, 2), (0.1, 1), (0.9, 3)])
def test_each_batch_has_its_share_of_photos_and_starts_anywhere(
    photo_cfg, believing, share, number, tmp_path
):
    photo_cfg.MODEL.KD.UNLABELED.SHARE = share
    photo_cfg.INPUT.MIN_SIZE_TRAIN = (48, 56, 64, 72)
    loader = make_trainer(FgBgTrainer, photo_cfg, tmp_path / "run", 1).data_loader
    whole = first(loader, 9)
    for batch in whole:
        assert [x.get("unlabeled", False) for x in batch] == [False] * (4 - number) + [
            True
        ] * number
    assert len({x["file_name"] for b in whole for x in b if "unlabeled" in x}) == 6
    loader.start, loader.num_workers = 6, 2 if share == 0.5 else 0
    for batch, expected in zip(first(loader, 3), whole[6:], strict=True):
        assert all(torch.equal(a["image"], b["image"]) for a, b in zip(batch, expected))
        boxes = [[x["instances"].gt_boxes.tensor for x in b] for b in (batch, expected)]
        assert all(torch.equal(a, b) for a, b in zip(*boxes))


def test_photos_do_not_change_which_labelled_images_come(photo_cfg, believing, tmp_path):
    mixed = make_trainer(FgBgTrainer, photo_cfg, tmp_path / "mixed", 1).data_loader
    photo_cfg.DATASETS.UNLABELED, photo_cfg.SOLVER.IMS_PER_BATCH = (), 2
    alone = make_trainer(FgBgTrainer, photo_cfg, tmp_path / "alone", 1).data_loader
    for batch, expected in zip(first(mixed, 6), first(alone, 6)):
        assert [x["file_name"] for x in batch[:2]] == [x["file_name"] for x in expected]
        assert all(torch.equal(a["image"], b["image"]) for a, b in zip(batch, expected))


def test_the_file_holds_the_teachers_confident_detections(photo_cfg, believing, photos, tmp_path):
    """The teacher is asked once: another trainer reads the file, unless something has changed."""
    trainer = make_trainer(FgBgTrainer, photo_cfg, tmp_path / "run", 1)
    content = json.loads((tmp_path / "run" / "unlabeled.json").read_text())
    assert believing == [12, 6] and len(content["images"]) == 6
    assert [c["name"] for c in content["categories"]] == ["square", "stripe"]
    scores = [a["score"] for a in content["annotations"]]
    assert len(scores) > 3 and min(scores) >= 0.3
    teacher = trainer.model.teacher.detector
    mapper = trainer.unlabeled(photo_cfg, trainer.model.teacher).mapper
    image = mapper({k: content["images"][1][k] for k in ("file_name", "height", "width")})
    with torch.no_grad():
        expected = teacher([image])[0]["instances"]
    boxes = [a["bbox"] for a in content["annotations"] if a["image_id"] == 1]
    expected = expected[expected.scores >= 0.3].pred_boxes.tensor.numpy()
    np.testing.assert_allclose(np.array(boxes)[:, :2], expected[:, :2], rtol=1e-5)

    trainer.model.teacher.test_size = 96, 200
    mapper = trainer.unlabeled(photo_cfg, trainer.model.teacher).mapper
    assert min(mapper(dict(content["images"][1]))["image"].shape[1:]) == 96

    make_trainer(FgBgTrainer, photo_cfg, tmp_path / "run", 1)
    assert believing == [12, 6]
    (photos / "4.png").unlink()
    make_trainer(FgBgTrainer, photo_cfg, tmp_path / "run", 1)
    assert believing == [12, 6, 12, 5]
    os.utime(photos / "3.png", (0, 0))  # another photo of the same size has another time
    make_trainer(FgBgTrainer, photo_cfg, tmp_path / "run", 1)
    assert believing == [12, 6, 12, 5, 12, 5]


def test_runs_can_share_a_file_and_never_overwrite_another(photo_cfg, believing, coco, tmp_path):
    photo_cfg.MODEL.KD.UNLABELED.FILE = str(tmp_path / "shared" / "detections.json")
    for name in ("a", "b"):
        make_trainer(FgBgTrainer, photo_cfg, tmp_path / name, 1)
    assert believing == [12, 6]
    photo_cfg.MODEL.KD.UNLABELED.FILE = coco[0]
    before = open(coco[0]).read()
    with pytest.raises(ConfigError, match="FILE .* was not written by a training with photos"):
        make_trainer(FgBgTrainer, photo_cfg, tmp_path / "c", 1)
    assert open(coco[0]).read() == before
    (tmp_path / "notes.txt").write_text("mine")
    photo_cfg.MODEL.KD.UNLABELED.FILE = str(tmp_path / "notes.txt")
    with pytest.raises(ConfigError, match="FILE .* was not written by a training with photos"):
        make_trainer(FgBgTrainer, photo_cfg, tmp_path / "c", 1)


class Kill(HookBase):
    def after_step(self):
        if self.trainer.iter == 3:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_killed_and_resumed_run_ends_with_the_same_weights(photo_cfg, believing, tmp_path):
    photo_cfg.MODEL.KD.UNLABELED.LOSS_WEIGHT = 0.5
    warm_up(4)
    train(FgBgTrainer, photo_cfg, tmp_path / "whole", 6)
    asked = len(believing)
    trainer = make_trainer(FgBgTrainer, photo_cfg, tmp_path / "killed", 6)
    trainer.register_hooks([Kill()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    train(FgBgTrainer, photo_cfg, tmp_path / "killed", 6, resume=True)
    assert len(believing) == 2 * asked  # not asked again after the kill
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(v, killed[k]) for k, v in whole.items())
    last = json.loads((tmp_path / "whole" / "metrics.json").read_text().splitlines()[-1])
    assert {"loss_cls", "loss_cls_unlabeled", "loss_kd_fg", "loss_kd_bg"} <= last.keys()


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("MODEL.KD.UNLABELED.SHARE", 1.0, "SHARE is 1.0: give a number between 0 and 1"),
        ("MODEL.KD.UNLABELED.PRECISION", 0.0, "PRECISION is 0.0: give a number over 0"),
        ("MODEL.KD.UNLABELED.LOSS_WEIGHT", -1.0, "LOSS_WEIGHT is -1.0: it must be >= 0"),
        ("SOLVER.IMS_PER_BATCH", 1, "one image per batch.*set SOLVER.IMS_PER_BATCH 2 or more"),
        ("MODEL.META_ARCHITECTURE", "RetinaNet", "DATASETS.UNLABELED needs a teacher"),
        ("MODEL.KD.FGBG", None, "DATASETS.UNLABELED needs a teacher"),
    ],
)
def test_keys_that_do_not_fit_are_named(photo_cfg, believing, key, value, message, tmp_path):
    if value is None:  # all terms are off: this is plain training
        photo_cfg.MODEL.KD.FGBG.update({k.upper(): v for k, v in FGBG_OFF.items()})
    else:
        photo_cfg.merge_from_list([key, value])
    with pytest.raises(ConfigError, match=message):
        make_trainer(FgBgTrainer, photo_cfg, tmp_path / "run", 1)


def test_a_teacher_whose_classes_are_not_matched_is_refused():
    with pytest.raises(TeacherError, match="needs a one-stage teacher.* is a GeneralizedRCNN"):
        check_teacher(Teacher(faster_rcnn().eval()))


def test_nothing_confident_on_any_photo_is_an_error_if_empty_images_are_left_out(
    photo_cfg, believing, tmp_path, monkeypatch
):
    monkeypatch.setattr(unlabeled, "score_threshold", lambda *args: 1.0)
    make_trainer(FgBgTrainer, photo_cfg, tmp_path / "kept", 1)
    photo_cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = True
    with pytest.raises(TeacherError, match="detects nothing with confidence on 6 photos"):
        make_trainer(FgBgTrainer, photo_cfg, tmp_path / "left_out", 1)


def test_a_comparison_trains_the_plain_student_without_the_photos(photo_cfg):
    assert method_overrides(photo_cfg, "plain")[-2:] == ["DATASETS.UNLABELED", "()"]
    photo_cfg.DATASETS.UNLABELED = ()
    assert "DATASETS.UNLABELED" not in method_overrides(photo_cfg, "plain")


def test_the_photos_of_a_comparison_can_be_switched_off_for_one_method(photo_cfg):
    found = method_overrides(photo_cfg, "FgBg DATASETS.UNLABELED=() UNLABELED.LOSS_WEIGHT=1")
    merge_overrides(photo_cfg, found)
    assert photo_cfg.DATASETS.UNLABELED == () and photo_cfg.MODEL.KD.UNLABELED.LOSS_WEIGHT == 1


def test_folders_of_photos_expand_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    cfg = tiny_cfg()
    cfg.DATASETS.UNLABELED, cfg.MODEL.KD.UNLABELED.FILE = ("~/a", "b"), "~/c.json"
    expand_paths(cfg)
    assert cfg.DATASETS.UNLABELED == ("/home/ann/a", "b")
    assert cfg.MODEL.KD.UNLABELED.FILE == "/home/ann/c.json"


def test_paths_of_photos_are_expanded_in_a_python_config(monkeypatch):
    monkeypatch.setenv("PHOTOS", "/data")
    train = {"unlabeled": ["$PHOTOS/a", "b"], "unlabeled_file": "$PHOTOS/found.json"}
    cfg = OmegaConf.create({"train": train})
    expand_paths(cfg)
    assert cfg.train == {"unlabeled": ["/data/a", "b"], "unlabeled_file": "/data/found.json"}


def test_a_mapper_that_drops_what_it_does_not_know_leaves_the_mark():
    found = _Marking(lambda record: {"image": record["file_name"]})({"file_name": "a.jpg"})
    assert found == {"image": "a.jpg", "unlabeled": True}
    assert _Marking(lambda record: None)({}) is None


# --- the losses ---


def yolo(seed=1):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_model(tiny_yolo_cfg())


def yolox(seed=1):
    pytest.importorskip("yolox")
    return yolox_detector(seed=seed)


FAMILIES = {
    "RetinaNet": lambda seed: detector("RetinaNet", seed=seed),
    "FCOS": lambda seed: detector("FCOS", seed=seed),
    "SSD": lambda seed: tiny_ssd(seed=seed),
    "YOLOX": yolox,
    "YOLO": yolo,
}


def pair(family, **options):
    """A distiller whose batch norms do not mix the images of a batch."""
    model = distiller(FAMILIES[family](1), FAMILIES[family](2), **options)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model


def mixed(boxes=((5, 5, 30, 40), (30, 20, 60, 50))):
    """A photo without labels, then a labelled image, then another photo."""
    batch = make_batch([(64, 64)] * 3, [boxes, ((10, 10, 40, 30),), boxes])
    return [x | {"unlabeled": True} if i != 1 else x for i, x in enumerate(batch)]


def own(losses):
    return {k: v for k, v in losses.items() if "kd" not in k and "unlabeled" not in k}


@pytest.mark.parametrize("name", FAMILIES)
def test_with_weight_0_photos_have_no_part_in_the_detectors_losses_but_in_the_terms(name):
    batch = mixed()
    gate = {"gate": False}  # with it, a random teacher that is better on no object teaches nothing
    losses = losses_of(pair(name, unlabeled_weight=0.0, **gate), batch)
    alone = losses_of(pair(name, **gate), batch[1:2])
    assert losses.keys() == alone.keys()
    for key, value in own(losses).items():
        torch.testing.assert_close(value, alone[key], rtol=1e-4, atol=1e-6)
    for key in ("loss_kd_fg", "loss_kd_bg"):
        assert losses[key] > 0 and not torch.isclose(losses[key], alone[key], rtol=1e-3)
    as_labeled = [{k: v for k, v in x.items() if k != "unlabeled"} for x in batch]
    labeled = losses_of(pair(name, **gate), as_labeled)
    for key in ("loss_kd_fg", "loss_kd_bg"):  # as if the photos were labelled
        torch.testing.assert_close(losses[key], labeled[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.slow
def test_a_weight_adds_the_detectors_losses_on_the_photos(name):
    batch = mixed()
    absent, half, whole = (
        losses_of(pair(name, unlabeled_weight=weight), batch) for weight in (0.0, 0.5, 1.0)
    )
    assert half.keys() == absent.keys() | {f"{k}_unlabeled" for k in own(absent)}
    assert all(torch.equal(half[k], v) for k, v in absent.items())
    for key in half.keys() - absent.keys():
        torch.testing.assert_close(2 * half[key], whole[key])
        assert half[key] > 0
    model = pair(name, unlabeled_weight=0.5)
    sum(losses_of(model, batch).values()).backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert sum(g.abs().sum() for g in gradients) > 0


def test_the_logged_number_of_anchors_is_that_of_the_labelled_images():
    batch = mixed()
    with EventStorage() as found:
        pair("RetinaNet")(batch)
    with EventStorage() as alone:
        pair("RetinaNet")(batch[1:2])
    values = [x.latest()["num_pos_anchors"][0] for x in (found, alone)]
    assert values[0] == values[1] > 0
    assert found.latest()["unlabeled/num_pos_anchors"][0] != values[0]


def test_the_running_normaliser_stays_that_of_labelled_images():
    """And the part of the photos is divided in proportion to their number."""
    batch = mixed()
    soft, absent = (pair("RetinaNet", unlabeled_weight=weight) for weight in (1.0, 0.0))
    losses = losses_of(soft, batch)
    losses_of(absent, batch)
    kept = absent.student.loss_normalizer
    assert soft.student.loss_normalizer == kept != 100
    again = pair("RetinaNet")
    again.student.loss_normalizer = 2 * kept
    photos = [{k: v for k, v in batch[i].items() if k != "unlabeled"} for i in (0, 2)]
    expected = losses_of(again, photos)
    torch.testing.assert_close(losses["loss_cls_unlabeled"], expected["loss_cls"], rtol=1e-4,
                               atol=1e-6)  # fmt: skip


def test_a_method_divides_by_the_normaliser_of_all_images():
    model = pair("RetinaNet", name="QFL")
    _, batch = seen_by(model, mixed())
    assert batch.loss_normalizer == pytest.approx(3 * model.student.loss_normalizer)
    assert [len(x) for x in batch.gt_boxes] == [1, 2, 2]  # the labelled image is first


def test_a_batch_without_a_labelled_image_is_refused():
    with pytest.raises(ConfigError, match='All images of a batch are marked "unlabeled"'):
        losses_of(pair("RetinaNet"), mixed()[:1])


def test_an_output_with_nested_tensors_is_cut_by_images():
    maps = [torch.arange(3.0).reshape(3, 1, 1, 1)]
    output = DenseOutput(maps, raw={"a": (maps, [maps]), "b": 7, "c": DenseOutput(maps)})
    part = output.of_images(slice(1, None))
    assert part.logits is None and part.raw["b"] == 7
    for found in (part.features, part.raw["a"][0], part.raw["a"][1][0], part.raw["c"].features):
        assert found[0].flatten().tolist() == [1, 2]
    assert isinstance(part.raw["c"], DenseOutput)


def test_every_family_can_be_cut_by_images():
    """What a view keeps as raw has the images first, as DenseOutput says."""
    for name in ("RetinaNet", "FCOS", "SSD", "YOLO"):
        of = view(FAMILIES[name](1).eval())
        batch = of.as_seen(make_batch([(64, 64)] * 2, [(), ()]))
        with torch.no_grad():
            output = of.run(of.preprocess(batch).tensor)
            cut = output.of_images(slice(1, None))
            boxes = [of.decode(x.features, x.raw) for x in (output, cut)]
        assert all(torch.equal(a[1:], b) for a, b in zip(*boxes))
