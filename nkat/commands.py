"""The commands of the language side: what both a console script and a script of the checkout call.

A command's own modules are imported when it is called, and by name: nothing here waits for torch.
"""

from __future__ import annotations

from nkat.host.start import load, start


def convert() -> None:
    """`nkat-convert`, nkat_gguf_converter.py"""
    start("nkat.convert.job")


def engine() -> None:
    """`nkat-engine`, nkat_inference_engine.py"""
    start("nkat.inference.job")


def optimize() -> None:
    """`nkat-optimize`, nkat_auto_optimizer.py"""
    start("nkat.search.main")


def kobold() -> None:
    """`nkat-kobold`, backend_selector.py"""
    start("nkat.kobold.session")


def serve() -> None:
    """`nkat-serve`, nkat_server.py"""
    start("nkat.serve.job")


def models() -> None:
    """`nkat-models`, python -m nkat.models"""
    start("nkat.models")


def setup() -> None:
    """`nkat-setup`, setup_nkat_kobold_integration.py, which must run where nothing else can be imported"""
    load("nkat.setup_check").main()


def lm_eval() -> None:
    """`nkat-lm-eval`, python -m nkat.harness.command"""
    start("nkat.harness.command")
