"""The errors a user can meet, each with the exit code of the command that meets it.

A message says what came, what was expected and what to type next. It carries no patient's name, id or date and no path: the kind of
thing, counts, and at most "file 3 of 12".
"""


class DeftMedError(Exception):
    """Base of every error below; alone it stands for a bug (exit code 1)."""

    exit_code = 1


class UsageError(DeftMedError):
    """The command was asked for something that is not there: no such path, an unknown name, a pipe instead of a file."""

    exit_code = 2


class UnsupportedError(DeftMedError):
    """Readable, but not for us: colour, two series in a folder, a missing slice, a tilted stack, no spacing, a bad rescale."""

    exit_code = 3


class CorruptError(DeftMedError):
    """Broken bytes: an empty or truncated file, text under another name, an image of no rows."""

    exit_code = 4


class ResourceError(DeftMedError):
    """More memory or disk than allowed or there is."""

    exit_code = 6


class OutputError(DeftMedError):
    """The output is in the way or cannot be written."""

    exit_code = 7


class ModelError(DeftMedError):
    """The model's files are damaged, or its card does not fit the scan."""

    exit_code = 8


class QualityError(DeftMedError):
    """A quality check failed."""

    exit_code = 9
