"""Load, validate and split the rows to train on, and choose the questions to judge by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired

from typing_extensions import TypedDict  # pydantic refuses typing's own on Python 3.11

from medcot_utils.config import DatasetSettings, RunConfig
from medcot_utils.data.cells import MARKS, NOT_A_STRING, clean_labels, clean_text, kind_of
from medcot_utils.data.contamination import Repeat, find_repeats, normalize
from medcot_utils.data.files import DataError, read_file
from medcot_utils.data.hub import find_files
from medcot_utils.data.prompts import ARTICLE_ANSWER, ARTICLE_QUESTION
from medcot_utils.plain_text import say
from medcot_utils.run.artifacts import SHIPPED_CASES

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset, Features

TEXT_COLUMNS = ("Question", "Complex_CoT", "Response")
_LABELS = ("id", "specialty", "split")
_SHOWN_NAMES = 20
_COMPARED_FIRST = 100
_SHOWN_REASONS = 3
# Of a text: some 25,000 tokens, of which training would see the first few thousand, and an answer would wait for all.
_MOST_CHARACTERS = 100_000


class Row(TypedDict):
    """Hold one row of the data set, as `load_rows` gives it. `split` is train, or anything else for a held-out row."""

    id: str | int
    Question: str
    Complex_CoT: str
    Response: str
    specialty: NotRequired[str | None]
    split: NotRequired[str]


class AskedQuestion(TypedDict):
    """Hold what a model is asked."""

    id: str
    Question: str


class Question(AskedQuestion):
    """Hold one evaluation question: a record of questions.json.

    `scored` is false for the article's own question, which is only shown. `specialty` is empty if the data set has none.
    `Complex_CoT` and `Response` are the references: the data set's chain of thought (empty for the article's) and answer."""

    scored: bool
    specialty: str | int  # a number in runs of earlier versions
    Complex_CoT: str
    Response: str


# --- load ----------------------------------------------------------------------------------------------------------


def load_rows(settings: DatasetSettings) -> Dataset:
    """Return all rows (see `Row`) of `settings.path`, of the shipped cases, or of the Hub at the pinned revision.

    Raises DataError if the file is missing, empty, unreadable, lacks a column or does not match `settings.sha256`."""
    from datasets import Dataset

    source, names = _source(settings), []
    if settings.path or settings.name == "shipped":

        def choose(columns: Sequence[str]) -> dict[str, str]:
            names[:] = columns
            return _choose_columns(columns, settings)

        held = read_file(Path(settings.path or SHIPPED_CASES), choose)
        cells = {new: held[old] for old, new in _choose_columns([*held], settings).items()}
        texts = {name: [clean_text(cell) for cell in cells[name]] for name in TEXT_COLUMNS}
        labels = {name: _clean_labels(name, cells[name], source) for name in _LABELS if name in cells}
        rows = Dataset.from_dict(texts | labels)
    else:
        held = _load_from_hub(settings)
        names = held.column_names
        chosen = _choose_columns(names, settings)
        _check_types(held.features, chosen, source)
        rows = held.select_columns([*chosen]).rename_columns({old: new for old, new in chosen.items() if old != new})
        for name in [name for name in _LABELS if name in rows.column_names]:
            kinds = getattr(held.features[name], "names", None)  # of a ClassLabel, whose cells are numbers
            labels = [cell if kinds is None or cell is None else kinds[cell] for cell in held[name]]
            rows = rows.remove_columns(name).add_column(name, _clean_labels(name, labels, source))
    if "id" not in rows.column_names:
        rows = rows.add_column("id", [f"row-{index}" for index in range(len(rows))])
    for label in [label for label in _LABELS if label not in names]:
        for name in _named_like(label, names):
            say(f"{source}: the column {name} is not used, since only `{label}` is: rename it if you meant that")
    return rows


def _source(settings: DatasetSettings) -> str:
    return Path(settings.path).name if settings.path else settings.name


def _clean_labels(name: str, cells: Sequence[object], source: str) -> list[int] | list[str]:
    try:
        return clean_labels(name, cells)
    except ValueError as error:
        raise DataError(f"{source}: {error}") from error


def _named_like(wanted: str, names: Sequence[str]) -> list[str]:
    """Return the names that differ from one only by case or by spaces around them."""
    return [name for name in names if name.strip().lower() == wanted.lower()]


def _check_types(features: Features, chosen: Mapping[str, str], source: str) -> None:
    """Raise DataError for a column of a data set on the Hub that holds no texts, before a cell of it is decoded."""
    from datasets import ClassLabel, Value

    for name, meant in chosen.items():
        feature = features[name]
        text = isinstance(feature, Value) and "string" in feature.dtype
        if not text and (meant in TEXT_COLUMNS or not isinstance(feature, Value | ClassLabel)):
            held = feature.dtype if isinstance(feature, Value) else type(feature).__name__
            raise DataError(
                f"data set {source}: the column {name!r} holds {held} in every row; expected texts. Name another column in "
                f"dataset.columns, or give a file of yours with dataset.path"
            )


def _load_from_hub(settings: DatasetSettings) -> Dataset:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        urls = find_files(settings.name, settings.subset, settings.revision)
        if settings.sha256:
            _check_digest(settings, urls)
        return load_dataset(settings.name, settings.subset, revision=settings.revision, split="train", trust_remote_code=False)
    # Not there, no such subset, no connection, rows of mixed types; RuntimeError: a data set that needs code of its own.
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        pinned = f" at revision {settings.revision}" if settings.revision else ""
        raise DataError(
            f"data set {settings.name}{pinned} could not be loaded from the Hub: {' '.join(str(error).split())}. Check "
            f"dataset.name, dataset.subset, dataset.revision and the connection, or give a local file with dataset.path"
        ) from error


def _check_digest(settings: DatasetSettings, urls: Sequence[str]) -> None:
    """Compare the data set's one file, as downloaded, with the digest that the settings expect.

    The cached copy may be damaged, so a difference counts only after a second download. Raises DataError naming both
    digests."""
    from datasets import DownloadConfig, DownloadManager

    from medcot_utils.run.files import sha256_of

    if not urls:  # without a connection datasets gives the rows it prepared before and names no file; those were checked
        return
    if len(urls) != 1:
        raise DataError(
            f"dataset.sha256 is the digest of one file, but {settings.name} has {len(urls)}: set it to null, or choose one "
            f"part with dataset.subset"
        )
    for again in (False, True):
        # use_etag as load_dataset sets it: it then finds this download and makes no second one.
        config = DownloadConfig(use_etag=False, force_download=again)
        digest, size = sha256_of(Path(DownloadManager(download_config=config).download(urls[0])))
        if digest == settings.sha256:
            return
    raise DataError(
        f"{settings.name} is not the data that this run names: its file {urls[0].rsplit('/', 1)[-1]} at revision "
        f"{settings.revision or 'main'} has {size:,} bytes and sha256 {digest}, expected sha256 {settings.sha256} "
        f"(dataset.sha256). The data changed under the same name, or you meant another revision: pin the right dataset.revision, "
        f"or accept the new data with --set dataset.sha256={digest}"
    )


def check_data(config: RunConfig) -> str:
    """Return one line on the rows that the configuration's data gives, before any model is loaded.

    Raises DataError for a file, column, split, number of questions or repeats that would stop notebooks 02 and 03."""
    settings, asked = config.dataset, config.evaluation.num_questions
    loaded = load_rows(settings)
    try:
        rows, report = validate_rows(loaded)
        train, held_out = split_rows(rows, settings, config.seed)
        article = choose_questions(held_out, asked)[:1]
        repeating = _check_repeats(train, [*article, *held_out], settings) if settings.repeats == "drop" else 0
    except DataError as error:
        raise DataError(f"{_source(settings)}: {error}") from error
    of = f" of {settings.num_rows} asked for (dataset.num_rows)" if len(train) < (settings.num_rows or 0) else ""
    line = f"{len(train)} rows to train on{of}, {len(held_out)} held out, {asked} of them to be asked"
    if repeating:
        line += f"; {repeating} of the rows to train on will be left out, since they repeat a held-out question (dataset.repeats)"
    if unused := _describe_unused(rows, train, held_out, settings):
        line += f"; {len(rows) - len(train) - len(held_out)} of {len(rows)} usable rows are left unused ({unused})"
    return line + (
        f"; {len(loaded) - len(rows)} of {len(loaded)} rows cannot be used: {report.reasons()}" if report.dropped else ""
    )


def _describe_unused(rows: Dataset, train: Dataset, held_out: Dataset, settings: DatasetSettings) -> str:
    """Return which settings leave usable rows unused; an empty text if none are."""
    if len(train) + len(held_out) == len(rows):
        return ""
    if "split" not in rows.column_names:
        return f"dataset.num_rows is {settings.num_rows}, dataset.held_out_rows {settings.held_out_rows}"
    marked = sum(split == "train" for split in rows["split"])
    left = {
        f"marked train: dataset.num_rows is {settings.num_rows}": marked - len(train),
        f"not marked train: dataset.held_out_rows is {settings.held_out_rows}": len(rows) - marked - len(held_out),
    }
    return "; ".join(f"{count} {why}" for why, count in left.items() if count)


def _check_repeats(train: Dataset, questions: Sequence[AskedQuestion], settings: DatasetSettings) -> int:
    """Return how many rows `drop_repeats` leaves out, or raise DataError as it does.

    If one of the first rows is kept, the others need no comparison, and only the first ones are counted."""
    first = train.select(range(min(len(train), _COMPARED_FIRST)))
    try:
        return len(first) - len(drop_repeats(first, find_repeats(first, questions, settings)))
    except DataError:
        return len(train) - len(drop_repeats(train, find_repeats(train, questions, settings)))


def _choose_columns(names: Sequence[str], settings: DatasetSettings) -> dict[str, str]:
    """Return {column in the data: its name here}. Raises DataError for a column that is missing or mapped twice."""
    wanted = settings.columns.model_dump()
    for key, column in wanted.items():
        if others := [f"dataset.columns.{other}" for other in wanted if other != key and wanted[other] == column]:
            raise DataError(f"dataset.columns.{key} and {', '.join(others)} all name {column!r}: each text needs its own column")
    if missing := {key: column for key, column in wanted.items() if column not in names}:
        near = {key: _named_like(column, names) for key, column in missing.items()}
        yours = {key: found[0] if len(found) == 1 and found[0].isidentifier() else "NAME" for key, found in near.items()}
        columns = f"column{'s' * (len(missing) > 1)} {', '.join(map(repr, missing.values()))}"
        held = ", ".join(names[:_SHOWN_NAMES]) + f" and {len(names) - _SHOWN_NAMES} more" * (len(names) > _SHOWN_NAMES)
        raise DataError(
            f"{_source(settings)} has no {columns} (it has {held}): name yours with "
            f"{' '.join(f'--set dataset.columns.{key}={name}' for key, name in yours.items())}"
        )
    texts = dict(zip(wanted.values(), TEXT_COLUMNS, strict=True))
    return texts | {name: name for name in ("id", "specialty", "split") if name in names and name not in texts}


# --- validate ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ValidationReport:
    """Count the rows that came in and were kept, and those dropped by reason; `examples` has each reason's first row id."""

    rows_in: int
    rows_kept: int
    dropped: dict[str, int]
    examples: dict[str, str]

    def reasons(self) -> str:
        """Return the most frequent reasons in a line, each with its rows and the first of them."""
        most = Counter(self.dropped).most_common(_SHOWN_REASONS)
        lines = [f"{reason} in {count} row{'s' * (count > 1)} (first: {self.examples[reason]:.60})" for reason, count in most]
        return "; ".join(lines) + f"; and {len(self.dropped) - len(lines)} more" * (len(self.dropped) > len(lines))

    def table(self) -> pd.DataFrame:
        """Return one line per reason, with the first row it applied to."""
        import pandas as pd

        lines = [(reason, count, self.examples[reason]) for reason, count in self.dropped.items()]
        lines = [("rows read", self.rows_in, ""), *lines, ("rows kept", self.rows_kept, "")]
        return pd.DataFrame(lines, columns=["what", "rows", "first"]).set_index("what")


