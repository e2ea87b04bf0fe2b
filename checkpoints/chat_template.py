"""Chat templates: Jinja in a sandbox, with what Hugging Face gives them, so that the same template gives the same text.

A template comes with a model, so it is a program by a stranger. It runs in a process of its own (`template_child`), in
Jinja's sandbox, with limits on time and memory. The process starts with the first conversation, and stays.
"""

import atexit
import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import IO, Any

CPU_SECONDS = 5  # of one conversation; a megabyte of text takes a tenth of one
PATIENCE_SECONDS = 60.0  # by the clock, which goes on where a process does not: it may have been stopped
_LENGTH = struct.Struct(">Q")


class ChatTemplateError(ValueError):
    """There is no chat template, or it does not compile, or it refused the conversation."""


class ChatTemplateTimeout(ChatTemplateError):
    """The process that renders said nothing, whatever the conversation."""


def send(stream: IO[bytes], message: dict[str, Any]) -> None:
    """Writes JSON after its length."""
    data = json.dumps(message).encode()
    stream.write(_LENGTH.pack(len(data)) + data)
    stream.flush()


def receive(stream: IO[bytes]) -> dict[str, Any] | None:
    """What was sent; None when the other side has ended."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    data = stream.read(length)
    return None if len(data) < length else json.loads(data)


class Renderer:
    """The process that renders; started with the first conversation, again when it has ended, and after a fork.

    Args:
        cpu_seconds: of one conversation, at most (and up to one more).
        patience: seconds that it may say nothing.
    """

    def __init__(self, cpu_seconds: int, patience: float = PATIENCE_SECONDS):
        self._seconds, self._patience, self._lock, self._owner = cpu_seconds, patience, threading.Lock(), 0
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Its answer. ChatTemplateError when it died of the request, ChatTemplateTimeout when two said nothing."""
        with self._lock:
            for _ in range(2):
                process, late = self._running(), threading.Event()

                def end(process: subprocess.Popen[bytes] = process, late: threading.Event = late) -> None:
                    late.set()
                    process.kill()  # which ends what waits for it below

                timer = threading.Timer(self._patience, end)
                timer.start()
                try:
                    answer = self._exchange(process, request)
                finally:
                    timer.cancel()
                    timer.join()  # it kills now or never
                if answer is not None:
                    if "last" in answer or late.is_set():
                        self._end()
                    return answer
                status = self._end()
                if not late.is_set():
                    break
            else:
                raise ChatTemplateTimeout(
                    f"the process of chat templates said nothing for {self._patience:g} s, and neither did a new one"
                )
        reason = f"ended its process with status {status}"
        if status == -signal.SIGXCPU:
            reason = f"took more than {self._seconds} seconds of CPU time on this conversation, and was stopped"
        raise ChatTemplateError(f"the chat template {reason}")

    def _exchange(self, process: subprocess.Popen[bytes], request: dict[str, Any]) -> dict[str, Any] | None:
        """Its answer; None when it has ended."""
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            send(process.stdin, request)
            return receive(process.stdout)
        except BrokenPipeError:
            return None
        except BaseException:  # its answer would be taken for the next one's
            process.kill()
            self._end()
            raise

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            command = [sys.executable, "-P", "-m", "twinax.checkpoints.template_child", str(self._seconds)]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            self._owner = os.getpid()
        return self._process

    def _end(self) -> int | None:
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return None
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        return process.wait()

    def close(self) -> None:
        """Ends the process."""
        with self._lock:
            self._end()


_renderer = Renderer(CPU_SECONDS)
atexit.register(_renderer.close)


def _plain(value: Any, where: str) -> Any:
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [_plain(item, f"{where}[{n}]") for n, item in enumerate(value)]
    raise ChatTemplateError(
        f"a chat template takes JSON values (text, numbers, lists, objects), but {where} is a {type(value).__name__}"
    )


def render(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> str:
    """The prompt for a conversation.

    Args:
      source: the Jinja template.
      messages: dicts with "role" and "content", as in the OpenAI API.
      tools: JSON schemas of functions, or None.
      add_generation_prompt: whether to open the assistant's turn at the end.
      variables: more names for the template (`bos_token`, `eos_token`, `documents`, a template's own switches).

    Raises:
      ChatTemplateError: the template does not compile, refuses the conversation (`raise_exception`), fails in it, or
        takes more time or memory than it may.
    """
    if "continue_final_message" in variables:
        raise ChatTemplateError(
            "continue_final_message is not supported, and a template would not see it: render the conversation without "
            "its last message, with add_generation_prompt=True, and append what that message begins with"
        )
    context: dict[str, Any] = {"documents": None} | {name: _plain(value, name) for name, value in variables.items()}
    context |= {"messages": _plain(messages, "messages"), "tools": _plain(tools, "tools")}
    context["add_generation_prompt"] = add_generation_prompt
    answer = _renderer.ask({"template": source, "context": context})
    if "error" in answer:
        raise ChatTemplateError(f"the chat template {answer['error']}")
    return answer["text"]
