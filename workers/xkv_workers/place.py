"""A worker's model and store, as the driver planned with them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from xkv_artifacts.store import ArtifactStore
from xkv_workers.errors import WorkerFailed
from xkv_workers.messages import ModelPlace

if TYPE_CHECKING:
    from xkv_service.modeling.models import LoadedModel


def open_place(place: ModelPlace) -> tuple[LoadedModel, ArtifactStore]:
    """Load the model and open the store.

    Raises:
        XKVError: one of them cannot be had, or the model is not the one the run was planned with.
    """
    # OpenMP's threads spin while they wait; on cores shared with anything else that is many times slower.
    # Read when torch is imported, which happens here first.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from xkv_service.modeling.late_hqq import put_off_hqq

    put_off_hqq()
    import torch

    from xkv_service.modeling.models import load_model

    torch.set_num_threads(place.threads)
    loaded = load_model(place.model, place.revision, dtype=place.dtype, device=place.device)
    if loaded.identity.fingerprint != place.fingerprint:
        raise WorkerFailed(
            f"a worker loads another model than the one planned with: {place.model}",
            hint="the model's files must be the same on every machine of the cluster",
        )
    return loaded, ArtifactStore.open(place.store_url, place.redis_url)
