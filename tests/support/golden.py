"""What another program computed, for comparison; tests/golden/README.md says which."""

import json
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).resolve().parent.parent / "golden"


def read_golden(name: str) -> Any:
    """The content of tests/golden/{name}.json."""
    return json.loads((_FOLDER / f"{name}.json").read_text(encoding="utf-8"))
