"""A model that never ends a text by itself."""

from __future__ import annotations

from pathlib import Path

from nkat.lm.load import load_model
from nkat.theta.modelfile import open_model_file


def without_an_end(model: Path, path: Path) -> Path:
    """The model with logits of 0 for the tokens that end a text, which some other logit always exceeds."""
    output = open_model_file(model).base.file.tensors["output.weight"]
    row = output.nbytes // output.shape[0]
    data = bytearray(model.read_bytes())
    for token in load_model(model).tokenizer.eog_ids:
        start = output.offset + token * row
        data[start : start + row] = bytes(row)
    path.write_bytes(data)
    return path
