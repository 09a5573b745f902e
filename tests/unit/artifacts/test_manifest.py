"""What a manifest's JSON holds, and what it leaves out."""

from __future__ import annotations

import io
from typing import Any

import pytest
from artifact_samples import sample
from hostile_blobs import Json, rebuilt
from pydantic import ValidationError

from xkv_artifacts.errors import CorruptArtifact
from xkv_artifacts.format import read_manifest, read_prefix, write_prefix
from xkv_artifacts.manifest import Fidelity, PartFidelity, PrefixManifest


def judged(limit: float | None) -> PrefixManifest:
    manifest, _ = sample()
    fidelity = manifest.fidelity.model_copy(update={"kl_limit": limit})
    return manifest.model_copy(update={"fidelity": fidelity})


def test_fields_without_use_are_left_out() -> None:
    manifest, _ = sample()
    fields = manifest.model_dump(mode="json")
    assert not {"states", "instead_of", "retried"} & fields.keys()
    assert "parts" not in fields["model"] and "rope_widths" not in fields["groups"][0]
    assert not {"kl_limit", "parts"} & fields["fidelity"].keys()
    assert PrefixManifest.model_validate(fields) == manifest


@pytest.mark.parametrize("limit", [0.0, 0.0125])
def test_the_limit_of_a_fidelity_is_written_and_read(limit: float) -> None:
    manifest, tensors = judged(limit), sample()[1]
    blob = io.BytesIO()
    write_prefix(blob, manifest, tensors)
    found, _ = read_prefix(blob)
    assert found.fidelity == manifest.fidelity and found.fidelity.kl_limit == limit
    assert found.id == sample()[0].id, "it is no part of what the artifact is"


def test_a_limit_below_nothing_is_refused() -> None:
    fields = judged(None).fidelity.model_dump()
    with pytest.raises(ValidationError, match="kl_limit"):
        Fidelity.model_validate({**fields, "kl_limit": -0.1})


HALF, MOST = (PartFidelity(share=share, top1_agreement=0.5, kl=2e-4) for share in (0.5, 0.75))


def test_parts_that_were_measured_are_written_and_read() -> None:
    manifest, tensors = sample()
    fidelity = manifest.fidelity.model_copy(update={"parts": (HALF, MOST)})
    blob = io.BytesIO()
    write_prefix(blob, manifest.model_copy(update={"fidelity": fidelity}), tensors)
    found, _ = read_prefix(blob)
    assert found.fidelity == fidelity and found.fidelity.parts == (HALF, MOST)
    assert found.id == manifest.id, "they are no part of what the artifact is"


@pytest.mark.parametrize(
    "parts",
    [
        [HALF.model_dump() | {"share": 0.0}],
        [HALF.model_dump() | {"share": 1.0}],
        [HALF.model_dump() | {"share": "most"}],
        [HALF.model_dump() | {"kl": -1e-9}],
        [HALF.model_dump() | {"top1_agreement": 1.5}],
        [HALF.model_dump() | {"columns": 64}],
        [{"share": 0.5, "kl": 0.0}],
        [MOST.model_dump(), HALF.model_dump()],
        [HALF.model_dump(), HALF.model_dump()],
        [HALF.model_dump() | {"share": number / 10} for number in range(1, 10)],
        {"share": 0.5},
        None,
    ],
)
def test_parts_that_cannot_be_are_damage(parts: Any) -> None:
    def change(header: Json, manifest: Json) -> None:
        manifest["fidelity"]["parts"] = parts

    with pytest.raises(CorruptArtifact, match=r"manifest field fidelity\.parts"):
        read_manifest(io.BytesIO(rebuilt(change)))
