"""How a command begins where nothing is installed."""

import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """A Python that has the standard library alone."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=sys.platform != "win32")
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


SCRIPTS = sorted(path.name for path in ROOT.glob("*.py") if path.name != "setup_nkat_kobold_integration.py")


@pytest.mark.parametrize(
    "command", [*([name] for name in SCRIPTS), ["-m", "nkat.models"], ["-m", "nkat_vit.train"], ["-m", "examples.demo"]]
)
def test_without_packages_one_line_names_the_setup(bare, command):
    done = subprocess.run([bare, *command, "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
    setup = "python setup_nkat_kobold_integration.py"
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        f"error: this Python has no tqdm; what else is missing, and how to get it: {setup}"
    ]


def test_what_it_names_runs_there_and_from_elsewhere_too(bare, tmp_path):
    script = ROOT / "backend_selector.py"
    done = subprocess.run([bare, script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert f"python {ROOT / 'setup_nkat_kobold_integration.py'}" in done.stderr
    setup = [bare, ROOT / "setup_nkat_kobold_integration.py"]
    done = subprocess.run(setup, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install" in done.stdout


def test_a_module_of_ours_that_is_missing_is_a_fault():
    code = "from nkat.host.start import start; start('nkat.there_is_none')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr.endswith("ModuleNotFoundError: No module named 'nkat.there_is_none'\n")
