"""A server with the OpenAI API that says what the test has written down, byte by byte, and keeps what it was sent."""

import asyncio
import json
import threading
from collections.abc import Callable
from typing import Any

# What a script returns: status, and pieces of the body, each written on its own; None ends the connection there.
Script = Callable[[dict[str, Any]], tuple[int, list[bytes | None]]]


def events(*objects: Any, done: bool = True) -> list[bytes | None]:
    """Server-sent events."""
    return [b"data: " + json.dumps(one).encode() + b"\n\n" for one in objects] + [b"data: [DONE]\n\n"] * done


def text(words: str, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": words, "finish_reason": finish}], "usage": None}


def usage(prompt: int, output: int, cached: int = 0) -> dict[str, Any]:
    details = {"cached_tokens": cached}
    counts = {"prompt_tokens": prompt, "completion_tokens": output, "prompt_tokens_details": details}
    return {"choices": [], "usage": counts}


def echo(body: dict[str, Any]) -> tuple[int, list[bytes | None]]:
    """As many tokens as were asked for, two in each piece of text."""
    count = body["max_tokens"]
    pieces = [text(" ab")] * ((count - 1) // 2) + [text(" c", "length")]
    return 200, events(*pieces, usage(len(body["prompt"]), count))


class ScriptedServer:
    """Runs in a thread; `url`. Bodies that were posted to the generating routes are in `bodies`.

    Args:
        script: from a request's body to the answer.
        tokenize: /tokenize is there, and makes a number of each letter.
        model: what /v1/models says of the one model.
        keep_alive: connections stay open after an answer.
    """

    def __init__(
        self,
        script: Script = echo,
        tokenize: bool = True,
        model: dict[str, Any] | None = None,
        keep_alive: bool = True,
    ):
        self.script, self.tokenize, self.keep_alive = script, tokenize, keep_alive
        self.model = {"id": "scripted"} | (model or {})
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[str] = []
        self.connections = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        started = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop)
        self._server = started.result()
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def __enter__(self) -> "ScriptedServer":
        return self

    def __exit__(self, *error: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self) -> None:
        self._server.close()
        own = asyncio.current_task()
        tasks = [task for task in asyncio.all_tasks() if task is not own]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode():
                lines = head.lower().split("\r\n")
                size = next((int(line[15:]) for line in lines if line.startswith("content-length:")), 0)
                body = json.loads(await reader.readexactly(size)) if size else {}
                self.headers.append(head)
                if not await self._answer(head.split()[1], body, writer):
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has gone
        finally:
            writer.close()

    async def _answer(self, path: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        status, pieces = self._route(path, body)
        writer.write(f"HTTP/1.1 {status} Whatever\r\ntransfer-encoding: chunked\r\n".encode())
        writer.write(b"\r\n" if self.keep_alive else b"connection: close\r\n\r\n")
        for piece in pieces:
            if piece is None:
                return False
            writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            await writer.drain()
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return self.keep_alive

    def _route(self, path: str, body: dict[str, Any]) -> tuple[int, list[bytes | None]]:
        if path == "/v1/models":
            return 200, [json.dumps({"data": [self.model]}).encode()]
        if path == "/tokenize" and self.tokenize:
            return 200, [json.dumps({"tokens": [ord(letter) % 1000 for letter in body["prompt"]]}).encode()]
        if path in ("/v1/completions", "/v1/chat/completions"):
            self.bodies.append(body)
            return self.script(body)
        return 404, [b'{"error": {"message": "no such route"}}']
