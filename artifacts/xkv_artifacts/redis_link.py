"""A connection to Redis that waits a bounded time for one that does not answer, then says so in one line."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from xkv_artifacts.errors import CatalogError, CatalogUnavailable, first_line

if TYPE_CHECKING:
    import redis

Result = TypeVar("Result")

DEFAULT_PATIENCE_S = 30.0
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 2.0
_SOCKET_TIMEOUT_S = 10.0


class RedisLink:
    """Runs commands on one Redis, again when the connection breaks; so each must be safe to run twice.

    Args:
        url: redis://, rediss:// or unix:// URL.
        patience_s: seconds to keep trying before giving up.
        revive: called between tries; brings an embedded server back.
    """

    def __init__(
        self, url: str, *, patience_s: float = DEFAULT_PATIENCE_S, revive: Callable[[], None] | None = None
    ) -> None:
        self.url = url
        self.patience_s = patience_s
        self._revive = revive
        self._client = connect(url)
        self._scripts: dict[str, Any] = {}

    def call(self, command: Callable[[redis.Redis], Result], *, patience_s: float | None = None) -> Result:
        """Run `command` on the connection.

        Args:
            patience_s: instead of the link's own; 0 tries once.

        Raises:
            CatalogUnavailable: Redis did not answer in time, or refused the password, or it is no Redis.
            CatalogError: Redis answered with an error.
        """
        import redis

        deadline = time.monotonic() + (self.patience_s if patience_s is None else patience_s)
        pause = _FIRST_PAUSE_S
        while True:
            try:
                return command(self._client)
            except (redis.AuthenticationError, redis.exceptions.AuthorizationError) as error:
                raise self._unavailable(error, "check the user and password in the Redis URL") from None
            except (redis.ConnectionError, redis.TimeoutError, redis.exceptions.ReadOnlyError) as error:
                if time.monotonic() + pause > deadline:
                    raise self._unavailable(
                        error, "start Redis or set XKV_REDIS_URL, then run it again"
                    ) from None
            except redis.InvalidResponse as error:
                raise CatalogUnavailable(
                    f"what answers at {self.shown_url} is no Redis: {first_line(error)}",
                    hint="give the address of a Redis: something else listens there",
                ) from None
            except redis.RedisError as error:
                hint = "if the catalog is damaged: xkv index rebuild"
                raise CatalogError(
                    f"Redis at {self.shown_url} refused: {first_line(error)}", hint=hint
                ) from None
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)
            if self._revive is not None:
                self._revive()

    def script(
        self,
        text: str,
        keys: Sequence[str],
        arguments: Sequence[str | bytes],
        *,
        patience_s: float | None = None,
    ) -> Any:
        """Run a Lua script (sent once, then by its hash). Raises as `call`."""
        script = self._registered(text)
        return self.call(
            lambda client: script(keys=keys, args=arguments, client=client), patience_s=patience_s
        )

    def script_each(
        self, text: str, calls: Sequence[tuple[Sequence[str], Sequence[str | bytes]]]
    ) -> list[Any]:
        """Run a Lua script that Redis knows once for each keys and arguments, in one round trip; tried once.

        Returns:
            The answers, with the error in place of one that failed (each, where Redis does not know it).
        """
        digest = self._registered(text).sha

        def command(client: redis.Redis) -> list[Any]:
            pipeline = client.pipeline(transaction=False)
            for keys, arguments in calls:
                pipeline.evalsha(digest, len(keys), *keys, *arguments)
            return pipeline.execute(raise_on_error=False)

        return self.call(command, patience_s=0)

    def _registered(self, text: str) -> Any:
        if text not in self._scripts:
            self._scripts[text] = self._client.register_script(text)
        return self._scripts[text]

    def check(self) -> None:
        """Ask whether Redis is there: once, unless it is an embedded server that can be brought back.

        Raises:
            CatalogUnavailable, first_line
        """
        self.call(lambda client: client.ping(), patience_s=None if self._revive else 0)

    def close(self) -> None:
        """Close every connection."""
        self._client.close()

    @property
    def shown_url(self) -> str:
        """The URL without its password."""
        return mask_password(self.url)

    def _unavailable(self, error: Exception, hint: str) -> CatalogUnavailable:
        return CatalogUnavailable(
            f"Redis at {self.shown_url} does not answer: {first_line(error)}", hint=hint
        )


def connect(url: str) -> redis.Redis:
    """A client that reports every fault at once; nothing is sent yet.

    Raises:
        CatalogUnavailable: the URL is not a Redis URL.
    """
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    try:
        client: redis.Redis = redis.Redis.from_url(
            url,
            protocol=2,
            retry=Retry(NoBackoff(), 0),
            socket_timeout=_SOCKET_TIMEOUT_S,
            socket_connect_timeout=_SOCKET_TIMEOUT_S,
        )
        # Options in the URL's query are looked at here, not when the first command is sent.
        client.connection_pool.make_connection()
    except (ValueError, TypeError):
        hint = "use redis://host:port/0, rediss:// or unix:///path"
        raise CatalogUnavailable(f"not a Redis URL: {mask_password(url)}", hint=hint) from None
    return client


def mask_password(url: str) -> str:
    """The URL with `***` for its password."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "(not a URL)"
    userinfo, at, host = parts.netloc.rpartition("@")
    if at and ":" in userinfo:
        userinfo = userinfo.split(":", 1)[0] + ":***"
    return f"{parts.scheme}://{userinfo}{at}{host}{parts.path}" if parts.scheme else url
