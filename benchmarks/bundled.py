"""The bundled model and documents of a wanted length, for the benchmarks that run on a CPU."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from random import Random

import torch

from xkv_artifacts.format import write_prefix
from xkv_artifacts.keys import artifact_id
from xkv_artifacts.manifest import DocumentRef, PrefixManifest
from xkv_service.demo import demo_model_path
from xkv_service.demo.documents import make_document
from xkv_service.factors import PrefixFactors
from xkv_service.modeling.models import LoadedModel, load_model
from xkv_service.modeling.prompts import render_prefix


def load(model: str | None = None) -> LoadedModel:
    """The bundled model, or the one in a folder, on the CPU."""
    return load_model(model or demo_model_path(), device="cpu")


def document_ids(loaded: LoadedModel, tokens: int, seed: int = 0) -> torch.Tensor:
    """The first `tokens` token ids (int64) of a rendered document, so that lengths are exact."""

    document = make_document(Random(seed), tokens + 256, measure_of(loaded))
    ids = render_prefix(loaded.tokenizer, document.text)
    return torch.tensor(ids[:tokens])


def measure_of(loaded: LoadedModel) -> Callable[[str], int]:
    """Counts the tokens of a text."""
    return lambda text: len(loaded.tokenizer(text, add_special_tokens=False).input_ids)


def file_bytes(loaded: LoadedModel, factors: PrefixFactors) -> int:
    """Bytes of the artifact's file, header included."""
    return len(artifact_bytes(loaded, factors))


def artifact_bytes(
    loaded: LoadedModel, factors: PrefixFactors, tensors: Mapping[str, torch.Tensor] | None = None
) -> bytes:
    """The artifact's file; its tensors, or others in their place."""
    fields = factors.manifest_fields()
    manifest = PrefixManifest(
        id=artifact_id(loaded.identity.fingerprint, "benchmark", factors.token_ids.tolist(), fields["spec"]),
        model=loaded.identity,
        namespace="benchmark",
        document=DocumentRef(uri="benchmark", sha256="0" * 64),
        created=datetime.now(timezone.utc),
        **fields,
    )
    file = io.BytesIO()
    write_prefix(file, manifest, factors.to_tensors() if tensors is None else tensors)
    return file.getvalue()
