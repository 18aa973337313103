"""Options that several commands have."""

from __future__ import annotations

import click

quiet = click.option(
    "-q", "--quiet", is_flag=True, help="Say nothing of what is going on: only errors, warnings and the result."
)


def refuse_both(verbose: bool, quiet: bool) -> None:
    """Raises:
    click.UsageError: more and less was asked for.
    """
    if verbose and quiet:
        raise click.UsageError("--verbose says more and --quiet less: give one of them")
