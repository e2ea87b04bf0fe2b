"""Batches: files of requests that nobody waits for, and what became of each. Runs them below all other requests.

A batch is `ID.json`; what its requests have answered so far is in `ID.output` and `ID.errors`, a line each, written as
they come. So a server that was killed goes on behind the last line: no answer is lost, none is computed twice.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

import msgspec

from . import records
from .batch_lines import Answer, LineError, NotAnAnswer, answer_line, read_lines, unanswered_line, written_answers
from .batch_work import run_lines
from .errors import ApiError, show
from .file_store import FileStore, StoredFile
from .service import Service

Status = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]  # fmt: skip

_WINDOWS = {"24h": 24 * 3600}
_PREFIX = "batch_"
_MOST_KEPT = 1000  # batches of a tenant that have ended; older ones are forgotten
_ENDED = ("failed", "completed", "expired", "cancelled")


class Batch(records.Record):
    """What is remembered of a batch.

    Times are in seconds since 1970. `output_name` and `error_name` are ids for the files that it will leave, `ending`
    is what it will be when they are there, and `counts` what was in them.
    """

    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: float
    expires_at: float
    output_name: str
    error_name: str
    status: Status = "validating"
    metadata: dict[str, str] | None = None
    output_expires_after: int | None = None
    total: int = 0
    errors: list[LineError] = msgspec.field(default_factory=list)
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    ending: Literal["completed", "expired", "cancelled", "failed"] = "completed"
    counts: dict[str, Any] | None = None


class Progress:
    """The files that a batch writes, and what is in them."""

    def __init__(self, folder: Path, batch: Batch) -> None:
        self.output_path, self.error_path = folder / f"{batch.id}.output", folder / f"{batch.id}.errors"
        self.done: set[str] = set()
        self.completed = self.failed = 0
        self._tokens = {"input": 0, "cached": 0, "output": 0}
        for path in (self.output_path, self.error_path):
            for answer in _written_before(path):
                body = None if answer.response is None or answer.is_error else answer.response.body
                self._count(answer.custom_id, body)
        self._files: dict[Path, BinaryIO] = {}

    def answered(self, custom_id: str, status: int, body: dict[str, Any]) -> None:
        """Writes down what came back for a request."""
        self._write(self.output_path if status == 200 else self.error_path, answer_line(custom_id, status, body))
        self._count(custom_id, body if status == 200 else None)

    def unanswered(self, custom_id: str, code: str, message: str) -> None:
        """Writes down that a request was never run."""
        self._write(self.error_path, unanswered_line(custom_id, code, message))
        self._count(custom_id, None)

    def close(self) -> None:
        """All that was written survives a crash of the machine from now on."""
        for file in self._files.values():
            os.fsync(file.fileno())
            file.close()
        self._files.clear()

    def counts(self, total: int) -> dict[str, Any]:
        """Of requests, and of the tokens of those that were answered."""
        read, written = self._tokens["input"], self._tokens["output"]
        usage = {
            "input_tokens": read,
            "input_tokens_details": {"cached_tokens": self._tokens["cached"]},
            "output_tokens": written,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": read + written,
        }
        requests = {"total": total, "completed": self.completed, "failed": self.failed}
        return {"request_counts": requests, "usage": usage}

    def _write(self, path: Path, line: bytes) -> None:
        if path not in self._files:
            self._files[path] = path.open("ab")
        self._files[path].write(line)
        self._files[path].flush()

    def _count(self, custom_id: str, body: dict[str, Any] | None) -> None:
        self.done.add(custom_id)
        self.completed += body is not None
        self.failed += body is None
        used = (body or {}).get("usage") or {}
        self._tokens["input"] += used.get("prompt_tokens", used.get("input_tokens", 0))
        self._tokens["output"] += used.get("completion_tokens", used.get("output_tokens", 0))
        details = used.get("prompt_tokens_details", used.get("input_tokens_details")) or {}
        self._tokens["cached"] += details.get("cached_tokens", 0)


def _written_before(path: Path) -> Iterator[Answer]:
    """What an earlier server has written, up to where the disk has damaged it: the rest is answered again."""
    try:
        yield from written_answers(path)
    except NotAnAnswer as error:
        print(f"{path}: {error}; it and what follows it are answered again", file=sys.stderr, flush=True)
        os.truncate(path, error.offset)


class Batches:
    """The batches of all tenants. Each sees its own alone. `run` works on them until it is cancelled."""

    def __init__(self, service: Service, files: FileStore, folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._service, self._files, self._folder = service, files, folder
        self._batches = dict(records.read_all(folder, _PREFIX, Batch))
        for path in [*folder.glob("*.output"), *folder.glob("*.errors")]:
            if path.stem not in self._batches or self._batches[path.stem].status in _ENDED:
                path.unlink()
        self._progress: dict[str, Progress] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._leaving = False
        self._new = asyncio.Event()

    # -- what clients ask ---------------------------------------------------------------------------------------------

    def create(self, tenant: str, file: StoredFile, values: dict[str, Any]) -> Batch:
        """Begins a batch over the requests of `file`, as the checked fields say."""
        now, window = time.time(), values["completion_window"]
        batch = Batch(
            id=records.new_name(_PREFIX),
            tenant=tenant,
            endpoint=values["endpoint"],
            input_file_id=file.id,
            completion_window=window,
            created_at=now,
            expires_at=now + _WINDOWS[window],
            output_name=records.new_name("file-"),
            error_name=records.new_name("file-"),
            metadata=values["metadata"],
            output_expires_after=values["output_expires_after"],
        )
        self._save(batch)
        self._batches[batch.id] = batch
        self._forget_old(tenant)
        self._new.set()
        return batch

    def list(self, tenant: str) -> list[Batch]:
        """Of a tenant, the newest first."""
        mine = [batch for batch in self._batches.values() if batch.tenant == tenant]
        return sorted(mine, key=lambda batch: (batch.created_at, batch.id), reverse=True)

    def get(self, tenant: str, name: str) -> Batch:
        """Raises 404 where the tenant has no such batch."""
        batch = self._batches.get(name)
        if batch is None or batch.tenant != tenant:
            raise ApiError(404, f"There is no batch {show(name)}.", code="batch_not_found")
        return batch

    def cancel(self, batch: Batch) -> None:
        """Ends it soon, with the answers it has. Raises 400 for one that has ended, or is about to."""
        if batch.status in _ENDED or batch.status == "finalizing":
            raise ApiError(400, f"The batch is {batch.status}; it can't be cancelled any more.", code="batch_ended")
        if batch.status != "cancelling":
            batch.status, batch.ending, batch.cancelling_at = "cancelling", "cancelled", int(time.time())
            self._save(batch)
            if batch.id in self._tasks:  # else the next server's, or not begun
                self._tasks[batch.id].cancel()
            else:
                self._new.set()

    def reads(self, file: StoredFile) -> bool:
        """Whether a batch that has not ended needs the file."""
        return any(one.input_file_id == file.id and one.status not in _ENDED for one in self._batches.values())

    def shown(self, batch: Batch) -> dict[str, Any]:
        """As the API shows it."""
        times = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
        names = ["id", "endpoint", "input_file_id", "completion_window", "status"]
        names += ["output_file_id", "error_file_id", "metadata", *(f"{name}_at" for name in times)]
        whole = {name: int(getattr(batch, name)) for name in ("created_at", "expires_at")}
        errors = [msgspec.structs.asdict(error) for error in batch.errors]
        return {
            "object": "batch",
            **{name: getattr(batch, name) for name in names},
            **whole,
            "model": self._service.model_id,
            "errors": {"object": "list", "data": errors} if errors else None,
            **(batch.counts or self._progress_of(batch).counts(batch.total)),
        }

    # -- what becomes of them -----------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Begins and goes on with batches until it is cancelled, which leaves them to the next server."""
        try:
            await self._service.engine.started.wait()
            while True:
                self._new.clear()
                for batch in list(self._batches.values()):
                    if batch.status not in _ENDED and batch.id not in self._tasks:
                        self._begin(batch)
                await self._new.wait()
        finally:
            self._leaving = True
            tasks = list(self._tasks.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for progress in self._progress.values():
                progress.close()

    def _begin(self, batch: Batch) -> None:
        def ended(_: asyncio.Task[None]) -> None:
            del self._tasks[batch.id]
            self._new.set()  # one that was cancelled before it began is still to be ended

        self._tasks[batch.id] = asyncio.create_task(self._run_one(batch))
        self._tasks[batch.id].add_done_callback(ended)

    async def _run_one(self, batch: Batch) -> None:
        """From where it is to its end. Only leaving leaves it as it is."""
        try:
            try:
                await self._answer(batch)
            except asyncio.CancelledError:
                if self._leaving or batch.status != "cancelling":
                    raise
            except Exception as error:
                print(f"batch {batch.id} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
                message = f"The server failed on this batch: {_first(error)!r}."
                batch.ending, batch.errors = "failed", [LineError("server_error", message)]
            self._finish(batch)
        except Exception as error:  # a full disk, say: the next server goes on, this one does not try for ever
            print(f"batch {batch.id} can't be written down: {error}", file=sys.stderr, flush=True)
            batch.status = "failed"

    async def _answer(self, batch: Batch) -> None:
        if batch.status in ("cancelling", "finalizing"):
            return
        try:
            file = self._files.get(batch.tenant, batch.input_file_id)
        except ApiError as error:  # it has expired
            batch.ending, batch.errors = "failed", [LineError("file_not_found", error.message)]
            return
        path = self._files.path(file)
        places, errors = await asyncio.to_thread(read_lines, path, batch.endpoint, self._service.max_body_bytes)
        if errors:
            batch.ending, batch.errors = "failed", errors
            return
        if batch.status == "validating":
            batch.status, batch.in_progress_at, batch.total = "in_progress", int(time.time()), len(places)
            self._save(batch)
        progress = self._progress_of(batch)
        left = [place for place in places if place.custom_id not in progress.done]
        try:
            async with asyncio.timeout(batch.expires_at - time.time()):
                await run_lines(self._service, batch.endpoint, path, left, batch.tenant, progress.answered)
        except TimeoutError:
            batch.ending = "expired"
            message = f"The batch was not done within {batch.completion_window}."
            for place in left:
                if place.custom_id not in progress.done:
                    progress.unanswered(place.custom_id, "batch_expired", message)

    def _finish(self, batch: Batch) -> None:
        """Makes files of what was written. Each step may be done again, by a server that comes after a crash."""
        progress = self._progress_of(batch)
        progress.close()
        if batch.status == "in_progress":
            batch.status, batch.finalizing_at = "finalizing", int(time.time())
            self._save(batch)
        keep = (batch.tenant, batch.output_expires_after)
        if progress.completed:
            batch.output_file_id = self._adopt(batch.output_name, progress.output_path, *keep)
        if progress.failed:
            batch.error_file_id = self._adopt(batch.error_name, progress.error_path, *keep)
        batch.status, batch.counts = batch.ending, progress.counts(batch.total)
        setattr(batch, f"{batch.ending}_at", int(time.time()))
        self._save(batch)
        self._clear(batch)

    def _adopt(self, name: str, path: Path, tenant: str, expires_after: int | None) -> str:
        return self._files.adopt(name, path, tenant, path.name + ".jsonl", expires_after).id

    def _clear(self, batch: Batch) -> None:
        """What is written in other places by now."""
        progress = self._progress.pop(batch.id, None)
        if progress is not None:
            progress.close()
        for suffix in (".output", ".errors"):
            (self._folder / (batch.id + suffix)).unlink(missing_ok=True)

    def _forget_old(self, tenant: str) -> None:
        ended = [batch for batch in self.list(tenant) if batch.status in _ENDED]
        for batch in ended[_MOST_KEPT:]:
            del self._batches[batch.id]
            self._clear(batch)
            (self._folder / f"{batch.id}.json").unlink(missing_ok=True)

    def _progress_of(self, batch: Batch) -> Progress:
        if batch.id not in self._progress:
            self._progress[batch.id] = Progress(self._folder, batch)
        return self._progress[batch.id]

    def _save(self, batch: Batch) -> None:
        records.write(self._folder / f"{batch.id}.json", batch)


def _first(error: Exception) -> Exception:
    """What went wrong, of what may be a group."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error
