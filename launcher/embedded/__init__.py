"""Real servers out of wheels, for where no URL names another: PostgreSQL, Valkey, Envoy, a language model."""

import importlib.util
from pathlib import Path

from launcher.errors import LaunchError


def package_folder(name: str) -> Path:
    """The folder of an installed package, found without running any of its code.

    Raises:
        LaunchError: It is not installed.
    """
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise LaunchError(f"the package {name.replace('_', '-')} is not installed; make up installs it")
    return Path(next(iter(found.submodule_search_locations)))
