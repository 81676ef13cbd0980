"""llama-server of llama.cpp, as a row: how it is asked, its settings, its presets, its log, its speed, its router.

Its settings are its long flags without their dashes, which are also the keys of a presets file. Nothing is believed
that it does not say itself: flags from `--help`, GPUs and their free memory from `--list-devices`.
"""

from __future__ import annotations

import itertools
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nkat.errors import NKATError
from nkat.host import console
from nkat.host.console import note
from nkat.host.files import atomic_output, make_folder
from nkat.host.hardware import Gpu
from nkat.kobold.api import base_url, get_json, post_json
from nkat.kobold.backends import Backend, Device, Place, best_gpu, processor
from nkat.kobold.benchmark import GENERATED, Speed
from nkat.kobold.choose import Choice
from nkat.kobold.command import F16, Settings, command_of
from nkat.kobold.files import Adapter, RunFiles
from nkat.kobold.find import Sought, is_program
from nkat.kobold.machine import Machine
from nkat.kobold.process import Loaded, ServerProcess, Watch, running, wait_until_ready
from nkat.kobold.program import Program, ask, last_words
from nkat.kobold.runtime import Runtime, Served, Several

_MIB = 1 << 20
_NAME = "llama-server.exe" if os.name == "nt" else "llama-server"
_HELP_COLUMN = 40  # where the descriptions in its --help begin
_DEVICE = re.compile(r"^  ([A-Za-z]+)(\d*): (.+) \((\d+) MiB, (\d+) MiB free\)$", re.MULTILINE)
_LOG_LEVEL = 4  # at which it tells what it loaded where; 3, its default, tells requests alone
_POLL_SECONDS = 0.25
_ALL_LAYERS = "all"


def _programs_in(folder: Path) -> Iterator[Path]:
    if is_program(folder / _NAME):
        yield folder / _NAME


def _how_to_get() -> str:
    releases = "https://github.com/ggml-org/llama.cpp/releases"
    return f"unpack one of {releases} into {Path('~') / 'llama.cpp'}"


SOUGHT = Sought(
    title="llama-server",
    environment="LLAMA_SERVER",
    flag="--llama-server",
    folders=("llama.cpp",),
    below=("build/bin", "bin"),
    programs_in=_programs_in,
    how_to_get=_how_to_get,
)


def probe(path: Path, remember: bool = True) -> Program:
    """Asks it for version, flags and devices; always anew, as the devices' free memory changes. Raises NKATError."""
    path = path.resolve()
    status, out, err = ask(path, "--help")
    flags, cache_types = parse_help(out)
    if status != 0 or not {"--model", "--port", "--ctx-size", "--lora"} <= flags:
        raise NKATError(
            f"{path}: is not a llama-server that runs here (--help: status {status}, {last_words([err, out])})"
        )
    _, out, err = ask(path, "--version")
    version = re.search(r"^version: (.+)$", f"{out}\n{err}", re.MULTILINE)
    listed = ask(path, "--list-devices")[1] if "--list-devices" in flags else ""
    said = version[1].strip() if version else None
    return Program(path, said, flags, None, cache_types, parse_devices(listed), SOUGHT.title)


def parse_help(text: str) -> tuple[frozenset[str], tuple[str, ...]]:
    """Long flags and the KV cache's types. Flags count only where an option's own line begins."""
    flags = set()
    for line in text.splitlines():
        if line.startswith("-"):
            beside = line[_HELP_COLUMN - 1 : _HELP_COLUMN].isspace() and len(line) > _HELP_COLUMN
            flags.update(re.findall(r"(?<![\w-])(--[A-Za-z][\w-]*)", line[:_HELP_COLUMN] if beside else line))
    types = re.search(r"--cache-type-k TYPE.*?allowed values: ([\w, ]+)", text, re.DOTALL)
    return frozenset(flags), tuple(word.strip() for word in types[1].split(",")) if types else ()


def parse_devices(text: str) -> tuple[Gpu, ...]:
    """What `--list-devices` prints. It does not say what kind of card one is."""
    return tuple(
        Gpu(found[1], int(found[2] or 0), found[3], "other", int(found[4]) * _MIB, int(found[5]) * _MIB, SOUGHT.title)
        for found in _DEVICE.finditer(text)
    )


