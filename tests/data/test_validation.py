"""Bad data, one test each: refused with its name before training, or handled as the docs say."""

import json
import logging

import numpy as np
import pytest
import torch
from conftest import CLASSES, tiny_cfg, write_coco
from detectron2.data import DatasetCatalog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fgbg_kd.data import NamingMapper, register_datasets
from fgbg_kd.data.validation import read_coco
from fgbg_kd.engine import FgBgTrainer
from fgbg_kd.utils.errors import DataError


class Data:
    """Four images (0 has no box, 1 one, 2 two, 3 three) and their COCO file, to be spoilt."""

    def __init__(self, folder):
        folder.mkdir(exist_ok=True)
        path, self.images = write_coco(folder, 4, seed=3)
        self.path, self.folder = folder / "annotations.json", folder
        self.content = json.loads(self.path.read_text())

    def image(self, i):
        return self.folder / "images" / f"{i}.png"

    def register(self, part="TRAIN"):
        self.path.write_text(json.dumps(self.content))
        return self.register_file(part)

    def register_file(self, part="TRAIN"):
        cfg = tiny_cfg()
        cfg.DATASETS[part] = (str(self.folder),)
        cfg.DATASETS[f"{part}_JSON"] = str(self.path)
        cfg.DATASETS[f"{part}_IMAGES"] = str(self.images)
        register_datasets(cfg)
        return cfg

    def samples(self):
        """What training sees, by image id, without augmentation."""
        cfg = self.register()
        cfg.INPUT.RANDOM_FLIP, cfg.INPUT.MIN_SIZE_TRAIN = "none", (0,)
        mapper = NamingMapper(cfg, True)
        return {r["image_id"]: mapper(r) for r in DatasetCatalog.get(str(self.folder))}


@pytest.fixture
def data(tmp_path):
    return Data(tmp_path)


# --- the JSON file ---


def test_a_good_file_is_taken_without_a_word(data, caplog):
    samples = data.samples()
    assert [len(samples[i]["instances"]) for i in range(4)] == [0, 1, 2, 3]
    assert not [r for r in caplog.records if r.name.startswith("fgbg_kd")]


@pytest.mark.parametrize("size", [0, 1, 400, -1])
def test_a_truncated_file(data, size):
    data.path.write_bytes(data.path.read_bytes()[:size])
    with pytest.raises(DataError, match="annotations.json is no whole JSON file"):
        data.register_file()


def test_bytes_that_are_no_text(data):
    data.path.write_bytes(b"\xff\xfe\x00" * 9)
    with pytest.raises(DataError, match="no whole JSON file"):
        data.register_file()


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
def test_a_file_that_lacks_a_list(data, key):
    del data.content[key]
    with pytest.raises(DataError, match=f"not a COCO file: it needs a list of {key}"):
        data.register()


@pytest.mark.parametrize(
    "group, key",
    [
        (g, k)
        for g, keys in {
            "images": ("id", "file_name", "height", "width"),
            "annotations": ("id", "image_id", "category_id", "bbox"),
            "categories": ("id", "name"),
        }.items()
        for k in keys
    ],
)
def test_an_entry_that_lacks_a_key(data, group, key):
    del data.content[group][-1][key]
    with pytest.raises(DataError, match=f"1 {group} without .*{key}.* of the right type"):
        data.register()


@pytest.mark.parametrize("key", ["area", "iscrowd"])
def test_what_only_evaluation_reads_is_asked_for_where_it_is_evaluated(data, key):
    del data.content["annotations"][2][key]
    with pytest.raises(DataError, match=rf"1 annotations without .*{key}.*\(ids 3\)"):
        data.register("TEST")
    data.register("TRAIN")


@pytest.mark.parametrize("group", ["images", "annotations", "categories"])
def test_ids_that_repeat(data, group):
    data.content[group][1]["id"] = data.content[group][0]["id"]
    with pytest.raises(DataError, match=f"2 {group} whose id repeats"):
        data.register()


def test_an_id_that_evaluation_takes_for_not_found(data):
    for annotation in data.content["annotations"]:
        annotation["id"] -= 1
    data.register()
    read_coco(data.path, training=True)
    with pytest.raises(DataError, match=r"1 annotations with an id under 1.* from 1 \(ids 0\)"):
        read_coco(data.path, training=False)


@pytest.mark.parametrize("key", ["image_id", "category_id"])
def test_a_reference_to_nothing(data, key):
    data.content["annotations"][0][key] = 77
    with pytest.raises(DataError, match=r"an image or a category that is not listed \(ids 1\)"):
        data.register()


def test_categories_that_are_not_contiguous_keep_their_order(data):
    for category, number in zip(data.content["categories"], (17, 90)):
        category["id"] = number
    expected = [a["category_id"] - 1 for a in data.content["annotations"]]
    for a in data.content["annotations"]:
        a["category_id"] = (17, 90)[a["category_id"] - 1]
    samples = data.samples()
    found = torch.cat([samples[i]["instances"].gt_classes for i in range(4)])
    assert found.tolist() == expected


