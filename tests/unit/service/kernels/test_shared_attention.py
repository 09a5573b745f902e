"""Attention of many sessions over documents whose keys and values are there, against softmax in float32."""

from __future__ import annotations

from dataclasses import replace

import kernel_samples as samples
import pytest
import torch

from xkv_service.decoding.rebuilt_prefix import States
from xkv_service.kernels import cudnn_attention, shared_attention
from xkv_service.kernels.decode_plainly import parts_plainly, shared_attention_plainly
from xkv_service.kernels.shared_attention import Document, Shape, SharedAttention, SharedGroups

# bfloat16 rounds the weights to 8 bits: 2^-9 of each.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3}
HEADS, GROUP, DIM = samples.SMALL.kv_heads, samples.SMALL.group, samples.SMALL.dim
SCALING = 0.2


def document(
    room: int, dtype: torch.dtype, device: torch.device, tokens: int | None = None, number: int = 0
) -> Document:
    """The first tokens of one with two layers."""
    made = torch.randn(2, 2, HEADS, room, DIM, device=device).to(dtype)
    layers = {layer: States(made[layer, 0].contiguous(), made[layer, 1].contiguous()) for layer in range(2)}
    return Document(number, layers, room if tokens is None else tokens)


def attention(shape: Shape, dtype: torch.dtype, device: torch.device, group: int = GROUP) -> SharedAttention:
    return SharedAttention(shape, HEADS, group, DIM, DIM, dtype, device, tile=32, warps=4, stages=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [4, 3])
def test_each_session_attends_to_its_document(dtype: torch.dtype, group: int, device: torch.device) -> None:
    """Documents of any length, sessions in any order, of one document in two groups; some have none."""
    torch.manual_seed(0)
    tokens, owners = [70, 1, 333], [0, 2, None, 1, 0, 0, 2, 0, 0, None]
    documents = [document(size, dtype, device) for size in tokens]
    sessions = [[place for place, owner in enumerate(owners) if owner == one] for one in range(3)]
    shape = Shape(8, 4)
    groups, kernel = SharedGroups(shape, device), attention(shape, dtype, device, group)
    groups.overwrite(list(zip(documents, sessions, strict=True)))
    query = torch.randn(len(owners), HEADS * group, DIM, device=device).to(dtype)
    rest = torch.randn(len(owners), HEADS * group, DIM, device=device)
    log = torch.randn(len(owners), HEADS * group, device=device)
    log[3] = -3e38  # a session that has seen nothing else
    for layer in range(2):
        found, found_log = rest.clone(), log.clone()
        kernel(query, groups, layer, found, found_log, SCALING)
        for place, owner in enumerate(owners):
            if owner is None:
                assert torch.equal(found[place], rest[place]) and torch.equal(found_log[place], log[place])
                continue
            own = documents[owner].layers[layer]
            expected, logs = shared_attention_plainly(
                query[place], own.keys, own.values, rest[place], log[place], SCALING
            )
            assert samples.relative(found[place], expected) < TOLERANCE[dtype]
            assert (found_log[place] - logs).abs().max() < 1e-3


def test_groups_are_overwritten(device: torch.device) -> None:
    """Other documents, fewer groups, and only the first tokens of a document."""
    torch.manual_seed(1)
    shape, dtype = Shape(4, 4), torch.float32
    groups, kernel = SharedGroups(shape, device), attention(shape, dtype, device)
    one, other = document(50, dtype, device), document(90, dtype, device)
    groups.overwrite([(one, [0, 1]), (other, [2])])
    groups.overwrite([(replace(other, tokens=61), [1])])
    query = torch.randn(3, HEADS * GROUP, DIM, device=device)
    rest, log = (
        torch.zeros(3, HEADS * GROUP, DIM, device=device),
        torch.zeros(3, HEADS * GROUP, device=device),
    )
    before = rest.clone(), log.clone()
    kernel(query, groups, 1, rest, log, SCALING)
    expected, logs = shared_attention_plainly(
        query[1],
        other.layers[1].keys[:, :61],
        other.layers[1].values[:, :61],
        before[0][1],
        before[1][1],
        SCALING,
    )
    assert samples.relative(rest[1], expected) < 1e-5 and (log[1] - logs).abs().max() < 1e-4
    assert torch.equal(rest[[0, 2]], before[0][[0, 2]]) and torch.equal(log[[0, 2]], before[1][[0, 2]])


