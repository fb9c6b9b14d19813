"""One test per kind of bad data: it is refused by name before training or handled as documented."""

import json
import logging
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASSES, tiny_cfg, write_coco
from detectron2.data import DatasetCatalog
from PIL import Image

from fgbg_kd.data import NamingMapper, register_datasets
from fgbg_kd.data.coco_files import box_records
from fgbg_kd.data.validation import check_coco, read_coco
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
    with pytest.raises(DataError, match="annotations.json is not a complete JSON file"):
        data.register_file()


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "gbk"])
@pytest.mark.parametrize("part", ["TRAIN", "TEST"])
def test_a_file_in_another_encoding_is_refused_with_how_to_save_it(data, encoding, part):
    data.content["categories"][0]["name"] = "\u65b9\u5757"
    text = json.dumps(data.content, ensure_ascii=False)
    data.path.write_bytes(text.encode(encoding))
    with pytest.raises(DataError, match="not plain UTF-8 text .*Save it as UTF-8 without"):
        data.register_file(part)


def test_an_image_that_is_listed_twice_is_refused(data):
    data.content["images"].append(data.content["images"][2] | {"id": 99})
    with pytest.raises(DataError, match=r"2 images with a file_name that repeats \(ids 2, 99\)"):
        data.register()


def test_boxes_that_repeat_are_counted(data, caplog):
    data.content["annotations"] += [a | {"id": a["id"] + 50} for a in data.content["annotations"]]
    data.register()
    assert "6 of 12 annotations repeat another one" in caplog.text


def test_a_class_without_boxes_is_named(data, caplog):
    data.content["categories"].append({"id": 0, "name": "shapes", "supercategory": "none"})
    data.register()
    assert "1 of 3 classes have no annotation ('shapes')" in caplog.text


@pytest.mark.parametrize("name", ["images\\{}.png", "images/{}.png", "{}.PNG", "C:\\x\\{}.png"])
def test_a_missing_file_is_looked_for_by_the_end_of_its_name(data, name):
    for i in data.content["images"]:
        i["file_name"] = name.format(i["id"])
    with pytest.raises(DataError, match=r"no such file, but there is 0.png.*its file_name"):
        data.register()


@pytest.mark.parametrize("part", ["TRAIN", "TEST"])
def test_an_image_that_would_have_no_pixel_across_is_refused(data, part):
    Image.new("RGB", (3000, 1)).save(data.image(0))
    data.content["images"][0] |= {"width": 3000, "height": 1}
    with pytest.raises(DataError, match=rf"3000x1 pixels.*INPUT.MAX_SIZE_{part} 1333"):
        data.register(part)


def test_images_with_several_frames_are_counted(data, caplog):
    first = Image.open(data.image(0))
    first.save(data.image(0), save_all=True, append_images=[Image.new("RGB", first.size)])
    data.register()
    assert "1 of 4 images" in caplog.text and "several frames" in caplog.text


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
def test_a_file_that_lacks_a_list(data, key):
    del data.content[key]
    with pytest.raises(DataError, match=f'not a COCO file: it has no list "{key}"'):
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
    with pytest.raises(DataError, match=f"1 {group} that lack a key .*: each needs .*{key} "):
        data.register()


@pytest.mark.parametrize("key", ["area", "iscrowd"])
def test_what_only_evaluation_reads_is_asked_for_where_it_is_evaluated(data, key):
    del data.content["annotations"][2][key]
    with pytest.raises(DataError, match=rf"1 annotations that lack .*\(ids 3\): .*{key} "):
        data.register("TEST")
    data.register("TRAIN")


@pytest.mark.parametrize("group", ["images", "annotations", "categories"])
def test_ids_that_repeat(data, group):
    data.content[group][1]["id"] = data.content[group][0]["id"]
    with pytest.raises(DataError, match=f"2 {group} with an id that repeats"):
        data.register()