@pytest.mark.parametrize(
    "box",
    [[1, 2, -3, 4], [1, 2, 3, -4], [float("nan"), 2, 3, 4], [1, 2, float("inf"), 4], [1, 2, 3], [],
     [1, 2, 3, "4"], [1, 2, 3, None], [1, 2, 3, 10**400]],
)  # fmt: skip
def test_boxes_that_are_none(data, box):
    data.content["annotations"][1]["bbox"] = box
    with pytest.raises(DataError, match=r"1 boxes that are not four finite .*\(ids 2\)"):
        data.register()


def test_boxes_without_area_and_outside_are_left_out_and_counted(data, caplog):
    """Images 1 to 3 are 56x72, 80x64 and 56x72 (width x height)."""
    boxes = [a["bbox"] for a in data.content["annotations"]]
    boxes[1][:] = [5, 5, 0, 9]  # image 2
    boxes[3][:] = [100, 5, 9, 9]  # image 3: beyond the right border
    boxes[4][:] = [-20, -20, 9, 9]
    boxes[5][:] = [-4, 60, 10, 20]
    with caplog.at_level(logging.WARNING):
        samples = data.samples()
    assert "of 6 boxes, 1 without area and 2 outside" in caplog.text
    assert "and 1 are cut" in caplog.text
    assert [len(samples[i]["instances"]) for i in range(4)] == [0, 1, 1, 1]
    assert samples[3]["instances"].gt_boxes.tensor.tolist() == [[0, 60, 6, 72]]


def test_no_annotations_at_all(data):
    data.content["annotations"] = []
    with pytest.raises(DataError, match="no box to learn from: 0 annotations"):
        data.register()
    data.register("TEST")


def test_only_crowds(data):
    for a in data.content["annotations"]:
        a["iscrowd"] = 1
    with pytest.raises(DataError, match="no box to learn from: 6 annotations"):
        data.register()


def test_ignore_which_detectron2_does_not_know(data):
    data.content["annotations"][1]["ignore"] = 1
    with pytest.raises(DataError, match=r'1 annotations with "ignore".*iscrowd.*\(ids 2\)'):
        data.register()


def test_a_test_set_without_ground_truth_is_taken(data):
    del data.content["annotations"]
    data.register("TEST")
    assert len(DatasetCatalog.get(str(data.folder))) == 4


def test_polygons_of_two_points_lose_their_object(data):
    data.content["annotations"][0]["segmentation"] = [[1, 1, 9, 9]]
    samples = data.samples()
    assert [len(samples[i]["instances"]) for i in range(4)] == [0, 0, 2, 3]


# --- the image files ---


def test_missing_images(data):
    data.image(0).unlink()
    data.image(2).unlink()
    with pytest.raises(DataError, match="(?s)2 of 4 images.*0.png: there is no such file.*2.png"):
        data.register()


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n", b"<html>not found</html>"])
def test_files_that_are_no_image(data, content):
    data.image(1).write_bytes(content)
    with pytest.raises(DataError, match="1 of 4 images.*\n  1.png: cannot identify image file"):
        data.register()


