"""The exceptions that `sdd` raises on purpose."""


class UserError(Exception):
    """A mistake of the user, told in one line: what was given, what was expected, what to do.

    The command line prints the message without a traceback and exits with code 2.
    """


class RunFailed(Exception):
    """A run that cannot go on, told in one line; the command line exits with code 3."""


class Interrupted(Exception):
    """A run that Ctrl-C or SIGTERM ended after saving; the command line exits with code 130."""
