"""Runs as child processes: they are run once, resumed, refused if they do not fit, and stopped."""

import contextlib
import fcntl
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import tiny_cfg
from detectron2.data.datasets import register_coco_instances

from fgbg_kd.engine import read_config
from fgbg_kd.experiments.runner import Runner
from fgbg_kd.experiments.settings import changes, settings_of
from fgbg_kd.methods import FgBg
from fgbg_kd.utils.errors import ConfigError, RunError

# A replacement of train_net.py that writes the same files to OUTPUT_DIR.
CHILD = """
import json, pathlib, sys, time
out = pathlib.Path(sys.argv[-1].removeprefix("train.output_dir=").strip("'"))
with open(out / "calls.txt", "a") as calls: print(*sys.argv[1:], file=calls)
if (out / "fail").exists(): sys.exit("the loss is NaN")
if (out / "hang").exists():
    import fcntl, subprocess
    lock = open(out / "lock", "w"); fcntl.flock(lock, fcntl.LOCK_EX)
    subprocess.Popen(["sleep", "600"], pass_fds=[lock.fileno()])
    (out / "started").touch(); time.sleep(600)
(out / "inference").mkdir(exist_ok=True)
for name in ("model_0000001.pth", "model_final.pth", "inference/instances_predictions.pth"):
    (out / name).touch()
kept = pathlib.Path(__file__).with_name("ap.json")
ap, found = json.loads(kept.read_text()) if kept.exists() else (10.5, [{"score": 0.5}])
(out / "inference" / "coco_instances_results.json").write_text(json.dumps(found))
metrics = {"AP": ap, "AP50": 2 * ap, "AP75": ap / 2, "APs": 1.0, "APm": ap, "APl": float("nan")}
metrics |= {"AP-cat": 3.0, "AP-dog": float("nan")}
if "--eval-only" in sys.argv:
    (out / "results.json").write_text(json.dumps({"bbox": metrics, "segm": {"AP": 9.0}}))
else:
    rows = [{"time": t, "iteration": 20 * i + 19} for i, t in enumerate((9.0, 1.0, 2.0))]
    rows.append({"bbox/AP": 7.0, "iteration": 60})
    last = {"segm/AP": 9.0, "iteration": 99, **{"bbox/" + k: v for k, v in metrics.items()}}
    (out / "metrics.json").write_text("".join(json.dumps(r) + chr(10) for r in [*rows, last]))
print("eta: 0:01  iter: 19  total_loss: 1.5  max_mem: 120M")
"""


@pytest.fixture
def folder(tmp_path, coco):
    """A folder with a config, an empty run and a short train_net.py."""
    (tmp_path / "train_net.py").write_text(CHILD)
    cfg = tiny_cfg(coco)
    (tmp_path / "c.yaml").write_text(cfg.dump())
    (tmp_path / "teacher.pth").write_bytes(b"one")
    (tmp_path / "run").mkdir()
    return tmp_path


def run(folder, *opts, **kwargs):
    with Runner(folder / "train_net.py") as runner:
        return runner.run("x", folder / "c.yaml", folder / "run", list(opts), **kwargs)


def calls(folder):
    return (folder / "run" / "calls.txt").read_text().splitlines()


def test_metrics_time_and_memory_are_read_and_only_the_final_checkpoint_stays(folder):
    result = run(folder)
    assert (result["AP"], result["AP50"], result["APl"]) == (10.5, 21.0, None)
    assert result["classes"] == {"cat": 3.0}
    assert result["seconds_per_step"] == 2.0 and result["gpu_memory_mb"] == 120
    assert 1 < result["memory_mb"] < 10**5
    assert [p.name for p in (folder / "run").rglob("*.pth")] == ["model_final.pth"]


@pytest.mark.parametrize("eval_only", (False, True))
def test_ap_is_read_from_a_training_and_from_an_evaluation(folder, eval_only):
    result = run(folder, eval_only=eval_only)
    assert result["AP"] == 10.5 and "detections" not in result
    assert (result["seconds_per_step"] is None) == eval_only


