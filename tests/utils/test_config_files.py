"""Configs: errors name the place, valid values are set, and nothing else changes."""

import random

import pytest
import yaml
from omegaconf import OmegaConf

from fgbg_kd import get_fgbg_kd_cfg
from fgbg_kd.detectors.load import read_detector_config
from fgbg_kd.engine import load_config
from fgbg_kd.utils.config_files import expand_paths, merge_overrides, merge_yaml
from fgbg_kd.utils.errors import ConfigError


def merge_text(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    cfg = get_fgbg_kd_cfg()
    merge_yaml(cfg, str(path))
    return cfg


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "MODEL: {KD: {FGBG: {GATES: cell}}}",
            r"c.yaml: there is no key MODEL.KD.FGBG.GATES: did you mean",
        ),
        ("MODLE: {KD: {GATE: cell}}", r"there is no key MODLE: did you mean MODEL\?"),
        ("MODEL: {KD: {FGBG: {FG_WEIGHT: much}}}", "c.yaml: Type .*float.*str.*FGBG.FG_WEIGHT"),
        (
            "MODEL: {KD: {WARMUP_ITERS: 0.5}}",
            "c.yaml: MODEL.KD.WARMUP_ITERS is a whole number, and 0.5 is a float",
        ),
        ("MODEL: {KD: off}", "c.yaml: MODEL.KD is a group of keys"),
        ("MODEL: {KD: {METHOD: {cell: 1}}}", "MODEL.KD.METHOD is one value, not a group"),
        ("MODEL: [", "c.yaml is not a valid YAML file"),
        ("- MODEL", "c.yaml is not a config: write keys and values"),
        ("", "c.yaml is not a config: write keys and values"),
        ("_BASE_: c.yaml", "_BASE_ leads back to the file itself"),
        ("_BASE_: nowhere.yaml", "nowhere.yaml cannot be read"),
        ("VERSION: 1", "VERSION 1; VERSION 2 is needed"),
        ("MODEL: {WEIGHTS: a}\nSEED: 1\nMODEL: {DEVICE: cpu}", "MODEL stands in line 1 .*line 3"),
        ("SOLVER:\n  BASE_LR: 1.0\n  BASE_LR: 2.0", "BASE_LR stands in line 2 .*line 3"),
        ('DATASETS: {TRAIN: ("mine")}', r"TRAIN takes several values.*write \('mine',\)"),
        ("INPUT: {MIN_SIZE_TRAIN: 640}", r"MIN_SIZE_TRAIN takes several .*write \(640,\)"),
        ("OUTPUT_DIR: 20240101", "OUTPUT_DIR is text, and YAML reads .*put it in quotes"),
        ("OUTPUT_DIR: 2024-01-01", "OUTPUT_DIR is text, and YAML reads .*put it in quotes"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        merge_text(tmp_path, text)


@pytest.mark.parametrize(
    "opts, message",
    [
        (["MODEL.KD.GATES", "cell"], "command line: there is no key MODEL.KD.GATES"),
        (["MODEL.KD.FGBG.FG_WEIGHT", "much"], "command line: Type mismatch .*FG_WEIGHT"),
        (["MODEL.KD.GATE=off"], "GATE=off' is not a key. .* a space .*: MODEL.KD.GATE off$"),
        (["MODEL.KD.FG_WEIGHT"], "the key MODEL.KD.FG_WEIGHT has no value. Overrides are pairs"),
    ],
)
def test_what_is_wrong_on_the_command_line_is_named(opts, message):
    with pytest.raises(ConfigError, match=message):
        merge_overrides(get_fgbg_kd_cfg(), opts)


def test_a_config_file_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match="nowhere.yaml cannot be read"):
        load_config("nowhere.yaml")


def test_whole_numbers_are_floats_where_floats_are_meant(tmp_path):
    cfg = merge_text(tmp_path, "MODEL: {KD: {FGBG: {FG_WEIGHT: 2}, TEACHER: {MIN_AP: 35}}}")
    merge_overrides(cfg, ["MODEL.KD.FGBG.BG_WEIGHT", "0", "SOLVER.MAX_ITER", "7"])
    values = cfg.MODEL.KD.FGBG.FG_WEIGHT, cfg.MODEL.KD.TEACHER.MIN_AP, cfg.MODEL.KD.FGBG.BG_WEIGHT
    assert values == (2.0, 35.0, 0.0) and all(isinstance(v, float) for v in values)
    assert cfg.SOLVER.MAX_ITER == 7 and isinstance(cfg.SOLVER.MAX_ITER, int)


