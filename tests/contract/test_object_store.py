"""A store in S3, against a real S3 server (moto's) reached over HTTP."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from artifact_samples import FINGERPRINT, sample
from redis_server import RedisServer

from xkv_artifacts import object_blobs
from xkv_artifacts.blobs import PACKED_SUFFIX, blob_name, open_blob_store
from xkv_artifacts.errors import ArtifactNotFound, CorruptArtifact, MissingBlob, StoreError
from xkv_artifacts.object_blobs import AHEAD_BYTES, ObjectBlobStore
from xkv_artifacts.store import ArtifactStore, Match

ID = "ab" * 32


def keys(s3: Any, bucket: str) -> list[str]:
    return [item["Key"] for item in s3.list_objects_v2(Bucket=bucket).get("Contents", [])]


def test_publish_list_find_load_verify_remove(s3: Any, bucket: str, redis_server: RedisServer) -> None:
    manifest, tensors = sample()
    with ArtifactStore.open(f"s3://{bucket}/some/place/", redis_server.url) as store:
        store.publish(manifest, tensors)
        assert keys(s3, bucket) == [f"some/place/{blob_name(manifest.id)}", "some/place/xkv-store.json"]
        _, loaded = store.load(manifest.id)
        assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
        assert [check.fault for check in store.verify()] == [None]
        assert store.lookup(FINGERPRINT, "default", range(200)) == Match(manifest.id, 100)
        store.catalog.clear()
        assert store.rebuild().artifacts == 1
        assert store.collect_orphans().blobs_listed == 0
    with ArtifactStore.open(f"s3://{bucket}/some/place", redis_server.url) as store:
        assert [entry.id for entry in store.entries()] == [manifest.id]
        assert store.remove(manifest.id) and not store.remove(manifest.id)
        assert store.get(manifest.id) is None
    assert keys(s3, bucket) == ["some/place/xkv-store.json"]


def test_pins_limits_and_collecting(s3: Any, bucket: str, redis_server: RedisServer) -> None:
    with ArtifactStore.open(f"s3://{bucket}/some/place", redis_server.url) as store:
        pinned, plain = (store.publish(*sample(range(length))).id for length in (10, 20))
        store.pin(pinned)
        store.set_ttl(plain, 3600)
        assert f"some/place/retention/{plain[:2]}/{plain}.json" in keys(s3, bucket)
        store.catalog.clear()
        store.rebuild()
        assert {entry.id: entry.pinned for entry in store.entries()} == {pinned: True, plain: False}
        size = {artifact_id: store.blobs.size(artifact_id) for artifact_id in (pinned, plain)}
        assert sorted(store.blobs.sizes()) == sorted(size.values())
        limits = f'{{"budget": {size[pinned]}, "each": {{"artifacts": 2}}}}'
        s3.put_object(Bucket=bucket, Key="some/place/limits.json", Body=limits.encode())
        third = store.publish(*sample(range(30))).id
        assert [entry.id for entry in store.entries()] == [third, pinned]
        with store.reading(third):
            assert store.collect().in_use == 1
        assert [removal.artifact_id for removal in store.collect().removed] == [third]
        assert keys(s3, bucket) == [
            "some/place/limits.json",
            f"some/place/{blob_name(pinned)}",
            f"some/place/retention/{pinned[:2]}/{pinned}.json",
            "some/place/xkv-store.json",
        ]


def test_a_blob_that_goes_while_it_is_read_is_not_found(
    s3: Any, bucket: str, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a reader whose mark was lost: an open file survives on a disk, an object does not."""
    with ArtifactStore.open(f"s3://{bucket}", redis_server.url) as store:
        artifact_id = store.publish(*sample()).id
        opened = ObjectBlobStore.open

        def open_and_lose(blobs: ObjectBlobStore, name: str) -> BinaryIO:
            file = opened(blobs, name)
            s3.delete_object(Bucket=bucket, Key=blob_name(name))
            return file

        monkeypatch.setattr(ObjectBlobStore, "open", open_and_lose)
        with pytest.raises(MissingBlob, match=artifact_id):  # nobody deleted it with the catalog
            store.load(artifact_id)
        assert store.catalog.get(artifact_id) is None and store.damaged.all()[artifact_id].missing


