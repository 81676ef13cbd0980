"""The flags that name Θ or LoRA, one or several with weights, for every program that takes them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from nkat.theta.combine import WeightedFile, scaled_files


def add_theta_arguments(parser: argparse.ArgumentParser, about: str) -> None:
    """`--theta FILE` and `--theta-scaled FILE:WEIGHT`, each as often as wanted, into `thetas`, in the order given.

    about: what `--theta` is for
    """
    parser.add_argument("--theta", dest="thetas", action=_Append, type=_whole, default=(), metavar="FILE", help=about)
    parser.add_argument(
        "--theta-scaled",
        dest="thetas",
        action=_Append,
        type=_scaled,
        default=(),
        metavar="FILE:WEIGHT",
        help="the same, of which so much counts: 0 is off, 1 as it is, below 0 the other way round; A:1,B:0.5 is two",
    )


def add_lora_arguments(parser: argparse.ArgumentParser) -> None:
    """`--lora PATH` and `--lora-scaled PATH:SCALE`, each as often as wanted, into `loras`, in the order given."""
    about = "run this LoRA in place of Θ: a folder of PEFT's, or a GGUF of llama.cpp's; several are added up"
    parser.add_argument("--lora", dest="loras", action=_Append, type=_whole, default=(), metavar="PATH", help=about)
    parser.add_argument(
        "--lora-scaled",
        dest="loras",
        action=_Append,
        type=_scaled,
        default=(),
        metavar="PATH:SCALE",
        help="the same at another strength; A:1,B:0.5 is two",
    )


def theta_words(files: Sequence[WeightedFile]) -> list[object]:
    """The flags that name these files again."""
    return _words("theta", files)


def lora_words(files: Sequence[WeightedFile]) -> list[object]:
    """The same of LoRA adapters."""
    return _words("lora", files)


def _words(flag: str, files: Sequence[WeightedFile]) -> list[object]:
    words: list[object] = []
    for file in files:
        plain = file.weight == 1.0
        words += [f"--{flag}", file.path] if plain else [f"--{flag}-scaled", f"{file.path}:{file.weight:g}"]
    return words


class _Append(argparse.Action):
    """Adds the files of one flag behind those before it."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: object, option: str | None = None
    ) -> None:
        assert isinstance(values, list)
        setattr(namespace, self.dest, (*getattr(namespace, self.dest), *values))


def _whole(text: str) -> list[WeightedFile]:
    return [WeightedFile(Path(text))]


def _scaled(text: str) -> list[WeightedFile]:
    try:
        return scaled_files(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