def _gpu_backend(name: str, *interfaces: str) -> Backend:
    """A row for the devices that llama-server calls by one of these names and a number."""

    def device_of(program: Program, machine: Machine) -> Device:
        kinds = {gpu.name: gpu.kind for gpu in machine.gpus_by("vulkan")}
        mine = [gpu for gpu in program.devices if gpu.interface in interfaces]
        return best_gpu(
            [replace(gpu, kind=kinds.get(gpu.name, "discrete")) for gpu in mine],
            f"this llama-server lists no {interfaces[0]} device",
        )

    def settings_of(program: Program, index: int, old_cpu: bool) -> dict[str, Any]:
        gpu = next((g for g in program.devices if g.interface in interfaces and g.index == index), None)
        return {"device": f"{interfaces[0]}{index}" if gpu is None else _device_name(gpu)}

    return Backend(
        name=name,
        place=Place.GPU,
        flags=("--device",),
        libraries=(),
        old_libraries=None,
        device_of=device_of,
        settings_of=settings_of,
        tells_buffers=True,
    )


def _device_name(gpu: Gpu) -> str:
    return gpu.interface if gpu.interface == "Metal" else f"{gpu.interface}{gpu.index}"


def _cpu_settings(program: Program, index: int, old_cpu: bool) -> dict[str, Any]:
    return {"device": "none"} if "--device" in program.flags else {}


CPU = Backend(
    name="cpu",
    place=Place.CPU,
    flags=(),
    libraries=(),
    old_libraries=None,
    device_of=processor,
    settings_of=_cpu_settings,
)
BACKENDS = (
    _gpu_backend("cuda", "CUDA"),
    _gpu_backend("rocm", "ROCm"),
    _gpu_backend("metal", "MTL", "Metal"),
    _gpu_backend("sycl", "SYCL"),
    _gpu_backend("vulkan", "Vulkan"),
    CPU,
)  # what serves best first


def settings_of(program: Program, choice: Choice, files: RunFiles, settings: Settings) -> dict[str, Any]:
    """Its settings, by its long flags without dashes."""
    on_gpu = choice.backend.on_gpu
    values: dict[str, Any] = {"model": str(files.model)}
    if "--alias" in program.flags:  # else its name is the path
        values["alias"] = files.asked.stem.replace(",", "_")  # several names have commas between them
    values |= adapter_settings(files.adapters)
    values |= choice.backend.settings_of(program, choice.device.index if choice.device else 0, choice.old_cpu)
    if settings.autofit and on_gpu:
        program.require_flag("--fit")
        values |= {"gpu-layers": "auto", "fit": "on"}
    else:
        values["gpu-layers"] = choice.layers or 0
        if "--fit" in program.flags:
            values["fit"] = "off"
    values |= {"ctx-size": settings.context, "threads": settings.threads}
    if settings.cache_type != F16:
        if settings.cache_type not in program.cache_types:
            raise NKATError(
                f"{program.label} has no KV cache of {settings.cache_type}; it has: {', '.join(program.cache_types)}"
            )
        values |= {"cache-type-k": settings.cache_type, "cache-type-v": settings.cache_type, "flash-attn": "on"}
    if settings.draft is not None:
        values |= _draft_settings(program, settings.draft, settings.draft_tokens, on_gpu)
    if "--verbosity" in program.flags:
        values["verbosity"] = _LOG_LEVEL
    return values | {"host": settings.host, "port": settings.port}


def adapter_settings(adapters: Sequence[Adapter]) -> dict[str, str]:
    """Adapters beside each other: which one has which number in `/lora-adapters` is their order here."""
    if not adapters:
        return {}
    if all(adapter.weight == 1 for adapter in adapters):
        return {"lora": ",".join(_quoted(str(adapter.path)) for adapter in adapters)}
    return {"lora-scaled": ",".join(_quoted(f"{adapter.path}:{adapter.weight:g}") for adapter in adapters)}