def test_a_changed_blob_is_quarantined(s3: Any, bucket: str, redis_server: RedisServer) -> None:
    manifest, tensors = sample()
    with ArtifactStore.open(f"s3://{bucket}", redis_server.url) as store:
        store.publish(manifest, tensors)
        content = bytearray(s3.get_object(Bucket=bucket, Key=blob_name(manifest.id))["Body"].read())
        content[-1] ^= 4
        s3.put_object(Bucket=bucket, Key=blob_name(manifest.id), Body=bytes(content))
        assert "checksum" in str([check.fault for check in store.verify()])
        with pytest.raises(CorruptArtifact, match=f"s3://{bucket}/quarantine/{manifest.id}"):
            store.load(manifest.id)
        assert keys(s3, bucket) == [f"quarantine/{manifest.id}.safetensors", "xkv-store.json"]
        with pytest.raises(ArtifactNotFound):
            store.load(manifest.id)


def test_a_packed_artifact_is_found_listed_and_loaded(
    s3: Any, bucket: str, redis_server: RedisServer
) -> None:
    manifest, tensors = sample()
    name = blob_name(manifest.id, suffix=PACKED_SUFFIX)
    with ArtifactStore.open(f"s3://{bucket}", redis_server.url) as store:
        store.publish(manifest, tensors)
        (listed,) = store.entries()
        assert store.pack(manifest.id) and not store.pack(manifest.id)
        assert keys(s3, bucket) == [name, "xkv-store.json"]
        (packed,) = store.entries()
        stored = s3.head_object(Bucket=bucket, Key=name)["ContentLength"]
        assert packed.bytes == stored < listed.bytes
        assert packed.last_used == listed.last_used
        assert packed.ratio == pytest.approx(packed.bytes_full / stored)
        store.catalog.clear()
        assert store.rebuild().artifacts == 1
        assert store.lookup(FINGERPRINT, "default", range(200)) == Match(manifest.id, 100)
        _, loaded = store.load(manifest.id)
        assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
        some = store.load(manifest.id, ["tokens"])[1]
        assert torch.equal(some["tokens"], tensors["tokens"])
        assert [check.fault for check in store.verify()] == [None]
        assert store.pack(manifest.id, undo=True)
        assert keys(s3, bucket) == [blob_name(manifest.id), "xkv-store.json"]
        assert store.entries()[0].bytes == listed.bytes


