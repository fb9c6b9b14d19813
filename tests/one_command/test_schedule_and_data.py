"""The schedule, the split of a test part, and data of other formats."""

import json
import os
import sys

import pytest
import torch
import yaml
from conftest import CLASSES, write_coco
from detectron2.config import get_cfg
from PIL import Image

from fgbg_kd.data.groups import group_of, groups_of, split
from fgbg_kd.data.validation import check_coco
from fgbg_kd.one_command.data import digest_of, prepare
from fgbg_kd.one_command.schedule import (
    batch_of,
    iterations_in,
    iterations_of,
    rescaled,
    schedule_settings,
)
from fgbg_kd.one_command.students import config_of
from fgbg_kd.utils.config_values import check_values
from fgbg_kd.utils.errors import ConfigError, DataError


@pytest.mark.parametrize(
    "images, teacher, batch", [(1000, 8, 8), (1000, 64, 16), (20, 16, 5), (4, 16, 2), (500, 1, 2)]
)
def test_the_batch_is_the_teachers_within_bounds(images, teacher, batch):
    assert batch_of(images, teacher) == batch


@pytest.mark.parametrize(
    "images, num_gpus, each, batch",
    [(30, 2, 1, 6), (30, 1, 1, 7), (30, 4, 2, 8), (8, 4, 1, 4), (1000, 3, 2, 15), (8, 1, 2, 2)],
)
def test_each_gpu_gets_equally_many_images_and_enough(images, num_gpus, each, batch):
    assert batch_of(images, 16, num_gpus, each) == batch


def test_the_length_follows_the_teacher_the_data_and_the_weights():
    assert iterations_of(1000, 10, 20_000, True) == (2000, "as many images as the teacher saw")
    number, why = iterations_of(1000, 10, 20_000, False)
    assert number == 4000 and "times 2 because the backbone has random weights" in why
    number, why = iterations_of(1000, 10, 1_440_000, True)  # COCO's schedule on a small set
    assert number == 7200 and why == "72 epochs of 1000 images"
    assert iterations_of(8, 2, 1_440_000, True)[0] == 300


def test_hours_are_divided_by_the_measured_step():
    why = "--hours 1, at 0.90 s per step on this machine"
    assert iterations_in(1, 0.9, test=36) == (3600, 5, why)  # 3420 s - 5 * 36 s, at 0.9 s
    assert iterations_in(1, 0.9, test=180) == (3600, 1, why)  # five would take a quarter
    message = "is time for 0 iterations: a step takes 2.00 s and an evaluation 30 s"
    with pytest.raises(ConfigError, match=message) as error:
        iterations_in(0.001, 2.0, 30.0)
    needed = float(str(error.value).split()[-1].rstrip("."))
    assert iterations_in(needed, 2.0, 30.0)[0] >= 10


