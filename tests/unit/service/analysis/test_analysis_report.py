"""An analysis of tiny models' prefixes: what is read, averaged and written."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from compressed import random_ids
from families import tiny_model

from xkv_service.analysis import picture
from xkv_service.analysis.prefix_analysis import PrefixAnalysis, analyze_prefix
from xkv_service.analysis.report import Analysis, Spread
from xkv_service.errors import MissingExtra
from xkv_service.prefilling.prefill import prefill


def _analyses(family: str = "llama", **changes: object) -> tuple[PrefixAnalysis, PrefixAnalysis]:
    model = tiny_model(family, **changes)
    first, second = (
        analyze_prefix(prefill(model, random_ids(length, seed=length)), f"{length}.txt")
        for length in (90, 130)
    )
    return first, second


def test_keys_are_those_before_rope_and_values_as_cached() -> None:
    exact = prefill(tiny_model("llama"), random_ids(90))
    found = analyze_prefix(exact, "a.txt")
    for side, read in ((found.keys, exact.keys), (found.values, exact.values)):
        joined = torch.cat([read(layer).flatten(1).double() for layer in (0, 1)], 1)
        torch.testing.assert_close(side.spectra[2][0].singular_values, torch.linalg.svdvals(joined))
        assert sorted(side.spectra) == [1, 2]  # three layers
        assert side.cka.shape == (3, 3)


@pytest.mark.parametrize(("family", "layers"), [("gemma2", (1, 2)), ("deepseek_v3", (0, 1, 2))])
def test_hybrid_and_latent_models_are_analyzed_in_what_they_cache(
    family: str, layers: tuple[int, ...]
) -> None:
    found, _ = _analyses(family)
    assert found.layers == layers
    for side in (found.keys, found.values):
        assert side.cka.shape == (len(layers), len(layers))
        assert side.spectra[2][0].rank(0.95) >= 1


def test_averages_lie_between_the_documents() -> None:
    documents = _analyses()
    both, first = Analysis("tiny", documents), Analysis("tiny", documents[:1])
    share = both.share_of_width("values", 2, 0.95)
    alone = [Analysis("tiny", (one,)).share_of_width("values", 2, 0.95).mean for one in documents]
    assert (share.low, share.high) == (min(alone), max(alone))
    assert share.low <= share.mean <= share.high
    mean, deviation = both.cka("keys")
    torch.testing.assert_close(mean, (documents[0].keys.cka + documents[1].keys.cka) / 2)
    assert deviation.max() > 0
    assert first.cka("keys")[1].max() == 0
    assert Spread.of([1.0, 2.0, 6.0]) == Spread(3.0, 1.0, 6.0)


def test_json_has_every_figure() -> None:
    result = json.loads(json.dumps(Analysis("tiny", _analyses()).as_dict(), allow_nan=False))
    assert result["layers"] == [0, 1, 2]
    assert [one["tokens"] for one in result["documents"]] == [90, 130]
    for side in ("keys", "values"):
        groups = {one["size"]: one for one in result[side]["groups"]}
        assert sorted(groups) == [1, 2]
        for size, group in groups.items():
            by_energy = {one["energy"]: one["share_of_width"]["mean"] for one in group["ranks"]}
            assert by_energy[0.9] <= by_energy[0.95] <= by_energy[0.99] <= 1
            assert len(group["spectrum"]) == min(128, 32 * size)
            assert group["spectrum"][0] == [0.0, 1.0]
            for one in group["ranks"]:
                width = 32 * size
                assert one["rank_per_layer"]["mean"] == pytest.approx(
                    one["share_of_width"]["mean"] * width / size, abs=1e-4
                )


def test_the_picture_is_written(tmp_path: Path) -> None:
    picture.draw(Analysis("tiny", _analyses()), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    picture.draw(Analysis("tiny", _analyses(num_hidden_layers=1)), tmp_path / "one.svg")
    assert b"<svg" in (tmp_path / "one.svg").read_bytes()


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra) as error:
        picture.require_matplotlib()
    assert error.value.hint == "pip install 'xkv-service[plot]'"
