"""Secrets from files: where NAME is a secret, NAME_FILE names a file that holds it.

So do the secrets of Docker and Kubernetes reach a process without standing in its environment, which its
children inherit and which whoever may list processes can read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

SUFFIX = "_FILE"
# What is longer is no secret but another file.
_MAX_BYTES = 64 * 1024


class SecretFileError(ValueError):
    """A secret cannot be read; the message names the variable and never the content."""


def secret(environment: Mapping[str, str], name: str) -> str:
    """Returns what NAME says or what the file of NAME_FILE holds, without the line end it closes with.

    Args:
        environment: Variables; names may be written small, and empty ones do not count.
        name: The variable of the secret, as NAME.

    Returns:
        The secret; empty when neither is set.

    Raises:
        SecretFileError: Both are set, or the file holds no secret.
    """
    given = {key.upper(): value for key, value in environment.items() if value}
    path = given.get(name + SUFFIX, "")
    if not path:
        return given.get(name, "")
    if name in given:
        raise SecretFileError(f"{name} and {name}{SUFFIX} are both set; set one of them")
    return _read(f"{name}{SUFFIX}", path)


def _read(variable: str, path: str) -> str:
    # Relative to which folder? The launcher's processes have others than the shell. It is not shown: somebody
    # may have put the secret itself there.
    if not path.startswith("/"):
        raise SecretFileError(f"{variable} is not an absolute path of a file")
    try:
        with Path(path).open("rb") as file:
            held = file.read(_MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "no path"
        raise SecretFileError(f"{variable}: {path} cannot be read: {why}") from None
    if len(held) > _MAX_BYTES:
        raise SecretFileError(f"{variable}: {path} is larger than {_MAX_BYTES // 1024} KiB")
    try:
        found = held.decode().rstrip("\r\n")
    except UnicodeDecodeError:
        raise SecretFileError(f"{variable}: {path} is not text in UTF-8") from None
    if not found:
        raise SecretFileError(f"{variable}: {path} is empty")
    return found
