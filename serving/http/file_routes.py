"""/v1/files and /v1/batches. A server that was started without a folder for files answers 404 to all of them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from . import fields, records
from .batch_work import ENDPOINTS
from .batches import Batches
from .body import read_json
from .config import ServeConfig
from .errors import ApiError, bad
from .file_store import FileStore, StoredFile
from .records import one_page
from .service import Service
from .uploads import read_form


@dataclass(frozen=True)
class Kept:
    """What a server keeps in its folder for files."""

    files: FileStore
    batches: Batches


def keep(service: Service, config: ServeConfig) -> Kept | None:
    """As the settings say; None: nothing. Raises ValueError or OSError for a folder that can't be used."""
    if config.files is None:
        return None
    folder = Path(config.files).expanduser()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"files can't be kept in {folder}: {error.strerror}; choose another folder") from None
    records.lock(folder)  # held until this process ends
    files = FileStore(folder / "files", max_bytes=config.max_file_bytes, max_files=config.max_files)
    return Kept(files, Batches(service, files, folder / "batches"))


class FileRoutes:
    """The handlers."""

    def __init__(self, service: Service, kept: Kept | None) -> None:
        self._service, self._kept = service, kept

    def routes(self) -> list[Route]:
        return [
            Route("/v1/files", _Body(self.upload), methods=["POST"]),
            Route("/v1/files", self.list_files, methods=["GET"]),
            Route("/v1/files/{file}", self.show_file, methods=["GET"]),
            Route("/v1/files/{file}", self.delete_file, methods=["DELETE"]),
            Route("/v1/files/{file}/content", self.content, methods=["GET"]),
            Route("/v1/batches", _Body(self.create_batch), methods=["POST"]),
            Route("/v1/batches", self.list_batches, methods=["GET"]),
            Route("/v1/batches/{batch}", self.show_batch, methods=["GET"]),
            Route("/v1/batches/{batch}/cancel", self.cancel_batch, methods=["POST"]),
        ]

    @property
    def _files(self) -> FileStore:
        return self._folder().files

    @property
    def _batches(self) -> Batches:
        return self._folder().batches

    def _folder(self) -> Kept:
        if self._kept is None:
            raise ApiError(404, "This server keeps no files; start it with --files FOLDER.", code="no_files")
        return self._kept

    # -- files --------------------------------------------------------------------------------------------------------

    async def upload(self, scope: Scope, receive: Receive) -> Response:
        files = self._files
        files.check_room(scope["tenant"])  # before it is read for nothing
        form = await read_form(scope, receive, files.max_bytes)
        given = form.get("file")
        try:
            values = fields.parse_object(None, form, fields.UPLOAD)
            if not isinstance(given, UploadFile):
                raise bad("file", "'file' must be a file of the form, with a filename; it is a field.", "invalid_type")
            if (given.size or 0) > files.max_bytes:
                message = f"The file has {given.size} bytes; this server keeps at most {files.max_bytes} a file."
                raise ApiError(413, message, param="file", code="body_too_large")
            name = (given.filename or "")[:255]
            added = await files.add(scope["tenant"], name, values["purpose"], given.file, values["expires_after"])
            return _json(added.shown())
        finally:
            if isinstance(given, UploadFile):
                await given.close()

    async def list_files(self, request: Request) -> Response:
        files = self._files
        query = _query(request, fields.LIST_FILES)
        found = files.list(request.scope["tenant"])
        if query["purpose"] is not None:
            found = [file for file in found if file.purpose == query["purpose"]]
        if query["order"] == "desc":
            found.reverse()
        return _json(one_page(found, query, StoredFile.shown))

    def _file(self, request: Request) -> StoredFile:
        return self._files.get(request.scope["tenant"], request.path_params["file"])

    async def show_file(self, request: Request) -> Response:
        return _json(self._file(request).shown())

    async def delete_file(self, request: Request) -> Response:
        file = self._file(request)
        if self._batches.reads(file):
            raise ApiError(400, "A batch that has not ended needs this file; cancel it first.", code="file_in_use")
        self._files.remove(file)
        return _json({"id": file.id, "object": "file", "deleted": True})

    async def content(self, request: Request) -> Response:
        return FileResponse(self._files.path(self._file(request)), media_type="application/octet-stream")

    # -- batches ------------------------------------------------------------------------------------------------------

    async def create_batch(self, scope: Scope, receive: Receive) -> Response:
        batches, tenant = self._batches, scope["tenant"]
        body = await read_json(scope, receive, self._service.max_body_bytes)
        values = fields.parse_object(None, body, fields.BATCH)
        fields.one_of(*ENDPOINTS)("endpoint", values["endpoint"])
        file = self._files.get(tenant, values["input_file_id"], "input_file_id", 400)
        if file.purpose != "batch":
            raise bad("input_file_id", f"'input_file_id' must be a file for batches; its purpose is '{file.purpose}'.")
        return _json(batches.shown(batches.create(tenant, file, values)))

    async def list_batches(self, request: Request) -> Response:
        batches = self._batches
        query = _query(request, fields.LIST_BATCHES)
        return _json(one_page(batches.list(request.scope["tenant"]), query, batches.shown))

    async def show_batch(self, request: Request) -> Response:
        batches = self._batches
        return _json(batches.shown(batches.get(request.scope["tenant"], request.path_params["batch"])))

    async def cancel_batch(self, request: Request) -> Response:
        batches = self._batches
        batch = batches.get(request.scope["tenant"], request.path_params["batch"])
        batches.cancel(batch)
        return _json(batches.shown(batch))


class _Body:
    """A route whose handler reads the body itself."""

    def __init__(self, handler: Callable[[Scope, Receive], Awaitable[Response]]) -> None:
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await (await self._handler(scope, receive))(scope, receive, send)


def _query(request: Request, table: dict[str, fields.Field]) -> dict[str, Any]:
    """Checked query parameters."""
    pairs = request.query_params.multi_items()
    given = dict(pairs)
    if len(given) != len(pairs):
        raise ApiError(400, "A query parameter is given twice.", code="invalid_value")
    return fields.parse_object(None, given, table)


def _json(body: Any) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")
