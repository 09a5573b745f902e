"""Models that cache latents or states: from `xkv precompute` to logits from the stored artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from command_runs import Xkv, words
from model_folder import save_tiny_model

from xkv_artifacts.store import ArtifactStore
from xkv_service.factors import PrefixFactors
from xkv_service.modeling.models import load_model
from xkv_service.reconstruct import dense_cache

LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "head_dim": 8,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LINEAR: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}


@pytest.mark.parametrize(
    ("model_type", "fields", "shown"),
    [
        ("deepseek_v3", LATENT, "none stored: latents are scored by their own factors"),
        ("qwen3_next", LINEAR, "2 layers, kept exact"),
    ],
)
def test_precompute_show_and_rebuild(
    model_type: str,
    fields: dict[str, Any],
    shown: str,
    xkv: Xkv,
    ray_address: str,
    corpus: Path,
    tmp_path: Path,
) -> None:
    model_path, store_path = tmp_path / model_type, tmp_path / "store"
    save_tiny_model(model_path, model_type=model_type, **fields)
    common = ["--model", model_path, "--store", store_path, "--docs", corpus, "--ratio", "1.5", "--json"]
    forecast = xkv("precompute", *common, "--dry-run").json
    report = xkv("precompute", *common, "--workers", "1", "--ray-address", ray_address).json
    assert (report["computed"], report["failed"]) == (3, 0), report["errors"]
    assert report["ratio"] >= 1.5
    promised = {line["document"]: line["bytes"] for line in forecast["plan"]}
    assert all(line["bytes"] <= promised[line["document"]] for line in report["artifacts"])
    first = report["artifacts"][0]["id"]
    assert shown in xkv("show", first, "--store", store_path).out
    assert xkv("verify", "--store", store_path, "--json").json["failed"] == 0

    model = load_model(model_path, device="cpu").model
    with ArtifactStore.open(str(store_path)) as store:
        factors = PrefixFactors.from_tensors(*store.load(first))
    suffix = torch.arange(20, 28)[None]
    ids = torch.cat([factors.token_ids[None].long(), suffix], dim=1)
    with torch.inference_mode():
        exact = model(ids).logits[0, -8:]
        found = model(suffix, past_key_values=dense_cache(model, factors)).logits[0]
    correlation = torch.corrcoef(torch.stack([exact.flatten(), found.flatten()]))[0, 1]
    assert correlation > 0.9


def test_latent_attention_is_calibrated_and_documents_share_its_bases(
    xkv: Xkv, ray_address: str, tmp_path: Path
) -> None:
    model, store, docs = tmp_path / "model", tmp_path / "store", tmp_path / "docs"
    save_tiny_model(model, model_type="deepseek_v3", **LATENT)
    docs.mkdir()
    for number in range(3):
        (docs / f"{number}.txt").write_text(words(1500, seed=number))
    common = ["--model", model, "--store", store, "--ray-address", ray_address, "--workers", "1"]
    beyond = xkv("calibrate", "--docs", docs, "--ratio", "6", *common)
    assert beyond.code == 1 and "20.0% of the cache are rotated keys, kept exact" in beyond.err
    report = tmp_path / "report.html"
    made = xkv("calibrate", "--docs", docs, "--ratio", "2.5", *common, "--json", "--report", report).json
    assert (made["documents"], made["errors"], report.exists()) == (3, [], True)
    assert (
        made["figures"]["settings"]["most_ratio"] == 2.5
        and made["figures"]["stability"]["kept"]["mean"] > 0.5
    )

    (tmp_path / "new.txt").write_text(words(1500, seed=9))
    compress = ["precompute", "--docs", tmp_path / "new.txt", "--ratio", "2.5", "--basis", "calibrated"]
    compress += [
        "--bits",
        "mixed",
        "--calibration",
        made["id"][:8],
        "--on-low-fidelity",
        "keep",
        *common,
        "--json",
    ]
    first, again = xkv(*compress).json, xkv(*compress).json
    assert (first["computed"], first["failed"], again["reused"]) == (1, 0, 1), first
    line = first["artifacts"][0]
    assert line["ratio"] >= 2.5
    shown = xkv("show", line["id"], "--store", store)
    assert "none stored: latents are scored by their own factors" in shown.out
    assert made["id"] in shown.out
    asked = ["ask", "--artifact", line["id"], "--model", model, "--store", store, "--max-tokens", "3"]
    assert xkv(*asked, "Why?", "--json").json["artifact"] == line["id"]
    assert xkv("verify", "--store", store, "--json").json["failed"] == 0
