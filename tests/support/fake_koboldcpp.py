"""A stand-in for KoboldCpp: the same arguments, log lines, HTTP answers, and ways to fail, without a model.

Copied as `koboldcpp.py` into a folder it is the source form; `install` makes such folders, and one-file programs with
PyInstaller's table of contents. What it does differently in each version is what the real ones do (1.76, and 1.115.1 of
the fork esobold), seen in their sources and logs. `tests/kobold/test_session.py` runs the same tests against a real
one. Limits: the flags that matter here, one request at a time.

A file `fake.json` beside it says which version it is and how it shall behave:
  version: "1.76" or "1.115.1"
  seconds: that loading takes
  blind: True: the GPU libraries find no device
  deaf: True: SIGTERM and SIGINT are ignored
  forgetful: True: says nothing about the adapter
  no_draft: True: refuses every draft model, and runs without it
  tree: True: the work is done by a child process, as in the one-file program
"""

from __future__ import annotations

import argparse
import http.server
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

OLD, NEW = "1.76", "1.115.1"
BEHAVIOUR = "fake.json"
_ARCHITECTURES = {OLD: ("llama", "qwen2"), NEW: ("llama", "qwen2", "qwen3", "gemma3")}
_SUFFIX = ".dll" if os.name == "nt" else ".so"


def install(folder: Path, version: str, libraries: tuple[str, ...] = ("default",), **behaviour: object) -> Path:
    """A source folder of this version with these libraries; returns its koboldcpp.py."""
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "koboldcpp.py"
    shutil.copyfile(__file__, script)
    for name in libraries:
        (folder / f"koboldcpp_{name}{_SUFFIX}").touch()
    (folder / BEHAVIOUR).write_text(json.dumps({"version": version, **behaviour}))
    return script


def install_program(path: Path, version: str, libraries: tuple[str, ...] = ("default",), **behaviour: object) -> Path:
    """A one-file program: starts the above in a hidden folder; its end is an archive as PyInstaller makes it."""
    script = install(path.parent / f".{path.name}-unpacked", version, libraries, **behaviour)
    start = f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$@"\nexit\n'.encode()
    path.write_bytes(start + archive([f"koboldcpp_{name}{_SUFFIX}" for name in libraries]))
    path.chmod(0o755)
    return path


def archive(names: list[str]) -> bytes:
    """PyInstaller's CArchive with empty files of these names: table of contents, then the cookie."""
    toc = b""
    for name in names:
        raw = name.encode() + b"\0"
        raw += bytes(-(18 + len(raw)) % 16)  # entries are padded to 16 bytes
        toc += struct.pack("!IIIIBc", 18 + len(raw), 0, 0, 0, 0, b"b") + raw
    cookie_size = struct.calcsize("!8sIIII64s")
    data = b"some bytes of the archive"
    length = len(data) + len(toc) + cookie_size
    cookie = struct.pack(
        "!8sIIII64s", b"MEI\x0c\x0b\x0a\x0b\x0e", length, len(data), len(toc), 311, b"libpython3.11.so"
    )
    return data + toc + cookie