def _quoted(text: str) -> str:
    """As a field among others with commas between them."""
    return '"' + text.replace('"', '""') + '"' if "," in text or '"' in text else text


def _draft_settings(program: Program, draft: Path, tokens: int | None, on_gpu: bool) -> dict[str, Any]:
    """What these flags are called, and whether the kind of guessing has to be named, differs by version."""
    values: dict[str, Any] = {program.require_flag("--spec-draft-model", "--model-draft"): str(draft)}
    values[program.require_flag("--spec-draft-ngl", "--gpu-layers-draft")] = _ALL_LAYERS if on_gpu else 0
    if "--spec-type" in program.flags:
        values["--spec-type"] = "draft-simple"
    if tokens is not None:
        values[program.require_flag("--spec-draft-n-max", "--draft-max")] = tokens
    return {name.removeprefix("--"): value for name, value in values.items()}


def presets_text(sections: Mapping[str, Mapping[str, Any]]) -> str:
    """A presets file. Raises NKATError for what its form cannot hold: it knows no quotes."""
    lines = []
    for section, values in sections.items():
        if not section.strip() or re.search(r"[]\r\n]", section):
            raise NKATError(f"{section!r}: a presets file cannot hold this name")
        lines += ["", f"[{section}]"]
        for key, value in values.items():
            text = str(value).lower() if isinstance(value, bool) else str(value)
            if text != text.strip() or re.search(r"[;#\r\n]", text):
                raise NKATError(f"{text!r}: a presets file cannot hold this, as it begins a comment there; rename it")
            lines.append(f"{key} = {text}")
    return "\n".join(["version = 1", *lines]) + "\n"


def _write_presets(path: Path, served: Mapping[str, Mapping[str, Any]], force: bool) -> None:
    """Host, port and what is logged are the router's; the first model is loaded when that starts."""
    own = ("alias", "host", "port", "verbosity")
    sections = {}
    for number, (name, values) in enumerate(served.items()):
        kept = {key: value for key, value in values.items() if key not in own}
        sections[name] = kept | ({"load-on-startup": True} if number == 0 else {})
    data = presets_text(sections).encode()
    with atomic_output(path, len(data), force) as file:
        file.write(data)


def _write(program: Program, path: Path, values: Mapping[str, Any], extra: Sequence[str], force: bool) -> None:
    program.require_flag("--models-preset")
    _write_presets(path, {str(values.get("alias", Path(str(values["model"])).stem)): values}, force)


def _loading(program: Program, path: Path, settings: Settings, extra: Sequence[str]) -> list[str]:
    values: dict[str, Any] = {"models-preset": str(path), "models-max": 1}
    if "--verbosity" in program.flags:
        values["verbosity"] = _LOG_LEVEL
    return command_of(program, values | {"host": settings.host, "port": settings.port}, extra)


def _check_router(program: Program, settings: Settings) -> None:
    program.require_flag("--models-preset")


def _router(
    program: Program, target: Path, served: Sequence[Served], settings: Settings, extra: Sequence[str]
) -> list[str]:
    """Its router with a presets file; one model at a time, as each was given all the memory that is free."""
    make_folder(target)
    path = target / "models.ini"
    _write_presets(path, {one.name: one.values for one in served}, force=True)
    note("name a model in a request: " + ", ".join(f'"{one.name}"' for one in served))
    return _loading(program, path, settings, extra)


def model_name(url: str) -> str | None:
    """The model it has loaded, or None while it has none. With a key of the user's own it does not say which."""
    health = get_json(f"{url}/health")
    if not isinstance(health, dict) or health.get("status") != "ok":
        return None
    listed = get_json(f"{url}/v1/models")
    if not isinstance(listed, dict) or not isinstance(listed.get("data"), list):
        return "a model, named to those who have its key"
    for model in listed["data"]:
        status = model.get("status", {}).get("value", "loaded")  # a router has several, and says of each how it is
        if status == "loaded":
            return str(model.get("id"))
    return None


