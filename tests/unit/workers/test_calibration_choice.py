"""Which calibration a run takes, and what it says of those that it cannot read."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from calibration_samples import FINGERPRINT, calibration

from xkv_artifacts.manifest import ModelIdentity
from xkv_artifacts.store import ArtifactStore
from xkv_workers.calibration_choice import choose_calibration
from xkv_workers.compression_options import CompressionOptions

MODEL = ModelIdentity(fingerprint=FINGERPRINT, name="tiny", architecture="Llama", dtype="bfloat16")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ArtifactStore]:
    with ArtifactStore.open(str(tmp_path / "store")) as opened:
        yield opened


def damage(store: ArtifactStore, calibration_id: str) -> None:
    """Change a byte of the header."""
    (path,) = Path(store.blobs.url).rglob(f"{calibration_id}.safetensors")
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)


def test_a_damaged_newest_is_named_with_what_is_used_instead(
    store: ArtifactStore, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = (store.calibrations.publish(*calibration(seed=one, hours=one)).id for one in (0, 1))
    assert getattr(choose_calibration(store, MODEL, CompressionOptions()), "id", None) == new
    assert not caplog.records
    damage(store, new)
    with caplog.at_level(logging.WARNING):
        chosen = choose_calibration(store, MODEL, CompressionOptions())
    assert chosen is not None and chosen.id == old
    (said,) = caplog.messages
    assert said.startswith(f"skipped calibration {new}: ") and "quarantine" in said
    assert f"Used instead: calibration {old[:12]} of 26 November 2026." in said
    assert "Run `xkv calibrate` again, or give --calibration ID" in said


def test_without_another_none_is_used_and_said_to_be(
    store: ArtifactStore, caplog: pytest.LogCaptureFixture
) -> None:
    damage(store, store.calibrations.publish(*calibration()).id)
    assert choose_calibration(store, MODEL, CompressionOptions()) is None
    (said,) = caplog.messages
    assert "Used instead: none. Run" in said
    assert choose_calibration(store, MODEL, CompressionOptions()) is None
    assert len(caplog.messages) == 1, "it is in quarantine"
