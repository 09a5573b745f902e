"""What other models have of a prompt that this one has nothing of: said, for one round trip at most."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from artifact_samples import FINGERPRINT, SPEC, sample
from redis_server import RedisServer

from xkv_artifacts.blobs import blob_name
from xkv_artifacts.catalog import Catalog
from xkv_artifacts.keys import token_bytes
from xkv_artifacts.limits import Limits
from xkv_artifacts.namespace_index import MODELS_KEY
from xkv_artifacts.prefix_index import MODEL_BLOCKS, MOST_MODELS, member
from xkv_artifacts.prefix_search import PREFIXES_KEY
from xkv_artifacts.redis_link import RedisLink
from xkv_artifacts.store import ArtifactStore, Match

OTHER = "b" * 64
PROMPT = [*range(200)]


@pytest.fixture
def store(tmp_path: Path, redis_server: RedisServer) -> Iterator[ArtifactStore]:
    with ArtifactStore.open(str(tmp_path / "store"), redis_server.url) as opened:
        yield opened


@pytest.fixture
def trips(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One for each round trip to Redis."""
    made: list[int] = []
    send = RedisLink.call

    def count(link: RedisLink, *args: Any, **options: Any) -> Any:
        made.append(1)
        return send(link, *args, **options)

    monkeypatch.setattr(RedisLink, "call", count)
    return made


def publish(
    store: ArtifactStore, tokens: list[int], fingerprint: str = OTHER, namespace: str = "n", **spec: Any
) -> str:
    made = sample(tokens, fingerprint=fingerprint, namespace=namespace, spec={**SPEC, **spec})
    return store.publish(*made).id


def asked(
    store: ArtifactStore, prompt: list[int], *namespaces: str, fingerprint: str = FINGERPRINT
) -> Match | None:
    """What other models have, after a lookup that finds nothing."""
    names = namespaces or ("n",)
    for name in names:
        store.lookup(fingerprint, name, prompt)
    return store.lookup_other_models(fingerprint, names, prompt)


def models(store: ArtifactStore, namespace: str = "n") -> dict[bytes, float]:
    key = MODELS_KEY.format(store=store.catalog.store_id, namespace=namespace)
    found: Any = store.catalog.link.call(lambda client: client.zrange(key, 0, -1, withscores=True))
    return dict(found)


@pytest.mark.parametrize("length", [64, 100, 128, 200, 500])
def test_what_another_model_has_of_a_prompt_is_found(store: ArtifactStore, length: int) -> None:
    theirs = publish(store, [*range(length)])
    assert store.lookup(FINGERPRINT, "n", PROMPT) is None
    found = store.lookup_other_models(FINGERPRINT, ["n"], PROMPT)
    assert found == Match(theirs, min(length, 200)) and found.manifest == store.manifest(theirs)
    assert asked(store, PROMPT, fingerprint="c" * 64) == Match(theirs, min(length, 200))
    assert store.lookup(OTHER, "n", PROMPT) == Match(theirs, min(length, 200))


def test_it_is_one_round_trip_more_and_none_where_there_is_nothing_to_ask_for(
    store: ArtifactStore, trips: list[int]
) -> None:
    own = publish(store, [7, *range(100)], FINGERPRINT)
    for expected in (0, 1):
        asked(store, PROMPT)
        trips.clear()
        assert store.lookup(FINGERPRINT, "n", PROMPT) is None
        assert len(trips) == 1
        found = store.lookup_other_models(FINGERPRINT, ["n"], PROMPT)
        assert (found is not None, len(trips) - 1) == (bool(expected), expected)
        publish(store, PROMPT)
    trips.clear()
    assert store.lookup(FINGERPRINT, "n", [7, *range(100)]) == Match(own, 101)
    assert len(trips) == 1
    assert store.lookup_other_models(FINGERPRINT, ["n"], [*range(60)]) is None  # less than a block
    assert len(trips) == 1


@pytest.mark.parametrize(("shared", "told"), [(10, False), (63, False), (64, True), (100, True)])
def test_a_few_tokens_are_not_the_same_prefix(store: ArtifactStore, shared: int, told: bool) -> None:
    theirs = publish(store, [*range(shared), *range(1000, 1200)])
    assert asked(store, PROMPT) == (Match(theirs, shared) if told else None)


