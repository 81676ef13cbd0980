"""The image side's commands, as console scripts call them; `python -m nkat_vit.train` and its like do the same.

As in `nkat.commands`, a command's own modules are imported when it is called.
"""

from __future__ import annotations

from typing import NoReturn

from nkat.host.commandline import start


def download() -> NoReturn:
    """`nkat-vit-download`"""
    start("nkat_vit.download")


def train() -> NoReturn:
    """`nkat-vit-train`"""
    start("nkat_vit.train")


def evaluate() -> NoReturn:
    """`nkat-vit-evaluate`"""
    start("nkat_vit.evaluate")


def interpret() -> NoReturn:
    """`nkat-vit-interpret`"""
    start("nkat_vit.interpret")


def augment() -> NoReturn:
    """`nkat-vit-augment`"""
    start("nkat_vit.augment")


def export() -> NoReturn:
    """`nkat-vit-export`"""
    start("nkat_vit.export")
