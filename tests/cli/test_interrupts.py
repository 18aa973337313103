"""Ctrl-C and SIGTERM end a command with 130, also where other code swallows them or makes another error of them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import click
import pytest

from patcher import cli
from patcher.cli.progress import progress


@pytest.fixture(autouse=True)
def own_handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Swallows:
    """Python reports what a destructor raises, and goes on."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.kill(os.getpid(), self.number)
        for _ in range(1000):
            pass


def run(monkeypatch: pytest.MonkeyPatch, body: object) -> int | str | None:
    command = click.Command("demo", callback=body)  # type: ignore[arg-type]
    monkeypatch.setattr(cli._Commands, "get_command", lambda *_: command)
    with pytest.raises(SystemExit) as done:
        cli.main(["demo"])
    return done.value.code


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_that_became_another_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    def body() -> None:
        try:
            os.kill(os.getpid(), number)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape") from None

    assert run(monkeypatch, body) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_swallowed_interrupt_is_obeyed_at_the_next_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    reached = []

    def body() -> None:
        with progress() as say:
            say("first")
            held = Swallows(number)
            del held
            reached.append("after")
            say("second")
            reached.append("never")

    assert run(monkeypatch, body) == 130
    assert reached == ["after"]
    assert "second" not in capsys.readouterr().err


def test_an_error_of_its_own_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def body() -> None:
        raise ValueError("of its own")

    command = click.Command("demo", callback=body)
    monkeypatch.setattr(cli._Commands, "get_command", lambda *_: command)
    with pytest.raises(ValueError, match="of its own"):
        cli.main(["demo"])


def test_ctrl_c_that_is_ignored_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def body() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    assert run(monkeypatch, body) == 0
