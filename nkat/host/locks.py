"""A lock on an open file that ends with the process that holds it, however that ends."""

from __future__ import annotations

import errno
import os
import sys

_BEYOND = 1 << 62  # Windows locks bytes against reading too, so it is one behind every file's end


def try_lock(handle: int) -> bool | None:
    """Locks an open file. False: another one holds it; None: this file system has no locks."""
    try:
        if sys.platform == "win32":
            import msvcrt

            here = os.lseek(handle, 0, os.SEEK_CUR)
            os.lseek(handle, _BEYOND, os.SEEK_SET)
            try:
                msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            finally:
                os.lseek(handle, here, os.SEEK_SET)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK) else None
    return True
