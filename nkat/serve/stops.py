"""Stop strings in a text that comes piece by piece."""

from __future__ import annotations

from collections.abc import Sequence


class Stops:
    """Holds back what may yet become a stop string, and ends the text before the first that is whole.

    The pieces in which a text comes change nothing: it ends where it would if it came one character at a time.
    """

    def __init__(self, words: Sequence[str]) -> None:
        """words: none of them empty"""
        self._words = tuple(words)
        self._held = ""

    def feed(self, piece: str) -> tuple[str, bool]:
        """What can be shown now, and whether a stop string ended the text."""
        self._held += piece
        ends = [(at + len(word), at) for word in self._words if (at := self._held.find(word)) >= 0]
        if ends:
            shown, self._held = self._held[: min(ends)[1]], ""
            return shown, True
        keep = max((self._begun(word) for word in self._words), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, False

    def rest(self) -> str:
        """What was held back of a text that has ended by itself."""
        shown, self._held = self._held, ""
        return shown

    def _begun(self, word: str) -> int:
        """How many characters at the end are the word's first."""
        longest = min(len(word) - 1, len(self._held))
        return next((size for size in range(longest, 0, -1) if self._held.endswith(word[:size])), 0)
