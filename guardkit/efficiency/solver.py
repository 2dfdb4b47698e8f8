"""Fits many linear heads at once, each to the optimum of its convex objective. Knows arrays, not arms or images.

The objective is the one of `guardkit.module` for the decision of a linear head: for weights w, a bias b and rows z,

    J(w, b) = sum_i  a_i softplus(m_i - s_i (z_i . w + e_i b))  +  l2 / 2 |w|^2

A labelled image is a row with s = +1 (unsafe) or -1 (safe), margin m = 0 and e = 1; its softplus is the cross-entropy of
its label. A pair is the row z(unsafe) - z(counterfactual) with s = +1, e = 0 and the pair loss's margin. Shares a_i hold
class and pair weights. With l2 > 0 and at least one row of each label the optimum exists and is unique.

The method is Newton's with a halved step where a full one would not descend enough (Armijo). Heads that share their rows
are solved together; the weights lie in the span of the rows (the representer theorem), so a head on few images is
solved in few dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

_MAX_ITERATIONS = 100
_MAX_HALVINGS = 30
_ARMIJO = 1e-4
# the bias is not penalised; this keeps its Newton step finite where all images of one label are saturated
_BIAS_RIDGE = 1e-10


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
    """Heads at their optimum.

    Attributes:
        weights: (h, d) float64.
        bias: (h,) float64.
        gradient: (h,) largest absolute entry of the gradient at the solution.
        iterations: Newton steps of the slowest head.
    """

    weights: np.ndarray
    bias: np.ndarray
    gradient: np.ndarray
    iterations: int


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


def fit_linear(rows: Rows, l2: np.ndarray, *, device: str = "cpu", tolerance: float = 1e-9) -> Solution:
    """The optimum for each penalty.

    Args:
        rows: shared by all heads.
        l2: (h,) penalties, above 0.
        device: where to compute.
        tolerance: largest absolute gradient entry at which a head counts as solved.
    Raises:
        ValueError: a penalty that is not above 0, or values that are not finite.
    """
    l2 = np.asarray(l2, np.float64)
    if l2.ndim != 1 or not (l2 > 0).all():
        raise ValueError(f"l2 must be penalties above 0, got {l2}")
    if not np.isfinite(rows.vectors).all():
        raise ValueError("embeddings hold values that are not finite; embed those images again or leave them out")
    full = torch.from_numpy(np.ascontiguousarray(rows.vectors, np.float64)).to(device)
    basis = _span(full)
    z = torch.cat([full @ basis, torch.from_numpy(rows.bias).to(full)[:, None]], dim=1)  # (m, r + 1)
    shares, margins = torch.from_numpy(rows.shares).to(full), torch.from_numpy(rows.margins).to(full)
    ridge = torch.from_numpy(l2).to(full)[:, None].repeat(1, z.shape[1])
    ridge[:, -1] = _BIAS_RIDGE
    theta, gradient, iterations = _newton(z, shares, margins, ridge, tolerance)
    weights = theta[:, :-1] @ basis.T
    return Solution(weights.cpu().numpy(), theta[:, -1].cpu().numpy(), gradient.cpu().numpy(), iterations)


def _span(vectors: torch.Tensor) -> torch.Tensor:
    """(d, r) orthonormal basis of the rows' span; the unit basis where there are more rows than dimensions."""
    m, d = vectors.shape
    if m >= d:
        return torch.eye(d, dtype=vectors.dtype, device=vectors.device)
    return torch.linalg.qr(vectors.T)[0]


def _newton(
    z: torch.Tensor, shares: torch.Tensor, margins: torch.Tensor, ridge: torch.Tensor, tolerance: float
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(h, r + 1) solutions, (h,) largest gradient entries, number of steps."""
    theta = torch.zeros_like(ridge)
    value = _objective(z, shares, margins, ridge, theta)
    for iteration in range(_MAX_ITERATIONS):
        pull = torch.sigmoid(margins - theta @ z.T)  # (h, m)
        gradient = ridge * theta - (shares * pull) @ z
        largest = gradient.abs().amax(dim=1)
        open_heads = (largest > tolerance).nonzero()[:, 0]
        if not len(open_heads):
            return theta, largest, iteration
        curvature = shares * pull[open_heads] * (1 - pull[open_heads])
        # one head after the other bounds the memory: (m, r) at a time, and never (h, m, r)
        hessian = torch.stack([(z * weight[:, None]).T @ z for weight in curvature]) + torch.diag_embed(ridge[open_heads])
        step = torch.linalg.solve(hessian, gradient[open_heads])
        slope = (step * gradient[open_heads]).sum(dim=1)
        length = torch.ones(len(open_heads), dtype=z.dtype, device=z.device)
        start, before = theta[open_heads], value[open_heads]
        for _ in range(_MAX_HALVINGS):
            trial = start - length[:, None] * step
            after = _objective(z, shares, margins, ridge[open_heads], trial)
            # rounding forbids a descent below the last bits of the value
            too_long = after > before - _ARMIJO * length * slope + 1e-14 * (1 + before.abs())
            if not too_long.any():
                break
            length = torch.where(too_long, length / 2, length)
        theta[open_heads], value[open_heads] = trial, after
    return theta, largest, _MAX_ITERATIONS


def _objective(z: torch.Tensor, shares: torch.Tensor, margins: torch.Tensor, ridge: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    """(h,) values of J."""
    return torch.nn.functional.softplus(margins - theta @ z.T) @ shares + 0.5 * (ridge * theta.square()).sum(dim=1)
