"""A worker of a calibration: holds the model, observes documents, and decides. Runs as a Ray actor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from xkv_artifacts.errors import XKVError
from xkv_artifacts.store import ArtifactStore
from xkv_workers.messages import ModelPlace
from xkv_workers.place import open_place
from xkv_workers.plan import reason_of

if TYPE_CHECKING:
    import torch

    from xkv_artifacts.calibration_format import CalibrationManifest
    from xkv_service.calibration.probes import ProbedPrefix
    from xkv_service.calibration.settings import CalibrationSettings
    from xkv_service.calibration.statistics import Statistics
    from xkv_service.modeling.models import LoadedModel

    Tensors = dict[str, torch.Tensor]


class CalibrationWorker:
    """Loads the model once."""

    def __init__(self, place: ModelPlace) -> None:
        self._place = place
        self._opened: tuple[LoadedModel, ArtifactStore] | None = None

    def greet(self) -> None:
        """Answer, as soon as there is a process that can."""

    def load(self) -> tuple[LoadedModel, ArtifactStore]:
        """The model and the store.

        Raises:
            XKVError: one of them cannot be had, or the model is not the one the run was planned with.
        """
        if self._opened is None:
            self._opened = open_place(self._place)
        return self._opened

    def prepare(self) -> None:
        """Load the model before the first document comes. Raises as `load`."""
        self.load()

    def observe(self, document: ProbedPrefix, settings: CalibrationSettings) -> Tensors | str:
        """What one document adds to the sums (`observed_tensors`), or why it adds nothing, in one line."""
        loaded, _ = self.load()
        from xkv_service.calibration.observed import Observed, observe_document, reach_of
        from xkv_service.calibration.observed_tensors import observed_tensors
        from xkv_service.modeling.inspect import inspect_loaded

        found = Observed.nothing(loaded.model, reach_of(inspect_loaded(loaded.model).layout, settings))
        try:
            observe_document(loaded.model, document, found)
        except XKVError as error:
            return reason_of(error)
        return observed_tensors(found)

    def decide(
        self,
        parts: Sequence[Tensors],
        used: Sequence[ProbedPrefix],
        held: Sequence[ProbedPrefix],
        settings: CalibrationSettings,
        threads: int,
        earlier: str | None,
    ) -> CalibrationManifest:
        """Make the calibration of sums over parts of the documents, and publish it.

        Args:
            earlier: id of a calibration whose sums are added.

        Raises:
            XKVError: the held-out documents cannot be run, or it cannot be stored.
        """
        loaded, store = self.load()
        import torch

        from xkv_service.calibration.calibrate import decide
        from xkv_service.calibration.folds import Folds
        from xkv_service.calibration.observed_tensors import observed_of
        from xkv_service.calibration.statistics import Statistics, document_digest
        from xkv_service.calibration.storage import save_calibration
        from xkv_service.modeling.inspect import inspect_loaded

        torch.set_num_threads(threads)
        model = loaded.model
        layout = inspect_loaded(model).layout
        found = [observed_of(part, layout, settings, model.device) for part in parts]
        known = None if earlier is None else self._statistics(earlier, settings)
        before = frozenset[str]() if known is None else known.documents
        digests = frozenset(document_digest(one) for one in used)
        folds = Folds(found, len(digests - before), known.observed if known else None, len(before))
        made = decide(model, folds, used, held, settings)
        if earlier is not None:
            how = {**made.figures["settings"], "earlier": earlier}
            made = replace(made, figures={**made.figures, "settings": how})
        statistics = Statistics(folds.total(), digests | before)
        return save_calibration(store, made, loaded.identity, [*used, *held], statistics)

    def _statistics(self, earlier: str, settings: CalibrationSettings) -> Statistics:
        loaded, store = self.load()
        from xkv_service.calibration.observed import calibrated_layers, reach_of
        from xkv_service.calibration.storage import load_statistics
        from xkv_service.modeling.inspect import inspect_loaded

        layout = inspect_loaded(loaded.model).layout
        layers, reach = calibrated_layers(layout), reach_of(layout, settings)
        return load_statistics(store, earlier, layers, reach, loaded.model.device)
