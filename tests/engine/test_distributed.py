"""Training in several processes: gradients, teachers, torchrun's restart after a lost worker."""

import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    ROOT,
    in_two_processes,
    losses_of,
    make_batch,
    tiny_cfg,
    weights,
    yolox_detector,
)
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

from fgbg_kd import get_fgbg_kd_cfg
from fgbg_kd.engine import FgBgTrainer, launch, load_config
from fgbg_kd.engine.trainer import distributed
from fgbg_kd.utils.errors import ConfigError

SIZES = ((64, 80), (72, 56)) * 4  # both halves of the batch are padded to the same size
TWO = ((5, 5, 30, 40), (10, 10, 20, 18))
BOXES = {
    "boxes in all images": (TWO, TWO[:1], TWO[1:], TWO) * 2,
    "one process without boxes": (TWO, TWO[:1], TWO[1:], TWO) + ((),) * 4,
    "no boxes at all": ((),) * 8,
}
METHODS = ("FgBg", "FgBg GATE=False", "DeFeat")  # the methods with a normaliser over the batch


def build(yaml, method):
    cfg = get_fgbg_kd_cfg()
    cfg.merge_from_other_cfg(cfg.load_cfg(yaml))
    cfg.MODEL.KD.METHOD, *options = method.split()
    cfg.MODEL.KD.FGBG.GATE = not options
    torch.manual_seed(1)
    return build_model(cfg).train().double()  # so that rounding does not hide a difference


def gradients(model, batch) -> dict[str, torch.Tensor]:
    """Gradients of the distillation losses. Detection losses have weight 0."""
    with EventStorage():
        losses = model(batch)
    sum(v if k.startswith("loss_kd") else 0 * v for k, v in losses.items()).backward()
    parameters = getattr(model, "module", model).named_parameters()
    return {k: p.grad.clone() for k, p in parameters if p.requires_grad}


def yolox() -> torch.nn.Module:
    """A plain YOLOX in fp64, whose batch norms have fixed statistics."""
    model = yolox_detector(lambda cfg: cfg.MODEL.YOLOX.update(USE_L1=True)).train().double()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    return model


def detection_gradients(model, batch) -> dict[str, torch.Tensor]:
    sum(losses_of(model, batch).values()).backward()
    parameters = getattr(model, "module", model).named_parameters()
    return {k: p.grad.clone() for k, p in parameters}


def teachers_stay_apart(rank, yaml) -> bool:
    """Whether each process keeps its own teacher. Here the teachers differ between processes."""
    model = distributed(build(yaml, "FgBg"))
    assert not model.find_unused_parameters
    teacher = model.module.teacher.detector
    with torch.no_grad():
        for tensor in teacher.state_dict().values():
            tensor.add_(rank)
    before = [x.clone() for x in teacher.state_dict().values()]
    for seed in (0, 1):  # DDP looks for unused parameters before the second
        gradients(model, make_batch(seed=seed))
    stays = all(torch.equal(a, b) for a, b in zip(before, teacher.state_dict().values()))
    return all(comm.all_gather(stays))


def worker(rank, folder, run, yaml):
    """One of two processes. It trains the config ``run`` first, as a worker of torchrun does."""
    launch(train_and_save_gradients, SimpleNamespace(rank=rank, folder=folder, run=run, yaml=yaml))


def train_and_save_gradients(args):
    rank, folder, yaml = args.rank, args.folder, args.yaml
    cfg = load_config(args.run)
    seed_all_rng(cfg.SEED + rank)  # as Detectron2's default_setup does in train_net.py
    trainer = FgBgTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    found = {"teachers stay apart": teachers_stay_apart(rank, yaml)}
    for method in METHODS:
        for case, boxes in BOXES.items():
            model = distributed(build(yaml, method))
            found[method, case] = gradients(model, make_batch(SIZES, boxes)[4 * rank :][:4])
    for case, boxes in BOXES.items() if find_spec("yolox") else ():
        batch = make_batch(SIZES, boxes)[4 * rank :][:4]
        found["YOLOX", case] = detection_gradients(distributed(yolox()), batch)
    if rank == 0:
        torch.save(found, f"{folder}/gradients.pt")


@pytest.fixture(scope="module")
def yaml(teacher_files):
    cfg = tiny_cfg()
    cfg.MODEL.META_ARCHITECTURE = "FgBgDistiller"
    cfg.MODEL.TIMM.FREEZE_BN = True  # trained batch norm would use per-process statistics
    cfg.MODEL.KD.TEACHER.CONFIG, cfg.MODEL.KD.TEACHER.WEIGHTS = teacher_files
    return cfg.dump()


