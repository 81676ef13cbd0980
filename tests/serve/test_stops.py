"""Stop strings, against one character at a time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nkat.serve.stops import Stops

WORDS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


def by_definition(text: str, words: list[str]) -> tuple[str, bool]:
    """The shortest beginning that ends with a word, without the longest such word."""
    for end in range(1, len(text) + 1):
        found = [word for word in words if text[:end].endswith(word)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@given(st.lists(st.text("ab", max_size=4), max_size=8), WORDS)
def test_the_text_ends_where_the_definition_says(pieces: list[str], words: list[str]) -> None:
    stops, shown, stopped = Stops(words), "", False
    whole, _ = by_definition("".join(pieces), words)
    for piece in pieces:
        more, stopped = stops.feed(piece)
        shown += more
        assert whole.startswith(shown)  # nothing is shown that has to be taken back
        if stopped:
            break
    if not stopped:
        shown += stops.rest()
    assert (shown, stopped) == by_definition("".join(pieces), words)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    stops = Stops(["###", "\nUser:"])
    assert stops.feed("one #") == ("one ", False)
    assert stops.feed("2 \nUs") == ("#2 ", False)
    assert stops.feed("e it") == ("\nUse it", False)
    assert stops.feed("##") == ("", False)
    assert stops.feed("# and more") == ("", True)
