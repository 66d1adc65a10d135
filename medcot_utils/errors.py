"""The errors that every room may raise. Their messages are meant for the user, without a traceback."""

from medcot_utils.plain_text import one_line
from medcot_utils.token_shapes import hide_by_look


class MedcotError(Exception):
    """Something the user can fix. The message says what is wrong, what was expected, and what to do."""

    def __str__(self) -> str:
        """Return the message as one line without control characters or tokens: it may quote data, a command line or another
        library that hold them."""
        return one_line(hide_by_look(super().__str__()))


def quote(value: object, limit: int = 80) -> str:
    """Return a value as a message quotes it: its repr without tokens, cut in the middle to about `limit` characters."""
    text = hide_by_look(repr(value))
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"


class PlatformError(MedcotError):
    """This machine cannot run what was asked for; the message says what is missing and what to do."""


EX_INTERRUPTED = 130  # the exit code after Ctrl-C: 128 and the signal's number, as shells have it


class SeriesInterrupted(MedcotError):
    """Ctrl-C ended the series. The message says where; the next call resumes it."""


EX_PAUSED = 75  # the exit code of a paused series: EX_TEMPFAIL, try again


class SeriesPaused(MedcotError):
    """The series ended in time, as training.max_hours asked. Nothing failed; the next call resumes it."""
