"""What a tool prints for an error."""

import signal
import subprocess
import sys

import pytest
from conftest import ROOT

# The package's __init__ files are not run: they would import Detectron2, which takes seconds.
PACKAGES_WITHOUT_INIT = f"""
import sys, types
for name in ("fgbg_kd", "fgbg_kd.utils", "fgbg_kd.engine"):
    module = sys.modules[name] = types.ModuleType(name)
    module.__path__ = [{str(ROOT)!r} + "/" + name.replace(".", "/")]
"""
TOOL = f"""
import sys
sys.path.insert(0, {str(ROOT / "tools")!r})
import _quiet
{PACKAGES_WITHOUT_INIT}
from fgbg_kd.utils.errors import DataError
class Unreadable(DataError):
    pass
print(sys.argv[1:], flush=True)
raise {{error}}
"""


def run(error, *arguments):
    command = [sys.executable, "-c", TOOL.format(error=error), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"{[x for x in arguments if x != '--traceback']}\n"
    return done


def test_an_error_of_this_package_is_its_message_also_if_a_tool_defines_it():
    done = run("Unreadable('a.png is damaged: replace it.')", "a.png")
    assert done.returncode == 1
    assert done.stderr == "Unreadable: a.png is damaged: replace it.\n"


def test_any_other_error_has_its_stack_trace():
    done = run("KeyError('x')")
    assert (
        done.returncode == 1 and done.stderr.startswith("Traceback") and "KeyError" in done.stderr
    )


@pytest.mark.parametrize("error", ["Unreadable('a.png is damaged.')", "KeyboardInterrupt"])
def test_the_switch_shows_every_stack_trace_and_is_hidden_from_the_tool(error):
    done = run(error, "photo.jpg", "--traceback", "--score")
    assert done.stderr.startswith("Traceback") and error.split("(")[0] in done.stderr


def test_ctrl_c_is_one_line_and_the_process_dies_of_the_signal():
    done = run("KeyboardInterrupt")
    assert done.stderr == "\nstopped\n" and done.returncode == -signal.SIGINT


@pytest.mark.parametrize("arguments, traces", [([], 0), (["--traceback"], 1)])
def test_detectron2s_log_of_an_error_of_this_package_has_no_trace(arguments, traces):
    """Its training loop logs every error with its stack trace before the tool ends."""
    text = TOOL.format(error="error").replace(
        "raise error",
        """
import logging
logging.basicConfig()
log = logging.getLogger("detectron2.engine.train_loop")
for kind in (Unreadable, KeyError):
    try:
        raise kind("a.png")
    except Exception:
        log.exception("Exception during training:")
""",
    )
    command = [sys.executable, "-c", text, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stderr.count("Unreadable: a.png") == traces and "KeyError: 'a.png'" in done.stderr
