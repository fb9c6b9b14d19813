"""Training set, test set and detector match classes by name. The evaluator explains AP."""

import json
import logging
import math
import os

import pytest
import torch
from conftest import CLASSES, faster_rcnn_cfg, tiny_cfg, write_coco
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import Boxes, Instances
from omegaconf import OmegaConf

from fgbg_kd.data import (
    BoxEvaluator,
    check_num_classes,
    check_same_classes,
    match_categories,
    register_datasets,
    training_classes,
)
from fgbg_kd.data.classes import class_names, set_categories
from fgbg_kd.engine import FgBgTrainer
from fgbg_kd.utils.errors import ConfigError, DataError


@pytest.fixture
def cfg(tmp_path):
    """Training and test set of the same images, each with its own JSON file."""
    train = write_coco(tmp_path / "train", 4, seed=3)
    test = write_coco(tmp_path / "test", 4, seed=3)
    return tiny_cfg_of(train, test, str(tmp_path))


def tiny_cfg_of(train, test, name):
    cfg = tiny_cfg()
    for part, (path, images) in (("TRAIN", train), ("TEST", test)):
        cfg.DATASETS[part] = (f"{name}_{part}",)
        cfg.DATASETS[f"{part}_JSON"], cfg.DATASETS[f"{part}_IMAGES"] = path, images
    return cfg


def edit(path, change):
    with open(path) as file:
        content = json.load(file)
    change(content)
    with open(path, "w") as file:
        json.dump(content, file)


def renumber(content):
    """stripe = 1, square = 2, the reverse of the training set."""
    for category in content["categories"]:
        category["id"] = 3 - category["id"]
    for a in content["annotations"]:
        a["category_id"] = 3 - a["category_id"]


def perfect(name, folder=None):
    """Results of a perfect detector, with the detector's class numbers."""
    evaluator = BoxEvaluator(name, str(folder) if folder else None)
    evaluator.reset()
    for record in DatasetCatalog.get(name):
        found = Instances((record["height"], record["width"]))
        boxes = torch.tensor([a["bbox"] for a in record["annotations"]], dtype=torch.float)
        boxes = boxes.reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        found.pred_boxes, found.scores = Boxes(boxes), torch.ones(len(boxes))
        found.pred_classes = torch.tensor([a["category_id"] for a in record["annotations"]])
        evaluator.process([record], [{"instances": found}])
    return evaluator.evaluate()["bbox"]


def test_an_object_with_the_id_0_can_be_found(cfg):
    def from_zero(content):  # as Roboflow and Label Studio number
        for number, annotation in enumerate(content["annotations"]):
            annotation["id"] = number

    edit(cfg.DATASETS.TEST_JSON, from_zero)
    register_datasets(cfg)
    assert perfect(cfg.DATASETS.TEST[0])["AP"] == pytest.approx(100)


def test_a_test_set_that_numbers_its_classes_otherwise_is_matched_by_name(cfg, caplog, tmp_path):
    edit(cfg.DATASETS.TEST_JSON, renumber)
    register_datasets(cfg)
    assert "numbers its classes differently" in caplog.text
    train, test = (DatasetCatalog.get(cfg.DATASETS[x][0]) for x in ("TRAIN", "TEST"))
    for a, b in zip(train, test):
        assert [x["category_id"] for x in a["annotations"]] == [
            x["category_id"] for x in b["annotations"]
        ]
    results = perfect(cfg.DATASETS.TEST[0], tmp_path / "out")
    assert results["AP"] == pytest.approx(100)
    written = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    truth = json.loads(open(cfg.DATASETS.TEST_JSON).read())["annotations"]
    assert sorted(x["category_id"] for x in written) == sorted(x["category_id"] for x in truth)


def test_the_ap_of_a_class_has_its_name_also_in_another_numbering(cfg):
    edit(cfg.DATASETS.TEST_JSON, renumber)
    edit(
        cfg.DATASETS.TEST_JSON,
        lambda content: content.update(
            annotations=[a for a in content["annotations"] if a["category_id"] == 1]  # stripe
        ),
    )
    register_datasets(cfg)
    results = perfect(cfg.DATASETS.TEST[0])
    assert results["AP-stripe"] == pytest.approx(100) and math.isnan(results["AP-square"])


def test_evaluation_alone_matches_the_classes_as_well(cfg):
    """The training images need not exist, only the JSON file with the names."""
    edit(cfg.DATASETS.TEST_JSON, renumber)
    cfg.DATASETS.TRAIN_IMAGES = "nowhere"
    register_datasets(cfg, training=False)
    metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0])
    assert metadata.thing_classes == list(CLASSES)
    assert metadata.thing_dataset_id_to_contiguous_id == {2: 0, 1: 1}


