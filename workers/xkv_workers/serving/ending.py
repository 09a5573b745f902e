"""How a server's HTTP side ends, before its processes do."""

from __future__ import annotations

import http.client
import logging
import threading
import time
import urllib.request
from contextlib import suppress

from xkv_workers.serving.settings import APP

_log = logging.getLogger(__name__)
_LOOK_S = 0.2
_LATE_S = 30.0
"""Beyond the time to finish: answers that are broken off tell it within 5 s where the machine is not busy,
and an ingress may be dead."""
_FLUSH_S = 0.5
"""What was sent last is still on its way through Serve's proxy, which goes first. It has left when the proxy
has answered a later request, and this much later. One that does not is waited for for 10 s."""
_PROXY_S = 10.0


def drain(grace_s: float, hurry: threading.Event, url: str) -> bool:
    """Have the server take no more requests, and wait until none is under way.

    Args:
        grace_s: seconds after which answers are broken off, with an error each.
        hurry: breaks them off at once.
        url: of the server.

    Returns:
        Whether every ingress replica said that its requests have ended.
    """
    from ray import serve

    end = time.monotonic() + grace_s + _LATE_S
    try:
        ingress = serve.get_app_handle(APP)
        ended = ingress.broadcast("drain", grace_s)
        while time.monotonic() < end:
            try:
                ended.results(timeout_s=_LOOK_S)
                _flush(url)
                return True
            except TimeoutError:
                pass
            if hurry.is_set():
                hurry.clear()
                ended, end = ingress.broadcast("drain", 0.0), time.monotonic() + _LATE_S
    except Exception as error:  # noqa: BLE001 - Ray's own, of many kinds; the server is to stop in any case
        _log.warning("requests under way are cut off: %s", error)
        return False
    _log.warning("requests under way are cut off: the HTTP side does not answer")
    return False


def _flush(url: str) -> None:
    with suppress(OSError, http.client.HTTPException):
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        direct.open(f"{url}/healthz", timeout=_PROXY_S).close()
    time.sleep(_FLUSH_S)
