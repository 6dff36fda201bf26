"""The exceptions that `sdd` raises on purpose."""


class SddError(Exception):
    """Any of them.

    Attributes:
        rank: which process of a run of several tells it: the first, if all of them meet it.
    """

    rank = 0


class UserError(SddError):
    """A mistake of the user, told in one line: what was given, what was expected, what to do.

    The command line prints the message without a traceback and exits with code 2.
    """


class RunFailed(SddError):
    """A run that cannot go on, told in one line; the command line exits with code 3."""


class Diverged(RunFailed):
    """A run whose loss, gradient or weights are no sound numbers any more: what was trained failed, not the machine."""


class Interrupted(SddError):
    """A run that Ctrl-C or SIGTERM ended after saving; the command line exits with code 130."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was refused, or so much was asked for that its amount is no number any more."""
    known = "out of memory", "can't allocate memory", "multiplication overflow", "calculation overflow"
    return isinstance(error, MemoryError) or any(words in str(error) for words in known)


def one_line(text: object) -> str:
    """A message as one line that cannot do anything to a terminal, whatever names of files it repeats."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in str(text))
