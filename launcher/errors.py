"""What can keep the mesh from starting, each said in one line."""

import errno


class LaunchError(Exception):
    """Something a person has to put right; the message says what happened and what to do."""


def explain_os_error(error: OSError, doing: str) -> LaunchError:
    """Turns an operating system's error into a line with the remedy.

    Args:
        error: What was raised.
        doing: What was tried, such as "write /data/api-key".
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return LaunchError(
            f"cannot {doing}: no space left. Free some, or set HERMESH_DATA_DIR to a folder on another disk."
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return LaunchError(
            f"cannot {doing}: {(error.strerror or str(error)).lower()}. Check its owner and mode, "
            "or set HERMESH_DATA_DIR to a folder you may write to."
        )
    return LaunchError(f"cannot {doing}: {(error.strerror or str(error)).lower()}")
