"""What several of these tests build: replies as a server would have sent them."""

import re

import pytest

from bench.load import Reply
from bench.target import IncompleteReply


class PlainTarget:
    """A server whose replies are lines of text, the last of which is `end`."""

    name = "plain"
    durable = False
    first_token = re.compile(rb"text: [^\n]")

    def processes(self):
        return {}

    async def prepare(self, prompt):
        raise NotImplementedError

    def text(self, body):
        if not body.endswith(b"end\n"):
            raise IncompleteReply("no end")
        return "".join(line.removeprefix("text: ") for line in body.decode().split("\n")[:-2])


def reply_of(*pieces, client=0, began=1_000, error=""):
    """A reply whose pieces came at the times given: (nanoseconds, bytes)."""
    marks, body = [], b""
    for at, piece in pieces:
        body += piece
        marks.append((at, len(body)))
    return Reply(client, began, marks[-1][0] if marks else began, marks, body, error)


@pytest.fixture
def plain():
    return PlainTarget()
