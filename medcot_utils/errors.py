"""The one base class: an error whose message is meant for the user, without a traceback."""


class MedcotError(Exception):
    """Something the user can mend. The message names the thing, what was expected, and what to do."""


class PlatformError(MedcotError):
    """This machine cannot run what was asked for; the message says what is missing and what to do."""
