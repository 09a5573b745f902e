"""Attention of many sessions over documents whose keys and values are there, against softmax in float32."""

from __future__ import annotations

import kernel_samples as samples
import pytest
import torch

from xkv_service.decoding.rebuilt_prefix import States
from xkv_service.kernels.decode_plainly import shared_attention_plainly
from xkv_service.kernels.shared_attention import Shape, SharedAttention, SharedGroups

# bfloat16 rounds the weights to 8 bits: 2^-9 of each.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3}
HEADS, GROUP, DIM = samples.SMALL.kv_heads, samples.SMALL.group, samples.SMALL.dim
SCALING = 0.2


def states(tokens: int, dtype: torch.dtype, device: torch.device) -> dict[int, States]:
    """Of two layers."""
    made = torch.randn(2, 2, HEADS, tokens, DIM, device=device).to(dtype)
    return {layer: States(made[layer, 0].contiguous(), made[layer, 1].contiguous()) for layer in range(2)}


def attention(shape: Shape, dtype: torch.dtype, device: torch.device, group: int = GROUP) -> SharedAttention:
    return SharedAttention(shape, HEADS, group, DIM, DIM, dtype, device, tile=32, warps=4, stages=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [4, 3])
def test_each_session_attends_to_its_document(dtype: torch.dtype, group: int, device: torch.device) -> None:
    """Documents of any length, sessions in any order, of one document in two groups; some have none."""
    torch.manual_seed(0)
    tokens, owners = [70, 1, 333], [0, 2, None, 1, 0, 0, 2, 0, 0, None]
    documents = [states(size, dtype, device) for size in tokens]
    sessions = [[place for place, owner in enumerate(owners) if owner == one] for one in range(3)]
    shape = Shape(8, 4)
    groups, kernel = SharedGroups(shape, device), attention(shape, dtype, device, group)
    groups.overwrite(list(zip(documents, tokens, sessions, strict=True)))
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
            own = documents[owner][layer]
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
    one, other = states(50, dtype, device), states(90, dtype, device)
    groups.overwrite([(one, 50, [0, 1]), (other, 90, [2])])
    groups.overwrite([(other, 61, [1])])
    query = torch.randn(3, HEADS * GROUP, DIM, device=device)
    rest, log = (
        torch.zeros(3, HEADS * GROUP, DIM, device=device),
        torch.zeros(3, HEADS * GROUP, device=device),
    )
    before = rest.clone(), log.clone()
    kernel(query, groups, 1, rest, log, SCALING)
    expected, logs = shared_attention_plainly(
        query[1], other[1].keys[:, :61], other[1].values[:, :61], before[0][1], before[1][1], SCALING
    )
    assert samples.relative(rest[1], expected) < 1e-5 and (log[1] - logs).abs().max() < 1e-4
    assert torch.equal(rest[[0, 2]], before[0][[0, 2]]) and torch.equal(log[[0, 2]], before[1][[0, 2]])


def test_shapes_have_room_for_every_session() -> None:
    """And no more rows than shared memory takes, however many query heads there are."""
    assert Shape.of([1], 4) == Shape(1, 4) and Shape.of([3, 4, 2], 4) == Shape(4, 4)
    assert Shape.of([5], 4) == Shape(1, 16) and Shape.of([128, 3], 4) == Shape(8, 32)
    assert Shape.of([128], 16) == Shape(16, 8) and Shape.of([3], 200) == Shape(4, 1)


def test_what_kernels_cannot_read_is_refused(device: torch.device) -> None:
    groups, own = SharedGroups(Shape(1, 4), device), states(8, torch.float32, device)
    with pytest.raises(ValueError, match="2 groups of 4 sessions, and room for 1"):
        groups.overwrite([(own, 8, range(5))])
    strided = {0: States(own[0].keys.transpose(1, 2), own[0].values)}
    with pytest.raises(ValueError, match="contiguous"):
        groups.overwrite([(strided, 8, [0])])
    with pytest.raises(ValueError, match="24 and 32"):
        SharedAttention(Shape(1, 4), 2, 4, 24, 32, torch.float32, device)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_shapes_of_a_large_model(device: torch.device) -> None:
    """As the engine runs it: whole tiles, eight warps, two groups of 32 sessions."""
    torch.manual_seed(2)
    heads, group, dim, tokens, sessions = 8, 4, 128, 9001, 40
    keys, values = torch.randn(2, heads, tokens, dim, device=device).bfloat16()
    shape = Shape.of([sessions], group)
    groups = SharedGroups(shape, device)
    kernel = SharedAttention(shape, heads, group, dim, dim, torch.bfloat16, device)
    groups.overwrite([({0: States(keys, values)}, tokens, range(sessions))])
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
