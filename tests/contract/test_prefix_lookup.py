"""The longest stored prefix, found by Redis in one or two round trips, against looking at every artifact."""

from __future__ import annotations

import hashlib
import uuid
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xkv_artifacts import prefix_index
from xkv_artifacts.catalog import LONGEST_KEY, PREFIXES_KEY, Catalog
from xkv_artifacts.entry import Entry
from xkv_artifacts.keys import BLOCK_TOKENS, DIGEST_BYTES, token_bytes
from xkv_artifacts.prefix_index import FIRST_BLOCKS, MOST_SPECS, big_endian, common_tokens
from xkv_artifacts.redis_link import RedisLink

FINGERPRINT = "a" * 64


def publish(catalog: Catalog, tokens: list[int], *, namespace: str = "n", salt: int = 0) -> str:
    artifact_id = hashlib.sha256(f"{salt} {namespace} {tokens}".encode()).hexdigest()
    entry = Entry(
        id=artifact_id,
        blob="b",
        bytes=1,
        bytes_full=8,
        tokens=len(tokens),
        model="m",
        fingerprint=FINGERPRINT,
        namespace=namespace,
        document="d",
        document_sha256="d" * 64,
        fidelity=1,
        ratio=8,
        created=0,
        last_used=0,
    )
    catalog.publish(entry, token_bytes(tokens))
    return artifact_id


# Documents follow one stream up to a cut and then another one, or end there: so many share a prefix, part at
# any place in a block, and end before, in or after the block where others part.
cuts = st.one_of(st.sampled_from([0, 63, 64, 65, 127, 128, 129, 192]), st.integers(0, 200))
extras = st.one_of(st.just(0), st.sampled_from([1, 63, 64, 65, 128]), st.integers(0, 150))
documents = st.builds(
    lambda cut, other, extra: [*range(cut), *(other + position for position in range(extra))] or [other],
    cuts,
    st.sampled_from([1000, 2000, 2**31 - 200]),
    extras,
)