def test_a_short_training_is_evaluated_at_its_end_only():
    for iterations, period in ((100, 100), (300, 200), (5000, 1000), (1003, 201)):
        settings = {s.key: s.value for s in schedule_settings(8, iterations, "")}
        assert settings["TEST.EVAL_PERIOD"] == period
        assert -(-iterations // period) <= 5  # evaluations, with the one at the end
    settings = {s.key: s.value for s in schedule_settings(8, 5000, "", evaluations=1)}
    assert settings["TEST.EVAL_PERIOD"] == 5000


def test_another_length_scales_the_steps_and_the_warm_up_of_the_users_schedule():
    cfg = get_cfg()
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS = 9000, (6000, 8000), 900
    found = {s.key: s.value for s in rescaled(cfg, 900, "--iterations")}
    assert found["SOLVER.MAX_ITER"] == 900 and found["SOLVER.STEPS"] == [600, 800]
    assert found["SOLVER.WARMUP_ITERS"] == 90 and found["SOLVER.CHECKPOINT_PERIOD"] == 45
    assert found["TEST.EVAL_PERIOD"] == 200
    assert rescaled(cfg, 900, "", evaluations=1)[-1].value == 900


@pytest.mark.parametrize("iterations", [1, 10, 300, 90_000])
def test_the_schedule_is_one_that_train_net_takes(iterations):
    cfg = config_of(schedule_settings(4, iterations, "why"))
    check_values(cfg)
    assert cfg.SOLVER.BASE_LR == 0.001 and cfg.SOLVER.MAX_ITER == iterations
    assert cfg.SOLVER.CHANNELS_LAST == (not torch.cuda.is_available())
    assert 1 <= cfg.TEST.EVAL_PERIOD and cfg.SOLVER.WARMUP_ITERS <= iterations / 10


@pytest.mark.parametrize(
    "name, group",
    [
        ("films/river_0042.jpg", "films/river"),
        ("river-7.png", "river"),
        ("000123.jpg", "000123"),
        ("beach.jpg", "beach"),
        ("IMG_2289_jpeg_jpg.rf.6fe5ab12.jpg", "IMG_2289_jpeg"),
        ("tank_01_jpg.rf.0aa1.jpg", "tank"),
        ("tank_01_JPG.rf.0aa1.jpg", "tank"),
        ("tank_01_webp.rf.0aa1.jpg", "tank"),
        ("tank_01_BMP.rf.0aa1.jpg", "tank"),
    ],
)
def test_a_group_is_the_name_without_its_number(name, group):
    assert group_of(name) == group


def test_files_of_one_film_make_blocks_of_neighbours():
    names = [f"film_{i:03d}.png" for i in range(100)]
    groups, how = groups_of(names)
    assert how == "20 blocks of neighbouring file names"
    assert len({groups[n] for n in names[:5]}) == 1 and groups[names[0]] != groups[names[5]]


def test_the_groups_of_many_images_are_counted_in_one_pass(monkeypatch):
    compared = []

    class Group(str):
        __hash__ = str.__hash__

        def __eq__(self, other):
            compared.append(other)
            return str.__eq__(self, other)

    monkeypatch.setattr("fgbg_kd.data.groups.group_of", lambda name: Group(name[:-1]))
    names = [f"{i}{side}" for i in range(300) for side in "ab"]
    assert groups_of(names)[1] == "300 groups of images, by their names"
    assert len(compared) <= 2 * len(names)


def content_of(names):
    images = [{"id": i, "file_name": n, "height": 50, "width": 60} for i, n in enumerate(names, 1)]
    boxes = [
        {"id": 100 + i["id"], "image_id": i["id"], "category_id": 1, "bbox": [5, 5, 10, 20]}
        for i in images
    ]
    return {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "a"}]}


def test_no_group_is_in_both_parts_and_the_seed_decides():
    names = [f"film{f}x/frame_{i}.png" for f in range(12) for i in range(5)]
    names = [n.replace("/", "_") for n in names]
    content = content_of(names)
    content["annotations"][0] |= {"area": None, "iscrowd": None}
    train, test, note = split(content, "a.json", seed=0)
    groups = [{group_of(i["file_name"]) for i in part["images"]} for part in (train, test)]
    assert not groups[0] & groups[1] and len(groups[0] | groups[1]) == 12
    assert len(test["images"]) == 10  # at most a fifth of 60, in whole films
    assert note.startswith("10 of 60 training images") and "12 groups" in note and "seed 0" in note
    check_coco(train, "train", training=True)
    check_coco(train, "train", training=False)
    check_coco(test, "test", training=False)  # area and iscrowd are filled in
    assert test["annotations"][0]["area"] == 200
    again, other = (split(content_of(names), "a.json", seed=s)[1] for s in (0, 1))
    assert again == test != other


def test_groups_over_a_fifth_are_split_off_too():
    names = [f"{film}_{i}.png" for film in "abcd" for i in range(25)] + ["e_0.png"]
    for seed in range(5):
        _, test, _ = split(content_of(names), "a.json", seed=seed)
        assert len(test["images"]) in (25, 26)


def test_a_test_set_without_objects_is_refused(coco, tmp_path):
    content = json.loads(open(coco[0]).read())
    for annotations in ([], [a | {"iscrowd": 1} for a in content["annotations"]]):
        (tmp_path / "test.json").write_text(json.dumps(content | {"annotations": annotations}))
        with pytest.raises(DataError, match="test.json: no box of the test set counts"):
            prepare(coco, [str(tmp_path / "test.json"), coco[1]], tmp_path / "data")


def test_a_set_that_cannot_be_split_is_refused():
    with pytest.raises(DataError, match="a.json has 3 images, too few .*give --test"):
        split(content_of(["a1.png", "b1.png", "c1.png"]), "a.json")
    content = content_of([f"{c}.png" for c in "abcdef"])
    content["annotations"] = content["annotations"][:1]
    with pytest.raises(DataError, match="a.json cannot be split into two parts with objects"):
        split(content, "a.json")


