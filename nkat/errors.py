"""The one exception type whose message is meant for the user.

Scripts catch `NKATError`, print its message as one line on stderr and exit with status 2.
Anything else that escapes is a bug and keeps its traceback.
"""


class NKATError(Exception):
    """A user's mistake or an input that cannot be used; the message is one complete line."""
