"""The HTTP side of a server: the API over replicas. It holds no model, and nothing that another does not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from xkv_artifacts.store import ArtifactStore
from xkv_service.api.app import create_app
from xkv_service.api.matching import PrefixFinder
from xkv_service.api.model import ServedModel
from xkv_service.api.remaker import Remaker
from xkv_service.api.stored_prefixes import StoredPrefixes
from xkv_service.modeling.late_hqq import put_off_hqq
from xkv_service.modeling.model_files import find_model
from xkv_workers.serving.handle_backend import HandleBackend
from xkv_workers.serving.instance import BOARD, NAMESPACE
from xkv_workers.serving.logs import join_serve
from xkv_workers.serving.presence import Presence
from xkv_workers.serving.remote_maker import RemoteMaker
from xkv_workers.serving.settings import APP, COMPRESSOR, ENGINE, ServeSettings

if TYPE_CHECKING:
    from fastapi import FastAPI


class Ingress:
    """What Serve may call on an ingress replica besides its app, which is Serve's attribute `app`.

    Args:
        deployments: those that it calls, so that Serve starts them first.
    """

    app: FastAPI

    def __init__(self, *deployments: Any) -> None:
        self._deployments = deployments

    async def drain(self, grace_s: float) -> None:
        """As `Drain.end`."""
        await self.app.state.drain.end(grace_s)


def make_app(settings: ServeSettings) -> FastAPI:
    """The app of one ingress replica."""
    import ray
    from ray import serve

    join_serve()
    put_off_hqq()
    place = settings.place
    files = find_model(place.model, place.revision, dtype=place.dtype, device="cpu")
    store = ArtifactStore.open(place.store_url, place.redis_url, patience_s=0)
    engine, board = serve.get_deployment_handle(ENGINE, APP), ray.get_actor(BOARD, NAMESPACE)
    backend = HandleBackend(engine, board, Presence(board))
    compressor = serve.get_deployment_handle(COMPRESSOR, APP)
    remaker = Remaker(store, place.fingerprint, lambda new: compressor.create.remote(new))
    return create_app(
        ServedModel.of(files, settings.aliases),
        backend,
        finder=PrefixFinder(store, files.identity, settings.api, remaker),
        prefixes=StoredPrefixes(store, RemoteMaker(compressor)),
        keys=settings.keys,
        settings=settings.api,
        most_requests=settings.most_requests,
        ids_sent=True,  # by Serve's proxy
    )
