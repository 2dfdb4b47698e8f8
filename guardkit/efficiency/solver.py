"""Fits many linear heads at once, each to the optimum of its convex objective. Knows arrays, not arms or images.

The objective is the one of `guardkit.module` for the decision of a linear head: for weights w, a bias b and rows z,

    J(w, b) = sum_i  a_i softplus(m_i - s_i (z_i . w + e_i b))  +  l2 / 2 |w - w0|^2

A labelled image is a row with s = +1 (unsafe) or -1 (safe), margin m = 0 and e = 1; its softplus is the cross-entropy of
its label. A pair is the row z(unsafe) - z(counterfactual) with s = +1, e = 0 and the pair loss's margin. Shares a_i hold
class and pair weights; w0 is where the head starts (zero, or the policy's texts). With l2 > 0 and at least one row of
each label the optimum exists and is unique.

The method is Newton's with a halved step where a full one would not descend enough (Armijo). Problems are solved side by
side in one batch; for each, the penalties are gone through from the strongest to the weakest, each started from the
solution before it. The weights lie in the span of the rows (the representer theorem), so a head on few images is solved
in few dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

_MAX_ITERATIONS = 100
_MAX_HALVINGS = 30
_ARMIJO = 1e-4
# the bias is not penalised; this keeps its Newton step finite where all images of one label are saturated
_BIAS_RIDGE = 1e-10
# problems share a batch up to this size, which caches hold; larger ones go one at a time
_CHUNK_BYTES = 8 << 20


@dataclass(frozen=True)
class Rows:
    """What heads are fitted to.

    Attributes:
        vectors: (m, d), already multiplied by the sign s.
        bias: (m,), s for images and 0 for pairs.
        margins: (m,).
        shares: (m,) the weights a_i, at least 0.
    """

    vectors: np.ndarray
    bias: np.ndarray
    margins: np.ndarray
    shares: np.ndarray


@dataclass(frozen=True)
class Solution:
    """Heads at their optimum: p problems, h penalties each.

    Attributes:
        weights: (p, h, d) float64.
        bias: (p, h) float64.
        objective: (p, h) values of J.
        gradient: (p, h) largest absolute entry of the gradient at the solution.
        iterations: Newton steps, of all problems and penalties.
        operations: multiplications and additions of their curvatures, which are most of the work.
    """

    weights: np.ndarray
    bias: np.ndarray
    objective: np.ndarray
    gradient: np.ndarray
    iterations: int
    operations: float


def decision_rows(
    embeddings: np.ndarray,
    labels: np.ndarray,
    pairs: np.ndarray,
    *,
    prevalence: float = 0.5,
    pair_weight: float = 1.0,
    pair_margin: float = 1.0,
) -> Rows:
    """The rows of a labelled set, weighted as `guardkit.losses` weights them.

    Args:
        embeddings: (n, d), scaled as the head scales them.
        labels: (n,) 1 = unsafe, 0 = safe.
        pairs: (p, 2) int: rows of an unsafe image and of its counterfactual.
        prevalence: share of unsafe images to train for, in (0, 1).
        pair_weight: of the pair loss beside cross-entropy.
        pair_margin: between twins, in logits.
    """
    signs = np.where(labels == 1, 1.0, -1.0)
    n_unsafe, n_safe = max(1, int((labels == 1).sum())), max(1, int((labels == 0).sum()))
    shares = np.where(labels == 1, prevalence / n_unsafe, (1 - prevalence) / n_safe)
    vectors, bias, margins = signs[:, None] * embeddings, signs, np.zeros(len(labels))
    if len(pairs) and pair_weight:
        vectors = np.concatenate([vectors, embeddings[pairs[:, 0]] - embeddings[pairs[:, 1]]])
        bias = np.concatenate([bias, np.zeros(len(pairs))])
        margins = np.concatenate([margins, np.full(len(pairs), pair_margin)])
        shares = np.concatenate([shares, np.full(len(pairs), pair_weight / len(pairs))])
    return Rows(vectors, bias, margins, shares)


def fit_linear(
    problems: Sequence[Rows], l2: np.ndarray, *, start: np.ndarray | None = None, device: str = "cpu", tolerance: float = 1e-9
) -> Solution:
    """The optimum of every problem for every penalty.

    Args:
        problems: what each head is fitted to; all of one width.
        l2: (h,) penalties, above 0.
        start: (d,) the weights w0 that the penalty pulls towards; None: zero.
        device: where to compute.
        tolerance: largest absolute gradient entry at which a head counts as solved.
    Raises:
        ValueError: a penalty that is not above 0, or values that are not finite.
    """
    l2 = np.asarray(l2, np.float64)
    if l2.ndim != 1 or not len(l2) or not (np.isfinite(l2) & (l2 > 0)).all():
        raise ValueError(f"l2 must be penalties above 0, got {l2}")
    for rows in problems:
        if not np.isfinite(rows.vectors).all():
            raise ValueError("embeddings hold values that are not finite; embed those images again or leave them out")
    parts: dict[int, tuple[Tensor, ...]] = {}
    iterations, operations = 0, 0.0
    # problems of like size share a batch, so that little of it is padding
    order = sorted(range(len(problems)), key=lambda i: len(problems[i].shares))
    for chunk in _chunks(order, [8 * one.vectors.size for one in problems]):
        *found, steps = _fit_batch([problems[i] for i in chunk], l2, start, device, tolerance)
        iterations += sum(steps)
        for i, n_steps in zip(chunk, steps, strict=True):
            m, d = problems[i].vectors.shape
            operations += 2.0 * n_steps * m * (min(m, d) + 1) ** 2
        for position, i in enumerate(chunk):
            parts[i] = tuple(one[position] for one in found)
    weights, bias, objective, gradient = (
        np.stack([parts[i][what].cpu().numpy() for i in range(len(problems))]) if problems else np.zeros((0, len(l2))) for what in range(4)
    )
    return Solution(weights, bias, objective, gradient, iterations, operations)


def _chunks(order: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    chunks: list[list[int]] = []
    for i in order:
        # sizes rise along the order, so the newcomer is the one that all are padded to
        if chunks and (len(chunks[-1]) + 1) * sizes[i] <= _CHUNK_BYTES:
            chunks[-1].append(i)
        else:
            chunks.append([i])
    return chunks


def _fit_batch(
    problems: Sequence[Rows], l2: np.ndarray, start: np.ndarray | None, device: str, tolerance: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[int]]:
    """(p, h, d) weights, (p, h) biases, objectives and gradients, and the number of steps of each problem."""
    m = max(len(one.shares) for one in problems)

    def stacked(name: str) -> Tensor:
        values = [torch.from_numpy(np.asarray(getattr(one, name))) for one in problems]
        padded = torch.zeros((len(problems), m, *values[0].shape[1:]), dtype=torch.float64, device=device)
        for place, value in zip(padded, values, strict=True):
            place[: len(value)] = value
        return padded

    full, bias, margins, shares = (stacked(name) for name in ("vectors", "bias", "margins", "shares"))
    if start is not None:
        from_here = torch.from_numpy(np.asarray(start, np.float64)).to(device)
        margins = margins - full @ from_here
    d = full.shape[2]
    # fewer rows than dimensions: solve in their span; padding adds directions in which nothing lies
    basis = torch.linalg.qr(full.mT)[0] if m < d else None
    z = torch.cat([full if basis is None else full @ basis, bias[..., None]], dim=2)  # (p, m, r + 1)
    del full
    theta = torch.zeros(len(problems), z.shape[2], dtype=z.dtype, device=device)
    ridge = torch.full((z.shape[2],), _BIAS_RIDGE, dtype=z.dtype, device=device)
    found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    iterations = torch.zeros(len(problems), dtype=torch.long)
    for j in np.argsort(-l2, kind="stable"):
        ridge[:-1] = l2[j]
        theta, value, gradient, steps = _newton(z, shares, margins, ridge, theta, tolerance)
        found[int(j)] = theta, value, gradient
        iterations += steps
    thetas, objective, gradient = (torch.stack([found[j][what] for j in range(len(l2))], dim=1) for what in range(3))
    weights = thetas[..., :-1] if basis is None else thetas[..., :-1] @ basis.mT
    if start is not None:
        weights = weights + from_here
    return weights, thetas[..., -1], objective, gradient, iterations.tolist()


def _newton(
    z: Tensor, shares: Tensor, margins: Tensor, ridge: Tensor, start: Tensor, tolerance: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(p, r + 1) solutions, (p,) objectives, largest gradient entries and numbers of steps."""
    theta = start.clone()
    steps = torch.zeros(len(z), dtype=torch.long)
    value = _objective(z, shares, margins, ridge, theta)
    largest = torch.zeros_like(value)
    open_rows = torch.arange(len(z), device=z.device)
    for iteration in range(_MAX_ITERATIONS + 1):
        mine = slice(None) if len(open_rows) == len(z) else open_rows
        z_open, share, here = z[mine], shares[mine], theta[mine]
        pull = torch.sigmoid(margins[mine] - _product(z_open, here))  # (p, m)
        gradient = ridge * here - _product(z_open.mT, share * pull)
        largest[open_rows] = gradient.abs().amax(dim=1)
        left = (largest[open_rows] > tolerance).nonzero()[:, 0]
        if not len(left) or iteration == _MAX_ITERATIONS:
            return theta, value, largest, steps
        if len(left) < len(open_rows):
            open_rows = open_rows[left]
            z_open, share, here, pull, gradient = z_open[left], share[left], here[left], pull[left], gradient[left]
        steps[open_rows.cpu()] += 1
        hessian = _hessian(z_open, share * pull * (1 - pull)) + torch.diag(ridge)
        step = torch.linalg.solve(hessian, gradient)
        theta[open_rows], value[open_rows] = _line_search(
            z_open, share, margins[open_rows], ridge, here, value[open_rows], step, (step * gradient).sum(dim=1)
        )
    raise AssertionError("unreachable")


