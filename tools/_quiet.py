"""Import this first, and a tool is quiet about what its user cannot change.

Ctrl-C ends it with a line instead of a stack trace, also while the rest is being imported; it still
dies of the signal, as a shell or a script expects. An error of this package's own is its message,
not a stack trace. TorchScript's notices about what Detectron2 calls are left out.
"""

import signal
import sys
import warnings

_report = sys.excepthook


def _excepthook(kind, error, trace):
    if issubclass(kind, KeyboardInterrupt):
        print("\nstopped", file=sys.stderr)
    elif kind.__module__.startswith("fgbg_kd."):  # its message says what to do
        print(f"{kind.__name__}: {error}", file=sys.stderr)
    else:
        _report(kind, error, trace)


sys.excepthook = _excepthook
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell ignores it

warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
warnings.filterwarnings("ignore", message="torch.meshgrid", category=UserWarning)
