"""Parts of artifacts: whole leading blocks, cut alike in memory and by name, and measured as they are."""

from __future__ import annotations

import pytest
import torch
from compressed import manifest_of, random_ids
from families import tiny_model
from measured import calibrated

from xkv_service import CompressionSpec, compress
from xkv_service.compression import compress_each, compress_prefill, factorize_prefill
from xkv_service.factors import PrefixFactors
from xkv_service.fidelity import certify, held_back
from xkv_service.leading_part import leading_part, leading_rank, part_manifest
from xkv_service.packed_factors import Runs
from xkv_service.prefilling.prefill import prefill
from xkv_service.stored import stored_tensors

WIDE = {"num_key_value_heads": 4, "head_dim": 32, "hidden_size": 128}
"""Groups of three layers have 384 features."""
SPEC = CompressionSpec(group_size=3, rank_k=256, rank_v=200)
TOKENS = 300


@pytest.mark.parametrize(
    ("runs", "share", "rank"),
    [
        (((8, 256),), 0.5, 128),
        (((8, 256),), 0.75, 192),
        (((8, 200),), 0.5, 128),
        (((8, 200),), 0.75, 192),
        (((8, 64),), 0.5, 64),
        (((8, 3), (4, 66), (2, 5)), 0.01, 3),
        (((8, 3), (4, 66), (2, 5)), 0.5, 67),
        (((8, 3), (4, 66), (2, 5)), 0.93, 69),
        (((8, 3), (4, 66), (2, 5)), 0.94, 74),
        ((), 0.5, 0),
    ],
)
def test_the_fewest_blocks_that_hold_the_share(runs: Runs, share: float, rank: int) -> None:
    assert leading_rank(runs, share) == rank


def _ways() -> list[tuple[str, PrefixFactors]]:
    model = tiny_model("llama", **WIDE)
    calibration = calibrated(model, size=3)
    named = CompressionSpec(ratio=1.5, calibration=calibration.id, factor_dtype="mixed", index="derived")
    latent = tiny_model("deepseek_v3", kv_lora_rank=96)
    return [
        ("integers", compress(model, random_ids(TOKENS), SPEC)),
        ("calibrated", compress(model, random_ids(TOKENS), named.over("calibrated"), calibration)),
        ("own bases", compress(model, random_ids(TOKENS), named.over("document"), calibration)),
        ("latent", compress(latent, random_ids(TOKENS), CompressionSpec(group_size=1, rank_k=90, rank_v=1))),
    ]


def test_a_part_is_the_leading_blocks_of_the_file() -> None:
    """What is cut in memory and what is left by name are the same tensors."""
    for way, factors in _ways():
        stored = factors.to_tensors()
        manifest = manifest_of(factors).model_copy(update={"tensors": dict.fromkeys(stored, "0" * 64)})
        part = leading_part(factors, 0.5)
        cut = part_manifest(manifest, factors.spec, 0.5)
        assert cut.groups == tuple(group.layout for group in part.groups), way
        mine = part.to_tensors()
        assert mine.keys() == cut.tensors.keys(), way
        table = stored_tensors(factors.spec, TOKENS, cut.groups)
        for name, tensor in mine.items():
            assert tuple(tensor.shape) == table[name].shape if name in table else True
            if name.endswith(".scales") and name.startswith("group."):
                assert torch.equal(tensor, stored[name][: len(tensor)]), (way, name)
            else:
                assert torch.equal(tensor, stored[name]), (way, name)
        assert sum(one.nbytes for one in mine.values()) < factors.nbytes, way


def test_parts_are_measured_as_the_whole_is() -> None:
    model, ids = tiny_model("llama", **WIDE), random_ids(TOKENS)
    exact = prefill(model, ids, tail=held_back(TOKENS))
    fidelity = compress_prefill(model, exact, SPEC, parts=True).fidelity
    assert fidelity is not None and [part.share for part in fidelity.parts] == [0.5, 0.75]
    assert compress(model, ids, SPEC).fidelity == fidelity.model_copy(update={"parts": ()})
    (again,) = compress_each(model, ids, [SPEC], parts=True)
    assert again.fidelity == fidelity
    for part in fidelity.parts:
        exact = prefill(model, ids, tail=held_back(TOKENS))
        whole, _ = factorize_prefill(model, exact, SPEC)
        found = certify(model, exact, leading_part(whole, part.share), (), ())
        assert (part.top1_agreement, part.kl) == (found.top1_agreement, pytest.approx(found.kl))
    assert fidelity.kl < fidelity.parts[1].kl < fidelity.parts[0].kl


@pytest.mark.parametrize(("ranks", "shares"), [(24, []), (96, [0.5]), (100, [0.5])])
def test_what_leaves_no_column_out_is_no_part(ranks: int, shares: list[float]) -> None:
    """Of 96 columns three quarters are two blocks, which are all."""
    model, ids = tiny_model("llama", **WIDE), random_ids(TOKENS)
    spec = CompressionSpec(group_size=3, rank_k=ranks, rank_v=ranks)
    fidelity = compress_each(model, ids, [spec], parts=True)[0].fidelity
    assert fidelity is not None and [part.share for part in fidelity.parts] == shares
    one = compress_each(model, random_ids(1), [CompressionSpec(rank_k=1, rank_v=1)], parts=True)[0].fidelity
    assert one is not None and one.parts == ()
