"""What a conversion reads: the input and its reference, each opened once and loaded once, when it is first needed."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from nkat.lm.load import LoadedModel, load_model
from nkat.measure.judge import Judge, note_missing_chunks
from nkat.theta.modelfile import ModelFile, open_model_file


class Inputs:
    """The model to convert, and the same at a higher precision where there is one.

    text, chunks: what is judged on, where something is
    """

    def __init__(self, model: ModelFile, reference_path: Path | None, text: Path | None, chunks: int) -> None:
        self.model, self._reference_path, self._text, self._chunks = model, reference_path, text, chunks

    @cached_property
    def loaded(self) -> LoadedModel:
        """The input as the engine runs it, exact and without Θ."""
        return load_model(self.model, thetas={}, gamma=1.0)

    @cached_property
    def reference(self) -> ModelFile | None:
        return None if self._reference_path is None else open_model_file(self._reference_path)

    @cached_property
    def loaded_reference(self) -> LoadedModel | None:
        """The reference, exact and without a Θ that may be in it."""
        return None if self.reference is None else load_model(self.reference, thetas={}, gamma=1.0)

    @cached_property
    def judge(self) -> Judge:
        """On the user's text, else on the one that every Python carries; the input without Θ is scored there once."""
        judge = Judge.open(self.loaded, self._text, self._chunks)
        note_missing_chunks(judge.passages, self._chunks)
        return judge
