"""The one exception a user's mistake raises."""


class RerouteError(ValueError):
    """Bad input. The message is one line: what was wrong, what was expected, what to do."""