@pytest.mark.parametrize("ap", ["NaN", "0.0"])  # of Detectron2's evaluator, and of this package's
@pytest.mark.parametrize("eval_only", (False, True))
def test_nothing_detected_is_an_ap_of_zero_that_says_so(folder, eval_only, ap, capsys):
    (folder / "ap.json").write_text(f"[{ap}, []]")
    result = run(folder, eval_only=eval_only)
    assert result["AP"] == result["AP75"] == 0 and not result["APm"]
    assert result["detections"] == 0
    assert "x: nothing was detected on the test set, so AP is 0." in capsys.readouterr().out


@pytest.mark.parametrize("eval_only", (False, True))
def test_an_ap_that_is_not_a_number_beside_detections_is_an_error(folder, eval_only):
    (folder / "ap.json").write_text('[NaN, [{"score": 0.5}]]')
    with pytest.raises(RunError, match="not a number, although there are 1 detections: no box"):
        run(folder, eval_only=eval_only)
    assert not (folder / "run" / "done.json").exists()


def test_a_run_without_an_evaluation_is_an_error(folder):
    (folder / "train_net.py").write_text(CHILD.replace('"bbox/', '"other/'))
    with pytest.raises(RunError, match="has no AP of boxes. Name one test set in DATASETS.TEST"):
        run(folder)


def test_a_finished_run_is_not_run_again_and_an_unfinished_one_goes_on(folder):
    (folder / "run" / "fail").touch()
    with pytest.raises(RunError, match="the loss is NaN\n.*train.txt"):
        run(folder)
    (folder / "run" / "fail").unlink()
    with open(folder / "run" / "train.txt", "a") as log:
        log.write("memory 77777\n")  # an earlier part of the run with more memory
    first, second = run(folder), run(folder)
    assert first == second and len(calls(folder)) == 2 and first["memory_mb"] == 77777
    assert all("--resume" in line for line in calls(folder))


def test_a_child_gets_the_number_of_gpus(folder):
    with Runner(folder / "train_net.py", num_gpus=2) as runner:
        runner.run("x", folder / "c.yaml", folder / "run", [])
    assert "--num-gpus 2 --resume" in calls(folder)[0]


def test_the_callers_overrides_stay_as_they_are(folder):
    opts = ["SEED", "3"]
    with Runner(folder / "train_net.py") as runner:
        runner.run("x", folder / "c.yaml", folder / "run", opts)
    assert opts == ["SEED", "3"]


def test_other_settings_are_refused_by_name_and_nothing_is_lost(folder):
    run(folder, checkpoint=folder / "teacher.pth")
    with pytest.raises(RunError, match="SEED was 7, is 8"):
        run(folder, "SEED", "8", checkpoint=folder / "teacher.pth")
    (folder / "teacher.pth").write_bytes(b"another teacher")
    with pytest.raises(RunError, match="sha256 of the checkpoint"):
        run(folder, checkpoint=folder / "teacher.pth")
    assert len(calls(folder)) == 1 and (folder / "run" / "done.json").is_file()


def test_data_that_changed_under_one_name_are_refused(folder, coco):
    data = folder / "train.json"
    opts = ["DATASETS.TRAIN_JSON", str(data)]
    data.write_text(Path(coco[0]).read_text())
    run(folder, *opts)
    data.write_text(data.read_text() + " ")
    with pytest.raises(RunError, match="sha256 of DATASETS.TRAIN_JSON was"):
        run(folder, *opts)
    data.unlink()  # a finished run stays finished
    run(folder, *opts)
    assert len(calls(folder)) == 1


def test_data_of_a_registered_set_that_changed_are_refused(folder, coco):
    data = folder / "train.json"
    data.write_text(Path(coco[0]).read_text())
    register_coco_instances("changing", {}, str(data), coco[1])
    opts = ["DATASETS.TRAIN", "('changing',)", "DATASETS.TRAIN_JSON", ""]
    run(folder, *opts)
    data.write_text(data.read_text() + " ")
    with pytest.raises(RunError, match="sha256 of changing was"):
        run(folder, *opts)


