"""A group of requests on its way through the engine, and through the next one when that dies."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence

import msgspec

from ...checkpoints.tokenizer import Tokenizer
from ..detokenizer import Detokenizer
from ..request import Output, Request
from .errors import ApiError, engine_restarted

# A request that was at work when this many engines died is not given to another: it may be what kills them.
MOST_DEATHS = 2
# Outputs (steps with a token) that may wait for a reader. One that falls behind by more does not read at all.
MOST_UNREAD = 4096


class Generation:
    """The outputs of one group of requests, in the order they come; ends when each of them has finished.

    A new engine computes all from the beginning. The same seed gives the same tokens, so what the reader has already
    got is passed over, after a comparison: a stream goes on where it was, or ends with an error, but is never wrong.
    """

    def __init__(self, number: int, requests: Sequence[Request], tokenizer: Tokenizer) -> None:
        self.number = number
        self.sent = False  # to the engine that runs now
        self.deaths = 0
        self.admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._requests = {request.id: _seeded(request) for request in requests}
        self._texts = {request.id: Detokenizer(tokenizer, request.params) for request in requests}
        self._tokens: dict[str, list[int]] = {request.id: [] for request in requests}  # that were given out
        self._again: dict[str, int] = {}  # how many of them the new engine has computed
        self._ended: set[str] = set()  # as far as the engine is concerned; its reader may be behind
        self._error: ApiError | None = None
        self._queue: asyncio.Queue[Output | None] = asyncio.Queue()

    @property
    def left(self) -> list[Request]:
        """Those that have not ended."""
        return [request for name, request in self._requests.items() if name not in self._ended]

    @property
    def ids(self) -> list[str]:
        """Names of all its requests."""
        return list(self._requests)

    async def __aiter__(self) -> AsyncIterator[Output]:
        unread = set(self._requests)
        while unread:
            output = await self._queue.get()
            if output is None:
                assert self._error is not None
                raise self._error
            if output.finish_reason is not None:
                unread.discard(output.request_id)
            yield output

    def feed(self, output: Output) -> bool:
        """Takes what the engine says of a request, and gives it its text, which may end it (a stop string).

        False if the reader has it already. Raises ApiError: all ends.
        """
        name = output.request_id
        given, again = self._tokens[name], self._again.get(name)
        if again is not None and output.token_ids:
            end = again + len(output.token_ids)
            if end > len(given) or output.token_ids != given[again:end]:
                raise engine_restarted("The engine was started again, and computed other tokens than those sent.")
            if end < len(given):
                self._again[name] = end
            else:
                del self._again[name]
            return False
        if self._queue.qsize() >= MOST_UNREAD:
            raise ApiError(503, f"The client has not read its last {MOST_UNREAD} tokens.", code="client_too_slow")
        given += output.token_ids
        self._texts[name].fill(output)
        if output.finish_reason is not None:
            self._ended.add(name)
        self._queue.put_nowait(output)
        return True

    def engine_died(self) -> None:
        """To be sent again, if it was sent. Raises ApiError when it has been through this too often."""
        if not self.sent:
            return
        self.sent = False
        self.deaths += 1
        if self.deaths >= MOST_DEATHS:
            raise engine_restarted(
                f"The engine died {self.deaths} times while it worked on this request, which is not tried again."
            )
        self._again = {request.id: 0 for request in self.left if self._tokens[request.id]}

    def fail(self, error: ApiError) -> None:
        """Ends all of it."""
        self._error = error
        if not self.admitted.done():
            self.admitted.set_exception(error)
            self.admitted.exception()  # it may be that nobody waits any more
        self._queue.put_nowait(None)


def _seeded(request: Request) -> Request:
    """With a seed, so that another engine gives the same tokens."""
    if request.params.seed is not None:
        return request
    params = msgspec.structs.replace(request.params, seed=secrets.randbits(63))
    return msgspec.structs.replace(request, params=params)
