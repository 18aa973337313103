"""What a person sees at the end of a remote build."""

from __future__ import annotations

from patcher.build.remote_planning import RemoteBuildPlan
from patcher.build.remote_result import RemoteResult
from patcher.cli.report import console_for, print_patch, print_plan
from patcher.patched.schema import Remote


def print_remote_build(result: RemoteResult, *, to_stderr: bool) -> None:
    """The report of a finished remote build."""
    console = console_for(to_stderr=to_stderr)
    print_patch(result.patch, console)
    remote = result.patch.remote or Remote()
    console.print(
        f"of the base, {len(remote.downloaded)} of {remote.weight_files} weight files were needed here: "
        f"{_size(remote.bytes_downloaded or 0)} of {_size(remote.bytes_of_weights or 0)}",
        markup=False,
    )
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in result.timings.items())
    console.print(f"[dim]{seconds}; peak memory {result.peak_rss_bytes / 2**20:.0f} MiB[/]")
    how = f"method {result.push['method']}, {result.push['bytes_uploaded']:,} bytes uploaded"
    console.print(f"published: [bold]{result.push['url']}[/] ({how}); no folder was written here", soft_wrap=True)


def print_remote_plan(planned: RemoteBuildPlan) -> None:
    """The report of ``--dry-run``."""
    print_plan(planned.planned)
    found = planned.download
    console_for().print(
        f"on the Hub, with no folder here; {len(found['files'])} of {found['of_files']} weight files would be "
        f"downloaded: {_size(found['bytes'])} of {_size(found['of_bytes'])}",
        markup=False,
        soft_wrap=True,
    )


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
