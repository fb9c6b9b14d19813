"""Python configs train like YAML: bit-identical losses, checkpoints, resume, and the tool."""

import json
import re
import runpy
import shutil

import pytest
import timm
import torch
from conftest import CLASSES, KD_LOSSES, ROOT, save_teacher, write_coco
from detectron2 import model_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import instantiate
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils.env import seed_all_rng
from omegaconf import OmegaConf

from fgbg_kd import FgBgDistiller, build_teacher
from fgbg_kd.config import student_model
from fgbg_kd.data import BoxEvaluator, mapper, register_datasets
from fgbg_kd.engine import (
    FgBgTrainer,
    evaluate_lazy,
    lazy,
    load_lazy_config,
    load_lazy_student,
    train_lazy,
    unlabeled,
)
from fgbg_kd.engine.lazy import _evaluations, _listed, build_lazy
from fgbg_kd.engine.resume import warm_up
from fgbg_kd.utils.errors import CheckpointError, ConfigError, EvaluationError, TeacherError

# The detector of tiny_cfg, built from the zoo's parts. The last lines distil it.
CONFIG = """
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from fgbg_kd.detectors.timm_backbone import TimmBackbone

if "lazy_tiny" not in DatasetCatalog.list():
    register_coco_instances("lazy_tiny", {{}}, {json!r}, {images!r})
    MetadataCatalog.get("lazy_tiny").set(thing_classes=["square", "stripe"])

_zoo = model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_1x.py")
dataloader, lr_multiplier = _zoo.dataloader, _zoo.lr_multiplier
optimizer, train, _student = _zoo.optimizer, _zoo.train, _zoo.model
_student.num_classes, _student.smooth_l1_beta = 2, 0.1  # yacs' default
_student.backbone.bottom_up = L(TimmBackbone)(name="test_resnet")
_student.backbone.out_channels = 16
_student.backbone.top_block = L(LastLevelMaxPool)()
_student.head_in_features = ["p3", "p4", "p5"]
_student.head.input_shape = [ShapeSpec(channels=16)] * 3
_student.head.conv_dims, _student.head.num_anchors = [16], 2
_student.anchor_generator.sizes = [[16], [32], [64]]
_student.anchor_generator.aspect_ratios = [[0.7, 1.4]]
_student.anchor_generator.strides = [8, 16, 32]
for _part in (dataloader.train, dataloader.test):
    _part.dataset.names, _part.num_workers = "lazy_tiny", 0
    _part.dataset.filter_empty = False
    _part.mapper.augmentations[0].short_edge_length = [64, 64]
dataloader.train.total_batch_size = 2
dataloader.train.mapper.augmentations[0].short_edge_length = [64]
lr_multiplier.scheduler.values, lr_multiplier.scheduler.milestones = [1.0], [90000]
lr_multiplier.warmup_length = 0.0
train.init_checkpoint, train.seed, train.output_dir = "", 7, {output!r}
train.device = "cpu"  # where runs repeat bit for bit
train.max_iter, train.eval_period, train.log_period = 3, 0, 1

from fgbg_kd import FgBgDistiller, build_teacher
model = L(FgBgDistiller)(
    student=_student,
    teacher=L(build_teacher)(config={teacher[0]!r}, weights={teacher[1]!r}),
    method=dict(bg_weight=1.0),
)
"""


@pytest.fixture
def config(coco, teacher_files, tmp_path):
    """Path of a Python config with a teacher; its run writes to tmp_path / "lazy"."""
    path = tmp_path / "distilled.py"
    output = str(tmp_path / "lazy")
    text = CONFIG.format(json=coco[0], images=coco[1], output=output, teacher=teacher_files)
    path.write_text(text)
    (tmp_path / "lazy").mkdir()
    return str(path)


@pytest.fixture
def recorded(monkeypatch):
    """The losses of every training step of a distiller, in order."""
    steps = []
    forward = FgBgDistiller.forward

    def recording(self, batch):
        out = forward(self, batch)
        if self.training:
            steps.append({k: v.item() for k, v in out.items()})
        return out

    monkeypatch.setattr(FgBgDistiller, "forward", recording)
    return steps


def run(path, *overrides, resume=False):
    cfg = load_lazy_config(path, list(overrides))
    seed_all_rng(cfg.train.seed)
    return train_lazy(cfg, resume=resume)


