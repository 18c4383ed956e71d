"""The one error a user can cause: what was given, what was expected, what to do."""


class MechunlearnError(ValueError):
    """A mistake in what was given. The command line prints it as one line and exits with code 2."""
