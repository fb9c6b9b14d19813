"""The teacher's cache: equal losses, fewer teacher passes, and an error if images change."""

from types import SimpleNamespace

import pytest
import torch
from conftest import make_batch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from fgbg_kd.data import register_datasets
from fgbg_kd.detectors.dense import DenseOutput
from fgbg_kd.engine import FgBgTrainer
from fgbg_kd.teacher_cache import TeacherCache, check_fixed_input


def build(cfg, cache):
    cfg = cfg.clone()
    cfg.MODEL.KD.TEACHER.CACHE = cache
    torch.manual_seed(3)
    model = build_model(cfg).train()
    seen = []
    model.teacher.detector.backbone.register_forward_pre_hook(
        lambda _, args: seen.append(len(args[0]))
    )
    return model, seen


def losses_of(model, batch):
    with EventStorage(0):
        return model(batch)


@pytest.mark.parametrize("method", ["FgBg", "PKD"])
@pytest.mark.slow
def test_losses_are_the_same_and_the_second_epoch_runs_no_teacher(distil_cfg, method):
    distil_cfg.MODEL.KD.METHOD = method
    (plain, all_seen), (cached, seen) = build(distil_cfg, False), build(distil_cfg, True)
    batches = [make_batch(seed=s) for s in (0, 1)]  # images of two sizes, padded
    for batch in (*batches, *batches):
        expected, got = losses_of(plain, batch), losses_of(cached, batch)
        assert any(value > 0 for name, value in got.items() if "kd" in name)
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-6)
    assert all_seen == [2, 2, 2, 2] and seen == [2, 2]


def test_only_what_is_not_known_is_computed_and_the_order_does_not_matter(distil_cfg):
    (plain, _), (cached, seen) = build(distil_cfg, False), build(distil_cfg, True)
    first, second = make_batch(seed=0), make_batch(seed=1)
    losses_of(cached, first)
    losses_of(plain, first)
    mixed = [second[0], first[1]]
    for batch in (mixed, mixed[::-1]):
        expected, got = losses_of(plain, batch), losses_of(cached, batch)
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-6)
    assert seen == [2, 1]


def test_other_pixels_or_another_padding_are_not_taken_for_the_same_image(distil_cfg):
    (plain, _), (cached, seen) = build(distil_cfg, False), build(distil_cfg, True)
    small = make_batch(sizes=((64, 64),), boxes=(((8, 8, 40, 40),),))
    small[0]["file_name"] = "small.png"
    large = make_batch(sizes=((128, 128),), boxes=((),))
    for batch in (small, small + large, small + large, small):
        expected, got = losses_of(plain, batch), losses_of(cached, batch)
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-6)
    assert seen == [1, 2, 1]  # each image is kept once, as it came last
    flipped = [{**small[0], "image": small[0]["image"].flip(2)}]
    with pytest.raises(ValueError, match="TEACHER.CACHE needs .*small.png has other pixels"):
        losses_of(cached, flipped)


def test_a_new_image_behind_a_known_one_gets_its_own_outputs():
    cache = TeacherCache()
    inputs = torch.arange(2.0).reshape(2, 1, 1, 1).expand(2, 3, 2, 2)
    batch = [{"image": x, "file_name": str(i)} for i, x in enumerate(inputs)]

    def run(x):
        return DenseOutput([10 * x])

    for part in (batch[:1], batch, batch):
        got = cache(run, inputs[: len(part)], part)
        assert torch.equal(got.features[0], 10 * inputs[: len(part)])


def test_an_unknown_augmentation_is_refused_whatever_its_attributes():
    other = SimpleNamespace(short_edge_length=(64,))
    with pytest.raises(ValueError, match="TEACHER.CACHE needs"):
        check_fixed_input(SimpleNamespace(augmentations=SimpleNamespace(augs=[other])))


def test_what_is_kept_is_a_copy_that_later_changes_do_not_reach():
    cache, batch = TeacherCache(), [{"image": torch.zeros(3, 2, 2), "file_name": "a"}]
    output = torch.ones(1, 1, 2, 2)
    for _ in range(2):
        got = cache(lambda x: DenseOutput([output]), torch.zeros(1, 3, 2, 2), batch)
        assert (got.features[0] == 1).all()
        output.zero_()


@pytest.mark.parametrize(
    "key, value, name",
    [
        ("RANDOM_FLIP", "horizontal", "RandomFlip"),
        ("CROP.ENABLED", True, "RandomCrop"),
        ("MIN_SIZE_TRAIN", (64, 80), "ResizeShortestEdge"),
    ],
)
def test_a_cache_where_images_change_is_refused_before_training(distil_cfg, key, value, name):
    distil_cfg.MODEL.KD.TEACHER.CACHE = True
    FgBgTrainer.build_train_loader(distil_cfg)
    distil_cfg.merge_from_list([f"INPUT.{key}", value])
    with pytest.raises(ValueError, match=f"TEACHER.CACHE needs .* the input has {name}"):
        FgBgTrainer.build_train_loader(distil_cfg)


@pytest.fixture
def distil_cfg(distil_cfg):
    distil_cfg.INPUT.RANDOM_FLIP = "none"
    register_datasets(distil_cfg)
    return distil_cfg
