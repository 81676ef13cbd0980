"""One request to a running KoboldCpp, or to its stand-in."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Mapping
from typing import Any


def post(url: str, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """One JSON request to KoboldCpp's API on this machine, past any proxy that the environment names."""
    request = urllib.request.Request(f"{url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=600) as answer:
        return json.loads(answer.read())
