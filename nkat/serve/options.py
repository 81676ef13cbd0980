"""The server's command line."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nkat.errors import NKATError
from nkat.host import commandline
from nkat.lm.load import DTYPES
from nkat.serve.web import is_this_machine
from nkat.theta.combine import WeightedFile
from nkat.theta.options import add_theta_arguments

EXAMPLES = """\
  python nkat_server.py --model models/smollm2.nkat                       then open http://127.0.0.1:8080 in a browser
  python nkat_server.py --model model.gguf --theta style.bin --theta-scaled facts.bin:0 --port 9000
  python nkat_server.py --model model.nkat --gammas 0.95 0.9              also as models of these strengths
  python nkat_server.py --model model.nkat --host 0.0.0.0 --api-key-file keys.txt
"""
ENDING = """\
exit status:
  0 after Ctrl-C or SIGTERM, once every client is told; 2 a mistake or an input that cannot be used (stderr's line says
  what); 130 and 143 after Ctrl-C and SIGTERM while the model was still being loaded
"""
KEY_VARIABLE = "NKAT_API_KEY"
USUAL_CONTEXT = 8192  # tokens, where the model was made for as many


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What the user asked for.

    alias: the model's name for clients; None: its file's
    gammas: further strengths of Θ to list as models
    context: tokens of a prompt and its answer; None: as usual
    queue: requests that may wait beside the one that is answered
    grace: seconds that the answer being written has when the server is told to stop
    """

    model: Path
    thetas: tuple[WeightedFile, ...]
    theta_gamma: float | None
    alias: str | None
    gammas: list[float]
    host: str
    port: int
    api_key: str | None
    api_key_file: Path | None
    no_key: bool
    cors: list[str]
    context: int | None
    queue: int
    grace: float
    dtype: str | None
    activations: str | None
    no_cuda: bool
    threads: int | None


CONFLICTS: tuple[tuple[Callable[[ServeOptions], object], str], ...] = (
    (lambda o: o.api_key is not None and o.api_key_file is not None, "give --api-key or --api-key-file, not both"),
    (lambda o: o.no_key and (o.api_key or o.api_key_file), "--no-key contradicts --api-key and --api-key-file"),
    (lambda o: o.port > 65535, "--port must be from 0 to 65535, got {o.port}"),
    (
        lambda o: o.alias is not None and (not o.alias.strip() or ":" in o.alias),
        "--alias must be a name without colons",
    ),
    (
        lambda o: any(not (origin == "*" or "://" in origin) for origin in o.cors),
        "--cors takes an origin such as https://chat.example, or *",
    ),
)


def parse_arguments(argv: Sequence[str] | None = None) -> ServeOptions:
    parser = commandline.parser(
        "Serve a language model and its Θ to other programs by OpenAI's API, and to a browser as a chat.",
        EXAMPLES,
        ending=ENDING,
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="FILE", help="a .nkat or .gguf, or hf:OWNER/REPO[:QUANT]")
    add_theta_arguments(
        parser,
        "a Θ made for this model (--theta-only of the converter), in place of the model's own; of several, to which "
        "the model's own file may belong, the sum answers where a request names none",
    )
    add("--theta-gamma", type=float, metavar="G", help="strength of Θ where a request names none: lower is stronger")
    add("--alias", metavar="NAME", help="the model's name for clients (default: its file's)")
    add("--gammas", type=float, nargs="+", default=[], metavar="G", help="list these strengths of Θ as models too")
    add("--context", type=commandline.positive_int, metavar="N", help="tokens of a prompt and its answer, at most "
        f"(default {USUAL_CONTEXT}, or what the model was made for)")  # fmt: skip
    add("--queue", type=commandline.non_negative_int, default=64, metavar="N", help="requests that may wait beside the "
        "one that is answered; more are told to come back (default 64)")  # fmt: skip
    add("--grace", type=commandline.seconds, default=10.0, metavar="S", help="seconds that the answer being written "
        "has when the server is told to stop (default 10)")  # fmt: skip
    who = parser.add_argument_group("who may ask").add_argument
    who("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1: this machine alone)")
    who("--port", type=commandline.non_negative_int, default=8080, help="(default 8080; 0: any that is free)")
    who("--api-key", metavar="KEY", help="only who shows this key is answered; other users of this machine see it "
        f"in the list of processes, but not in the variable {KEY_VARIABLE} or a file")  # fmt: skip
    who("--api-key-file", type=Path, metavar="FILE", help="a file with a key on each line")
    who("--no-key", action="store_true", help="answer everybody, also where other machines can reach --host")
    who("--cors", action="append", default=[], metavar="ORIGIN", help="let web pages from there call the API "
        "(may be given several times; default: none)")  # fmt: skip
    add("--dtype", choices=DTYPES, help="of the computation (default: float32 on the processor, bfloat16 on CUDA)")
    add("--activations", choices=("float", "int8"), help="int8: round the layers' inputs as llama.cpp does (default: "
        "int8 on the processor, float on CUDA)")  # fmt: skip
    add("--no-cuda", action="store_true", help="use the processor even if there is a GPU")
    add("--threads", type=commandline.thread_count, metavar="N", help="processor threads (default: torch's choice)")
    options = commandline.taken(ServeOptions, parser.parse_args(argv))
    commandline.check_conflicts(parser, options, CONFLICTS)
    return options


def keys(options: ServeOptions) -> tuple[str, ...]:
    """The keys that are accepted; none: everybody is. Raises NKATError where other machines could reach a server that
    asks for none, and for a key that no header can hold."""
    if options.api_key is not None:
        found, where = [options.api_key], "--api-key"
    elif options.api_key_file is not None:
        found, where = _read_keys(options.api_key_file), f"{options.api_key_file}"
    else:
        found, where = [os.environ.get(KEY_VARIABLE, "")], KEY_VARIABLE
        if options.no_key or not found[0]:
            found = []
    for key in found:
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise NKATError(f"{where}: a key must be of printable ASCII characters, without spaces")
    if not found and not options.no_key and not is_this_machine(options.host):
        raise NKATError(
            f"other machines may reach --host {options.host}: set {KEY_VARIABLE} or give --api-key-file, or --no-key "
            "to answer everybody"
        )
    return tuple(found)


def _read_keys(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise NKATError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise NKATError(f"{path}: is no text") from None
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise NKATError(f"{path}: has no key")
    return found