@pytest.mark.parametrize(
    "value, hint", [("9e3", ": write 9000"), ("9.0e+3", ": write 9000"), ("0.5", "")]
)
def test_a_float_is_refused_where_a_whole_number_is_meant(value, hint, tmp_path):
    message = f"SOLVER.MAX_ITER is a whole number, and .* is a float{hint}\\.$"
    with pytest.raises(ConfigError, match=message):
        merge_text(tmp_path, f"SOLVER: {{MAX_ITER: {value}}}")
    with pytest.raises(ConfigError, match=message):
        merge_overrides(get_fgbg_kd_cfg(), ["SOLVER.MAX_ITER", value])


def test_keys_of_a_newer_detectron2_are_left_out(tmp_path, caplog):
    text = "SOLVER: {MAX_ITER: 7, NUM_DECAYS: 3}\nFLOAT32_PRECISION: ''"
    assert merge_text(tmp_path, text).SOLVER.MAX_ITER == 7 and not caplog.text
    cfg = merge_text(tmp_path, "SOLVER: {NUM_DECAYS: 5}")
    known = "NUM_DECAYS" in cfg.SOLVER  # Detectron2's main
    assert known == ("no key SOLVER.NUM_DECAYS. It is left out" not in caplog.text)
    assert not known or cfg.SOLVER.NUM_DECAYS == 5


def test_the_dump_of_a_python_config_is_refused_with_what_to_give(tmp_path):
    with pytest.raises(ConfigError, match=r"written by a training with a Python config.*\(.py\)"):
        merge_text(tmp_path, "model: {_target_: a.B}\ndataloader: {train: !!python/name:a.c ''}")


@pytest.mark.parametrize("text", ["x = 1", ""])
def test_a_python_config_where_yaml_is_needed_is_named_as_such(tmp_path, text):
    (tmp_path / "c.py").write_text(text)
    with pytest.raises(ConfigError, match="c.py is a Python config; a YAML config .* is needed"):
        load_config(str(tmp_path / "c.py"))


# --- paths ---


def yaml_paths(cfg):
    datasets = [
        cfg.DATASETS[f"{part}_{x}"] for part in ("TRAIN", "TEST") for x in ("JSON", "IMAGES")
    ]
    teacher = cfg.MODEL.KD.TEACHER
    weights = [cfg.MODEL.WEIGHTS, teacher.CONFIG, teacher.WEIGHTS, cfg.MODEL.TIMM.WEIGHTS]
    return [cfg.OUTPUT_DIR, *datasets, *weights]


