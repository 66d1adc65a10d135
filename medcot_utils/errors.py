"""The errors that every room may raise. Their messages are meant for the user, without a traceback."""


class MedcotError(Exception):
    """Something the user can fix. The message says what is wrong, what was expected, and what to do."""


class PlatformError(MedcotError):
    """This machine cannot run what was asked for; the message says what is missing and what to do."""


EX_INTERRUPTED = 130  # the exit code after Ctrl-C: 128 and the signal's number, as shells have it


class SeriesInterrupted(MedcotError):
    """Ctrl-C ended the series. The message says where; the next call resumes it."""


EX_PAUSED = 75  # the exit code of a paused series: EX_TEMPFAIL, try again


class SeriesPaused(MedcotError):
    """Training ended in time, as training.max_hours asked. Nothing failed; the next call resumes it."""