@pytest.mark.parametrize(
    "values, message",
    [
        (["gone.json", "photos"], "--train gone.json photos: there is no gone.json. Known formats"),
        (["annotations.json"], "give the folder of its images too: --train .* photos/"),
        (["annotations.json", "gone"], "annotations.json gone: there is no folder gone"),
        (["images", "images"], "give a COCO file and the folder of its images"),
        (["images"], "--train .*images has none of the known formats: COCO"),
        (["a", "b", "c"], "there is no a"),
        (["names.yaml"], "names.yaml is not a data.yaml of YOLO"),
        (["lists.yaml"], "train is 'train.txt'. Only one folder of images can be converted"),
        (["away.yaml"], "train is 'far/images', and there is no such folder"),
        (["no_train.yaml"], "no training images are named there"),
    ],
)
def test_data_that_cannot_be_found_are_refused(values, message, tmp_path, monkeypatch):
    write_coco(tmp_path, 4, seed=0)
    monkeypatch.chdir(tmp_path)
    for name, text in (
        ("names", "- a"),
        ("lists", "train: train.txt"),
        ("away", "train: far/images"),
        ("no_train", "names: [a]"),
    ):
        (tmp_path / f"{name}.yaml").write_text(text)
    with pytest.raises(DataError, match=message):
        prepare(values, [], tmp_path / "data")


