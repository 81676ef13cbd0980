"""`setup_nkat_kobold_integration.py`: its table, the commands that mend, its exit status; and it changes nothing."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import gguf
import pytest

from nkat import __version__, setup_check
from nkat.host.programs import shell_line
from tests.conftest import ROOT
from tests.support.fake_koboldcpp import NEW, OLD, install, mark_when_run
from tests.support.tiny_models import write_tiny_model
from tests.support.user import empty_home

SETUP = "setup_nkat_kobold_integration.py"
REAL = os.environ.get("KOBOLDCPP")


@pytest.fixture(autouse=True)
def user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty home and nothing on the PATH; returns the working folder."""
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    return empty_home(monkeypatch, tmp_path)


def check(script, *arguments: object) -> tuple[int, dict[str, dict]]:
    """Exit status, and the checks by their names."""
    done = script(SETUP, "--json", *arguments)
    record = json.loads(done.stdout.splitlines()[-1])
    steps = done.stderr.splitlines()
    assert [line.partition(": ")[0] for line in steps] == (["", "next"] if record["ready"] else [])
    assert not steps or "nkat_auto_optimizer.py --model" in steps[1]
    assert record["ready"] == (done.returncode == 0)
    assert record["ready"] == all(row["state"] != "missing" for row in record["checks"])
    for row in record["checks"]:
        assert row["state"] in ("ok", "warning", "missing")
        assert row["mend"] or row["state"] == "ok"  # whatever is wrong comes with what to do
    return done.returncode, {row["name"]: row for row in record["checks"]}


def files_below(*folders: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for folder in folders for p in folder.rglob("*") if p.is_file()}


def test_ready(script, user: Path, tmp_path: Path) -> None:
    install(tmp_path / "home" / "koboldcpp", NEW, ("default", "failsafe"))
    status, checks = check(script)
    assert status == 0
    assert checks["KoboldCpp"]["found"].startswith(f"{NEW}, ")
    assert checks["backends"]["found"] == "cpu, failsafe"
    assert {"Python", "toolkit", "packages", "processor", "GPU", "model", "disk"} < set(checks)
    assert "torch" in checks["packages"]["found"]


def test_without_koboldcpp(script) -> None:
    status, checks = check(script)
    assert status == 1
    assert checks["KoboldCpp"]["state"] == "missing"
    assert checks["KoboldCpp"]["mend"].startswith("curl")


