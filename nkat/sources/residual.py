"""Θ from the residual R = W_reference − W: the antisymmetric Θ whose κΘ comes closest to what quantisation lost.

The problem. A layer's m×n residual R, inputs x with second moments C = E[x xᵀ] (n×n; or only its diagonal; or the
identity where nothing is known), P and Q of rank r:

    minimise over P, Q    f = ‖ (R − κ Θ[:m, :n]) C^½ ‖²_F,    Θ = P Qᵀ − Q Pᵀ

f is the expected squared error of the layer's output. Without the restriction to antisymmetric Θ the best matrix of
rank k has a closed form (QERA, arXiv 2410.06040): the truncated SVD of R C^½, times C^-½ (`unrestricted_optimum`). Any
root C = L Lᵀ does as well as C^½, so a Cholesky factor is used.

Restricted, there is none. Let N = max(m, n), Π the projection on the first m coordinates, and C padded to N×N with
zeros. For antisymmetric Δ = T − κΘ, where T is the best antisymmetric matrix of any rank, f = const + ‖Π Δ C^½‖². In
coordinates where Π and C are both diagonal (a congruence; it keeps antisymmetry and rank) that is

    Σ_{i<j} (π_i c_j + π_j c_i) Δ_ij²

Those weights are no product w_i w_j, so that no SVD truncates Δ optimally. (T itself is known for Π = 1: it solves
T C + C T = R C − C Rᵀ.) But they are at most (π_i + c_i)(π_j + c_j): with M = Π + C = S Sᵀ the substitution
P, Q → Sᵀ P, Sᵀ Q evens out f's curvature. L-BFGS in these variables, started from the truncated SVD of Sᵀ T₀ S (T₀: the
T of C = 1), is within 0.5 % of its end after 40 steps. On four layers of SmolLM2 it needed a third of the steps that it
takes without the substitution; alternating least squares, each half-step by conjugate gradients in the same variables,
took 1.1 to 2.2 times as long to the same error. f takes only small products: with Θ[:m, :n] = up · down
(`low_rank_form`), f = tr(R C Rᵀ) − 2κ ⟨upᵀ R C, down⟩ + κ² ⟨upᵀ up, down C downᵀ⟩.

Θ has many factorisations. To f of the whole, f of the first 1, 2, … r − 1 columns is added with a small weight, at no
cost: the same small matrices hold the terms. The columns then stand in the order of what they explain, so that cutting
the rank keeps the most, for 0.1 to 0.5 % of f.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nkat.theta.algebra import Theta, ThetaError, low_rank_form, quantise_factors
from nkat.theta.svd import truncated_svd

_LBFGS_STEPS = 40
_LBFGS_TOLERANCE = 1e-6  # of f, which is 1 without Θ
_NESTED_WEIGHT = 0.1
# Of the moments' mean, added to each: an input that was never active must not make the problem singular. Judged on the
# moments of other text, 1e-4 to 1e-2 leave the same error within 0.5 % on five layers of SmolLM2; 1e-1 up to 10 % more.
_RIDGE = 1e-2


def factors_from_residual(
    residual: torch.Tensor,
    rank: int,
    kappa: float,
    moments: torch.Tensor | None = None,
    seed: int = 0,
    target_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """P, Q [max(m, n), r] in float32 such that κ Θ[:m, :n] approximates `residual` [m, n].

    moments: E[x xᵀ] [n, n], or E[x_j²] [n], or None for inputs of which nothing is known. With `target_size` only the
    leading corner is used. The first columns are a good Θ of lower rank. Raises ThetaError for NaN and infinities.
    """
    residual, moments = _cropped(residual, moments, target_size)
    m, n = residual.shape
    if not bool(torch.isfinite(residual).all()):
        raise ThetaError("the weight or the reference's weight holds NaN or infinity")
    moments = regularised_moments(moments, n)
    norm = float((_times(residual, moments) * residual).sum().clamp_min(0).sqrt())
    if norm == 0.0:
        empty = residual.new_zeros(max(m, n), rank)
        return empty, empty.clone()
    # f = 1 at Θ = 0 and κ = 1 while solving: L-BFGS's step sizes and tolerances then suit every layer.
    metric = _Metric.of(moments, m)
    z = _refine(residual / norm, moments, metric, _start(residual / norm, metric, rank, seed))
    p, q = _even(*metric.leave(z).chunk(2, dim=1))
    root = (norm / kappa) ** 0.5
    return p * root, q * root


def unrestricted_optimum(
    residual: torch.Tensor, rank: int, moments: torch.Tensor, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """U [m, rank], V [n, rank]: U Vᵀ is the best approximation of its rank in f, with no restriction (QERA-exact).

    moments must be positive definite, as `regularised_moments` gives them.
    """
    root = _cholesky(moments)
    u, s, v = truncated_svd(_times(residual, root), rank, seed)
    return u * s.sqrt(), _solve_transposed(root, v) * s.sqrt()


def rounded_factors(u: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """U [m, r], V [n, r] rounded to INT8 as Θ's factors are, one scale for each column, and back."""
    size = max(len(u), len(v))
    u8, v8 = quantise_factors(_padded(u, size), _padded(v, size)).factors()
    return u8[: len(u)], v8[: len(v)]


