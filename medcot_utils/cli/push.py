"""`medcot push`: push a finished run to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from medcot_utils.cli.console import console, say
from medcot_utils.cli.runs import choose_run
from medcot_utils.machine.paths import expand_home


def push(
    run_dir: Annotated[Path | None, typer.Argument(parser=expand_home, help="a run that notebook 07 has exported")] = None,
    repo_id: Annotated[str | None, typer.Option("--repo-id", help="user/name; if not given, hub.repo_id")] = None,
    public: Annotated[bool | None, typer.Option("--public/--private", help="who can see it; if not given, private")] = None,
    layout: Annotated[str | None, typer.Option(help="one repository, or separate: -lora, -merged, -gguf")] = None,
    what: Annotated[
        list[str] | None,
        typer.Option(
            "--artifact",
            metavar="NAME",
            help="adapter, merged, or gguf; repeat for several; if not given, everything the run has",
        ),
    ] = None,
    tag: Annotated[str | None, typer.Option(help="tag of this run in the repository; else made from its digests")] = None,
    verify_all: Annotated[
        bool | None, typer.Option("--verify-all", help="download every byte again, not only both ends of large files")
    ] = None,
    patience: Annotated[float | None, typer.Option(help="seconds to keep trying while the Hub is busy or unreachable")] = None,
) -> None:
    """Push a run's adapter and models to the Hub, and compare.

    It sends the adapter, the merged model, and the GGUF file if the run has them. Then it compares every file's size and digest
    in the Hub's list with the run's, and downloads small files and both ends of large ones. An interrupted push resumes: files
    that are already there are not sent again. medcot only replaces or deletes files that it uploaded itself. If other files are
    in the way, it refuses before it sends anything. The exit code is 0 only if all agree."""
    from medcot_utils.export.hub import push, records
    from medcot_utils.run.directory import Run
    from medcot_utils.run.lock import hold

    run = Run.open(choose_run(run_dir))
    private = None if public is None else not public
    changes = {
        "repo_id": repo_id,
        "private": private,
        "layout": layout,
        "artifacts": what,
        "tag": tag,
        "patience_seconds": patience,
        "verify_all": verify_all,
    }
    settings = push.hub_settings(run, **changes)
    with hold(run.path, "medcot push"):  # the files must not change while they are sent
        record = push.push_run(run, settings, say=say)
    table = Table("file", "bytes", "sha256", "sent", "read back", title="what the Hub lists and returns", title_justify="left")
    for line in records.file_lines(record):
        table.add_row(line["file"], f"{line['bytes']:,}", line["sha256"], line["sent"], line["read back"])
    console.print(table)
    for entry in record["repositories"]:
        who = "private" if entry["private"] else "public"
        say(f"pushed: {entry['url']} ({who}), tag {record['tag']}")
