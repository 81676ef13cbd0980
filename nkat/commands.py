"""The commands of the language side: what both a console script and a script of the checkout call.

A command's own modules are imported when it is called, and by name: nothing here waits for torch.
"""

from __future__ import annotations

from typing import NoReturn

from nkat.host.commandline import start


def convert() -> NoReturn:
    """`nkat-convert`, nkat_gguf_converter.py"""
    start("nkat.convert.job")


def engine() -> NoReturn:
    """`nkat-engine`, nkat_inference_engine.py"""
    start("nkat.inference.job")


def optimize() -> NoReturn:
    """`nkat-optimize`, nkat_auto_optimizer.py"""
    start("nkat.search.main")


def kobold() -> NoReturn:
    """`nkat-kobold`, backend_selector.py"""
    start("nkat.kobold.session")


def models() -> NoReturn:
    """`nkat-models`, python -m nkat.models"""
    start("nkat.models")