def test_without_the_library_the_message_says_how_to_go_on(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    (tmp_path / "Annotations").mkdir()
    with pytest.raises(DataError, match=r"supervision, which is not installed: pip install -e"):
        prepare([str(tmp_path)], [], tmp_path / "data")


XML = """<annotation><filename>{name}</filename><size><width>{width}</width>
<height>{height}</height><depth>3</depth></size>{objects}</annotation>"""
OBJECT = """<object><name>{name}</name><bndbox><xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax>
<ymax>{3}</ymax></bndbox></object>"""


def write_voc(folder, coco):
    """The set as PASCAL VOC, whose corners count from 1."""
    content = json.loads(open(coco[0]).read())
    for name in ("Annotations", "JPEGImages"):
        (folder / name).mkdir(parents=True)
    for image in content["images"]:
        stem = image["file_name"][:-4]
        Image.open(f"{coco[1]}/{image['file_name']}").save(folder / "JPEGImages" / f"{stem}.png")
        objects = ""
        for a in (a for a in content["annotations"] if a["image_id"] == image["id"]):
            x, y, w, h = a["bbox"]
            corners = x + 1, y + 1, x + w, y + h
            objects += OBJECT.format(*corners, name=CLASSES[a["category_id"] - 1])
        text = XML.format(
            name=image["file_name"], width=image["width"], height=image["height"], objects=objects
        )
        (folder / "Annotations" / f"{stem}.xml").write_text(text)


def write_yolo(folder, coco):
    content = json.loads(open(coco[0]).read())
    for image in content["images"]:
        part = "train" if image["id"] % 3 else "valid"
        for name in ("images", "labels"):
            (folder / part / name).mkdir(parents=True, exist_ok=True)
        stem = image["file_name"][:-4]
        Image.open(f"{coco[1]}/{stem}.png").save(folder / part / "images" / f"{stem}.png")
        w, h = image["width"], image["height"]
        boxes = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        lines = [
            f"{a['category_id'] - 1} {(a['bbox'][0] + a['bbox'][2] / 2) / w} "
            f"{(a['bbox'][1] + a['bbox'][3] / 2) / h} {a['bbox'][2] / w} {a['bbox'][3] / h}"
            for a in boxes
        ]
        (folder / part / "labels" / f"{stem}.txt").write_text("\n".join(lines))
    about = {"train": "../train/images", "val": "../valid/images", "names": list(CLASSES)}
    (folder / "data.yaml").write_text(yaml.safe_dump(about))


def boxes_of(*paths):
    found = set()
    for path in paths:
        content = json.loads(open(path).read())
        files = {i["id"]: i["file_name"] for i in content["images"]}
        names = {c["id"]: c["name"] for c in content["categories"]}
        for a in content["annotations"]:
            box = tuple(round(v) for v in a["bbox"])
            found.add((files[a["image_id"]], names[a["category_id"]], box))
    return found


@pytest.mark.parametrize("lists", [True, False])
def test_pascal_voc_gives_the_same_boxes_as_coco(lists, coco, tmp_path):
    pytest.importorskip("supervision")
    write_voc(tmp_path / "voc", coco)
    if lists:
        folder = tmp_path / "voc" / "ImageSets" / "Main"
        folder.mkdir(parents=True)
        (folder / "trainval.txt").write_text("".join(f"{i}\n" for i in range(8)))
        (folder / "test.txt").write_text("".join(f"{i}\n" for i in range(8, 12)))
    data = prepare([str(tmp_path / "voc")], [], tmp_path / "data")
    assert boxes_of(data.train[0], data.test[0]) == boxes_of(coco[0])
    files = [json.loads(open(x[0]).read()) for x in (data.train, data.test)]
    count = [len(f["images"]) for f in files]
    assert count == ([8, 4] if lists else [10, 2])
    assert ("the test part of" if lists else "split off") in data.note
    assert {c["name"] for c in files[0]["categories"]} == {
        c["name"] for c in files[1]["categories"]
    }


def write_lists(folder, **parts):
    """ImageSets of a VOC folder, from the numbers of the images of each part."""
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    for name, numbers in parts.items():
        text = "".join(f"{i}  1\n" for i in numbers) + "  \n"  # a line of blanks
        (folder / "ImageSets" / "Main" / f"{name}.txt").write_text(text)


def names_in(file):
    return {i["file_name"] for i in json.loads(open(file).read())["images"]}


@pytest.mark.parametrize("again", [False, True])
def test_val_of_voc_is_the_test_part_and_is_not_trained_on(again, coco, tmp_path):
    pytest.importorskip("supervision")
    write_voc(tmp_path, coco)
    write_lists(tmp_path, train=range(8), val=range(8, 12), trainval=range(12))
    where = [str(tmp_path)]
    data = prepare(where, where if again else [], tmp_path / "data")
    assert names_in(data.train[0]) == {f"{i}.png" for i in range(8)}
    assert names_in(data.test[0]) == {f"{i}.png" for i in range(8, 12)}


def test_trainval_of_voc_is_trained_on_if_val_is_not_the_test_part(coco, tmp_path):
    pytest.importorskip("supervision")
    write_voc(tmp_path, coco)
    write_lists(tmp_path, train=range(8), val=range(8, 10), trainval=range(10), test=(10, 11))
    data = prepare([str(tmp_path)], [], tmp_path / "data")
    assert len(names_in(data.train[0])) == 10 and len(names_in(data.test[0])) == 2
    (tmp_path / "ImageSets" / "Main" / "test.txt").unlink()
    other = write_coco(tmp_path / "other", 4, seed=5)
    data = prepare([str(tmp_path)], other, tmp_path / "data")
    assert len(names_in(data.train[0])) == 10 and data.test == other


def test_images_that_are_in_both_parts_are_refused_or_named_in_a_warning(coco, tmp_path, caplog):
    pytest.importorskip("supervision")
    write_voc(tmp_path / "voc", coco)
    write_lists(tmp_path / "voc", train=range(8), val=range(6, 12))
    write_yolo(tmp_path / "yolo", coco)
    about = tmp_path / "yolo" / "data.yaml"
    about.write_text(about.read_text().replace("../valid", "../train"))
    plain = tmp_path / "plain"
    write_voc(plain, coco)
    for train, test, count in (
        ("voc", [], "2 of 6"),
        ("yolo", [], "8 of 8"),
        ("plain", 1, "12 of"),
    ):
        where = [str(tmp_path / train)]
        message = f"{count} .*test images are training images too, such as .*png.*give another --te"
        with pytest.raises(DataError, match=message):
            prepare(where, where if test else [], tmp_path / "data")
    assert "training images too" not in caplog.text
    assert prepare(coco, coco, tmp_path / "data").test == coco
    assert "12 of 12 test images are training images too" in caplog.text


def test_the_digest_of_a_set_changes_with_its_labels(coco, tmp_path):
    write_voc(tmp_path / "voc", coco)
    write_lists(tmp_path / "voc", train=range(8), val=range(8, 12))
    write_yolo(tmp_path / "yolo", coco)
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "0.xml").write_text("<annotation/>")
    yolo = tmp_path / "yolo"
    for path, file in (
        (tmp_path / "voc", "Annotations/3.xml"),
        (tmp_path / "voc", "ImageSets/Main/val.txt"),
        (tmp_path / "plain", "0.xml"),
        (yolo, "train/labels/1.txt"),
        (yolo / "data.yaml", "../valid/labels/3.txt"),
        (yolo / "data.yaml", "../data.yaml"),
    ):
        before = digest_of([str(path)])
        (path.parent / "result.txt").write_text("no label")
        assert digest_of([str(path)]) == before
        with open(os.path.normpath(path / file), "a") as opened:
            opened.write("\n")
        assert digest_of([str(path)]) != before
    assert digest_of([]) == digest_of(["gone"]) == ""