def test_the_model_that_shares_most_counts(store: ArtifactStore) -> None:
    publish(store, [*range(100), 7], "1" * 64)
    most = publish(store, [*range(180), 7], "2" * 64)
    for other in range(3):
        publish(store, [*range(90), other], "3" * 64)
    assert asked(store, PROMPT) == Match(most, 180)
    assert asked(store, [*range(100), *[9] * 100]) is not None


@pytest.mark.parametrize("specs", [1, 20])
def test_an_artifact_that_ends_in_the_next_block_is_found_beside_others(
    store: ArtifactStore, specs: int
) -> None:
    for other in (1, 2**31 - 1):
        for ratio in range(specs):
            publish(store, [*range(64), *[other] * 100], ratio=ratio + 1)
    theirs = publish(store, [*range(100)])
    assert asked(store, PROMPT) == Match(theirs, 100)


def test_of_a_long_prompt_the_beginning_is_looked_for(store: ArtifactStore) -> None:
    limit = 64 * MODEL_BLOCKS
    theirs = publish(store, [*range(limit + 500)])
    for more in (0, 1, 63, 64, 700, 20_000):
        prompt = [*range(limit), *range(limit, limit + more)]
        assert asked(store, prompt) == Match(theirs, min(limit + more, limit + 500))


def test_other_namespaces_are_not_asked(store: ArtifactStore, trips: list[int]) -> None:
    publish(store, PROMPT, namespace="theirs")
    assert asked(store, PROMPT, "n", "public") is None
    assert len(trips) > 0
    trips.clear()
    assert asked(store, PROMPT, "n", "public") is None
    assert len(trips) == 2  # the two lookups alone
    public = publish(store, PROMPT, namespace="public")
    assert asked(store, PROMPT, "n", "public") == Match(public, 200)


def test_models_are_counted_and_go_with_their_last_artifact(
    store: ArtifactStore, redis_server: RedisServer, trips: list[int]
) -> None:
    first, second = publish(store, PROMPT), publish(store, [*range(300)])
    publish(store, PROMPT)  # again
    publish(store, [5] * 70, FINGERPRINT)
    assert models(store) == {OTHER.encode(): 2.0, FINGERPRINT.encode(): 1.0}
    with ArtifactStore.open(store.blobs.url, redis_server.url) as reader:
        assert asked(reader, PROMPT) is not None
        store.remove(second)
        assert asked(reader, PROMPT) == Match(first, 200)
        store.remove(first)
        assert models(store) == {FINGERPRINT.encode(): 1.0}
        trips.clear()
        assert asked(reader, PROMPT) is None
        assert len(trips) == 1
        third = publish(store, PROMPT, ratio=4.0)
        assert asked(reader, PROMPT) == Match(third, 200)


def test_collected_ended_and_missing_artifacts_are_not_told(store: ArtifactStore) -> None:
    publish(store, PROMPT)
    assert store.collect(Limits(budget=0)).removed
    assert models(store) == {}
    publish(store, PROMPT, ratio=2.0)
    (entry,) = store.entries()
    store.set_ttl(entry.id, 0.001)
    assert asked(store, PROMPT) is None
    lost = publish(store, PROMPT, ratio=3.0)
    (Path(store.blobs.url) / blob_name(lost)).unlink()
    assert asked(store, PROMPT) is None


def test_a_damaged_blob_is_not_told(store: ArtifactStore) -> None:
    path = Path(store.blobs.url) / blob_name(publish(store, PROMPT))
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    assert asked(store, PROMPT) is None
    assert asked(store, PROMPT) is None and store.lookup(FINGERPRINT, "n", PROMPT) is None


def test_a_rebuilt_catalog_knows_the_models_again(store: ArtifactStore) -> None:
    theirs = publish(store, PROMPT)
    publish(store, PROMPT, namespace="public")
    store.catalog.clear()
    assert models(store) == {}
    assert store.rebuild().artifacts == 2
    assert models(store) == models(store, "public") == {OTHER.encode(): 1.0}
    assert asked(store, PROMPT) == Match(theirs, 200)


