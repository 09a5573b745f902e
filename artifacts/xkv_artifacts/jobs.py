"""Jobs that make prefixes: a small record of each in Redis, so that whoever asked can see how it goes on.

A record says nothing of what is to be computed; that travels another way. Its worker holds a lease: when that
runs out the job counts as queued again, and as failed once MOST_TRIES workers died at it. Records go after
KEEP_S, and with a Redis that is lost; the artifacts that they led to stay.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from xkv_artifacts.errors import CatalogError, InvalidKey, JobConflict, TooManyJobs
from xkv_artifacts.keys import check_namespace, is_artifact_id
from xkv_artifacts.lease import Lease
from xkv_artifacts.listing import STORE_KEYS
from xkv_artifacts.manifest import Namespace, Sha256
from xkv_artifacts.namespace_index import page_of
from xkv_artifacts.redis_link import RedisLink

if TYPE_CHECKING:
    import redis

JOB_KEY: Final = STORE_KEYS + "job:{id}"  # hash: see Job
JOBS_KEY: Final = STORE_KEYS + "jobs:{namespace}"  # sorted set: its jobs, by the second they were made
JOB_LEASE_KEY: Final = STORE_KEYS + "job-lease:{id}"  # string: the worker, with an expiry
KEEP_S: Final = 86_400
"""A record lives so long from when the job was made: a day, in which somebody asks or never will."""
MOST_JOBS: Final = 1000
"""Records of one namespace; the oldest finished ones give way."""
MOST_TRIES: Final = 3
"""As often as precompute tries a document whose worker dies."""
_MOST_ERROR = 500

# KEYS: job, jobs. ARGV: id, namespace, artifact or '', start of jobs' keys, most, seconds. Answers 0 where
# there are too many unfinished ones.
_CREATE = """
if redis.call('EXISTS', KEYS[1]) == 1 then return 1 end
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now - ARGV[6])
if redis.call('ZCARD', KEYS[2]) >= tonumber(ARGV[5]) then
  for _, id in ipairs(redis.call('ZRANGE', KEYS[2], 0, -1)) do
    local found = redis.pcall('HGET', ARGV[4] .. id, 'status')
    if found ~= 'queued' and found ~= 'running' then
      redis.call('ZREM', KEYS[2], id)
      redis.call('DEL', ARGV[4] .. id)
      break
    end
  end
  if redis.call('ZCARD', KEYS[2]) >= tonumber(ARGV[5]) then return 0 end
end
redis.call('HSET', KEYS[1], 'namespace', ARGV[2], 'status', 'queued', 'tries', 0)
redis.call('HSET', KEYS[1], 'created', now, 'updated', now)
if ARGV[3] ~= '' then redis.call('HSET', KEYS[1], 'artifact_id', ARGV[3]) end
redis.call('EXPIRE', KEYS[1], ARGV[6])
redis.call('ZADD', KEYS[2], now, ARGV[1])
redis.call('EXPIRE', KEYS[2], ARGV[6])
return 1
"""

# KEYS: job, lease. ARGV: worker, milliseconds, most tries. Answers 1, or 0 where it is not to be had.
_CLAIM = """
local status, worker, tries = unpack(redis.call('HMGET', KEYS[1], 'status', 'worker', 'tries'))
local holder = redis.call('GET', KEYS[2])
if holder then return holder == ARGV[1] and 1 or 0 end
if status ~= 'queued' and status ~= 'running' then return 0 end
if (tonumber(tries or 0) or 0) >= tonumber(ARGV[3]) then return 0 end
local time = redis.call('TIME')
redis.call('HSET', KEYS[1], 'status', 'running', 'worker', ARGV[1], 'updated', time[1] + time[2] / 1000000)
redis.call('HINCRBY', KEYS[1], 'tries', 1)
redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[2])
return 1
"""

# KEYS: job, lease. ARGV: worker, status, artifact or '', error or ''. Answers 1, or 0 where it is another's.
_FINISH = """
local status, worker = unpack(redis.call('HMGET', KEYS[1], 'status', 'worker'))
if worker ~= ARGV[1] or (status ~= 'running' and status ~= ARGV[2]) then return 0 end
local time = redis.call('TIME')
redis.call('HSET', KEYS[1], 'status', ARGV[2], 'updated', time[1] + time[2] / 1000000)
if ARGV[3] ~= '' then redis.call('HSET', KEYS[1], 'artifact_id', ARGV[3]) end
if ARGV[4] ~= '' then redis.call('HSET', KEYS[1], 'error', ARGV[4]) end
if redis.call('GET', KEYS[2]) == ARGV[1] then redis.call('DEL', KEYS[2]) end
return 1
"""

JobId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Status = Literal["queued", "running", "ready", "failed"]


class Job(BaseModel):
    """One job.

    Args:
        status: "queued" until a worker has it, and again when that one died; "ready" or "failed" at the end.
        artifact_id: what it leads to, once that is known.
        error: why it failed, one line.
        created, updated: seconds since the epoch, by the clock of Redis.
        tries: workers that had it. worker: the last one.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    id: JobId
    namespace: Namespace
    status: Status
    artifact_id: Sha256 | None = None
    error: str | None = Field(default=None, max_length=_MOST_ERROR)
    created: float
    updated: float
    tries: int = Field(default=0, ge=0)
    worker: str | None = Field(default=None, max_length=500)