def main() -> None:
    behaviour = json.loads(Path(__file__).with_name(BEHAVIOUR).read_text())
    if behaviour.pop("tree", False) and "FAKE_KOBOLDCPP_CHILD" not in os.environ:
        child = subprocess.Popen([sys.executable, *sys.argv], env={**os.environ, "FAKE_KOBOLDCPP_CHILD": "1"})
        sys.exit(child.wait())
    version = behaviour["version"]
    args = make_parser(version).parse_args()
    if getattr(args, "version", False):
        print(version)
        return
    if behaviour.get("deaf"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    print(f"***\nWelcome to KoboldCpp - Version {version}")
    if args.config:
        load_config(args)
    if args.port_param != 5001:
        args.port = args.port_param
    if getattr(args, "routermode", False):  # as there: --port is not asked
        args.port = args.port_param
    args.model_param = args.model_param or (
        args.model[0] if isinstance(args.model, list) and args.model else args.model
    )
    if getattr(args, "exportconfig", ""):
        Path(args.exportconfig).write_text(json.dumps(vars(args)))
        return
    if version == OLD and args.quantkv and not args.flashattention:
        print("Error: Using --quantkv requires --flashattention", flush=True)
        sys.exit(1)
    if not args.model_param:
        print("For command line arguments, please refer to --help\n***", flush=True)
        sys.exit(2)
    run(args, version, behaviour)


def run(args: argparse.Namespace, version: str, behaviour: dict) -> None:
    library = pick_library(args, version)
    print(f"Initializing dynamic library: {library}")
    if not Path(__file__).with_name(library).exists():
        raise OSError(f"{library}: cannot open shared object file: No such file or directory")
    print("==========")
    print(args)
    print(f"==========\nLoading Text Model: {args.model_param}", flush=True)
    load(args, version, library, behaviour)
    print("Load Text Model OK: True")
    if args.benchmark:
        benchmark(args, version, library)
        return
    host = args.host or "localhost"
    print(f"Starting Kobold API on port {args.port} at http://{host}:{args.port}/api/")
    print(f"======\nPlease connect to custom endpoint at http://{host}:{args.port}", flush=True)
    serve(args, version, library, behaviour)


def make_parser(version: str) -> argparse.ArgumentParser:
    """The version's own flags, as far as they matter here, spelled and described as there."""
    parser = argparse.ArgumentParser(prog="koboldcpp.py", description=f"KoboldCpp Server - Version {version}")
    add = parser.add_argument
    gpu = parser.add_mutually_exclusive_group()
    if version == OLD:
        add("--model", metavar="[filename]", help="Model file to load", default="")
        choices = ["normal", "lowvram", "0", "1", "2", "3", "mmq", "rowsplit"]
        gpu.add_argument(
            "--usecublas", nargs="*", metavar="[lowvram|normal] [main GPU ID] [mmq] [rowsplit]", choices=choices
        )
        gpu.add_argument(
            "--useclblast",
            type=int,
            choices=range(9),
            nargs=2,
            help="platform ID and device ID (e.g. --useclblast 1 0).",
        )
        add("--lora", metavar=("[lora_filename]", "[lora_base]"), nargs="+")
        add("--nommap", action="store_true", help="If set, do not use mmap to load newer models")
        add("--flashattention", action="store_true", help="Enables flash attention.")
        add("--quantkv", metavar="[quantization level 0/1/2]", type=int, choices=[0, 1, 2], default=0)
        add(
            "--promptlimit",
            metavar="[token limit]",
            type=int,
            default=100,
            help="usable only with --prompt or --benchmark",
        )
        context = 4096
    else:
        add("--model", "-m", metavar="[filenames]", nargs="+", default=[], help="Model file to load.")
        choices = ["0", "1", "2", "3", "all", "mmq", "nommq", "normal", "lowvram", "rowsplit"]
        gpu.add_argument(
            "--usecuda", "--usecublas", "--usehipblas", nargs="*", metavar="[main GPU ID]", choices=choices
        )
        add("--lora", metavar="[lora_filename]", nargs="+")
        add("--version", action="store_true", help="Prints version and exits.")
        add("--failsafe", action="store_true", help="Use failsafe mode, which implies --noavx2")
        add("--exportconfig", metavar="[filename]", default="")
        add("--noflashattention", "--no-flash-attn", "-nofa", action="store_true")
        add("--autofit", "--fit", "-fit", action="store_true", help="Forces autofit. Overrides everything else.")
        levels = "[quantization level f16/bf16/q8_0/q5_1/q4_0]"
        add("--quantkv", metavar=levels, default="f16", choices=[*levels[20:-1].split("/"), "0", "1", "2", "3"])
        add("--draftmodel", "--model-draft", "-md", metavar="[filename]", default="")
        add("--draftamount", "--draft-max", "--draft-n", metavar="[tokens]", type=int, default=8)
        add("--draftgpulayers", metavar="[layers]", type=int, default=999)
        add("--admin", action="store_true")
        add("--adminpassword", metavar="[password]")
        add("--admindir", metavar="[directory]", default="")
        add("--routermode", action="store_true", help="Requires admin mode.")
        add("--genlimit", "--promptlimit", metavar="[token limit]", type=int, default=0)
        context = 16384
    gpu.add_argument(
        "--usevulkan", nargs="*", type=int, metavar="[Device ID]", help="GPU Device ID (e.g. --usevulkan 0)."
    )
    gpu.add_argument("--usecpu", action="store_true")
    add("model_param", nargs="?")
    add("--port", metavar="[portnumber]", type=int, default=5001)
    add("port_param", nargs="?", type=int, default=5001)
    add("--host", metavar="[ipaddr]", default="")
    add("--launch", action="store_true")
    add("--config", metavar="[filename]", nargs=1)
    add("--threads", metavar="[threads]", type=int, default=1)
    add("--contextsize", metavar="[256 to 262144]", type=int, default=context)
    add("--gpulayers", metavar="[GPU layers]", nargs="?", const=1, type=int, default=-1)
    add("--noavx2", action="store_true")
    add("--benchmark", metavar="[filename]", nargs="?", const="stdout")
    add("--quiet", action="store_true", help="hides generation inputs and outputs")
    add("--skiplauncher", action="store_true")
    return parser


def load_config(args: argparse.Namespace) -> None:
    """Values of the file, but for flags that were given by exactly this name."""
    path = Path(args.config[0])
    if not path.is_file():
        print("\nSpecified kcpp config file invalid or not found.", flush=True)
        sys.exit(2)
    print("Loading .kcpps configuration file...")
    for key, value in json.loads(path.read_text(encoding="cp1252")).items():  # Windows' own, before 1.80
        if f"--{key}" in sys.argv[1:]:
            print(f"Overriding Config Value: {key}")
        else:
            setattr(args, key, value)


def pick_library(args: argparse.Namespace, version: str) -> str:
    """KoboldCpp's init_library: what is asked for where it is there, silently (from 1.115) the default where not."""

    def have(name: str) -> bool:
        return Path(__file__).with_name(f"koboldcpp_{name}{_SUFFIX}").exists()

    cuda = getattr(args, "usecuda", None) if version == NEW else args.usecublas
    name = "default"
    if args.noavx2 or getattr(args, "failsafe", False):
        if version == NEW:
            wanted = ["failsafe"] if args.failsafe else []
            wanted = ["vulkan_noavx2", *wanted] if args.usevulkan is not None else wanted
            name = next((n for n in [*wanted, "noavx2"] if have(n)), "default")
        else:
            name = "failsafe" if have("noavx2") and args.usecpu and args.nommap else "noavx2"
    elif cuda is not None:
        name = next((n for n in ("cublas", "hipblas") if have(n)), "default")
    elif args.usevulkan is not None:
        name = "vulkan" if have("vulkan") else "default"
    elif version == OLD and args.useclblast:
        name = "clblast" if have("clblast") else "default"
    if version == OLD and name == "default" and not args.usecpu:
        print("Warning: library file not found. CPU library will be used.")
    return f"koboldcpp_{name}{_SUFFIX}"


def load(args: argparse.Namespace, version: str, library: str, behaviour: dict) -> None:
    """Reads the model as llama.cpp does, as far as its failures go; a model it does not know ends in a segfault."""
    head = Path(args.model_param).read_bytes()[:8_000_000]
    architecture = re.search(rb"general\.architecture\x08\0\0\0.\0{7}([a-z0-9]+)", head, re.DOTALL)
    name = architecture[1].decode() if architecture else "unknown"
    print(f"\nThe reported GGUF Arch is: {name}", flush=True)
    tell = "llm_load_tensors" if version == OLD else "load_tensors"
    if name not in _ARCHITECTURES[version]:
        crash(f"error loading model architecture: unknown model architecture: '{name}'")
    extra = len(re.findall(rb"\.theta_[pqs]", head[: head.rfind(b".theta_") + 16] if b".theta_" in head else b""))
    if extra:
        crash(f"error loading model: done_getting_tensors: wrong number of tensors; expected {extra + 9}, got 9")
    time.sleep(float(behaviour.get("seconds", 0)))
    on_gpu = not library.startswith(("koboldcpp_default", "koboldcpp_noavx2", "koboldcpp_failsafe"))
    print(f"{tell}: offloaded {max(0, args.gpulayers)}/31 layers to GPU", file=sys.stderr)
    if on_gpu and args.gpulayers > 0 and not behaviour.get("blind"):
        device = "Test GPU (made up)" if version == OLD else "Vulkan0 model" if "vulkan" in library else "CUDA0 model"
        print(f"{tell}: {device} buffer size =    60.50 MiB", file=sys.stderr)
    print(f"{tell}:        CPU {'' if version == OLD else 'model '}buffer size =    92.10 MiB", file=sys.stderr)
    if getattr(args, "draftmodel", "") and behaviour.get("no_draft"):
        print("Error: Draft model vocab of (7) is too different from base vocab of (9). Speculative decoding …")
    if args.lora:
        if not Path(args.lora[0]).is_file():
            print(f"Cannot find lora file: {args.lora[0]}", flush=True)
            sys.exit(2)
        count = len(re.findall(rb"\.lora_[ab]", Path(args.lora[0]).read_bytes()))
        print(f"\nAttempting to apply LORA adapter: {args.lora[0]}", flush=True)
        if not behaviour.get("forgetful"):
            print(f"llama_adapter_lora_init_impl: loaded {count} tensors from lora file", file=sys.stderr)


def crash(words: str) -> None:
    print(f"llama_model_load: {words}\nllama_load_model_from_file: failed to load model", file=sys.stderr, flush=True)
    if os.name == "nt":
        os._exit(3221225477)  # STATUS_ACCESS_VIOLATION
    signal.signal(signal.SIGSEGV, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGSEGV)


def benchmark(args: argparse.Namespace, version: str, library: str) -> None:
    """Made-up figures: more layers on the GPU are faster, the adapter costs a tenth."""
    print("\nRunning benchmark (Not Saved)...")
    generation = (20.0 + max(0, args.gpulayers)) * (0.9 if args.lora else 1.0)
    generated = args.promptlimit if version == OLD else args.genlimit or 100
    processed = args.contextsize - generated
    print(f"\nBenchmark Completed - v{version} Results:\n======")
    print(f"Flags: {vars(args)}")
    print(f"Timestamp: 2026-01-01 00:00:00+00:00\nBackend: {library}\nLayers: {args.gpulayers}")
    print(f"Model: {Path(args.model_param).stem}\nMaxCtx: {args.contextsize}\nGenAmount: {generated}\n-----")
    print(f"ProcessingTime: {processed / 100:.3f}s\nProcessingSpeed: 100.00T/s")
    print(f"GenerationTime: {generated / generation:.3f}s\nGenerationSpeed: {generation:.2f}T/s")
    print(f"TotalTime: {processed / 100 + generated / generation:.3f}s\nOutput:  1 1 1 1\n-----")
    print("Server was not started, main function complete. Idling.", flush=True)


def serve(args: argparse.Namespace, version: str, library: str, behaviour: dict) -> None:
    def name() -> str:
        return "koboldcpp/" + re.sub(r"[^\w\d.\-_]", "", Path(args.model_param).stem)

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self, body: dict, status: int = 200) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            if self.path.endswith("/api/v1/model"):
                self.answer({"result": name()})
            elif self.path.endswith("/api/extra/version"):
                self.answer({"result": "KoboldCpp", "version": version})
            else:
                self.answer({"detail": "no such path"}, 404)

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            print(f"\nInput: {json.dumps(request)}", flush=True)
            swap = getattr(args, "routermode", False) and str(request.get("model", "")).endswith(".kcpps")
            if swap:  # the real one ends the process that has the model and starts another
                values = json.loads((Path(args.admindir) / request["model"]).read_text())
                args.model_param, args.lora = values["model_param"], values.get("lora")
                load(args, version, library, behaviour)
            self.answer({"results": [{"text": " and so on", "finish_reason": "length"}]})

        def log_message(self, *_: object) -> None:
            return

    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((args.host, args.port))
            listener.listen(24)
        except OSError:
            if version == OLD:
                raise
            print("IPv4 Socket Failed to Bind.")
            print("ERROR: Both IPv4 and IPv6 cannot bind. Server features will not work.", flush=True)
            while True:
                time.sleep(10)
        server = http.server.HTTPServer((args.host, args.port), Handler, bind_and_activate=False)
        server.socket = listener
        server.serve_forever()


def mark_when_run(*programs: Path) -> Path:
    """Programs in the current folder that leave a file when they are run; returns that file."""
    ran = programs[0].parent / "ran"
    for path in programs:
        python = f"#!{sys.executable}\n" if path.suffix != ".py" else ""
        path.write_text(f"{python}open({str(ran)!r}, 'w')\n", encoding="utf-8")
        path.chmod(0o755)
    return ran


if __name__ == "__main__":
    main()