def saved(folder, name="model_final"):
    return torch.load(folder / f"{name}.pth", weights_only=False)


@pytest.mark.parametrize(
    "overrides, expected",
    [
        ([], "cosine"),
        (["train.init_checkpoint=backbone.pth"], "mse"),
        (["model.pretrained=True"], "mse"),
    ],
)
def test_the_loss_of_features_depends_on_the_weights_that_the_student_starts_from(
    config, overrides, expected
):
    cfg = load_lazy_config(config, overrides)
    assert build_lazy(cfg).method.fg_loss == expected


def test_weights_of_the_backbone_count_as_weights_that_the_student_starts_from(config, tmp_path):
    path = tmp_path / "backbone.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), path)
    key = "model.student.backbone.bottom_up.weights"
    cfg = load_lazy_config(config, [f"{key}={str(path)!r}"])
    assert build_lazy(cfg).method.fg_loss == "mse"


@pytest.mark.slow
def test_the_losses_are_those_of_the_yaml_path_bit_for_bit(config, distil_cfg, recorded, tmp_path):
    """With the same seed: the same initial weights, images, augmentation and steps."""
    warm_up(4)
    run(config, "train.max_iter=6")
    lazy = list(recorded)
    recorded.clear()
    distil_cfg.OUTPUT_DIR, distil_cfg.SOLVER.MAX_ITER = str(tmp_path / "yaml"), 6
    (tmp_path / "yaml").mkdir()
    register_datasets(distil_cfg)
    seed_all_rng(distil_cfg.SEED)
    FgBgTrainer(distil_cfg).train()
    assert recorded == lazy and len(lazy) == 6
    assert set(lazy[0]) == {"loss_cls", "loss_box_reg", *KD_LOSSES}
    ours, yamls = saved(tmp_path / "lazy"), saved(tmp_path / "yaml")
    for part in ("model", "method"):
        assert ours[part].keys() == yamls[part].keys()
        assert all(torch.equal(v, yamls[part][k]) for k, v in ours[part].items())


@pytest.mark.slow
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(config, recorded, tmp_path):
    warm_up(4)
    run(config, "train.max_iter=5", f"train.output_dir={tmp_path / 'whole'}")
    whole = list(recorded)
    recorded.clear()
    run(config, "train.max_iter=3")
    run(config, "train.max_iter=5", resume=True)
    assert recorded == whole
    parts = saved(tmp_path / "whole"), saved(tmp_path / "lazy")
    assert parts[0]["iteration"] == parts[1]["iteration"] == 4
    for part in ("model", "method"):
        assert all(torch.equal(v, parts[1][part][k]) for k, v in parts[0][part].items())


def test_a_resume_with_another_learning_rate_is_refused(config):
    run(config, "optimizer.lr=0.01", "train.max_iter=1")
    with pytest.raises(CheckpointError, match="learning rate .* was 0.01, now it is 0.02"):
        run(config, "optimizer.lr=0.02", "train.max_iter=2", resume=True)


def test_where_there_is_nothing_to_resume_a_run_starts(config, tmp_path):
    run(config, "train.max_iter=1", resume=True)
    assert saved(tmp_path / "lazy")["iteration"] == 0


@pytest.mark.slow
def test_the_checkpoint_is_the_plain_students_and_evaluation_needs_no_teacher(config, tmp_path):
    run(config)
    path = str(tmp_path / "lazy" / "model_final.pth")
    cfg = load_lazy_config(config, [f"train.init_checkpoint={path}", "model.teacher.config=gone"])
    plain = instantiate(cfg.model.student)
    assert saved(tmp_path / "lazy")["model"].keys() == plain.state_dict().keys()
    DetectionCheckpointer(plain).load(path)
    for student in (load_lazy_student(cfg), load_lazy_student(cfg, str(tmp_path / "lazy"))):
        assert type(student) is type(plain)
        state = student.state_dict()
        assert all(torch.equal(v, state[k]) for k, v in plain.state_dict().items())


@pytest.mark.slow
def test_the_checkpoint_has_the_average_of_the_weights_if_asked_for(config, tmp_path):
    warm_up(4)
    run(config)
    own = saved(tmp_path / "lazy")["model"]
    run(config, "train.ema_decay=0.5")
    averaged = saved(tmp_path / "lazy")
    trained = averaged["trainer"]["hooks"]["WeightAverage"]["weights"]
    assert all(torch.equal(v, trained[k]) for k, v in own.items())
    assert not all(torch.equal(v, averaged["model"][k]) for k, v in own.items())


