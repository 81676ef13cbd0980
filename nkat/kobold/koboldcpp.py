"""KoboldCpp, as a row: its settings by version, its `.kcpps` files, what its log says, its benchmark, its router."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nkat.errors import NKATError
from nkat.host import console
from nkat.host.console import note
from nkat.host.environment import users_environment
from nkat.host.files import atomic_output, make_folder
from nkat.host.record import parse_json
from nkat.kobold.api import get_json, is_private
from nkat.kobold.backends import BACKENDS
from nkat.kobold.benchmark import Speed
from nkat.kobold.choose import Choice
from nkat.kobold.command import F16, Settings, command_of, given
from nkat.kobold.files import RunFiles
from nkat.kobold.probe import SOUGHT, probe_kobold
from nkat.kobold.process import Loaded, Watch, running
from nkat.kobold.program import Program
from nkat.kobold.runtime import Runtime, Served, Several

_EXPORT_SECONDS = 180
_POLL_SECONDS = 0.25
_END = "Server was not started"
_VALUE = re.compile(r"^(ProcessingSpeed|GenerationSpeed|TotalTime|MaxCtx|GenAmount): ([\d.]+)")
_CACHE_NUMBERS = {F16: "0", "q8_0": "1", "q4_0": "2"}  # as versions spell them that have no names for them
_ALL_LAYERS = 999


def settings_of(program: Program, choice: Choice, files: RunFiles, settings: Settings) -> dict[str, Any]:
    """Its settings by their names in a `.kcpps` file, which are those of the long flags."""
    values: dict[str, Any] = {"model_param": str(files.model)}
    if files.adapters:
        values["lora"] = [str(adapter.path) for adapter in files.adapters]
    index = choice.device.index if choice.device else 0
    values |= choice.backend.settings_of(program, index, choice.old_cpu)
    if settings.autofit and choice.backend.on_gpu:
        values["gpulayers"] = -1
        if "--autofit" in program.flags:
            values["autofit"] = True
    else:
        values["gpulayers"] = choice.layers or 0
    values |= {"contextsize": settings.context, "threads": settings.threads}
    values |= _cache_settings(program, settings.cache_type)
    if settings.draft is not None:
        program.require_flag("--draftmodel")
        values |= {"draftmodel": str(settings.draft)}
        values |= {"draftgpulayers": _ALL_LAYERS if choice.backend.on_gpu else 0}
        if settings.draft_tokens is not None:
            values["draftamount"] = settings.draft_tokens
    return values | {"host": settings.host, "port": settings.port}


def _cache_settings(program: Program, cache_type: str) -> dict[str, Any]:
    if cache_type == F16:
        return {}
    program.require_flag("--quantkv")
    if cache_type in program.cache_types:
        values: dict[str, Any] = {"quantkv": cache_type}
    elif _CACHE_NUMBERS.get(cache_type) in program.cache_types:
        values = {"quantkv": int(_CACHE_NUMBERS[cache_type])}
    else:
        spelt = {number: name for name, number in _CACHE_NUMBERS.items()}
        known = ", ".join(spelt.get(word, word) for word in program.cache_types) or "none that it tells"
        raise NKATError(f"{program.label} has no KV cache of {cache_type}; of its flag --quantkv it takes: {known}")
    if "--flashattention" in program.flags:  # versions in which it is not on by itself refuse the one without the other
        values["flashattention"] = True
    return values


def flash_attention(program: Program, settings: Settings, extra: Sequence[str]) -> bool:
    """Old versions have a flag that turns it on, new ones a flag that turns it off."""
    on, off = "--flashattention", "--noflashattention"
    if on in program.flags:
        return on in extra or settings.cache_type != F16
    return off not in extra


def write_config(path: Path, values: Mapping[str, Any], force: bool) -> None:
    """Writes a `.kcpps`, atomically. ASCII only: older versions read it in the system's own encoding."""
    data = (json.dumps(values, indent=2) + "\n").encode("ascii")
    with atomic_output(path, len(data), force) as file:
        file.write(data)


def _write(program: Program, path: Path, values: Mapping[str, Any], extra: Sequence[str], force: bool) -> None:
    write_config(path, config_with_extra(program, command_of(program, values, extra)) if extra else values, force)


def config_with_extra(program: Program, command: Sequence[str]) -> dict[str, Any]:
    """The settings of a command that has flags of the user's own, translated by KoboldCpp itself.

    Raises NKATError for versions that cannot.
    """
    if "--exportconfig" not in program.flags:
        raise NKATError(
            f"{program.label} cannot write flags behind -- into a .kcpps file; leave them out here and give them "
            "beside --config"
        )
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "exported.kcpps"
        done = subprocess.run(
            [*command, "--exportconfig", str(target)],
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            check=False,
            stdin=subprocess.DEVNULL,
            env=users_environment(),
            timeout=_EXPORT_SECONDS,
        )
        if not target.is_file():
            said = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
            raise NKATError(f"KoboldCpp did not accept these flags: {said}")
        try:
            found = parse_json(target.read_bytes())
        except ValueError as error:
            raise NKATError(f"KoboldCpp wrote settings that are no JSON: {error}") from None
        if not isinstance(found, dict):
            raise NKATError(f"KoboldCpp wrote settings that are no JSON object: {found!r:.80}")
        return found


