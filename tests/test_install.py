"""Tests parts of the installer that need neither a network nor pip."""

import hashlib
import importlib.util
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPT = ROOT / "tools" / "install_detectron2.py"


@pytest.fixture(scope="module")
def installer():
    spec = importlib.util.spec_from_file_location("install_detectron2", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def patched(installer, name, text):
    """`text` after all patches for the file `name`, for any number of matches."""
    for path, pattern, replacement, _ in installer.V06_PATCHES:
        if path == name:
            text = re.sub(pattern, replacement, text)
    return text


def test_removed_numpy_names_become_builtins_and_sized_types_stay(installer):
    text = "np.zeros(3, dtype=np.int); np.bool; np.float; np.str; np.int64; np.float32; np.bool_"
    pattern, replacement = installer.NUMPY_ALIAS
    assert installer.substitute(text, pattern, replacement, 4, "x.py") == (
        "np.zeros(3, dtype=int); bool; float; str; np.int64; np.float32; np.bool_"
    )


@pytest.mark.parametrize("text", ["", "np.int", "np.int np.int np.int"])
def test_a_pattern_found_too_rarely_or_too_often_is_an_error_with_file_and_counts(installer, text):
    with pytest.raises(installer.InstallError, match=r"build\.py: expected .* 2 time\(s\), found"):
        installer.substitute(text, *installer.NUMPY_ALIAS, 2, "build.py")


def test_patched_zoo_finds_its_configs_without_pkg_resources(installer):
    before = (
        "import os\nimport pkg_resources\n\n\n"
        "def get_config_file(config_path):\n"
        "    cfg_file = pkg_resources.resource_filename(\n"
        '        "detectron2.model_zoo", os.path.join("configs", config_path)\n'
        "    )\n"
        "    return cfg_file\n"
    )
    after = patched(installer, installer.ZOO, before)
    assert "pkg_resources" not in after
    namespace = {}
    exec(after.replace("detectron2.model_zoo", "importlib"), namespace)
    assert namespace["get_config_file"]("a/b.yaml").endswith(os.path.join("configs", "a/b.yaml"))


def test_a_missing_file_is_an_error_that_names_it(installer, tmp_path):
    with pytest.raises(installer.InstallError, match=r"model_zoo\.py is missing"):
        installer.apply_patches(tmp_path, installer.ZOO_PATCHES)


def test_another_archive_than_the_pinned_one_is_refused(installer, tmp_path):
    archive = tmp_path / "a.tar.gz"
    archive.write_bytes(b"right")
    expected = hashlib.sha256(b"right").hexdigest()
    installer.verify_sha256(archive, expected)
    archive.write_bytes(b"wrong")
    with pytest.raises(installer.InstallError, match=f"expected {expected}"):
        installer.verify_sha256(archive, expected)


def test_stand_in_for_compiled_code_names_the_fix_and_does_not_break_introspection(installer):
    namespace = {"__name__": "detectron2._C"}
    exec(installer.NO_C, namespace)
    with pytest.raises(ImportError, match="--source github --force"):
        namespace["__getattr__"]("deform_conv_forward")
    # hasattr, pickle and inspect ask modules for any name and expect AttributeError
    with pytest.raises(AttributeError):
        namespace["__getattr__"]("__path__")
    assert namespace["has_cuda"]() is False


def fake_detectron2(folder, zoo="def get_config_file(name): return name\n"):
    package = folder / "detectron2"
    for name in ("model_zoo", "engine", "evaluation"):
        (package / name).mkdir(parents=True)
        (package / name / "__init__.py").write_text(zoo if name == "model_zoo" else "")
    (package / "__init__.py").write_text("__version__ = '9.9'\n")


def run_installer(folder, *arguments):
    env = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


def test_a_working_detectron2_is_left_alone(tmp_path):
    fake_detectron2(tmp_path)
    done = run_installer(tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"9.9 {tmp_path / 'detectron2'}: works, left alone" in done.stdout
    assert len(done.stdout.splitlines()) == 1  # nothing else was done


def test_a_broken_detectron2_does_not_count_as_working(tmp_path):
    fake_detectron2(tmp_path, zoo="raise RuntimeError('half of it is missing')\n")
    done = run_installer(tmp_path, "--check")
    assert done.returncode == 1
    assert "does not work: RuntimeError: half of it is missing" in done.stderr


def test_leftovers_of_an_interrupted_pip_go_and_a_complete_installation_stays(
    installer, tmp_path, monkeypatch
):
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    package, info = tmp_path / "detectron2", tmp_path / "detectron2-0.6.dist-info"
    for folder in (package, info):
        folder.mkdir()
    (info / "RECORD").touch()
    installer.remove_leftovers()
    assert package.exists() and info.exists()
    (info / "RECORD").unlink()
    installer.remove_leftovers()
    assert not package.exists() and not info.exists()


def test_help_shows_an_example(tmp_path):
    done = run_installer(tmp_path, "--help")
    assert done.returncode == 0
    assert "python tools/install_detectron2.py" in done.stdout
