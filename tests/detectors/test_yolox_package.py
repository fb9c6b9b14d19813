"""The package pixeltable-yolox is optional."""

import sys

import pytest
from conftest import tiny_yolox_cfg
from detectron2.modeling import build_model

from fgbg_kd.utils.errors import ConfigError


def test_without_the_package_the_message_says_how_to_install_it(monkeypatch):
    for name in ("yolox", "yolox.models"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "fgbg_kd.detectors.yolox_network", raising=False)
    with pytest.raises(ConfigError, match="pip install --no-deps pixeltable-yolox==0.4.3"):
        build_model(tiny_yolox_cfg())
