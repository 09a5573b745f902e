"""Groups of more than four layers, from the sample to decoding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compressed import random_ids
from families import tiny_model

from xkv_artifacts.manifest import ModelIdentity
from xkv_artifacts.store import ArtifactStore
from xkv_service import SelectionSpec, XKVCache, compress, enable_xkv
from xkv_service.calibration import observed
from xkv_service.calibration.calibrate import calibrate
from xkv_service.calibration.candidates import Candidates
from xkv_service.calibration.choice import calibrated_spec
from xkv_service.calibration.probes import ProbedPrefix
from xkv_service.calibration.settings import CalibrationSettings
from xkv_service.calibration.storage import load_calibration, save_calibration
from xkv_service.reconstruct import dense_cache


def test_eight_layers_share_bases_and_decode_from_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products of eight neighbours are kept, as in a model too wide for those of all pairs. The search, which
    would part random layers, is left out."""
    monkeypatch.setattr(observed, "_SMALL_WIDTH", 0)
    monkeypatch.setattr(Candidates, "best_groups", lambda self, weighting: self.fixed_groups())
    model = tiny_model("llama", num_hidden_layers=10)
    sample = [ProbedPrefix.of_text(str(seed), random_ids(300, seed=seed).tolist()) for seed in range(3)]
    settings = CalibrationSettings(
        ratio=2.0, ratios=(), group_size=8, weightings=("plain",), most_ratio=2.0, tolerance_documents=1
    )
    made = calibrate(model, sample, settings)
    assert [len(group.layers) for group in made.groups] == [8, 2]
    identity = ModelIdentity(fingerprint="0" * 64, name="tiny", architecture="Llama", dtype="float32")
    with ArtifactStore.open(str(tmp_path)) as store:
        stored = load_calibration(store, save_calibration(store, made, identity, sample).id)

    factors = compress(model, random_ids(300, seed=9), calibrated_spec(2.0, stored), stored)
    assert [len(group.layout.layers) for group in factors.groups] == [8, 2]
    ours, rebuilt = XKVCache.from_factors(model, factors, SelectionSpec("dense")), dense_cache(model, factors)
    question = random_ids(5, seed=3)[None]
    with torch.no_grad():
        expected = model(question, past_key_values=rebuilt).logits
        with enable_xkv(model):
            found = model(question, past_key_values=ours).logits
    torch.testing.assert_close(found, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)
