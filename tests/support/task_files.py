"""Small files of tasks in the forms that llama-perplexity reads, the same each time."""

from __future__ import annotations

import random
import struct
from pathlib import Path

_WHO = ("The cat", "A tall man", "My sister", "The old dog", "The teacher", "Our neighbour")
_WHERE = ("the kitchen", "the garden", "a small shop", "the library", "a quiet street")
_WHAT = {
    "washing the dishes": ("dries them with a towel.", "flies over the roof.", "eats the sink.", "sings of windows."),
    "reading a book": ("turns the page.", "pours the letters into a shoe.", "bakes the chair.", "swims to the wall."),
    "making some tea": ("waits until the water boils.", "paints the sea.", "drives to the moon.", "hides in a cloud."),
    "feeding the birds": ("scatters some seeds.", "reads them a letter.", "irons them flat.", "sells the wings."),
}
_BLANKS = (
    ("{a} lent money to {b} because _ was poor.", 2),
    ("{a} taught {b} to swim, and soon _ was the better swimmer.", 2),
    ("{a} is slower than {b}, so the race was won by _.", 2),
    ("{a} owed {b} an apology since _ had been rude.", 1),
    ("{a} envied {b} as the lucky one was _", 2),
)
_NAMES = (("Emma", "Laura"), ("David", "Mark"), ("Brian", "Al"), ("Jo", "Rachel"))


def choices(count: int, seed: int = 0) -> list[tuple[str, list[str], int]]:
    """Contexts, their endings, and the number of the right one."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        doing = rng.choice(list(_WHAT))
        endings = rng.sample(_WHAT[doing], 4)
        context = f"{doing.capitalize()}: {rng.choice(_WHO)} is {doing} in {rng.choice(_WHERE)}. Then somebody"
        found.append((context, endings, endings.index(_WHAT[doing][0])))
    return found


def write_hellaswag(path: Path, count: int = 24) -> Path:
    tasks = choices(count)
    path.write_text("".join(f"{c}\n{right}\n" + "".join(f"{e}\n" for e in endings) for c, endings, right in tasks))
    return path


def write_winogrande(path: Path) -> Path:
    """Twenty, of which every fifth ends with the blank's word; an empty line is at the end."""
    lines = []
    for a, b in _NAMES:
        for form, right in _BLANKS:
            sentence = form.format(a=a, b=b)
            sentence = f'"{sentence}"' if "," in sentence else sentence
            lines.append(f"{len(lines)},{sentence},{a},{b},{right}\n")
    path.write_text("".join(lines) + "\n")
    return path


def write_multiple_choice(path: Path, count: int = 24) -> Path:
    """Of two to four answers each."""
    tasks = []
    for number, (context, endings, right) in enumerate(choices(count, seed=1)):
        some = [right, *[i for i in range(4) if i != right][: 1 + number % 3]]
        labels = [int(i == right) for i in sorted(some)]
        tasks.append(
            packed(f"Question: what comes next? {context}\nAnswer:")
            + answers([endings[i] for i in sorted(some)], labels)
            + answers(["not", "used"], [1, 1])
        )
    path.write_bytes(multiple_choice(tasks))
    return path


def packed(text: str) -> bytes:
    return struct.pack("<I", len(text.encode())) + text.encode()


def answers(texts: list[str], labels: list[int]) -> bytes:
    return struct.pack("<I", len(texts)) + b"".join(map(packed, texts)) + struct.pack(f"<{len(labels)}i", *labels)


def multiple_choice(tasks: list[bytes]) -> bytes:
    places, place = [], 4 + 4 * len(tasks)
    for task in tasks:
        places.append(place)
        place += len(task)
    return struct.pack(f"<{len(tasks) + 1}I", len(tasks), *places) + b"".join(tasks)
