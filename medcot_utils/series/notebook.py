"""The parts that all seven notebooks share: the start, tables, and the end.

At its top, this module imports only the standard library and modules that do the same. The pinned stack may not be installed yet,
and replacing a package that is already loaded would need a restart."""

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
    """Prepare the kernel for a notebook, and return the run directory (`auto`: the default; `drive`: on Google Drive).

    Install the pinned stack if the platform lacks it, set the environment before torch is imported, silence the libraries, and
    pass on the secrets. On Kaggle, with `auto`, resume the run of an earlier session. Raises InstallError or PlatformError, which
    say what to do."""
    installing.ensure()  # first, because it may install other versions of packages that are imported below
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
        sys.modules.setdefault("ipywidgets", None)  # in a headless run nobody sees widgets, and a log needs the bars as text
    # Without ipywidgets, tqdm's notebook bar warns and falls back to text, which is what a saved notebook should hold.
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
    """Find the secrets under the run's names, and put them where the clients read them."""
    from medcot_utils.machine import secrets
    from medcot_utils.run.directory import Run
    from medcot_utils.run.store import CONFIG

    secrets.hand_on_secrets(Run.open(run_dir).config.secrets if (run_dir / CONFIG).exists() else None)


def _show_figures() -> None:
    # Figures are made without pyplot, which would keep all of them in memory, so IPython must be told to draw them.
    from IPython import get_ipython
    from IPython.core.pylabtools import select_figure_formats
    from matplotlib.figure import Figure

    if shell := get_ipython():
        select_figure_formats(shell, {"png"})
        shell.display_formatter.formatters["image/png"].for_type(Figure, show_figure)


def show_figure(figure: Figure) -> tuple[str, dict[str, str]] | None:
    """Return a figure's PNG in base64, with its alt text; None if the figure is empty."""
    from IPython.core.pylabtools import print_figure

    png = print_figure(figure, base64=True)
    return (png, {"alt": describe_figure(figure)}) if png else None


def _show_tables() -> None:
    # pandas escapes only HTML, but a notebook viewer reads dollar signs as formulas.
    import pandas as pd
    from IPython import get_ipython
    from pandas.io.formats.style import Styler

    if shell := get_ipython():
        for kind in (pd.DataFrame, Styler):
            shell.display_formatter.formatters["text/html"].for_type(kind, show_table)


def show_table(table: pd.DataFrame | Styler) -> str | None:
    """Return the HTML of a table, laid out by `lay_out`, with its texts unchanged; None if pandas is set to show no HTML."""
    page: str | None = table._repr_html_()
    return page and hide_formulas(show_controls(lay_out(page)))


def _let_go_after_an_error() -> None:
    # A notebook that stopped at an error may stay open for hours. It must not lock the run meanwhile.
    from IPython import get_ipython

    if shell := get_ipython():
        shell.events.register("post_run_cell", _let_go_if_failed)


def _let_go_if_failed(result: ExecutionResult) -> None:
    from medcot_utils.run import lock

    if not result.success:
        lock.let_go()


def table(values: Mapping[str, Any], name: str = "value") -> pd.DataFrame:
    """Return a mapping as a table with one column, `name`. A value that is not there reads `none`."""
    import pandas as pd

    return pd.DataFrame({name: {key: "none" if value is None else str(value) for key, value in values.items()}})


def wrap_texts(frame: pd.DataFrame, **formats: Any) -> Styler:
    """Return a table that shows long texts whole, with their line breaks, and escapes them, also in index and columns.

    Args: formats: arguments of `Styler.format`, as in `precision=3`."""
    styler = frame.style.format(escape="html", **formats)
    styler = styler.format_index(escape="html", axis="index").format_index(escape="html", axis="columns")
    return styler.set_properties(**{"text-align": "left", "vertical-align": "top", "white-space": "pre-wrap"})


def finish(run: Run, step: str) -> pd.DataFrame:
    """Record the step as done, print its time and peak memory, and return a table of its artifacts."""
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
    # Notebooks show standard error on a red background, so this goes to standard output.
    say(f"{step}: {describe_costs(entry)}")
    if used := gpu.describe_used_gpus():
        say(used)
    return pd.DataFrame(lines).set_index("artifact")