def validate_rows(rows: Dataset, special_tokens: Sequence[str] = ()) -> tuple[Dataset, ValidationReport]:
    """Return the rows without those that would train the wrong thing, and a count of these by reason.

    A row is dropped if a text is not a string, is empty or very long, or holds a `<think>` tag or one of the tokenizer's special
    tokens (it would be read as a control token), or if its question came before. Raises DataError if no row is left."""
    forbidden = ("<think>", "</think>", *special_tokens)
    dropped, examples, kept, seen = Counter(), {}, [], set()
    for index, row in enumerate(rows):
        reason = _find_fault(row, forbidden) or ("duplicate question" if normalize(row["Question"]) in seen else None)
        if reason is None:
            kept.append(index)
            seen.add(normalize(row["Question"]))
        else:
            dropped[reason] += 1
            examples.setdefault(reason, str(row["id"]))
    report = ValidationReport(len(rows), len(kept), dict(dropped), examples)
    if not kept:
        raise DataError(f"no usable row is left of {len(rows)}: {report.reasons()}. Check the file and dataset.columns")
    return rows.select(kept), report


def _find_fault(row: Row, forbidden: Sequence[str]) -> str | None:
    for column in TEXT_COLUMNS:
        value = row[column]
        if not isinstance(value, str) or value in MARKS:
            return f"{column} {(value if isinstance(value, str) else NOT_A_STRING[kind_of(value)])[1:]}"
        if not value.strip():
            return f"{column} is empty"
        if len(value) > _MOST_CHARACTERS:
            return f"{column} is longer than {_MOST_CHARACTERS:,} characters"
        for token in forbidden:
            if token in value:
                return f"{column} holds {token}"
    return None


