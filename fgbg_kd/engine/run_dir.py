"""OUTPUT_DIR belongs to one run at a time."""

import errno
import fcntl
import logging
import os
import socket

from ..utils.errors import OutputDirError

logger = logging.getLogger(__name__)

_locks = {}  # open files: the kernel frees a lock when its process ends, however it ends


def lock_output_dir(path: str) -> None:
    """Makes the folder, and keeps it for this process as long as it lives.

    By a POSIX record lock, which loading processes do not inherit: a run that was killed can be
    resumed at once.

    Raises:
        OutputDirError: it cannot be written, or another run has it.
    """
    file_name = os.path.realpath(os.path.join(path, ".lock"))
    if file_name in _locks:  # to open and close it again would free it
        return
    try:
        os.makedirs(path, exist_ok=True)
        file = open(file_name, "a+")
    except OSError as error:
        raise OutputDirError(
            f"OUTPUT_DIR {path} cannot be written ({error}): choose another."
        ) from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            logger.warning(f"{file_name} cannot be locked ({error}): two runs here would clash.")
        else:
            file.seek(0)
            raise OutputDirError(
                f"OUTPUT_DIR {path} is in use by another run ({file.read().strip()}): choose "
                "another, or stop that run."
            ) from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _locks[file_name] = file