def test_a_truncated_image_is_named_when_it_is_read(data):
    whole = data.image(1).read_bytes()
    data.image(1).write_bytes(whole[: len(whole) // 2])
    cfg = data.register()
    cfg.DATASETS.TEST = cfg.DATASETS.TRAIN
    for loader in (
        FgBgTrainer.build_train_loader(cfg),
        FgBgTrainer.build_test_loader(cfg, str(data.folder)),
    ):
        with pytest.raises(DataError, match=r"1.png cannot be used \(.*truncated.*--resume"):
            for _, _ in zip(range(4), loader):
                pass


def test_a_recorded_size_that_is_wrong(data):
    data.content["images"][1]["height"] += 1
    with pytest.raises(DataError, match=r"1.png: recorded as \(56, 73\).*but it is \(56, 72\)"):
        data.register()


@pytest.mark.parametrize("size", [0, -5])
def test_a_recorded_size_that_is_none(data, size):
    data.content["images"][1]["width"] = size
    with pytest.raises(DataError, match=r"1 images without area \(ids 1\)"):
        data.register()


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK"])
def test_grey_and_alpha_become_colour(data, mode):
    image = Image.open(data.image(1)).convert(mode)
    if mode == "CMYK":
        data.content["images"][1]["file_name"] = "1.tif"
        image.save(data.folder / "images" / "1.tif")
    else:
        image.save(data.image(1))
    sample = data.samples()[1]
    expected = np.asarray(image.convert("RGB"))[:, :, ::-1].transpose(2, 0, 1)
    assert sample["image"].shape == (3, 72, 56)
    assert np.array_equal(sample["image"].numpy(), expected)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_more_than_8_bits(data, mode):
    pixels = np.full((72, 56), 4000, {"I;16": "u2", "I": "i4", "F": "f4"}[mode])
    Image.fromarray(pixels).save(data.folder / "images" / "1.tif")
    data.content["images"][1]["file_name"] = "1.tif"
    with pytest.raises(DataError, match=f"1.tif: pixels of more than 8 bits .*mode {mode}"):
        data.register()


def turn(data, i, orientation):
    """Stores image i so that viewers, who heed EXIF, show it as it was."""
    image = Image.open(data.image(i))
    stored = image.transpose(
        {6: Image.Transpose.ROTATE_90, 3: Image.Transpose.ROTATE_180}[orientation]
    )
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(data.image(i), exif=exif)


@pytest.mark.parametrize("orientation", [3, 6])
def test_exif_turns_an_image_upright_and_is_counted(data, caplog, orientation):
    before = data.samples()[1]["image"]
    data = Data(data.folder / "turned")
    turn(data, 1, orientation)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(data.samples()[1]["image"], before)
    assert "1 of 4 images" in caplog.text and "EXIF" in caplog.text


def test_exif_that_turns_against_the_recorded_size(data):
    turn(data, 1, 6)
    entry = data.content["images"][1]
    entry["width"], entry["height"] = entry["height"], entry["width"]
    with pytest.raises(DataError, match=r"recorded as \(72, 56\).*it is \(56, 72\), turned as its"):
        data.register()


# --- one class ---


def test_one_class_is_learnt_with_either_kl(data, distil_cfg, tmp_path):
    from conftest import save_teacher, train

    for a in data.content["annotations"]:
        a["category_id"] = 1
    del data.content["categories"][1:]
    data.register()
    cfg = distil_cfg
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (str(data.folder),), ()
    cfg.DATASETS.TRAIN_JSON, cfg.DATASETS.TRAIN_IMAGES = str(data.path), str(data.images)
    cfg.DATASETS.TEST_JSON = ""
    cfg.MODEL.RETINANET.NUM_CLASSES = 1

    def one_class(c):
        c.MODEL.RETINANET.NUM_CLASSES = 1

    (tmp_path / "t").mkdir()
    files = save_teacher(tmp_path / "t", edit=one_class)
    cfg.MODEL.KD.TEACHER.CONFIG, cfg.MODEL.KD.TEACHER.WEIGHTS = files
    for kl in ("sigmoid", "softmax"):
        cfg.MODEL.KD.KL = kl
        trainer = train(FgBgTrainer, cfg, tmp_path / kl, 2)
        losses = trainer.storage.latest()
        assert losses["loss_kd_fg"][0] > 0 and losses["loss_kd_bg"][0] > 0


# --- fuzz ---

NUMBERS = st.one_of(
    st.integers(-2, 90), st.floats(-5, 90), st.sampled_from([0, -1, 1e30, float("nan"), 10**400])
)
ODD = st.one_of(st.none(), NUMBERS, st.text(max_size=2), st.lists(NUMBERS, max_size=5), st.just({}))
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["annotations"] * 6 + ["images", "categories"]),
        st.integers(0, 5),
        st.sampled_from(["id", "image_id", "category_id", "bbox", "width", "iscrowd", "area", "x"]),
        st.one_of(ODD, st.lists(NUMBERS, min_size=4, max_size=4), st.integers(1, 3)),
    ),
    max_size=3,
)


def test_fuzzed_files_are_refused_or_read_whole(tmp_path):
    """What passes is read by Detectron2 without an error, and no box is lost or moved."""
    from detectron2.data.datasets import load_coco_json

    good = Data(tmp_path).content
    path = tmp_path / "fuzzed.json"
    passed = []

    def passes(changes) -> bool:
        content = json.loads(json.dumps(good))
        for group, i, key, value in changes:
            content[group][i % len(content[group])][key] = value
        path.write_text(json.dumps(content))
        try:
            read_coco(str(path), training=True)
        except DataError:
            return False
        records = load_coco_json(str(path), "", f"fuzzed {tmp_path}")
        assert len(records) == 4
        boxes = [tuple(a["bbox"]) for r in records for a in r["annotations"]]
        assert sorted(boxes) == sorted(tuple(a["bbox"]) for a in content["annotations"])
        assert all(np.isfinite(boxes).all() and min(b[2:]) >= 0 for b in boxes)
        classes = [a["category_id"] for r in records for a in r["annotations"]]
        assert set(classes) <= set(range(len(CLASSES)))
        return True

    @settings(
        max_examples=1_000, deadline=None, derandomize=True, suppress_health_check=[*HealthCheck]
    )
    @given(cases=st.lists(CHANGES, min_size=10, max_size=10))
    def fuzz(cases):
        passed.extend(passes(changes) for changes in cases)

    logging.disable(logging.WARNING)
    try:
        fuzz()
    finally:
        logging.disable(logging.NOTSET)
    assert len(passed) >= 10_000 and 1_000 < sum(passed) < 9_000