def test_nothing_of_the_current_folder_is_run(script, user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = mark_when_run(user / "koboldcpp.py", user / "koboldcpp", user / "nvidia-smi", user / "git")
    monkeypatch.setenv("PATH", os.pathsep.join(["", ".", str(user)]))
    status, checks = check(script)
    assert (status, checks["KoboldCpp"]["state"]) == (1, "missing")
    assert (
        "koboldcpp.py is in the current folder and was not run; --kobold koboldcpp.py" in checks["KoboldCpp"]["found"]
    )
    assert not ran.exists()
    check(script, "--kobold", "koboldcpp.py")  # the control
    assert ran.exists()


def test_a_koboldcpp_that_cannot_run(script, tmp_path: Path) -> None:
    bare = install(tmp_path / "kobold", OLD, ())
    status, checks = check(script, "--kobold", bare)
    assert (status, "no backend runs here" in checks["KoboldCpp"]["found"]) == (1, True)
    (tmp_path / "kobold" / "koboldcpp.py").write_text("1 / 0")
    status, checks = check(script, "--kobold", bare)
    assert (status, "ZeroDivisionError" in checks["KoboldCpp"]["found"]) == (1, True)


def test_models(script, user: Path, tmp_path: Path) -> None:
    install(tmp_path / "home" / "koboldcpp", NEW)
    model = write_tiny_model(tmp_path / "m.gguf", "llama", qtype=gguf.GGMLQuantizationType.Q8_0)
    status, checks = check(script, "--model", model)
    assert (status, "llama, 3 blocks" in checks["model"]["found"]) == (0, True)
    nkat = tmp_path / "m.nkat"
    assert script("nkat_gguf_converter.py", "--input", model, "--output", nkat).returncode == 0
    assert "Θ of rank 4" in check(script, "--model", nkat)[1]["model"]["found"]
    for name, data in (
        ("absent.gguf", None),
        ("broken.gguf", b"GGUF\3"),
        ("text.gguf", b"hello, this is no model at all"),
    ):
        if data is not None:
            (tmp_path / name).write_bytes(data)
        status, checks = check(script, "--model", tmp_path / name)
        assert (status, checks["model"]["state"]) == (1, "missing"), name


def test_it_changes_nothing(script, user: Path, tmp_path: Path) -> None:
    install(tmp_path / "home" / "koboldcpp", NEW)
    model = write_tiny_model(tmp_path / "m.gguf", "llama")
    before = files_below(tmp_path)
    done = script(SETUP, "--model", model)
    assert done.returncode == 0, done.stderr
    assert "ready: the workflow" in done.stdout
    assert files_below(tmp_path) == before
    assert not (tmp_path / "cache").exists()


def test_record_in_a_file(script, user: Path, tmp_path: Path) -> None:
    install(tmp_path / "home" / "koboldcpp", NEW)
    target = tmp_path / "r.json"
    assert script(SETUP, "--json", target).returncode == 0
    assert json.loads(target.read_text(encoding="utf-8"))["ready"] is True
    again = script(SETUP, "--json", target)
    assert (again.returncode, "exists already" in again.stderr) == (2, True)
    assert script(SETUP, "--json", target, "--force").returncode == 0
    nowhere = script(SETUP, "--json", tmp_path / "no" / "r.json")
    assert (nowhere.returncode, "cannot be written" in nowhere.stderr) == (2, True)


def test_without_any_package(tmp_path: Path, user: Path) -> None:
    """In an interpreter that sees no site-packages: what a fresh Python is like."""
    for name in ("nkat", SETUP, "requirements.txt"):
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copyfile
        copy(source, tmp_path / name, **({"ignore": shutil.ignore_patterns("__pycache__")} if source.is_dir() else {}))
    command = [sys.executable, "-S", "-E", str(tmp_path / SETUP), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    checks = {row["name"]: row for row in json.loads(done.stdout.splitlines()[-1])["checks"]}
    assert checks["packages"]["state"] == "missing"
    assert "torch (not installed)" in checks["packages"]["found"]
    assert "-m pip install -r" in checks["packages"]["mend"]
    assert checks["toolkit"]["state"] == "missing"  # the other scripts were not copied
    assert "nkat_auto_optimizer.py" in checks["toolkit"]["found"]


def test_versions_are_compared_as_numbers(script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: {"torch": "2.13.0+cpu", "gguf": "0.9"}.get(name, "99")
    )
    _, checks = check(script)
    assert checks["packages"]["found"].startswith("gguf (0.9, needs 0.")
    assert "torch" not in checks["packages"]["found"]


def test_old_pythons_can_read_it() -> None:
    """3.8 parses it and gets as far as saying that it is too old; the toolkit itself needs 3.10 (the control)."""
    first = {"nkat/setup_check.py", "nkat/__init__.py", "nkat/errors.py", "nkat/version.py"}
    host = ("__init__", "environment", "programs", "start", "streams", "tools")
    first |= {"nkat/commands.py", *(f"nkat/host/{name}.py" for name in host)}
    light = {"nkat.errors", "nkat.version", *(f"nkat.host.{name}".removesuffix(".__init__") for name in host)}
    for path in (SETUP, *first):
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"), feature_version=(3, 8))
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {getattr(node, "module", None) or node.names[0].name for node in top}
        assert {name for name in names if name.startswith("nkat")} <= light, path
    with pytest.raises(SyntaxError):
        ast.parse("match x:\n    case 1:\n        pass", feature_version=(3, 8))


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def interrupted() -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(setup_check, "check_toolkit", interrupted)
    monkeypatch.setattr(sys, "argv", [SETUP])
    with pytest.raises(SystemExit) as ended:
        setup_check.main()
    assert (ended.value.code, capsys.readouterr()) == (130, ("", "interrupted; nothing was written\n"))


def test_the_script_alone_says_what_is_missing(tmp_path: Path) -> None:
    shutil.copyfile(ROOT / SETUP, tmp_path / SETUP)
    command = [sys.executable, "-S", "-E", str(tmp_path / SETUP)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "nkat is not beside this script" in done.stderr


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """As by pip: nothing of a checkout beside the package, and metadata; returns the folder it is in."""
    monkeypatch.setattr(setup_check, "ROOT", tmp_path / "site-packages")
    monkeypatch.setattr("importlib.metadata.requires", lambda name: ["torch>=2.6", 'onnx; extra == "onnx"'])
    monkeypatch.setattr("importlib.metadata.version", lambda name: "9")
    monkeypatch.setattr(sys, "argv", ["nkat-setup"])
    return tmp_path / "site-packages"


def setup_says(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str]:
    """Exit status of `nkat-setup`, and what it printed."""
    sys.argv[1:] = arguments
    with pytest.raises(SystemExit) as ended:
        setup_check.main()
    return ended.value.code, capsys.readouterr().out


def test_an_installed_package_asks_its_own_metadata(installed: Path, user: Path, capsys) -> None:
    install(user.parent / "home" / "koboldcpp", NEW)
    status, said = setup_says(capsys)
    assert status == 0
    assert re.search(rf"^toolkit +ok +nkat {re.escape(__version__)}, {re.escape(str(installed))}$", said, re.MULTILINE)
    assert re.search(r"^packages +ok +torch 9$", said, re.MULTILINE)  # and not onnx


def test_what_an_installed_package_lacks(installed: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("importlib.metadata.requires", lambda name: ["torch>=2.6", "gguf>=99"])
    status, said = setup_says(capsys)
    assert (status, "gguf (9, needs 99)" in said) == (1, True)
    assert f"mend: {shell_line([sys.executable])} -m pip install {shell_line(['gguf>=99'])}\n" in said


def test_help_names_the_command_that_is_there(installed: Path, capsys) -> None:
    status, said = setup_says(capsys, "--help")
    assert (status, "\n  nkat-setup --json\n" in said) == (0, True)
    assert ("setup_nkat" in said, "{" in said) == (False, False)


def test_help_of_the_script(script) -> None:
    assert f"\n  python {SETUP} --json\n" in script(SETUP, "--help").stdout


def test_a_package_that_pip_does_not_know_is_half_a_checkout(
    installed: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def unknown(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", unknown)
    status, said = setup_says(capsys)
    assert (status, f"backend_selector.py, requirements.txt in {installed}" in said) == (1, True)


def test_mistakes_are_one_line(fails) -> None:
    assert "unrecognized arguments: --nonsense" in fails(SETUP, "--nonsense")


@pytest.mark.skipif(REAL is None, reason="KOBOLDCPP names no KoboldCpp")
def test_the_real_one(script) -> None:
    status, checks = check(script, "--kobold", REAL)
    assert (status, checks["KoboldCpp"]["state"]) == (0, "ok")
    assert "cpu" in checks["backends"]["found"]
