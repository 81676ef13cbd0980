"""The image side's commands, as console scripts call them; `python -m nkat_vit.train` and its like do the same.

As in `nkat.commands`, a command's own modules are imported when it is called.
"""

from __future__ import annotations

from nkat.host.start import start


def download() -> None:
    """`nkat-vit-download`"""
    start("nkat_vit.download")


def train() -> None:
    """`nkat-vit-train`"""
    start("nkat_vit.train")


def evaluate() -> None:
    """`nkat-vit-evaluate`"""
    start("nkat_vit.evaluate")


def interpret() -> None:
    """`nkat-vit-interpret`"""
    start("nkat_vit.interpret")


def predict() -> None:
    """`nkat-vit-predict`"""
    start("nkat_vit.predict")


def augment() -> None:
    """`nkat-vit-augment`"""
    start("nkat_vit.augment")


def export() -> None:
    """`nkat-vit-export`"""
    start("nkat_vit.export")
