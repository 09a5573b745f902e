"""Open a conversation as a person asks for one: over a document, an artifact, or a saved session.

A document that is not stored yet is compressed here, in this process, and published: the next conversation
finds it, and so does `xkv precompute`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from xkv_artifacts.fingerprint import digest_model
from xkv_artifacts.format import TOKENS
from xkv_artifacts.keys import check_namespace
from xkv_artifacts.manifest import PrefixManifest
from xkv_artifacts.store import ArtifactStore
from xkv_service.errors import InvalidPrompt, InvalidSpec, ModelMismatch
from xkv_service.modeling.inspect import inspect_loaded
from xkv_service.modeling.models import LoadedModel, load_model
from xkv_service.selection.spec import SelectionSpec, SelectorKind
from xkv_service.sessions.opening import open_exact_session, open_session
from xkv_service.sessions.recovering import recover_renderer
from xkv_service.sessions.rendering import ChatRenderer
from xkv_service.sessions.saved import load_session
from xkv_service.sessions.session import Session
from xkv_workers.compression_options import CompressionOptions
from xkv_workers.errors import CorpusError
from xkv_workers.inventory import resolve
from xkv_workers.messages import PrefixJob
from xkv_workers.model_choice import ChosenModel, choose_device, choose_model
from xkv_workers.on_demand import Tell, read_document, store_now, stored_somehow
from xkv_workers.precompute import prepared
from xkv_workers.report import LOW_FIDELITY
from xkv_workers.request import Request, read_prompt


@dataclass(frozen=True)
class ConversationRequest:
    """What to talk about, with which model, and how. The fields are the options of `xkv chat` and `xkv ask`.

    Args:
        document: a file. artifact: an id or its first digits. session: a file to go on from.
        model: None is the bundled one. redis_url: None is the embedded one.
        compression: how to compress a document; None: as it is stored, or by default.
        selection: None: the default, or a saved session's.
        system_prompt: its text.
        exact: answer from the exact cache; nothing is compressed.
        fold_after: exact tokens of the tail past which it is folded; None: never.
    """

    store_url: str
    document: Path | None = None
    artifact: str | None = None
    session: Path | None = None
    redis_url: str | None = None
    model: str | None = None
    revision: str | None = None
    compression: CompressionOptions | None = None
    selection: SelectionSpec | None = None
    system_prompt: str | None = None
    template: Literal["chat", "raw"] = "chat"
    namespace: str = "default"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    exact: bool = False
    fold_after: int | None = None

    def __post_init__(self) -> None:
        check_namespace(self.namespace)
        if self.document is not None and self.artifact is not None:
            raise InvalidSpec("a document and an artifact were both given", hint="give one of them")
        if self.document is None and self.artifact is None and self.session is None:
            raise InvalidSpec("nothing to talk about", hint="give --doc or --artifact")

    @classmethod
    def create(
        cls,
        *,
        ratio: float | None,
        selector: SelectorKind | None,
        budget: int | float | None,
        system_prompt: Path | None,
        **fields: object,
    ) -> ConversationRequest:
        """From the options as given.

        Raises:
            InvalidSpec, InvalidNamespace, CorpusError: a value that no conversation can have.
        """
        chosen = {
            name: value for name, value in (("selector", selector), ("budget", budget)) if value is not None
        }
        return cls(
            compression=None if ratio is None else CompressionOptions(ratio=ratio),
            selection=SelectionSpec(**chosen) if chosen else None,  # type: ignore[arg-type]
            system_prompt=None if system_prompt is None else read_prompt(system_prompt),
            **fields,  # type: ignore[arg-type]
        )


@dataclass(frozen=True)
class Conversation:
    """An open session, and what it rests on.

    Args:
        manifest: the prefix's artifact; None with an exact cache. bytes_stored: of its blob, 0 without.
        bytes_full: of the prefix's exact cache, at 16 bits a number.
    """

    session: Session
    loaded: LoadedModel
    manifest: PrefixManifest | None
    bytes_stored: int
    bytes_full: int


def open_conversation(request: ConversationRequest, tell: Tell) -> Conversation:
    """Do what it takes: read, compress, load.

    Args:
        tell: told in one line what takes a while.

    Raises:
        XKVError: the document cannot be read or compressed, the artifact or session is not there or is bad,
            or they do not fit the model or each other.
    """
    opened = _open(request, tell)
    opened.session.fold_after = request.fold_after
    agreement = 1.0 if opened.manifest is None else opened.manifest.fidelity.top1_agreement
    if agreement < LOW_FIDELITY:
        tell(f"this artifact's fidelity is {agreement:.1%}: answers may be wrong; a lower ratio keeps more")
    return opened


def _open(request: ConversationRequest, tell: Tell) -> Conversation:
    if request.session is not None and request.session.exists():
        return _resumed(request, request.session)
    if request.document is not None:
        return _exact(request, tell) if request.exact else _over_document(request, request.document, tell)
    if request.artifact is not None:
        return _over_artifact(request, request.artifact, tell)
    raise InvalidSpec(
        f"there is no session at {request.session}", hint="give --doc or --artifact to begin one"
    )


def _over_document(request: ConversationRequest, path: Path, tell: Tell) -> Conversation:
    document = read_document(path)
    with prepared(_as_precompute(request, path)) as job:
        planned = next(job.plan())
        if not isinstance(planned, PrefixJob):
            raise CorpusError(f"{path}: {planned.reason}")
        loaded = _load(job.model, request.revision)
        artifact_id = None if request.compression else stored_somehow(job, planned, tell)
        if artifact_id is None:
            artifact_id = store_now(job, planned, loaded, tell)
        renderer = ChatRenderer(loaded.tokenizer, document.text, request.system_prompt, request.template)
        session = open_session(loaded, job.store, artifact_id, request.selection, renderer=renderer)
        return _conversation(session, loaded, job.store, artifact_id)


def _as_precompute(request: ConversationRequest, path: Path) -> Request:
    """What `xkv precompute` would be asked to do: ids and rendering are its own."""
    return Request(
        paths=(path,),
        store_url=request.store_url,
        compression=request.compression or CompressionOptions(),
        model=request.model,
        revision=request.revision,
        redis_url=request.redis_url,
        system_prompt=request.system_prompt,
        template=request.template,
        namespace=request.namespace,
        device=request.device,
    )


def _over_artifact(request: ConversationRequest, start: str, tell: Tell) -> Conversation:
    with ArtifactStore.open(request.store_url, request.redis_url, create=False) as store:
        artifact_id = resolve(store, start)
        chosen = _choose(request)
        _check_model(chosen, store.manifest(artifact_id))
        loaded = _load(chosen, request.revision)
        renderer = ChatRenderer(loaded.tokenizer, None, request.system_prompt)
        if request.exact:
            ids = store.load(artifact_id, [TOKENS])[1][TOKENS].tolist()
            found = recover_renderer(loaded.tokenizer, ids, request.system_prompt)
            return _prefilled(loaded, found, ids, tell)
        session = open_session(loaded, store, artifact_id, request.selection, renderer=renderer)
        return _conversation(session, loaded, store, artifact_id)


def _resumed(request: ConversationRequest, path: Path) -> Conversation:
    loaded = _load(_choose(request), request.revision)
    with ArtifactStore.open(request.store_url, request.redis_url, create=False) as store:
        wanted = None if request.artifact is None else resolve(store, request.artifact)
        session = load_session(path, loaded, store, artifact_id=wanted, selection=request.selection)
        if request.document is not None:
            _check_document(session, request.document, path)
        return _conversation(session, loaded, store, session.source.artifact_id if session.source else None)


def _check_document(session: Session, document: Path, path: Path) -> None:
    """By tokens: a session over an artifact has the document without the end that depends on the question."""
    renderer = replace(session.renderer, document=read_document(document).text)
    if renderer.prefix_ids() != session.context.prefix_ids:
        raise InvalidPrompt(
            f"the session in {path} is about another document than {document}",
            hint="leave --doc out to go on with it, or give another --session",
        )


def _exact(request: ConversationRequest, tell: Tell) -> Conversation:
    assert request.document is not None
    document = read_document(request.document)
    loaded = _load(_choose(request), request.revision)
    renderer = ChatRenderer(loaded.tokenizer, document.text, request.system_prompt, request.template)
    return _prefilled(loaded, renderer, renderer.prefix_ids(), tell)


def _prefilled(loaded: LoadedModel, renderer: ChatRenderer, ids: list[int], tell: Tell) -> Conversation:
    tell(f"prefilling {len(ids):,} tokens into an exact cache")
    return _conversation(open_exact_session(loaded, renderer, ids), loaded)


def _conversation(
    session: Session, loaded: LoadedModel, store: ArtifactStore | None = None, artifact_id: str | None = None
) -> Conversation:
    if store is None or artifact_id is None:
        tokens = session.context.prefix_tokens
        return Conversation(session, loaded, None, 0, inspect_loaded(loaded.model).layout.bytes_full(tokens))
    manifest = store.manifest(artifact_id)
    return Conversation(session, loaded, manifest, store.blobs.size(artifact_id), manifest.bytes_full)


def _choose(request: ConversationRequest) -> ChosenModel:
    return choose_model(request.model, request.revision, choose_device(request.device, None))


def _load(chosen: ChosenModel, revision: str | None) -> LoadedModel:
    return load_model(chosen.place, revision, dtype=chosen.dtype, device=chosen.device)


def _check_model(chosen: ChosenModel, manifest: PrefixManifest) -> None:
    """Before any weight is loaded. The dtype may be another: a GPU's artifact serves a CPU."""
    made = manifest.model
    fingerprint, parts = digest_model(chosen.files.path, dtype=made.dtype)
    if fingerprint != made.fingerprint:
        differs = made.differs_from(made.model_copy(update={"parts": parts}))
        raise ModelMismatch(
            f"artifact {manifest.id[:12]} was made with {made.name} ({made.architecture}), not with "
            f"{chosen.files.name}" + (f": it is of {differs}" if differs else ""),
            hint="give the model that it was precomputed with: --model, else XKV_MODEL, else the bundled one",
        )
