"""The backend selector's flags, and which of them go together."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from nkat.kobold.options import parse_arguments

MODEL = ["--model", "m.nkat"]


def test_without_flags() -> None:
    options = parse_arguments([])
    assert (options.model, options.backend, options.gpulayers, options.action) == (None, "auto", None, None)
    assert (options.host, options.port, options.contextsize, options.extra) == ("127.0.0.1", 5001, 4096, ())
    with pytest.raises(FrozenInstanceError):
        options.model = Path("another")


def test_what_is_behind_the_dashes_is_koboldcpps() -> None:
    options = parse_arguments([*MODEL, "--gpulayers", "auto", "--", "--quiet", "--list", "--", "x"])
    assert (options.extra, options.action, options.gpulayers) == (("--quiet", "--list", "--", "x"), None, None)


@pytest.mark.parametrize(
    ("flags", "action"),
    [
        (["--list"], "list"),
        (["--dry-run"], "dry_run"),
        (["--launch"], "launch"),
        (["--benchmark", "--save-config", "a.kcpps"], "benchmark"),
        (["--save-config", "a.kcpps"], "save"),
        ([], None),
    ],
)
def test_the_action(flags: list[str], action: str | None) -> None:
    assert parse_arguments([*MODEL, *flags]).action == action


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([*MODEL, "--dry-run", "--list", "--launch"], "--list and --launch exclude each other"),
        (["--list", "--dry-run"], "--list and --dry-run exclude each other"),
        (["--dry-run"], "--model FILE is needed"),
        (["--save-config", "a.kcpps"], "--model FILE is needed"),
        (["--list", "--theta", "t.bin"], "--model FILE is needed"),
        (["--base", "b.gguf"], "--model FILE is needed"),
        (["--contextsize", "255"], "--contextsize must be from 256 to 262144, got 255"),
        (["--contextsize", "262145"], "--contextsize must be from 256 to 262144, got 262145"),
        (["--port", "65536"], "--port must be at most 65535, got 65536"),
        (["--launch", "--port", "65536"], "--model FILE is needed"),  # one mistake at a time
    ],
)
def test_mistakes(flags: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_arguments(flags)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {said} (see --help)\n"


def test_the_limits_themselves_are_allowed() -> None:
    for context, port in ((256, 1), (262144, 65535)):
        options = parse_arguments(["--contextsize", str(context), "--port", str(port)])
        assert (options.contextsize, options.port) == (context, port)
