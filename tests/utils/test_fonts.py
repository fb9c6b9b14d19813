"""Class names in any script are drawn, or replaced by what can be read."""

import matplotlib
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fgbg_kd.utils import fonts

matplotlib.use("agg")


@pytest.fixture
def font_with_a_cat(tmp_path, monkeypatch):
    """A font that has the one character 猫, as a square."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0)), pen.lineTo((0, 900)), pen.lineTo((900, 900)), pen.lineTo((900, 0))
    pen.closePath()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "cat"])
    builder.setupCharacterMap({ord("猫"): "cat"})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "cat": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "cat": (1000, 0)})
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "Cat Font", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "cat.ttf")
    monkeypatch.setattr(font_manager.fontManager, "ttflist", list(font_manager.fontManager.ttflist))
    font_manager.fontManager.addfont(tmp_path / "cat.ttf")
    fonts._fonts_for.cache_clear()
    yield
    fonts._fonts_for.cache_clear()


@pytest.mark.filterwarnings("error:Glyph")  # Matplotlib warns about each square
def test_a_name_in_chinese_is_drawn_by_a_font_that_has_it(font_with_a_cat):
    with fonts.readable(["猫", "Hündchen"]) as names:
        figure = Figure()
        figure.text(0, 0, " ".join(names), family="sans-serif")
        figure.canvas.draw()
    assert names == ["猫", "Hündchen"]
    assert "Cat Font" not in matplotlib.rcParams["font.sans-serif"]


def test_a_name_that_no_font_has_becomes_its_number(monkeypatch, caplog):
    usual = [f for f in font_manager.fontManager.ttflist if f.name[:6] in ("DejaVu", "Last R")]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", usual)
    fonts._fonts_for.cache_clear()
    with caplog.at_level("WARNING", logger="fgbg_kd"), fonts.readable(["dog", "猫"]) as names:
        assert names == ["dog", "class 1"]
    assert "No installed font has the characters 猫" in caplog.text
    fonts._fonts_for.cache_clear()


@pytest.mark.parametrize("name", ("Ba$$in", "$T_2#$", "cost $5 or $6", "US$"))
def test_a_dollar_sign_is_drawn_as_such(name):
    """Two of them would make a formula, which fails or loses its signs (matplotlib 20266)."""

    def drawn(text, **options):
        canvas = FigureCanvasAgg(Figure((2, 1)))
        canvas.figure.text(0.1, 0.5, text, **options)
        canvas.draw()
        return bytes(canvas.buffer_rgba())

    with fonts.readable([name]) as (shown,):
        assert drawn(shown) == drawn(name, parse_math=False)
