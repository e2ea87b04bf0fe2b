"""An engine process without a model, which starts in a tenth of a second: for tests that kill many.

All but `Engine` is the real engine process. Its tokens hang on seed, prompt and position alone, as the real ones do.
"""

import argparse
import os
import signal
import sys
import time
import zlib

from twinax.checkpoints.tokenizer import Tokenizer
from twinax.serving import wire
from twinax.serving.engine_process import EngineServer, Inbox, Pulse, Reader
from twinax.serving.request import Output, Request

# First tokens of prompts that are no good for an engine; it happens at their third token.
KILLS, EXITS, HANGS, BABBLES = 1001, 1002, 1003, 1004
# The first token of a prompt at whose token WAITS_AT the engine waits until there is a file: what a test does in the
# midst of an answer happens in its midst, however late the test comes.
WAITS, WAITS_AT = 1005, 10
GO_FILE = "TWINAX_PRETEND_GO"  # the variable with the file's name
PAGES = 8
MAX_RUNNING = 4
STEP_SECONDS = 0.002
# The model's name says how a start goes wrong.
NO_MODEL, DIES_AT_START, HANGS_AT_START = "no model", "dies at start", "hangs at start"


def token(request: Request, position: int) -> int:
    """What the request gets at a position of its output."""
    return zlib.crc32(repr((request.params.seed, request.prompt_ids, position)).encode()) % 1000


class Engine:
    """As many requests as there are slots get a token each a step, one page each."""

    def __init__(self, channel: wire.BlockingChannel):
        self._channel = channel
        self._requests: dict[str, Request] = {}
        self._counts: dict[str, int] = {}
        self._steps = 0

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def stats(self) -> wire.Stats:
        running = min(len(self._requests), MAX_RUNNING)
        return wire.Stats(
            running=running,
            waiting=len(self._requests) - running,
            pages_used=running,
            pages_total=PAGES,
            steps=self._steps,
        )

    def add(self, request: Request) -> None:
        assert request.params.seed is not None
        if request.id in self._requests:
            raise ValueError(f"{request.id} is here already")
        self._requests[request.id] = request
        self._counts[request.id] = 0

    def cancel(self, request_id: str) -> bool:
        return self._requests.pop(request_id, None) is not None

    def step(self) -> list[Output]:
        time.sleep(STEP_SECONDS)
        self._steps += 1
        outputs = []
        for request in list(self._requests.values())[:MAX_RUNNING]:
            position = self._counts[request.id]
            self._counts[request.id] += 1
            if position == 2:
                self._misbehave(request.prompt_ids[0])
            if position == WAITS_AT and request.prompt_ids[0] == WAITS:
                while not os.path.exists(os.environ[GO_FILE]):
                    time.sleep(STEP_SECONDS)
            done = position + 1 == request.params.max_tokens
            outputs.append(
                Output(
                    request.id,
                    [token(request, position)],
                    finish_reason="length" if done else None,
                    prompt_tokens=len(request.prompt_ids),
                    completion_tokens=position + 1,
                )
            )
            if done:
                del self._requests[request.id]
        return outputs

    def _misbehave(self, how: int) -> None:
        if how == KILLS:
            os.kill(os.getpid(), signal.SIGSEGV)
        elif how == EXITS:
            print("these are my last words", file=sys.stderr, flush=True)
            os._exit(3)
        elif how == HANGS:
            time.sleep(3600)
        elif how == BABBLES:
            self._channel._sock.sendall(b"\x00\x00\x00\x05hello")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", required=True)
    channel, inbox = wire.BlockingChannel.connect(parser.parse_args().socket), Inbox()
    start = channel.receive()
    assert isinstance(start, wire.Start)
    reader = Reader(channel, inbox)
    reader.start()
    model = start.settings.model
    if model == NO_MODEL:
        channel.send(wire.Failed("there is no model", user_error=True))
        os._exit(1)
    if model == DIES_AT_START:
        os.kill(os.getpid(), signal.SIGKILL)
    if model == HANGS_AT_START:
        time.sleep(3600)
    with Pulse(channel) as pulse:
        pulse.say("pretending")
        engine = Engine(channel)
    reader.serving.set()
    ready = wire.Ready(
        model=model,
        family="pretend",
        tokenizer_files=Tokenizer.bytes().files(),
        vocab_size=2000,
        hidden_size=8,
        max_model_len=10_000,
        max_running=MAX_RUNNING,
        max_waiting=60,
        cache_tokens=10_000,
        fingerprint="fp",
        load_seconds=0.0,
        warmup_seconds=0.0,
    )
    channel.send(ready)
    EngineServer(engine, channel, inbox).run()  # pyright: ignore[reportArgumentType]
    os._exit(0)


if __name__ == "__main__":
    main()
