"""The Serve application: which deployments there are, and how they find each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from xkv_workers.serving.logs import serve_logging
from xkv_workers.serving.settings import COMPRESSOR, ENGINE, INGRESS, ServeSettings

if TYPE_CHECKING:
    from fastapi import FastAPI

_ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
_HEALTH_S = 5.0
_INGRESS_HEALTH_S = 1.0
"""One ingress has all clients, who wait until its death is seen: with Serve's 10 s for up to so long."""
_FALLBACKS = 64
"""Replicas that may take over a prefix whose own one is full. With Ray's 2 the most popular document breaks
first: at 1,000 GPUs 12 % of all requests find three full replicas, with 64 none (docs/scale.md)."""
_OTHERS = 1000
"""Requests besides answers that an ingress takes, such as those for the status: answers that are too many
must be refused there, not wait unseen in Serve's proxy."""
_ENGINE_GPU = 0.9
"""Of a GPU: one engine on each, and the compressor beside one of them."""


def build_application(settings: ServeSettings, board: Any) -> Any:
    """The application to give to `serve.run`. Ray is up.

    Args:
        board: of `claim_board`.
    """
    from ray import serve
    from ray.serve.config import AutoscalingConfig, RequestRouterConfig

    from xkv_workers.serving.compressor import Compressor
    from xkv_workers.serving.engine_replica import EngineReplica
    from xkv_workers.serving.ingress import Ingress

    place, scaling = settings.place, settings.scaling
    on_gpu = place.device == "cuda"
    calls = serve_logging(settings.log_format, calls=True)
    engine = serve.deployment(
        EngineReplica,
        name=ENGINE,
        max_ongoing_requests=settings.ongoing,
        graceful_shutdown_timeout_s=settings.drain_s,
        autoscaling_config=AutoscalingConfig(
            min_replicas=scaling.least,
            max_replicas=scaling.most,
            target_ongoing_requests=settings.target_requests,
            upscale_delay_s=scaling.upscale_delay_s,
            downscale_delay_s=scaling.downscale_delay_s,
            look_back_period_s=scaling.look_back_s,
        ),
        request_router_config=RequestRouterConfig(
            request_router_class=_ROUTER, request_router_kwargs={"num_fallback_replicas": _FALLBACKS}
        ),
        ray_actor_options={"num_gpus": _ENGINE_GPU} if on_gpu else {"num_cpus": place.threads},
        health_check_period_s=_HEALTH_S,
        logging_config=calls,
    )
    compressor = serve.deployment(
        Compressor,
        name=COMPRESSOR,
        num_replicas=1,
        max_ongoing_requests=1000,
        ray_actor_options={"num_gpus": 1 - _ENGINE_GPU} if on_gpu else {"num_cpus": 0},
        health_check_period_s=_HEALTH_S,
        logging_config=calls,
    )
    # An app that is built on each replica: nothing of it has to be pickled but this function.
    ingress = serve.deployment(
        serve.ingress(_app_builder(settings))(Ingress),
        name=INGRESS,
        num_replicas=1,
        max_ongoing_requests=settings.most_requests + _OTHERS,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=_INGRESS_HEALTH_S,
        logging_config=serve_logging(settings.log_format),
    )
    making = compressor.bind(settings)
    return ingress.bind(engine.bind(settings, board, making), making)


def _app_builder(settings: ServeSettings) -> Callable[[], FastAPI]:
    def build() -> FastAPI:
        from xkv_workers.serving.ingress import make_app

        return make_app(settings)

    return build
