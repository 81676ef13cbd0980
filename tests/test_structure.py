"""The shape of the code: no import cycles, scripts as leaves, optional packages optional, types for all."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT

TRUNK = ["errors", "host", "gguf", "theta", "kernels", "lm", "engine", "measure", "sources"]
MAY = {room: {"version", *TRUNK[:i]} for i, room in enumerate(TRUNK)} | {
    "version": set(),
    "nkat": {"api", "errors", "host", "version"},  # the package itself: only names
    "hub": {"errors", "host"},
    "api": {*TRUNK, "hub"} - {"kernels"},
    "models": {"errors", "host", "hub"},
    "commands": {"host"},
    "setup_check": {"version", "errors", "host", "gguf", "theta", "lm", "kobold"},
    "study": {"errors", "host"},
    "kobold": {"errors", "host", "hub", "gguf", "theta"},
    "inference": {*TRUNK, "hub"} - {"sources", "kernels"},
    "harness": {*TRUNK, "hub"} - {"sources", "measure", "kernels"},
    "serve": {*TRUNK, "hub"} - {"sources", "measure", "kernels"},
    "convert": {*TRUNK, "hub"} - {"engine", "kernels"},
    "search": {*TRUNK, "hub", "study"} - {"kernels"},
    "nkat_vit": {"nkat", "errors", "host", "kernels", "study"},  # "nkat": how threads wait
}  # which rooms a room may import

PACKAGES = [name for name in ("nkat", "nkat_vit") if (ROOT / name).is_dir()]
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))
OPTIONAL = {
    "triton",
    "lm_eval",
    "pynvml",
    "libgguf",
    "kornia",
    "safetensors",
    "tensorboard",
    "starlette",
    "uvicorn",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "pytest",
    "hypothesis",
}  # not in requirements.txt


# What only another program imports, which is there then.
PLUGINS = {"nkat.harness.plugin": "lm_eval"}


def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Full names a file imports; `from a import b` gives a and a.b."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else ast.walk(tree)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def import_graph() -> dict[str, set[str]]:
    known = modules()
    return {
        name: {other for other in imports(path) if other in known and other != name} for name, path in known.items()
    }


def room(module: str) -> str:
    """The room a module is in: `nkat.gguf.file` → gguf; everything of the image side is one."""
    package, _, rest = module.partition(".")
    first = rest.partition(".")[0]
    if package != "nkat" or not first:
        return package
    return first


def crossings(graph: Mapping[str, set[str]]) -> list[tuple[str, str]]:
    """(importer, imported) that go up or sideways."""
    pairs = ((a, b) for a, found in graph.items() for b in found)
    return [(a, b) for a, b in pairs if room(a) != room(b) and room(b) not in MAY[room(a)]]


def test_imports_only_go_down() -> None:
    assert not crossings(import_graph())


def test_an_import_upwards_would_be_found() -> None:
    assert crossings({"nkat.gguf.file": {"nkat.lm.load"}})
    assert crossings({"nkat.convert.job": {"nkat.search.job"}})
    assert crossings({"nkat_vit.train": {"nkat.measure.judge"}})
    assert not crossings({"nkat.lm.load": {"nkat.gguf.file"}})


def test_every_room_is_in_the_rule() -> None:
    assert {room(name) for name in modules()} <= MAY.keys() | {"nkat"}


def test_imports_have_no_cycle() -> None:
    graph = import_graph()
    assert len(graph) > 15
    list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_a_cycle_would_be_found() -> None:
    graph = import_graph()
    graph["nkat.errors"] = {"nkat.lm.load"}
    with pytest.raises(CycleError):
        list(TopologicalSorter(graph).static_order())


def test_nothing_imports_a_script() -> None:
    assert "nkat_gguf_converter" in SCRIPTS
    files = [*modules().values(), *ROOT.glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    for path in files:
        roots = {name.partition(".")[0] for name in imports(path)}
        assert not roots & set(SCRIPTS), path


def test_the_language_side_does_not_know_the_image_side() -> None:
    known = modules()
    assert any(imports(path) & {"nkat.errors"} for name, path in known.items() if name.startswith("nkat_vit."))
    for name, path in known.items():
        if name.partition(".")[0] == "nkat":
            assert not {other for other in imports(path) if other.partition(".")[0] == "nkat_vit"}, name


def test_every_module_imports_without_optional_packages() -> None:
    """In a fresh interpreter that refuses them; `ensurepip` stands in as the control that refusing works."""
    program = f"""
import importlib, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL | {"ensurepip"}!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
for name in {sorted(modules().keys() - PLUGINS)!r}:
    importlib.import_module(name)
try:
    import ensurepip
except ModuleNotFoundError:
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "refused"


def test_a_plugin_is_what_another_program_imports() -> None:
    """Nothing of ours imports it, and it alone needs that program's package when it is loaded."""
    roots = {name: {i.partition(".")[0] for i in imports(path, True)} for name, path in modules().items()}
    for plugin, package in PLUGINS.items():
        assert {name for name, found in roots.items() if package in found} == {plugin}
        assert not {name for name, found in import_graph().items() if plugin in found}


def test_no_module_is_exempt_from_types_without_a_reason() -> None:
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    overrides = [i for i, line in enumerate(lines) if line == "[[tool.mypy.overrides]]"]
    assert overrides
    for i in overrides:
        assert lines[i - 1].startswith("# "), f"pyproject.toml, line {i + 1}: a comment above says why"


def longer_than(paths: Iterable[Path], limit: int) -> dict[Path, int]:
    lines = {path: path.read_text(encoding="utf-8").count("\n") for path in paths}
    return {path: count for path, count in lines.items() if count > limit}


def test_files_stay_small() -> None:
    assert not longer_than(modules().values(), 540)
    assert not longer_than(ROOT.glob("*.py"), 40)  # scripts: a docstring, an import, a call
    assert longer_than(modules().values(), 400)  # the control
