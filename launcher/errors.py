"""What can keep the mesh from starting, each said in one line."""

import errno
import re

_LIBRARY = re.compile(r"(lib[\w+.-]+\.so[\w.]*): cannot open shared object file")
_BIND = re.compile(r"'?[\d.]+:(\d+)'?: Address already in use")
_PACKAGES = {
    "libgomp.so.1": "libgomp1",
    "libstdc++.so.6": "libstdc++6",
    "libgcc_s.so.1": "libgcc-s1",
    "libz.so.1": "zlib1g",
}


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
    remedy = ""
    if error.errno in (errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP):
        remedy = ". Set HERMESH_DATA_DIR to another folder."
    return LaunchError(f"cannot {doing}: {(error.strerror or str(error)).lower()}{remedy}")


def library_remedy(library: str) -> str:
    """What to do about a shared library that the machine lacks."""
    package = _PACKAGES.get(library)
    return f"apt-get install {package}" if package else f"install the package that carries {library}"


def explain_output(what: str, said: str) -> str:
    """Finds in a process's last output what starting it again cannot mend; empty if there is nothing.

    Args:
        what: The process, as a person knows it.
        said: The end of its log.
    """
    if found := _LIBRARY.search(said):
        remedy = library_remedy(found[1])
        return f"{what} needs the shared library {found[1]}, which this machine lacks; {remedy}"
    if "No space left on device" in said:
        return (
            f"{what} cannot write: no space left. "
            "Free some, or set HERMESH_DATA_DIR to a folder on another disk."
        )
    if found := _BIND.search(said):
        return f"{what} cannot listen: port {found[1]} is in use"
    return ""