@pytest.mark.parametrize("lists", [True, False])
def test_difficult_objects_of_voc_train_but_do_not_count_in_the_test(lists, coco, tmp_path):
    pytest.importorskip("supervision")
    write_voc(tmp_path, coco)
    for xml in (tmp_path / "Annotations").iterdir():  # the first object of each image
        text = xml.read_text().replace("<bndbox>", "<difficult>1</difficult><bndbox>", 1)
        xml.write_text(text)
    if lists:
        folder = tmp_path / "ImageSets" / "Main"
        folder.mkdir(parents=True)
        (folder / "train.txt").write_text("".join(f"{i}\n" for i in range(8)))
        (folder / "val.txt").write_text("".join(f"{i}\n" for i in range(8, 12)))
    data = prepare([str(tmp_path)], [], tmp_path / "data")
    for path, crowd in ((data.train[0], 0), (data.test[0], 1)):
        objects = json.loads(open(path).read())["annotations"]
        images = [a["image_id"] for a in objects]
        first = [images.index(i) == n for n, i in enumerate(images)]
        assert any(first) and not all(first)
        assert [a.get("difficult", 0) for a in objects] == [int(x) for x in first]
        assert [a["iscrowd"] for a in objects] == [crowd * x for x in first]


@pytest.mark.parametrize("place", ["", "data.yaml"])
def test_yolo_gives_the_same_boxes_as_coco_and_its_own_test_part(place, coco, tmp_path):
    pytest.importorskip("supervision")
    write_yolo(tmp_path / "yolo", coco)
    data = prepare([str(tmp_path / "yolo" / place)], [], tmp_path / "data")
    assert boxes_of(data.train[0], data.test[0]) == boxes_of(coco[0])
    assert len(json.loads(open(data.test[0]).read())["images"]) == 4
    assert "the test part of" in data.note


def test_yolo_images_in_subfolders_are_told(coco, tmp_path):
    pytest.importorskip("supervision")
    write_yolo(tmp_path, coco)
    for part in ("train", "valid"):
        images = tmp_path / part / "images"
        images.rename(tmp_path / part / "more")
        images.mkdir()
        (tmp_path / part / "more").rename(images / "more")
    with pytest.raises(DataError, match="has no images with labels. Images in subfolders are not"):
        prepare([str(tmp_path)], [], tmp_path / "data")


def test_damaged_labels_are_named(coco, tmp_path):
    pytest.importorskip("supervision")
    write_yolo(tmp_path, coco)
    (tmp_path / "train" / "labels" / "1.txt").write_text("0 0.5")
    with pytest.raises(DataError, match="cannot be converted to COCO format: .*1.txt"):
        prepare([str(tmp_path)], [], tmp_path / "data")


def test_an_object_of_several_parts_is_no_crowd(coco, tmp_path):
    pytest.importorskip("supervision")
    write_yolo(tmp_path, coco)
    label = next((tmp_path / "train" / "labels").glob("*.txt"))
    ring = "0.1 0.1 0.9 0.1 0.9 0.9 0.1 0.9 0.1 0.1 0.4 0.4 0.4 0.6 0.6 0.6 0.6 0.4 0.4 0.4"
    label.write_text(f"0 {ring}")
    data = prepare([str(tmp_path)], [], tmp_path / "data")
    found = json.loads(open(data.train[0]).read())
    assert {a["iscrowd"] for a in found["annotations"]} == {0}


def test_lists_of_voc_may_have_names_with_spaces_and_numbers_after_them(coco, tmp_path):
    pytest.importorskip("supervision")
    write_voc(tmp_path, coco)
    for folder in ("Annotations", "JPEGImages"):
        for file in list((tmp_path / folder).iterdir()):
            file.rename(file.with_stem(f"photo {file.stem}"))
    write_lists(tmp_path, train=[f"photo {i}" for i in range(8)], val=["photo 8", "photo 9"])
    data = prepare([str(tmp_path)], [], tmp_path / "data")
    numbers = [len(json.loads(open(p).read())["images"]) for p in (data.train[0], data.test[0])]
    assert numbers == [8, 2]


def test_classes_that_only_the_test_part_has_are_named_with_what_to_do(coco, tmp_path):
    pytest.importorskip("supervision")
    for part in ("train", "test"):
        write_voc(tmp_path / part, coco)
    xml = next((tmp_path / "test" / "Annotations").glob("*.xml"))
    xml.write_text(xml.read_text().replace("<name>square", "<name>dog").replace("stripe", "dog"))
    with pytest.raises(DataError, match=r"objects of \['dog'\], which no training image has"):
        prepare([str(tmp_path / "train")], [str(tmp_path / "test")], tmp_path / "data")


def test_difficult_is_a_key_of_voc_only(coco, tmp_path):
    content = json.loads(open(coco[0]).read())
    for annotation in content["annotations"]:
        annotation["difficult"] = None
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(content))
    data = prepare([str(path), coco[1]], [], tmp_path / "data")
    assert not any(a["iscrowd"] for a in json.loads(open(data.test[0]).read())["annotations"])
