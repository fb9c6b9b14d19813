"""YOLO trains: it learns two images, resumes exactly, and does the same in two processes."""

from types import SimpleNamespace

import pytest
import torch
from conftest import (
    distiller,
    in_two_processes,
    losses_of,
    make_batch,
    make_trainer,
    train,
    weights,
)
from conftest import tiny_yolo_cfg as yolo_cfg
from detectron2.engine import HookBase
from detectron2.modeling import build_model
from torchvision.ops import box_iou

from fgbg_kd.engine import FgBgTrainer, launch
from fgbg_kd.engine.trainer import distributed


def two_images():
    """Three filled boxes of two classes, each in its own colour, in two images of other shapes."""
    boxes = (((6, 8, 40, 52), (52, 10, 88, 60)), ((8, 40, 56, 88),))
    batch = make_batch(((64, 96), (96, 64)), boxes)
    for x in batch:
        x["image"] //= 4
        objects = zip(x["instances"].gt_boxes.tensor.int(), x["instances"].gt_classes)
        for (x0, y0, x1, y1), colour in objects:
            x["image"][colour, y0:y1, x0:x1] = 220
    return batch


@pytest.mark.parametrize("network", ["yolov3-tiny", "yolov4-tiny"])
@pytest.mark.slow
def test_a_tiny_network_learns_two_images(network):
    cfg = yolo_cfg(network=network)
    cfg.MODEL.YOLO.WIDTH = 0.125
    torch.manual_seed(0)
    model, batch = build_model(cfg).train(), two_images()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(70):
        optimizer.zero_grad()
        sum(losses_of(model, batch).values()).backward()
        optimizer.step()
    with torch.no_grad():
        found = [x["instances"] for x in model.eval()(batch)]
    for x, detections in zip(batch, found):
        sure = detections[detections.scores > 0.5]
        assert len(sure) == len(x["instances"])
        iou, at = box_iou(x["instances"].gt_boxes.tensor, sure.pred_boxes.tensor).max(1)
        assert (iou > 0.7).all()
        assert torch.equal(sure.pred_classes[at], x["instances"].gt_classes)


class Killed(Exception):
    pass


class Kill(HookBase):
    def after_step(self):
        if self.trainer.iter == 3:
            raise Killed


@pytest.mark.slow
def test_a_run_with_an_average_that_is_killed_and_resumed_ends_the_same(coco, tmp_path):
    config, file = tmp_path / "teacher.yaml", tmp_path / "teacher.pth"
    config.write_text(yolo_cfg(network="yolov4").dump())
    torch.manual_seed(5)
    torch.save({"model": build_model(yolo_cfg(network="yolov4")).state_dict()}, file)
    cfg = yolo_cfg(coco)
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.KD.STUDENT = "FgBgDistiller", "YOLO"
    cfg.MODEL.KD.TEACHER.CONFIG, cfg.MODEL.KD.TEACHER.WEIGHTS = str(config), str(file)
    cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.EMA_DECAY = 2, 0.9
    cfg.DATASETS.TEST, cfg.DATASETS.TEST_JSON = (), ""
    train(FgBgTrainer, cfg, tmp_path / "whole", 6)
    killed = make_trainer(FgBgTrainer, cfg, tmp_path / "killed", 6)
    killed.resume_or_load(resume=False)
    killed.register_hooks([Kill()])
    with pytest.raises(Killed):
        killed.train()
    train(FgBgTrainer, cfg, tmp_path / "killed", 6, resume=True)
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


# --- two processes ---

SIZES = ((64, 80), (72, 56)) * 2  # both halves of the batch are padded to the same size
TWO = ((5, 5, 30, 40), (10, 10, 20, 18))
BOXES = {
    "boxes in all images": (TWO, TWO[:1], TWO[1:], TWO),
    "one process without": (TWO,) * 2 + ((),) * 2,
}


def distilling():
    models = []
    for seed in (1, 2):
        cfg = yolo_cfg()
        cfg.MODEL.YOLO.NORM = "FrozenBN"  # trained batch norm would use per-process statistics
        torch.manual_seed(seed)
        models.append(build_model(cfg))
    return distiller(*models, gate=False).double()  # so that rounding does not hide a difference


def gradients(model, batch):
    sum(losses_of(model, batch).values()).backward()
    parameters = getattr(model, "module", model).named_parameters()
    return {k: p.grad.clone() for k, p in parameters if p.requires_grad}


def worker(rank, folder):
    launch(save_gradients, SimpleNamespace(rank=rank, folder=folder))


def save_gradients(args):
    found = {}
    for case, boxes in BOXES.items():
        batch = make_batch(SIZES, boxes)[2 * args.rank :][:2]
        found[case] = gradients(distributed(distilling()), batch)
    if args.rank == 0:
        torch.save(found, f"{args.folder}/gradients.pt")


@pytest.mark.slow
def test_two_processes_of_two_images_give_the_gradients_of_one_with_four(tmp_path):
    in_two_processes(worker, str(tmp_path))
    found = torch.load(tmp_path / "gradients.pt")
    for case, two in found.items():
        one = gradients(distilling(), make_batch(SIZES, BOXES[case]))
        assert one.keys() == two.keys() and max(g.abs().max() for g in one.values()) > 1e-3
        for name, gradient in one.items():
            tolerance = 1e-6 * max(1, gradient.abs().max().item())
            torch.testing.assert_close(two[name], gradient, rtol=0, atol=tolerance, msg=name)