def test_a_damaged_packed_blob_is_quarantined(s3: Any, bucket: str, redis_server: RedisServer) -> None:
    manifest, tensors = sample()
    name = blob_name(manifest.id, suffix=PACKED_SUFFIX)
    with ArtifactStore.open(f"s3://{bucket}", redis_server.url) as store:
        store.publish(manifest, tensors)
        store.pack(manifest.id)
        content = bytearray(s3.get_object(Bucket=bucket, Key=name)["Body"].read())
        content[len(content) // 2] ^= 4
        s3.put_object(Bucket=bucket, Key=name, Body=bytes(content))
        assert [check.fault for check in store.verify()] != [None]
        with pytest.raises(CorruptArtifact, match=f"s3://{bucket}/quarantine/{manifest.id}"):
            store.load(manifest.id)
        assert keys(s3, bucket) == [f"quarantine/{manifest.id}{PACKED_SUFFIX}", "xkv-store.json"]
        assert store.get(manifest.id) is None


def test_the_embedded_catalog_of_a_remote_store_is_the_users(
    s3: Any, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    manifest, tensors = sample()
    with ArtifactStore.open(f"s3://{bucket}/x") as store:
        store.publish(manifest, tensors)
    (data,) = (tmp_path / "xkv" / "catalogs").iterdir()
    (data / "catalog.aof").unlink()
    with ArtifactStore.open(f"s3://{bucket}/x/") as store:
        assert [entry.id for entry in store.entries()] == [manifest.id]


@pytest.mark.parametrize("size", [100, 11 << 20])
def test_a_failing_writer_publishes_nothing(
    s3: Any, bucket: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_blobs, "_PART_BYTES", 5 << 20)
    blobs = open_blob_store(f"s3://{bucket}")

    def fail(file: BinaryIO) -> None:
        for _ in range(size // 100):
            file.write(bytes(100))
        raise RuntimeError

    with pytest.raises(RuntimeError):
        blobs.put(ID, fail)
    assert keys(s3, bucket) == []
    assert "Uploads" not in s3.list_multipart_uploads(Bucket=bucket)


def test_a_blob_of_several_parts_appears_at_once(
    s3: Any, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_blobs, "_PART_BYTES", 5 << 20)
    blobs = open_blob_store(f"s3://{bucket}/x")
    content = bytes(range(256)) * 50_000

    def write(file: BinaryIO) -> None:
        for start in range(0, len(content), 1 << 20):
            file.write(content[start : start + (1 << 20)])
            assert not blobs.exists(ID)

    blobs.put(ID, write)
    assert blobs.size(ID) == len(content) and list(blobs.ids()) == [ID]
    with blobs.open(ID) as file:
        file.seek(5_000_000)
        assert file.read(1000) == content[5_000_000:5_001_000]


def test_what_is_fetched_is_what_is_asked_for_in_few_requests(
    s3: Any, bucket: str, redis_server: RedisServer
) -> None:
    import s3fs

    manifest, tensors = sample(range(30_000))
    fetched = []
    real = s3fs.S3File._fetch_range

    def record(self: Any, start: int, end: int) -> Any:
        fetched.append(end - start)
        return real(self, start, end)

    with (
        ArtifactStore.open(f"s3://{bucket}", redis_server.url) as store,
        pytest.MonkeyPatch.context() as patch,
    ):
        store.publish(manifest, tensors)
        patch.setattr(s3fs.S3File, "_fetch_range", record)
        store.load(manifest.id, ["group.0.key.factors.1"])
        size, wanted = store.blobs.size(manifest.id), 30_000 * 6 * 2
        assert len(fetched) == 2 and wanted <= fetched[1] <= wanted + AHEAD_BYTES
        assert sum(fetched) < size / 4
        fetched.clear()
        store.load(manifest.id)
        assert sum(fetched) == size
        assert len(fetched) < len(tensors) / 2


def test_faults_of_the_store_are_one_clear_line(
    s3: Any, bucket: str, monkeypatch: pytest.MonkeyPatch, redis_server: RedisServer
) -> None:
    with pytest.raises(StoreError, match="there is no store"):
        ArtifactStore.open(f"s3://{bucket}/x", redis_server.url, create=False)
    with pytest.raises(StoreError, match="no-such-bucket") as caught:
        ArtifactStore.open("s3://no-such-bucket-anywhere/x", redis_server.url)
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(StoreError, match=f"s3://{bucket}"):
        ArtifactStore.open(f"s3://{bucket}/other", redis_server.url)


def test_without_the_s3_extra_the_error_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['s3fs'] = None\n"
        "from xkv_artifacts.blobs import open_blob_store\n"
        "from xkv_artifacts.errors import StoreError\n"
        "try: open_blob_store('s3://b/x')\n"
        "except StoreError as error: print(error.message, '|', error.hint)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "s3://b/x" in out and 'pip install "xkv-service[s3]"' in out


@pytest.mark.parametrize(
    ("url", "message", "hint"),
    [("gs://b/x", "gcsfs", "install that package"), ("nonsense://b/x", "nonsense", "s3://bucket/path")],
)
def test_other_kinds_of_urls_get_hints_of_their_own(url: str, message: str, hint: str) -> None:
    with pytest.raises(StoreError, match=message) as refused:
        open_blob_store(url)
    assert hint in refused.value.hint and "[s3]" not in refused.value.hint