def test_all_path_keys_expand_home_and_variables_alike(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.setenv("DATA", "coco")
    cfg = get_fgbg_kd_cfg()
    cfg.OUTPUT_DIR = cfg.MODEL.WEIGHTS = cfg.MODEL.TIMM.WEIGHTS = "~/$DATA/x"
    cfg.MODEL.KD.TEACHER.CONFIG = cfg.MODEL.KD.TEACHER.WEIGHTS = "~/$DATA/x"
    for part in ("TRAIN", "TEST"):
        cfg.DATASETS[f"{part}_JSON"] = cfg.DATASETS[f"{part}_IMAGES"] = "~/${DATA}/x"
    expand_paths(cfg)
    assert yaml_paths(cfg) == ["/home/ann/coco/x"] * 9

    lazy = OmegaConf.create(
        {
            "train": {"output_dir": "~/$DATA/x", "init_checkpoint": "~/x"},
            "model": {"teacher": {"config": "$DATA/x", "weights": "~/x"}},
        }
    )
    expand_paths(lazy)
    assert lazy.train == {"output_dir": "/home/ann/coco/x", "init_checkpoint": "/home/ann/x"}
    assert lazy.model.teacher == {"config": "coco/x", "weights": "/home/ann/x"}
    expand_paths(OmegaConf.create({"train": {"output_dir": "x"}}))  # no teacher


def test_what_is_no_home_and_no_variable_is_unchanged_or_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a$b.pth").write_text("")
    cfg = get_fgbg_kd_cfg()
    plain = ["", "a$b.pth", "https://x.org/~ann/$x.pth", "detectron2://a/b.pkl", "C/r_101.yaml"]
    for path in plain:
        cfg.MODEL.WEIGHTS = path
        expand_paths(cfg)
        assert cfg.MODEL.WEIGHTS == path
    for path, unknown in (("$NOT_SET_1/x.pth", r"\$NOT_SET_1"), ("~nobody_1/x.pth", "~nobody_1")):
        cfg.MODEL.WEIGHTS = path
        with pytest.raises(ConfigError, match=f"MODEL.WEIGHTS is .*, but {unknown} is not known"):
            expand_paths(cfg)


# --- fuzz ---


def flat(cfg, prefix=""):
    out = {}
    for key, value in cfg.items():
        if isinstance(value, dict):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[prefix + str(key)] = value
    return out


def small_cfg():
    """A few groups with FgBg's keys. Each case copies the config, so it must be small."""
    cfg = get_fgbg_kd_cfg()
    for key in [k for k in cfg if k not in ("VERSION", "MODEL", "DATASETS", "OUTPUT_DIR")]:
        del cfg[key]
    for key in [k for k in cfg.MODEL if k not in ("KD", "TIMM", "DEVICE")]:
        del cfg.MODEL[key]
    return cfg


SMALL = small_cfg()
LEAVES = flat(SMALL)
RIGHT = [(k, list(v) if isinstance(v, tuple) else v) for k, v in LEAVES.items()]
TEXTS = "cell", "(1, 2)", "[1]", "3", "off", "none", "__import__('os')", "1e999"
GROUPS = "MODEL", "MODEL.KD", "MODEL.KD.TEACHER", "MODEL.KD.METHOD.X", "_BASE_", "."


def text(rng, letters, longest):
    return "".join(rng.choice(letters) for _ in range(rng.randint(0, longest)))


def scalar(rng):
    return rng.choice(
        [
            None,
            rng.random() < 0.5,
            rng.randint(-3, 10**20),
            rng.choice([0.0, -1.5, 1e300, float("inf"), float("nan")]),
            text(rng, "aA0.-: '\"!&*[]{}\n", 4),
            rng.choice(TEXTS),
        ]
    )


def value(rng):
    kind = rng.randrange(4)
    if kind == 0:
        return [scalar(rng) for _ in range(rng.randint(0, 2))]
    if kind == 1:
        return {rng.choice("ab"): scalar(rng) for _ in range(rng.randint(0, 1))}
    return scalar(rng)


def key(rng):
    return rng.choice(
        [rng.choice(sorted(LEAVES)), rng.choice(GROUPS), text(rng, "AMODELKD._1", 5) or "A"]
    )


def case(rng):
    """The text of a config file: valid values, invalid values, or invalid YAML."""
    kind = rng.randrange(3)
    if kind == 0:
        return yaml.safe_dump(nested(dict(rng.choice(RIGHT) for _ in range(rng.randint(1, 3)))))
    if kind == 1:
        return yaml.safe_dump(nested({key(rng): value(rng) for _ in range(rng.randint(1, 2))}))
    return text(rng, "MODELKD:{}[]- \n&*!a0'", 20)


def nested(pairs):
    out = {}
    for key, value in pairs.items():
        *groups, leaf = key.split(".")
        at = out
        for group in groups:
            if not isinstance(at.get(group), dict):
                at[group] = {}
            at = at[group]
        at[leaf] = value
    return out


def merges(path, content):
    """False: a ConfigError was raised. True: only the named keys changed, and kept their type."""
    path.write_text(content)
    cfg = SMALL.clone()
    try:
        merge_yaml(cfg, str(path))
    except ConfigError:
        return False
    after, named = flat(cfg), flat(yaml.safe_load(content))
    named.pop("_BASE_", None)  # an empty list of bases is allowed
    assert after.keys() == LEAVES.keys() >= named.keys()
    for key, value in after.items():
        old = LEAVES[key]
        if key not in named:
            assert value == old and type(value) is type(old)
        elif not isinstance(value, (tuple, list, type(None))) and old is not None:
            assert type(value) is type(old)
    return True


@pytest.mark.slow
def test_fuzzed_configs_are_refused_or_merged_exactly(tmp_path):
    cases, merged = 1_000, 0
    for seed in range(cases):
        content = case(random.Random(seed))
        try:
            merged += merges(tmp_path / "c.yaml", content)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {content}") from error
    assert cases / 10 < merged < cases * 9 / 10


def test_a_number_is_text_where_text_is_needed(tmp_path):
    assert merge_text(tmp_path, 'OUTPUT_DIR: "010"').OUTPUT_DIR == "010"
    cfg = get_fgbg_kd_cfg()
    merge_overrides(cfg, ["OUTPUT_DIR", "20240101", "MODEL.WEIGHTS", "1e3"])
    assert (cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS) == ("20240101", "1e3")


def test_the_config_of_a_teacher_expands_what_is_known_here(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA", str(tmp_path))
    monkeypatch.delenv("GONE", raising=False)
    path = tmp_path / "teacher.yaml"
    path.write_text("DATASETS: {TRAIN_JSON: $DATA/train.json}\nOUTPUT_DIR: $GONE/runs")
    cfg = read_detector_config(str(path))
    assert cfg.DATASETS.TRAIN_JSON == f"{tmp_path}/train.json" and cfg.OUTPUT_DIR == "$GONE/runs"
