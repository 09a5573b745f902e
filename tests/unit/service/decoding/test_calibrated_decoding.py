"""Decoding over packed factors, a calibration's bases and an index made when it is used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed import manifest_of, random_ids
from families import tiny_model
from measured import calibrated
from transformers import AutoModelForCausalLM, PreTrainedModel

from xkv_artifacts.errors import ArtifactNotFound
from xkv_artifacts.keys import artifact_id
from xkv_artifacts.manifest import ModelIdentity, PrefixManifest
from xkv_artifacts.store import ArtifactStore
from xkv_service import CompressionSpec, SelectionSpec, XKVCache, compress, enable_xkv
from xkv_service.calibration.calibration import Calibration
from xkv_service.calibration.probes import ProbedPrefix
from xkv_service.calibration.storage import load_calibration, save_calibration
from xkv_service.decoding import derived_index
from xkv_service.decoding.cache_layer import PrefixLayer
from xkv_service.decoding.derived_index import KeptPlanes, derived_plainly, derived_sketches
from xkv_service.decoding.scoring import SketchScorer
from xkv_service.errors import InvalidSpec
from xkv_service.factors import PrefixFactors
from xkv_service.modeling.models import find_model
from xkv_service.reconstruct import dense_cache
from xkv_service.selection.sketch import candidate_planes, encode_plainly

PREFIX = 300
TOLERANCE = 1e-4  # of the largest logit


def spec_of(calibration: Calibration, **fields: Any) -> CompressionSpec:
    chosen = {"ratio": 2.0, "basis": "calibrated", "factor_dtype": "mixed", "index": "derived", **fields}
    return CompressionSpec(calibration=calibration.id, **chosen)


def logits_of(model: PreTrainedModel, cache: XKVCache, seed: int = 3) -> torch.Tensor:
    with torch.no_grad(), enable_xkv(model):
        logits: torch.Tensor = model(random_ids(5, seed=seed)[None], past_key_values=cache).logits
    return logits


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("selector", ["dense", "exact"])
@pytest.mark.parametrize(
    "family", ["llama", "gpt_neox", "gemma2", "gpt_oss", "smollm3", "qwen3_next", "cohere2"]
)
def test_with_every_token_selected_logits_are_those_of_the_dense_rebuild(family: str, selector: Any) -> None:
    model = tiny_model(family)
    calibration = calibrated(model)
    factors = compress(model, random_ids(PREFIX), spec_of(calibration, ratio=1.5), calibration)
    ours = XKVCache.from_factors(model, factors, SelectionSpec(selector, 1.0, recent=0))
    if selector == "exact":
        for layer in ours.layers:
            if isinstance(layer, PrefixLayer):
                layer.selection.dense = False
                layer.selection.budget = layer.selection.choosable
    rebuilt = dense_cache(model, factors)
    for seed in (3, 4):
        with torch.no_grad():
            expected = model(random_ids(5, seed=seed)[None], past_key_values=rebuilt).logits
        assert_close(logits_of(model, ours, seed), expected)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_model("llama", num_key_value_heads=4).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ArtifactStore]:
    with ArtifactStore.open(str(tmp_path_factory.mktemp("store"))) as opened:
        yield opened


@pytest.fixture(scope="module")
def identity(folder: Path) -> ModelIdentity:
    return find_model(folder, device="cpu").identity


@pytest.fixture(scope="module")
def calibration(model: PreTrainedModel, store: ArtifactStore, identity: ModelIdentity) -> Calibration:
    """As it comes from the store, with the id of its content."""
    sample = [ProbedPrefix.of_text("text", range(80))]
    return load_calibration(store, save_calibration(store, calibrated(model), identity, sample).id)


@pytest.fixture(scope="module")
def factors(model: PreTrainedModel, calibration: Calibration) -> PrefixFactors:
    return compress(model, random_ids(PREFIX), spec_of(calibration), calibration)


def publish(store: ArtifactStore, factors: PrefixFactors, identity: ModelIdentity) -> str:
    fields = manifest_of(factors).model_dump()
    ids = factors.token_ids.tolist()
    fields |= {"model": identity, "id": artifact_id(identity.fingerprint, "default", ids, fields["spec"])}
    return store.publish(PrefixManifest(**fields), factors.to_tensors()).id


@pytest.fixture(scope="module")
def artifact(store: ArtifactStore, factors: PrefixFactors, identity: ModelIdentity) -> str:
    return publish(store, factors, identity)


def test_an_artifact_brings_its_calibration_along(
    store: ArtifactStore, model: PreTrainedModel, factors: PrefixFactors, artifact: str
) -> None:
    spec = SelectionSpec("sketch", 24, recent=0)
    found = logits_of(model, XKVCache.from_artifact(model, store, artifact, spec))
    assert torch.equal(found, logits_of(model, XKVCache.from_factors(model, factors, spec)))
    dense = logits_of(model, XKVCache.from_factors(model, factors, SelectionSpec("dense")))
    assert not torch.equal(found, dense)


def test_without_its_calibration_an_artifact_is_of_no_use(
    tmp_path: Path, model: PreTrainedModel, factors: PrefixFactors, identity: ModelIdentity
) -> None:
    with ArtifactStore.open(str(tmp_path)) as other:
        found = publish(other, factors, identity)
        with pytest.raises(ArtifactNotFound):
            XKVCache.from_artifact(model, other, found)


def test_the_derived_index_is_a_sketch_of_the_rebuilt_keys(
    model: PreTrainedModel, factors: PrefixFactors, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = XKVCache.from_factors(model, factors).prefix.layers
    for layer, prefix in whole.items():
        keys = prefix.keys(torch.arange(PREFIX))
        codes, scales = encode_plainly(keys, factors.planes[layer])
        assert_same_sketch(prefix.index, codes, scales)
    monkeypatch.setattr(derived_index, "_PIECE", 7)
    for tokens in (PREFIX - 1, 5):
        part = XKVCache.from_factors(model, factors, tokens=tokens).prefix.layers
        for layer, prefix in part.items():
            index: Any = whole[layer].index
            assert_same_sketch(prefix.index, index._codes[:tokens], index._scales[:tokens])


def assert_same_sketch(index: Any, codes: torch.Tensor, scales: torch.Tensor) -> None:
    """But for numbers on the edge between two codes: products are summed in another order."""
    torch.testing.assert_close(index._scales, scales, atol=0, rtol=2e-3)
    assert float((index._codes != codes).float().mean()) < 2e-3


@pytest.mark.parametrize("family", ["gpt_neox", "gemma2", "smollm3", "qwen3_next", "cohere2"])
def test_planes_of_every_kind_turn_alone_as_whole_keys_do(family: str) -> None:
    """Partial rotary, rounded angles, layers without rotary; the planes of different heads differ."""
    other = tiny_model(family)
    calibration = calibrated(other)
    made = compress(other, random_ids(PREFIX), spec_of(calibration, ratio=1.5), calibration)
    for one in XKVCache.from_factors(other, made).prefix.layers.values():
        prefix: Any = one
        pairs = candidate_planes(prefix.turns.table.planes, prefix.head_dim).to(torch.int16)
        planes = torch.stack([pairs.roll(head, 0) for head in range(prefix.kv_heads)])
        for kept in (planes, planes[:, :3]):
            KeptPlanes(kept, prefix)
            whole = derived_plainly(prefix.keys, kept, PREFIX)
            found = derived_sketches(prefix._key_factors, [prefix], {prefix.layer: kept})[prefix.layer]
            assert_same_sketch(SketchScorer(found), whole.codes, whole.scales)


def test_dimensions_that_turn_with_others_are_taken_from_whole_keys(
    model: PreTrainedModel, factors: PrefixFactors
) -> None:
    strange = factors.planes[0].clone()
    strange[0, 0] = torch.tensor([0, 1])
    made = replace(factors, planes={**factors.planes, 0: strange})
    prefix: Any = XKVCache.from_factors(model, made).prefix.layers[0]
    codes, scales = encode_plainly(prefix.keys(torch.arange(PREFIX)), strange)
    assert torch.equal(prefix.index._codes, codes) and torch.equal(prefix.index._scales, scales)
    with pytest.raises(KeyError):
        KeptPlanes(strange, prefix)


def test_a_derived_index_chooses_as_a_stored_one_does(
    model: PreTrainedModel, calibration: Calibration
) -> None:
    """At a ratio that loses nearly nothing, all but a few tokens on the edge."""
    chosen = []
    for index in ("derived", "sketch"):
        spec = spec_of(calibration, index=index, ratio=1.2, factor_dtype="int8")
        made = compress(model, random_ids(PREFIX), spec, calibration)
        cache = XKVCache.from_factors(model, made, SelectionSpec("sketch", 60, recent=0))
        queries = torch.randn(4, 3, 16, generator=torch.Generator().manual_seed(1))
        scores = cache.prefix.layers[1].index(queries)  # type: ignore[misc]
        best = torch.zeros_like(scores, dtype=torch.bool)
        chosen.append(best.scatter_(-1, scores.topk(60, dim=-1).indices, True))
    assert int((chosen[0] & chosen[1]).sum()) > 0.9 * int(chosen[0].sum())


def test_a_shorter_prefix_is_the_first_rows(model: PreTrainedModel, factors: PrefixFactors) -> None:
    part = XKVCache.from_factors(model, factors, SelectionSpec("dense"), tokens=100)
    assert part.get_seq_length() == 100
    rebuilt = dense_cache(model, factors, 100)
    with torch.no_grad():
        expected = model(random_ids(5, seed=3)[None], past_key_values=rebuilt).logits
    assert_close(logits_of(model, part), expected)


def test_leading_ranks_read_fewer_bytes_and_are_the_leading_columns(
    store: ArtifactStore,
    model: PreTrainedModel,
    factors: PrefixFactors,
    artifact: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: dict[str, int] = {}
    real = store.load

    def load(name: str, names: Any = None, **options: Any) -> Any:
        manifest, tensors = real(name, names, **options)
        read.update({one: tensor.nbytes for one, tensor in tensors.items() if one.startswith("group.")})
        return manifest, tensors

    monkeypatch.setattr(store, "load", load)
    XKVCache.from_artifact(model, store, artifact)
    everything = sum(read.values())
    read.clear()
    group = factors.groups[0]
    assert group.values is not None
    rank_k, rank_v = group.keys.rank // 2 - 1, group.values.rank // 3
    cache = XKVCache.from_artifact(model, store, artifact, rank_k=rank_k, rank_v=rank_v)
    assert sum(read.values()) < 0.8 * everything
    layer, where = cache.prefix.layers[0], torch.tensor([7, 150])
    expected = group.keys.factors[where][:, :rank_k].float() @ group.keys.layer_bases(0)[:rank_k]
    unrotated = factors.rotary[0].unrotate(layer.keys(where), where).flatten(1)
    torch.testing.assert_close(unrotated, expected, atol=1e-4, rtol=1e-4)
    assert group.values.scales is not None
    expected = group.values.factors[where][:, :rank_v].float() * group.values.scales[:rank_v]
    assert torch.equal(layer.value_factors(where), expected)
    with pytest.raises(InvalidSpec, match="rank_k=0"):
        XKVCache.from_artifact(model, store, artifact, rank_k=0)


def test_leading_ranks_of_a_documents_own_bases(
    store: ArtifactStore, model: PreTrainedModel, calibration: Calibration, identity: ModelIdentity
) -> None:
    made = compress(model, random_ids(PREFIX), spec_of(calibration, basis="document"), calibration)
    found = publish(store, made, identity)
    whole = logits_of(model, XKVCache.from_artifact(model, store, found))
    assert torch.equal(whole, logits_of(model, XKVCache.from_artifact(model, store, found, rank_k=9999)))
    cache = XKVCache.from_artifact(model, store, found, rank_k=3, rank_v=5)
    assert cache.prefix.layers[0].value_bases.shape[1] == 5
    assert torch.isfinite(logits_of(model, cache)).all()


def test_forks_go_on_by_themselves(model: PreTrainedModel, factors: PrefixFactors) -> None:
    cache = XKVCache.from_factors(model, factors, SelectionSpec("sketch", 24, recent=0))
    logits_of(model, cache)
    fork = cache.fork()
    first, second = logits_of(model, cache, 8), logits_of(model, fork, 8)
    assert torch.equal(first, second)
    assert (cache.get_seq_length(), fork.get_seq_length()) == (PREFIX + 10, PREFIX + 10)


def test_rows_of_a_batch_are_answered_alone(model: PreTrainedModel, factors: PrefixFactors) -> None:
    ids = torch.stack([random_ids(6, seed=1), random_ids(6, seed=2)])
    spec = SelectionSpec("sketch", 24, recent=0)
    with torch.no_grad(), enable_xkv(model):
        both = model(ids, past_key_values=XKVCache.from_factors(model, factors, spec)).logits
        for row in range(2):
            cache = XKVCache.from_factors(model, factors, spec)
            assert_close(both[row], model(ids[row : row + 1], past_key_values=cache).logits[0])


@pytest.mark.parametrize("selector", ["dense", "sketch"])
def test_a_tail_folds_over_the_calibrations_bases(
    model: PreTrainedModel, factors: PrefixFactors, selector: Any
) -> None:
    cache = XKVCache.from_factors(model, factors, SelectionSpec(selector, 1.0, recent=0))
    for seed in range(4):
        logits_of(model, cache, seed)
    folded = cache.fork()
    assert folded.fold(keep=6, error=1e-4) == 14
    assert (folded.tail_tokens, folded.folded_tokens) == (6, 14)
    assert_close(logits_of(model, folded, 9), logits_of(model, cache, 9), 0.03)
    assert folded.fold(keep=2, error=1e-4) == 9
    assert_close(logits_of(model, folded, 10), logits_of(model, cache, 10), 0.03)


def test_generation_over_factors_and_over_their_dense_rebuild_says_the_same(
    model: PreTrainedModel, factors: PrefixFactors
) -> None:
    ids = torch.cat([factors.token_ids.long(), random_ids(4, seed=6)])[None]
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        expected = model.generate(ids, past_key_values=dense_cache(model, factors), **options)
        with enable_xkv(model):
            cache = XKVCache.from_factors(model, factors, SelectionSpec("dense"))
            assert torch.equal(model.generate(ids, past_key_values=cache, **options), expected)