def _loading(program: Program, path: Path, settings: Settings, extra: Sequence[str]) -> list[str]:
    return [*program.prefix(), "--config", str(path)]  # host, port and the user's own flags are in it


def model_name(url: str) -> str | None:
    """What `/api/v1/model` answers, or None when nothing that speaks KoboldCpp's API does."""
    found = get_json(f"{url}/api/v1/model")
    return str(found["result"]) if isinstance(found, dict) and "result" in found else None


WATCH = Watch(
    title="KoboldCpp",
    version=re.compile(r"Welcome to KoboldCpp - Version (\S+)"),
    library=re.compile(r"Initializing dynamic library: (?:.*[/\\])?(?:precompiled_)?koboldcpp_(\w+)\.(?:so|dll)"),
    failures=(
        (
            re.compile(r"IPv4 Socket Failed to Bind|Address already in use|cannot bind"),
            "KoboldCpp could not listen at {url}",
        ),
    ),
    undrafted=re.compile(r"^Error: .*(?:[Dd]raft model|[Ss]peculative)"),
    name_of=model_name,
)


def read_result(lines: Iterable[str]) -> Speed | None:
    """The figures its benchmark printed, or None when it did not get that far."""
    found = {match[1]: float(match[2]) for line in lines if (match := _VALUE.match(line))}
    if len(found) < 5:
        return None
    return Speed(
        processing=found["ProcessingSpeed"],
        generation=found["GenerationSpeed"],
        seconds=found["TotalTime"],
        context=int(found["MaxCtx"]),
        generated=int(found["GenAmount"]),
    )


def measure_speed(
    command: Sequence[str], settings: Settings, what: str, seconds: float, check: Callable[[Loaded], None]
) -> Speed:
    """Runs its own benchmark with this command. Raises NKATError when it fails or loads something else."""
    started = time.monotonic()
    with (
        running([*command, "--benchmark"], WATCH) as process,
        console.bar(None, what, at_once=True, form="{desc}: {elapsed}") as bar,
    ):
        while (status := process.poll()) is None and not any(line.startswith(_END) for line in list(process.lines)):
            check(process.loaded)
            if time.monotonic() - started > seconds:
                raise process.failure(f"{what}: not done within {seconds:.0f} seconds (--timeout allows more)")
            bar.update(0)
            time.sleep(_POLL_SECONDS)
        if process.signalled is not None:
            raise KeyboardInterrupt
        check(process.loaded)
        speed = read_result(process.lines)
        if speed is None:
            raise process.failure(f"{what}: KoboldCpp ended with status {status} and gave no figures")
    return speed


def _check_admin(program: Program, settings: Settings) -> None:
    program.require_flag("--admin")


def _admin(
    program: Program, target: Path, served: Sequence[Served], settings: Settings, extra: Sequence[str]
) -> list[str]:
    """Its admin mode with a folder of `.kcpps`, between which its page and `/api/admin/reload_config` switch."""
    make_folder(target)
    for one in served:
        # Its router takes its own port from the positional argument alone, which a file can give, and not from --port.
        write_config(target / f"{one.name}.kcpps", {**one.values, "port_param": settings.port}, force=True)
    if not given(extra, "--adminpassword"):
        note("note: who can reach it can also load and unload; -- --adminpassword WORD asks for a password")
    first = target / f"{served[0].name}.kcpps"
    return [*program.prefix(), "--config", str(first), "--admin", "--admindir", str(target), *extra]


def _check_router(program: Program, settings: Settings) -> None:
    """Raises NKATError for a version without it, and unless the user asked for a server that everybody can reach: it
    listens at every address, whatever `--host` says.
    """
    program.require_flag("--routermode")
    if is_private(settings.host):
        raise NKATError(
            "KoboldCpp's router listens at every address of this machine, whatever --host says; "
            "if that is what you want, add --host 0.0.0.0, else take --runtime llama-server, whose router does not"
        )


def _router(
    program: Program, target: Path, served: Sequence[Served], settings: Settings, extra: Sequence[str]
) -> list[str]:
    """Its admin mode behind its router, which switches by the model that a request names."""
    command = _admin(program, target, served, settings, ["--routermode", *extra])
    note("name a model in a request by its file: " + ", ".join(f'"{one.name}.kcpps"' for one in served))
    return command


KOBOLDCPP = Runtime(
    name="koboldcpp",
    key="kobold",
    sought=SOUGHT,
    probe=probe_kobold,
    backends=BACKENDS,
    own_flags=(
        *(
            "--model",
            "-m",
            "--lora",
            "--host",
            "--port",
            "--benchmark",
            "--config",
            "--contextsize",
            "--ctx-size",
            "-c",
        ),
        *("--threads", "-t", "--gpulayers", "--gpu-layers", "--n-gpu-layers", "-ngl", "--autofit", "--fit", "-fit"),
        *("--quantkv", "--draftmodel", "--model-draft", "-md", "--draftamount", "--draft-max", "--draft-n"),
    ),
    password_flags=("--password",),
    secure_flag="--ssl",
    separate_adapters=False,
    flash_attention=flash_attention,
    settings_of=settings_of,
    suffix=".kcpps",
    write=_write,
    loading=_loading,
    watch=WATCH,
    measure=measure_speed,
    router=Several(_check_router, _router),
    admin=Several(_check_admin, _admin),
)
