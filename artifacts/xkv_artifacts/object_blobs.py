"""Blobs in an object store through fsspec: one upload each, visible only when it is complete."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from xkv_artifacts.blobs import (
    QUARANTINE,
    STORE_FILE,
    BlobStore,
    Result,
    blob_name,
    id_of_name,
    new_store_file,
    not_found,
    parse_store_file,
    store_errors,
)
from xkv_artifacts.errors import StoreError, first_line

# Parts of an upload; S3 allows 10,000 of them, so this holds up to 320 GB.
_PART_BYTES = 32 << 20
# Fetched beyond what is read: many tensors are small, and each request takes some 20 ms, so many bytes 2.5 ms
# at 100 MB/s. More would be thrown away where a header is all that is read.
AHEAD_BYTES = 256 << 10


class ObjectBlobStore(BlobStore):
    """A store under a URL such as `s3://bucket/path`. Credentials and endpoints come from the environment."""

    def __init__(self, url: str, *, create: bool = True) -> None:
        import fsspec

        self.url = url.rstrip("/")
        with self._errors("open"):
            # Other machines write here too: a cached listing would be wrong.
            options = {"use_listings_cache": False, "skip_instance_cache": True}
            self._fs: Any
            self._fs, self._root = fsspec.core.url_to_fs(self.url, **options)
            if not create and not self._fs.exists(self._path(STORE_FILE)):
                raise StoreError(f"there is no store at {self.url}", hint="xkv precompute makes one")

    def put(self, artifact_id: str, write: Callable[[BinaryIO], Result]) -> Result:
        with self._errors(f"write artifact {artifact_id} to"):
            return self._upload(self._blob(artifact_id), write)

    def open(self, artifact_id: str) -> BinaryIO:
        with self._errors(f"read artifact {artifact_id} in"):
            try:
                file: BinaryIO = self._fs.open(
                    self._blob(artifact_id), "rb", cache_type="readahead", block_size=AHEAD_BYTES
                )
            except FileNotFoundError:
                raise not_found(artifact_id, self) from None
        return file

    def exists(self, artifact_id: str) -> bool:
        with self._errors("look into"):
            return bool(self._fs.exists(self._blob(artifact_id)))

    def size(self, artifact_id: str) -> int:
        with self._errors(f"read artifact {artifact_id} in"):
            try:
                return int(self._fs.size(self._blob(artifact_id)))
            except FileNotFoundError:
                raise not_found(artifact_id, self) from None

    def age(self, artifact_id: str) -> float:
        with self._errors(f"read artifact {artifact_id} in"):
            try:
                return time.time() - float(self._fs.modified(self._blob(artifact_id)).timestamp())
            except FileNotFoundError:
                raise not_found(artifact_id, self) from None

    def ids(self) -> Iterator[str]:
        with self._errors("list"):
            try:
                paths = sorted(self._fs.find(self._path(self.folder)))
            except FileNotFoundError:
                paths = []
        for path in paths:
            artifact_id = id_of_name(path[len(self._root) :].lstrip("/"), self.folder, self.suffix)
            if artifact_id is not None:
                yield artifact_id

    def sizes(self) -> Iterator[int]:
        with self._errors("list"):
            try:
                found = self._fs.find(self._path(self.folder), detail=True)
            except FileNotFoundError:
                found = {}
        yield from (int(item["size"]) for path, item in found.items() if path.endswith(self.suffix))

    def remove(self, artifact_id: str, *, durably: bool = True) -> bool:
        path = self._blob(artifact_id)
        with self._errors(f"remove artifact {artifact_id} from"):
            if not self._fs.exists(path):
                return False
            self._fs.rm_file(path)
        return True

    def quarantine(self, artifact_id: str) -> str:
        source, target = self._blob(artifact_id), self._path(f"{QUARANTINE}/{artifact_id}{self.suffix}")
        with self._errors(f"quarantine artifact {artifact_id} in"):
            try:
                self._fs.copy(source, target)
                self._fs.rm_file(source)
            except FileNotFoundError:
                raise not_found(artifact_id, self) from None
        return f"{self.url}/{QUARANTINE}/{artifact_id}{self.suffix}"

    def remove_temporary(self) -> tuple[int, int]:
        """Nothing to do: an upload that was not completed has no name. A bucket rule drops its parts."""
        return 0, 0

    def free_bytes(self) -> int | None:
        return None

    def root_file(self, name: str) -> bytes | None:
        with self._errors("read"):
            try:
                return bytes(self._fs.cat_file(self._path(name)))
            except FileNotFoundError:
                return None

    def store_id(self) -> str:
        path = self._path(STORE_FILE)
        with self._errors("read"):
            if not self._fs.exists(path):
                self._upload(path, lambda file: file.write(new_store_file()))
            # Read back: where two processes made the store at once, both use what the store kept.
            return parse_store_file(self._fs.cat_file(path), f"{self.url}/{STORE_FILE}")

    def _blob(self, artifact_id: str) -> str:
        return self._path(blob_name(artifact_id, self.folder, self.suffix))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _upload(self, path: str, write: Callable[[BinaryIO], Result]) -> Result:
        file = self._fs.open(path, "wb", block_size=_PART_BYTES, autocommit=False)
        try:
            result = write(file)
            file.close()
        except BaseException:
            # Closing would publish the half that was written.
            file.discard()
            file.closed = True
            raise
        file.commit()
        return result

    @contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        try:
            with store_errors(doing, self.url):
                yield
        except ImportError as error:
            s3 = self.url.startswith(("s3:", "s3a:"))
            hint = 'pip install "xkv-service[s3]"' if s3 else "install that package beside xkv-service"
            raise StoreError(f"cannot {doing} {self.url}: {first_line(error)}", hint=hint) from None
        except ValueError as error:
            hint = "give a folder, or a URL such as s3://bucket/path"
            raise StoreError(f"cannot {doing} {self.url}: {first_line(error)}", hint=hint) from None
        except _client_errors() as error:
            hint = "check credentials, region and endpoint (AWS_* variables)"
            raise StoreError(f"cannot {doing} {self.url}: {first_line(error)}", hint=hint) from None


def _client_errors() -> tuple[type[Exception], ...]:
    """What S3 clients raise that is no OSError (missing credentials, an endpoint that does not answer)."""
    try:
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:
        return ()
    return BotoCoreError, ClientError
