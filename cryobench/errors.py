"""The errors a user can mend: each message is one line that says what is wrong and how to mend it."""


class CryobenchError(Exception):
    """Something asked for could not be done (the command line exits with 1)."""


class BadFileError(CryobenchError):
    """A file is not what it says it is: truncated, a lying header, NaN, an unknown format."""


class SupervisionError(CryobenchError):
    """A method asked for data that its declared supervision does not allow."""
