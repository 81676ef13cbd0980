"""A stand-in for llama-server: the same arguments, log lines, HTTP answers, and ways to fail, without a model.

`install` makes a program of it. What it does is what the real one of build 11434 does, seen in its sources and logs:
`tests/kobold/test_llama_server.py` runs the same tests against a real one. Limits: the flags that matter here, one
request at a time, and its router answers for its models itself instead of starting a process for each.

A file `fake.json` beside it says how it shall behave:
  devices: lines that --list-devices prints
  seconds: that loading takes
  forgetful: True: says nothing about the adapters
  old: True: without the flags of newer builds: draft models by their new names, --fit, presets
"""

from __future__ import annotations

import configparser
import http.server
import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

BEHAVIOUR = "fake.json"
VERSION = "0.6.0-dev (build 11434, commit made-up)"
_KNOWN = ("llama", "qwen2", "qwen3", "gemma3")
# Flags with their value's name, as --help spells them; "" for one without a value.
_FLAGS: list[tuple[list[str], str, str]] = [
    (["-h", "--help", "--usage"], "", "print usage and exit"),
    (["--version"], "", "show version and build info"),
    (["-t", "--threads"], "N", "number of CPU threads to use during generation"),
    (["-c", "--ctx-size"], "N", "size of the prompt context; see also --no-such-flag"),
    (["-fa", "--flash-attn"], "[on|off|auto]", "set Flash Attention use"),
    (["-ctk", "--cache-type-k"], "TYPE", "KV cache data type for K\nallowed values: f32, f16, bf16, q8_0, q4_0, q5_1"),
    (["-ctv", "--cache-type-v"], "TYPE", "KV cache data type for V\nallowed values: f32, f16, bf16, q8_0, q4_0, q5_1"),
    (["-dev", "--device"], "<dev1,dev2,..>", "comma-separated list of devices to use for offloading"),
    (["--list-devices"], "", "print list of available devices and exit"),
    (["-ngl", "--gpu-layers", "--n-gpu-layers"], "N", "max. number of layers to store in VRAM"),
    (["--lora"], "FNAME", "path to LoRA adapter (use comma-separated values to load multiple adapters)"),
    (["--lora-scaled"], "FNAME:SCALE,...", "path to LoRA adapter with user defined scaling"),
    (["-m", "--model"], "FNAME", "model path to load"),
    (["-a", "--alias"], "STRING", "set model name aliases, comma-separated (to be used by API)"),
    (["--host"], "HOST", "ip address to listen"),
    (["--port"], "PORT", "port to listen"),
    (["--api-key"], "KEY", "API key to use for authentication"),
    (["-lv", "--verbosity", "--log-verbosity"], "N", "Set the verbosity threshold"),
]
_OLD_FLAGS = [
    (["-md", "--model-draft"], "FNAME", "draft model for speculative decoding"),
    (["-ngld", "--gpu-layers-draft", "--n-gpu-layers-draft"], "N", "number of layers to store in VRAM"),
    (["--draft", "--draft-n", "--draft-max"], "N", "number of tokens to draft"),
]
_NEW_FLAGS = [
    (["-fit", "--fit"], "[on|off]", "whether to adjust unset arguments to fit in device memory"),
    (["--spec-draft-model", "-md", "--model-draft"], "FNAME", "draft model for speculative decoding"),
    (["--spec-draft-ngl", "-ngld", "--gpu-layers-draft", "--n-gpu-layers-draft"], "N", "layers to store in VRAM"),
    (["--spec-draft-n-max"], "N", "number of tokens to draft for speculative decoding"),
    (["--spec-type"], "none,draft-simple,ngram-simple", "comma-separated list of types of speculative decoding"),
    (["--draft", "--draft-n", "--draft-max"], "N", "the argument has been removed. use --spec-draft-n-max"),
    (["--models-preset"], "PATH", "path to INI file containing model presets for the router server"),
    (["--models-max"], "N", "for router server, maximum number of models to load simultaneously"),
]


