"""``patch-model chat``: base and steered model side by side."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from io import TextIOWrapper
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from patcher.cli.options import quiet as quiet_option
from patcher.errors import InputError

if TYPE_CHECKING:
    from patcher.chat.opening import Opened


@click.command("chat", short_help="Try a vector out: base and steered model side by side.")
@click.argument("source", metavar="DIR|RECIPE", type=click.Path(path_type=Path))
@click.option("-p", "--prompt", "prompts", metavar="TEXT", multiple=True, help="Answer this and end; may be repeated.")
@click.option(
    "-c",
    "--coefficient",
    metavar="X",
    type=float,
    help="The vector's coefficient, as in a recipe; of several vectors, what multiplies them all. 0 adds nothing.",
)
@click.option("--layer", metavar="N", type=int, help="Add it after another decoder block (0-based; -1: the embedding).")
@click.option("--temperature", metavar="T", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--seed", metavar="N", type=int, default=0, show_default=True, help="Of the sampling, for both sides.")
@click.option("--max-tokens", metavar="N", type=int, default=100, show_default=True, help="The longest answer.")
@click.option("--system", metavar="TEXT", help="A system prompt for both sides.")
@click.option(
    "--switch",
    "switches",
    metavar="KEY=VALUE",
    multiple=True,
    help="A switch of the chat template, as enable_thinking=false; by default those that the vector was made with.",
)
@click.option("--plain", is_flag=True, help="Continue prompts as plain text, although the model has a chat template.")
@click.option("--no-base", is_flag=True, help="Only the steered side.")
@click.option("--baked", is_flag=True, help="Run the patched folder itself as a second model, instead of a hook.")
@click.option("--base", metavar="PATH", help="The base model, if it has moved: a folder or a Hub id.")
@click.option("--adapter", metavar="PATH", help="The adapter that was merged, if it has moved.")
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Change a key of RECIPE.")
@click.option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps.")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), help="Of the model in memory.")
@click.option("--trust-remote-code", is_flag=True, help="Allow code that comes with the base model to run.")
@click.option("--no-cache", is_flag=True, help="Read all activations of RECIPE anew, and keep none for the next run.")
@quiet_option
@click.option("--json", "as_json", is_flag=True, help="Print {model, answers: [...]} on stdout.")
def chat(
    source: Path,
    prompts: tuple[str, ...],
    coefficient: float | None,
    layer: int | None,
    temperature: float,
    seed: int,
    max_tokens: int,
    system: str | None,
    switches: tuple[str, ...],
    plain: bool,
    no_base: bool,
    baked: bool,
    base: str | None,
    adapter: str | None,
    overrides: tuple[str, ...],
    device: str | None,
    dtype: str | None,
    trust_remote_code: bool,
    no_cache: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Let the base and the steered model answer the same prompts with the same seed.

    What is given is a patched folder, a recipe of which nothing is baked yet, or the folder of a sweep. The base is
    loaded once, and a hook adds the vector to the steered side. So the coefficient can be changed while it runs: type
    /coefficient 3, or /help. With --prompt, or with prompts on stdin (one a line), it answers and ends; each prompt
    is then a conversation of its own.

    \b
    patch-model chat my-model-steered
    patch-model chat recipe.yaml --coefficient 3 --prompt "I think"
    echo "I think" | patch-model chat my-model-steered
    """
    interactive = not prompts and sys.stdin is not None and sys.stdin.isatty()
    if interactive and as_json:
        raise InputError("--json needs prompts", where="--json", remedy="--prompt TEXT, or prompts on stdin")
    if switches and plain:
        raise InputError("--switch is for a chat template, and --plain uses none", where="--switch")
    of_template = _switches(switches)
    asked = None if interactive else _asked(prompts)

    from patcher.chat.given import recipe_or_folder, require_recipe_options

    # Before torch is imported.
    given = recipe_or_folder(source)
    if given.is_file():
        from patcher.build.early_checks import check_early
        from patcher.recipe.file import load_recipe

        require_recipe_options(given, base=base, adapter=adapter, baked=baked)
        check_early(load_recipe(given, overrides), None)

    from rich.console import Console

    from patcher.chat.opening import Options, with_opened
    from patcher.chat.session import Session, Settings
    from patcher.chat.terminal import answer_all, converse
    from patcher.cli.progress import progress

    if isinstance(sys.stdout, TextIOWrapper):
        # A model writes characters that not every terminal has.
        sys.stdout.reconfigure(errors="replace")
    trusted = trust_remote_code
    options = Options(base, adapter, overrides, device, dtype, trusted, baked, not no_cache, of_template)
    with ExitStack() as stack:
        say = stack.enter_context(progress(quiet=quiet))

        def use(opened: Opened) -> None:
            settings = Settings(opened.steering.coefficient, None, seed, temperature, max_tokens, system or None)
            session = Session(opened, settings, with_base=not no_base, plain=plain)
            given = {"coefficient": coefficient, "layer": layer}
            session.change(**{key: value for key, value in given.items() if value is not None})
            stack.close()
            if asked is None:
                converse(session, Console(highlight=False))
                return
            for line in opened.notes:
                click.echo(f"note: {line}", err=True)
            answers = answer_all(session, asked, None if as_json else Console(highlight=False))
            if as_json:
                found = {"model": opened.name, "answers": [answer.as_json() for answer in answers]}
                click.echo(json.dumps(found))

        try:
            with_opened(source, options, use, say)
        except BrokenPipeError:
            # The reader has seen enough (`| head`); what is left in the buffer has nowhere to go.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise click.exceptions.Exit(1) from None


def _switches(given: tuple[str, ...]) -> dict[str, Any]:
    """KEY=VALUE, as a recipe's ``chat_template_kwargs``; values are YAML."""
    from pydantic import TypeAdapter, ValidationError

    from patcher.recipe.vector import Switches
    from patcher.recipe.yaml_lines import parse_yaml

    found: dict[str, Any] = {}
    for text in given:
        key, separator, raw = text.partition("=")
        if not separator or not key.strip():
            raise InputError("--switch takes key=value", where=f"--switch {text}", remedy="enable_thinking=false")
        found[key.strip()] = parse_yaml(raw, f"--switch {text}").value
    try:
        checked: dict[str, Any] = TypeAdapter(Switches).validate_python(found)
    except ValidationError as error:
        said = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise InputError(said, where="--switch", found=", ".join(given)) from None
    return checked


def _asked(prompts: tuple[str, ...]) -> Iterable[str]:
    """The prompts of a run that is no session; the first line of stdin is awaited before any model is loaded."""
    if prompts:
        return prompts
    lines = _lines()
    first = next(lines, None)
    if first is None:
        raise InputError(
            "there is no prompt: stdin is empty", where="stdin", remedy="one prompt a line, or --prompt TEXT"
        )
    return chain([first], lines)


def _lines() -> Iterator[str]:
    for number, raw in enumerate(sys.stdin.buffer if sys.stdin is not None else (), start=1):
        try:
            line = raw.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise InputError("a prompt is not UTF-8 text", where=f"stdin, line {number}", found=error) from None
        if line.strip():
            yield line
