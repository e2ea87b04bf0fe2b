"""Hostile chat templates: what they reach, how long they run, how much memory they take."""

import multiprocessing
import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from twinax.checkpoints import chat_template
from twinax.checkpoints.chat_template import CPU_SECONDS, ChatTemplateError, ChatTemplateTimeout, Renderer, render


@pytest.fixture(scope="module")
def hasty():
    """Allows a conversation less than a second of CPU time."""
    renderer = Renderer(0)
    yield renderer
    renderer.close()


def ask(renderer, template, **context):
    return renderer.ask({"template": template, "context": {"messages": [], **context}})


@pytest.mark.parametrize(
    "template",
    [
        "{{ 9 ** (9 ** 9) }}",  # one instruction of the interpreter, which no check in it would stop
        pytest.param(
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", marks=pytest.mark.slow
        ),
        pytest.param(
            "{% macro a(n) %}{{ a(n + 1) if n < 60 }}{{ a(n + 1) if n < 60 }}{% endmacro %}{{ a(0) }}",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_nothing_runs_for_ever(hasty, template):
    with pytest.raises(ChatTemplateError, match="took more than 0 seconds of CPU time on this conversation"):
        ask(hasty, template)
    assert ask(hasty, "{{ 1 + 1 }}") == {"text": "2"}


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10 ** 9 }}",
        "{{ 'a'.ljust(10 ** 10) }}",
        "{{ ['a'] * 10 ** 9 }}",
        "{{ '%1000000000d' % 1 }}",
        "{% set x = 'aaaaaaaa' %}" + "{% set x = x ~ x %}" * 30 + "{{ x }}",
        "{% set x %}aaaaaaaa{% endset %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 30 + "{{ x }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(40) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    ],
)
def test_nothing_takes_a_gigabyte(template):
    with pytest.raises(ChatTemplateError, match="needs more than 512 MB of memory"):
        render(template, [])
    assert render("{{ 1 + 1 }}", []) == "2"


def process_of(renderer: Renderer) -> subprocess.Popen:
    assert renderer._process is not None
    return renderer._process


def held() -> int:
    """Bytes of memory of this process."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def test_the_memory_of_this_process_does_not_grow(hasty):
    ask(hasty, "")
    before = held()
    with pytest.raises(ChatTemplateError):
        render("{{ 'a' * 10 ** 9 }}", [])
    assert held() - before < 50e6


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__ }}",
        "{{ ''['__class__'] }}",
        "{{ '' | attr('__class__') }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ '{x.__class__}'.format_map({'x': 1}) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ joiner.__init__.__globals__.os.getcwd() }}",
        "{{ self.__init__.__globals__ }}",
        "{{ self._TemplateReference__context.environment }}",
        "{{ strftime_now.__globals__ }}",
        "{{ tojson.__globals__ }}",
        "{{ dict.__call__.__func__.__globals__ }}",
        "{% macro m() %}{% endmacro %}{{ m._environment }}",
        "{% for x in [1] recursive %}{{ loop.__class__ }}{% endfor %}",
        "{{ namespace.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os }}",
        "{% extends '/etc/passwd' %}",
        "{{ messages.append(1) }}",
        "{{ range.mro() }}",
        "{{ (1).real.__class__ }}",
        "{{ undefined_name.__class__ }}",
    ],
)
def test_nothing_reaches_python(template):
    """It is refused, or gives an empty text: never the name of anything inside."""
    try:
        text = render(template, [])
    except ChatTemplateError:
        return
    assert text == ""


def test_a_template_that_is_text_is_never_run_twice():
    assert render("{{ messages[0].content }}", [{"role": "user", "content": "{{ 7 * 7 }}{% for %}"}]) == (
        "{{ 7 * 7 }}{% for %}"
    )


def test_it_writes_no_files(tmp_path):
    """Even a template that came out of Jinja's sandbox could not: the process is not allowed to."""
    render("", [])
    limits = Path(f"/proc/{process_of(chat_template._renderer).pid}/limits").read_text().splitlines()
    said = {line[:26].strip(): line[26:].split()[:2] for line in limits[1:]}
    assert said["Max file size"] == ["0", "0"]
    assert said["Max address space"] == [str(512 << 20)] * 2
    assert int(said["Max cpu time"][0]) < 60


def test_it_comes_back_when_it_was_killed(hasty):
    ask(hasty, "")
    process_of(hasty).send_signal(signal.SIGKILL)
    process_of(hasty).wait()
    assert ask(hasty, "{{ x }}", x=3) == {"text": "3"}


class Stopped(Renderer):
    """Of its processes the next `count` are stopped, and waited for in vain."""

    count = 0

    def _running(self) -> subprocess.Popen[bytes]:
        process = super()._running()
        self._patience = 0.2 if self.count else 60.0
        if self.count:
            self.count -= 1
            process.send_signal(signal.SIGSTOP)
        return process


@pytest.mark.parametrize("text", ["3", "3" * 300_000], ids=["short", "longer than a pipe holds"])
def test_one_that_hangs_is_replaced(text):
    renderer = Stopped(CPU_SECONDS)
    try:
        ask(renderer, "")
        first, renderer.count = process_of(renderer), 1
        assert ask(renderer, "{{ x }}", x=text) == {"text": text}
        assert first.returncode == -signal.SIGKILL
        second, renderer.count = process_of(renderer), 2
        with pytest.raises(ChatTemplateTimeout, match=r"said nothing for 0\.2 s, and neither did a new one"):
            ask(renderer, "{{ x }}", x=text)
        assert second.returncode == -signal.SIGKILL
        assert ask(renderer, "{{ x }}", x=text) == {"text": text}
    finally:
        renderer.close()


def test_ctrl_c_in_the_terminal_does_not_end_it(hasty):
    ask(hasty, "")
    process_of(hasty).send_signal(signal.SIGINT)
    assert ask(hasty, "{{ x }}", x=3) == {"text": "3"}


def test_answers_belong_to_their_questions(hasty, monkeypatch):
    """Interrupted between a question and its answer, the next question does not get that answer."""

    def interrupt(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(chat_template, "receive", interrupt)
        with pytest.raises(KeyboardInterrupt):
            ask(hasty, "the old one")
    assert ask(hasty, "the new one") == {"text": "the new one"}


def test_many_threads():
    found: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda n=n: found.update({n: render("{{ messages[0].content }}", [{"content": n}])}))
        for n in range(40)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: str(n) for n in range(40)}


def _in_fork(pipe) -> None:
    pipe.send(render("{{ messages[0].content }}", [{"content": "of the fork"}]))
    chat_template._renderer.close()
    os._exit(0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")
def test_a_fork_has_a_process_of_its_own():
    render("", [])
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_in_fork, args=(theirs,))
    child.start()
    assert ours.recv() == "of the fork"
    child.join()
    assert render("{{ messages[0].content }}", [{"content": "ours"}]) == "ours"


def test_it_ends_with_its_parent():
    renderer = Renderer(5)
    ask(renderer, "")
    process = process_of(renderer)
    renderer.close()
    assert process.returncode == 0
