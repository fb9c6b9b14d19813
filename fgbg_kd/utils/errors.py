"""Every exception of this package.

Each message says what is wrong and what to do. The tools print it without a stack trace.
"""


class FgBgError(Exception):
    """Base of all errors of this package."""


class ConfigError(FgBgError, ValueError):
    """A config cannot be used."""


class CheckpointError(FgBgError, ValueError):
    """A checkpoint cannot be used."""


class DataError(FgBgError, ValueError):
    """A data set cannot be used."""


class TeacherError(FgBgError, ValueError):
    """The teacher cannot teach this student."""


class DetectorError(FgBgError, TypeError):
    """A detector does not offer what is asked of it."""


class DeployError(FgBgError, RuntimeError):
    """A detector cannot be exported, or an exported file cannot be run."""


class OutputDirError(FgBgError, RuntimeError):
    """OUTPUT_DIR cannot be used."""


class RunError(FgBgError, RuntimeError):
    """A run of an experiment cannot start, or it failed."""


class NonFiniteLossError(FgBgError, FloatingPointError):
    """A loss is infinite or not a number."""
