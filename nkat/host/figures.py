"""Pictures without a display, and the colours they share. matplotlib is imported when one is drawn."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from nkat.host.files import atomic_output

BASE, TRIAL, PRUNED, BEST = "#444444", "#1f77b4", "#bbbbbb", "#d62728"


def new_figure(title: str, inches: tuple[float, float], automatic: bool = True) -> Any:
    """A matplotlib Figure that belongs to no window; `automatic` lays out its panels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, layout="constrained" if automatic else None)
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    return figure


def whole_ticks(*axes: Any) -> None:
    """Ticks at whole numbers only, for matplotlib's axes (`panel.xaxis`) that count: layers, epochs, trials."""
    from matplotlib.ticker import MaxNLocator

    for axis in axes:
        axis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))


def save_figure(figure: Any, path: Path, force: bool, dpi: int = 110) -> None:
    """Writes it as PNG, whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    data = buffer.getvalue()
    with atomic_output(path, len(data), force) as file:
        file.write(data)
