"""The flags that name Θ or LoRA, one or several with weights, for every program that takes them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from nkat.errors import NKATError
from nkat.theta.combine import WeightedFile, scaled_files, weighted_file


def add_theta_arguments(parser: argparse.ArgumentParser, about: str) -> None:
    """`--theta FILE[:WEIGHT]` and llama.cpp's way, `--theta-scaled FILE:WEIGHT,...`, each as often as wanted, into
    `thetas`, in the order given.

    about: what `--theta` is for
    """
    _add(parser, "theta", ("FILE[:WEIGHT]", "FILE:WEIGHT,..."), about, "as --lora-scaled of llama.cpp has them")


def add_lora_arguments(parser: argparse.ArgumentParser) -> None:
    """`--lora PATH` and `--lora-scaled PATH:SCALE`, each as often as wanted, into `loras`, in the order given."""
    about = "run this LoRA in place of Θ: a folder of PEFT's, or a GGUF of llama.cpp's; several are added up"
    _add(parser, "lora", ("PATH[:SCALE]", "PATH:SCALE,..."), about, "as llama.cpp has them")


def _add(parser: argparse.ArgumentParser, name: str, forms: tuple[str, str], about: str, scaled: str) -> None:
    """The flag for one and the flag for several. forms: what each takes;  scaled: whose way the second is"""
    for flag, kind, form, said in (
        (name, _one, forms[0], about),
        (f"{name}-scaled", _scaled, forms[1], f"several in one flag, {scaled}"),
    ):
        parser.add_argument(
            f"--{flag}", dest=f"{name}s", action=_Append, type=kind, default=(), metavar=form, help=said
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
        words += [f"--{flag}", file.path if file.weight == 1.0 else f"{file.path}:{file.weight!r}"]
    return words


class _Append(argparse.Action):
    """Adds the files of one flag behind those before it."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: object, option: str | None = None
    ) -> None:
        assert isinstance(values, list)
        setattr(namespace, self.dest, (*getattr(namespace, self.dest), *values))


def _one(text: str) -> list[WeightedFile]:
    try:
        return [weighted_file(text)]
    except NKATError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _scaled(text: str) -> list[WeightedFile]:
    try:
        return scaled_files(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
