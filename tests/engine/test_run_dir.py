"""The folder of a run: one run at a time, previous checkpoints kept, metrics without repeats."""

import json
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from fgbg_kd.engine import lock_output_dir
from fgbg_kd.engine.run_dir import (
    SEED_FILE,
    evaluation_dir,
    keep_previous_config,
    rewind_metrics,
    set_previous_run_aside,
)
from fgbg_kd.utils.errors import OutputDirError

# The package's __init__ files are not run: they would import Detectron2, which takes seconds. The
# child outlives its parent, as a data loading process may.
HOLDER = f"""
import os, sys, time, types
for name in ("fgbg_kd", "fgbg_kd.utils", "fgbg_kd.engine"):
    module = sys.modules[name] = types.ModuleType(name)
    module.__path__ = [{str(ROOT)!r} + "/" + name.replace(".", "/")]
from fgbg_kd.engine.run_dir import lock_output_dir
lock_output_dir(sys.argv[1])
if os.fork() == 0:
    time.sleep(20)
    os._exit(0)
print("locked", flush=True)
time.sleep(20)
"""


def test_a_second_run_is_refused_and_a_killed_one_leaves_the_folder_free(tmp_path):
    folder = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert holder.stdout.readline() == b"locked\n"
        with pytest.raises(
            OutputDirError, match=rf"in use by another run \(process {holder.pid} on"
        ):
            lock_output_dir(str(folder))
        holder.kill()
        holder.wait()
        lock_output_dir(str(folder))
        lock_output_dir(str(folder))  # its own
        assert f"process {os.getpid()} on" in (folder / ".lock").read_text()
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.stdout.close()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputDirError, match="file/run cannot be written .*choose another"):
        lock_output_dir(str(tmp_path / "file" / "run"))
    if os.getuid() == 0:
        return  # root may write everywhere
    (tmp_path / "read_only").mkdir(mode=0o500)
    with pytest.raises(OutputDirError, match="cannot be written"):
        lock_output_dir(str(tmp_path / "read_only" / "run"))


def test_each_previous_run_in_a_folder_keeps_its_results_in_its_own_place(tmp_path, caplog):
    """Otherwise, if a new run is killed early, --resume would load an old run's checkpoint."""
    own = f"events.out.tfevents.5.host.{os.getpid()}.0"
    for run in (1, 2):
        for name in ("model_final.pth", "model_0000009.pth", "last_checkpoint", "log.txt"):
            (tmp_path / name).write_text(f"{name} of {run}")
        (tmp_path / f"events.out.tfevents.{run}.host.1.0").write_text("")
        (tmp_path / own).write_text("")
        with open(tmp_path / "metrics.json", "a") as metrics:
            metrics.write(f'{{"iteration": {run}}}\n')
        (tmp_path / "config.previous.yaml").write_text(str(run))
        (tmp_path / "inference").mkdir(exist_ok=True)
        (tmp_path / "inference" / "coco_instances_results.json").write_text(str(run))
        (tmp_path / "inference" / "my_test_coco_format.json").write_text("of Detectron2")
        set_previous_run_aside(str(tmp_path))
        place = tmp_path / "previous" / str(run)
        assert f"results are now in {place}" in caplog.text
        assert (place / "model_final.pth").read_text() == f"model_final.pth of {run}"
        assert (place / "metrics.json").read_text() == f'{{"iteration": {run}}}\n'
        assert (place / "config.previous.yaml").read_text() == str(run)
        assert (place / "inference" / "coco_instances_results.json").read_text() == str(run)
        assert [x.name for x in (tmp_path / "inference").iterdir()] == ["my_test_coco_format.json"]
        assert len(list(place.iterdir())) == 7
        left = {"log.txt", "previous", "metrics.json", "config.previous.yaml", "inference", own}
        assert {x.name for x in tmp_path.iterdir()} == left
    set_previous_run_aside(str(tmp_path))  # nothing left to move
    (tmp_path / "metrics.json").write_text('{"iteration": 3}\n')
    set_previous_run_aside(str(tmp_path), resume=True)  # its own metrics
    set_previous_run_aside(str(tmp_path / "nowhere"))
    assert len(list((tmp_path / "previous").iterdir())) == 2


def test_the_config_of_a_training_that_began_is_kept_and_evaluation_has_its_own_folder(tmp_path):
    assert evaluation_dir(str(tmp_path)) == str(tmp_path)
    (tmp_path / "config.yaml").write_text("first")
    keep_previous_config(str(tmp_path))  # of a start that was refused
    assert not (tmp_path / "config.previous.yaml").exists()
    (tmp_path / SEED_FILE).write_text("7")
    keep_previous_config(str(tmp_path))
    assert (tmp_path / "config.previous.yaml").read_text() == "first"
    assert evaluation_dir(str(tmp_path)) == str(tmp_path / "eval")


def rows(*iterations):
    return "".join(json.dumps({"iteration": i, "loss": i / 7}) + "\n" for i in iterations)


@pytest.mark.parametrize(
    "text, kept",
    [
        (rows(19, 39, 59), rows(19, 39)),
        (rows(19, 39) + '{"iteration": 5', rows(19, 39)),
        (rows(19, 39, 59, 19, 39), rows(19, 39, 59, 19, 39)),  # of an earlier run
        (rows(19, 39, 59, 19, 39, 59), rows(19, 39, 59, 19, 39)),
        ("", ""),
    ],
)
def test_metrics_of_iterations_that_come_again_are_cut(tmp_path, text, kept):
    path = tmp_path / "metrics.json"
    path.write_text(text)
    rewind_metrics(str(path), 40, 60)
    assert path.read_text() == kept


def test_a_longer_run_keeps_the_last_ap_of_the_run_that_it_continues(tmp_path):
    path = tmp_path / "metrics.json"
    trained = '{"iteration": 39, "total_loss": 1.0}\n'
    path.write_text(trained + '{"iteration": 40, "bbox/AP": 12.0}\n')
    rewind_metrics(str(path), 40, 80)
    assert path.read_text().endswith('"bbox/AP": 12.0}\n')
    rewind_metrics(str(path), 40, 40)  # the same run is only evaluated again
    assert path.read_text() == trained