def test_shapes_have_room_for_every_session(device: torch.device) -> None:
    """And no more rows than shared memory takes, however many query heads there are."""
    own = document(8, torch.float32, device)

    def shape(counts: list[int], group: int) -> Shape:
        return Shape.of([(own, count) for count in counts], group)

    assert shape([1], 4) == Shape(1, 4) and shape([3, 4, 2], 4) == Shape(4, 4)
    assert shape([5], 4) == Shape(1, 16) and shape([128, 3], 4) == Shape(8, 32)
    assert shape([128], 16) == Shape(16, 8) and shape([3], 200) == Shape(4, 1)


def test_what_kernels_cannot_read_is_refused(device: torch.device) -> None:
    groups, own = SharedGroups(Shape(1, 4), device), document(8, torch.float32, device)
    with pytest.raises(ValueError, match="2 groups of 4 sessions, and room for 1"):
        groups.overwrite([(own, range(5))])
    strided = Document(0, {0: States(own.layers[0].keys.transpose(1, 2), own.layers[0].values)}, 8)
    with pytest.raises(ValueError, match="contiguous"):
        groups.overwrite([(strided, [0])])
    with pytest.raises(ValueError, match="24 and 32"):
        SharedAttention(Shape(1, 4), 2, 4, 24, 32, torch.float32, device)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """cuDNN's place taken by PyTorch, of any document; notes how many tokens it read, in how many parts."""
    read: list[tuple[int, int]] = []

    def parts(
        rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float, count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        read.append((keys.shape[1], count))
        return parts_plainly(rows, keys, values, scaling, count)

    monkeypatch.setattr(shared_attention, "attend_by_parts", parts)
    monkeypatch.setattr(shared_attention, "cudnn_tokens", lambda _, tokens, count: tokens // count * count)
    return read


def test_a_library_reads_most_of_long_documents(library: list[tuple[int, int]], device: torch.device) -> None:
    """All of one, and of another what makes equal parts; nothing of one whose sessions are one group."""
    torch.manual_seed(3)
    tokens, count = [128, 50, 333], 2 + 80
    sessions = [list(range(2, 42)), [1, 0], list(range(81, 43, -1))]
    documents = [
        document(size + 7, torch.float32, device, size, number) for number, size in enumerate(tokens)
    ]
    shape = Shape.of([(one, len(of)) for one, of in zip(documents, sessions, strict=True)], GROUP)
    assert shape.size == 32 and shape.kernel and [one.document for one in shape.fixed] == [0, 2]
    groups, kernel = SharedGroups(shape, device), attention(shape, torch.float32, device)
    groups.overwrite(list(zip(documents, sessions, strict=True)))
    query = torch.randn(count, HEADS * GROUP, DIM, device=device)
    rest, log = torch.randn_like(query), torch.randn(count, HEADS * GROUP, device=device)
    found, found_log = rest.clone(), log.clone()
    kernel(query, groups, 1, found, found_log, SCALING)
    assert library == [(128, 32), (320, 32)]  # of two heads and 256 rows
    for own, size, of in zip(documents, tokens, sessions, strict=True):
        keys, values = (one[:, :size] for one in (own.layers[1].keys, own.layers[1].values))
        for place in of:
            expected, logs = shared_attention_plainly(
                query[place], keys, values, rest[place], log[place], SCALING
            )
            assert samples.relative(found[place], expected) < 1e-5
            assert (found_log[place] - logs).abs().max() < 1e-4
    for place in (42, 43):
        assert torch.equal(found[place], rest[place]) and torch.equal(found_log[place], log[place])


def test_a_graph_is_of_the_documents_that_a_library_reads(
    library: list[tuple[int, int]], device: torch.device
) -> None:
    one, other = (document(64, torch.float32, device, number=number) for number in (1, 2))
    shape = Shape.of([(one, 33)], GROUP)
    assert not shape.kernel and shape != Shape.of([(other, 33)], GROUP)
    anyone = [Shape.of([(own, 33)], GROUP, any_document=True) for own in (one, other)]
    assert anyone[0] == anyone[1] == Shape(2, 32)
    groups = SharedGroups(shape, device)
    groups.overwrite([(one, range(33))])
    with pytest.raises(ValueError, match="other documents"):
        groups.overwrite([(other, range(33))])


def test_parts_are_as_many_as_fill_a_device() -> None:
    found = [cudnn_attention.cudnn_parts(*one) for one in ((8, 128), (8, 256), (8, 384), (8, 512), (64, 999))]
    assert found == [16, 8, 4, 4, 1]


@pytest.mark.parametrize(
    ("tokens", "dtype", "dim", "taken"),
    [
        (16_384 + 600, torch.bfloat16, 64, 16_384 + 512),
        (16_384 + 600, torch.float16, 128, 16_384 + 512),
        (8_191, torch.bfloat16, 64, 0),
        (8_192, torch.bfloat16, 64, 8_192),
        (16_384, torch.float32, 64, 0),
        (16_384, torch.bfloat16, 256, 0),
        (16_384, torch.bfloat16, 36, 0),
    ],
)
def test_documents_that_cudnn_takes(
    tokens: int, dtype: torch.dtype, dim: int, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long ones, in 16 bits, of heads that are no wider than 128: as many tokens as make 8 equal parts."""
    keys = torch.empty(1, 16_384 + 600, dim, dtype=dtype)
    monkeypatch.setattr(cudnn_attention, "cudnn_runs", lambda _: True)
    assert cudnn_attention.cudnn_tokens(States(keys, keys), tokens, 8) == taken
    monkeypatch.setattr(cudnn_attention, "cudnn_runs", lambda _: False)
    assert cudnn_attention.cudnn_tokens(States(keys, keys), tokens, 8) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tokens", [6001, 9001])
def test_the_shapes_of_a_large_model(tokens: int, device: torch.device) -> None:
    """As the engine runs it: whole tiles, eight warps, two groups of 32 sessions; long documents by cuDNN."""
    torch.manual_seed(2)
    heads, group, dim, sessions = 8, 4, 128, 40
    keys, values = torch.randn(2, heads, tokens, dim, device=device).bfloat16()
    own = Document(0, {0: States(keys, values)}, tokens)
    shape = Shape.of([(own, sessions)], group)
    assert bool(shape.fixed) is (tokens >= cudnn_attention.LEAST)
    groups = SharedGroups(shape, device)
    kernel = SharedAttention(shape, heads, group, dim, dim, torch.bfloat16, device)
    groups.overwrite([(own, range(sessions))])
    query = torch.randn(sessions, heads * group, dim, device=device).bfloat16()
    rest = torch.randn(sessions, heads * group, dim, device=device)
    log = torch.randn(sessions, heads * group, device=device)
    found, found_log = rest.clone(), log.clone()
    kernel(query, groups, 0, found, found_log, dim**-0.5)
    for place in (0, 31, 32, 39):
        expected, logs = shared_attention_plainly(
            query[place], keys, values, rest[place], log[place], dim**-0.5
        )
        assert samples.relative(found[place], expected) < TOLERANCE[torch.bfloat16]
        assert (found_log[place] - logs).abs().max() < 1e-3