class JobBoard:
    """The jobs of one store.

    Every method raises CatalogUnavailable, and CatalogError where Redis holds something else there.
    """

    def __init__(self, link: RedisLink, store_id: str) -> None:
        self._link = link
        self._store_id = store_id

    def create(self, namespace: str, artifact_id: str | None = None) -> Job:
        """A new queued job.

        Raises:
            TooManyJobs: the namespace has MOST_JOBS that are not finished.
            InvalidNamespace, InvalidKey
        """
        check_namespace(namespace)
        if artifact_id is not None and not is_artifact_id(artifact_id):
            raise InvalidKey(f"{artifact_id[:80]!r} is not an artifact id")
        job_id = uuid.uuid4().hex
        texts = [job_id, namespace, artifact_id or "", self._key(JOB_KEY, id="")]
        keys = [self._key(JOB_KEY, id=job_id), self._key(JOBS_KEY, namespace=namespace)]
        if not self._link.script(_CREATE, keys, [*texts, str(MOST_JOBS), str(KEEP_S)]):
            raise TooManyJobs(
                f"namespace {namespace} has {MOST_JOBS:,} unfinished jobs", hint="wait until some are done"
            )
        job = self.get(namespace, job_id)
        if job is None:
            raise CatalogError(f"job {job_id} was lost as soon as it was made", hint="create it again")
        return job

    def get(self, namespace: str, job_id: str) -> Job | None:
        """A job of this namespace, or None.

        Raises:
            CatalogError: there is one, but it is damaged.
        """
        if not _is_job_id(job_id):
            return None
        job = _parse(job_id, *self._fetch([job_id])[0])
        return job if job is not None and job.namespace == namespace else None

    def page(
        self, namespace: str, cursor: str | None = None, limit: int = 100
    ) -> tuple[list[Job], str | None]:
        """Up to `limit` jobs of a namespace, newest first, and the cursor of the next page, if there is one.
        Damaged ones are left out.

        Raises:
            InvalidNamespace, InvalidCursor
        """
        key = self._key(JOBS_KEY, namespace=check_namespace(namespace))
        found, following = page_of(self._link, key, cursor, limit)
        ids = [job_id for job_id, _ in found if _is_job_id(job_id)]
        jobs = []
        for job_id, answer in zip(ids, self._fetch(ids), strict=True):
            try:
                job = _parse(job_id, *answer)
            except CatalogError:
                continue
            if job is not None and job.namespace == namespace:
                jobs.append(job)
        return jobs, following

    def claim(self, job_id: str, worker: str, ttl_s: float = 30.0) -> Lease | None:
        """Begin a queued job, or one whose worker died; None when it is not to be had.

        Work inside `with lease:`, which renews it, and call `finish` there. A block that is left without that
        gives the job back.

        Args:
            worker: a text that no other worker uses.
            ttl_s: seconds after which a dead worker's job is queued again.
        """
        if not _is_job_id(job_id):
            return None
        arguments = [worker, str(int(1000 * ttl_s)), str(MOST_TRIES)]
        if not self._link.script(_CLAIM, self._keys(job_id), arguments):
            return None
        return Lease(self._link, self._keys(job_id)[1], worker, ttl_s)

    def finish(
        self, job_id: str, worker: str, *, artifact_id: str | None = None, error: str | None = None
    ) -> None:
        """End a job: "failed" with an `error`, else "ready" with the artifact that it led to.

        Raises:
            JobConflict: it is not this worker's any more: another one has it, or it is gone.
            InvalidKey: neither or both are given, or the id is none.
        """
        if (artifact_id is None) == (error is None) or not is_artifact_id(artifact_id or "0" * 64):
            raise InvalidKey("a job ends with an artifact id or with an error", hint="give one of them")
        line = " ".join((error or "").split())[:_MOST_ERROR] or ("unknown" if error is not None else "")
        status = "ready" if error is None else "failed"
        arguments = [worker, status, artifact_id or "", line]
        if not _is_job_id(job_id) or not self._link.script(_FINISH, self._keys(job_id), arguments):
            raise JobConflict(
                f"job {job_id[:80]} is not {worker}'s", hint="another worker has it, or it is gone"
            )

    def _fetch(self, ids: list[str]) -> list[tuple[Any, Any]]:
        def command(client: redis.Redis) -> list[Any]:
            pipeline = client.pipeline(transaction=False)
            for job_id in ids:
                job, lease = self._keys(job_id)
                pipeline.hgetall(job)
                pipeline.exists(lease)
            return pipeline.execute(raise_on_error=False)

        answers = self._link.call(command)
        return list(zip(answers[::2], answers[1::2], strict=True))

    def _keys(self, job_id: str) -> list[str]:
        return [self._key(JOB_KEY, id=job_id), self._key(JOB_LEASE_KEY, id=job_id)]

    def _key(self, pattern: str, **parts: str) -> str:
        return pattern.format(store=self._store_id, **parts)


def _is_job_id(text: str) -> bool:
    return len(text) == 32 and is_artifact_id(2 * text)


def _parse(job_id: str, fields: Any, leased: Any) -> Job | None:
    """A job as Redis answered, its status as the lease shows it."""
    if fields == {}:
        return None
    try:
        texts = {name.decode("utf-8"): value.decode("utf-8") for name, value in fields.items()}
        job = Job.model_validate({**texts, "id": job_id})
    except (AttributeError, UnicodeDecodeError, ValidationError):
        raise CatalogError(f"job {job_id} is damaged in the catalog", hint="create it again") from None
    if job.status != "running" or leased == 1:
        return job
    if job.tries < MOST_TRIES:
        return job.model_copy(update={"status": "queued"})
    error = f"given up after {job.tries} tries: its worker died each time"
    return job.model_copy(update={"status": "failed", "error": error})
