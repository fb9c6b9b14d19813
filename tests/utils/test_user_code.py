"""A user's own module is imported once, or the error says what is wrong with it."""

import multiprocessing
import sys

import pytest

from fgbg_kd.utils.errors import ConfigError
from fgbg_kd.utils.user_code import import_user_module


@pytest.fixture(autouse=True)
def modules_as_they_were(monkeypatch):
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in set(sys.modules) - before:
        if name.startswith("their_"):
            del sys.modules[name]


def write(folder, name, text):
    (folder / name).write_text(text)
    return str(folder / name)


def test_a_file_is_imported_once_under_its_name_with_its_neighbours(tmp_path):
    write(tmp_path, "their_neighbour.py", "LOADED = []\n")
    path = write(
        tmp_path, "their_method.py", "import their_neighbour\ntheir_neighbour.LOADED.append(1)\n"
    )
    module = import_user_module(path)
    assert import_user_module(path) is module is sys.modules["their_method"]
    assert module.their_neighbour.LOADED == [1]


def test_a_dotted_name_and_a_path_from_the_home_folder_are_taken(tmp_path, monkeypatch):
    package = tmp_path / "their_package"
    package.mkdir()
    write(package, "__init__.py", "")
    write(package, "part.py", "VALUE = 5\n")
    write(tmp_path, "their_home.py", "VALUE = 6\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert import_user_module("their_package.part").VALUE == 5
    monkeypatch.setenv("HOME", str(tmp_path))
    assert import_user_module("~/their_home.py").VALUE == 6


def test_its_functions_reach_processes_that_are_started_anew(tmp_path):
    """Data loading processes may start like this: they import the module by its name."""
    module = import_user_module(write(tmp_path, "their_mapper.py", "def double(x): return 2 * x\n"))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(module.double, (4,)) == 8


@pytest.mark.parametrize(
    "name, message",
    [
        ("their_nowhere", "--import their_nowhere: Python finds no module their_nowhere. Give the"),
        ("os.their_nowhere", "Python finds no module os.their_nowhere"),
        ("their_nowhere.py", "their_nowhere.py: there is no such file"),
        ("their module", "'their module' is neither a module name such as"),
        ("", "'' is neither a module name"),
    ],
)
def test_a_module_that_is_not_there_is_named(name, message):
    with pytest.raises(ConfigError, match=message):
        import_user_module(name)


@pytest.mark.parametrize(
    "text, message",
    [
        ("x = 1\nraise KeyError('FGBG')\n", r"raised KeyError: 'FGBG' \(.*their_bad.py, line 2\)"),
        ("def f(:\n", r"raised SyntaxError: .*their_bad.py, line 1"),
        ("import their_nowhere\n", r"raised ModuleNotFoundError: .*their_nowhere.*line 1"),
    ],
)
def test_a_module_that_raises_is_named_with_the_line(tmp_path, text, message):
    with pytest.raises(ConfigError, match=rf"(?s)their_bad.py: the module {message}"):
        import_user_module(write(tmp_path, "their_bad.py", text))


def test_a_name_that_another_module_has_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="the name json belongs to another module .*Rename"):
        import_user_module(write(tmp_path, "json.py", ""))
    with pytest.raises(ConfigError, match="'my-method' cannot be the name of a module"):
        import_user_module(write(tmp_path, "my-method.py", ""))
