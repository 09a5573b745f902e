"""Prefixes that are being made, or failed: a record of each in Redis, for whoever asks how it goes on.

A record says nothing of the text: it stays in the memory of the process that makes the prefix, and with that
process the job ends. So its maker vouches for a record again and again; one that nobody vouched for lately
counts as failed. A Redis that lost its records has them again when their makers vouch the next time. Records
are advice: what is stored is for the store to say.

That a job was deleted is known by its record alone. So a record outlives every maker that may still make it:
it is kept for KEEP_S after it was last vouched for, and what was asked for longer ago and has no record is
not made. Once an artifact is about to be published, that its job was deleted is kept until somebody saw it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from xkv_artifacts.errors import InvalidNamespace
from xkv_artifacts.keys import check_namespace, is_artifact_id
from xkv_artifacts.listing import STORE_KEYS
from xkv_artifacts.manifest import Namespace, Sha256
from xkv_artifacts.redis_link import RedisLink

if TYPE_CHECKING:
    import redis

JOB_KEY: Final = STORE_KEYS + "job:{namespace}:{id}"  # hash: see Job, and "vouched", the second until when
JOBS_KEY: Final = STORE_KEYS + "jobs:{namespace}"  # sorted set: its artifact ids, by when they were asked for
PUBLISHING_KEY: Final = STORE_KEYS + "publishing"  # hash: artifact id -> namespace, second it was made
VOUCH_S: Final = 30.0
"""Seconds for which a maker vouches: as long as a lease on an artifact outlives its owner."""
KEEP_S: Final = 86_400
"""Seconds that a failure or a deletion is remembered: a day, in which somebody asks or never will, and longer
than any maker is away that still has the texts it was given.
"""
MOST_JOBS: Final = 256
"""Records of one namespace; the oldest give way. A maker has 64 unfinished ones at most."""
STOPPED: Final = "the server stopped before it was made; ask again"
_MOST_TEXT = 500
_log = logging.getLogger(__name__)

# KEYS: job, jobs. ARGV: id, seconds to vouch for, seconds to keep, most jobs, start of jobs' keys, fields.
_WRITE = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
local found = redis.pcall('HMGET', KEYS[1], 'status', 'vouched')
local status, vouched = found[1], tonumber(found[2] or 0) or 0
local function write()
  redis.call('DEL', KEYS[1])
  redis.call('HSET', KEYS[1], 'vouched', now + ARGV[2], unpack(ARGV, 6))
  redis.call('EXPIRE', KEYS[1], ARGV[3])
  redis.call('ZADD', KEYS[2], now, ARGV[1])
  redis.call('EXPIRE', KEYS[2], ARGV[3])
  local extra = redis.call('ZCARD', KEYS[2]) - ARGV[4]
  if extra > 0 then
    for _, id in ipairs(redis.call('ZRANGE', KEYS[2], 0, extra - 1)) do
      redis.call('ZREM', KEYS[2], id)
      redis.call('DEL', ARGV[5] .. id)
    end
  end
end
"""
# Answers 0 where somebody makes it already.
_ADD = (
    _WRITE
    + """
if (status == 'queued' or status == 'running') and vouched > now then return 0 end
write()
return 1
"""
)
# Of a record that is there, status and error (the first two fields) are what may have changed. Answers 0
# where there is none and the job is so old that it may have been deleted: the last field is when it was asked
# for.
_TELL = (
    _WRITE
    + """
if not status then
  if now - ARGV[#ARGV] > tonumber(ARGV[3]) then return 0 end
  write()
  return 1
end
redis.call('HSET', KEYS[1], 'vouched', now + ARGV[2])
if redis.call('TTL', KEYS[1]) >= 0 then redis.call('EXPIRE', KEYS[1], ARGV[3]) end
redis.call('EXPIRE', KEYS[2], ARGV[3])
if status ~= 'deleted' then redis.call('HSET', KEYS[1], unpack(ARGV, 6, 9)) end
return 1
"""
)
# KEYS: job, publishing. ARGV: id, fields. Answers 0 where there is none.
_CHANGE = """
local status = redis.pcall('HGET', KEYS[1], 'status')
if type(status) ~= 'string' or status == 'deleted' then return 0 end
redis.call('HSET', KEYS[1], unpack(ARGV, 2))
if ARGV[3] == 'deleted' and redis.call('HEXISTS', KEYS[2], ARGV[1]) == 1 then
  redis.call('PERSIST', KEYS[1])
end
return 1
"""
# KEYS: job, publishing. ARGV: id, text.
_PUBLISHING = """
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
if redis.pcall('HGET', KEYS[1], 'status') == 'deleted' then redis.call('PERSIST', KEYS[1]) end
"""
# KEYS: job, jobs, publishing. ARGV: id, whether to forget a deleted one too. Answers the fields; none of one
# that was deleted and asked for again meanwhile.
_FINISH = """
local fields = redis.pcall('HGETALL', KEYS[1])
local status = not fields.err and redis.call('HGET', KEYS[1], 'status')
if status == 'deleted' and ARGV[2] == '' then return fields end
redis.call('HDEL', KEYS[3], ARGV[1])
if status == 'queued' then return {} end
redis.call('DEL', KEYS[1])
redis.call('ZREM', KEYS[2], ARGV[1])
return fields.err and {} or fields
"""


