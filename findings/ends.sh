#!/bin/bash
# orjson reads JSON that it cannot write again: nested 255 to 1024 deep it reads a document and refuses to write it,
# and an integer of 2^64 or more it reads, without a word, as a float that is another number, while it refuses to
# write such an integer. Reading what a model wrote and writing it on therefore loses numbers, or fails.
#
# Seen with orjson 3.13.0 on CPython 3.11.7, Linux x86_64. msgspec 0.23.0's `Raw` keeps a part's text as it is.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet orjson==3.13.0 msgspec==0.23.0
"$work/venv/bin/python" - <<'PY'
import msgspec
import orjson


def nested(levels):
    return "[" * levels + "]" * levels


def refused(value):
    try:
        orjson.dumps(value)
    except TypeError as error:
        return str(error)
    return ""


print("written again, 254 deep:", orjson.dumps(orjson.loads(nested(254))).decode() == nested(254))
assert not refused(orjson.loads(nested(254)))
for levels in (255, 1024):
    why = refused(orjson.loads(nested(levels)))
    print(f"read, and not written again, {levels} deep:", why)
    assert why == "Recursion limit reached"

most, more = 2**64 - 1, 2**64 + 1
print("2^64-1 is read as", repr(orjson.loads(str(most))), "and 2^64+1 as", repr(orjson.loads(str(more))))
assert orjson.loads(str(most)) == most
assert type(orjson.loads(str(more))) is float
assert int(orjson.loads(str(more))) != more
print("2^64+1 is not written:", refused(more))
assert refused(more) == "Integer exceeds 64-bit range"

raw = msgspec.json.decode(f'{{"n": {more} }}', type=dict[str, msgspec.Raw])["n"]
print("msgspec.Raw keeps it:", bytes(raw).decode())
assert bytes(raw).decode() == str(more)
PY
echo "as expected"
