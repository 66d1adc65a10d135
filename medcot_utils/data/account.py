"""Account for every row that was read: trained on, held out, or left out, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import TypedDict  # pydantic refuses typing's own on Python 3.11

if TYPE_CHECKING:
    import pandas as pd

    from medcot_utils.config import RunConfig
    from medcot_utils.data.tokens import DataReport


class RowUse(TypedDict):
    """Hold how many rows went one way, and the setting or fault that sent them there (may be empty)."""

    what: str
    rows: int
    why: str


def list_uses(report: DataReport, config: RunConfig) -> list[RowUse]:
    """Return where the rows went that notebook 03 read. The last one is `trained on`, and all of them add up to the rows read."""
    data, limit = config.dataset, f"model.max_seq_length is {config.model.max_seq_length}"
    too_long = limit + (", dataset.overlong is drop" if data.overlong == "drop" else "")
    repeating = len({repeat["train_id"] for repeat in report["repeats"]}) if report["repeats_dropped"] else 0
    trained = report["checks"]["rows"]
    apart = report["rows_read"] - sum(report["dropped"].values()) - repeating - report["overlong_dropped"] - trained
    sizes = f"dataset.num_rows is {data.num_rows}, dataset.held_out_rows {data.held_out_rows}"
    if data.num_rows is None:  # then a row is left unused only if a `split` column says that it is not trained on
        sizes = f"not marked train, dataset.held_out_rows is {data.held_out_rows}"
    uses = [RowUse(what="left out", rows=count, why=reason) for reason, count in report["dropped"].items()]
    if "held_out" in report:
        held_out, too_long_held_out = report["held_out"], report["held_out_overlong"]
        uses.append(RowUse(what="left unused", rows=apart - held_out - too_long_held_out, why=sizes))
        uses.append(RowUse(what="left out of the held-out rows", rows=too_long_held_out, why=too_long))
        uses.append(RowUse(what="held out", rows=held_out, why=f"dataset.held_out_rows is {data.held_out_rows}"))
    else:  # earlier versions did not count them apart
        uses.append(RowUse(what="held out or left unused", rows=apart, why=sizes))
    uses.append(RowUse(what="left out", rows=repeating, why="they repeat a held-out question, dataset.repeats is drop"))
    uses.append(RowUse(what="left out", rows=report["overlong_dropped"], why=too_long))
    return [*(use for use in uses if use["rows"]), RowUse(what="trained on", rows=trained, why="")]


def tabulate_uses(report: DataReport, config: RunConfig) -> pd.DataFrame:
    """Return one line for the rows read, and one for each way that they went."""
    import pandas as pd

    lines = [RowUse(what="read", rows=report["rows_read"], why=""), *list_uses(report, config)]
    return pd.DataFrame(lines).rename(columns={"what": "row"}).set_index("row")


def describe_uses(report: DataReport, config: RunConfig) -> str:
    """Return one line on the rows that are trained on, and on where the others went."""
    *others, trained = list_uses(report, config)
    asked = config.dataset.num_rows
    fewer = f" ({asked} asked for with dataset.num_rows)" if asked and trained["rows"] < asked else ""
    rest = "; ".join(f"{use['rows']} {use['what']} ({use['why']})" for use in others)
    return f"trains on {trained['rows']} of {report['rows_read']} rows{fewer}" + (f"; {rest}" if rest else "")
