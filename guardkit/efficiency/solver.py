"""Fits many linear heads at once, each to the optimum of its convex objective. Knows arrays, not arms or images.

The objective is the one of `guardkit.fitting.module` for the decision of a linear head: for weights w, a bias b and rows z,

    J(w, b) = sum_i  a_i softplus(m_i - s_i (z_i . w + e_i b))  +  l2 / 2 |w - w0|^2

A labelled image is a row with s = +1 (unsafe) or -1 (safe), margin m = 0 and e = 1; its softplus is the cross-entropy of
its label. A pair is the row z(unsafe) - z(counterfactual) with s = +1, e = 0 and the pair loss's margin. Shares a_i hold
class and pair weights; w0 is where the head starts (zero, or the policy's texts). With l2 > 0 and at least one row of
each label the optimum exists and is unique.

The method is L-BFGS (Liu and Nocedal, 1989) whose first matrix is the exact curvature, renewed every few steps. It needs
hardly more steps than Newton's method, and far fewer curvatures, which are most of the work. Those are in single precision:
they decide how fast the optimum is reached, not where it lies. Objective, gradient and steps are in double precision. For
each problem the penalties are gone through from the strongest to the weakest, each started from the solution before it.
The weights lie in the span of the rows (the representer theorem), so a head on few images is solved in few dimensions.
Problems are spread over the processor's cores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from scipy.linalg import cho_solve
from threadpoolctl import threadpool_limits

_MAX_STEPS = 500
_MAX_TRIALS = 60
_SHARED = 50_000  # numbers in a problem's rows above which it goes to a thread of its own
_RENEW = 8  # steps, of one penalty or several, after which the curvature is taken anew: about what it costs itself
_ARMIJO, _WOLFE = 1e-4, 0.5
# the bias is not penalised; this keeps its step finite where all images of one label are saturated
_BIAS_RIDGE = 1e-10
# share of the mean curvature that single precision may get wrong, added to every direction
_ROUNDING = 3e-7


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
        curvature_operations: multiplications and additions of all curvatures that were worked out, each product of two
            rows counted once.
        product_bytes: read by the products of rows and vectors.
    """

    weights: np.ndarray
    bias: np.ndarray
    objective: np.ndarray
    gradient: np.ndarray
    curvature_operations: float
    product_bytes: float


class Products(Protocol):
    """What is asked of the rows of one problem, an (m, r) matrix z; vectors come and go as float64 NumPy arrays."""

    def times(self, vector: np.ndarray) -> np.ndarray:
        """(m,) z @ vector."""
        ...

    def transposed(self, vector: np.ndarray) -> np.ndarray:
        """(r,) z.T @ vector."""
        ...

    def curvature(self, weights: np.ndarray) -> np.ndarray:
        """(r, r) z.T @ diag(weights) @ z in single precision."""
        ...


class NumpyProducts:
    """On the processor."""

    def __init__(self, z: np.ndarray) -> None:
        self._z, self._single = z, z.astype(np.float32)
        self._scaled = np.empty_like(self._single)

    def times(self, vector: np.ndarray) -> np.ndarray:
        """(m,) z @ vector."""
        return self._z @ vector

    def transposed(self, vector: np.ndarray) -> np.ndarray:
        """(r,) z.T @ vector."""
        return vector @ self._z

    def curvature(self, weights: np.ndarray) -> np.ndarray:
        """(r, r) z.T @ diag(weights) @ z in single precision."""
        np.multiply(self._single, np.sqrt(weights).astype(np.float32)[:, None], out=self._scaled)
        return self._scaled.T @ self._scaled  # NumPy sees that it is symmetric, and works out one half