class Job(BaseModel):
    """A prefix to be made.

    Args:
        id: its artifact's. namespace: whose it will be. model: the name of its model. name: what people call
            it. tokens: of it.
        status: "deleted": nobody wants it any more; only its maker still sees that.
        error: why it failed, one line.
        pinned, ttl_s: as `ArtifactStore.publish` takes them.
        created: seconds since the epoch, by the clock of Redis, when it was asked for.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    id: Sha256
    namespace: Namespace
    status: Literal["queued", "running", "failed", "deleted"]
    error: str = Field(default="", max_length=_MOST_TEXT)
    model: str = Field(max_length=_MOST_TEXT)
    tokens: int = Field(ge=0, lt=2**53)
    name: str = Field(max_length=_MOST_TEXT)
    pinned: bool = False
    ttl_s: float | None = Field(default=None, gt=0)
    created: float = Field(ge=0, le=1e12)

    def fields(self) -> list[str]:
        """Names and values for Redis: status and error first, last when it was asked for."""
        rest = self.model_dump(exclude={"id", "namespace", "status", "error"})
        texts = {"status": self.status, "error": self.error, **{name: _text(rest[name]) for name in rest}}
        return [text for pair in texts.items() for text in pair]


@dataclass(frozen=True)
class Publication:
    """An artifact that is about to be stored, or is. `made`: the second of its manifest's `created`, by which
    it can be told from the same artifact made another time.
    """

    namespace: str
    id: str
    made: float


class JobBoard:
    """The jobs of one store.

    Every method raises CatalogUnavailable, InvalidNamespace, and CatalogError where Redis refuses.
    """

    def __init__(self, link: RedisLink, store_id: str) -> None:
        self._link = link
        self._store_id = store_id
        self._publishing = PUBLISHING_KEY.format(store=store_id)

    def add(self, job: Job) -> bool:
        """Record a job; False where somebody vouches for the same one already. A failed one is replaced."""
        return bool(self._write(_ADD, job))

    def tell(self, job: Job) -> bool:
        """Vouch for a job for the next VOUCH_S, and say its status and error. What was changed stays.

        Returns:
            False: it has no record, and is so old that it may have been deleted. It is not to be made.
        """
        return bool(self._write(_TELL, job))

    def fail(self, job: Job, error: str) -> None:
        """Say that a job failed, and why."""
        line = " ".join(error.split())[:_MOST_TEXT] or "unknown"
        self.tell(job.model_copy(update={"status": "failed", "error": line}))

    def publishing(self, job: Job, made: float) -> None:
        """Say before the artifact of a job is published that it will be; until the job is finished it stands
        among the `publications`. `made`: see there.
        """
        keys = [self._keys(job.namespace, job.id)[0], self._publishing]
        self._link.script(_PUBLISHING, keys, [job.id, f"{job.namespace} {made!r}"])

    def publications(self) -> list[Publication]:
        """The artifacts that were to be published, and whose jobs are not finished."""
        raw: Any = self._link.call(lambda client: client.hgetall(self._publishing))
        return [found for item in raw.items() if (found := _publication(*item)) is not None]

    def finish(self, namespace: str, job_id: str, *, deleted: bool = False) -> Job | None:
        """Forget a job that is done; its record as it was last, None where Redis had lost it. One that is
        queued (again) stays.

        Args:
            deleted: forget one that was deleted, too. Else it stays until what it published is removed.
        """
        keys = [*self._keys(namespace, job_id), self._publishing]
        raw: Any = self._link.script(_FINISH, keys, [job_id, "yes" if deleted else ""])
        return _parse(namespace, job_id, dict(zip(raw[::2], raw[1::2], strict=True)), None)

    def change(
        self, namespace: str, job_id: str, *, pinned: bool | None = None, ttl_s: float | None = None
    ) -> bool:
        """Change what will be promised of the artifact; a `ttl_s` of 0 is none. False: no such job."""
        texts = {} if pinned is None else {"pinned": str(pinned)}
        texts |= {} if ttl_s is None else {"ttl_s": _text(ttl_s or None)}
        return bool(texts) and self._change(namespace, job_id, texts)

    def remove(self, namespace: str, job_id: str) -> bool:
        """Do not make it, or forget that it failed; False: there is no such job."""
        return self._change(namespace, job_id, {"status": "deleted"})

    def get(self, namespace: str, job_id: str) -> Job | None:
        """A job of this namespace; None where there is none, or its record is damaged."""
        job = self.last(namespace, job_id)
        return None if job is None or job.status == "deleted" else job

    def last(self, namespace: str, job_id: str) -> Job | None:
        """As `get`, the deleted ones too."""
        return self._fetch(check_namespace(namespace), [job_id])[0] if is_artifact_id(job_id) else None

    def all(self, namespace: str) -> list[Job]:
        """The jobs of a namespace, at most MOST_JOBS, newest first."""
        key = self._keys(namespace, "")[1]
        raw: Any = self._link.call(lambda client: client.zrevrange(key, 0, MOST_JOBS - 1))
        ids = [found for item in raw if is_artifact_id(found := item.decode("utf-8", "replace"))]
        return [job for job in self._fetch(namespace, ids) if job is not None and job.status != "deleted"]

    def _fetch(self, namespace: str, ids: list[str]) -> list[Job | None]:
        def command(client: redis.Redis) -> list[Any]:
            pipeline = client.pipeline(transaction=False)
            pipeline.time()
            for job_id in ids:
                pipeline.hgetall(self._keys(namespace, job_id)[0])
            answers = pipeline.execute(raise_on_error=False)
            if isinstance(answers[0], Exception):  # not about one record: a Redis that is still loading, say
                raise answers[0]
            return answers

        (seconds, microseconds), *answers = self._link.call(command)
        found, now = zip(ids, answers, strict=True), seconds + microseconds / 1e6
        return [_parse(namespace, job_id, fields, now) for job_id, fields in found]

    def _write(self, script: str, job: Job) -> Any:
        keys = self._keys(job.namespace, job.id)
        bounds = [str(VOUCH_S), str(KEEP_S), str(MOST_JOBS), self._keys(job.namespace, "")[0]]
        return self._link.script(script, keys, [job.id, *bounds, *job.fields()])

    def _change(self, namespace: str, job_id: str, texts: dict[str, str]) -> bool:
        if not is_artifact_id(job_id):
            return False
        pairs = [text for pair in texts.items() for text in pair]
        keys = [self._keys(namespace, job_id)[0], self._publishing]
        return bool(self._link.script(_CHANGE, keys, [job_id, *pairs]))

    def _keys(self, namespace: str, job_id: str) -> list[str]:
        place = {"store": self._store_id, "namespace": check_namespace(namespace)}
        return [JOB_KEY.format(id=job_id, **place), JOBS_KEY.format(**place)]


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _parse(namespace: str, job_id: str, fields: Any, now: float | None) -> Job | None:
    """A job as Redis has it; failed where nobody vouches for it `now`. None: there is none, or it is bad."""
    if fields == {}:
        return None
    try:
        texts = {name.decode("utf-8"): value.decode("utf-8") for name, value in fields.items()}
        vouched = float(texts.pop("vouched"))
        texts["ttl_s"] = texts.get("ttl_s") or None
        job = Job.model_validate({**texts, "id": job_id, "namespace": namespace})
    except (AttributeError, KeyError, ValueError, ValidationError):
        _log.warning("the record of job %s is damaged: it counts as none", job_id)
        return None
    if now is None or job.status not in ("queued", "running") or vouched > now:
        return job
    return job.model_copy(update={"status": "failed", "error": STOPPED})


def _publication(field: bytes, text: bytes) -> Publication | None:
    job_id = field.decode("utf-8", "replace")
    namespace, _, made = text.decode("utf-8", "replace").partition(" ")
    try:
        if is_artifact_id(job_id):
            return Publication(check_namespace(namespace), job_id, float(made))
    except (InvalidNamespace, ValueError):
        pass
    _log.warning("the record of what job %r publishes is damaged: it counts as none", job_id[:80])
    return None
