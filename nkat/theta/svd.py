"""Truncated SVD of a weight."""

from __future__ import annotations

import torch

from nkat.theta.algebra import ThetaError

_SVD_OVERSAMPLING = 4  # extra columns of a Krylov block: separates the last wanted singular value from its neighbours
_SVD_MAX_STEPS = 48
_SVD_TOLERANCE = 1e-4  # stop when no wanted singular value moved by more than this (relative) in one step


def truncated_svd(weight: torch.Tensor, rank: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The `rank` largest singular triplets of a float32 [m, n] matrix: U [m, r], S [r] descending, V [n, r].

    Randomised block Golub–Kahan iteration with full reorthogonalisation (Musco and Musco, 2015,
    "Randomized Block Krylov Methods for Stronger and Faster Approximate Singular Value Decomposition",
    arXiv 1504.05477). Weight matrices have nearly flat spectra, on which `torch.svd_lowrank` needs
    several times as many products for the same accuracy. Falls to the exact SVD where the Krylov space
    would fill most of the matrix anyway. The start block comes from its own generator, and each pair's
    sign is fixed, so a seed gives the same result on every run.
    """
    m, n = weight.shape
    _check_rank(rank, m, n)
    if m < n:
        v, s, u = truncated_svd(weight.T, rank, seed)
        return _fix_signs(u, s, v)
    block = rank + _SVD_OVERSAMPLING
    max_steps = min(_SVD_MAX_STEPS, n // (2 * block))
    if max_steps < 8:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        return _fix_signs(u[:, :rank].contiguous(), s[:rank].contiguous(), vh[:rank].T.contiguous())

    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(n, block, generator=generator, dtype=weight.dtype)
    x = torch.linalg.qr(weight @ start).Q
    basis = weight.new_empty(m, max_steps * block)  # orthonormal columns: the Krylov space so far
    projected = weight.new_empty(max_steps * block, n)  # basisᵀ W
    previous = None
    for step in range(max_steps):
        used = (step + 1) * block
        basis[:, used - block : used] = x
        projected[used - block : used] = (weight.T @ x).T
        q, b = basis[:, :used], projected[:used]
        values = torch.linalg.eigvalsh(b @ b.T)[-rank:].clamp_min(0).sqrt()
        if previous is not None and bool(((values - previous).abs() <= _SVD_TOLERANCE * values).all()):
            break
        previous = values
        x = _new_directions(weight @ projected[used - block : used].T, q, generator)
    u, s, vh = torch.linalg.svd(b, full_matrices=False)
    return _fix_signs(q @ u[:, :rank], s[:rank].contiguous(), vh[:rank].T.contiguous())


def _new_directions(x: torch.Tensor, basis: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Orthonormal columns [m, b] spanning x [m, b] without its part in `basis` [m, k]."""
    floor = 1e-5 * float(x.norm())
    x, r = torch.linalg.qr(x - basis @ (basis.T @ x))
    exhausted = r.diagonal().abs() <= floor  # only rounding error is left, as for a matrix of low rank
    if bool(exhausted.any()):
        x[:, exhausted] = torch.randn(x.shape[0], int(exhausted.sum()), generator=generator, dtype=x.dtype)
        x = torch.linalg.qr(x - basis @ (basis.T @ x)).Q
    directions: torch.Tensor = torch.linalg.qr(x - basis @ (basis.T @ x)).Q  # "twice is enough" (Kahan and Parlett)
    return directions


def _check_rank(rank: int, m: int, n: int) -> None:
    if rank < 1 or rank > min(m, n):
        raise ThetaError(f"Θ rank {rank} is impossible for a {m}x{n} matrix: it must be from 1 to {min(m, n)}")


def _fix_signs(u: torch.Tensor, s: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A singular pair's common sign is arbitrary; make the largest entry of each column of U positive."""
    largest = u.abs().argmax(dim=0, keepdim=True)
    sign = u.gather(0, largest).sign()
    return u * sign, s, v * sign
