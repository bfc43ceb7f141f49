import itertools
import os
import threading
from uuid import UUID

import pytest

from meshkit import ids
from meshkit.clock import now_ms
from meshkit.ids import uuid7, uuid7_from_ms, uuid7_ms


def test_uuid7_has_version_variant_and_time() -> None:
    before = now_ms()
    made = uuid7()
    assert made.version == 7
    assert made.variant == "specified in RFC 4122"
    assert before <= uuid7_ms(made) <= now_ms()
    assert str(made) == str(made).lower()


def test_ids_of_one_process_strictly_grow() -> None:
    made = [uuid7() for _ in range(20_000)]
    assert all(a < b for a, b in itertools.pairwise(made))


def test_ids_grow_although_the_clock_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    now = now_ms() + 10_000
    monkeypatch.setattr(ids, "now_ms", lambda: now)
    first = uuid7()
    now -= 5_000
    second = uuid7()
    assert first < second
    assert uuid7_ms(second) == uuid7_ms(first)


def test_a_full_millisecond_overflows_into_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = ids._Generator()
    monkeypatch.setattr(ids, "now_ms", lambda: 1_000)
    first = generator.next()
    generator._random = ids._RANDOM_MASK
    second = generator.next()
    assert uuid7_ms(first) == 1_000
    assert uuid7_ms(second) == 1_001
    assert first < second


def test_threads_make_no_duplicates() -> None:
    made: list[UUID] = []
    lock = threading.Lock()

    def make() -> None:
        mine = [uuid7() for _ in range(2_000)]
        with lock:
            made.extend(mine)

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == len(made) == 8_000


def test_lower_bound_is_below_every_id_of_its_millisecond() -> None:
    made = uuid7()
    ms = uuid7_ms(made)
    assert uuid7_from_ms(ms) <= made < uuid7_from_ms(ms + 1)
    assert uuid7_from_ms(ms).version == 7
    assert uuid7_ms(uuid7_from_ms(ms)) == ms


@pytest.mark.parametrize("ms", [-1, 1 << 48])
def test_lower_bound_refuses_a_time_that_does_not_fit(ms: int) -> None:
    with pytest.raises(ValueError, match="holds 0 to"):
        uuid7_from_ms(ms)


def test_reading_the_time_of_another_version_is_refused() -> None:
    with pytest.raises(ValueError, match="not a UUIDv7"):
        uuid7_ms(UUID(bytes=os.urandom(16), version=4))


def test_a_forked_child_does_not_continue_the_parents_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = ids._Generator()
    monkeypatch.setattr(ids, "now_ms", lambda: 5_000)
    parent = generator.next()
    generator.forget()
    child = generator.next()
    assert abs(child.int - parent.int) > 1 << 33
