"""The sets of real photos from small made-up files of a user, and their configs."""

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from pycocotools.coco import COCO

from fgbg_kd.config import student_config
from fgbg_kd.engine import read_config
from fgbg_kd.experiments.datasets import real_photos
from fgbg_kd.experiments.datasets.pretrained import SOURCES
from fgbg_kd.experiments.datasets.real_photos import AQUARIUM, VOC07, build_real, split_of

CONFIGS = sorted((ROOT / "configs" / "real").glob("*.yaml"))


@pytest.fixture
def small_splits(tmp_path, monkeypatch):
    """Splits of three photos each, in place of the committed ones."""
    monkeypatch.setattr(real_photos, "SPLITS", tmp_path)
    (tmp_path / "voc07.txt").write_text("train 000002\nval 000004\ntest 000001\n")
    (tmp_path / "aquarium.txt").write_text("train IMG_1\nval IMG_2_MOV3\ntest IMG_4\n")


def photo(path, width, height, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def voc_files(root, names=("000001", "000002", "000004", "000009")):
    """A VOCdevkit of photos of 100x640 pixels, each with an easy dog and a difficult cat."""
    for name in names:
        photo(root / "VOC2007" / "JPEGImages" / f"{name}.jpg", 100, 640)
        objects = "".join(
            f"<object><name>{category}</name><difficult>{difficult}</difficult><bndbox>"
            f"<xmin>11</xmin><ymin>21</ymin><xmax>{right}</xmax><ymax>60</ymax></bndbox></object>"
            for category, difficult, right in (("dog", 0, 50), ("cat", 1, 90))
        )
        xml = root / "VOC2007" / "Annotations" / f"{name}.xml"
        xml.parent.mkdir(exist_ok=True)
        xml.write_text(f"<annotation>{objects}</annotation>")
    return root


def aquarium_files(root):
    files = {"train": "IMG_1_jpeg_jpg", "valid": "IMG_2_MOV-3_jpg", "test": "IMG_4_jpg"}
    for part, name in files.items():
        photo(root / part / "images" / f"{name}.rf.0a1b.jpg", 768, 1024)
        label = root / part / "labels" / f"{name}.rf.0a1b.txt"
        label.parent.mkdir()
        label.write_text("4 0.5 0.25 0.5 0.25\n0 0.5 0.5 0 0\n")
    return root


@pytest.mark.usefixtures("small_splits")
@pytest.mark.parametrize("inside", [False, True], ids=["VOCdevkit", "VOC2007"])
def test_a_voc_photo_is_halved_with_its_boxes_and_difficult_objects_count_in_train_only(
    tmp_path, inside
):
    root = voc_files(tmp_path / "VOCdevkit")
    meta, made = build_real(tmp_path / "out", VOC07, root / "VOC2007" if inside else root)
    assert made
    ignored = {part: counts["ignored"] for part, counts in meta["summary"].items()}
    assert ignored == {"train": 0, "val": 1, "test": 1}
    coco = COCO(tmp_path / "out" / "train.json")
    assert [c["name"] for c in coco.cats.values()] == list(VOC07.classes)
    dog, cat = coco.anns.values()
    assert dog["bbox"] == [5.0, 10.0, 20.0, 20.0] and dog["area"] == 400.0
    assert VOC07.classes[dog["category_id"] - 1] == "dog" and "difficult" not in dog
    assert cat["difficult"] == 1 and cat["iscrowd"] == 0
    (image,) = coco.imgs.values()
    with Image.open(tmp_path / "out" / "images" / image["file_name"]) as made_photo:
        assert made_photo.size == (image["width"], image["height"]) == (50, 320)
    assert len(list((tmp_path / "out" / "images").iterdir())) == 3  # photo 000009 is in no part


@pytest.mark.usefixtures("small_splits")
def test_the_aquarium_keeps_its_own_names_and_leaves_out_empty_boxes(tmp_path):
    build_real(tmp_path / "out", AQUARIUM, aquarium_files(tmp_path / "in"))
    found = {}
    for part in real_photos.PARTS:
        coco = COCO(tmp_path / "out" / f"{part}.json")
        found[part] = [image["file_name"] for image in coco.imgs.values()]
        (shark,) = coco.anns.values()
        assert shark["bbox"] == [96.0, 64.0, 192.0, 128.0]
        assert coco.cats[shark["category_id"]]["name"] == "shark"
    assert found == {"train": ["IMG_1.jpg"], "val": ["IMG_2_MOV3.jpg"], "test": ["IMG_4.jpg"]}


@pytest.mark.usefixtures("small_splits")
def test_a_photo_that_is_no_larger_keeps_its_size(tmp_path):
    root = voc_files(tmp_path / "in")
    photo(root / "VOC2007" / "JPEGImages" / "000002.jpg", 300, 200)
    build_real(tmp_path / "out", VOC07, root)
    with Image.open(tmp_path / "out" / "images" / "000002.jpg") as image:
        assert image.size == (300, 200)


@pytest.mark.usefixtures("small_splits")
def test_a_missing_photo_is_named_and_nothing_is_left(tmp_path):
    root = voc_files(tmp_path / "in", names=("000001", "000004"))
    with pytest.raises(FileNotFoundError, match="lacks 1 of 3 photos, such as 000002.*VOCtest"):
        build_real(tmp_path / "out", VOC07, root)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("small_splits")
def test_a_made_set_is_copied_when_no_files_are_named(tmp_path):
    made = build_real(tmp_path / "shared" / "aquarium", AQUARIUM, aquarium_files(tmp_path / "in"))
    (tmp_path / "shared" / "aquarium" / "meta.json").unlink()
    copy = build_real(tmp_path / "out", AQUARIUM, shared=tmp_path / "shared")
    assert copy == made
    assert not build_real(tmp_path / "out", AQUARIUM, shared=tmp_path / "none")[1]
    with pytest.raises(FileNotFoundError, match="--from FOLDER.*raw-1024"):
        build_real(tmp_path / "new", AQUARIUM, shared=tmp_path / "none")


@pytest.mark.parametrize(
    "real, counts",
    [(VOC07, [2972, 495, 1485]), (AQUARIUM, [383, 62, 166])],
    ids=["voc", "aquarium"],
)
def test_the_committed_parts_share_no_photo(real, counts):
    split = split_of(real)
    assert [len(split[part]) for part in real_photos.PARTS] == counts
    assert len(set().union(*split.values())) == sum(counts)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_a_config_of_real_photos_names_files_that_the_tools_make(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    cfg = read_config(str(file))
    classes = {"aquarium": 7, "voc07": 20}
    (name,) = [n for n in classes if n in file.stem]
    folders = {"TRAIN": "voc07_10" if file.stem.startswith("voc07_10") else name, "TEST": name}
    for part, folder in folders.items():
        assert cfg.DATASETS[f"{part}_JSON"] == f"datasets/{folder}/{part.lower()}.json"
        assert cfg.DATASETS[f"{part}_IMAGES"] == f"datasets/{name}/images"
    assert num_classes_of_config(cfg) == classes[name]
    weights = cfg.MODEL.TIMM.WEIGHTS.removeprefix("datasets/pretrained/")
    assert weights in ("", *(source.file for source in SOURCES))
    made = "datasets/mobilenet_ssd/mobilenet_ssd_voc.pth"  # trained by others
    assert cfg.MODEL.WEIGHTS in ("", made)
    if cfg.MODEL.KD.TEACHER.CONFIG:
        teacher = read_config(cfg.MODEL.KD.TEACHER.CONFIG)
        trained = f"{teacher.OUTPUT_DIR}/model_final.pth"
        assert (cfg.MODEL.KD.TEACHER.WEIGHTS or teacher.MODEL.WEIGHTS) in (trained, made)
        assert num_classes_of_config(teacher) == classes[name]
    if not file.stem.startswith("Base"):
        assert cfg.MODEL.WEIGHTS or cfg.OUTPUT_DIR == f"output/real/{file.stem}"
        assert len(file.read_text().splitlines()) <= 15


def num_classes_of_config(cfg):
    name = student_config(cfg).MODEL.META_ARCHITECTURE
    node = "ROI_HEADS" if name == "GeneralizedRCNN" else name.upper()
    return cfg.MODEL[node].NUM_CLASSES
