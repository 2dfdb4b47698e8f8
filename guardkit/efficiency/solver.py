"""Fits many linear heads at once, each to the optimum of its convex objective. Knows arrays, not arms or images.

The objective is that of one column of a linear head, the decision or a category: for weights w, a bias b and rows z,

    J(w, b) = sum_i  a_i f_i(m_i - s_i (z_i . w + e_i b))  +  l2 / 2 |w - w0|^2

A row is a gap of a term of `guardkit.fitting.terms` with its share a_i: an image, with e = 1, or the difference of two, with e = 0;
s is +1 where the gap shall be high and -1 where it shall be low. f is the softplus, with the term's margin m (cross-entropy is
one with m = 0), or another convex function. w0 is where the head starts (zero, or the policy's texts). With l2 > 0 and a row of each
sign among the images the optimum exists and is unique; without one the bias grows until its own small penalty holds it.

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

Curve = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Rows:
    """What heads are fitted to.

    Attributes:
        vectors: (m, d), already multiplied by the sign s.
        bias: (m,), s for images and 0 for differences.
        margins: (m,).
        shares: (m,) the weights a_i, at least 0.
        curves: f of the rows that have another one than the softplus: what they lack -> losses, number by number.
    """

    vectors: np.ndarray
    bias: np.ndarray
    margins: np.ndarray
    shares: np.ndarray
    curves: Sequence[tuple[slice, Curve]] = ()


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


def joined(parts: Sequence[Rows], width: int) -> Rows:
    """Rows of several terms beneath each other, d = width."""
    curves, n = [], 0
    for part in parts:
        curves += [(slice(n + where.start, n + where.stop), curve) for where, curve in part.curves]
        n += len(part.shares)
    bias, margins, shares = (
        np.concatenate([np.zeros(0), *(getattr(part, name) for part in parts)]) for name in ("bias", "margins", "shares")
    )
    return Rows(np.concatenate([np.zeros((0, width)), *(part.vectors for part in parts)]), bias, margins, shares, curves)


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
    search = _Search(products(z), z.shape[1], _Losses(rows.curves), np.asarray(rows.shares, np.float64), margins, tolerance)
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


class _Losses:
    """The losses of rows and their derivatives, by what each row lacks."""

    def __init__(self, curves: Sequence[tuple[slice, Curve]]) -> None:
        self._curves = curves

    def at(self, lack: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(m,) losses and (m,) slopes."""
        losses, slopes = logistic(lack)
        for where, curve in self._curves:
            there = torch.from_numpy(lack[where])
            losses[where], slopes[where] = curve(there).numpy(), _derivative(curve)(there).numpy()
        return losses, slopes

    def curvatures(self, shares: np.ndarray, slopes: np.ndarray, lack: np.ndarray) -> np.ndarray:
        """(m,) shares times second derivatives, at least 0; `slopes` are those at `lack`."""
        found = shares * slopes * (1 - slopes)
        for where, curve in self._curves:
            found[where] = shares[where] * _derivative(_derivative(curve))(torch.from_numpy(lack[where])).clamp(min=0).numpy()
        return found


def _derivative(curve: Curve) -> Curve:
    """Number by number, which the gradient of the sum is."""
    return torch.func.grad(lambda lack: curve(lack).sum())


class _Search:
    """Minimises one problem for one penalty after the other, each from where the last one ended.

    Attributes:
        n_curvatures, n_products: so far.
    """

    def __init__(self, products: Products, width: int, losses: _Losses, shares: np.ndarray, margins: np.ndarray, tolerance: float) -> None:
        self._products, self._losses, self._shares, self._margins, self._tolerance = products, losses, shares, margins, tolerance
        self._theta, self._pull = np.zeros(width), np.zeros(len(shares))  # the head, and z @ theta
        self._curvature: np.ndarray | None = None
        self._n_since = 0  # steps since it was taken
        self.n_curvatures = self.n_products = 0

    def solve(self, l2: float) -> tuple[np.ndarray, float, float]:
        """(r,) the head, its objective and its largest gradient entry."""
        ridge = np.full(len(self._theta), l2)
        ridge[-1] = _BIAS_RIDGE
        value, slopes = self._value(ridge, self._theta, self._pull)
        gradient = self._gradient(ridge, slopes)
        memory: list[tuple[np.ndarray, np.ndarray, float]] = []
        factor = None
        for _ in range(_MAX_STEPS):
            if factor is None or self._n_since >= _RENEW:
                factor, memory = self._factor(ridge, slopes), []
            step = -_two_loops(gradient, memory, factor)
            slope = float(gradient @ step)
            if -slope <= 2 * self._tolerance * value:
                break
            self._n_since += 1
            before = gradient
            self.n_products += 1
            length, value, slopes = self._line_search(ridge, value, step, self._products.times(step), slope)
            if not length:
                if self._n_since == 1:
                    break
                self._n_since = _RENEW  # an old curvature misled it
                continue
            gradient = self._gradient(ridge, slopes)
            change = gradient - before
            curvature = length * float(step @ change)
            if curvature > 0:
                memory.append((length * step, change, 1 / curvature))
        return self._theta.copy(), value, float(np.abs(gradient).max())

    def _value(self, ridge: np.ndarray, theta: np.ndarray, pull: np.ndarray) -> tuple[float, np.ndarray]:
        """J, and the (m,) slopes of the rows' losses."""
        losses, slopes = self._losses.at(self._margins - pull)
        return float(self._shares @ losses + 0.5 * (ridge * theta) @ theta), slopes

    def _gradient(self, ridge: np.ndarray, slopes: np.ndarray) -> np.ndarray:
        self.n_products += 1
        return ridge * self._theta - self._products.transposed(self._shares * slopes)

    def _factor(self, ridge: np.ndarray, slopes: np.ndarray) -> tuple[np.ndarray, bool]:
        """Of the curvature, taken anew if the last one is old, and the penalty."""
        if self._curvature is None or self._n_since >= _RENEW:
            self.n_curvatures += 1
            self._n_since = 0
            self._curvature = self._products.curvature(self._losses.curvatures(self._shares, slopes, self._margins - self._pull))
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
        """Goes along a step to where the strong Wolfe conditions hold: the length, the objective and the slopes there.

        `along` is z @ step. A length of 0: rounding leaves no descent.
        """
        low, high, length = 0.0, np.inf, 1.0
        for _ in range(_MAX_TRIALS):
            theta, pull = self._theta + length * step, self._pull + length * along
            after, slopes = self._value(ridge, theta, pull)
            slope_there = float((ridge * theta) @ step - (self._shares * slopes) @ along)
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
        return length, after, slopes


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