def equal_bytes_rank(rank: int, m: int, n: int) -> int:
    """The rank of an unrestricted m×n matrix whose factors take as many INT8 bytes as a Θ of `rank`; at least 1."""
    return max(1, min(m, n, 2 * max(m, n) * rank // (m + n)))


def regularised_moments(moments: torch.Tensor | None, n: int) -> torch.Tensor:
    """Float32 moments with mean 1 and a ridge: what is minimised; ones [n] for None.

    Raises ThetaError for NaN, infinity or all zero.
    """
    if moments is None:
        return torch.ones(n)
    if moments.shape not in ((n,), (n, n)):
        raise ThetaError(f"second moments of shape {tuple(moments.shape)} do not fit {n} inputs")
    moments = moments.float()
    mean = (moments if moments.ndim == 1 else moments.diagonal()).mean()
    moments = moments / mean
    if not bool(torch.isfinite(moments).all()):
        raise ThetaError("the calibration inputs' second moments are not finite or all zero")
    return moments + _RIDGE * (1.0 if moments.ndim == 1 else torch.eye(n))


@dataclass(frozen=True, slots=True)
class ErrorsLeft:
    """What approximations of one residual leave of the squared error of the layer's output, f.

    lost: f without Θ, that is, what quantisation does (E of the squared error where the moments are inputs')
    theta: f left by Θ as it is stored; unrestricted: by the unrestricted optimum at the same bytes, in INT8 too
    diagonal: f left by a Θ for which only the diagonal of the moments was used; None where no more is known
    """

    lost: float
    theta: float
    unrestricted: float
    unrestricted_rank: int
    diagonal: float | None


def errors_left(
    residual: torch.Tensor,
    theta: Theta,
    kappa: float,
    moments: torch.Tensor | None = None,
    seed: int = 0,
    target_size: int | None = None,
) -> ErrorsLeft:
    """Compares Θ, made by `factors_from_residual` from these arguments, with what else the same bytes could do."""
    residual, moments = _cropped(residual, moments, target_size)
    m, n = residual.shape
    scale = 1.0 if moments is None else float((moments if moments.ndim == 1 else moments.diagonal()).mean())
    solved = regularised_moments(moments, n)
    down, up = low_rank_form(*theta.factors(), m, n)
    rank = equal_bytes_rank(theta.rank, m, n)
    u, v = rounded_factors(*unrestricted_optimum(residual, rank, solved, seed))
    diagonal = None
    if moments is not None and moments.ndim == 2:
        simple = quantise_factors(*factors_from_residual(residual, theta.rank, kappa, moments.diagonal(), seed))
        simple_down, simple_up = low_rank_form(*simple.factors(), m, n)
        diagonal = scale * _error(residual - kappa * (simple_up @ simple_down), solved)
    return ErrorsLeft(
        lost=scale * _error(residual, solved),
        theta=scale * _error(residual - kappa * (up @ down), solved),
        unrestricted=scale * _error(residual - u @ v.T, solved),
        unrestricted_rank=rank,
        diagonal=diagonal,
    )


@dataclass(frozen=True, slots=True)
class _Metric:
    """M = Π + C = S Sᵀ of the docstring: the change of variables that makes f smooth in every direction.

    root: S over the first n coordinates, as [n] (diagonal) or lower triangular [n, n]; beyond them S is the identity
    """

    root: torch.Tensor

    @classmethod
    def of(cls, moments: torch.Tensor, m: int) -> _Metric:
        inside = (torch.arange(len(moments)) < m).to(moments.dtype)
        return cls(_cholesky(moments + (inside if moments.ndim == 1 else torch.diag(inside))))

    def enter(self, factors: torch.Tensor) -> torch.Tensor:
        """Sᵀ times [N, k]."""
        head, tail = factors[: len(self.root)], factors[len(self.root) :]
        return torch.cat([self.root[:, None] * head if self.root.ndim == 1 else self.root.T @ head, tail])

    def leave(self, factors: torch.Tensor) -> torch.Tensor:
        """S⁻ᵀ times [N, k]."""
        head, tail = factors[: len(self.root)], factors[len(self.root) :]
        return torch.cat([_solve_transposed(self.root, head), tail])


def _start(residual: torch.Tensor, metric: _Metric, rank: int, seed: int) -> torch.Tensor:
    """[P, Q] in the metric's variables: the best of its rank for T₀ there."""
    m, n = residual.shape
    k, size = min(m, n), max(m, n)
    target = residual.new_zeros(size, size)
    target[:m, :n] = residual
    target[:n, :m] -= residual.T
    # Antisymmetry binds only the k×k corner. The mirror images of all other entries lie outside the block.
    target[:k, :k] *= 0.5
    target = metric.enter(metric.enter(target).T).T
    u, _, _ = truncated_svd(target, min(2 * rank, size), seed)
    # Within the space of the largest pairs, i·H is Hermitian: its eigenvectors a + ib span the planes a, b in which
    # the antisymmetric H = Uᵀ T U acts as a rotation by λ: H = Σ 2λ (b aᵀ − a bᵀ) over the positive λ.
    projected = (u.T @ target @ u).double()
    projected = 0.5 * (projected - projected.T)
    values, vectors = torch.linalg.eigh(1j * projected)
    values, vectors = values[-rank:].flip(0).clamp_min(0), vectors[:, -rank:].flip(1)
    pairs = torch.cat([vectors.imag, vectors.real], dim=1) * (2.0 * values).sqrt().repeat(2)
    return u @ pairs.to(u.dtype)


def _refine(residual: torch.Tensor, moments: torch.Tensor, metric: _Metric, start: torch.Tensor) -> torch.Tensor:
    m, n = residual.shape
    rank = start.shape[1] // 2
    weighted = _times(residual, moments)
    constant = float((weighted * residual).sum())
    # The term of columns i and j is in f of the first k columns for every k beyond both.
    weights = torch.tensor([_NESTED_WEIGHT] * (rank - 1) + [1.0])
    weights = (weights / weights.sum()).flip(0).cumsum(0).flip(0)
    column = torch.arange(rank).repeat(2)
    linear_weights, square_weights = weights[column], weights[torch.maximum(column[:, None], column)]
    z = start.clone().requires_grad_()

    def closure() -> float:
        optimizer.zero_grad()
        p, q = metric.leave(z).chunk(2, dim=1)
        down, up = low_rank_form(p, q, m, n)
        linear = (((up.T @ weighted) * down).sum(dim=1) * linear_weights).sum()
        square = ((up.T @ up) * (_times(down, moments) @ down.T) * square_weights).sum()
        value = constant - 2.0 * linear + square
        value.backward()
        return float(value.detach())

    optimizer = torch.optim.LBFGS(
        [z], max_iter=_LBFGS_STEPS, tolerance_change=_LBFGS_TOLERANCE, line_search_fn="strong_wolfe"
    )
    optimizer.step(closure)
    return z.detach()


def _even(p: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same Θ with the norms of each pair of columns made equal, for INT8."""
    p_norm, q_norm = p.norm(dim=0), q.norm(dim=0)
    even = (q_norm / p_norm.clamp_min(1e-30)).sqrt().clamp(1e-3, 1e3)
    return p * even, q / even


def _cropped(
    residual: torch.Tensor, moments: torch.Tensor | None, target_size: int | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if target_size is None:
        return residual, moments
    corner = (slice(target_size),) * (0 if moments is None else moments.ndim)
    return residual[:target_size, :target_size], None if moments is None else moments[corner]


def _times(matrix: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    """[k, n] times the moments, or times a root of them: a full matrix or a diagonal."""
    return matrix * moments if moments.ndim == 1 else matrix @ moments


def _error(left: torch.Tensor, moments: torch.Tensor) -> float:
    return float((_times(left, moments) * left).sum(dtype=torch.float64))


def _cholesky(matrix: torch.Tensor) -> torch.Tensor:
    """A root L, L Lᵀ = matrix: lower triangular, or the elements' roots of a diagonal."""
    if matrix.ndim == 1:
        return matrix.sqrt()
    return torch.linalg.cholesky(matrix.double()).float()


def _solve_transposed(root: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """L⁻ᵀ times [n, k], for a root of `_cholesky`."""
    if root.ndim == 1:
        return matrix / root[:, None]
    return torch.linalg.solve_triangular(root.T, matrix, upper=True)


def _padded(matrix: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.cat([matrix, matrix.new_zeros(rows - len(matrix), matrix.shape[1])])
