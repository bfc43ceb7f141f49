"""Accepting input: what is checked before a transaction begins, and what makes two requests the same."""

import hashlib
from collections.abc import Sequence
from uuid import UUID

from meshkit.errors import FieldViolation, InvalidArgumentError, PermissionDeniedError
from meshkit.identity import Identity
from services.session.domain import ConcurrencyPolicy, Submission, Submitted
from services.session.store.cached import Contexts

MAX_INPUT_BYTES = 1024 * 1024
# Whoever asks for more gets this.
MAX_RUN_TIMEOUT_MS = 7 * 86_400_000
_ROLES = frozenset({"user", "system", "assistant"})


def fingerprint(*parts: str | bytes) -> bytes:
    """Returns the SHA-256 of a request's canonical form: its parts, each after its length."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    return digest.digest()


def check_text(field: str, text: str, violations: list[FieldViolation]) -> None:
    """Adds a violation if a text holds what PostgreSQL cannot store."""
    if "\x00" in text:
        violations.append(FieldViolation(field, "must not hold the character U+0000"))


def check_input(messages: Sequence[tuple[str, str]]) -> None:
    """Checks the messages that a caller adds.

    Args:
        messages: Pairs of role and content.

    Raises:
        InvalidArgumentError: INPUT_TOO_LARGE with `limit_bytes`, or INVALID_ARGUMENT that names each field.
    """
    violations: list[FieldViolation] = []
    if not messages:
        violations.append(FieldViolation("input", "must hold at least one message"))
    size = 0
    for index, (role, content) in enumerate(messages):
        size += len(content.encode())
        if role not in _ROLES:
            violations.append(
                FieldViolation(f"input[{index}].role", "must be one of user, system, assistant")
            )
        if not content.strip():
            violations.append(FieldViolation(f"input[{index}].content", "must not be empty"))
        check_text(f"input[{index}].content", content, violations)
    if messages and messages[-1][0] == "assistant":
        violations.append(
            FieldViolation(f"input[{len(messages) - 1}].role", "the last message is the user's")
        )
    if size > MAX_INPUT_BYTES:
        raise InvalidArgumentError(
            "INPUT_TOO_LARGE",
            f"the input has {size} bytes; at most {MAX_INPUT_BYTES} are accepted",
            metadata={"limit_bytes": str(MAX_INPUT_BYTES), "size_bytes": str(size)},
            violations=[FieldViolation("input", f"must have at most {MAX_INPUT_BYTES} bytes in all")],
        )
    if violations:
        raise InvalidArgumentError("INVALID_ARGUMENT", "the input is not valid", violations=violations)


async def submit(
    store: Contexts,
    identity: Identity,
    tenant_id: UUID,
    *,
    session_id: UUID,
    messages: Sequence[tuple[str, str]],
    options: bytes,
    model: str,
    timeout_ms: int,
    request_id: str,
    concurrency: ConcurrencyPolicy,
    claim_owner: str,
    trace: bytes = b"",
) -> Submitted:
    """Accepts input for a session, once for each request id.

    Args:
        store: Where it is kept.
        identity: The caller; only the mesh may take a lease.
        tenant_id: Whose session it is.
        session_id: The session.
        messages: Pairs of role and content.
        options: The serialized run options, in their deterministic form.
        model: The model asked for, empty for the default.
        timeout_ms: The run's time limit, 0 for the default.
        request_id: The caller's idempotency key, or empty.
        concurrency: What to do if the session is busy. The request's own word is what makes two requests the
            same: a tenant's default may change between two tries of one.
        claim_owner: The agent replica that wants the lease in the same transaction, or empty.
        trace: More run options, serialized: what is kept with the run and makes two requests no different.

    Raises:
        InvalidArgumentError: The input breaks a rule.
        PermissionDeniedError: MESH_ONLY: a caller from outside asked for the lease.
        NotFoundError, AlreadyExistsError, FailedPreconditionError: As the store's `submit`.
    """
    if claim_owner and not identity.mesh:
        raise PermissionDeniedError("MESH_ONLY", "claim_owner is for the mesh's own services")
    check_input(messages)
    return await store.submit(
        tenant_id,
        Submission(
            session_id=session_id,
            input=messages,
            # Serialized messages one after the other are one message.
            options=options + trace,
            model=model,
            request_id=request_id,
            fingerprint=fingerprint(
                "run",
                session_id.bytes,
                options,
                str(int(concurrency)),
                *(part for message in messages for part in message),
            ),
            concurrency=concurrency,
            claim_owner=claim_owner,
            timeout_ms=min(timeout_ms, MAX_RUN_TIMEOUT_MS),
        ),
    )
