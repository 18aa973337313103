"""``patch-model verify DIR``: the proof, again, in any of the stacks."""

from __future__ import annotations

import json
from pathlib import Path

import click

from patcher.cli.options import quiet as quiet_option
from patcher.stacks.names import LLAMA_CPP, STACKS, TRANSFORMERS, VLLM

ALL, INSTALLED = "all", "installed"


@click.command("verify", short_help="Compare a patched folder with the hook reference again, in any stack.")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--stack",
    "stacks",
    type=click.Choice([*STACKS, ALL, INSTALLED]),
    multiple=True,
    default=(TRANSFORMERS,),
    show_default=TRANSFORMERS,
    help="What to run it in; may be repeated. A stack that is not installed is not checked: exit status 3.",
)
@click.option("--vllm", metavar="PATH", help="The virtual environment that has vLLM, if the tool did not make it.")
@click.option(
    "--llama-cpp", metavar="PATH", help="The same for llama.cpp, or a llama.cpp folder with a build of llama-server."
)
@click.option("--base", metavar="PATH", help="The base model, if it has moved: a folder or a Hub id.")
@click.option("--adapter", metavar="PATH", help="The adapter that was merged, if it has moved.")
@click.option("--trust-remote-code", is_flag=True, help="Allow code that comes with the base model to run.")
@quiet_option
@click.option("--json", "as_json", is_flag=True, help="Print {checks: [...]} on stdout.")
def verify(
    folder: Path,
    stacks: tuple[str, ...],
    vllm: str | None,
    llama_cpp: str | None,
    base: str | None,
    adapter: str | None,
    trust_remote_code: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Load the patched folder DIR in stock software and compare it with its base under a hook.

    Exit status 0 only if every check holds in every stack that was asked for; 1 if one fails, 3 if one could not be
    made. DIR is not changed.
    """
    from patcher.patched.reading import read_manifest

    # Before torch is imported.
    read_manifest(folder)

    from patcher.cli.progress import progress
    from patcher.cli.report import print_verification
    from patcher.patched.schema import Verification
    from patcher.stacks.environments import Environment, all_found
    from patcher.verify.later import verify_folder_in

    places = {name: path for name, path in ((VLLM, vllm), (LLAMA_CPP, llama_cpp)) if path}
    chosen = list(dict.fromkeys(STACKS if ALL in stacks else (name for name in stacks if name != INSTALLED)))
    if INSTALLED in stacks:
        here = [item.stack for item in all_found() if isinstance(item, Environment) or item.stack in places]
        chosen = list(dict.fromkeys([*chosen, *here]))
    with progress(quiet=quiet) as say:
        entries = verify_folder_in(
            folder,
            chosen,
            base=base,
            adapter=adapter,
            places=places,
            trust_remote_code=trust_remote_code,
            progress=say,
        )
    print_verification([Verification.model_validate(entry) for entry in entries], to_stderr=as_json, every_check=True)
    if as_json:
        click.echo(json.dumps({"checks": entries}))
    if any(entry["status"] == "failed" for entry in entries):
        raise click.exceptions.Exit(1)
    if not all(entry["passed"] for entry in entries):
        raise click.exceptions.Exit(3)