def test_what_the_base_of_a_teachers_config_says_is_a_setting(folder):
    (folder / "base.yaml").write_text("INPUT: {FORMAT: RGB}")
    (folder / "teacher.yaml").write_text("_BASE_: base.yaml\nOUTPUT_DIR: a")
    opts = ["MODEL.META_ARCHITECTURE", "FgBgDistiller"]
    opts += ["MODEL.KD.TEACHER.CONFIG", str(folder / "teacher.yaml")]
    run(folder, *opts)
    (folder / "teacher.yaml").write_text("_BASE_: base.yaml\nOUTPUT_DIR: b  # no matter")
    run(folder, *opts)
    assert len(calls(folder)) == 1
    (folder / "base.yaml").write_text("INPUT: {FORMAT: BGR}")
    with pytest.raises(RunError, match="sha256 of the teacher's config was"):
        run(folder, *opts)


def test_a_run_that_goes_on_under_another_commit_names_both(folder, monkeypatch):
    (folder / "run" / "fail").touch()
    monkeypatch.setattr("fgbg_kd.experiments.runner.commit", lambda: "aaa")
    with pytest.raises(RunError):
        run(folder)
    (folder / "run" / "fail").unlink()
    monkeypatch.setattr("fgbg_kd.experiments.runner.commit", lambda: "bbb+")
    assert run(folder)["commit"] == "aaa, bbb+"


def test_keys_that_only_one_version_of_the_package_has_are_compared_with_their_defaults():
    assert changes({}, {"SOLVER.OPTIMIZER": "SGD"}) == []
    assert changes({}, {"SOLVER.OPTIMIZER": "AdamW"}) == ["SOLVER.OPTIMIZER was 'SGD', is 'AdamW'"]
    assert changes({"SOLVER.OPTIMIZER": "AdamW"}, {}) == ["SOLVER.OPTIMIZER was 'AdamW', is 'SGD'"]
    assert changes({"GONE": 1}, {}) == ["GONE was 1, is None"]


def test_a_comparison_does_not_mix_two_versions_of_a_method(folder):
    def settings(name):
        opts = ["MODEL.META_ARCHITECTURE", "FgBgDistiller", "MODEL.KD.METHOD", name]
        return settings_of(read_config(str(folder / "c.yaml"), opts))

    key = "version of FgBg"
    before = {k: v for k, v in settings("FgBg").items() if k != key}
    assert changes(before, settings("FgBg")) == [f"{key} was 1, is {FgBg.version}"]
    assert changes(settings("FgBg"), settings("FgBg")) == []
    # The losses of PKD have not changed, so older runs count.
    before = {k: v for k, v in settings("PKD").items() if k != "version of PKD"}
    assert changes(before, settings("PKD")) == []
    with pytest.raises(ConfigError, match="MODEL.KD.METHOD is 'PKDD': choose from"):
        settings("PKDD")


def test_other_content_of_a_file_or_folder_that_a_run_reads_is_a_change(folder):
    def settings(*opts):
        kd = ["MODEL.META_ARCHITECTURE", "FgBgDistiller"]
        return settings_of(read_config(str(folder / "c.yaml"), [*kd, *opts]))

    network, photos = folder / "my.cfg", folder / "photos"
    network.write_text("[net]")
    photos.mkdir()
    (folder / "behind").mkdir()
    (photos / "link").symlink_to(folder / "behind")
    opts = ["MODEL.YOLO.CFG", str(network), "DATASETS.UNLABELED", f"('{photos}',)"]
    before = settings(*opts)
    assert changes(before, settings(*opts)) == []
    network.write_text("[other]")
    (folder / "behind" / "new.jpg").write_text("")
    changed = [text.split(" was ")[0] for text in changes(before, settings(*opts))]
    assert changed == ["sha256 of MODEL.YOLO.CFG", "digest of the photos without labels"]