def test_an_evaluation_without_the_training_file_says_that_the_order_is_not_known(cfg, caplog):
    cfg.DATASETS.TRAIN_JSON = "lost.json"
    register_datasets(cfg, training=False)
    assert "lost.json does not exist, so the classes are taken in the order of" in caplog.text


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c[0].update(name="squares"), "rename 'squares' to 'square'"),
        (lambda c: c[0].update(name="zebra"), 'add square to its list "categories".*remove zebra'),
        (lambda c: c.append({"id": 9, "name": "zebra"}), "remove zebra with their annotations"),
    ],
)
def test_other_classes_in_the_test_set_are_refused_with_both_lists(cfg, change, message):
    edit(cfg.DATASETS.TEST_JSON, lambda content: change(content["categories"]))
    with pytest.raises(DataError, match=f"(?s)  training: square, stripe\n.*{message}"):
        register_datasets(cfg)


def test_a_test_set_with_fewer_classes_is_told_what_to_add(cfg):
    def drop(content):
        content["categories"].pop()
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] == 1]

    edit(cfg.DATASETS.TEST_JSON, drop)
    with pytest.raises(DataError, match=r'add stripe to its list "categories" \(they need no'):
        register_datasets(cfg)


def test_sets_that_are_registered_in_python_are_compared_too():
    cfg = tiny_cfg()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("python_train",), ("python_test",)
    MetadataCatalog.get("python_train").thing_classes = ["square", "stripe"]
    MetadataCatalog.get("python_test").thing_classes = ["stripe", "square"]
    with pytest.raises(DataError, match="python_train and python_test have the same classes"):
        check_same_classes((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
    check_same_classes(cfg.DATASETS.TRAIN)
    check_num_classes(cfg, 2)
    with pytest.raises(ConfigError, match="2 classes .* has 80: set MODEL.RETINANET.NUM_CLASSES 2"):
        check_num_classes(cfg, 80)


def test_sets_of_detectron2s_own_registration_are_compared_before_they_are_loaded(tmp_path):
    """Detectron2 writes the names into the metadata only when it loads the file."""
    paths = [write_coco(tmp_path / part, 4, seed=3) for part in ("train", "test")]
    edit(paths[1][0], renumber)
    names = [f"{tmp_path}_{part}" for part in ("train", "test")]
    for name, (path, images) in zip(names, paths):
        register_coco_instances(name, {}, path, images)
    cfg = tiny_cfg()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = names[:1], names[1:]
    assert training_classes(cfg) == list(CLASSES)
    with pytest.raises(ConfigError, match="NUM_CLASSES 2"):
        check_num_classes(cfg, 80)
    with pytest.raises(DataError, match="same classes in different orders"):
        check_same_classes(names)
    expected = [
        [{"id": i + 1, "name": n} for i, n in enumerate(x)] for x in (CLASSES, CLASSES[::-1])
    ]
    assert [set_categories(name) for name in names] == expected
    for name in names:
        DatasetCatalog.get(name)
    assert [set_categories(name) for name in names] == expected


def test_categories_of_a_set_come_in_the_order_of_its_class_numbers(tmp_path):
    metadata = MetadataCatalog.get(f"{tmp_path}_reversed")
    assert set_categories(metadata.name) == []
    metadata.set(thing_classes=["cat", "dog"])
    assert set_categories(metadata.name) == [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}]
    metadata.set(thing_dataset_id_to_contiguous_id={3: 1, 7: 0})
    assert set_categories(metadata.name) == [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]


def test_a_class_with_a_similar_name_is_renamed_and_neither_added_nor_removed():
    categories = [{"id": 1, "name": "squares"}, {"id": 2, "name": "stripe"}]
    with pytest.raises(DataError) as error:
        match_categories(["square", "stripe"], categories, "val.json")
    advice = str(error.value).splitlines()[-1]
    assert advice == "Change val.json: rename 'squares' to 'square'."


def test_a_set_without_names_is_skipped():
    cfg = tiny_cfg()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("nameless_train",), ("named_test",)
    MetadataCatalog.get("named_test").thing_classes = ["square", "stripe"]
    check_num_classes(cfg, 2)


@pytest.mark.parametrize("number", [1, 3])
def test_more_and_fewer_classes_than_the_sets_are_refused(number):
    cfg = tiny_cfg()
    cfg.DATASETS.TRAIN = ("two_classes",)
    MetadataCatalog.get("two_classes").thing_classes = ["square", "stripe"]
    with pytest.raises(ConfigError, match=f"2 classes .* has {number}"):
        check_num_classes(cfg, number)


@pytest.mark.parametrize("names", ["named_by_text", ["nameless", "named_by_text"]])
def test_a_python_configs_classes_are_found_by_one_name_or_several(names):
    MetadataCatalog.get("named_by_text").thing_classes = ["a", "b"]
    cfg = OmegaConf.create({"dataloader": {"train": {"dataset": {"names": names}}}})
    assert training_classes(cfg) == ["a", "b"]


def test_names_come_in_the_order_of_ids_and_a_file_that_changed_is_read_again(tmp_path):
    path = tmp_path / "c.json"
    rows = [{"id": 5, "name": "a"}, {"id": 2, "name": "b"}, {"id": 9, "name": "0"}]
    path.write_text(json.dumps({"categories": rows}))
    os.utime(path, (1, 1))
    assert class_names(str(path)) == ["b", "a", "0"]
    path.write_text(json.dumps({"categories": rows[:1]}))
    os.utime(path, (2, 2))
    assert class_names(str(path)) == ["a"]


def test_one_set_may_be_training_and_test_set_and_be_registered_again(cfg):
    cfg.DATASETS.TEST = cfg.DATASETS.TRAIN
    cfg.DATASETS.TEST_JSON, cfg.DATASETS.TEST_IMAGES = (
        cfg.DATASETS.TRAIN_JSON,
        cfg.DATASETS.TRAIN_IMAGES,
    )
    for _ in range(2):
        register_datasets(cfg)
    register_datasets(cfg, training=False)


def test_categories_are_matched_to_the_detectors_classes():
    categories = [{"id": 7, "name": "dog"}, {"id": 90, "name": "cat"}]
    assert match_categories(["cat", "dog"], categories, "ids.json") == {90: 0, 7: 1}


def test_a_file_without_info_is_evaluated_by_every_pycocotools(cfg, monkeypatch):
    """Versions 2.0.9 and 2.0.10 read dataset["info"] without a default."""
    from pycocotools.coco import COCO

    load = COCO.loadRes

    def older(self, results):
        self.dataset["info"]
        return load(self, results)

    monkeypatch.setattr(COCO, "loadRes", older)
    register_datasets(cfg)
    assert "info" not in json.loads(open(cfg.DATASETS.TEST_JSON).read())
    assert perfect(cfg.DATASETS.TEST[0])["AP"] == pytest.approx(100)


def test_nothing_detected_is_0_ap_and_nothing_to_detect_is_nan_with_its_reason(cfg, caplog):
    register_datasets(cfg)
    evaluator = BoxEvaluator(cfg.DATASETS.TEST[0])

    def of_nothing():
        evaluator.reset()
        empty = Instances((9, 9))
        empty.pred_boxes, empty.scores = Boxes(torch.zeros(0, 4)), torch.zeros(0)
        empty.pred_classes = torch.zeros(0, dtype=torch.long)
        evaluator.process([{"image_id": 0}], [{"instances": empty}])
        with caplog.at_level(logging.WARNING, logger="fgbg_kd"):
            return evaluator.evaluate()["bbox"]["AP"]

    assert of_nothing() == 0 and "AP is 0: the detector detected nothing" in caplog.text
    evaluator._objects = 0
    assert math.isnan(of_nothing()) and "AP cannot be computed: the test set has no" in caplog.text


def test_a_set_that_python_registers_is_evaluated_on_its_own_boxes_again(cfg, tmp_path):
    """Detectron2 keeps a COCO file of such a set, which a change of the boxes makes wrong."""
    stale = tmp_path / "by_python_coco_format.json"
    stale.write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
    register_datasets(cfg)
    records = DatasetCatalog.get(cfg.DATASETS.TEST[0])
    DatasetCatalog.register("by_python", lambda: records)
    MetadataCatalog.get("by_python").thing_classes = list(CLASSES)
    evaluator = BoxEvaluator("by_python", str(tmp_path))
    assert len(evaluator._coco_api.imgs) == len(records) == 4


def test_sets_of_a_two_stage_detector_are_compared_as_well():
    for name, classes in (("ab_train", ["a", "b"]), ("ba_test", ["b", "a"])):
        MetadataCatalog.get(name).thing_classes = classes
    cfg = faster_rcnn_cfg()
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("ab_train",), ("ba_test",)
    with pytest.raises(DataError, match="ba_test"):
        FgBgTrainer.build_model(cfg)
    cfg.DATASETS.TEST, cfg.MODEL.ROI_HEADS.NUM_CLASSES = ("ab_train",), 1
    with pytest.raises(ConfigError, match="set MODEL.ROI_HEADS.NUM_CLASSES 2"):
        FgBgTrainer.build_model(cfg)
