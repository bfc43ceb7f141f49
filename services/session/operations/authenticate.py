"""API keys to tenants, from the service's own store."""

from uuid import UUID

from meshkit.auth import hash_key, invalid_key
from services.session.store.port import Tenants


class StoreAuthenticator:
    """Looks keys up in the store; decorate it with a cache for the public calls."""

    def __init__(self, store: Tenants) -> None:
        """Makes an authenticator over a store."""
        self._store = store

    async def authenticate(self, api_key: str) -> UUID:
        """Returns the tenant of a key.

        Raises:
            UnauthenticatedError: API_KEY_INVALID.
            UnavailableError: The database does not answer.
        """
        tenant_id = await self._store.tenant_of_key(hash_key(api_key))
        if tenant_id is None:
            raise invalid_key()
        return tenant_id
