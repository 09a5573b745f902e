"""Analyze a corpus: read it as precompute does, prefill the documents in this process, average it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from xkv_service.analysis.prefix_analysis import PrefixAnalysis, analyze_prefix
from xkv_service.analysis.report import Analysis
from xkv_service.demo import demo_model_path
from xkv_service.errors import InvalidPrompt
from xkv_service.modeling.models import LoadedModel, load_model
from xkv_service.modeling.prompts import render_prefix
from xkv_service.prefilling.prefill import prefill
from xkv_workers.corpus import CorpusFile, Document, Rejected, list_files, read_file
from xkv_workers.errors import CorpusError
from xkv_workers.plan import reason_of
from xkv_workers.report import DocumentError


@dataclass(frozen=True)
class AnalysisRequest:
    """What to analyze. The fields are the options of `xkv analyze`; model None is the bundled one."""

    paths: tuple[Path, ...]
    model: str | None = None
    revision: str | None = None
    template: Literal["chat", "raw"] = "chat"
    device: Literal["auto", "cpu", "cuda"] = "auto"


def analyze(
    request: AnalysisRequest, on_document: Callable[[str], None]
) -> tuple[Analysis, list[DocumentError]]:
    """Analyze every document that can be read.

    Args:
        on_document: told each document's name before it is run.

    Returns:
        The averages, and the documents left out with the reason.

    Raises:
        CorpusError: not one document can be analyzed.
        ModelNotFound, UnsupportedModel, DeviceUnavailable: the model cannot be used.
    """
    files = list_files(request.paths)
    loaded = load_model(request.model or demo_model_path(), request.revision, device=request.device)
    found: list[PrefixAnalysis] = []
    errors: list[DocumentError] = []
    for document in _documents(files):
        if isinstance(document, Rejected):
            errors.append(DocumentError(document.uri, document.reason))
            continue
        on_document(document.uri)
        try:
            found.append(_analyze(loaded, document, request.template))
        except InvalidPrompt as error:
            errors.append(DocumentError(document.uri, reason_of(error)))
    if not found:
        raise CorpusError(
            "no document can be analyzed", hint=f"{errors[0].document}: {errors[0].reason}" if errors else ""
        )
    name = "the bundled model" if request.model is None else loaded.identity.name
    return Analysis(name, tuple(found)), errors


def _documents(files: list[CorpusFile | Rejected]) -> Iterator[Document | Rejected]:
    for file in files:
        if isinstance(file, Rejected):
            yield file
        else:
            yield from read_file(file)


def _analyze(loaded: LoadedModel, document: Document, template: Literal["chat", "raw"]) -> PrefixAnalysis:
    ids = render_prefix(loaded.tokenizer, document.text, template=template)
    window = loaded.context_window
    if window is not None and len(ids) > window:
        raise InvalidPrompt(f"too long: {len(ids):,} tokens, and the model's window is {window:,}")
    exact = prefill(loaded.model, ids)
    try:
        return analyze_prefix(exact, document.uri)
    finally:
        exact.free()