@pytest.mark.slow
def test_overrides_reach_the_method(config, recorded):
    features_off = ["model.method.fg_weight=0", "model.method.bg_feature_weight=0"]
    run(config, *features_off, "model.method.gate=False", "train.max_iter=1")
    assert set(recorded[0]) == {"loss_cls", "loss_box_reg", "loss_kd_bg"}
    recorded.clear()
    run(config, *features_off, "model.method.bg_weight=0", "train.max_iter=1")
    assert set(recorded[0]) == {"loss_cls", "loss_box_reg"}
    with pytest.raises(ValueError, match="FgBg has no option .'fg_wieght'.: choose from"):
        run(config, "model.method.fg_wieght=2")
    for key, near in (("train.max_iters", "max_iter"), ("train.checkpointer.perid", "period")):
        with pytest.raises(
            ConfigError, match=f"{key} is not a key of the config: did you mean {near}"
        ):
            load_lazy_config(config, [f"{key}=2"])
    with pytest.raises(ConfigError, match="dataloadr is not a key"):
        load_lazy_config(config, ["dataloadr=2"])


def test_a_weak_teacher_stops_the_run(config, tmp_path):
    with pytest.raises(TeacherError, match="MIN_AP 99"):
        run(config, "train.teacher_min_ap=99")
    assert not (tmp_path / "lazy" / "model_final.pth").exists()


def test_the_teacher_is_measured_at_its_own_test_size(config, tmp_path, monkeypatch):
    """The student's is 64 pixels, which its config gives as a list."""

    def larger(cfg):
        cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 96, 200

    seen = []

    def evaluated(model, loader, evaluator):
        seen.append(tuple(next(iter(loader))[0]["image"].shape[1:]))
        return {}

    monkeypatch.setattr(lazy, "inference_on_dataset", evaluated)
    cfg = load_lazy_config(config)
    teacher = build_teacher(*save_teacher(tmp_path, edit=larger))
    assert mapper.test_size_of(cfg) == (64, 1333) and teacher.test_size == (96, 200)
    evaluate_lazy(cfg, teacher.detector)
    evaluate_lazy(cfg, teacher.detector, lazy._test_for(teacher, cfg))
    assert [min(shape) for shape in seen] == [64, 96]
    cfg.train.unlabeled = ["photos"]
    record, *_ = instantiate(cfg.dataloader.test.dataset)
    assert min(lazy._unlabeled(cfg, teacher).mapper(dict(record))["image"].shape[1:]) == 96


def test_what_breaks_evaluation_stops_the_run_before_the_first_step(
    config, recorded, tmp_path, monkeypatch
):
    def broken(*_):
        raise KeyError("info")

    monkeypatch.setattr("pycocotools.coco.COCO.loadRes", broken)
    with pytest.raises(EvaluationError, match="KeyError: 'info'.*before training"):
        run(config)
    assert not recorded


@pytest.mark.parametrize(
    "override, error, message",
    [
        ("train.checkpointer.period=0", ConfigError, "checkpointer.period is 0: .* least 1"),
        ("train.log_period=0", ConfigError, "train.log_period is 0: .* at least 1"),
        (
            "model.student.head_in_features=[p3,p4,p9]",
            ConfigError,
            "model.student.head_in_features names 'p9', which the network does not give",
        ),
        (
            "model.student.backbone.in_features=[res3,res9]",
            ConfigError,
            "model.student.backbone.in_features names 'res9', which",
        ),
        (
            "dataloader.train.mapper.image_format=RGB",
            ConfigError,
            "train.mapper.image_format is RGB, but the detector's input_format is BGR",
        ),
        (
            "dataloader.test.mapper.image_format=RGB",
            ConfigError,
            "test.mapper.image_format is RGB, but the detector's input_format is BGR",
        ),
        ("train.init_checkpoint=/nowhere.pth", CheckpointError, "init_checkpoint. is '/nowhere"),
    ],
)
@pytest.mark.slow
def test_what_cannot_work_is_refused_with_its_key(config, override, error, message, recorded):
    with pytest.raises(error, match=message):
        run(config, override)
    assert not recorded


