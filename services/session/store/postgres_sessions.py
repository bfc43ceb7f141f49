"""Sessions and messages in PostgreSQL."""

from __future__ import annotations

from collections.abc import Mapping
from uuid import UUID

import orjson

from meshkit.errors import AlreadyExistsError, FieldViolation, InvalidArgumentError, ResourceExhaustedError
from meshkit.ids import uuid7
from meshkit.paging import make_page_token, read_page_token
from meshkit.postgres import load_sql
from services.session.domain import Message, Page, Session, ToolCall
from services.session.store.port import MAX_CONTEXT_BYTES, MAX_CONTEXT_MESSAGES, MAX_LABELS, PAGE_BYTES
from services.session.store.postgres_base import PostgresPart, not_found
from services.session.store.rows import message_of, session_of, tool_call_of

_SQL = load_sql("services.session.store.sql", "sessions.sql")
_UPKEEP = load_sql("services.session.store.sql", "upkeep.sql")

_LAST_MS = 2**63 - 1
_LAST_ID = UUID(int=2**128 - 1)
_DELETE_TIMEOUT = 60.0


def bad_token() -> InvalidArgumentError:
    """Returns the error for a page token whose position is not one."""
    text = "is not a token of this list"
    return InvalidArgumentError(
        "PAGE_TOKEN_INVALID", f"page_token {text}", violations=[FieldViolation("page_token", text)]
    )


def ordinal_at(position: str, first: int) -> int:
    """Returns the ordinal that a page token's position holds, or `first` for the first page."""
    if not position:
        return first
    try:
        ordinal = int(position)
    except ValueError:
        raise bad_token() from None
    if not 0 <= ordinal < 2**31:
        raise bad_token()
    return ordinal


class PostgresSessions(PostgresPart):
    """See `port.Conversations`."""

    async def create_session(
        self,
        tenant_id: UUID,
        *,
        title: str,
        metadata: Mapping[str, str],
        agent: str,
        user: str,
        request_id: str,
        fingerprint: bytes,
    ) -> Session:
        """See the port."""
        row = await self._fetchrow(
            _SQL["create_session"],
            tenant_id,
            uuid7(),
            title,
            orjson.dumps(dict(metadata)).decode(),
            agent,
            user,
            request_id or None,
            fingerprint,
        )
        if row is not None:
            return session_of(row)
        known = await self._fetchrow(_SQL["find_request"], tenant_id, "session", request_id)
        if known is None or known["fingerprint"] != fingerprint:
            raise AlreadyExistsError(
                "REQUEST_ID_REUSED",
                "the request id was used for another request",
                metadata={"request_id": request_id},
            )
        return await self.get_session(tenant_id, known["result_id"])

    async def get_session(self, tenant_id: UUID, session_id: UUID) -> Session:
        """See the port."""
        row = await self._fetchrow(_SQL["get_session"], tenant_id, session_id)
        if row is None:
            raise not_found("session", session_id)
        return session_of(row)

    async def list_sessions(
        self, tenant_id: UUID, *, page_size: int, page_token: str, user: str = ""
    ) -> Page[Session]:
        """See the port."""
        bound = (tenant_id, user)
        updated_ms, session_id = _session_position(read_page_token("ListSessions", bound, page_token))
        # One more than asked for tells whether there is a next page.
        args = (tenant_id, updated_ms, session_id, page_size + 1)
        if user:
            rows = await self._fetch(_SQL["list_sessions_of_user"], *args, user)
        else:
            rows = await self._fetch(_SQL["list_sessions"], *args)
        sessions = [session_of(row) for row in rows[:page_size]]
        if len(rows) <= page_size:
            return Page(sessions)
        last = sessions[-1]
        return Page(
            sessions, make_page_token("ListSessions", bound, f"{last.update_time_ms}:{last.session_id}")
        )

    async def update_session(
        self, tenant_id: UUID, session_id: UUID, *, title: str | None, metadata: Mapping[str, str]
    ) -> Session:
        """See the port."""
        labels = {key: value for key, value in metadata.items() if value}
        row = await self._fetchrow(
            _SQL["update_session"],
            tenant_id,
            session_id,
            title,
            orjson.dumps(labels).decode(),
            [key for key, value in metadata.items() if not value],
            MAX_LABELS,
        )
        # Says itself that the session is not there.
        session = await self.get_session(tenant_id, session_id)
        if row is None:
            raise ResourceExhaustedError(
                "QUOTA_EXCEEDED",
                f"a session has at most {MAX_LABELS} labels; nothing was changed",
                metadata={"limit": "labels_per_session", "max": str(MAX_LABELS)},
            )
        return session

    async def delete_session(self, tenant_id: UUID, session_id: UUID) -> list[ToolCall]:
        """See the port."""
        async with self._connection({"session_id": session_id}) as connection, connection.transaction():
            await connection.fetchval(_UPKEEP["set_long_statement"])
            # Appends under way end first; those that come later find no lease and are fenced.
            there = (
                await connection.fetchval(self._here(_SQL["lock_lease"]), tenant_id, session_id) is not None
            )
            if there:
                rows = await connection.fetch(self._here(_SQL["calls_under_way"]), tenant_id, session_id)
                if rows:
                    return [tool_call_of(row) for row in rows]
                # Its request ids stay until they expire: a late repeat must not make anything anew.
                for name in ("delete_events", "delete_session"):
                    await connection.execute(
                        self._here(_SQL[name]), tenant_id, session_id, timeout=_DELETE_TIMEOUT
                    )
        if not there:
            # A delete before this one may be in this server alone.
            await self.confirm()
            raise not_found("session", session_id)
        return []

    async def list_messages(
        self, tenant_id: UUID, session_id: UUID, *, page_size: int, page_token: str
    ) -> Page[Message]:
        """See the port."""
        bound = (tenant_id, session_id)
        after = ordinal_at(read_page_token("ListMessages", bound, page_token), 0)
        rows = await self._fetch(
            _SQL["list_messages"], tenant_id, session_id, after, page_size + 1, PAGE_BYTES
        )
        if not rows:
            await self.get_session(tenant_id, session_id)
        messages = [message_of(row) for row in rows[:page_size] if row["fits"]]
        if len(rows) == len(messages):
            return Page(messages)
        return Page(messages, make_page_token("ListMessages", bound, str(messages[-1].ordinal)))

    async def history(self, tenant_id: UUID, session_id: UUID, last: int) -> list[Message]:
        """See the port."""
        rows = await self._fetch(
            _SQL["history"], tenant_id, session_id, last, MAX_CONTEXT_MESSAGES, MAX_CONTEXT_BYTES
        )
        return [message_of(row) for row in rows]


def _session_position(position: str) -> tuple[int, UUID]:
    if not position:
        return _LAST_MS, _LAST_ID
    updated, _, session_id = position.partition(":")
    try:
        found = int(updated), UUID(session_id)
    except ValueError:
        raise bad_token() from None
    if not 0 <= found[0] <= _LAST_MS:
        raise bad_token()
    return found