# --- split and repeats ---------------------------------------------------------------------------------------------


def split_rows(rows: Dataset, settings: DatasetSettings, seed: int) -> tuple[Dataset, Dataset]:
    """Return (train, held out): by the `split` column if there is one, else the first `num_rows` and the rows after them.

    Raises DataError if one side would be empty."""
    if settings.shuffle:
        rows = rows.shuffle(seed=seed)
    if "split" in rows.column_names:
        splits = rows["split"]
        train = rows.select([i for i, split in enumerate(splits) if split == "train"])
        held_out = rows.select([i for i, split in enumerate(splits) if split != "train"])
        train = train.select(range(min(settings.num_rows or len(train), len(train))))
        held_out = held_out.select(range(min(settings.held_out_rows, len(held_out))))
    else:
        most = len(rows) - settings.held_out_rows
        n_train = max(0, min(settings.num_rows or most, most))
        train = rows.select(range(n_train))
        held_out = rows.select(range(n_train, min(n_train + settings.held_out_rows, len(rows))))
    if (not len(train) or not len(held_out)) and "split" in rows.column_names:
        kinds = sorted(set(rows["split"]))
        splits = ", ".join(f"{kind:.60}" or "nothing" for kind in kinds[:_SHOWN_NAMES])
        more = f" and {len(kinds) - _SHOWN_NAMES} more" if len(kinds) > _SHOWN_NAMES else ""
        raise DataError(
            f"the column `split` holds {splits}{more}: rows to train on must say "
            f"train, and at least one row something else (it is held out)"
        )
    if not len(train) or not len(held_out):
        raise DataError(
            f"{len(rows)} usable rows leave {len(train)} to train on and {len(held_out)} held out: "
            f"give more rows or lower dataset.held_out_rows ({settings.held_out_rows})"
        )
    return train, held_out


