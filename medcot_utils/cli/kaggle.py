"""`medcot kaggle`: build, push, status, output."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medcot_utils.cli.console import console, say
from medcot_utils.config import PROFILES
from medcot_utils.machine.paths import expand_home

if TYPE_CHECKING:
    from medcot_utils.series.kaggle.build import Built

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Run the series on Kaggle. One notebook carries the project; Kaggle's own client pushes it.",
)

Folder = Annotated[Path, typer.Option("--folder", parser=expand_home, metavar="<path>", help="folder of kernel-metadata.json")]
Kernel = Annotated[str | None, typer.Argument(help="owner/slug; if not given, the one in kernel-metadata.json")]


@app.command()
def build(
    profile: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(PROFILES)} or auto; if not given, as in the last build here, else article"),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="a setting of the run: --set training.max_steps=10; repeat for several"),
    ] = None,
    kernel: Annotated[
        str | None,
        typer.Option("--id", metavar="OWNER/SLUG", help="the kernel's name; if not given, your name and medcot-series"),
    ] = None,
    continue_from: Annotated[
        list[str] | None, typer.Option(metavar="OWNER/SLUG", help="the session to resume; repeat for several")
    ] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OWNER/SLUG",
            help="a data set to attach, with a file that a setting names or an earlier session's run; repeat for several",
        ),
    ] = None,
    public: Annotated[bool | None, typer.Option("--public/--private", help="if not given, private")] = None,
    accelerator: Annotated[
        str | None,
        typer.Option(
            help="NvidiaTeslaT4 (two T4s), NvidiaL4 (four L4s), NvidiaL4X1, NvidiaTeslaA100, NvidiaH100, NvidiaRtxPro6000; if "
            "not given, as in the last build here, else two T4s, and none for a profile that needs no GPU"
        ),
    ] = None,
    keep_image: Annotated[bool, typer.Option("--keep-image", help="keep docker_image in kernel-metadata.json")] = False,
    folder: Folder = Path(),
) -> None:
    """Write the self-contained notebook and kernel-metadata.json, for `medcot kaggle push` or `kaggle kernels push -p .`"""
    from medcot_utils.series.kaggle.build import build as build_notebook
    from medcot_utils.series.kaggle.metadata import PLACEHOLDER_OWNER
    from medcot_utils.series.kaggle.next_steps import list_next_steps

    built = build_notebook(
        folder, profile, settings or [], kernel, continue_from or [], dataset or [], public, accelerator, keep_image
    )
    say(f"{built.notebook}: {built.bytes / 1e3:.0f} kB, profile {built.profile}")
    for setting in built.added:
        say(f"added: {setting}, because Kaggle ends a session after 12 hours, and this run may take as long")
    if built.left_out:
        names = ", ".join(built.left_out)
        say(f"left out, because they are not files of the project (git add adds them to it): {names}")
    if built.dropped_image:
        dropped = f"docker_image {built.dropped_image} is dropped: it may name an old image, or one for the CPU"
        say(f"{dropped}; --keep-image keeps it")
    _warn_of_image(built.metadata.docker_image)
    owner, _, _ = built.metadata.id.partition("/")
    if owner == PLACEHOLDER_OWNER:
        say("its owner is set by medcot kaggle push; for `kaggle kernels push` give --id NAME/SLUG")
    _print_times(built)
    for line in list_next_steps(built, folder):
        say(line)


def _warn_of_image(image: str | None) -> None:
    if image:
        warning = f"kernel-metadata.json pins docker_image {image}: the session starts it, and it may be old or for the CPU"
        say(f"{warning}; medcot kaggle build drops it")


def _print_times(built: Built) -> None:
    from medcot_utils.cli.tables import times_table
    from medcot_utils.config import load_config
    from medcot_utils.series.estimate import describe_sessions
    from medcot_utils.series.kaggle.accelerators import DEFAULT

    accelerator = built.metadata.machine_shape
    if accelerator != DEFAULT:
        other = accelerator or "a session without a GPU; medcot doctor shows the time on this machine"
        say(f"no time estimate: published rates exist only for {DEFAULT}, not for {other}")
    elif built.estimate:
        profile = "article" if built.profile == "auto" else built.profile
        console.print(times_table({profile: built.estimate}))
        say(describe_sessions(built.estimate, load_config(profile, built.settings), on_kaggle=True))
    else:
        say("no time estimate: the model's size is not known until it is downloaded")


@app.command()
def push(folder: Folder = Path()) -> None:
    """Push the notebook that build wrote. The push succeeds only if every field of Kaggle's answer says so."""
    from medcot_utils.series.kaggle import client
    from medcot_utils.series.kaggle.metadata import read_metadata

    _warn_of_image(read_metadata(folder).docker_image)
    pushed = client.push(folder)
    say(f"pushed {pushed.kernel}, version {pushed.version}: {pushed.url}")


@app.command()
def status(kernel: Kernel = None, folder: Folder = Path()) -> None:
    """Show the state of the kernel's latest session. If it failed, report Kaggle's reason as an error."""
    from medcot_utils.series.kaggle import client
    from medcot_utils.series.kaggle.metadata import read_metadata

    name = kernel or read_metadata(folder).id
    say(f"{name}: {client.session_state(name)}")


@app.command()
def output(
    kernel: Kernel = None,
    run_dir: Annotated[
        Path, typer.Option("--run-dir", parser=expand_home, metavar="<path>", help="the run directory to make")
    ] = Path("runs/kaggle"),
    everything: Annotated[
        bool, typer.Option("--all", help="also fetch old checkpoints, and the merged model if the output has it")
    ] = False,
    folder: Folder = Path(),
) -> None:
    """Fetch and verify the run of the kernel's latest session, as a run directory for `medcot status` and `medcot report`."""
    from medcot_utils.series.kaggle import client
    from medcot_utils.series.kaggle.metadata import read_metadata

    name = kernel or read_metadata(folder).id
    fetched = client.output(name, run_dir, everything)
    left = f"; missing: {', '.join(fetched.absent)}" if fetched.absent else ""
    say(f"{run_dir}: {len(fetched.verified)} artifacts agree with the manifest{left}")
    say(f"medcot status {run_dir}")
