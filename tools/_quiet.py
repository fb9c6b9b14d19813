"""Import this module first in a tool. It hides output that the user does not need.

- Ctrl-C ends the tool with one line instead of a stack trace, even while other modules are being
  imported. The process still ends by the signal, as shells and scripts expect.
- An error of fgbg_kd (a subclass of FgBgError) is printed as its message, without a stack trace.
- Warnings about the functions of PyTorch that Detectron2 calls are suppressed.

The argument ``--traceback`` switches the first two off: every error is printed with its stack
trace. The tool itself does not see this argument.
"""

import logging
import signal
import sys
import warnings
from typing import NoReturn

_report = sys.excepthook


def _is_of_package(kind) -> bool:
    # An error of fgbg_kd has already imported this module. An import here could fail.
    errors = sys.modules.get("fgbg_kd.utils.errors")
    return bool(errors) and issubclass(kind, errors.FgBgError)


def _excepthook(kind, error, trace):
    if issubclass(kind, KeyboardInterrupt):
        print("\nstopped", file=sys.stderr)
    elif _is_of_package(kind):
        print(f"{kind.__name__}: {error}", file=sys.stderr)
    else:
        _report(kind, error, trace)


_trace = "--traceback" in sys.argv
if _trace:
    sys.argv.remove("--traceback")
else:
    sys.excepthook = _excepthook
    # Detectron2 logs an error in the training loop with its trace, before _excepthook prints it.
    logging.getLogger("detectron2.engine.train_loop").addFilter(
        lambda record: not (record.exc_info and _is_of_package(record.exc_info[0]))
    )


def stop(tool: str, error: Exception) -> NoReturn:
    """Ends a tool with the message of an expected error: a missing file or a full disk."""
    if _trace:
        raise error
    sys.exit(f"{tool}: {error}")


signal.signal(signal.SIGINT, signal.default_int_handler)  # even if the shell ignores it

warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
warnings.filterwarnings("ignore", message="torch.meshgrid", category=UserWarning)
