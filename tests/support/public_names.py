"""What both packages promise of the names they give: few, documented, and loaded when they are first used."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest

from tests.conftest import ROOT


def check_names(package: ModuleType) -> None:
    """At most ten, all of them documented and listed, and no others."""
    assert len(package.__all__) <= 10
    for name in set(package.__all__) - {"__version__"}:
        assert getattr(package, name).__doc__, name
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        package.nothing  # noqa: B018


def check_light(package: ModuleType, heavy: set[str], first: str) -> None:
    """Importing the package loads nothing of `heavy`; and the control: the name `first`, when it is used, does.

    heavy: "torch" among them
    """
    loaded = f"{heavy} & set(sys.modules)"
    use = f"from {package.__name__} import {first}"
    program = f"import sys, {package.__name__}; print({loaded}); {use}; print('torch' in {loaded})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines() == ["set()", "True"]