@pytest.mark.parametrize("key", ["image_id", "category_id"])
def test_a_reference_to_nothing(data, key):
    data.content["annotations"][0][key] = 77
    with pytest.raises(DataError, match=r"whose image_id or category_id is not listed \(ids 1\)"):
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
    assert "of 6 boxes, 1 have no area, 2 lie outside" in caplog.text
    assert "and 1 reach over its border. Training leaves out" in caplog.text
    assert [len(samples[i]["instances"]) for i in range(4)] == [0, 1, 1, 1]
    assert samples[3]["instances"].gt_boxes.tensor.tolist() == [[0, 60, 6, 72]]


def test_no_annotations_at_all(data):
    data.content["annotations"] = []
    with pytest.raises(DataError, match="no box to learn from: all of its 0 annotations"):
        data.register()
    data.register("TEST")


def test_only_crowds(data):
    for a in data.content["annotations"]:
        a["iscrowd"] = 1
    with pytest.raises(DataError, match="no box to learn from: all of its 6 annotations"):
        data.register()


def test_ignore_which_detectron2_does_not_know(data):
    data.content["annotations"][1]["ignore"] = 1
    with pytest.raises(DataError, match=r'1 annotations with "ignore".*\(ids 2\): use "iscrowd"'):
        data.register()


def test_a_test_set_without_ground_truth_is_taken(data):
    del data.content["annotations"]
    data.register("TEST")
    assert len(DatasetCatalog.get(str(data.folder))) == 4


@pytest.mark.parametrize(
    "value", [[[1, 1, 9, 9]], [1, 1, 9, 9, 5, 5], [[]], "0 1 2", {"size": [72, 56]}, {}, 7, [None]]
)
@pytest.mark.parametrize("key", ["segmentation", "keypoints"])
def test_unusable_masks_and_keypoints_lose_no_box_and_are_counted(data, caplog, key, value):
    data.content["annotations"][0][key] = value
    with caplog.at_level(logging.WARNING, logger="fgbg_kd"):
        samples = data.samples()
    assert [len(samples[i]["instances"]) for i in range(4)] == [0, 1, 2, 3]
    if not (key == "keypoints" and value == [1, 1, 9, 9, 5, 5]):  # two valid points
        count = "1 annotations have a segmentation and 0 have keypoints"
        assert (count if key == "segmentation" else "0 annotations have a seg") in caplog.text
        assert caplog.text.count("not valid COCO format") == 1


@pytest.mark.parametrize("value", ["0", "1", None, 2, -1, [], float("nan")])
@pytest.mark.parametrize("part", ["TRAIN", "TEST"])
def test_a_crowd_flag_that_is_not_0_or_1_is_refused_in_both_sets(data, part, value):
    """Detectron2 would leave out the object silently."""
    data.content["annotations"][1]["iscrowd"] = value
    with pytest.raises(DataError, match=r"1 annotations .*iscrowd|that lack .*iscrowd"):
        data.register(part)


@pytest.mark.parametrize("value", [False, 0.0, 0])
def test_other_ways_to_write_a_crowd_flag_of_0_lose_no_box(data, value):
    for a in data.content["annotations"]:
        a["iscrowd"] = value
    samples = data.samples()
    assert [len(samples[i]["instances"]) for i in range(4)] == [0, 1, 2, 3]


# --- invalid boxes, and objects that COCO's evaluation ignores silently ---


def many_boxes(data, boxes):
    """Twelve annotations with these boxes in image 1 (56x72 pixels) as a function of i."""
    first = data.content["annotations"][0]
    data.content["annotations"] = [
        first | {"id": i + 1, "image_id": 1, "bbox": boxes(i)} for i in range(12)
    ]


def test_boxes_in_fractions_of_the_image_are_refused(data):
    many_boxes(data, lambda i: [0.05 * i, 0.3, 0.2, 0.1])
    with pytest.raises(DataError, match="no box is larger than a pixel.*multiply x and width"):
        data.register()


