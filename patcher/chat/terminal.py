"""Where answers go: the loop of a person at a terminal, whose answers can be stopped, and prompts one after another."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterable, Iterator

from rich.console import Console

from patcher.chat.commands import MARK, Quit, obey
from patcher.chat.display import Columns, Lines, display, printable
from patcher.chat.session import Answer, Session
from patcher.errors import PatchModelError

PROMPT = "> "


class Stopped(KeyboardInterrupt):
    """Ctrl+C of a session, in difference to a SIGTERM."""


class Interrupts:
    """Ctrl+C: once an answer is being written, the first ends it after its next token; any other one is raised."""

    def __init__(self) -> None:
        self.writing = False
        self.asked = False

    def heed(self, _signal: int, _frame: object) -> None:
        """The handler."""
        if self.writing and not self.asked:
            self.asked = True
            return
        raise Stopped

    @contextlib.contextmanager
    def one_turn(self) -> Iterator[None]:
        """While a line is obeyed or answered."""
        self.writing = self.asked = False
        try:
            yield
        finally:
            self.writing = False


def converse(session: Session, console: Console) -> None:
    """Read prompts and commands until Ctrl+D or ``/quit``; errors are told, and the session goes on."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - editing of the line, and the lines before
    interrupts = Interrupts()
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, interrupts.heed)
    try:
        for line in session.introduction():
            _say(console, line)
        _say(console, "/help lists the commands; Ctrl+C stops an answer, Ctrl+D ends")
        with contextlib.suppress(Quit, EOFError):
            while True:
                _turn(session, console, interrupts)
    finally:
        signal.signal(signal.SIGINT, before)


def _turn(session: Session, console: Console, interrupts: Interrupts) -> None:
    try:
        line = _read(console)
    except EOFError:
        console.print()
        raise
    except Stopped:
        console.print()
        return
    if not line.strip():
        return
    screen = _Screen(session, display(console, len(session.names)), interrupts)
    said, style = "", "dim"
    try:
        with interrupts.one_turn():
            if line.startswith(MARK) and not line.startswith(MARK * 2):
                said = obey(line, session, screen)
            else:
                session.answer(line.removeprefix(MARK), screen)
    except PatchModelError as error:
        said, style = str(error), "red"
    except Stopped:
        said = "stopped"
    finally:
        screen.close()
    if said or interrupts.asked:
        _say(console, said or "stopped", style)


class _Screen:
    """Passes an answer on to a display, which begins with its first token."""

    def __init__(self, session: Session, shown: Lines | Columns, interrupts: Interrupts) -> None:
        self._session, self._shown, self._interrupts = session, shown, interrupts
        self._texts: list[str] | None = None

    def __call__(self, texts: list[str], finished: int) -> bool:
        if self._texts is None:
            self._shown.begin(self._session.labels)
            self._interrupts.writing = True
        self._texts = list(texts)
        self._shown.show(texts, finished)
        return not self._interrupts.asked

    def close(self) -> None:
        if self._texts is not None:
            self._shown.end(self._texts)
            self._texts = None


def answer_all(session: Session, prompts: Iterable[str], console: Console | None) -> list[Answer]:
    """Answer prompts one after the other, each as a conversation of its own.

    Args:
        console: where answers are shown as they are written, or None.

    Raises:
        InputError, OutsideError: see :meth:`patcher.chat.session.Session.answer`; what was shown before stays.
    """
    found = []
    for prompt in prompts:
        session.reset()
        if console is None:
            found.append(session.answer(prompt))
            continue
        _say(console, f"prompt: {printable(prompt)}")
        screen = _Screen(session, display(console, len(session.names)), Interrupts())
        try:
            found.append(session.answer(prompt, screen))
        finally:
            screen.close()
    return found


def _read(console: Console) -> str:
    # Where the answers go to a file, the sign that a line is awaited does not belong into it.
    if console.is_terminal:
        return input(PROMPT)
    sys.stderr.write(PROMPT)
    sys.stderr.flush()
    return input()


def _say(console: Console, text: str, style: str = "dim") -> None:
    console.print(text, style=style, soft_wrap=True, markup=False, highlight=False)
