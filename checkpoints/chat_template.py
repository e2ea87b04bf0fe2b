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
_LENGTH = struct.Struct(">Q")


class ChatTemplateError(ValueError):
    """There is no chat template, or it does not compile, or it refused the conversation."""


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
    """

    def __init__(self, cpu_seconds: int):
        self._seconds, self._lock, self._owner = cpu_seconds, threading.Lock(), 0
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Its answer. ChatTemplateError when it died of the request."""
        with self._lock:
            process = self._running()
            stdin, stdout = process.stdin, process.stdout
            assert stdin is not None
            assert stdout is not None
            try:
                send(stdin, request)
                answer = receive(stdout)
            except BrokenPipeError:
                answer = None
            except BaseException:  # its answer would be taken for the next one's
                process.kill()
                self._end()
                raise
            if answer is not None:
                if "last" in answer:
                    self._end()
                return answer
            status = self._end()
        reason = f"ended its process with status {status}"
        if status == -signal.SIGXCPU:
            reason = f"took more than {self._seconds} seconds of CPU time on this conversation, and was stopped"
        raise ChatTemplateError(f"the chat template {reason}")

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