def test_boxes_as_corners_are_refused(data):
    many_boxes(data, lambda i: [3 * i, 4 * i, 3 * i + 15, 4 * i + 20])
    with pytest.raises(DataError, match="would fit if they were x1, y1, x2, y2.*write x2 - x1"):
        data.register()


def test_boxes_that_touch_the_border_are_no_corners(data):
    many_boxes(data, lambda i: [3 * i, 4 * i, 56 - 3 * i, 72 - 4 * i])
    data.register()


@pytest.mark.parametrize("area", [-1, float("nan"), float("inf"), 1e11])
def test_an_area_that_the_evaluation_ignores_is_refused_in_a_test_set(data, area):
    data.content["annotations"][0]["area"] = area
    read_coco_of(data, training=True)
    with pytest.raises(DataError, match=r'1 annotations whose "area" .*\(ids 1\)'):
        read_coco_of(data, training=False)


def read_coco_of(data, training):
    data.path.write_text(json.dumps(data.content))
    return read_coco(str(data.path), training=training)


def test_ids_that_numpy_would_round_are_refused(data):
    data.content["images"][0]["id"] = 2**63
    with pytest.raises(DataError, match="1 images with an id over"):
        data.register()


def test_names_of_classes_that_repeat_are_refused(data):
    data.content["categories"][1]["name"] = data.content["categories"][0]["name"]
    with pytest.raises(DataError, match="2 categories with a name that repeats"):
        data.register()


def test_a_test_set_on_which_ap_is_undefined_or_limited_is_warned_of(data, caplog):
    for a in data.content["annotations"]:
        a["iscrowd"] = 1
    read_coco_of(data, training=False)
    assert "AP cannot be computed" in caplog.text
    caplog.clear()
    first = data.content["annotations"][0] | {"iscrowd": 0}
    data.content["annotations"] = [first | {"id": i + 1} for i in range(101)]
    read_coco_of(data, training=False)
    assert "in 1 cases an image has more than 100 objects" in caplog.text


def warning_of(data, box, caplog):
    """The warning on a file whose first box (image 1, 56x72 pixels) is replaced."""
    data.content["annotations"][0]["bbox"] = box
    read_coco_of(data, training=True)
    return caplog.text


@pytest.mark.parametrize(
    "box", [[-2, 5, 9, 9], [5, -2, 9, 9], [49, 5, 9, 9], [5, 65, 9, 9]], ids=str
)
def test_a_box_may_reach_a_pixel_over_each_side_and_is_counted_beyond(data, caplog, box):
    near = [v + (1 if v < 0 else -1 if v > 40 else 0) for v in box]
    assert not warning_of(data, near, caplog)
    assert "0 lie outside their image, and 1 reach over" in warning_of(data, box, caplog)


@pytest.mark.parametrize(
    "box", [[-9, 5, 9, 9], [5, -9, 9, 9], [56, 5, 9, 9], [5, 72, 9, 9]], ids=str
)
def test_a_box_that_only_touches_a_side_from_outside_is_outside(data, caplog, box):
    assert "1 lie outside their image, and 0 reach over" in warning_of(data, box, caplog)


@pytest.mark.parametrize("box", [[5, 5, 0, 9], [5, 5, 9, 0], [5, 5, 0, 0]], ids=str)
def test_a_box_without_width_or_without_height_has_no_area(data, caplog, box):
    assert "1 have no area, 0 lie outside" in warning_of(data, box, caplog)


def test_a_file_with_few_boxes_or_small_ones_is_not_taken_for_fractions(data):
    many_boxes(data, lambda i: [0.5, 0.5, 2, 2])
    read_coco_of(data, training=True)
    many_boxes(data, lambda i: [0.05 * i, 0.3, 0.2, 0.1])
    data.content["annotations"] = data.content["annotations"][:9]
    read_coco_of(data, training=True)