WATCH = Watch(
    title=SOUGHT.title,
    version=None,
    library=None,
    failures=(
        (re.compile(r"couldn't bind HTTP server socket"), "llama-server could not listen at {url}"),
        (re.compile(r"instance name=.* exited with status [^0]"), "llama-server could not load the model"),
        (re.compile(r"failed to load draft model"), "llama-server could not load the draft model"),
    ),
    undrafted=re.compile(r"no implementations specified for speculative decoding"),
    name_of=model_name,
)


def flash_attention(program: Program, settings: Settings, extra: Sequence[str]) -> bool:
    """On unless the user turns it off."""
    words = list(extra)
    return not any(flag in ("-fa", "--flash-attn") and value == "off" for flag, value in itertools.pairwise(words))


def measure_speed(
    command: Sequence[str], settings: Settings, what: str, seconds: float, check: Callable[[Loaded], None]
) -> Speed:
    """Serves with this command and asks for a full context less `GENERATED` tokens and for those, as KoboldCpp's own
    benchmark does. Raises NKATError when it fails.
    """
    url, started = base_url(settings.host, settings.port), time.monotonic()
    with running(command, WATCH) as process:
        if not wait_until_ready(process, url, seconds, check):
            raise KeyboardInterrupt
        request = {
            "prompt": [1] * (settings.context - GENERATED),
            "n_predict": GENERATED,
            "ignore_eos": True,
            "cache_prompt": False,
            "temperature": 0,
        }
        answer = _answer(process, f"{url}/completion", request, what, started + seconds)
    try:
        timings = answer["timings"]
        return Speed(
            processing=float(timings["prompt_per_second"]),
            generation=float(timings["predicted_per_second"]),
            seconds=(float(timings["prompt_ms"]) + float(timings["predicted_ms"])) / 1000,
            context=settings.context,
            generated=int(timings["predicted_n"]),
        )
    except (LookupError, TypeError, ValueError):
        raise NKATError(f"{what}: llama-server answered without its timings: {answer!r:.200}") from None


def _answer(process: ServerProcess, url: str, request: Mapping[str, Any], what: str, deadline: float) -> Any:
    """Asks in a thread of its own, so that signals, the program's end and the time are seen meanwhile."""
    answers: queue.Queue[Any] = queue.Queue()

    def fetch() -> None:
        try:
            answers.put(post_json(url, request, max(1.0, deadline - time.monotonic())))
        except NKATError as error:
            answers.put(error)

    threading.Thread(target=fetch, daemon=True).start()
    with console.bar(None, what, at_once=True, form="{desc}: {elapsed}") as bar:
        while answers.empty():
            status = process.poll()
            if process.signalled is not None:
                raise KeyboardInterrupt
            if status is not None:
                raise process.failure(f"{what}: llama-server ended with status {status} and gave no figures")
            if time.monotonic() > deadline:
                raise process.failure(f"{what}: not done in time (--timeout allows more)")
            bar.update(0)
            time.sleep(_POLL_SECONDS)
    answer = answers.get()
    if isinstance(answer, NKATError):
        raise process.failure(f"{what}: {answer}")
    return answer


LLAMA_SERVER = Runtime(
    name="llama-server",
    key="llama_server",
    sought=SOUGHT,
    probe=probe,
    backends=BACKENDS,
    own_flags=(
        *("--model", "-m", "--alias", "-a", "--lora", "--lora-scaled", "--host", "--port"),
        *("--ctx-size", "-c", "--threads", "-t", "--gpu-layers", "--n-gpu-layers", "-ngl", "--device", "-dev"),
        *("--fit", "-fit", "--cache-type-k", "-ctk", "--cache-type-v", "-ctv", "--spec-draft-model", "--model-draft"),
        *("-md", "--spec-draft-n-max", "--draft-max", "--models-preset", "--models-dir", "--models-max"),
        *("--verbosity", "--log-verbosity", "-lv"),
    ),
    password_flags=("--api-key", "--api-key-file"),
    secure_flag="--ssl-key-file",
    separate_adapters=True,
    flash_attention=flash_attention,
    settings_of=settings_of,
    suffix=".ini",
    write=_write,
    loading=_loading,
    watch=WATCH,
    measure=measure_speed,
    router=Several(_check_router, _router),
    admin=None,
)
