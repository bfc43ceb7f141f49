#!/usr/bin/env bash
# grpcio 1.85.1, an asyncio server: of a call whose message nobody asks for, megabytes are let in and kept all the same,
# 4 MiB at once and, on a fast connection, more by the second. The argument that is documented to bound this,
# grpc.http2.lookahead_bytes (64 KiB by default), does so only with grpc.http2.bdp_probe off, which is on by default.
#
# So a server that checks its caller before it reads, and leaves the call open meanwhile, holds that much for each.
#
# Seen, bytes of 16 MB that the server took of a call that it never reads, within 3 s, three times:
#   defaults                                   16000004, 16000004, 16000004 (all of it)
#   lookahead_bytes = 65536                    16000004, 8388608, 8388608
#   lookahead_bytes = 65536, bdp_probe = 0     65536, 65536, 65536
#
# Takes about half a minute. Ends with 1 if the first two are below 4 MiB or the third is not 65536 by now.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q grpcio==1.85.1
cat > "$folder/window.py" <<'PY'
import asyncio
import struct

import grpc
import grpc.aio

print("grpcio", grpc.__version__)


def frame(kind, flags, stream, payload=b""):
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def header(name, value):
    return b"\0" + bytes((len(name),)) + name.encode() + bytes((len(value),)) + value.encode()


async def taken(options):
    """Returns how many bytes of a message of 16 MB the server lets in while its handler reads nothing."""

    async def never_reads(requests, context):
        await asyncio.Event().wait()

    method = grpc.stream_unary_rpc_method_handler(never_reads)
    server = grpc.aio.server(options=options)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("a.B", {"C": method}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    fields = [(":method", "POST"), (":scheme", "http"), (":path", "/a.B/C"), (":authority", "x")]
    fields += [("content-type", "application/grpc"), ("te", "trailers")]
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0))
    writer.write(frame(1, 4, 1, b"".join(header(*field) for field in fields)))
    rooms = {0: 65_535, 1: 65_535}
    rest = b"\0" + struct.pack(">I", 16_000_000) + b"x" * 15_999_999
    sent, initial = 0, 65_535

    async def talk():
        nonlocal sent, rest, initial
        while True:
            while size := min(16_384, *rooms.values(), len(rest)):
                writer.write(frame(0, 0, 1, rest[:size]))
                rest, sent = rest[size:], sent + size
                rooms[0] -= size
                rooms[1] -= size
            head = await reader.readexactly(9)
            payload = await reader.readexactly(int.from_bytes(head[:3], "big"))
            kind, flags, stream = head[3], head[4], int.from_bytes(head[5:], "big")
            if kind == 4 and not flags & 1:
                for at in range(0, len(payload), 6):
                    name, value = struct.unpack(">HI", payload[at : at + 6])
                    if name == 4:
                        rooms[1] += value - initial
                        initial = value
                writer.write(frame(4, 1, 0))
            elif kind == 6 and not flags & 1:
                writer.write(frame(6, 1, 0, payload))
            elif kind == 8:
                rooms[stream] += int.from_bytes(payload, "big")

    try:
        await asyncio.wait_for(talk(), 3)
    except asyncio.TimeoutError:
        pass
    writer.close()
    await server.stop(0)
    return sent


async def main():
    lookahead = ("grpc.http2.lookahead_bytes", 65_536)
    cases = (
        ("defaults", (), lambda got: got >= 4_194_304),
        ("lookahead_bytes = 65536", (lookahead,), lambda got: got >= 4_194_304),
        ("lookahead_bytes = 65536, bdp_probe = 0", (lookahead, ("grpc.http2.bdp_probe", 0)), lambda got: got == 65_536),
    )
    same = True
    for name, options, as_seen in cases:
        got = await taken(options)
        same = same and as_seen(got)
        print(f"{name:42} {got}", "" if as_seen(got) else "unlike what was seen")
    raise SystemExit(0 if same else 1)


asyncio.run(main())
PY
"$folder/venv/bin/python" "$folder/window.py"