def install(folder: Path, **behaviour: object) -> Path:
    """A program `llama-server` in this folder; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "llama-server"
    source = Path(__file__).read_text(encoding="utf-8")
    program.write_text(f"#!{sys.executable}\n{source}", encoding="utf-8")
    program.chmod(0o755)
    (folder / BEHAVIOUR).write_text(json.dumps(behaviour))
    return program


def main() -> None:
    behaviour = json.loads(Path(__file__).with_name(BEHAVIOUR).read_text())
    flags = _FLAGS + (_OLD_FLAGS if behaviour.get("old") else _NEW_FLAGS)
    if "--help" in sys.argv:
        print("----- common params -----\n\n" + "".join(help_text(*flag) for flag in flags))
    elif "--version" in sys.argv:
        print(f"version: {VERSION}\nbuilt with nothing for nowhere", file=sys.stderr)
    elif "--list-devices" in sys.argv:
        devices = behaviour.get("devices") or ["(none)"]
        print("Available devices:\n" + "\n".join(f"  {line}" for line in devices))
    else:
        Server(parse(sys.argv[1:], flags), behaviour).run()


def help_text(names: list[str], hint: str, description: str) -> str:
    """As common_arg::to_string in common/arg.cpp writes it: descriptions from column 40 on."""
    first = names[0] if len(names) == 1 else f"{names[0] + ', ':<7}" + ", ".join(names[1:])
    head = f"{first} {hint}".rstrip()
    head = head.ljust(40) if len(head) <= 37 else head + "\n" + " " * 40
    return head + ("\n" + " " * 40).join(description.split("\n")) + "\n"


def parse(words: list[str], flags: list[tuple[list[str], str, str]]) -> dict[str, Any]:
    """Values by the last name of their flags without dashes; what is no flag ends the program, as there."""
    known = {name: (names[-1].lstrip("-"), hint) for names, hint, _ in flags for name in names}
    found: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word not in known:
            fail(f"error: invalid argument: {word}")
        name, hint = known[word]
        if name == "draft-max" and "spec-type" in {names[-1].lstrip("-") for names, _, _ in flags}:
            fail("error: argument has been removed. use --spec-draft-n-max")
        found[name] = rest.pop(0) if hint else True
    return found


def fail(words: str) -> None:
    print(words, file=sys.stderr, flush=True)
    sys.exit(1)


class Server:
    """One model, or, with presets, several of which one at a time is loaded."""

    def __init__(self, values: dict[str, Any], behaviour: dict[str, Any]) -> None:
        self.values = values
        self.behaviour = behaviour
        self.models: dict[str, dict[str, str]] = {}
        self.loaded: str | None = None
        self.adapters: list[dict[str, Any]] = []
        self.ready = False

    def run(self) -> None:
        self.log("srv  llama_server: initializing ...")
        server = self.listen()
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # after its clean-up, as there
        signal.signal(signal.SIGINT, lambda *_: os._exit(0))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        if "models-preset" in self.values:
            self.models = read_presets(Path(self.values["models-preset"]))
            self.ready = True
            start = [name for name, values in self.models.items() if values.get("load-on-startup") == "true"]
            for name in start:
                self.log(f"srv          load: spawning server instance with name={name} on port 40000")
                self.load(name, self.models[name])
        elif "model" in self.values:
            self.load(self.values.get("alias", self.values["model"]), self.values)
            self.ready = True
        else:
            self.ready = True
        self.log(f"srv  llama_server: listening on http://{self.values['host']}:{self.values['port']}")
        while True:
            time.sleep(10)

    def log(self, words: str, level: int = 3) -> None:
        if level <= int(self.values.get("log-verbosity", 3)):
            print(f"0.00.000.001 I {words}", file=sys.stderr, flush=True)

    def load(self, name: str, values: dict[str, Any]) -> None:
        path = Path(values.get("model", ""))
        head = path.read_bytes()[:8_000_000] if path.is_file() else b""
        architecture = re.search(rb"general\.architecture\x08\0\0\0.\0{7}([a-z0-9]+)", head, re.DOTALL)
        kind = architecture[1].decode() if architecture else "unknown"
        extra = len(re.findall(rb"\.theta_[pqs]", head))
        if kind not in _KNOWN or extra:
            why = "done_getting_tensors: wrong number of tensors" if extra else f"unknown model architecture: '{kind}'"
            print(f"0.00.000.001 E llama_model_load: error loading model: {why}", file=sys.stderr)
            print("0.00.000.001 E srv  llama_server: exiting due to model loading error", file=sys.stderr, flush=True)
            if self.models:
                self.log(f"srv    operator(): instance name={name} exited with status 1")
                return
            os._exit(1)
        draft = values.get("spec-draft-model") or values.get("model-draft")
        if draft and not Path(draft).is_file():
            print("0.00.000.001 E srv    load_model: failed to load draft model", file=sys.stderr, flush=True)
            os._exit(1)
        time.sleep(float(self.behaviour.get("seconds", 0)))
        device = values.get("device", "none")
        layers = values.get("n-gpu-layers") or values.get("gpu-layers") or "0"
        if device != "none" and layers != "0" and not self.behaviour.get("blind"):
            self.log(f"load_tensors:        {device} model buffer size =    60.50 MiB", 4)
        self.log("load_tensors:   CPU_Mapped model buffer size =    92.10 MiB", 4)
        self.adapters = []
        for path_and_scale in split(values.get("lora-scaled", "")):
            parts = path_and_scale.split(":")
            if len(parts) != 2:
                fail('error while handling argument "--lora-scaled": lora-scaled format: FNAME:SCALE')
            self.adapters.append({"path": parts[0], "scale": float(parts[1])})
        self.adapters += [{"path": one, "scale": 1.0} for one in split(values.get("lora", ""))]
        for number, adapter in enumerate(self.adapters):
            adapter["id"] = number
            if not Path(adapter["path"]).is_file():
                fail(f"failed to load lora adapter '{adapter['path']}'")
            if not self.behaviour.get("forgetful"):
                count = len(re.findall(rb"\.lora_[ab]", Path(adapter["path"]).read_bytes()))
                self.log(f"llama_adapter_lora_init_impl: loaded {count} tensors from lora file", 4)
        drafts = draft and (self.behaviour.get("old") or values.get("spec-type") == "draft-simple")
        self.log("" if drafts else "spec common_specu: no implementations specified for speculative decoding", 4)
        self.loaded = name
        self.log("srv  llama_server: model loaded")

    def listen(self) -> http.server.ThreadingHTTPServer:
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def answer(self, body: Any, status: int = 200) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self) -> None:
                if not server.ready:
                    self.answer({"error": {"message": "Loading model", "code": 503}}, 503)
                elif self.path == "/health":
                    self.answer({"status": "ok"})
                elif "api-key" in server.values:
                    self.answer({"error": {"message": "Invalid API Key", "code": 401}}, 401)
                elif self.path == "/v1/models":
                    self.answer({"object": "list", "data": server.listed()})
                elif self.path == "/lora-adapters":
                    self.answer(server.adapters)
                else:
                    self.answer({"error": {"code": 404}}, 404)

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path == "/lora-adapters":
                    for one in request:
                        server.adapters[one["id"]]["scale"] = one["scale"]
                    self.answer({"success": True})
                    return
                asked = request.get("model")
                if server.models and asked != server.loaded:
                    server.load(asked, server.models[asked])
                count, prompt = request.get("n_predict", 4), request.get("prompt", "")
                speed = 18.0 if server.adapters else 20.0
                timings = {
                    "prompt_n": len(prompt), "prompt_ms": 10.0 * len(prompt), "prompt_per_second": 100.0,
                    "predicted_n": count, "predicted_ms": 1000.0 * count / speed, "predicted_per_second": speed,
                }  # fmt: skip
                self.answer({"content": " and so on", "model": server.loaded, "timings": timings})

            def log_message(self, *_: object) -> None:
                return

        host, port = self.values["host"], int(self.values["port"])
        try:
            return http.server.ThreadingHTTPServer((host, port), Handler)
        except OSError:
            print(
                f"0.00.000.001 E srv         start: couldn't bind HTTP server socket, hostname: {host}, port: {port}",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)

    def listed(self) -> list[dict[str, Any]]:
        if not self.models:
            return [{"id": self.loaded, "object": "model"}]
        states = {True: "loaded", False: "unloaded"}
        return [{"id": name, "status": {"value": states[name == self.loaded]}} for name in self.models]


def split(text: str) -> list[str]:
    """Fields between commas, of which one may stand in quotes."""
    return [field.strip('"') for field in re.findall(r'"[^"]*"|[^,]+', text)]


def read_presets(path: Path) -> dict[str, dict[str, str]]:
    """The sections of a presets file, in their order; keys without a section are ignored."""
    parser = configparser.ConfigParser(
        interpolation=None, comment_prefixes=(";", "#"), inline_comment_prefixes=(";", "#")
    )
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string("[ignored]\n" + path.read_text(encoding="utf-8"))
    return {name: dict(parser[name]) for name in parser.sections() if name != "ignored"}


if __name__ == "__main__":
    main()
