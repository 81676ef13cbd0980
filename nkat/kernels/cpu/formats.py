"""The layouts of all block formats that the CPU kernels read, and the sizes that follow from them."""

from __future__ import annotations

from gguf.constants import GGMLQuantizationType

from nkat.kernels.cpu import grid_layouts, integer_layouts, level_layouts
from nkat.kernels.cpu.layout import ROWS, BlockLayout

BLOCK_LAYOUTS: dict[GGMLQuantizationType, type[BlockLayout]] = {
    layout.block.qtype: layout for layout in (*integer_layouts.LAYOUTS, *level_layouts.LAYOUTS, *grid_layouts.LAYOUTS)
}


def unit_bytes(qtype: GGMLQuantizationType) -> int:
    """Bytes of one unit of a tile."""
    layout = BLOCK_LAYOUTS[qtype]
    return ROWS * (layout.block.block_bytes + layout.wider)


def padded_rows(rows: int) -> int:
    """Rows of whole tiles: the columns that a buffer for a weight's outputs needs."""
    return -(-rows // ROWS) * ROWS