def test_boxes_are_evaluated_as_by_yaml(config):
    evaluator = load_lazy_config(config).dataloader.evaluator
    assert isinstance(instantiate(evaluator), BoxEvaluator)


def test_the_student_inherits(config, tmp_path):
    files = save_teacher(tmp_path, channels=16)
    teacher = [f"model.teacher.{k}={v}" for k, v in zip(("config", "weights"), files)]
    run(config, *teacher, "model.inherit=[head]", "optimizer.lr=1e-12", "train.max_iter=1")
    got = saved(tmp_path / "lazy")["model"]["head.cls_score.weight"]
    torch.testing.assert_close(got, build_teacher(*files).detector.head.cls_score.weight)


def test_the_students_classes_come_from_the_training_set(config):
    names = MetadataCatalog.get("lazy_tiny")
    cfg = load_lazy_config(config, ["model.teacher.classes=[disc,stripe]", "train.max_iter=1"])
    with pytest.raises(TeacherError, match="does not know .'square'."):
        train_lazy(cfg)
    assert tuple(names.thing_classes) == CLASSES
    cfg = load_lazy_config(config, ["model.student.num_classes=3"])
    cfg.model.teacher = None
    with pytest.raises(ValueError, match="set has 2 classes .* has 3: set num_classes=2"):
        train_lazy(cfg)


def test_a_distilled_students_python_config_can_be_a_teacher(config, tmp_path):
    weights = instantiate(load_lazy_config(config).model.student).state_dict()
    torch.save({"model": weights}, tmp_path / "student.pth")
    teacher = build_teacher(config, str(tmp_path / "student.pth"))
    assert type(teacher.detector).__name__ == "RetinaNet" and teacher.class_names == list(CLASSES)


@pytest.mark.slow
def test_the_tool_takes_python_configs(config, tmp_path):
    path = tmp_path / "lazy" / "model_final.pth"
    tool = runpy.run_path(str(ROOT / "tools" / "train_net.py"))
    parser = tool["argument_parser"]()

    def main(*arguments):
        return tool["main"](parser.parse_args(["--config-file", config, *arguments]))

    main("train.max_iter=2")
    assert saved(tmp_path / "lazy")["iteration"] == 1
    main("--resume", "train.max_iter=3")
    assert saved(tmp_path / "lazy")["iteration"] == 2
    record = tmp_path / "lazy" / "config.yaml"
    before = record.read_bytes()
    for _ in range(2):  # a refused start keeps the config of the last run
        with pytest.raises(TeacherError):
            main("model.teacher.config=gone")
    kept = tmp_path / "lazy" / "config.previous.yaml"
    assert kept.read_bytes() == before != record.read_bytes()
    before = record.read_bytes()
    results = main("--eval-only", f"train.init_checkpoint={path}", "model.teacher.config=gone")
    assert "AP50" in results["bbox"]
    assert record.read_bytes() == before
    with pytest.raises(CheckpointError, match="missing in the file"):
        main("--eval-only", "--resume", "model.student.head.conv_dims=[16,16]")
    assert (tmp_path / "lazy" / "eval" / "log.txt").is_file()


def test_a_teacher_that_the_run_starts_from_or_would_write_over_is_refused(config, tmp_path):
    weights = tmp_path / "lazy" / "model_final.pth"
    shutil.copy(load_lazy_config(config).model.teacher.weights, weights)
    teacher = f"model.teacher.weights={weights}"
    with pytest.raises(
        TeacherError, match="would overwrite the teacher's weights .*model_final.pth"
    ):
        run(config, teacher)
    with pytest.raises(TeacherError, match="both start from"):
        run(config, teacher, f"train.init_checkpoint={weights}", "train.output_dir=elsewhere")


def test_a_cache_wants_images_that_do_not_change(config, tmp_path):
    with pytest.raises(ValueError, match="TEACHER.CACHE needs .*RandomFlip"):
        run(config, "model.teacher.cache=True")
    short = "dataloader.train.mapper.augmentations=[${dataloader.test.mapper.augmentations.0}]"
    run(config, "model.teacher.cache=True", short, "train.max_iter=1")


