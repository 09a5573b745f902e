"""What a manifest's JSON holds, and what it leaves out."""

from __future__ import annotations

import io

import pytest
from artifact_samples import sample
from pydantic import ValidationError

from xkv_artifacts.format import read_prefix, write_prefix
from xkv_artifacts.manifest import Fidelity, PrefixManifest


def judged(limit: float | None) -> PrefixManifest:
    manifest, _ = sample()
    fidelity = manifest.fidelity.model_copy(update={"kl_limit": limit})
    return manifest.model_copy(update={"fidelity": fidelity})


def test_fields_without_use_are_left_out() -> None:
    manifest, _ = sample()
    fields = manifest.model_dump(mode="json")
    assert not {"states", "instead_of", "retried"} & fields.keys()
    assert "parts" not in fields["model"] and "rope_widths" not in fields["groups"][0]
    assert "kl_limit" not in fields["fidelity"]
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