class TorchProducts:
    """On any device of torch: worth it on a GPU, for many images or wide embeddings."""

    def __init__(self, z: np.ndarray, device: str) -> None:
        self._z = torch.from_numpy(z).to(device)
        self._single = self._z.float()

    def _there(self, vector: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(vector).to(self._z.device)

    def times(self, vector: np.ndarray) -> np.ndarray:
        """(m,) z @ vector."""
        return (self._z @ self._there(vector)).cpu().numpy()

    def transposed(self, vector: np.ndarray) -> np.ndarray:
        """(r,) z.T @ vector."""
        return (self._there(vector) @ self._z).cpu().numpy()

    def curvature(self, weights: np.ndarray) -> np.ndarray:
        """(r, r) z.T @ diag(weights) @ z in single precision."""
        scaled = self._single * self._there(weights).sqrt().float()[:, None]
        return (scaled.mT @ scaled).cpu().numpy()


def decision_rows(
    embeddings: np.ndarray,
    labels: np.ndarray,
    pairs: np.ndarray,
    *,
    counts: np.ndarray | None = None,
    prevalence: float = 0.5,
    pair_weight: float = 1.0,
    pair_margin: float = 1.0,
) -> Rows:
    """The rows of a labelled set, weighted as `guardkit.fitting.objective` weights them.

    Args:
        embeddings: (n, d), scaled as the head scales them.
        labels: (n,) 1 = unsafe, 0 = safe.
        pairs: (p, 2) int: rows of an unsafe image and of its counterfactual.
        counts: (n,) how often each image is in the set; None: once.
        prevalence: share of unsafe images to train for, in (0, 1).
        pair_weight: of the pair loss beside cross-entropy.
        pair_margin: between an unsafe image and its counterfactual, in logits.
    """
    signs = np.where(labels == 1, 1.0, -1.0)
    counts = np.ones(len(labels)) if counts is None else counts
    n_unsafe, n_safe = max(1, counts[labels == 1].sum()), max(1, counts[labels == 0].sum())
    shares = counts * np.where(labels == 1, prevalence / n_unsafe, (1 - prevalence) / n_safe)
    vectors, bias, margins = signs[:, None] * embeddings, signs, np.zeros(len(labels))
    if len(pairs) and pair_weight:
        vectors = np.concatenate([vectors, embeddings[pairs[:, 0]] - embeddings[pairs[:, 1]]])
        bias = np.concatenate([bias, np.zeros(len(pairs))])
        margins = np.concatenate([margins, np.full(len(pairs), pair_margin)])
        shares = np.concatenate([shares, np.full(len(pairs), pair_weight / len(pairs))])
    return Rows(vectors, bias, margins, shares)


def logistic(lack: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """softplus(lack), and its slope s, the sigmoid; its curvature is s (1 - s)."""
    small = np.exp(-np.abs(lack))
    return np.log1p(small) + np.maximum(lack, 0), np.where(lack > 0, 1, small) / (1 + small)


def fit_linear(
    problems: Sequence[Rows], l2: np.ndarray, *, start: np.ndarray | None = None, device: str = "cpu", tolerance: float = 1e-16
) -> Solution:
    """The optimum of every problem for every penalty.

    Args:
        problems: what each head is fitted to; all of one width.
        l2: (h,) penalties, above 0.
        start: (d,) the weights w0 that the penalty pulls towards; None: zero.
        device: where rows are multiplied; "cpu" or another device of torch.
        tolerance: a head counts as solved when the next step promises to lower its objective by less than this share of it.
    Raises:
        ValueError: a penalty that is not above 0, or values that are not finite.
    """
    l2 = np.asarray(l2, np.float64)
    if l2.ndim != 1 or not len(l2) or not (np.isfinite(l2) & (l2 > 0)).all():
        raise ValueError(f"l2 must be penalties above 0, got {l2}")
    for rows in problems:
        if not np.isfinite(rows.vectors).all():
            raise ValueError("embeddings hold values that are not finite; embed those images again or leave them out")

    def products(z: np.ndarray) -> Products:
        return NumpyProducts(z) if device == "cpu" else TorchProducts(z, device)

    def path(rows: Rows) -> Solution:
        return _path(rows, l2, start, products, tolerance)

    workers = torch.get_num_threads() if device == "cpu" else 1
    # one problem a core: the matrices are too small for a library to share one among cores
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(workers) as pool:
        # small ones take turns: threads would only wait for the interpreter
        futures = {i: pool.submit(path, rows) for i, rows in enumerate(problems) if rows.vectors.size >= _SHARED}
        solved = [futures[i].result() if i in futures else path(rows) for i, rows in enumerate(problems)]
    d = problems[0].vectors.shape[1] if problems else 0
    return Solution(
        weights=np.array([one.weights for one in solved]).reshape(len(problems), len(l2), d),
        bias=np.array([one.bias for one in solved]).reshape(len(problems), len(l2)),
        objective=np.array([one.objective for one in solved]).reshape(len(problems), len(l2)),
        gradient=np.array([one.gradient for one in solved]).reshape(len(problems), len(l2)),
        curvature_operations=sum(one.curvature_operations for one in solved),
        product_bytes=sum(one.product_bytes for one in solved),
    )


def _path(rows: Rows, l2: np.ndarray, start: np.ndarray | None, products: Callable[[np.ndarray], Products], tolerance: float) -> Solution:
    """One problem, all penalties: (h, d) weights, (h,) biases, objectives and gradients."""
    vectors = np.asarray(rows.vectors, np.float64)
    margins = np.asarray(rows.margins, np.float64)
    if start is not None:
        margins = margins - vectors @ start
    m, d = vectors.shape
    basis = np.linalg.qr(vectors.T)[0] if m < d else None  # fewer rows than dimensions: solve in their span
    z = np.concatenate([vectors if basis is None else vectors @ basis, rows.bias[:, None]], axis=1)
    search = _Search(products(z), z.shape, np.asarray(rows.shares, np.float64), margins, tolerance)
    thetas, objective, gradient = np.zeros((len(l2), z.shape[1])), np.zeros(len(l2)), np.zeros(len(l2))
    for j in np.argsort(-l2, kind="stable"):
        thetas[j], objective[j], gradient[j] = search.solve(float(l2[j]))
    weights = thetas[:, :-1] if basis is None else thetas[:, :-1] @ basis.T
    if start is not None:
        weights = weights + start
    r = z.shape[1]
    return Solution(
        weights,
        thetas[:, -1],
        objective,
        gradient,
        search.n_curvatures * float(m * r * r),
        search.n_products * z.nbytes,
    )


class _Search:
    """Minimises one problem for one penalty after the other, each from where the last one ended.

    Attributes:
        n_curvatures, n_products: so far.
    """

    def __init__(self, products: Products, shape: tuple[int, int], shares: np.ndarray, margins: np.ndarray, tolerance: float) -> None:
        self._products, self._shares, self._margins, self._tolerance = products, shares, margins, tolerance
        self._theta, self._pull = np.zeros(shape[1]), np.zeros(shape[0])  # the head, and z @ theta
        self._curvature: np.ndarray | None = None
        self._n_since = 0  # steps since it was taken
        self.n_curvatures = self.n_products = 0

    def solve(self, l2: float) -> tuple[np.ndarray, float, float]:
        """(r,) the head, its objective and its largest gradient entry."""
        ridge = np.full(len(self._theta), l2)
        ridge[-1] = _BIAS_RIDGE
        value, sigmoid = self._value(ridge, self._theta, self._pull)
        gradient = self._gradient(ridge, sigmoid)
        memory: list[tuple[np.ndarray, np.ndarray, float]] = []
        factor = None
        for _ in range(_MAX_STEPS):
            if factor is None or self._n_since >= _RENEW:
                factor, memory = self._factor(ridge, sigmoid), []
            step = -_two_loops(gradient, memory, factor)
            slope = float(gradient @ step)
            if -slope <= 2 * self._tolerance * value:
                break
            self._n_since += 1
            before = gradient
            self.n_products += 1
            length, value, sigmoid = self._line_search(ridge, value, step, self._products.times(step), slope)
            if not length:
                if self._n_since == 1:
                    break
                self._n_since = _RENEW  # an old curvature misled it
                continue
            gradient = self._gradient(ridge, sigmoid)
            change = gradient - before
            curvature = length * float(step @ change)
            if curvature > 0:
                memory.append((length * step, change, 1 / curvature))
        return self._theta.copy(), value, float(np.abs(gradient).max())

    def _value(self, ridge: np.ndarray, theta: np.ndarray, pull: np.ndarray) -> tuple[float, np.ndarray]:
        """J, and the (m,) sigmoids of m_i - pull_i, which are the slopes of the rows' losses."""
        losses, sigmoid = logistic(self._margins - pull)
        return float(self._shares @ losses + 0.5 * (ridge * theta) @ theta), sigmoid

    def _gradient(self, ridge: np.ndarray, sigmoid: np.ndarray) -> np.ndarray:
        self.n_products += 1
        return ridge * self._theta - self._products.transposed(self._shares * sigmoid)

    def _factor(self, ridge: np.ndarray, sigmoid: np.ndarray) -> tuple[np.ndarray, bool]:
        """Of the curvature, taken anew if the last one is old, and the penalty."""
        if self._curvature is None or self._n_since >= _RENEW:
            self.n_curvatures += 1
            self._n_since = 0
            self._curvature = self._products.curvature(self._shares * sigmoid * (1 - sigmoid))
        matrix = self._curvature.astype(np.float64)
        diagonal = np.einsum("ii->i", matrix)
        extra = _ROUNDING * max(float(diagonal.mean()), 0.0)
        diagonal += ridge
        while True:
            diagonal += extra
            try:
                return np.asfortranarray(np.linalg.cholesky(matrix)), True  # NumPy's, because SciPy's keeps other threads waiting
            except np.linalg.LinAlgError:
                extra = max(100 * extra, 1e-12)

    def _line_search(
        self, ridge: np.ndarray, value: float, step: np.ndarray, along: np.ndarray, slope: float
    ) -> tuple[float, float, np.ndarray]:
        """Goes along a step to where the strong Wolfe conditions hold: the length, the objective and the sigmoids there.

        `along` is z @ step. A length of 0: rounding leaves no descent.
        """
        low, high, length = 0.0, np.inf, 1.0
        for _ in range(_MAX_TRIALS):
            theta, pull = self._theta + length * step, self._pull + length * along
            after, sigmoid = self._value(ridge, theta, pull)
            slope_there = float((ridge * theta) @ step - (self._shares * sigmoid) @ along)
            # rounding forbids a descent below the last bits of the value
            too_far = after > value + _ARMIJO * length * slope + 1e-15 * abs(value) or slope_there > -_WOLFE * slope
            if not too_far and slope_there >= _WOLFE * slope:
                break
            if too_far:
                high = length
            else:
                low = length
            length = 2 * length if np.isinf(high) else (low + high) / 2
        else:
            return 0.0, value, self._value(ridge, self._theta, self._pull)[1]
        self._theta, self._pull = theta, pull
        return length, after, sigmoid


def _two_loops(gradient: np.ndarray, memory: Sequence[tuple[np.ndarray, np.ndarray, float]], factor: tuple[np.ndarray, bool]) -> np.ndarray:
    """The gradient times the inverse curvature, as the factor and the steps since then know it."""
    direction = gradient
    weights = []
    for step, change, share in reversed(memory):
        weights.append(share * float(step @ direction))
        direction = direction - weights[-1] * change
    direction = cho_solve(factor, direction, check_finite=False)
    for (step, change, share), weight in zip(memory, reversed(weights), strict=True):
        direction = direction + (weight - share * float(change @ direction)) * step
    return direction
