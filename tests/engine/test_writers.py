"""Weights & Biases and MLflow get what TensorBoard gets, and a resumed training goes on there."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import make_trainer, train
from detectron2.utils.events import EventStorage
from test_lazy import config  # noqa: F401

from fgbg_kd.engine import FgBgTrainer, load_lazy_config, train_lazy
from fgbg_kd.engine.run_dir import set_previous_run_aside
from fgbg_kd.engine.writers import build_writers
from fgbg_kd.utils.errors import ConfigError


class Service:
    """Takes the place of both packages."""

    def __init__(self):
        self.opened, self.logged, self.ended = [], [], 0

    def init(self, **options):
        self.opened.append(options["id"])
        id = options["id"] or f"new{len(self.opened)}"
        return SimpleNamespace(id=id, log=self.log, finish=self.end_run)

    def log(self, values, step):
        self.logged.append((step, values))

    def Image(self, picture):
        return picture

    def start_run(self, run_id, run_name):
        self.opened.append(run_id)
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id or f"new{len(self.opened)}"))

    def log_metrics(self, values, step):
        self.logged.append((step, values))

    def log_image(self, picture, key, step):
        self.logged.append((step, {key: picture}))

    def end_run(self):
        self.ended += 1


@pytest.fixture
def services(monkeypatch):
    found = {name: Service() for name in ("wandb", "mlflow")}
    for name, service in found.items():
        monkeypatch.setitem(sys.modules, name, service)
    return found


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_values_are_written_once_and_in_order(name, services, tmp_path):
    service = services[name]
    (writer,) = build_writers([name], str(tmp_path))
    picture = np.zeros((3, 4, 5), np.uint8)
    with EventStorage(0) as storage:
        writer.write()
        assert service.opened == []  # nothing to write
        for step in (0, 1):
            storage.iter = step
            storage.put_scalar("total_loss", 3.0 - step, smoothing_hint=False)
            if step == 0:
                storage.put_scalar("bbox/AP-big dog (old)", 7.0)
                storage.put_image("early", picture + 1)
        storage.put_image("late", np.full((3, 4, 5), 0.5, np.float32))
        writer.write()
        storage.clear_images()
        writer.write()
        writer.close()
    steps = [step for step, _ in service.logged]
    assert steps == sorted(steps) and set(steps) == {0, 1} and service.ended == 1
    values = {key: value for _, row in service.logged for key, value in row.items()}
    ap = "bbox/AP-big dog (old)" if name == "wandb" else "bbox/AP-big dog _old_"
    assert values.keys() == {"total_loss", ap, "early", "late"}
    assert values["total_loss"] == 2.0 and values[ap] == 7.0
    assert values["early"].shape == (4, 5, 3) and (values["early"] == 1).all()
    assert values["late"].dtype == np.uint8 and (values["late"] == 128).all()


def test_a_resumed_training_continues_the_run_and_a_new_one_does_not(
    services, distil_cfg, tmp_path, monkeypatch
):
    monkeypatch.setattr("fgbg_kd.distiller._LOG_PERIOD", 1)
    distil_cfg.WRITERS, distil_cfg.SOLVER.CHECKPOINT_PERIOD = ["wandb", "mlflow"], 1
    train(FgBgTrainer, distil_cfg, tmp_path, 1)
    train(FgBgTrainer, distil_cfg, tmp_path, 2, resume=True)
    assert json.loads((tmp_path / "writers.json").read_text()) == dict.fromkeys(services, "new1")
    for service in services.values():
        assert service.opened == [None, "new1"] and service.ended == 2
        trained = [(step, values) for step, values in service.logged if "total_loss" in values]
        assert [step for step, _ in trained] == [0, 1]  # an evaluation has the step after them
        assert {"loss_kd_fg", "loss_cls", "kd/fg_gate"} <= trained[1][1].keys()
    set_previous_run_aside(str(tmp_path))
    assert not (tmp_path / "writers.json").exists()
    assert (tmp_path / "previous" / "1" / "writers.json").is_file()


@pytest.mark.slow
def test_a_python_config_names_writers_too(services, config):  # noqa: F811
    cfg = load_lazy_config(config, ["train.writers=['wandb']", "train.max_iter=1"])
    train_lazy(cfg)
    step, values = services["wandb"].logged[0]
    assert step == 0 and "loss_kd_fg" in values


@pytest.mark.parametrize(
    "name, message",
    [
        ("wandb", r"wandb is not installed.*pip install -e '.\[wandb\]'"),
        ("comet", "names 'comet': choose from wandb, mlflow"),
    ],
)
def test_a_service_that_is_not_there_is_named_before_the_training(
    name, message, distil_cfg, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    distil_cfg.WRITERS = [name]
    with pytest.raises(ConfigError, match=message):
        make_trainer(FgBgTrainer, distil_cfg, tmp_path / "run", 1)


def test_a_service_that_fails_later_does_not_end_the_training(services, tmp_path, caplog):
    (writer,) = build_writers(["mlflow"], str(tmp_path))
    writer.log = lambda *_: 1 / 0
    writer.finish = lambda: 1 / 0
    with EventStorage(0) as storage:
        storage.put_scalar("total_loss", 3.0)
        writer.write()
        writer.close()
    assert "mlflow does not answer" in caplog.text and "ZeroDivisionError" in caplog.text


def test_a_service_that_opens_no_run_ends_it_with_the_key(services, tmp_path):
    (writer,) = build_writers(["mlflow"], str(tmp_path))
    writer.open = lambda run_id: 1 / 0
    with EventStorage(0) as storage, pytest.raises(ConfigError, match="remove 'mlflow' from WRIT"):
        storage.put_scalar("total_loss", 3.0)
        writer.write()


@pytest.mark.slow
def test_the_real_packages_write_without_a_network(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setattr(mlflow, "set_tracking_uri", mlflow.set_tracking_uri)
    mlflow.set_tracking_uri(f"file://{tmp_path / 'mlruns'}")
    for step in (0, 1):  # the second time, the run goes on
        writers = build_writers(["wandb", "mlflow"], str(tmp_path))
        with EventStorage(step) as storage:
            storage.put_scalar("bbox/AP-big dog (old)", 5.0 + step)
            storage.put_image("distillation", np.zeros((3, 8, 8), np.uint8))
            for writer in writers:
                writer.write()
                writer.close()
    ids = json.loads((tmp_path / "writers.json").read_text())
    assert len(list(tmp_path.glob(f"wandb/offline-run-*-{ids['wandb']}/run-*.wandb"))) == 2
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/*.png"))) == 2
    client = mlflow.MlflowClient()
    history = client.get_metric_history(ids["mlflow"], "bbox/AP-big dog _old_")
    assert [(m.step, m.value) for m in history] == [(0, 5.0), (1, 6.0)]
    assert client.list_artifacts(ids["mlflow"], "images")
    assert client.get_run(ids["mlflow"]).info.status == "FINISHED"