def choose_questions(held_out: Dataset, count: int) -> list[Question]:
    """Return the evaluation questions: the article's own, which is not scored, and the first `count` held-out rows.

    Raises DataError if there are fewer rows."""
    if len(held_out) < count:
        raise DataError(
            f"evaluation.num_questions is {count}, but only {len(held_out)} rows are held out: "
            f"lower it with --set evaluation.num_questions={len(held_out)}"
        )
    article = Question(
        id="article",
        scored=False,
        specialty="the article's question",
        Question=ARTICLE_QUESTION,
        Complex_CoT="",
        Response=ARTICLE_ANSWER,
    )
    return [article, *map(_as_question, held_out.select(range(count)))]


def _as_question(row: Row) -> Question:
    texts = {column: row[column] for column in TEXT_COLUMNS}
    return Question(id=str(row["id"]), scored=True, specialty=row.get("specialty") or "", **texts)


def drop_repeats(train: Dataset, repeats: Sequence[Repeat]) -> Dataset:
    """Return the training rows without those that `find_repeats` found. Raises DataError if none is left."""
    repeated = {repeat["train_id"] for repeat in repeats}
    kept = train.select([index for index, row_id in enumerate(train["id"]) if str(row_id) not in repeated])
    if not len(kept):
        one = max(repeats, key=lambda repeat: repeat["similarity"])
        row = f"{one['train_id']}" if f"{one['train_id']}".startswith("row") else f"row {one['train_id']}"
        texts = [f"{' '.join(text.split())!r:.100}" for text in (one["train_question"], one.get("question", ""))]
        raise DataError(
            f"every training row repeats an evaluation question, for example {row}, {texts[0]}, repeats "
            f"{one['question_id']}, {texts[1]} (similarity {one['similarity']}, 8-word overlap {one['overlap']}). Hold out other "
            f"rows, raise dataset.near_repeat_similarity and dataset.ngram_overlap, or keep repeats with dataset.repeats=report"
        )
    return kept
