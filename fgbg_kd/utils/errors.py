"""All exceptions of this package.

Each message says what is wrong and how to fix it. The tools print it without a stack trace, unless
they are run with ``--traceback``.
"""


class FgBgError(Exception):
    """Base class of all exceptions of this package."""


class ConfigError(FgBgError, ValueError):
    """A key of a config or an argument has a value that is not valid."""


class CheckpointError(FgBgError, ValueError):
    """A checkpoint cannot be read, or does not fit the model."""


class DataError(FgBgError, ValueError):
    """A data set is damaged, not valid, or does not fit another one."""


class EvaluationError(FgBgError, RuntimeError):
    """The evaluation on a test set does not work."""


class TeacherError(FgBgError, ValueError):
    """A teacher cannot be built, or cannot teach this student."""


class DetectorError(FgBgError, TypeError):
    """A detector does not support an operation, such as distillation or export."""


class DeployError(FgBgError, RuntimeError):
    """A detector cannot be exported, or an exported file cannot be run."""


class OutputDirError(FgBgError, RuntimeError):
    """The folder of a run (OUTPUT_DIR) cannot be used."""


class RunError(FgBgError, RuntimeError):
    """A run of an experiment cannot start, or has failed."""


class NonFiniteLossError(FgBgError, FloatingPointError):
    """A loss is infinite or NaN."""
