"""The backend selector's flags, and which of them go together."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from nkat.kobold.options import parse_arguments
from nkat.theta.combine import WeightedFile

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
        ([*MODEL, "--gpulayers", "-2"], "argument --gpulayers: must be at least 0, got -2; or auto"),
        ([*MODEL, "--quantkv", "q3_k"], "argument --quantkv: must be one of f16, bf16, q8_0, q5_1, q4_0, got 'q3_k'"),
        (
            [*MODEL, "--kobold", "k", "--runtime", "llama-server"],
            "the program that was named is not the one of --runtime llama-server",
        ),
        ([*MODEL, "--llama-server", "k"], "the program that was named is not the one of --runtime koboldcpp"),
        ([*MODEL, "--autofit", "--gpulayers", "3"], "--autofit and --gpulayers N exclude each other"),
        ([*MODEL, "--autofit", "--benchmark"], "--benchmark measures splits, so --autofit has no meaning there"),
        ([*MODEL, "--draftamount", "3"], "--draftamount needs --draftmodel"),
        ([*MODEL, "--list", "--output-format", "csv"], "--output-format is of what --benchmark measures"),
        (["--router", "a", "--admin", "a"], "--router and --admin exclude each other"),
        (["--router", "a", "--list"], "--router and --admin serve models: give --launch or --dry-run"),
        ([*MODEL, "--router", "a", "--theta", "b"], "--router and --admin take models with their own Θ, not --theta"),
        (
            ["--admin", "a", "--save-config", "b"],
            "--router and --admin write files of their own, so --save-config has no meaning",
        ),
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


def test_automatic_layers_by_each_name() -> None:
    for flags in ([], ["--gpulayers", "auto"], ["--gpulayers", "-1"]):
        assert parse_arguments([*MODEL, *flags]).gpulayers is None
    assert parse_arguments([*MODEL, "--gpulayers", "0"]).gpulayers == 0


def test_the_caches_type_by_name_and_by_koboldcpps_number() -> None:
    found = {text: parse_arguments([*MODEL, "--quantkv", text]).quantkv for text in ("0", "1", "2", "3", "Q5_1")}
    assert found == {"0": "f16", "1": "q8_0", "2": "q4_0", "3": "bf16", "Q5_1": "q5_1"}


def test_several_thetas() -> None:
    found = parse_arguments([*MODEL, "--theta", "a.bin", "--theta-scaled", "b.bin:0.5"]).thetas
    assert found == (WeightedFile(Path("a.bin")), WeightedFile(Path("b.bin"), 0.5))
