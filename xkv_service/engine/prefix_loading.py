"""`PrefixLoading`: from an artifact's id to a prefix bound to the model, in two steps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from xkv_artifacts.errors import ArtifactNotFound, CorruptArtifact
from xkv_artifacts.store import ArtifactStore
from xkv_service.calibration.calibration import Calibration
from xkv_service.decoding.loading import load_factors, needed_calibration
from xkv_service.decoding.prefix import Prefix
from xkv_service.decoding.select import Selection
from xkv_service.engine.footprint import artifact_bytes, prefix_bytes
from xkv_service.errors import ModelMismatch
from xkv_service.manifest_checks import checked_spec
from xkv_service.selection.spec import SelectionSpec
from xkv_service.spec import CompressionSpec


@dataclass(frozen=True)
class Announced:
    """What an artifact's header promises: tokens, bytes to read, and bytes that the bound prefix holds."""

    artifact_id: str
    tokens: int
    stored_bytes: int
    resident_bytes: int


class PrefixLoading:
    """Reads artifacts for one model.

    Args:
        model, store: whose prefixes, from where.
        selection: what the prefixes will be used with.
        fingerprint: of the model; None where it did not come from files. What the model makes of the
            artifact's first tokens is compared in any case.
        calibration_of: gives a calibration that is in memory, or None. keep_calibration: told of one read.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        store: ArtifactStore,
        selection: SelectionSpec,
        fingerprint: str | None,
        calibration_of: Callable[[str], Calibration | None],
        keep_calibration: Callable[[Calibration], None],
    ) -> None:
        self._model, self._store, self._selection = model, store, selection
        self._fingerprint = fingerprint
        self._calibration_of, self._keep_calibration = calibration_of, keep_calibration

    def announce(self, artifact_id: str) -> Announced:
        """Read an artifact's header.

        Raises:
            ArtifactNotFound, CorruptArtifact, UnsupportedFormat, StoreError
            ModelMismatch: it was made with other files.
        """
        manifest = self._store.manifest(artifact_id)
        if self._fingerprint not in (None, manifest.model.fingerprint):
            raise ModelMismatch(
                f"artifact {artifact_id[:12]} was made with other files: {manifest.model.name}",
                hint="serve the model that it was precomputed with",
            )
        spec = checked_spec(manifest, len(manifest.tensors))
        held = prefix_bytes(self._model, manifest, spec)
        return Announced(artifact_id, manifest.tokens, artifact_bytes(manifest, spec), held)

    @torch.no_grad()
    def bind(self, artifact_id: str) -> Prefix:
        """Read an artifact, every byte checked, and make the prefix ready on the model's device.

        While it runs, the host holds the blob's bytes once or twice more.

        Raises:
            as `announce`; CorruptArtifact also for a calibration that is damaged or gone.
            InvalidSpec: it has no index of the kind that the selection names.
        """
        device = self._model.device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            factors = load_factors(self._store, artifact_id, calibration_of=self._calibration, touch=False)
            prefix = Prefix.of(self._model, factors)
            Selection(next(iter(prefix.layers.values())), self._selection)
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
        return prefix

    def _calibration(self, spec: CompressionSpec, fingerprint: str) -> Calibration | None:
        """Kept in memory: many artifacts share one, which is larger than most of them."""
        if spec.calibration is None or spec.basis == "document":
            return None
        kept = self._calibration_of(spec.calibration)
        if kept is not None:
            return kept
        try:
            read = needed_calibration(self._store, spec, fingerprint)
        except ArtifactNotFound as error:
            # The artifact is there, and is of no use.
            raise CorruptArtifact(error.message, hint=error.hint) from None
        assert read is not None
        self._keep_calibration(read)
        return read