def _line_search(
    z: Tensor, shares: Tensor, margins: Tensor, ridge: Tensor, here: Tensor, before: Tensor, step: Tensor, slope: Tensor
) -> tuple[Tensor, Tensor]:
    """Where halved steps first descend enough, and the objective there."""
    length = torch.ones_like(slope)
    for _ in range(_MAX_HALVINGS):
        trial = here - length[:, None] * step
        after = _objective(z, shares, margins, ridge, trial)
        # rounding forbids a descent below the last bits of the value
        too_long = after > before - _ARMIJO * length * slope + 1e-14 * (1 + before.abs())
        if not too_long.any():
            break
        length = torch.where(too_long, length / 2, length)
    return trial, after


def _hessian(z: Tensor, weights: Tensor) -> Tensor:
    """(p, r, r) sums of weights times outer products of rows; a part of the rows at a time bounds the memory."""
    step = max(1, _CHUNK_BYTES // (8 * z.shape[0] * z.shape[2]))
    total = None
    for start in range(0, z.shape[1], step):
        part = z[:, start : start + step]
        term = (part * weights[:, start : start + step, None]).mT @ part
        total = term if total is None else total.add_(term)
    assert total is not None
    return total


def _objective(z: Tensor, shares: Tensor, margins: Tensor, ridge: Tensor, theta: Tensor) -> Tensor:
    """(p,) values of J."""
    return (functional.softplus(margins - _product(z, theta)) * shares).sum(dim=1) + 0.5 * (ridge * theta.square()).sum(dim=1)


def _product(matrices: Tensor, vectors: Tensor) -> Tensor:
    """(p, a, b) times (p, b) -> (p, a)."""
    return (matrices @ vectors[..., None])[..., 0]