def test_a_catalog_made_before_models_were_counted_works(store: ArtifactStore) -> None:
    old, older = publish(store, PROMPT), publish(store, [*range(300)])
    key = MODELS_KEY.format(store=store.catalog.store_id, namespace="n")
    store.catalog.link.call(lambda client: client.delete(key))
    assert asked(store, PROMPT) is None
    assert store.lookup(OTHER, "n", PROMPT) is not None
    new = publish(store, PROMPT, ratio=2.0)
    assert asked(store, PROMPT) is not None
    assert store.remove(old) and store.remove(older)  # more than were counted
    assert models(store) == {}
    assert store.lookup(OTHER, "n", PROMPT) == Match(new, 200)
    store.rebuild()
    assert asked(store, PROMPT) == Match(new, 200)


@pytest.mark.parametrize(
    "junk", [b"", b"\xff" * 64, b"x" * 64, OTHER.upper().encode(), b"b" * 63, b"b" * 10_000]
)
def test_members_that_are_no_fingerprints_are_left_out(store: ArtifactStore, junk: bytes) -> None:
    theirs = publish(store, PROMPT)
    key = MODELS_KEY.format(store=store.catalog.store_id, namespace="n")
    store.catalog.link.call(lambda client: client.zadd(key, {junk: 1e300}))
    assert asked(store, PROMPT) == Match(theirs, 200)


def test_a_wrong_type_breaks_no_lookup_and_no_publishing(store: ArtifactStore) -> None:
    key = MODELS_KEY.format(store=store.catalog.store_id, namespace="n")
    store.catalog.link.call(lambda client: client.set(key, "junk"))
    theirs = publish(store, PROMPT)
    assert asked(store, PROMPT) is None
    assert store.lookup(OTHER, "n", PROMPT) == Match(theirs, 200)
    assert store.remove(theirs)
    publish(store, PROMPT)
    other_index = PREFIXES_KEY.format(store=store.catalog.store_id, fingerprint="c" * 64, namespace="n")

    def spoil(client: Any) -> None:
        client.delete(key)
        client.zadd(key, {OTHER: 1, "c" * 64: 2})
        client.set(other_index, "junk")

    store.catalog.link.call(spoil)
    assert asked(store, PROMPT) is not None


def test_the_index_proposes_and_the_blob_decides(store: ArtifactStore) -> None:
    liar, catalog = publish(store, [9] * 100), store.catalog
    place = member(OTHER, "n", token_bytes(PROMPT), liar)
    key = PREFIXES_KEY.format(store=catalog.store_id, fingerprint=OTHER, namespace="n")
    catalog.link.call(lambda client: client.zadd(key, {place: 0}))
    assert asked(store, PROMPT) is None
    foreign = publish(store, PROMPT, namespace="theirs")
    place = member(OTHER, "n", token_bytes(PROMPT), foreign)
    catalog.link.call(lambda client: client.zadd(key, {place: 0}))
    assert asked(store, PROMPT) is None


def test_a_redis_that_forgot_the_script_meanwhile_says_nothing(store: ArtifactStore) -> None:
    publish(store, PROMPT)
    assert store.lookup(FINGERPRINT, "n", PROMPT) is None
    store.catalog.link.call(lambda client: client.script_flush())
    assert store.lookup_other_models(FINGERPRINT, ["n"], PROMPT) is None
    assert asked(store, PROMPT) is not None


def test_however_many_models_there_are_few_are_asked(catalog: Catalog) -> None:
    key = MODELS_KEY.format(store=catalog.store_id, namespace="n")
    names = {f"{number:064x}": number for number in range(1, 50)}
    catalog.link.call(lambda client: client.zadd(key, names))
    assert catalog.candidates(FINGERPRINT, "n", token_bytes(PROMPT)) == []
    known = catalog.prefixes._others[FINGERPRINT, "n"]
    assert known == sorted(names, reverse=True)[:MOST_MODELS]
    catalog.clear()
    assert catalog.candidates(FINGERPRINT, "n", token_bytes(PROMPT)) == []
    assert catalog.prefixes._others == {}
