"""The one exception type whose message is meant for the user.

Scripts catch `NKATError`, print its message as one line on stderr and exit with status 2.
Anything else that escapes is a bug and keeps its traceback.
"""


class NKATError(Exception):
    """A user's mistake or an input that cannot be used; the message is one complete line.

    What a message quotes from a file may hold line breaks, codes that control a terminal, or halves of characters that
    cannot be printed: they are shown as escapes.
    """

    def __str__(self) -> str:
        text = super().__str__()
        if text.isprintable():
            return text
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
