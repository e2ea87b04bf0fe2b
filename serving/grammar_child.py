"""The process in which grammars are tried out: `python -m twinax.serving.grammar_child`.

A grammar is a program by a stranger, for a compiler that can't be interrupted. Each is compiled in a fork of this
process, with limits on CPU time, memory and stack; what it dies of is said in the answer. A grammar that passes may be
compiled beside the engine's steps, where it takes no more.

It reads a `Vocabulary`, then any number of grammars, and answers each with what is wrong with it, or with "".
"""

import contextlib
import os
import random
import resource
import signal
import struct
import sys
import threading
from typing import IO

import msgspec

from ..checkpoints.tokenizer import Tokenizer
from .grammar import THREAD_STACK, GrammarError, Grammars
from .request import Grammar

CPU_SECONDS = 0.6  # of one grammar
MEMORY = 384 << 20  # bytes of address space, more than the process has before
STACK = THREAD_STACK // 4  # so that a grammar that passes here does not exhaust the engine's
_WALKS, _WALK_TOKENS = 2, 64
_LENGTH = struct.Struct(">Q")


class Vocabulary(msgspec.Struct):
    """The files of a tokenizer by name, and the number of the model's tokens."""

    files: dict[str, bytes]
    vocab_size: int


def send(stream: IO[bytes], message: Vocabulary | Grammar | str) -> None:
    """Writes msgpack after its length."""
    data = msgspec.msgpack.encode(message)
    stream.write(_LENGTH.pack(len(data)) + data)
    stream.flush()


def receive(stream: IO[bytes]) -> bytes | None:
    """What was sent; None when the other side has ended."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    data = stream.read(length)
    return None if len(data) < length else data


def try_out(grammars: Grammars, plain: frozenset[int], grammar: Grammar) -> None:
    """Compiles it and follows it a little way, by plain characters where it has a choice. Raises GrammarError."""
    for walk in range(_WALKS):
        matcher, generator = grammars.matcher(grammar, ends=False), random.Random(walk)
        for _ in range(_WALK_TOKENS):
            found = matcher.following()
            found = [token for token in found if token in plain] or found
            if not found or matcher.push(generator.choice(found)):
                break


def verdict(grammars: Grammars, plain: frozenset[int], grammar: Grammar) -> str:
    """What is wrong with a grammar, found out in a fork."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reading)
        _limit()
        threading.stack_size(STACK)
        thread = threading.Thread(target=_report, args=(grammars, plain, grammar, writing))
        thread.start()
        thread.join()
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as answer:
        data = answer.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status == 0:
        return data.decode()
    if status == -signal.SIGPROF:
        return f"it takes more than {CPU_SECONDS} seconds to compile; make it smaller"
    if status == -signal.SIGSEGV:
        return "it is nested too deeply; references count too"
    return f"it takes more than {MEMORY >> 20} MB of memory; make it smaller"


def _limit() -> None:
    with open("/proc/self/statm") if os.path.exists("/proc/self/statm") else contextlib.nullcontext() as file:
        used = int(file.read().split()[0]) * resource.getpagesize() if file else 0
    if used:  # elsewhere the limit is known, and refused
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)


def _report(grammars: Grammars, plain: frozenset[int], grammar: Grammar, writing: int) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what a library says before it dies of a grammar is for nobody
    error = ""
    try:
        try_out(grammars, plain, grammar)
    except GrammarError as found:
        error = str(found)
    except MemoryError:
        os._exit(1)
    except BaseException as found:  # the library's panics are no Exceptions
        error = f"the compiler fails on it ({type(found).__name__}: {found})"
    os.write(writing, error.encode()[:4096])


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, whose end of the pipe ends this
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    data = receive(sys.stdin.buffer)
    if data is None:
        return
    given = msgspec.msgpack.decode(data, type=Vocabulary)
    tokenizer = Tokenizer.from_files(given.files)
    grammars = Grammars(tokenizer, given.vocab_size, tokenizer.eos_ids or (given.vocab_size - 1,))
    with contextlib.suppress(GrammarError):  # which every grammar will be answered with
        grammars.load()
    texts = [tokenizer.token_bytes(token) for token in range(given.vocab_size)]
    plain = frozenset(token for token, text in enumerate(texts) if len(text) == 1 and 0x20 < text[0] < 0x7F)
    while (data := receive(sys.stdin.buffer)) is not None:
        send(sys.stdout.buffer, verdict(grammars, plain, msgspec.msgpack.decode(data, type=Grammar)))


if __name__ == "__main__":
    main()