@pytest.mark.slow
def test_an_open_seed_is_drawn_once_and_few_checkpoints_stay(config, tmp_path):
    keep = "train.checkpointer.max_to_keep"
    few = ["train.seed=-1", "train.checkpointer.period=1", f"{keep}=2"]
    cfg = load_lazy_config(config, ["train.max_iter=3", *few])
    train_lazy(cfg)
    seed = (tmp_path / "lazy" / "seed.txt").read_text()
    assert cfg.train.seed == int(seed)  # default_setup seeds the process with it
    train_lazy(load_lazy_config(config, ["train.max_iter=4", *few], resume=True), resume=True)
    assert (tmp_path / "lazy" / "seed.txt").read_text() == seed
    names = sorted(p.name for p in (tmp_path / "lazy").glob("model_0*.pth"))
    assert names == ["model_0000002.pth", "model_0000003.pth"]
    with pytest.raises(ValueError, match="at least 2"):
        run(config, f"{keep}=1")


def test_mixed_precision_is_set_off_on_a_cpu(config):
    assert not load_lazy_config(config, ["train.amp.enabled=True"]).train.amp.enabled


def test_the_pages_python_config_and_command_are_read(tmp_path):
    page = (ROOT / "docs" / "getting_started.md").read_text()
    section = page.split("## Python configs")[1].split("\n## ")[0]
    (text,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (command,) = re.findall(r"```bash\n(.*?)\n```", section, re.DOTALL)
    arguments = command.split()
    assert arguments[:4] == [
        ".venv/bin/python",
        "tools/train_net.py",
        "--config-file",
        "my_distilled.py",
    ]
    (tmp_path / "my_distilled.py").write_text(text)
    cfg = load_lazy_config(str(tmp_path / "my_distilled.py"), arguments[4:])
    assert cfg.train.max_iter == 9000
    assert dict(cfg.model.method) == dict(name="FgBg", bg_weight=0.5, fg_weight=12)
    assert model_zoo.get_checkpoint_url(cfg.model.teacher.config)
    assert instantiate(student_model(cfg.model)).num_classes == 80
    assert cfg.dataloader.test.mapper.image_format == "BGR"


@pytest.mark.slow
def test_pictures_are_drawn_by_a_python_config(config, tmp_path, monkeypatch):
    student = instantiate(student_model(load_lazy_config(config).model))
    torch.save({"model": student.state_dict()}, tmp_path / "student.pth")
    import visualize

    arguments = ["--weights", str(tmp_path / "student.pth"), "--image", "1.png"]
    monkeypatch.setattr(
        "sys.argv",
        ["visualize.py", "--config-file", config, *arguments, "--output", str(tmp_path / "seen")],
    )
    visualize.main()
    assert [p.name for p in (tmp_path / "seen").iterdir()] == ["1.png"]


def test_photos_without_labels_are_mixed_into_the_batches(
    config, recorded, coco, tmp_path, monkeypatch
):
    """The options of a YAML config in `train`, and the weight in the model."""
    monkeypatch.setattr(unlabeled, "score_threshold", lambda *args: 0.3)
    _, photos = write_coco(tmp_path / "photos", 5, seed=4)
    keys = [f"train.unlabeled=[{photos}]", "dataloader.train.total_batch_size=3"]
    run(config, "train.max_iter=1", *keys, "model.unlabeled_weight=0.5")
    assert {"loss_cls", "loss_cls_unlabeled", "loss_kd_fg"} <= recorded[0].keys()
    content = json.loads((tmp_path / "lazy" / "unlabeled.json").read_text())
    assert len(content["images"]) == 5 and content["categories"][1]["name"] == "stripe"
    with pytest.raises(ConfigError, match="SHARE is 2.0"):
        run(config, *keys, "train.unlabeled_share=2.0")
    with pytest.raises(ConfigError, match="did you mean unlabeled"):
        load_lazy_config(config, ["train.unlabelled=1"])


def test_one_text_is_a_list_of_one():
    """`train.unlabeled=photos` on the command line is no list of letters."""
    assert _listed("/data/photos") == ["/data/photos"]
    assert _listed(OmegaConf.create(["a", "b"])) == ["a", "b"]


@pytest.mark.parametrize("several", [False, True])
def test_a_config_names_one_evaluator_or_a_list(several):
    one = {"_target_": "detectron2.evaluation.DatasetEvaluator"}
    loader = {"evaluator": [one, one] if several else one, "test": {}}
    ((_, evaluators),) = _evaluations(OmegaConf.create({"dataloader": loader}))
    assert type(evaluators) is list and len(evaluators) == 1 + several
    assert all(isinstance(e, DatasetEvaluator) for e in evaluators)
