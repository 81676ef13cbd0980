"""NKAT for images: a small vision transformer whose attention holds learned antisymmetric gauge terms.

    from nkat_vit import LogitsOnly, load_model

    trained = load_model("output/vit/mnist")
    logits = LogitsOnly(trained.model)(pictures)  # floats from 0 to 1, [batch, channels, side, side]

`NKATViT(ViTConfig())` is an untrained model. Names load what they need when they are first used.
"""

from typing import TYPE_CHECKING

# `nkat` says how threads shall wait before torch is loaded, which is when OpenMP reads it.
from nkat import NKATError, __version__

if TYPE_CHECKING:
    from nkat_vit.checkpoint import TrainedModel, load_model
    from nkat_vit.model import LogitsOnly, NKATViT, ViTConfig
    from nkat_vit.predict import predict_logits

__all__ = [
    "LogitsOnly",
    "NKATError",
    "NKATViT",
    "TrainedModel",
    "ViTConfig",
    "__version__",
    "load_model",
    "predict_logits",
]


def __getattr__(name: str) -> object:
    """The rest of `__all__`, imported at first use: torch takes a second, and a command's `--help` none of it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from nkat_vit import checkpoint, model, predict

    return next(getattr(module, name) for module in (model, checkpoint, predict) if hasattr(module, name))


def __dir__() -> "list[str]":
    return __all__
