"""The parts that all seven notebooks share: the start, tables, and the end.

The top imports nothing but the standard library: the pinned stack may not be installed yet, and a package that is loaded before
it is replaced asks for a restart."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medcot_utils.machine import installing
from medcot_utils.plain_text import hide_formulas, say, show_controls
from medcot_utils.plots import describe_figure
from medcot_utils.series.html_tables import lay_out

if TYPE_CHECKING:
    import pandas as pd
    from IPython.core.interactiveshell import ExecutionResult
    from matplotlib.figure import Figure
    from pandas.io.formats.style import Styler

    from medcot_utils.run.directory import Run


_started = time.time()


def start(run_dir: str | int | Path) -> Path:
    """Prepare the kernel for a notebook and return the run directory (`auto`: the default; `drive`: on Google Drive).

    Installs the pinned stack where the platform lacks it, sets the environment before torch is imported, quiets the libraries
    and hands the secrets on. On Kaggle, an earlier session's run is resumed. Raises InstallError or PlatformError, saying what
    to do."""
    installing.ensure()  # before anything is imported that it may install in another version
    from medcot_utils.machine import environment, paths
    from medcot_utils.models.engine import quiet_start
    from medcot_utils.run.clock import SESSION_STARTED
    from medcot_utils.series import colab
    from medcot_utils.series.kaggle import session

    if left := environment.forget_process_group():
        say(environment.tell_forgotten(left))
    quiet_start()
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if os.environ.get(SESSION_STARTED):
        sys.modules.setdefault("ipywidgets", None)  # headless: nobody sees a widget, and a log needs the bars' text
    # Without ipywidgets tqdm's notebook bar warns and falls back to text; text is what a saved notebook should hold.
    warnings.filterwarnings("ignore", message="IProgress not found")
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category)
    import pandas as pd

    pd.set_option("display.max_colwidth", 90)
    _show_figures()
    _show_tables()
    _let_go_after_an_error()
    folder = colab.run_dir_of(run_dir)
    if paths.platform_name() == "kaggle" and run_dir == "auto":
        session.resume_earlier_run(folder)
    _hand_on_secrets(folder)
    return folder


def _hand_on_secrets(run_dir: Path) -> None:
    """Put the secrets found under the run's names where the clients read them."""
    from medcot_utils.machine import secrets
    from medcot_utils.run.directory import Run
    from medcot_utils.run.store import CONFIG

    secrets.hand_on_secrets(Run.open(run_dir).config.secrets if (run_dir / CONFIG).exists() else None)


def _show_figures() -> None:
    # Figures are made without pyplot, which would keep every one of them alive; IPython must be told to draw them.
    from IPython import get_ipython
    from IPython.core.pylabtools import select_figure_formats
    from matplotlib.figure import Figure

    if shell := get_ipython():
        select_figure_formats(shell, {"png"})
        shell.display_formatter.formatters["image/png"].for_type(Figure, show_figure)


def show_figure(figure: Figure) -> tuple[str, dict[str, str]] | None:
    """Return the PNG of a figure in base64, with its alt text; None if nothing is drawn in it."""
    from IPython.core.pylabtools import print_figure

    png = print_figure(figure, base64=True)
    return (png, {"alt": describe_figure(figure)}) if png else None


def _show_tables() -> None:
    # pandas escapes HTML alone: a reader's page takes dollar signs for formulas.
    import pandas as pd
    from IPython import get_ipython
    from pandas.io.formats.style import Styler

    if shell := get_ipython():
        for kind in (pd.DataFrame, Styler):
            shell.display_formatter.formatters["text/html"].for_type(kind, show_table)


def show_table(table: pd.DataFrame | Styler) -> str | None:
    """Return the HTML of a table, laid out (`lay_out`), whose texts are shown as they are; None if pandas is set to show none."""
    page: str | None = table._repr_html_()
    return page and hide_formulas(show_controls(lay_out(page)))


def _let_go_after_an_error() -> None:
    # A notebook that stopped at an error may stand open for hours: meanwhile the run is free for others.
    from IPython import get_ipython

    if shell := get_ipython():
        shell.events.register("post_run_cell", _let_go_if_failed)


def _let_go_if_failed(result: ExecutionResult) -> None:
    from medcot_utils.run import lock

    if not result.success:
        lock.let_go()


def table(values: Mapping[str, Any], name: str = "value") -> pd.DataFrame:
    """Return a mapping as a one-column table."""
    import pandas as pd

    return pd.DataFrame({name: {key: str(value) for key, value in values.items()}})


def wrap_texts(frame: pd.DataFrame, **formats: Any) -> Styler:
    """Return a table for long texts: whole, with their line breaks, and escaped, its index and columns too.

    Args: formats: of `Styler.format`, as in `precision=3`."""
    styler = frame.style.format(escape="html", **formats)
    styler = styler.format_index(escape="html", axis="index").format_index(escape="html", axis="columns")
    return styler.set_properties(**{"text-align": "left", "vertical-align": "top", "white-space": "pre-wrap"})


def finish(run: Run, step: str) -> pd.DataFrame:
    """Record the step as done and return a table of its artifacts; print its time and peak memory."""
    import pandas as pd

    from medcot_utils.machine import gpu
    from medcot_utils.run.artifacts import ARTIFACTS
    from medcot_utils.run.manifest import describe_costs

    entry = run.record_done(step, since=_started)
    manifest = run.manifest()["artifacts"]
    lines = [
        {
            "artifact": ARTIFACTS[name].file,
            "size (kB)": f"{manifest[name]['bytes'] / 1e3:,.1f}",
            "sha256": manifest[name]["sha256"][:12],
        }
        for name in run.makes(step)
    ]
    # Not on standard error, which notebooks show on red ground.
    say(f"{step}: {describe_costs(entry)}")
    if used := gpu.describe_used_gpus():
        say(used)
    return pd.DataFrame(lines).set_index("artifact")