@pytest.fixture(params=[(prefix_index.SENT_BLOCKS, prefix_index.FIRST_BLOCKS), (0, 128), (1, 1), (0, 0)])
def few_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With how many blocks' tokens a prompt is sent, and how many are hashed at first: with few of either,
    a second and a third round trip are the rule."""
    monkeypatch.setattr(prefix_index, "SENT_BLOCKS", request.param[0])
    monkeypatch.setattr(prefix_index, "FIRST_BLOCKS", request.param[1])


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(documents, min_size=1, max_size=20), documents, st.integers(0, 2**32))
def test_lookup_is_as_good_as_looking_at_every_artifact(
    catalog: Catalog, few_blocks: None, stored: list[list[int]], prompt: list[int], salt: int
) -> None:
    catalog, writer = (Catalog(catalog.link, store) for store in [uuid.uuid4().hex] * 2)
    tokens_of = {}
    for tokens in stored:
        if not tokens_of or len(tokens_of) == len(stored) // 2:  # remembers how long they are so far
            catalog.candidates(FINGERPRINT, "n", token_bytes(prompt))
        tokens_of[publish(writer, tokens, salt=salt)] = tokens
    found = catalog.candidates(FINGERPRINT, "n", token_bytes(prompt))
    assert len(found) <= 4

    def common(artifact_id: str) -> int:
        return common_tokens(token_bytes(tokens_of[artifact_id]), token_bytes(prompt))

    best = max(map(common, tokens_of))
    got = max(map(common, found), default=0)
    assert best - (BLOCK_TOKENS - 1) <= got <= best
    whole = [common(i) for i, tokens in tokens_of.items() if tokens == prompt[: len(tokens)]]
    if whole and max(whole) == best:
        assert got == best
    catalog.clear()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(documents, min_size=1, max_size=20), documents, st.integers(0, 2**32))
def test_the_longest_artifact_that_a_prompt_contains_whole(
    catalog: Catalog, stored: list[list[int]], prompt: list[int], salt: int
) -> None:
    catalog = Catalog(catalog.link, uuid.uuid4().hex)
    tokens_of = {publish(catalog, tokens, salt=salt): tokens for tokens in stored}
    whole = {i: len(tokens) for i, tokens in tokens_of.items() if tokens == prompt[: len(tokens)]}
    longest = max(whole.values(), default=0)
    found = catalog.whole_candidates(FINGERPRINT, "n", token_bytes(prompt))
    assert set(found) == {i for i, length in whole.items() if length == longest}
    for one in found:
        catalog.drop(one)
    shorter = max((length for length in whole.values() if length < longest), default=0)
    left = catalog.whole_candidates(FINGERPRINT, "n", token_bytes(prompt))
    assert {whole[i] for i in left} == ({shorter} if shorter else set())
    catalog.clear()


def test_among_artifacts_of_every_length_the_longest_is_found(catalog: Catalog, few_blocks: None) -> None:
    length_of = {publish(catalog, list(range(length))): length for length in range(1, 200)}
    for asked in range(1, 250):
        for prompt in ([*range(asked)], [*range(asked), 7, 7, 7], [*range(asked), *[2**31 - 1] * 100]):
            found = catalog.candidates(FINGERPRINT, "n", token_bytes(prompt))
            assert max(min(length_of[i], asked) for i in found) == min(asked, 199)


@pytest.mark.parametrize("length", [30, 100, 128, 200])
def test_all_specs_of_the_same_tokens_are_candidates(catalog: Catalog, length: int) -> None:
    document = list(range(length))
    for other in (1, 2):
        publish(catalog, [*document[: length // 2], 2**31 - other])
    specs = {publish(catalog, document, salt=salt) for salt in range(MOST_SPECS)}
    for prompt in (document, [*document, 7, 7], [*document, *[2**31 - 1] * 100], document[:-1]):
        assert specs <= set(catalog.candidates(FINGERPRINT, "n", token_bytes(prompt)))


def test_however_many_specs_there_are_few_are_candidates(catalog: Catalog) -> None:
    specs = {publish(catalog, list(range(100)), salt=salt) for salt in range(5 * MOST_SPECS)}
    found = catalog.candidates(FINGERPRINT, "n", token_bytes(range(200)))
    assert len(found) == len(set(found)) <= 4 * MOST_SPECS and specs > set(found)


def test_entries_that_are_gone_hide_nothing(catalog: Catalog) -> None:
    base = list(range(200))
    good = publish(catalog, base[:150])
    for salt in range(20):
        catalog.drop(publish(catalog, base[: 140 + salt % 20], salt=salt + 1))
    assert catalog.candidates(FINGERPRINT, "n", token_bytes(base)) == [good]
    key = PREFIXES_KEY.format(store=catalog.store_id, fingerprint=FINGERPRINT, namespace="n")
    assert catalog.link.call(lambda client: client.zcard(key)) < 21


def test_namespaces_models_and_stores_do_not_see_each_other(catalog: Catalog) -> None:
    tokens = list(range(100))
    publish(catalog, tokens)
    prompt = token_bytes(tokens)
    assert catalog.candidates(FINGERPRINT, "n", prompt)
    assert not catalog.candidates(FINGERPRINT, "m", prompt)
    assert not catalog.candidates("b" * 64, "n", prompt)
    assert not Catalog(catalog.link, "0" * 32).candidates(FINGERPRINT, "n", prompt)


@pytest.mark.parametrize(("sent", "trips"), [(prefix_index.SENT_BLOCKS, 1), (0, 2)])
def test_how_many_round_trips_it_is(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch, sent: int, trips: int
) -> None:
    monkeypatch.setattr(prefix_index, "SENT_BLOCKS", sent)
    publish(catalog, [*range(100), *range(1000, 1200)])
    catalog.candidates(FINGERPRINT, "n", token_bytes(range(200)))  # Redis knows the script from here on
    calls = []
    send = RedisLink.call
    monkeypatch.setattr(RedisLink, "call", lambda *args, **kw: calls.append(1) or send(*args, **kw))  # type: ignore[func-returns-value]
    before = catalog.link.call(lambda client: client.info("stats"))["total_commands_processed"]
    calls.clear()
    assert catalog.candidates(FINGERPRINT, "n", token_bytes(range(200)))
    assert len(calls) == trips
    after = catalog.link.call(lambda client: client.info("stats"))["total_commands_processed"]
    assert after - before < 30  # the script's own commands, on the server


@pytest.fixture
def digests_sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many digests each question to Redis held."""
    counts: list[int] = []
    script = RedisLink.script

    def count(
        link: RedisLink, text: str, keys: list[str], arguments: list[str | bytes], **options: Any
    ) -> Any:
        if text == prefix_index.LOOKUP:
            counts.append(len(arguments[0]) // DIGEST_BYTES)
        return script(link, text, keys, arguments, **options)

    monkeypatch.setattr(RedisLink, "script", count)
    return counts


def longest_key(catalog: Catalog) -> str:
    return LONGEST_KEY.format(store=catalog.store_id, fingerprint=FINGERPRINT, namespace="n")


def test_only_as_much_of_a_prompt_is_asked_for_as_artifacts_can_share(
    catalog: Catalog, digests_sent: list[int]
) -> None:
    prompt = token_bytes(range(30_000))
    assert catalog.candidates(FINGERPRINT, "n", prompt) == []
    assert catalog.candidates(FINGERPRINT, "n", prompt) == []
    assert catalog.prefixes._longest == {}
    short = publish(catalog, list(range(150)))
    for _ in range(2):
        assert catalog.candidates(FINGERPRINT, "n", prompt) == [short]
    assert digests_sent == [FIRST_BLOCKS, FIRST_BLOCKS, FIRST_BLOCKS, 2]
    catalog.drop(short)
    assert catalog.candidates(FINGERPRINT, "n", prompt) == []
    assert digests_sent[4:] == [2]


def test_an_artifact_that_another_process_publishes_longer_is_found_at_once(
    catalog: Catalog, digests_sent: list[int]
) -> None:
    writer = Catalog(catalog.link, catalog.store_id)
    prompt = list(range(30_000))
    publish(writer, prompt[:150])
    catalog.candidates(FINGERPRINT, "n", token_bytes(prompt))
    for length in (191, 192, 1000, 20_000, 29_999, 30_000, 30_001):
        digests_sent.clear()
        longer = publish(writer, [*prompt, 7][:length])
        known = catalog.prefixes._longest[FINGERPRINT, "n"]
        assert longer in catalog.candidates(FINGERPRINT, "n", token_bytes(prompt))
        assert digests_sent == sorted({known, length // BLOCK_TOKENS})
    publish(writer, [5] * 40_000)
    digests_sent.clear()
    assert catalog.candidates(FINGERPRINT, "n", token_bytes([*prompt[:900], *[3] * 40_000]))
    assert len(digests_sent) == 2  # as nothing shares all that was asked for, only the tokens were not enough


def test_a_cleared_catalog_knows_no_longest_artifact(catalog: Catalog, digests_sent: list[int]) -> None:
    prompt = token_bytes(range(30_000))
    writer = Catalog(catalog.link, catalog.store_id)
    publish(writer, list(range(20_000)))
    catalog.candidates(FINGERPRINT, "n", prompt)
    writer.clear()
    assert catalog.link.call(lambda client: client.keys(f"xkv:1:{catalog.store_id}:*")) == []
    for length in (500, 25_000):
        longest = publish(writer, list(range(length)))
        assert catalog.candidates(FINGERPRINT, "n", prompt)[0] == longest
        assert catalog.prefixes._longest[FINGERPRINT, "n"] == length // BLOCK_TOKENS


def test_in_a_catalog_made_before_the_longest_was_noted_everything_is_found(catalog: Catalog) -> None:
    prompt = list(range(30_000))
    old = publish(catalog, prompt[:20_000])
    catalog.link.call(lambda client: client.delete(longest_key(catalog)))
    publish(catalog, prompt[:100])
    assert not catalog.link.call(lambda client: client.exists(longest_key(catalog)))
    for _ in range(2):
        assert old in catalog.candidates(FINGERPRINT, "n", token_bytes(prompt))


@pytest.mark.parametrize(
    "junk", [b"x", b"", b"nan", b"inf", b"-1", b"\xff", b"1e9", b"9" * 5000, "٣".encode()]
)
def test_a_longest_that_is_no_number_hides_nothing(catalog: Catalog, junk: bytes) -> None:
    prompt = list(range(30_000))
    long = publish(catalog, prompt[:20_000])
    catalog.link.call(lambda client: client.set(longest_key(catalog), junk))
    assert long in catalog.candidates(FINGERPRINT, "n", token_bytes(prompt))
    longer = publish(catalog, prompt[:25_000])
    assert longer in catalog.candidates(FINGERPRINT, "n", token_bytes(prompt))


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**31 - 1)), st.lists(st.integers(0, 2**31 - 1)), st.lists(st.integers(0, 9)))
def test_common_tokens(start: list[int], left: list[int], right: list[int]) -> None:
    a, b = start + left, start + right
    expected = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert common_tokens(token_bytes(a), token_bytes(b)) == expected


def test_token_order_is_byte_order() -> None:
    tokens = [0, 1, 255, 256, 65536, 2**31 - 1]
    raw = [big_endian(token_bytes([token])) for token in tokens]
    assert raw == sorted(raw)
