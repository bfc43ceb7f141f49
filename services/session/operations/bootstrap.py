"""The first tenant and its key."""

import os
import re
from uuid import UUID

from meshkit.auth import hash_key
from meshkit.errors import StartupError
from services.session.store.port import Tenants

TENANT = "default"
_KEY = re.compile(r"[\x21-\x7e]{16,500}")


async def bootstrap(store: Tenants, variable: str) -> UUID:
    """Makes sure that the default tenant and the key in an environment variable are there.

    Args:
        store: Where they are kept; the key only as its hash.
        variable: The variable's name.

    Returns:
        The tenant.

    Raises:
        StartupError: The variable is not set, or does not hold a usable key.
    """
    key = os.environ.get(variable, "")
    if not key:
        raise StartupError(f"{variable} is not set; it holds the first API key")
    if _KEY.fullmatch(key) is None:
        raise StartupError(
            f"{variable} must be 16 to 500 visible ASCII characters, such as hm_ and 43 random ones"
        )
    return await store.ensure_key(TENANT, hash_key(key), "bootstrap")
