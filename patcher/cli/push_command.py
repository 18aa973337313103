"""``patch-model push DIR REPO``: publish a patched folder on the Hub."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from patcher.cli.options import quiet as quiet_option
from patcher.publish.hub import push_folder


@click.command("push", short_help="Publish a patched folder on the Hub.")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("repo", metavar="REPO")
@click.option("--private", is_flag=True, help="Create the repository as private.")
@click.option("--public", is_flag=True, help="Create it as public, even where the base is private.")
@click.option("--revision", metavar="BRANCH", help="Publish to this branch; created if it is not there.")
@click.option("--pull-request", is_flag=True, help="Open a pull request instead of committing to the branch.")
@click.option("--commit-message", metavar="TEXT", help="The commit's title.")
@quiet_option
@click.option("--json", "as_json", is_flag=True, help="Print {url, commit, method, bytes_uploaded} on stdout.")
def push(
    folder: Path,
    repo: str,
    private: bool,
    public: bool,
    revision: str | None,
    pull_request: bool,
    commit_message: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Publish the patched folder DIR as the Hub repository REPO (owner/name), in one commit.

    Files that are the base's are copied on the Hub where it allows that; only the others are sent. The token is the one
    of `hf auth login` or HF_TOKEN and needs write access. Only a folder whose steering was verified is published. Local
    paths and tokens are left out.
    """
    from patcher.patched.reading import read_manifest

    # Before torch is imported.
    read_manifest(folder)

    from patcher.cli.progress import progress

    with progress(quiet=quiet) as say:
        result = push_folder(
            folder,
            repo,
            private=private,
            public=public,
            revision=revision,
            pull_request=pull_request,
            commit_message=commit_message,
            progress=say,
        )
    if as_json:
        click.echo(json.dumps(asdict(result)))
        return
    click.echo(f"published: {result.url}", err=True)
    how = f"method {result.method}, {result.bytes_uploaded:,} bytes uploaded"
    click.echo(f"commit {result.commit[:12]}, {how}", err=True)