def test_boxes_of_size_0_are_not_taken_for_fractions(data, caplog):
    many_boxes(data, lambda i: [0, 0, 0, 0])
    read_coco_of(data, training=False)
    assert "12 have no area" in caplog.text


@pytest.mark.parametrize(
    "out", [[40, 30, 30, 60], [20, 50, 40, 40]], ids=["x2 before x1", "y2 before y1"]
)
def test_boxes_that_reach_out_but_cannot_be_corners_are_counted_alone(data, caplog, out):
    many_boxes(data, lambda i: out)
    read_coco_of(data, training=True)
    assert "12 reach over its border" in caplog.text


def test_few_boxes_that_reach_out_make_no_file_of_corners(data, caplog):
    """All twelve would fit as corners; a fifth of them is the limit."""
    many_boxes(data, lambda i: [20, 20, 50, 60] if i < 2 else [10, 10, 20, 20])
    read_coco_of(data, training=True)
    assert "2 reach over its border" in caplog.text
    many_boxes(data, lambda i: [20, 20, 50, 60] if i < 3 else [10, 10, 20, 20])
    with pytest.raises(DataError, match="3 of 12 boxes reach over"):
        read_coco_of(data, training=True)


def test_a_hundred_objects_of_a_class_in_an_image_are_no_limit_and_crowds_do_not_count(
    data, caplog
):
    first = data.content["annotations"][0] | {"category_id": 1}
    extra = [{"iscrowd": 1}] * 5 + [{"category_id": 2}] * 5
    rows = [first | x for x in [{}] * 100 + extra]
    data.content["annotations"] = [x | {"id": i + 1} for i, x in enumerate(rows)]
    read_coco_of(data, training=False)
    assert "more than 100" not in caplog.text


@pytest.mark.parametrize("number, end", [(5, r"5\)"), (6, r"5, \.\.\.\)")])
def test_of_more_than_five_faults_the_message_names_five(data, number, end):
    for a in data.content["annotations"][:number]:
        a["ignore"] = 1
    with pytest.raises(DataError, match=rf"\(ids 1, 2, 3, 4, {end}: use"):
        read_coco_of(data, training=True)


def test_an_area_of_0_and_the_largest_that_counts_are_taken(data):
    for area in (0, 1e10):
        data.content["annotations"][0]["area"] = area
        read_coco_of(data, training=False)


def test_only_the_flag_ignore_is_refused_and_its_0_is_not(data):
    data.content["annotations"][0]["ignore"] = 0
    read_coco_of(data, training=True)


