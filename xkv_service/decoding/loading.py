"""Load an artifact's factors for a model, whole or by their leading ranks."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path

import torch
from transformers import PreTrainedModel

from xkv_artifacts.errors import ArtifactNotFound, CorruptArtifact
from xkv_artifacts.manifest import GroupLayout, PrefixManifest
from xkv_artifacts.store import ArtifactStore
from xkv_service.artifact_parts import part_names
from xkv_service.calibration.calibration import Calibration
from xkv_service.calibration.storage import load_calibration
from xkv_service.decoding.device_landing import DeviceLanding
from xkv_service.errors import InvalidSpec, ModelMismatch
from xkv_service.factor_tensors import group_from_tensors, head_from_tensors
from xkv_service.factors import PrefixFactors
from xkv_service.manifest_checks import checked_spec
from xkv_service.modeling.model_files import fingerprint_of
from xkv_service.numeric import is_integer
from xkv_service.packed_factors import leading_runs
from xkv_service.spec import CompressionSpec
from xkv_service.stored import stored_tensors


def load_factors(
    store: ArtifactStore,
    artifact_id: str,
    *,
    model: PreTrainedModel | None = None,
    rank_k: int | None = None,
    rank_v: int | None = None,
    calibration_of: Callable[[CompressionSpec, str], Calibration | None] | None = None,
) -> PrefixFactors:
    """The factors of an artifact, on the CPU.

    Args:
        model: refuse the artifact if it was made from other files than this model's. The dtype may differ. A
            model that did not come from files is held against the artifact when it is used (`matching.py`).
        rank_k, rank_v: leading ranks of keys and of values to read; by default all. Blocks of columns behind
            them are not read.
        calibration_of: gives the calibration that a spec shares bases with, of a model's fingerprint; by
            default it is read from the store, as `needed_calibration` does.

    Raises:
        ArtifactNotFound, CorruptArtifact: no such artifact, or a damaged one.
        ModelMismatch: it was made with another model.
        InvalidSpec: a rank that is not in the artifact.
    """
    manifest = store.manifest(artifact_id)
    if model is not None:
        _check_files(model, manifest)
    spec = checked_spec(manifest, len(manifest.tensors))
    fingerprint = manifest.model.fingerprint
    calibration = (
        calibration_of(spec, fingerprint) if calibration_of else needed_calibration(store, spec, fingerprint)
    )
    if rank_k is None and rank_v is None:
        return PrefixFactors.from_tensors(manifest, store.load(artifact_id)[1], calibration)
    groups = tuple(_leading(group, rank_k, rank_v) for group in manifest.groups)
    cut = manifest.model_copy(update={"groups": groups})
    wanted = stored_tensors(spec, manifest.tokens, groups)
    names = [name for name in manifest.tensors if not _is_block(name) or name in wanted]
    tensors = {
        name: tensor[tuple(slice(size) for size in wanted[name].shape)] if _is_block(name) else tensor
        for name, tensor in store.load(artifact_id, names)[1].items()
    }
    return PrefixFactors.from_tensors(cut, tensors, calibration)


def load_parts(
    store: ArtifactStore,
    manifest: PrefixManifest,
    calibration: Calibration | None,
    landing: DeviceLanding | None = None,
    *,
    whole: PrefixManifest | None = None,
) -> Generator[PrefixFactors, None, None]:
    """The factors of an artifact in parts, every byte of a part checked: first what belongs to no group of
    layers, then group by group.

    Args:
        manifest: of the artifact, or of a part of it, as `part_manifest` makes it. calibration: whose bases
            it shares, or None.
        landing: takes what a CUDA device alone reads to it, and the next parts are read while one is used. By
            default each part is read to the CPU when it is asked for.
        whole: the artifact's own manifest, where the other one is a part's.

    Raises:
        ArtifactNotFound, CorruptArtifact, MissingTensor: as `load_factors`, for the part that is asked for.
    """
    head: PrefixFactors | None = None
    digests = None if whole is None else whole.tensors  # a part is as it was measured, or it is none
    with closing(store.load_parts(manifest.id, part_names(manifest), landing, digests)) as parts:
        for number, tensors in enumerate(parts):
            if landing is not None:
                landing.join()
            if head is None:
                head = head_from_tensors(manifest, tensors, calibration)
                yield head
            else:
                if whole is not None:
                    tensors = _with_leading_scales(tensors, number - 1, manifest, whole)
                yield group_from_tensors(head, manifest, number - 1, tensors, calibration)


def _with_leading_scales(
    tensors: dict[str, torch.Tensor], number: int, manifest: PrefixManifest, whole: PrefixManifest
) -> dict[str, torch.Tensor]:
    """The tensors of a group with the scales of a part's columns, which are stored together."""
    part, group = manifest.groups[number], whole.groups[number]
    found = dict(tensors)
    for kind, rank, columns in (("key", part.rank_k, group.rank_k), ("value", part.rank_v, group.rank_v)):
        name = f"group.{number}.{kind}.scales"
        if name not in found:
            continue
        if tuple(found[name].shape) != (columns,):
            raise CorruptArtifact(f"tensor {name} is {list(found[name].shape)}, not [{columns}]")
        found[name] = found[name][:rank].clone()  # a view would keep what it is cut from in memory
    return found


def _check_files(model: PreTrainedModel, manifest: PrefixManifest) -> None:
    found = fingerprint_of(model, manifest.model.dtype)
    if found not in (None, manifest.model.fingerprint):
        raise ModelMismatch(
            f"artifact {manifest.id[:12]} was made with other files than {Path(model.name_or_path).name}'s: "
            f"{manifest.model.name} ({manifest.model.architecture})",
            hint="load the model and revision that it was precomputed with, or precompute again",
        )


def _leading(group: GroupLayout, rank_k: int | None, rank_v: int | None) -> GroupLayout:
    """The group with fewer ranks; a group that has fewer anyway keeps what it has."""
    for name, rank in (("rank_k", rank_k), ("rank_v", rank_v)):
        if rank is not None and not (is_integer(rank) and rank >= 1):
            raise InvalidSpec(f"{name}={rank!r} is out of range", hint="use an integer from 1")
    ranks = {"rank_k": min(rank_k or group.rank_k, group.rank_k)}
    ranks["rank_v"] = min(rank_v or group.rank_v, group.rank_v)
    columns = {
        "columns_k": leading_runs(group.columns_k, ranks["rank_k"]),
        "columns_v": leading_runs(group.columns_v, ranks["rank_v"]),
    }
    return group.model_copy(update={**ranks, **columns})


def _is_block(name: str) -> bool:
    return name.startswith("group.")


def needed_calibration(store: ArtifactStore, spec: CompressionSpec, fingerprint: str) -> Calibration | None:
    """The calibration that an artifact's bases come from, or None.

    Raises:
        ArtifactNotFound, CorruptArtifact: it is not in the store, or damaged.
        ModelMismatch: it is another model's.
    """
    if spec.calibration is None or spec.basis == "document":
        return None
    try:
        return load_calibration(store, spec.calibration, fingerprint)
    except ArtifactNotFound:
        raise ArtifactNotFound(
            f"the artifact needs the bases of calibration {spec.calibration[:12]}, which is not in the store",
            hint="bring the calibration back, or remove the artifact and compress the document again",
        ) from None
