"""The command line: options in, one call, one rendering out.

Commands are imported when they run, so that ``--help`` answers before pydantic or torch is loaded.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import click

from patcher import __version__
from patcher.cli.interrupts import heed_interrupts, obey_interrupts
from patcher.cli.lean_imports import import_no_compiler
from patcher.errors import OutsideError, PatchModelError
from patcher.progress.clock import process_began

COMMANDS: Mapping[str, tuple[str, str]] = {
    "build": ("build_command", "Build what a recipe describes (the default: patch-model RECIPE)."),
    "sweep": ("sweep_command", "Find a layer and a coefficient, by measuring many under a guard against damage."),
    "chat": ("chat_command", "Try a vector out: base and steered model side by side, at any coefficient."),
    "verify": ("verify_command", "Compare a patched folder with the hook reference again, in any stack."),
    "stacks": ("stacks_command", "Which stock stacks are found here; install one in an environment of its own."),
    "diff": ("diff_command", "List which tensors and config keys differ between a base and a copy."),
    "unpatch": ("unpatch_command", "Take the steering out of a patched folder again."),
    "reproduce": ("reproduce_command", "Build a patched folder again from its own record, and compare."),
    "inspect": ("inspect_command", "Which routes a model's architecture has, for which stacks, at what cost."),
    "export": ("export_command", "Write the same edits as a vector file, a control vector or a PEFT adapter."),
    "gguf": ("gguf_command", "Add the vectors of a patched folder to a GGUF file of any quantisation."),
    "push": ("push_command", "Publish a patched folder on the Hub."),
    "demo": ("demo_command", "Write the quickstart: a tiny model, contrast pairs, a recipe."),
    "schema": ("schema_command", "Print the JSON schema of a recipe."),
}
"""Command -> (module in this package, one line); a new command is one file and one entry."""


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"patcher.cli.{COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_module, line) in COMMANDS.items()])

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, "RECIPE [OPTIONS]")
        formatter.write_usage(ctx.command_path, "COMMAND [ARGS]...", prefix="       ")


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="patch-model")
def cli() -> None:
    """Make a steered language model a file.

    A recipe names a causal LM and contrast prompts. patch-model computes a steering vector without training, and bakes
    it into a copy of the checkpoint, in tensors that stock software reads. It proves that the copy is steered exactly
    as a hook would steer the base.

    \b
    patch-model demo                 writes a quickstart that runs offline
    patch-model quickstart.yaml      builds it
    patch-model build --help         all options of a build
    """


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 done, 1 a check failed, 2 wrong input, 3 the outside failed."""
    began = process_began() if arguments is None else time.perf_counter()
    chosen = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in chosen
    heed_interrupts()
    try:
        _leave_to_the_first(chosen)
        status = _run(_with_default_command(chosen), began)
    except PatchModelError as error:
        _fail(error.exit_code, str(error), error.as_json(), as_json)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.UsageError as error:
        usage = error.ctx.get_usage() + "\n" if error.ctx is not None else ""
        where = None if error.ctx is None else error.ctx.command_path
        body = {"error": {"code": "usage", "message": error.format_message(), "where": where, "found": None}}
        body["error"]["remedy"] = "see --help"
        _fail(2, usage + error.format_message(), body, as_json)
    except (KeyboardInterrupt, click.Abort) as stop:
        # A command whose finished parts are kept says so itself; click makes an Abort of the interrupt.
        text = str(stop) or str(stop.__cause__ or "") or "interrupted; nothing unfinished is left"
        _fail(130, text, {"error": _plain("interrupted", text)}, as_json)
    except MemoryError:
        memory = OutsideError(
            "not enough memory", remedy="dtype: bfloat16, or a machine with more memory", code="memory"
        )
        _fail(memory.exit_code, str(memory), memory.as_json(), as_json)
    sys.exit(status if isinstance(status, int) else 0)


def _run(arguments: list[str], began: float) -> object:
    try:
        # Outside of its standalone mode, click returns what `Exit` carries.
        return cli.main(args=arguments, prog_name="patch-model", standalone_mode=False, obj=began)
    except click.Abort:
        raise
    except Exception:
        obey_interrupts()
        raise


def _with_default_command(arguments: list[str]) -> list[str]:
    if not arguments or arguments[0] in (*COMMANDS, "-h", "--help", "--version"):
        return arguments or ["--help"]
    return ["build", *arguments]


def _leave_to_the_first(arguments: list[str]) -> None:
    """Of several processes that a launcher started for something else than a build, only the first does it."""
    from patcher.capture.processes.launch import forget_launch, world

    several = world().several
    if not several:
        import_no_compiler()
    builds = _with_default_command(arguments)[0] == "build" and not {"--dry-run", "-h", "--help"} & set(arguments)
    if builds or not several:
        return
    if world().rank:
        sys.exit(0)
    forget_launch()


def _plain(code: str, message: str) -> dict[str, Any]:
    return {"code": code, "message": message, "where": None, "found": None, "remedy": None}


def _fail(exit_code: int, text: str, body: Mapping[str, Any], as_json: bool) -> NoReturn:
    if as_json:
        click.echo(json.dumps(body))
    click.echo(click.style("error: ", fg="red", bold=True) + text, err=True)
    sys.exit(exit_code)
