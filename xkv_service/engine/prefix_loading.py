"""`PrefixLoading`: from an artifact's id to a prefix bound to the model, in two steps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from xkv_artifacts.errors import ArtifactNotFound, CorruptArtifact
from xkv_artifacts.manifest import PartFidelity, PrefixManifest
from xkv_artifacts.store import ArtifactStore
from xkv_service.calibration.calibration import Calibration
from xkv_service.decoding.arriving import Arriving
from xkv_service.decoding.device_landing import landing_for
from xkv_service.decoding.loading import load_parts, needed_calibration
from xkv_service.decoding.matching import FirstKeys, FirstTokens, check_shapes
from xkv_service.decoding.prefix import Binding, Prefix
from xkv_service.decoding.select import Selection
from xkv_service.engine.footprint import prefix_bytes
from xkv_service.errors import ModelMismatch
from xkv_service.leading_part import part_manifest
from xkv_service.manifest_checks import checked_spec
from xkv_service.selection.spec import SelectionSpec
from xkv_service.spec import CompressionSpec
from xkv_service.stored import artifact_bytes


class NoPart(Exception):
    """Why a part of an artifact cannot serve."""


@dataclass(frozen=True)
class Announced:
    """What an artifact's header promises.

    Args:
        manifest: of the artifact, or of the part of it that is to be loaded. stored_bytes: to read.
        resident_bytes: that the bound prefix holds, besides the calibration whose bases it shares.
        spec: it was compressed with.
        whole: the artifact's own manifest, where the other one is a part's.
    """

    manifest: PrefixManifest
    stored_bytes: int
    resident_bytes: int
    spec: CompressionSpec
    whole: PrefixManifest | None = None

    @property
    def artifact_id(self) -> str:
        """Its id."""
        return self.manifest.id

    @property
    def tokens(self) -> int:
        """Of the prefix."""
        return self.manifest.tokens

    @property
    def calibration(self) -> str | None:
        """The id of the calibration whose bases the prefix shares, or None."""
        return self.spec.calibration if self.spec.basis == "calibrated" else None

    @property
    def artifact_bytes(self) -> int:
        """Of all the artifact's tensors."""
        return artifact_bytes(self.whole or self.manifest, self.spec)


class PrefixLoading:
    """Reads artifacts for one model.

    Args:
        model, store: whose prefixes, from where.
        selection: what the prefixes will be used with.
        fingerprint: of the model; None where it did not come from files. What the model makes of the
            artifact's first tokens is compared in any case.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        store: ArtifactStore,
        selection: SelectionSpec,
        fingerprint: str | None,
    ) -> None:
        self._model, self._store, self._selection = model, store, selection
        self._fingerprint, self._first_keys = fingerprint, FirstKeys(model)

    def announce(self, artifact_id: str, part: PartFidelity | None = None) -> Announced:
        """Read an artifact's header.

        Args:
            part: what is to be loaded of it, by default all.

        Raises:
            ArtifactNotFound, CorruptArtifact, UnsupportedFormat, StoreError
            ModelMismatch: it was made with other files.
            NoPart: the header does not say this of a part, or all has to be read for it.
        """
        manifest = self._store.manifest(artifact_id)
        if self._fingerprint not in (None, manifest.model.fingerprint):
            raise ModelMismatch(
                f"artifact {artifact_id[:12]} was made with other files: {manifest.model.name}",
                hint="serve the model that it was precomputed with",
            )
        spec = checked_spec(manifest, len(manifest.tensors))
        if part is None:
            return self._promised(manifest, spec)
        if part not in manifest.fidelity.parts:
            raise NoPart(f"artifact {artifact_id[:12]} was made again without what was measured of its part")
        if not self._store.read_in_ranges(artifact_id):
            raise NoPart(f"artifact {artifact_id[:12]} is packed, and read whole or not at all")
        return self._promised(part_manifest(manifest, spec, part.share), spec, manifest)

    def _promised(
        self, manifest: PrefixManifest, spec: CompressionSpec, whole: PrefixManifest | None = None
    ) -> Announced:
        held = prefix_bytes(self._model, manifest, spec)
        return Announced(manifest, artifact_bytes(manifest, spec), held, spec, whole)

    def calibration(self, announced: Announced) -> Calibration:
        """Read the calibration whose bases an artifact shares.

        Raises:
            CorruptArtifact: it is damaged or gone: the artifact is there, and is of no use.
            UnsupportedFormat, StoreError, ModelMismatch
        """
        try:
            found = needed_calibration(self._store, announced.spec, announced.manifest.model.fingerprint)
        except ArtifactNotFound as error:
            raise CorruptArtifact(error.message, hint=error.hint) from None
        assert found is not None
        return found

    @torch.no_grad()
    def bind(
        self,
        announced: Announced,
        calibration: Calibration | None,
        on_arriving: Callable[[Arriving], None] = lambda arriving: None,
    ) -> Prefix:
        """Read an artifact, every byte checked, and make the prefix ready on the model's device.

        While it runs, the host holds the blob's bytes once or twice more; a CUDA device holds them once more
        where there is room for that, else what is being read and copied.

        Args:
            announced: what `announce` said of it. calibration: whose bases it shares, or None.
            on_arriving: told of the prefix before the first of its layers is there.

        Raises:
            as `announce`; InvalidSpec: it has no index of the kind that the selection names.
        """
        device = self._model.device
        manifest, landing = announced.manifest, landing_for(device, announced.stored_bytes)
        check_shapes(self._model, manifest.groups)
        with (
            torch.cuda.device(device) if device.type == "cuda" else nullcontext(),
            closing(load_parts(self._store, manifest, calibration, landing, whole=announced.whole)) as parts,
        ):
            head = next(parts)
            binding = Binding(self._model, head, manifest.groups)
            arriving = Arriving(binding.prefix)
            on_arriving(arriving)
            try:
                first = FirstTokens(self._first_keys, head)
                for part in parts:
                    binding.add(part)
                    arriving.came(_enqueued(device))
                    first.add(part)
                first.check()
                arriving.settle()
            finally:
                arriving.end()
        Selection(next(iter(binding.prefix.layers.values())), self._selection)
        return binding.prefix


def _enqueued(device: torch.device) -> torch.cuda.Event | None:
    """What is over when the device has done all that it was given on this thread's stream."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
