"""Configs: what is wrong is named with its place; what is right arrives; nothing else changes."""

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fgbg_kd import get_fgbg_kd_cfg
from fgbg_kd.engine import load_config
from fgbg_kd.utils.config_files import merge_overrides, merge_yaml
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
        ("MODEL: {KD: {GATES: cell}}", r"c.yaml: there is no key MODEL.KD.GATES: is .*GATE meant"),
        ("MODLE: {KD: {GATE: cell}}", r"there is no key MODLE: is MODEL meant\?"),
        ("MODEL: {KD: {FG_WEIGHT: much}}", "c.yaml: Type mismatch .*float.*str.*KD.FG_WEIGHT"),
        ("MODEL: {KD: {WARMUP_ITERS: 0.5}}", "c.yaml: Type mismatch .*int.*float.*WARMUP_ITERS"),
        ("MODEL: {KD: off}", "c.yaml: MODEL.KD is a group of keys"),
        ("MODEL: {KD: {GATE: {cell: 1}}}", "MODEL.KD.GATE is a value"),
        ("MODEL: [", "c.yaml is no YAML file"),
        ("- MODEL", "c.yaml is no config"),
        ("", "c.yaml is no config"),
        ("_BASE_: c.yaml", "leads back to itself"),
        ("_BASE_: nowhere.yaml", "nowhere.yaml cannot be read"),
        ("VERSION: 1", "VERSION 1, this is 2"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        merge_text(tmp_path, text)


@pytest.mark.parametrize(
    "opts, message",
    [
        (["MODEL.KD.GATES", "cell"], "command line: there is no key MODEL.KD.GATES"),
        (["MODEL.KD.FG_WEIGHT", "much"], "command line: Type mismatch .*FG_WEIGHT"),
        (["MODEL.KD.FG_WEIGHT"], "MODEL.KD.FG_WEIGHT: KEY VALUE pairs, but one is missing"),
    ],
)
def test_what_is_wrong_on_the_command_line_is_named(opts, message):
    with pytest.raises(ConfigError, match=message):
        merge_overrides(get_fgbg_kd_cfg(), opts)


def test_a_config_file_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match="nowhere.yaml cannot be read"):
        load_config("nowhere.yaml")


def test_whole_numbers_are_floats_where_floats_are_meant(tmp_path):
    cfg = merge_text(tmp_path, "MODEL: {KD: {FG_WEIGHT: 2, TEACHER: {MIN_AP: 35}}}")
    merge_overrides(cfg, ["MODEL.KD.BG_WEIGHT", "0", "SOLVER.MAX_ITER", "7"])
    values = cfg.MODEL.KD.FG_WEIGHT, cfg.MODEL.KD.TEACHER.MIN_AP, cfg.MODEL.KD.BG_WEIGHT
    assert values == (2.0, 35.0, 0.0) and all(isinstance(v, float) for v in values)
    assert cfg.SOLVER.MAX_ITER == 7 and isinstance(cfg.SOLVER.MAX_ITER, int)


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
    """The parts that this package adds keys to: fresh for every case, so they must be few."""
    cfg = get_fgbg_kd_cfg()
    for key in [k for k in cfg if k not in ("VERSION", "MODEL", "DATASETS", "OUTPUT_DIR")]:
        del cfg[key]
    for key in [k for k in cfg.MODEL if k not in ("KD", "TIMM", "DEVICE")]:
        del cfg.MODEL[key]
    return cfg


SMALL = small_cfg()
LEAVES = flat(SMALL)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 10**20),
    st.floats(),
    st.text("aA0.-: '\"!&*[]{}\n", max_size=4),
    st.sampled_from(["cell", "(1, 2)", "[1]", "3", "off", "none", "__import__('os')", "1e999"]),
)
VALUES = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=2),
    st.dictionaries(st.sampled_from("ab"), SCALARS, max_size=1),
)
KEYS = st.one_of(
    st.sampled_from(sorted(LEAVES)),
    st.sampled_from(["MODEL", "MODEL.KD", "MODEL.KD.TEACHER", "MODEL.KD.GATE.X", "_BASE_", "."]),
    st.text("AMODELKD._1", min_size=1, max_size=6),
)


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


RIGHT = [(k, list(v) if isinstance(v, tuple) else v) for k, v in LEAVES.items()]
CASE = st.one_of(
    st.lists(st.sampled_from(RIGHT), min_size=1, max_size=3).map(dict),
    st.dictionaries(KEYS, VALUES, min_size=1, max_size=2),
    st.text("MODELKD:{}[]- \n&*!a0'", max_size=20),
)


def merges(path, content):
    """Either an error that is meant, or every named key and no other has changed, type kept."""
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(nested(content)))
    cfg = SMALL.clone()
    try:
        merge_yaml(cfg, str(path))
    except ConfigError:
        return False
    after, named = flat(cfg), flat(yaml.safe_load(path.read_text()))
    named.pop("_BASE_", None)  # an empty list of them is no key of the config
    assert after.keys() == LEAVES.keys() >= named.keys()
    for key, value in after.items():
        old = LEAVES[key]
        if key not in named:
            assert value == old and type(value) is type(old)
        elif not isinstance(value, (tuple, list, type(None))) and old is not None:
            assert type(value) is type(old)
    return True


def test_fuzzed_configs_are_refused_or_merged_exactly(tmp_path):
    merged = []

    @settings(
        max_examples=1_000, deadline=None, derandomize=True, suppress_health_check=[*HealthCheck]
    )
    @given(cases=st.lists(CASE, min_size=10, max_size=10))
    def fuzz(cases):
        merged.extend(merges(tmp_path / "c.yaml", case) for case in cases)

    fuzz()
    assert len(merged) >= 10_000 and 1_000 < sum(merged) < 9_000