def test_boxes_that_no_detection_can_match_are_counted_in_a_test_set(data, caplog):
    data.content["annotations"][1]["bbox"] = [5, 5, 0, 9]
    read_coco_of(data, training=False)
    assert "1 have no area" in caplog.text and "objects that were not found" in caplog.text


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
    """Only a training can be continued."""
    whole = data.image(1).read_bytes()
    data.image(1).write_bytes(whole[: len(whole) // 2])
    cfg = data.register()
    cfg.DATASETS.TEST = cfg.DATASETS.TRAIN
    again = r"the file and continue with --resume \(distill.py: give the same command again\)"
    for loader, end in (
        (FgBgTrainer.build_train_loader(cfg), again),
        (FgBgTrainer.build_test_loader(cfg, str(data.folder)), "replace the file"),
    ):
        with pytest.raises(DataError, match=rf"1.png cannot be used \(.*truncated.*{end}\.$"):
            for _, _ in zip(range(4), loader):
                pass


def test_a_fault_of_an_augmentation_is_not_blamed_on_the_image(data):
    def broken(_):
        raise NameError("name 'nothing' is not defined")

    mapper = NamingMapper(is_train=True, augmentations=[], image_format="BGR")
    mapper.augmentations = broken
    cfg = data.register()
    with pytest.raises(DataError, match="an augmentation or .* failed .NameError: name 'nothing'"):
        mapper(DatasetCatalog.get(cfg.DATASETS.TRAIN[0])[0])


def test_a_recorded_size_that_is_wrong(data):
    data.content["images"][1]["height"] += 1
    with pytest.raises(DataError, match=r"1.png: .* says \(56, 73\).*but the image is \(56, 72\)"):
        data.register()


@pytest.mark.parametrize("size", [0, -5])
def test_a_recorded_size_that_is_none(data, size):
    data.content["images"][1]["width"] = size
    with pytest.raises(DataError, match=r"1 images whose height or width is under 1 \(ids 1\)"):
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
    with pytest.raises(DataError, match=f"1.tif: it has more than 8 bits .*mode {mode}"):
        data.register()


def turn(data, i, orientation):
    """Stores image i turned, so that viewers that apply EXIF show it unchanged."""
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
    with pytest.raises(DataError, match=r"says \(72, 56\).*the image is \(56, 72\) after its EXIF"):
        data.register()


# --- one class ---


@pytest.mark.slow
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

KEYS = "id", "image_id", "category_id", "bbox", "width", "iscrowd", "area", "segmentation", "x"
GROUPS = ("annotations",) * 6 + ("images", "categories")


def odd_number(rng):
    return rng.choice(
        [rng.randint(-2, 90), rng.uniform(-5, 90), 0, -1, 1e30, float("nan"), float("inf"), 10**400]
    )


def odd_value(rng):
    return rng.choice(
        [
            None,
            True,
            odd_number(rng),
            rng.randint(1, 3),
            rng.choice(["", "0", "x"]),
            [odd_number(rng) for _ in range(rng.randint(0, 5))],
            [odd_number(rng) for _ in range(4)],
            [rng.uniform(0, 50) for _ in range(4)],
            {},
        ]
    )


@pytest.mark.slow
def test_fuzzed_files_are_refused_or_read_whole(tmp_path):
    """A file that passes the checks is read without an error. No box is lost or moved."""
    good = json.dumps(Data(tmp_path).content)
    passed, cases = 0, 10_000

    def passes(rng) -> bool:
        content = json.loads(good)
        for _ in range(rng.randint(0, 3)):
            entries = content[rng.choice(GROUPS)]
            entries[rng.randrange(len(entries))][rng.choice(KEYS)] = odd_value(rng)
        try:
            check_coco(content, "fuzzed.json", training=rng.random() < 0.5)
        except DataError:
            return False
        numbers = {c["id"]: n for n, c in enumerate(content["categories"])}
        records = box_records(content, "", numbers)
        assert len(records) == 4
        boxes = [tuple(a["bbox"]) for r in records for a in r["annotations"]]
        assert sorted(boxes) == sorted(tuple(a["bbox"]) for a in content["annotations"])
        assert all(np.isfinite(boxes).all() and min(b[2:]) >= 0 for b in boxes)
        crowds = [a["iscrowd"] for r in records for a in r["annotations"]]
        assert set(crowds) <= {0, 1}
        assert sum(crowds) == sum(a.get("iscrowd", 0) == 1 for a in content["annotations"])
        classes = [a["category_id"] for r in records for a in r["annotations"]]
        assert set(classes) <= set(range(len(CLASSES)))
        return True

    logging.disable(logging.WARNING)
    try:
        for seed in range(cases):
            try:
                passed += passes(random.Random(seed))
            except Exception as error:
                raise AssertionError(f"seed {seed}") from error
    finally:
        logging.disable(logging.NOTSET)
    assert cases / 10 < passed < cases * 9 / 10


def test_one_file_for_training_and_testing_needs_what_a_test_set_needs(coco, tmp_path):
    """A set with one name in both places is checked for both."""
    content = json.loads(Path(coco[0]).read_text())
    for annotation in content["annotations"]:
        del annotation["area"]
    path = tmp_path / "no_area.json"
    path.write_text(json.dumps(content))
    cfg = tiny_cfg((str(path), coco[1]), name="both")
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("one_set",)
    with pytest.raises(DataError, match="area"):
        register_datasets(cfg)
