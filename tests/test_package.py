"""The package: what its wheel holds, and its commands where there is no checkout.

The wheel is installed into an environment of its own, which sees the packages of this one, so that nothing is fetched.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import os
import re
import signal
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path
from shutil import copy, copytree, ignore_patterns
from typing import Any

import pytest

import nkat
from nkat.host.start import start
from nkat.study import workers
from tests.conftest import ROOT
from tests.support.tiny_models import write_tiny_model

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings it
    import tomli as tomllib

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
COMMANDS: dict[str, str] = PROJECT["scripts"]
PACKAGES = ("nkat", "nkat_vit")
VERSION = f"nkat {nkat.__version__}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """From a copy: setuptools leaves a build folder behind, and takes stale modules from one that is there."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for path in ROOT.iterdir():
        if path.is_dir() and (path.name in PACKAGES or (path / "__init__.py").exists()):
            copytree(path, source / path.name, ignore=ignore_patterns("__pycache__"))
        elif path.suffix in (".py", ".md", ".toml", ".txt") or path.name == "LICENSE":
            copy(path, source)
    pip("wheel", source, "--no-deps", "--no-build-isolation", "--wheel-dir", target)
    return next(target.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the commands of an environment that has the wheel."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    scripts = folder / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / ("python.exe" if os.name == "nt" else "python")
    pip("--python", python, "install", "--no-deps", "--no-index", wheel)
    packages = next(folder.rglob("site-packages"))
    ours = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "this_environment.pth").write_text("\n".join(sorted(ours)) + "\n", encoding="utf-8")
    return scripts


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def elsewhere(scripts: Path, folder: Path, name: str, *arguments: object) -> str:
    """What a command prints that is run in `folder`."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [str(scripts / name), *map(str, arguments)],
        capture_output=True,
        encoding="utf-8",
        check=False,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        env=environment | {"PYTHONUTF8": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def call(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a command prints in this process."""
    module, _, function = COMMANDS[name].partition(":")
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as ended:
        getattr(importlib.import_module(module), function)()
    assert not ended.value.code
    return out.getvalue()


def test_the_wheel_has_both_packages_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.partition("/")[0].endswith(".dist-info")}
    files = [
        path
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.suffix in (".py", ".typed", ".txt", ".html")
    ]
    assert names == {path.relative_to(ROOT).as_posix() for path in files}
    assert {"nkat/py.typed", "nkat_vit/py.typed", "nkat/measure/kinds.txt", "nkat/serve/page.html"} <= names


def test_a_user_without_the_checkout_converts_and_measures(installed: Path, tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "tiny.gguf", "llama")
    (tmp_path / "text.txt").write_text("the hen and the inn in the rain " * 400, encoding="utf-8")
    elsewhere(installed, tmp_path, "nkat-convert", "--input", "tiny.gguf", "--output", "tiny.nkat")
    flags = ("--perplexity", "--text", "text.txt", "--chunks", 2, "--json", "record.json")
    printed = elsewhere(installed, tmp_path, "nkat-engine", "--model", "tiny.nkat", *flags)
    assert "with Θ" in printed
    record = (tmp_path / "record.json").read_text(encoding="utf-8")
    assert f'"nkat_version": "{nkat.__version__}"' in record
    assert '"git_commit": null' in record


