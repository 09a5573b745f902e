"""Checks of this machine, each with its fix."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any, Literal

from xkv_artifacts.blobs import BlobStore, local_path, open_blob_store
from xkv_artifacts.errors import XKVError
from xkv_artifacts.store import ArtifactStore

DISTRIBUTION = "xkv-service"
_LOW_BYTES = 2**30
_OLDEST_REDIS = (6, 2)

Status = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Check:
    """One thing looked at. `fix` is "" when there is nothing to mend."""

    name: str
    status: Status
    detail: str
    fix: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def examine(store_url: str, redis_url: str | None, model: str | None) -> list[Check]:
    """Look at everything; no check stops the others."""
    checks = [*_versions(), _guarded("device", _device)]
    checks += [
        _guarded("store", lambda: _store(store_url)),
        _guarded("free space", lambda: _space(store_url)),
        _guarded("redis", lambda: _redis(store_url, redis_url)),
        _guarded("model", lambda: _model(model)),
    ]
    return checks


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except XKVError as error:
        return Check(name, "failed", error.message, error.hint)


def _versions() -> Iterator[Check]:
    from packaging.requirements import Requirement

    python = ".".join(map(str, sys.version_info[:3]))
    if not (3, 10) <= sys.version_info[:2] <= (3, 12):
        yield Check("python", "failed", python, "use Python 3.10, 3.11 or 3.12")
    else:
        yield Check("python", "ok", python)
    for line in requires(DISTRIBUTION) or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        fix = f'pip install "{requirement.name}{requirement.specifier}"'
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            yield Check(requirement.name, "failed", "not installed", fix)
            continue
        if requirement.specifier.contains(found, prereleases=True):
            yield Check(requirement.name, "ok", found)
        else:
            yield Check(requirement.name, "failed", f"{found} is not {requirement.specifier}", fix)


def _device() -> Check:
    import torch

    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))
        return Check("device", "ok", f"cuda: {names}")
    cores = len(os.sched_getaffinity(0))
    if torch.version.cuda is not None:
        fix = "check the driver with nvidia-smi, or pass --device cpu"
        return Check("device", "warning", f"cpu, {cores} cores: torch is built for CUDA but sees no GPU", fix)
    return Check("device", "ok", f"cpu, {cores} cores")


def _store(store_url: str) -> Check:
    blobs = open_blob_store(store_url)
    path = local_path(store_url)
    if path is None:
        return Check("store", "ok", f"{blobs.url} answers")
    try:
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"xkv")
    except OSError as error:
        return Check("store", "failed", f"{path}: {error.strerror}", "give this user write permission there")
    return Check("store", "ok", f"{path} can be written")


def _space(store_url: str) -> Check:
    blobs: BlobStore = open_blob_store(store_url)
    free = blobs.free_bytes()
    if free is None:
        return Check("free space", "ok", "an object store has no limit that can be asked for")
    detail = f"{free / 2**30:.1f} GiB free"
    if free < _LOW_BYTES:
        return Check("free space", "warning", detail, "free some space, or use another --store")
    return Check("free space", "ok", detail)


def _redis(store_url: str, redis_url: str | None) -> Check:
    with ArtifactStore.open(store_url, redis_url, patience_s=0) as store:
        link = store.catalog.link
        server = link.call(lambda client: client.info("server"))
        memory = link.call(lambda client: client.info("memory"))
        found = str(server["redis_version"])
        artifacts = len(store.entries(on_fault=lambda fault: None))
        calibrations = len(store.calibrations.entries(on_fault=lambda fault: None))
    detail = f"{found} at {link.shown_url}, {artifacts} artifacts and {calibrations} calibrations listed"
    if tuple(map(int, found.split(".")[:2])) < _OLDEST_REDIS:
        return Check("redis", "failed", detail, "use Redis 6.2 or newer")
    policy = memory.get("maxmemory_policy", "noeviction")
    if memory.get("maxmemory") and policy != "noeviction":
        detail += f"; maxmemory-policy {policy} may drop entries"
        return Check("redis", "warning", detail, "redis-cli config set maxmemory-policy noeviction")
    return Check("redis", "ok", detail)


def _model(model: str | None) -> Check:
    from xkv_service.demo import demo_model_path
    from xkv_service.modeling.inspect import inspect_model
    from xkv_service.modeling.models import load_model

    loaded = load_model(model or str(demo_model_path()))
    layout = inspect_model(loaded.model)
    identity = loaded.identity
    kind = f"{identity.name}: {identity.architecture} in {identity.dtype}"
    return Check("model", "ok", f"{kind}, {len(layout.compressible)} layers to compress")
