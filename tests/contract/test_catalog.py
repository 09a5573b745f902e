"""Entries in a real Redis: what is published is listed, and nothing that Redis holds is believed unseen."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import redis
from artifact_samples import sample
from renewal import RENEWED_S, wait_for_renewal

from xkv_artifacts.catalog import ENTRY_KEY, LEASE_KEY, RATES_KEY, RECENCY_KEY, Catalog
from xkv_artifacts.entry import Entry, spec_digest, spec_text
from xkv_artifacts.errors import CatalogError
from xkv_artifacts.keys import token_bytes


def publish(catalog: Catalog, length: int = 100, *, last_used: float = 5.0) -> Entry:
    manifest, _ = sample(range(length))
    entry = Entry.of_manifest(manifest, size=1000 * length, last_used=last_used)
    catalog.publish(entry, token_bytes(range(length)))
    return entry


def test_an_entry_comes_back_as_it_was(catalog: Catalog) -> None:
    entry = publish(catalog)
    assert catalog.get(entry.id) == entry
    assert catalog.entries() == [entry]
    assert catalog.get("0" * 64) is None
    assert (entry.ratio, entry.fidelity, entry.document) == (4.096, 0.75, "corpus/lisbon.txt")


def test_publishing_again_replaces_and_keeps_the_last_use(catalog: Catalog) -> None:
    publish(catalog, last_used=9.0)
    again = publish(catalog, last_used=5.0)
    assert catalog.entries() == [again.model_copy(update={"last_used": 9.0})]


def test_entries_are_listed_by_last_use(catalog: Catalog) -> None:
    entries = [publish(catalog, length, last_used=float(length)) for length in (3, 1, 2)]
    assert [entry.tokens for entry in catalog.entries()] == [3, 2, 1]
    catalog.touch(entries[1].id)
    assert [entry.tokens for entry in catalog.entries()] == [1, 3, 2]
    catalog.touch("0" * 64)
    assert len(catalog.ids()) == 3


def test_dropped_and_cleared_entries_are_gone(catalog: Catalog) -> None:
    first, second = publish(catalog, 1), publish(catalog, 2)
    assert catalog.drop(first.id) and not catalog.drop(first.id)
    assert catalog.entries() == [second]
    assert catalog.set_built(catalog.begin_listing()) and catalog.is_built()
    catalog.remember_rate("f", "cpu", 3.0)
    catalog.clear()
    assert (catalog.entries(), catalog.is_built(), catalog.rate("f", "cpu")) == ([], False, 3.0)


def test_a_thousand_entries(catalog: Catalog) -> None:
    entry = publish(catalog)
    for number in range(1199):
        catalog.publish(entry.model_copy(update={"id": f"{number:064x}"}), token_bytes([number]))
    assert len(catalog.entries()) == 1200


Spoil = Callable[[Any, str], object]
HASH_FIELDS: dict[str, Spoil] = {
    "missing field": lambda r, key: r.hdel(key, "tokens"),
    "word for a number": lambda r, key: r.hset(key, "bytes", "many"),
    "negative size": lambda r, key: r.hset(key, "bytes", "-1"),
    "NaN": lambda r, key: r.hset(key, "fidelity", "nan"),
    "infinity": lambda r, key: r.hset(key, "ratio", "inf"),
    "fidelity of two": lambda r, key: r.hset(key, "fidelity", "2"),
    "unknown state": lambda r, key: r.hset(key, "state", "half"),
    "not text": lambda r, key: r.hset(key, "document", b"\xff\xfe"),
    "field name that is not text": lambda r, key: r.hset(key, b"\xff", "x"),
    "endless name": lambda r, key: r.hset(key, "model", "x" * 100_000),
    "fingerprint with a path": lambda r, key: r.hset(key, "fingerprint", "../../x"),
    "string for a hash": lambda r, key: (r.delete(key), r.set(key, "x")),
    "list for a hash": lambda r, key: (r.delete(key), r.rpush(key, "x")),
    "entry that is gone": lambda r, key: r.delete(key),
}


@pytest.mark.parametrize("spoil", HASH_FIELDS)
def test_a_damaged_entry_is_named_and_the_others_listed(catalog: Catalog, spoil: str) -> None:
    bad, good = publish(catalog, 1), publish(catalog, 2)
    key = ENTRY_KEY.format(store=catalog.store_id, id=bad.id)
    catalog.link.call(lambda client: HASH_FIELDS[spoil](client, key))
    faults: list[CatalogError] = []
    assert catalog.entries(faults.append) == [good]
    assert len(faults) == 1 and bad.id in faults[0].message and "rebuild" in faults[0].hint
    with pytest.raises(CatalogError, match=bad.id):
        catalog.get(bad.id)
    assert publish(catalog, 1) == catalog.get(bad.id)  # publishing mends it


def test_strange_ids_are_reported(catalog: Catalog) -> None:
    key = RECENCY_KEY.format(store=catalog.store_id)
    catalog.link.call(lambda client: client.zadd(key, {"../../etc/passwd": 1, b"\xff": 2, "x:*": 3}))
    faults: list[CatalogError] = []
    assert catalog.entries(faults.append) == []
    assert len(faults) == 3


def test_a_wrong_type_where_the_index_should_be_is_one_clear_error(catalog: Catalog) -> None:
    entry = publish(catalog)

    def spoil(client: redis.Redis) -> None:
        for key in client.scan_iter(match=f"xkv:1:{catalog.store_id}:*"):
            client.delete(key)
            client.set(key, "x")

    catalog.link.call(spoil)
    for action in (
        lambda: catalog.candidates(entry.fingerprint, "default", token_bytes(range(9))),
        lambda: catalog.entries(),
        lambda: publish(catalog),
    ):
        with pytest.raises(CatalogError) as caught:
            action()
        assert "xkv index rebuild" in caught.value.hint
    catalog.clear()
    assert publish(catalog) == entry


def test_members_that_are_no_ids_do_not_stop_a_lookup(catalog: Catalog) -> None:
    entry = publish(catalog)

    def spoil(client: redis.Redis) -> None:
        for key in client.scan_iter(match=f"xkv:1:{catalog.store_id}:prefixes:*"):
            client.zadd(key, {"": 0, "x": 0, b"\xff" * 40: 0})

    catalog.link.call(spoil)
    assert catalog.candidates(entry.fingerprint, "default", token_bytes(range(100))) == [entry.id]


def test_rates_are_remembered_by_model_and_device(catalog: Catalog) -> None:
    catalog.remember_rate("f", "cpu", 1234.5)
    assert (catalog.rate("f", "cpu"), catalog.rate("f", "cuda"), catalog.rate("g", "cpu")) == (
        1234.5,
        None,
        None,
    )
    key = RATES_KEY.format(store=catalog.store_id)
    for junk in ("x", "nan", "-1", "inf", b"\xff"):
        catalog.link.call(partial(redis.Redis.hset, name=key, key="f cpu", value=junk))
        assert catalog.rate("f", "cpu") is None


def test_a_lease_has_one_owner(catalog: Catalog) -> None:
    lease = catalog.lease("a" * 64, "one")
    assert lease is not None and catalog.lease_owner("a" * 64) == "one"
    assert catalog.lease("a" * 64, "two") is None
    assert catalog.lease("a" * 64, "one") is not None  # asking again after a lost answer
    assert catalog.lease("b" * 64, "two") is not None
    assert lease.release() and not lease.release()
    assert catalog.lease("a" * 64, "two") is not None
    assert not lease.renew() and not lease.release()
    assert catalog.lease_owner("a" * 64) == "two"


def test_a_lease_is_renewed_while_its_block_runs_and_free_after_it(catalog: Catalog) -> None:
    lease = catalog.lease("a" * 64, "one", ttl_s=RENEWED_S)
    assert lease is not None
    with lease:
        for _ in range(2):
            wait_for_renewal(lambda: catalog.link.call(lambda client: client.pttl(lease.key)))
            assert catalog.lease("a" * 64, "two") is None
        assert not lease.lost
    assert catalog.lease_owner("a" * 64) is None


def test_a_dead_owners_lease_runs_out(catalog: Catalog) -> None:
    assert catalog.lease("a" * 64, "dead", ttl_s=0.2) is not None
    time.sleep(0.3)
    assert catalog.lease("a" * 64, "next", ttl_s=0.2) is not None


def test_a_lease_that_was_taken_over_says_so(catalog: Catalog) -> None:
    lease = catalog.lease("a" * 64, "one", ttl_s=0.2)
    assert lease is not None
    key = LEASE_KEY.format(store=catalog.store_id, id="a" * 64)
    with lease:
        catalog.link.call(lambda client: client.set(key, "two"))
        deadline = time.monotonic() + 60
        while not lease.lost:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert catalog.lease_owner("a" * 64) == "two"


def test_specs_are_kept_once_and_bounded(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xkv_artifacts.catalog.MOST_SPECS", 2)
    catalog.keep_spec({"ratio": "8" * 5000})
    for ratio in (8.0, 8.0, 20.0, 32.0):
        catalog.keep_spec({"ratio": ratio})
    kept = catalog.link.call(lambda client: client.hgetall(f"xkv:1:{catalog.store_id}:specs"))
    assert kept == {
        spec_digest({"ratio": ratio}).encode(): spec_text({"ratio": ratio}).encode() for ratio in (8.0, 20.0)
    }
