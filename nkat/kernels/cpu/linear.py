"""A packed weight repacked for the CPU kernels, its Θ, and the buffers that hold its inputs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType

from nkat.kernels.cpu.batch import batch_kernel, batch_tokens, make_scratch
from nkat.kernels.cpu.formats import BLOCK_LAYOUTS, padded_rows, unit_bytes
from nkat.kernels.cpu.layout import ROWS
from nkat.kernels.cpu.matmul import (
    EXACT,
    FLOAT_TYPES,
    STAR_ROWS,
    Rounding,
    down_kernel,
    layer_rounding,
    matmul_kernel,
    round_kernel,
)
from nkat.kernels.cpu.program import Program, aligned, pool
from nkat.kernels.cpu.repack import repack, repack_float
from nkat.theta.algebra import Term


def token_state(count: int) -> np.ndarray:
    """What kernels are told of the tokens, int64 [8]: [0] how many, [1] position of the first, [2] tokens of one
    sequence, of which there may be several behind one another, [3] the first token that feels Θ.
    """
    return np.array([count, 0, 1 << 40, 0, 0, 0, 0, 0], np.int64)


class Panels:
    """Inputs of a linear layer, rounded: room for so many tokens of so many columns, `tokens` to a panel.

    `state`: of `token_state`
    """

    def __init__(self, rounding: Rounding, columns: int, capacity: int, tokens: int, state: np.ndarray) -> None:
        self.rounding, self.columns, self.tokens, self.state = rounding, columns, tokens, state
        count = -(-capacity // tokens)
        if rounding == EXACT:
            self.q = aligned((count, columns, tokens), np.float32)
            self.d = self.sums = np.zeros(1, np.float32)
        else:
            self.q = aligned((count, columns // 32, rounding.step_bytes(tokens)), np.int8)
            self.d = aligned((count, columns // 32, tokens), np.float32)
            self.sums = aligned((count, columns // rounding.group, tokens), np.float32)

    def fill(self, program: Program, x: np.ndarray, row_bytes: int) -> None:
        """Adds the step that rounds rows of float32 into the panels."""
        kernel = round_kernel(self.rounding, self.tokens)
        program.add(kernel, (x, row_bytes, self.columns, self.q, self.d, self.sums, self.state))


class CpuStar:
    """Θ of one layer for the kernels: INT8 factors as stored, and the factor that a strength gives each term.

    The arrays stay where they are while Θ is replaced by others of up to `room` columns, so that steps follow it.
    terms: of the Θ that is there, two for each of its columns
    """

    def __init__(self, shape: tuple[int, int], float_inputs: bool, up: np.ndarray) -> None:
        """up: int8 [tile, at least 2 · room · 16]: where the rows of `up` go, wherever that is"""
        self.room = room = up.shape[1] // (2 * ROWS)
        self.shape, self.float_inputs, self.terms = shape, float_inputs, 0
        self.rows = ROWS if float_inputs else STAR_ROWS  # of a tile of `down`
        self.product, self.strength = np.zeros((2, 2 * room), np.float32)
        self.up = up
        self.down = np.zeros(-(-2 * room // self.rows) * self.rows * shape[1], np.int8)
        self._factors: tuple[torch.Tensor, torch.Tensor] | None = None
        self._theta: Term | None = None

    def put(self, theta: Term | None) -> None:
        """Puts another Θ in place, of at most `room` columns; of one with the same factors only the scales."""
        if theta is self._theta:
            return
        if theta is None:
            self.terms = 0
        else:
            if self._factors is None or any(a is not b for a, b in zip(self._factors, theta.stored, strict=True)):
                self._lay_out(theta)
            scales = theta.int8_scales()
            self.terms = len(scales)
            self.product[: self.terms] = scales.numpy()
        self._theta = theta

    def _lay_out(self, theta: Term) -> None:
        (m, n), (some_down, some_up) = self.shape, (factor.numpy() for factor in theta.int8_form(*self.shape))
        terms = len(some_down)
        up = np.zeros((padded_rows(m), terms), np.int8)
        up[:m] = some_up
        self.up[:, : terms * ROWS] = up.reshape(-1, ROWS, terms).transpose(0, 2, 1).reshape(len(self.up), -1)
        down = np.zeros((-(-terms // self.rows) * self.rows, n), np.int8)
        down[:terms] = some_down
        if self.float_inputs:
            self.down[: down.size] = down.reshape(-1, self.rows, n).transpose(0, 2, 1).reshape(-1)
        else:
            tiles = down.reshape(-1, self.rows, n // 8, 8).transpose(0, 2, 1, 3).reshape(-1)
            self.down[: down.size] = tiles ^ np.int8(-128)  # plus 128, as unsigned bytes
        self._factors = theta.stored

    def set_kappa(self, kappa: float) -> None:
        self.strength[:] = self.product * np.float32(kappa)

    @property
    def nbytes(self) -> int:
        return self.up.nbytes + self.down.nbytes


@dataclass(frozen=True, slots=True, eq=False)
class StarStep:
    """What of a step's arguments depends on Θ. terms: int64 [1], 0 is off; outputs: whether the step makes outputs."""

    star: CpuStar
    terms: np.ndarray
    outputs: bool = False

    def switch(self, on: bool) -> None:
        """Follows the Θ that is there now, or leaves it out."""
        self.terms[0] = self.star.terms if on else 0


