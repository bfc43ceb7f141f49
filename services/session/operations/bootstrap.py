"""A tenant and its key."""

import os
import re
from uuid import UUID

from meshkit.auth import hash_key
from meshkit.errors import StartupError
from meshkit.secret_files import SecretFileError, secret
from services.session.store.port import Tenants

TENANT = "default"
_KEY = re.compile(r"[\x21-\x7e]{16,500}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


async def bootstrap(store: Tenants, tenant: str, variable: str) -> UUID:
    """Makes sure that a tenant and the key in an environment variable, or in its file, are there.

    Args:
        store: Where they are kept; the key only as its hash.
        tenant: The tenant's name.
        variable: The variable's name.

    Returns:
        The tenant.

    Raises:
        StartupError: The name is none, or the variable does not hold a usable key.
    """
    if _NAME.fullmatch(tenant) is None:
        raise StartupError(
            "a tenant's name is 1 to 100 letters, digits, dots, dashes and underscores, not a sign first"
        )
    try:
        key = secret(os.environ, variable)
    except SecretFileError as error:
        raise StartupError(str(error)) from None
    if not key:
        raise StartupError(f"neither {variable} nor {variable}_FILE is set; it holds the API key")
    if _KEY.fullmatch(key) is None:
        raise StartupError(
            f"{variable} must be 16 to 500 visible ASCII characters, such as hm_ and 43 random ones"
        )
    return await store.ensure_key(tenant, hash_key(key), "bootstrap")