def test_every_installed_command_is_the_wheels_own(installed: Path, tmp_path: Path) -> None:
    """And not this checkout's, which would hide what the wheel lacks. In one process, which loads torch once."""
    names = list(COMMANDS)
    program = f"""
import sys
from importlib.metadata import distribution
for name in {names!r}:
    sys.argv = [name, "--version"]
    try:
        distribution("nkat").entry_points[name].load()()
    except SystemExit as end:
        print(end.code)
(plugin,) = distribution("nkat").entry_points.select(group="lm_eval.models", name="nkat")
print(plugin.value)
print(*(module.__file__ for name, module in sys.modules.items() if name.partition(".")[0] in {PACKAGES!r}), sep="\\n")
"""
    lines = elsewhere(installed, tmp_path, "python", "-c", program).splitlines()
    assert lines[: 2 * len(names)] == [VERSION, "0"] * len(names)
    plugin, *files = lines[2 * len(names) :]
    assert plugin == "nkat.harness.plugin:NkatLM"  # where lm-eval looks for it
    assert len(files) > 50
    assert all(Path(file).is_relative_to(installed.parent) for file in files)
    assert {path.stem for path in installed.glob("nkat-*")} == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_a_version(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"usage: {name} " in call(name, "--help", monkeypatch=monkeypatch)
    assert call(name, "--version", monkeypatch=monkeypatch).startswith(VERSION)


@pytest.mark.parametrize("name", [path.name for path in sorted(ROOT.glob("*.py"))])
def test_scripts_of_the_checkout_have_a_version(script, name: str) -> None:
    done = script(name, "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(VERSION)


def test_examples_in_the_help_call_what_the_user_called(script, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\n  python nkat_gguf_converter.py --input" in script("nkat_gguf_converter.py", "--help").stdout
    printed = call("nkat-convert", "--help", monkeypatch=monkeypatch)
    assert "\n  nkat-convert --input" in printed
    assert ".py" not in printed
    assert "\n  nkat-vit-train --dataset" in call("nkat-vit-train", "--help", monkeypatch=monkeypatch)


def test_commands_are_there_before_torch() -> None:
    """Ctrl-C while a command's modules load is caught; so the module that catches it must itself load none of them."""
    program = "import sys, nkat.commands, nkat_vit.commands; print({'torch', 'numpy', 'optuna'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "set()\n"


def test_commands_start_without_llvm() -> None:
    """It is loaded where a kernel is compiled: whoever asks for help, or makes a mistake, does not wait for it."""
    modules = "nkat.convert.job, nkat.inference.job, nkat.kobold.session, nkat.search.job, nkat.serve.job"
    program = f"import sys, {modules}; print('llvmlite' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "False\n"


def test_ctrl_c_while_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (tmp_path / "slow_to_load.py").write_text("raise KeyboardInterrupt", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit) as ended:
        start("slow_to_load")
    assert ended.value.code == 130
    assert capsys.readouterr().err.count("\n") == 1


def guards(path: Path) -> list[tuple[int, str]]:
    """(position, module that is started) of each top-level `if __name__ == "__main__"` that starts a command."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    found = [(i, ast.unparse(node)) for i, node in enumerate(body) if isinstance(node, ast.If)]
    return [(i, m[1]) for i, text in found if (m := re.search(r"__main__'.*\bstart\('([\w.]+)'\)", text, re.DOTALL))]


def test_what_python_dash_m_runs_is_started_before_it_loads() -> None:
    """A module that is a command: behind its docstring and `from __future__` alone, with its own name."""
    paths = [path for name in (*PACKAGES, "benchmarks", "examples") for path in (ROOT / name).rglob("*.py")]
    commands = [
        path for path in paths if re.search(r"commandline\.run|\brun\(main\)|\bstart\(\"", path.read_text("utf-8"))
    ]
    commands = [path for path in commands if path.name not in ("commands.py", "start.py")]
    assert len(commands) > 20
    for path in commands:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        assert guards(path) == [(2, name)], path


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
@pytest.mark.parametrize("lost", [False, True])
def test_ctrl_c_during_imports_is_one_line(tmp_path: Path, lost: bool) -> None:
    """Also where Python or a library would lose the exception: in a callback, in a `try` of its own."""
    (tmp_path / "waits.py").write_text("import time\nprint('loading', flush=True)\ntime.sleep(60)\n", encoding="utf-8")
    load = "try:\n    import waits\nexcept BaseException:\n    pass\n" if lost else "import waits\n"
    begin = "if __name__ == '__main__':\n    from nkat.host.start import start\n    start('command')\n"
    (tmp_path / "command.py").write_text(f"{begin}{load}def main(): print('ran')\n", encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    pipe = subprocess.PIPE
    command = [sys.executable, "-m", "command"]
    child = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, cwd=tmp_path)
    assert child.stdout is not None
    assert child.stdout.readline() == "loading\n"
    child.send_signal(signal.SIGINT)
    assert child.communicate(timeout=60) == ("", "interrupted; nothing was written\n")
    assert child.returncode == 130


def test_a_searchs_workers_run_what_windows_calls_exe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A console script there is NAME.exe and calls itself NAME."""
    (tmp_path / "script.py").touch()
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "script.py"), "--workers", "2"])
    assert workers.own_program() == str(tmp_path / "script.py")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "nkat-optimize"), "--workers", "2"])
    assert workers.own_program() == str(tmp_path / "nkat-optimize.exe")


def test_dependencies_are_written_once() -> None:
    """What users need is in requirements.txt alone; what an extra and developers need asks for the same version."""
    assert "dependencies" in PROJECT["dynamic"]
    extras = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    developers = (ROOT / "requirements-dev.txt").read_text(encoding="utf-8").splitlines()
    both = {name_of(line) for line in extras} & {name_of(line) for line in developers}
    assert "libgguf" in both
    assert {line for line in extras if name_of(line) in both} <= set(developers)


def name_of(requirement: str) -> str:
    """libgguf>=0.2 → libgguf"""
    return re.split(r"[^\w.-]", requirement)[0]