@pytest.fixture(scope="module")
def run_cfg(coco, teacher_files):
    """A distillation of 16 iterations, with a checkpoint after every second one."""
    cfg = tiny_cfg(coco, "of_two")
    cfg.MODEL.META_ARCHITECTURE = "FgBgDistiller"
    cfg.MODEL.KD.TEACHER.CONFIG, cfg.MODEL.KD.TEACHER.WEIGHTS = teacher_files
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_PERIOD = 16, 2
    cfg.DATASETS.TEST, cfg.DATASETS.TEST_JSON = (), ""
    return cfg


def write_run(cfg, folder) -> str:
    """Writes the config of a run to a new folder, which is also its OUTPUT_DIR."""
    folder.mkdir()
    cfg = cfg.clone()
    cfg.OUTPUT_DIR = str(folder)
    (folder / "run.yaml").write_text(cfg.dump())
    return str(folder / "run.yaml")


@pytest.fixture(scope="module")
def two(yaml, run_cfg, tmp_path_factory):
    """A folder where two processes have trained (in "whole") and saved gradients."""
    folder = tmp_path_factory.mktemp("two")
    in_two_processes(worker, str(folder), write_run(run_cfg, folder / "whole"), yaml)
    return folder


@pytest.fixture(scope="module")
def of_two(two):
    return torch.load(two / "gradients.pt")


@pytest.mark.parametrize("case", BOXES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow
def test_two_processes_of_four_images_give_the_gradients_of_one_with_eight(
    yaml, of_two, method, case
):
    one = gradients(build(yaml, method), make_batch(SIZES, BOXES[case]))
    nothing = method == "FgBg" and case == "no boxes at all"  # without objects, G is 0
    assert_same(one, of_two[method, case], nothing)


@pytest.mark.parametrize("case", BOXES)
@pytest.mark.slow
def test_the_losses_of_a_yolox_do_not_depend_on_the_number_of_processes(of_two, case):
    pytest.importorskip("yolox")
    one = detection_gradients(yolox(), make_batch(SIZES, BOXES[case]))
    assert_same(one, of_two["YOLOX", case])


def assert_same(one, two, nothing=False):
    assert one.keys() == two.keys()
    largest = max(g.abs().max() for g in one.values())
    assert largest == 0 if nothing else largest > 1e-4
    for name, gradient in one.items():
        tolerance = 1e-6 * max(1, gradient.abs().max().item())
        torch.testing.assert_close(two[name], gradient, rtol=0, atol=tolerance, msg=name)


@pytest.mark.slow
def test_ddp_leaves_each_process_its_own_teacher(of_two):
    assert of_two["teachers stay apart"]


def test_more_gpus_than_the_machine_has_are_refused(monkeypatch):
    with pytest.raises(ConfigError, match="--num-gpus is 99, but PyTorch finds .* CUDA devices"):
        launch(print, SimpleNamespace(num_gpus=99))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="finds 2 CUDA devices here: give --num-gpus 2.$"):
        launch(print, SimpleNamespace(num_gpus=4))


def torchrun(cfg, folder) -> subprocess.Popen:
    config = write_run(cfg, folder)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    train = ["--max-restarts", "1", str(ROOT / "tools" / "train_net.py"), "--resume"]
    with open(folder / "stdout.txt", "w") as log:
        return subprocess.Popen(
            [sys.executable, *launcher, *train, "--config-file", config],
            stdout=log,
            stderr=log,
            env={
                **os.environ,
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
                "CUDA_VISIBLE_DEVICES": "",  # there may be fewer GPUs than processes
            },
        )


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the worker in /proc")
@pytest.mark.slow
def test_torchrun_restarts_after_a_lost_worker_and_ends_the_same(run_cfg, two, tmp_path):
    whole, killed = two / "whole", tmp_path / "killed"
    agent = torchrun(run_cfg, killed)
    while not (killed / "last_checkpoint").exists() and agent.poll() is None:
        time.sleep(0.01)
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    workers = [int(x) for x in children if b"train_net" in Path(f"/proc/{x}/cmdline").read_bytes()]
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    assert agent.wait(timeout=300) == 0, (killed / "stdout.txt").read_text()[-2000:]
    starts = re.findall(r"Starting training from iteration (\d+)", (killed / "log.txt").read_text())
    assert len(starts) == 2 and int(starts[1]) > 0
    a, b = weights(whole), weights(killed)
    assert all(torch.equal(v, b[k]) for k, v in a.items())
