"""The published results of the zoo, and the results of runs from the files of each run."""

import json
import sys

import pytest
import yaml
import zoo  # noqa: E402
from detectron2.config import LazyConfig

NAME = "retinanet_R50_3x_to_R18_1x"


def shown(folder, monkeypatch, capsys):
    """The rows that the tool prints, by name."""
    monkeypatch.setattr(sys, "argv", ["zoo.py", "--runs", str(folder)])
    zoo.main()
    head, _, *rows = (
        [c.strip() for c in line.strip("|").split("|")]
        for line in capsys.readouterr().out.splitlines()
    )
    assert tuple(head) == zoo.COLUMNS
    return {row[0]: dict(zip(head, row)) for row in rows}


def write_run(folder, iterations=90000, done=90000, ap=33.333, data="coco_2017_val", more=""):
    folder.mkdir(parents=True)
    cfg = {"SOLVER": {"MAX_ITER": iterations}, "DATASETS": {"TEST": [data]}}
    (folder / "config.yaml").write_text(yaml.safe_dump(cfg))
    rows = [{"iteration": 19, "time": 9.0}, {"iteration": 39, "time": 0.25}]
    rows += [{"iteration": 59, "time": 0.25}, {"iteration": 20000, "bbox/AP": 11.1}]
    rows += [{"iteration": done, **({"bbox/AP": ap} if done == iterations else {"time": 0.25})}]
    (folder / "metrics.json").write_text("\n".join(map(json.dumps, rows)) + more)
    (folder / "log.txt").write_text(
        "iter: 19  total_loss: 1  max_mem: 3000M\niter: 39  total_loss: 1  max_mem: 4198M\n"
        "Total inference pure compute time: 0:03:20 (0.041 s / iter per device, on 1 devices)\n"
    )


def test_without_runs_every_config_says_not_run(tmp_path, monkeypatch, capsys):
    rows = shown(tmp_path, monkeypatch, capsys)
    published = ["zoo: RetinaNet R101", "3x", "0.291", "0.054", "5.2", "40.4", "190397697"]
    assert list(rows[published[0]].values()) == published
    configs = {p.stem for p in zoo.CONFIGS.glob("*.*") if not p.name.startswith(("Base-", "_"))}
    assert NAME in configs
    assert {k for k, row in rows.items() if row["box AP"] == "not run"} == configs


def test_a_run_gives_its_own_figures(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / NAME)
    row = shown(tmp_path, monkeypatch, capsys)[NAME]
    assert list(row.values()) == [NAME, "1x", "0.250", "0.041", "4.1", "33.3", ""]


@pytest.mark.parametrize(
    "run, ap, schedule",
    [
        ({"done": 60000}, "at iteration 60000 of 90000", "1x"),  # not the AP of iteration 20,000
        ({"more": '\n{"ite'}, "33.3", "1x"),
        ({"more": '\n{"iteration": 19}\n'}, "at iteration 19 of 90000", "1x"),  # started again
        ({"data": "scenes_test"}, "33.3 on scenes_test", "1x"),
        ({"iterations": 600, "done": 600}, "33.3", "600 iterations"),
    ],
)
def test_a_run_that_is_not_the_zoos_says_so(tmp_path, monkeypatch, capsys, run, ap, schedule):
    write_run(tmp_path / NAME, **run)
    row = shown(tmp_path, monkeypatch, capsys)[NAME]
    assert row["box AP"] == ap and row["lr sched"] == schedule


def test_a_damaged_run_leaves_the_others_figures(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / NAME)
    damaged = "retinanet_R101_3x_to_R50_1x"
    write_run(tmp_path / damaged)
    (tmp_path / damaged / "config.yaml").write_text("{SOLVER: ")
    rows = shown(tmp_path, monkeypatch, capsys)
    assert rows[damaged]["box AP"] == "damaged" and rows[NAME]["box AP"] == "33.3"
    (tmp_path / damaged / "config.yaml").unlink()
    assert zoo.run_row(damaged, tmp_path / damaged)["box AP"] == "damaged"
    assert f"{damaged}/config.yaml" in capsys.readouterr().err


def test_a_run_of_a_python_config_is_read_too(tmp_path, monkeypatch, capsys):
    name = "lazy_retinanet_R101_3x_to_R50_1x"
    write_run(tmp_path / name)
    LazyConfig.save(
        LazyConfig.load(str(zoo.CONFIGS / f"{name}.py")), tmp_path / name / "config.yaml"
    )
    row = shown(tmp_path, monkeypatch, capsys)[name]
    assert row["box AP"] == "33.3" and row["lr sched"] == "1x"
