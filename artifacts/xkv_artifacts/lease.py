"""A lease on an artifact id: one owner at a time in the cluster, and it runs out when the owner dies."""

from __future__ import annotations

import threading
from types import TracebackType

from xkv_artifacts.errors import CatalogError, CatalogUnavailable
from xkv_artifacts.redis_link import RedisLink

# KEYS: lease. ARGV: owner, milliseconds. Asking twice is as good as once: a lost answer is asked for again.
_ACQUIRE = """
local owner = redis.call('GET', KEYS[1])
if owner and owner ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""
_RENEW = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""
_RELEASE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
"""

_BEAT_PATIENCE_S = 1.0
"""A renewal that finds no Redis is tried again at the next beat: leaving must not wait for a long one."""


class Lease:
    """The right to compute one artifact. As a context manager it renews itself until the block ends.

    Every call takes `patience_s`, how long to wait for a Redis that does not answer; None: as the link does.

    Args:
        link: connection to Redis.
        key: the lease's Redis key.
        owner: a text that no other process or task uses.
        ttl_s: seconds after which a dead owner's lease is free again.
    """

    def __init__(self, link: RedisLink, key: str, owner: str, ttl_s: float) -> None:
        self.key = key
        self.owner = owner
        self.ttl_s = ttl_s
        self._link = link
        self._stop = threading.Event()
        self._lost = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def lost(self) -> bool:
        """Whether renewing failed: somebody else may hold the lease now. Publishing is safe all the same."""
        return self._lost.is_set()

    def acquire(self, *, patience_s: float | None = None) -> bool:
        """Take the lease if it is free (or ours already).

        Raises:
            CatalogUnavailable
        """
        return self._run(_ACQUIRE, str(int(self.ttl_s * 1000)), patience_s=patience_s) == 1

    def renew(self, *, patience_s: float | None = None) -> bool:
        """Set the full time again; False when the lease is not ours any more.

        Raises:
            CatalogUnavailable
        """
        return self._run(_RENEW, str(int(self.ttl_s * 1000)), patience_s=patience_s) == 1

    def release(self, *, patience_s: float | None = None) -> bool:
        """Give the lease back; False when it was not ours any more.

        Raises:
            CatalogUnavailable
        """
        return self._run(_RELEASE, patience_s=patience_s) == 1

    def __enter__(self) -> Lease:
        """Keep an acquired lease alive from a thread."""
        self._thread = threading.Thread(target=self._keep, name="xkv-lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        try:
            self.release(patience_s=0)
        except (CatalogUnavailable, CatalogError):
            # It runs out by itself; the block's own result or error matters more.
            self._lost.set()

    def _keep(self) -> None:
        while not self._stop.wait(self.ttl_s / 3):
            try:
                # After a pause of Redis the lease may have run out with nobody taking it: take it again.
                held = self.renew(patience_s=_BEAT_PATIENCE_S) or self.acquire(patience_s=_BEAT_PATIENCE_S)
            except (CatalogUnavailable, CatalogError):
                continue
            if not held:
                self._lost.set()
                return

    def _run(self, script: str, *arguments: str, patience_s: float | None) -> int:
        return int(self._link.script(script, [self.key], [self.owner, *arguments], patience_s=patience_s))
