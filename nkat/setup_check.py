"""Says what this machine has of all that the toolkit and KoboldCpp need, and the command that mends what is missing.

`setup_nkat_kobold_integration.py` and `nkat-setup` run it. It changes nothing. Its first part runs with the standard
library alone and on old Pythons, because a machine on which nothing is installed is exactly what it is for; hence no
import from the toolkit up here but for the version, the streams and the like, and no newer syntax.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import sys
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from nkat.host import output, streams
from nkat.host.programs import shell_line
from nkat.host.start import INTERRUPTED, MESSAGE
from nkat.host.start import SETUP as SCRIPT
from nkat.host.tools import suggest
from nkat.version import __version__

if TYPE_CHECKING:
    from nkat.kobold.machine import Machine

ROOT = Path(__file__).resolve().parents[1]  # of a checkout; beside an installed package stands nothing of the toolkit
REQUIREMENTS = "requirements.txt"
NEEDED_PYTHON = (3, 10)
OK, WARNING, MISSING = "ok", "warning", "missing"
SCRIPTS = ("nkat_gguf_converter.py", "nkat_inference_engine.py", "nkat_auto_optimizer.py", "backend_selector.py")
LOW_DISK = 5_000_000_000  # bytes, when there is no model to count with
EXAMPLES = """\
examples:
  {command}
  {command} --model models/llama-7b-q4_k_m.gguf --kobold ~/koboldcpp
  {command} --json

exit status:
  0 when nothing is missing (warnings do not count), 1 when something is, 2 for a mistake on the command line, 130 after
  Ctrl-C
"""


@dataclass(frozen=True)
class Check:
    """One line of the table; mend: the command that puts it right, or what else to do, empty when nothing is wrong."""

    name: str
    state: str
    found: str
    mend: str = ""


class Parser(argparse.ArgumentParser):
    """As in nkat/host/commandline.py, which needs a newer Python: a mistake is one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see --help)\n")


@dataclass(frozen=True)
class SetupOptions:
    """What is checked besides this machine, and where the record goes: "-" for stdout, None for nowhere."""

    model: Path | None
    kobold: Path | None
    json: str | None
    force: bool