def test_an_open_seed_and_other_images_in_another_folder_are_no_obstacle(folder, coco):
    run(folder, "SEED", "-1")
    run(folder, "SEED", "-1")
    assert len(calls(folder)) == 1
    with Runner(folder / "train_net.py") as runner:
        opts = ["DATASETS.TEST_IMAGES", str(folder)]
        runner.run("y", folder / "c.yaml", folder / "other", opts)


def test_settings_are_those_that_the_run_reads(folder):
    def settings(*opts):
        return settings_of(read_config(str(folder / "c.yaml"), list(opts)))

    kd = ["MODEL.META_ARCHITECTURE", "FgBgDistiller", "MODEL.KD.METHOD"]
    other_pkd, other_fgbg = ("MODEL.KD.PKD.WEIGHT", "3.0"), ("MODEL.KD.FGBG.FG_WEIGHT", "9.0")
    assert settings() == settings(*other_pkd, *other_fgbg, "OUTPUT_DIR", "elsewhere")
    assert settings(*kd, "PKD") == settings(*kd, "PKD", *other_fgbg)
    assert settings(*kd, "PKD") != settings(*kd, "PKD", *other_pkd)
    assert settings(*kd, "FgBg") == settings(*kd, "FgBg", *other_pkd)
    assert settings(*kd, "FgBg") != settings(*kd, "FgBg", *other_fgbg)


def test_a_run_by_a_python_config_has_its_file_and_overrides_for_settings(folder):
    (folder / "c.py").write_text("train = dict()")

    def evaluate(*opts):
        with Runner(folder / "train_net.py") as runner:
            return runner.run("x", folder / "c.py", folder / "run", list(opts), eval_only=True)

    assert evaluate("train.seed=1") == evaluate("train.seed=1") and len(calls(folder)) == 1
    with pytest.raises(RunError, match="train.seed was '1', is '2'"):
        evaluate("train.seed=2")
    (folder / "c.py").write_text("train = dict(x=1)")
    with pytest.raises(RunError, match="sha256 of the config"):
        evaluate("train.seed=1")


def test_a_folder_is_run_by_one_process_at_a_time(folder):
    (folder / "run" / "hang").touch()
    with Runner(folder / "train_net.py") as runner:
        arguments = ("x", folder / "c.yaml", folder / "run", [])
        thread = threading.Thread(target=lambda: pytest.raises(RunError, runner.run, *arguments))
        thread.start()
        wait_for((folder / "run" / "started").exists)
        with pytest.raises(RunError, match="another process"):
            run(folder)
        runner.stop()
        thread.join()
    assert not (folder / "run" / "done.json").exists()


def wait_for(condition):
    until = time.monotonic() + 120  # other tests may keep the machine busy
    while not condition():
        assert time.monotonic() < until, "waited for two minutes"
        time.sleep(0.05)


PARENT = """
import sys, signal
from pathlib import Path
from fgbg_kd.experiments.runner import Runner
signal.signal(signal.SIGINT, signal.default_int_handler)
folder = Path(sys.argv[1])
try:
    with Runner(folder / "train_net.py") as runner:
        runner.run("x", folder / "c.yaml", folder / "run", [])
except KeyboardInterrupt:
    sys.exit("stopped")
"""


@pytest.mark.slow
def test_ctrl_c_ends_the_children_and_their_children_without_a_trace(folder):
    (folder / "run" / "hang").touch()
    command = [sys.executable, "-c", PARENT, str(folder)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as parent:
        try:
            wait_for((folder / "run" / "started").exists)
            parent.send_signal(signal.SIGINT)
            _, errors = parent.communicate(timeout=60)
        finally:
            parent.kill()
    assert parent.returncode == 1 and "Traceback" not in errors and "stopped" in errors

    def all_are_gone():  # child and grandchild hold the same lock
        with open(folder / "run" / "lock") as lock, contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True

    wait_for(all_are_gone)
