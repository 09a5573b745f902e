"""The budget holds whatever is asked, and what is in use stays."""

from __future__ import annotations

from random import Random

import pytest

from xkv_service.engine.residents import Residents


def _filled(budget: int = 100, **sizes: int) -> Residents:
    residents = Residents(budget)
    for key, nbytes in sizes.items():
        assert residents.put(key, key.upper(), nbytes)
    return residents


def test_the_least_recently_used_leaves() -> None:
    residents = _filled(a=40, b=40)
    assert residents.get("a") == "A"
    assert residents.put("c", "C", 30)
    assert list(residents.values) == ["a", "c"] and residents.evictions == 1
    assert residents.get("b") is None


def test_pinned_leave_for_pinned_alone_and_after_all_others(caplog: pytest.LogCaptureFixture) -> None:
    residents = _filled(a=30, b=30, c=30)
    residents.pin("a")
    residents.pin("b")
    residents.pin("d")
    assert not residents.put("e", "E", 50) and residents.attainable("e") == 40
    assert residents.put("e", "E", 40) and list(residents.values) == ["a", "b", "e"]
    assert residents.put("d", "D", 40) and list(residents.values) == ["a", "b", "d"]
    assert residents.pinned_evictions == 0 and not caplog.records
    residents.get("a")
    residents.pin("f")
    assert residents.attainable("f") == 100
    assert residents.put("f", "F", 20) and list(residents.values) == ["d", "a", "f"]
    assert (residents.evictions, residents.pinned_evictions) == (3, 1) and "b is pinned" in caplog.text
    residents.hold("d")
    assert not residents.put("f2", "F", 70) and not residents.reserve("f", 70)


def test_what_pinned_values_need_stays_with_them() -> None:
    residents = _filled(shared=30)
    residents.pin("a")
    assert residents.put("a", "A", 30, "shared")
    assert residents.attainable("b") == 40 and not residents.put("b", "B", 50)
    residents.pin("b")
    assert not residents.put("other", "O", 50)
    assert residents.put("other", "O", 50, owner="b")  # the bases that a pinned value is to share
    assert list(residents.values) == ["shared", "other"] and residents.pinned_evictions == 1


def test_held_and_pinned_stay_and_what_has_no_room_drives_nobody_out() -> None:
    residents = _filled(a=40, b=30, c=30)
    residents.hold("a")
    residents.pin("b")
    assert not residents.put("d", "D", 31)
    assert list(residents.values) == ["b", "c", "a"]
    residents.release("a")
    assert residents.put("d", "D", 30)
    assert list(residents.values) == ["b", "a", "d"]  # c was used before a was released
    residents.unpin("b")
    assert residents.put("e", "E", 90)


def test_a_pin_is_for_what_comes_too() -> None:
    residents = Residents(100)
    residents.pin("a")
    assert residents.put("a", "A", 60) and not residents.put("b", "B", 60)


def test_reservations_count_until_they_are_used_or_given_up() -> None:
    residents = _filled(a=40)
    assert residents.reserve("b", 50) and residents.reserved == 50
    assert residents.reserve("b", 60) and list(residents.values) == ["a"]
    assert not residents.reserve("c", 50)
    residents.cancel("b")
    assert residents.reserve("c", 50)
    assert residents.put("c", "C", 20) and residents.reserved == 0 and residents.nbytes == 60


def test_holds_count() -> None:
    residents = _filled(a=40)
    residents.hold("a")
    residents.hold("a")
    residents.release("a")
    assert residents.holds == {"a": 1}
    residents.release("a")
    for _ in range(2):
        with pytest.raises(KeyError):
            residents.release("a")
    with pytest.raises(KeyError):
        residents.hold("b")
    assert residents.holds == {}


def test_what_others_need_stays_as_long_as_they_do() -> None:
    residents = _filled(shared=30)
    assert residents.put("a", "A", 30, "shared") and residents.put("b", "B", 30, "shared")
    residents.get("a")
    assert residents.put("c", "C", 40)
    assert list(residents.values) == ["a", "shared", "c"] or "shared" in residents
    # Idle altogether: even what is needed leaves, with those that need it.
    assert residents.put("d", "D", 100)
    assert list(residents.values) == ["d"] and residents.holds == {}
    with pytest.raises(KeyError):
        residents.put("e", "E", 0, "shared")


@pytest.mark.parametrize("seed", range(5))
def test_never_above_the_budget(seed: int) -> None:
    random, residents, held = Random(seed), Residents(100), []
    for _ in range(2000):
        key = random.choice("abcdefgh")
        step = random.choice(["reserve", "put", "hold", "release", "pin", "unpin", "cancel"])
        if step == "reserve":
            residents.reserve(key, random.randrange(60))
        elif step == "put":
            residents.put(key, key, random.randrange(60))
        elif step == "hold" and key in residents:
            residents.hold(key)
            held.append(key)
        elif step == "release" and held:
            residents.release(held.pop(random.randrange(len(held))))
        elif step in ("pin", "unpin", "cancel"):
            getattr(residents, step)(key)
        assert residents.nbytes + residents.reserved <= 100
        assert all(key in residents for key in held)
