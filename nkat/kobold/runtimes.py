"""The programs that can serve a model; a new one is a row here, of a module of its own."""

from __future__ import annotations

from nkat.kobold.koboldcpp import KOBOLDCPP
from nkat.kobold.llama_server import LLAMA_SERVER

RUNTIMES = {runtime.name: runtime for runtime in (KOBOLDCPP, LLAMA_SERVER)}  # the first is the default
