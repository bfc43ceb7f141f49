"""A streamed reply's bytes as events: the lines of the SSE standard, and what servers send in their place."""

from __future__ import annotations

from services.agent.model.chunks import NOT_JSON, TEMPLATE_TRIES, ChunkReader
from services.agent.model.errors import ModelError, ModelProtocolError
from services.agent.model.faults import error_of_body
from services.agent.model.port import ModelEvent
from services.agent.model.profiles import TOLERANT, Profile

__all__ = ["MAX_LINE", "TEMPLATE_TRIES", "StreamParser"]

# One SSE line may not grow without end: a backend that never sends a newline is broken.
MAX_LINE = 4 * 1024 * 1024
_BOM = b"\xef\xbb\xbf"
_DONE = b"[DONE]"


class StreamParser(ChunkReader):
    """Turns the bytes of one streamed reply into events, batch by batch; see `ChunkReader`.

    A data line that is JSON by itself is taken at once; one that is not waits for the event's end and is
    joined to the others.

    Args:
        profile: what the server wants to have back is kept.
    """

    def __init__(self, profile: Profile = TOLERANT) -> None:
        super().__init__(profile)
        self._rest = b""
        self._closing = False
        self._open = False
        self._event = b""
        self._pending: list[bytes] = []
        self._bare: list[bytes] = []
        self.done = False
        self.failed: ModelError | None = None

    def feed(self, data: bytes) -> list[ModelEvent]:
        """Parse what arrived.

        Args:
            data: body bytes, cut anywhere.

        Returns:
            The events; where an error came after some, it is in `failed`.

        Raises:
            ModelError: the backend reported an error, or the bytes are not the protocol.
        """
        if self._rest:
            data = self._rest + data
        end = data.rfind(b"\n") + 1
        if not end and b"\r" in data[:-1]:  # lines may end with that alone
            # The newline after a last one may come.
            data, held = (data[:-1], data[-1:]) if data.endswith(b"\r") else (data, b"")
            data = data.replace(b"\r", b"\n")
            end = data.rfind(b"\n") + 1
            self._rest = data[end:] + held
        else:
            self._rest = data[end:]
        if len(self._rest) > MAX_LINE:
            raise ModelProtocolError("the model's stream has a line without end")
        out: list[ModelEvent] = []
        if not end:
            return out
        try:
            for line in data[: end - 1].split(b"\n"):
                if not line:
                    if self._open:
                        self._end_event(out)
                elif line.startswith(b"data:"):
                    payload = line[5:].strip()
                    if payload and not self._plain(payload):
                        self._data(payload, out)
                else:
                    self._field(line, out)
        except ModelError as error:
            self._flush(out)
            if not out:
                raise
            self.failed = error  # what was said before it is not lost
            return out
        self._flush(out)
        return out

    def close(self) -> list[ModelEvent]:
        """Parse what is left at the stream's end: a last line may lack its newline.

        Raises:
            ModelError: as `feed`.
        """
        self._closing = True
        self._rest = self._rest.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        out = self.feed(b"\n\n")
        if self._bare and not self._finish:
            raise ModelProtocolError("the model's answer is not a stream of events")
        if self._halves:
            self._last_halves(out)
        return out

    def _data(self, payload: bytes, out: list[ModelEvent]) -> None:
        """Take the data line of an event."""
        if payload == _DONE:
            self.done = True
        elif self._pending:
            self._wait(payload)
        elif self._event == b"error":
            self._fail(payload)
        elif not self._chunk(payload, out):
            if b"\r" in payload:  # more than one line, of those that end so
                self._field(b"data:" + payload, out)
            elif payload.startswith((b"{", b"[")):
                self._wait(payload)  # else it is a sign of life, and not JSON

    def _wait(self, payload: bytes) -> None:
        self._open = True
        self._pending.append(payload)
        if sum(len(one) for one in self._pending[-64:]) > MAX_LINE or len(self._pending) > MAX_LINE // 64:
            raise ModelProtocolError("the model's stream has an event without end")

    def _end_event(self, out: list[ModelEvent]) -> None:
        """Take the data lines of an event that is over, if they are no JSON one by one."""
        event, lines = self._event, self._pending
        self._open, self._event, self._pending = False, b"", []
        if not lines:
            return
        payload = b"\n".join(lines)
        if event == b"error":
            self._fail(payload)
        elif not self._chunk(payload, out) and not (self._finish or self._closing):
            raise ModelProtocolError("the model's stream is not the protocol's JSON")

    def _field(self, line: bytes, out: list[ModelEvent]) -> None:
        """Take a line of another kind, or one that other lines hid."""
        if line == b"\r":  # CR and LF: a blank line
            if self._open:
                self._end_event(out)
            return
        line = line.removesuffix(b"\r").removeprefix(_BOM)
        if b"\r" in line:
            for one in line.split(b"\r"):
                self._field(one or b"\r", out)
            return
        if line.startswith(b"data:"):
            self._data(line[5:].strip(), out)
            return
        if self._bare or line.startswith((b"{", b"[")):
            # JSON that is no event: an error, lines of JSON, or a whole reply that is not streamed.
            self._bare.append(line)
            if (len(self._bare) == 1 or line.startswith((b"}", b"]"))) and self._chunk(
                b"\n".join(self._bare), out
            ):
                self._bare = []
            elif sum(len(one) for one in self._bare[-64:]) > MAX_LINE or len(self._bare) > MAX_LINE // 64:
                raise ModelProtocolError("the model's answer is not a stream of events")
            return
        name, _, value = line.partition(b":")
        if name == b"event":
            self._event, self._open = value.strip(), True
        elif name == b"error":  # llama.cpp's way to fail in mid-stream
            self._fail(value.strip())
        elif line.startswith(b"<"):
            raise ModelProtocolError("the model's answer is not a stream of events")

    def _fail(self, payload: bytes) -> None:
        """Fail as the server says, unless the reply is whole already."""
        if self._finish or self.done:
            return
        body = self._loads(payload)
        raise error_of_body(payload.decode("utf-8", "replace") if body is NOT_JSON else body)