class CpuLinear:
    """W ⋆ x = W x + κ Θ x + bias of one packed weight [m, n], by the compiled kernels."""

    def __init__(
        self,
        packed: torch.Tensor,
        qtype: GGMLQuantizationType,
        shape: tuple[int, int],
        bias: torch.Tensor | None = None,
        *,
        exact: bool = False,
        in_place: bool = False,
        room: int = 0,
    ) -> None:
        """exact: multiply the inputs as they are, in float32, instead of rounding them to INT8.
        in_place: leave the weight as the file has it: it takes no memory, and multiplies many tokens only; exact inputs
        may be of three bytes then
        room: columns of Θ whose rows for the outputs are to lie behind each tile of the weight. Read on the way from
        tile to tile, they cost a fifth of what they cost elsewhere
        """
        self.qtype, self.shape, self.exact, self.in_place = qtype, shape, exact, in_place
        self.rounding = layer_rounding(qtype, exact, in_place)
        self.tiles: np.ndarray  # uint8, a row for each tile; for each row of the weight where it is left in place
        if in_place:
            self.tiles = packed.numpy().reshape(shape[0], -1)
        elif qtype in FLOAT_TYPES:
            self.tiles = repack_float(packed, qtype, shape)
        else:
            self.tiles = repack(packed, qtype, shape, torch.get_num_threads(), 2 * ROWS * room)
        self.units = shape[1] if qtype in FLOAT_TYPES else shape[1] // BLOCK_LAYOUTS[qtype].columns
        tiled = not in_place and qtype not in FLOAT_TYPES
        self.behind = self.tiles.shape[1] - self.units * unit_bytes(qtype) if tiled else 0  # bytes behind each tile
        self.bias: np.ndarray | None = None
        if bias is not None:
            self.bias = np.zeros(self.padded_rows, np.float32)
            self.bias[: shape[0]] = bias.float().numpy()
        self.star: CpuStar | None = None

    @property
    def padded_rows(self) -> int:
        """Outputs, rounded up to whole tiles: the columns that a buffer for y needs."""
        return padded_rows(self.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes of the repacked weight and Θ."""
        return self.tiles.nbytes - len(self.tiles) * self.behind + (0 if self.star is None else self.star.nbytes)

    def set_theta(self, theta: Term | None, room: int = 0) -> None:
        """Puts another Θ in place. room: columns that there is to be room for, whatever this one has."""
        room = max(room, 0 if theta is None else theta.columns)
        if self.star is None or self.star.room < room or (theta is None and room == 0):
            self.star = CpuStar(self.shape, self.rounding == EXACT, self._place_of_up(room)) if room else None
        if self.star is not None:
            self.star.put(theta)

    def _place_of_up(self, room: int) -> np.ndarray:
        """int8 [tile, 2 · room · 16]: behind the tiles of the weight where there is as much room, else by itself."""
        nbytes = 2 * ROWS * room
        if nbytes <= self.behind:
            start = self.units * unit_bytes(self.qtype)
            return self.tiles.view(np.int8)[:, start : start + nbytes]
        return np.zeros((self.padded_rows // ROWS, nbytes), np.int8)

    def down(self, program: Program, panels: Panels, u: np.ndarray) -> StarStep:
        """Adds the step of the star term that reads the inputs. u: float32 [panel, at least the terms, token]"""
        star = self.star
        assert star is not None
        groups = self.shape[1] if self.rounding == EXACT else self.shape[1] // 32
        kernel = down_kernel(self.rounding, panels.tokens)
        words = program.add(
            kernel,
            (star.down, groups, star.terms, panels.q, panels.d, panels.sums, star.strength, u, panels.state),
        )
        return StarStep(star, words[2:3])

    def multiply(
        self,
        program: Program,
        panels: Panels,
        y: np.ndarray,
        row_bytes: int,
        scratch: np.ndarray,
        u: np.ndarray | None = None,
        first_tile: int = 0,
        tiles: int | None = None,
    ) -> StarStep | None:
        """Adds the product's step, over some of the tiles; returns its part in Θ, None where it has none.

        panels: of one token, or of `batch_tokens()`, which need `scratch` of `make_scratch`
        u: what `down` computed, None for no star term
        """
        count = self.padded_rows // ROWS - first_tile if tiles is None else tiles
        first_row = first_tile * ROWS
        star = self.star if u is not None else None
        weight = self.tiles[first_row if self.in_place else first_tile :]
        inputs = (panels.q, panels.d, panels.sums)
        end = (
            0 if self.bias is None else self.bias[first_row:],
            0 if star is None else star.up[first_tile:],
            0 if star is None else star.up.strides[0],
            0 if star is None else star.terms,
            0 if u is None else u,
        )
        if panels.tokens == 1:
            assert not self.in_place
            kernel = matmul_kernel(self.qtype, self.exact)
            words = program.add(kernel, (weight, self.tiles.shape[1], self.units, count, *inputs, y, *end))
        else:
            words = program.add(
                batch_kernel(self.qtype, panels.tokens, self.rounding, not self.in_place),
                (
                    weight,
                    self.tiles.shape[1],
                    self.units,
                    count,
                    self.shape[0] - first_row,
                    *inputs,
                    y,
                    row_bytes,
                    *end,
                    scratch,
                    scratch.shape[1],
                    panels.state,
                ),
            )
        if star is None:
            return None
        place = 11 if panels.tokens == 1 else 13
        return StarStep(star, words[place : place + 1], outputs=True)

    def rows(self, x: torch.Tensor, start: int, stop: int, kappa: float, threads: int) -> torch.Tensor:
        """Outputs [start, stop) for x [..., n]; float32 [..., stop - start]. `start` is a multiple of 16."""
        inputs = x.reshape(-1, self.shape[1]).float().contiguous().numpy()
        count = len(inputs)
        tokens = 1 if count == 1 else batch_tokens()
        state = token_state(count)
        panels = Panels(self.rounding, self.shape[1], count, tokens, state)
        first, last = start // ROWS, -(-stop // ROWS)
        y = np.empty((-(-count // tokens) * tokens, (last - first) * ROWS), np.float32)
        program = Program()
        panels.fill(program, inputs, inputs.strides[0])
        u = None
        if self.star is not None and self.star.terms and kappa != 0.0:
            u = np.empty((len(panels.q), self.star.terms, tokens), np.float32)
            self.star.set_kappa(kappa)
            self.down(program, panels, u)
        program.barrier()
        self.multiply(program, panels, y, y.strides[0], make_scratch(threads, tokens), u, first, last - first)
        program.run(pool(threads))
        return torch.from_numpy(y)[:count, : stop - start].reshape(*x.shape[:-1], stop - start)