def parse_arguments() -> SetupOptions:
    parser = Parser(
        description="Check Python, packages, processor, GPU, disk, KoboldCpp and a model. Changes nothing.",
        epilog=EXAMPLES.format(command="nkat-setup" if is_installed() else f"python {SCRIPT}"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", type=Path, metavar="FILE", help="a .gguf or .nkat to check as well")
    parser.add_argument("--kobold", type=Path, metavar="PATH", help="KoboldCpp: its program or its folder")
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="a machine-readable record, default stdout"
    )
    parser.add_argument("--force", action="store_true", help="replace --json's file")
    parser.add_argument("--version", action="version", version=f"nkat {__version__}")
    parser.add_argument("--quiet", action="store_true", help="no hint of what to do next")
    parsed = parser.parse_args()
    if parsed.quiet:
        output.be_quiet()
    return SetupOptions(parsed.model, parsed.kobold, parsed.json, parsed.force)


def main() -> NoReturn:
    """The command: its exit status says whether anything is missing."""
    with streams.guarded():
        try:
            status = check_everything()
        except KeyboardInterrupt:
            print(MESSAGE, file=sys.stderr)
            status = INTERRUPTED
        lost = streams.lost_output() if sys.stdout is not None else None
        if lost is not None and not isinstance(lost, BrokenPipeError):  # that is `... | head`, which has read enough
            print(f"error: stdout: cannot be written: {lost.strerror or lost}", file=sys.stderr)
            status = 2
        sys.exit(status)


def check_everything() -> int:
    options = parse_arguments()
    checks = [check_python(), check_toolkit(), *check_packages()]
    if all(check.state != MISSING for check in checks):
        checks += check_machine(options)
    else:
        checks.append(
            Check("the rest", MISSING, "cannot be checked before the above is mended", "mend it, run this again")
        )
    ready = all(check.state != MISSING for check in checks)
    status = 0 if ready else 1
    if options.json not in (None, "-"):
        status = write_record(options.json, options.force, checks, ready)
    print(table(checks))
    print(f"\n{'ready: the workflow of the guide can run here' if ready else 'not ready: see what is missing above'}")
    if options.json == "-":
        status = write_record(options.json, options.force, checks, ready)
    if ready:
        model = options.model or "MODEL.gguf"
        suggest("optimize", "--model", model, "--mode", "quick", "--output-dir", "output/quick")
    return status


def check_python() -> Check:
    version = ".".join(str(part) for part in sys.version_info[:3])
    found = f"{version}, {sys.executable}"
    if sys.version_info[:2] >= NEEDED_PYTHON:
        return Check("Python", OK, found)
    commands = {"win32": "winget install Python.Python.3.12", "darwin": "brew install python@3.12"}
    command = commands.get(sys.platform, "sudo apt install python3")
    return Check("Python", MISSING, f"{found}; needs {'.'.join(map(str, NEEDED_PYTHON))} or newer", command)


def is_installed() -> bool:
    """Whether pip put this package where it is: then what it needs is in its metadata, and there are no scripts."""
    if any((ROOT / name).exists() for name in (REQUIREMENTS, SCRIPT, *SCRIPTS)):
        return False
    try:
        importlib.metadata.version("nkat")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def check_toolkit() -> Check:
    if is_installed():
        return Check("toolkit", OK, f"nkat {__version__}, {ROOT}")
    absent = [name for name in (*SCRIPTS, REQUIREMENTS) if not (ROOT / name).is_file()]
    if absent:
        return Check(
            "toolkit",
            MISSING,
            f"no {', '.join(absent)} in {ROOT}",
            shell_line(["git", "-C", ROOT, "checkout", "--", "."]),
        )
    return Check("toolkit", OK, str(ROOT))


def check_packages() -> list[Check]:
    """A line for the packages that are needed and there, and one for those that are not."""
    present, problems, missing = [], [], []
    for name, wanted in needed_packages():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{name} (not installed)")
            missing.append(f"{name}>={wanted}")
            continue
        if number(version) < number(wanted):
            problems.append(f"{name} ({version}, needs {wanted})")
            missing.append(f"{name}>={wanted}")
        else:
            present.append(f"{name} {version}")
    checks = [Check("packages", OK, ", ".join(present))] if present else []
    if problems:
        checks.append(Check("packages", MISSING, ", ".join(problems), install_command(missing)))
    return checks


def needed_packages() -> list[tuple[str, str]]:
    """(name, lowest version): of requirements.txt, or, without a checkout, of what the installed package asks for."""
    if is_installed():
        wanted = importlib.metadata.requires("nkat") or []
        return read_requirements("\n".join(line for line in wanted if "extra ==" not in line))
    path = ROOT / REQUIREMENTS
    return read_requirements(path.read_text(encoding="utf-8")) if path.is_file() else []


def install_command(missing: list[str]) -> str:
    """pip in this Python, or in an environment of its own where the system's Python does not allow that (PEP 668)."""
    if is_installed():  # pip was allowed to install here; by their names, as no index need have this very package
        return shell_line([sys.executable, "-m", "pip", "install", *missing])
    requirements = ROOT / REQUIREMENTS
    managed = Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED"
    if sys.prefix != sys.base_prefix or not managed.exists():
        return shell_line([sys.executable, "-m", "pip", "install", "-r", requirements])
    folder = ROOT / ".venv"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    make = shell_line([sys.executable, "-m", "venv", folder])
    install = shell_line([python, "-m", "pip", "install", "-r", requirements])
    check = shell_line([python, ROOT / SCRIPT])
    return f"{make} && {install} && {check}"


def read_requirements(text: str) -> list[tuple[str, str]]:
    """(name, lowest version) of each line `name>=version`; other markers are left out."""
    return re.findall(r"^([A-Za-z][\w.-]*)\s*>=\s*([\d.]+)", text, re.MULTILINE)


def number(version: str) -> tuple[int, ...]:
    """2.13.0+cpu → (2, 13, 0): enough to compare lowest versions with."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def check_machine(options: SetupOptions) -> list[Check]:
    """Everything that needs the toolkit's own modules."""
    from nkat.host.console import format_bytes

    try:
        from nkat.host import hardware
        from nkat.kobold.machine import look_at_machine
    except (ImportError, OSError) as error:  # OSError: a library that torch needs does not load
        command = shell_line([sys.executable, "-m", "pip", "install", "--force-reinstall", "torch"])
        return [Check("packages load", MISSING, str(error).splitlines()[0], command)]

    machine = look_at_machine()
    checks = [check_processor(machine), check_gpu(machine)]
    checks += check_kobold(options, machine)
    size, model_checks = check_model(options.model, machine)
    checks += model_checks
    free = hardware.disk_free(Path.cwd())
    needed = int(2.1 * size) if size else LOW_DISK  # the .nkat, and the base extracted from it
    found = f"{format_bytes(free)} free in {Path.cwd()}"
    if free < needed:
        state = MISSING if size else WARNING
        checks.append(
            Check("disk", state, f"{found}; {format_bytes(needed)} wanted", "delete something, or go elsewhere")
        )
    elif not os.access(Path.cwd(), os.W_OK):
        folder = Path.home() if is_installed() else ROOT
        checks.append(Check("disk", MISSING, f"{Path.cwd()} is not writable", shell_line(["cd", folder])))
    else:
        checks.append(Check("disk", OK, found))
    return checks


def check_processor(machine: Machine) -> Check:
    from nkat.host.console import format_bytes
    from nkat.kobold.probe import download_command

    names = {"avx512": "AVX-512", "avx2": "AVX2", "avx": "AVX"}
    best = next((text for name, text in names.items() if name in machine.features), None)
    found = f"{machine.cores} cores, {best or 'no AVX'}, {format_bytes(machine.available)} of memory free"
    if machine.old_cpu:
        mend = download_command(old_processor=True)
        return Check("processor", WARNING, f"{found}; KoboldCpp needs its build for old processors", mend)
    return Check("processor", OK, found)


def check_gpu(machine: Machine) -> Check:
    from nkat.host.console import format_bytes
    from nkat.kobold.machine import free_bytes

    real = [gpu for gpu in machine.gpus if gpu.kind != "software"]
    if real:
        text = "; ".join(f"{g.name} ({g.source}), {format_bytes(free_bytes(g))} usable" for g in real)
        return Check("GPU", OK, text)
    linux = machine.no_vulkan is not None and sys.platform.startswith("linux")
    hint = "sudo apt install libvulkan1 mesa-vulkan-drivers" if linux else "none needed; with a GPU: install its driver"
    reason = machine.no_cuda if machine.gpus else f"{machine.no_cuda}; {machine.no_vulkan}"
    return Check("GPU", WARNING, f"none, so everything runs on the processor ({reason})", hint)


def check_kobold(options: SetupOptions, machine: Machine) -> list[Check]:
    from nkat.errors import NKATError
    from nkat.kobold.backends import CUDA
    from nkat.kobold.choose import choices
    from nkat.kobold.probe import download_command, find_kobold, probe_kobold

    try:
        kobold = probe_kobold(find_kobold(options.kobold), remember=False)
    except NKATError as error:
        return [Check("KoboldCpp", MISSING, str(error).partition("; download")[0], download_command())]
    found = choices(kobold, machine, None)
    usable = [choice for choice in found if choice.lacks is None]
    text = f"{kobold.version or 'version unknown'}, {kobold.path}"
    if not usable:
        return [Check("KoboldCpp", MISSING, f"{text}; no backend runs here: {found[0].reason}", download_command())]
    checks = [Check("KoboldCpp", OK, text), Check("backends", OK, ", ".join(choice.backend.name for choice in usable))]
    cuda = next(choice for choice in found if choice.backend is CUDA)
    if cuda.lacks == "program" and any(gpu.interface == "cuda" for gpu in machine.gpus):
        reason = f"an NVIDIA GPU is here, but {cuda.reason}"
        checks.append(Check("CUDA in KoboldCpp", WARNING, reason, download_command()))
    return checks


def check_model(path: Path | None, machine: Machine) -> tuple[int, list[Check]]:
    """Size of the base model in bytes, 0 when there is none, and the checks."""
    if path is None:
        return 0, [Check("model", OK, "none given; --model FILE checks yours")]
    from nkat.errors import NKATError
    from nkat.host.console import format_bytes
    from nkat.lm.config import ModelConfig
    from nkat.theta.modelfile import open_model_file

    try:
        model = open_model_file(path)
        if model.base is None:
            raise NKATError(f"{path}: holds only Θ, not a model")
        config = ModelConfig.from_gguf(model.base.file.metadata, model.base.tensors)
    except NKATError as error:
        return 0, [Check("model", MISSING, str(error), "give another file with --model")]
    theta = f", Θ of rank {model.theta.rank}" if model.theta else ""
    found = f"{path}: {config.architecture.name}, {config.block_count} blocks, {format_bytes(model.base_size)}{theta}"
    checks = [Check("model", OK, found)]
    if model.base_size > machine.available:
        text = f"the model has {format_bytes(model.base_size)}, {format_bytes(machine.available)} are free"
        checks.append(Check("memory", WARNING, text, "close other programs, or take a smaller quantisation"))
    return model.base_size, checks


def table(checks: list[Check]) -> str:
    """A line a check; where something is to be done, a second one with the command."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.name.ljust(width)}  {check.state.ljust(len(MISSING))}  {check.found}")
        if check.mend and check.state != OK:
            lines.append(f"{' ' * width}  {' ' * len(MISSING)}  mend: {check.mend}")
    return "\n".join(lines)


def write_record(name: str, force: bool, checks: list[Check], ready: bool) -> int:
    record: dict[str, Any] = {"ready": ready, "checks": [asdict(check) for check in checks]}
    if name == "-":
        print(json.dumps(record, ensure_ascii=not streams.is_unicode()), flush=True)
        return 0 if ready else 1
    target = Path(name)
    if target.exists() and not target.is_file():
        print(f"error: {target}: this is no file, and is not replaced by one", file=sys.stderr)
        return 2
    if target.exists() and not force:
        print(f"error: {target}: exists already; give --force to replace it", file=sys.stderr)
        return 2
    try:
        target.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", "utf-8", "backslashreplace")
    except OSError as error:
        print(f"error: {target}: cannot be written: {error.strerror or error}", file=sys.stderr)
        return 2
    return 0 if ready else 1


if __name__ == "__main__":
    main()
