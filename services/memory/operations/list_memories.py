"""ListMemories: a scope page by page."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from meshkit.errors import FieldViolation, InvalidArgumentError
from meshkit.paging import make_page_token, read_page_token
from services.memory.domain import Memory, Scope
from services.memory.store.port import MemoryStore

DEFAULT_SIZE = 50
_METHOD = "ListMemories"


async def list_memories(
    store: MemoryStore, tenant_id: UUID, scope: Scope, size: int, token: str
) -> tuple[Sequence[Memory], str]:
    """Returns one page, newest first, and the token of the next one.

    Raises:
        InvalidArgumentError: The token is not one of this scope (PAGE_TOKEN_INVALID).
    """
    bound = (tenant_id, int(scope.kind), scope.owner)
    position = read_page_token(_METHOD, bound, token)
    try:
        before = UUID(position) if position else None
    except ValueError:
        violation = FieldViolation("page_token", "is not a token of this list")
        raise InvalidArgumentError(
            "PAGE_TOKEN_INVALID", "page_token is not a token of this list", violations=[violation]
        ) from None
    size = size or DEFAULT_SIZE
    found = await store.list_memories(tenant_id, scope, before, size + 1)
    if len(found) <= size:
        return found, ""
    page = found[:size]
    return page, make_page_token(_METHOD, bound, str(page[-1].memory_id))
