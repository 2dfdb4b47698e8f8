"""Attacks on a decision value: FGSM, PGD, DeepFool, Gaussian noise of a fixed norm, and the Square attack.

An attack knows no guard, no encoder and no file. It is given a function from pixels (n, 3, h, w) to decision values (n,),
>= 0 for unsafe, and pushes each value to the wrong side of 0. What else the value means is the caller's choice: a
logit less the threshold's, or a difference of two probabilities. No loss comes on top: with two classes, every
loss that falls with the margin has a gradient of the same signs, and the attacks in the maximum norm use signs only.

All of them keep within `epsilon` of the given pixels and within `bounds`, and work on whole batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Value = Callable[[Tensor], Tensor]
"""(n, 3, h, w) float pixels -> (n,) decision values, >= 0 for unsafe, NaN for an abstention; differentiable, but for `square`."""

PIXEL_BOUNDS = (0.0, 1.0)
# Where the Square attack halves its squares, out of 10,000 queries (Andriushchenko et al., 2020, section 5 and its code)
_HALVE_AT = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


def is_right(values: Tensor, labels: Tensor) -> Tensor:
    """(n,) bool: decided as labelled. An abstention (NaN) is not right, whatever the label."""
    return ((values >= 0) == (labels == 1)) & ~values.isnan()


def fgsm(value: Value, pixels: Tensor, labels: Tensor, *, epsilon: float, bounds: tuple[float, float] = PIXEL_BOUNDS) -> Tensor:
    """One step of size epsilon along the signs of the gradient (Goodfellow et al., 2015, section 4).

    Args:
        value: what is attacked.
        pixels: (n, 3, h, w) float; labels: (n,) int, 1 = unsafe, 0 = safe.
        epsilon: largest change of a pixel, in units of the pixels.
        bounds: of a pixel.
    Returns:
        (n, 3, h, w) changed pixels.
    """
    _, gradient = _value_and_gradient(value, pixels, labels)
    return (pixels + epsilon * gradient.sign()).clamp_(*bounds)


def pgd(
    value: Value,
    pixels: Tensor,
    labels: Tensor,
    *,
    epsilon: float,
    steps: int,
    step_size: float,
    rng: np.random.Generator,
    restarts: int = 1,
    keep_strongest: bool = True,
    bounds: tuple[float, float] = PIXEL_BOUNDS,
) -> Tensor:
    """Many steps along the signs of the gradient, each projected back (Madry et al., 2018, section 2.1).

    Args:
        value: what is attacked.
        pixels: (n, 3, h, w) float; labels: (n,) int, 1 = unsafe, 0 = safe.
        epsilon: largest change of a pixel, in units of the pixels.
        steps: a forward and a backward pass each.
        step_size: change of a pixel by one step, in units of the pixels.
        rng: of the random starts.
        restarts: runs in all. An image that one run brought to the wrong side is left out of the next.
        keep_strongest: return for each image the furthest wrong of all that was seen, and start the first run at the
            image itself. Otherwise every run starts at random and the last step of the last run is returned.
        bounds: of a pixel.
    Returns:
        (n, 3, h, w) changed pixels.
    """
    lowest, highest = (pixels - epsilon).clamp_(*bounds), (pixels + epsilon).clamp_(*bounds)
    best, furthest = pixels.clone(), torch.full((len(pixels),), -math.inf, dtype=torch.float64, device=pixels.device)
    active = torch.arange(len(pixels), device=pixels.device)
    for run in range(restarts):
        low, high, side = lowest[active], highest[active], labels[active]
        x = pixels[active]
        if run or not keep_strongest:
            x = (x + epsilon * _noise(rng.random, x).mul_(2).sub_(1)).clamp_(*bounds)
        for _ in range(steps):
            seen, gradient = _value_and_gradient(value, x, side)
            if keep_strongest:
                _keep(best, furthest, active, x, seen, side)
            x = torch.clamp(x.add_(gradient.sign_(), alpha=step_size), low, high)
        if not keep_strongest:
            best[active] = x
            continue
        with torch.no_grad():
            seen = value(x)
        _keep(best, furthest, active, x, seen, side)
        active = active[furthest[active] <= 0]
        if not len(active):
            break
    return best


def deepfool(
    value: Value,
    pixels: Tensor,
    labels: Tensor,
    *,
    epsilon: float,
    steps: int,
    overshoot: float = 0.02,
    bounds: tuple[float, float] = PIXEL_BOUNDS,
) -> Tensor:
    """Steps to where a linear model of the value would be 0, in the maximum norm (Moosavi-Dezfooli et al., 2016).

    The smallest change that is found is cut off at epsilon, as foolbox does, whose constants these are.

    Args:
        value: what is attacked; its scale matters here, because a step is value / gradient.
        pixels: (n, 3, h, w) float; labels: (n,) int, what the images are taken for so far.
        epsilon: largest change of a pixel, in units of the pixels.
        steps: at most; an image that is on the wrong side is left as it is.
        overshoot: how much further than the boundary, as a fraction.
        bounds: of a pixel.
    Returns:
        (n, 3, h, w) changed pixels.
    """
    result, total = pixels.clone(), torch.zeros_like(pixels)
    active = torch.arange(len(pixels), device=pixels.device)
    for _ in range(steps):
        seen, gradient = _value_and_gradient(value, result[active], labels[active])
        right = is_right(seen, labels[active])
        active, seen, gradient = active[right], seen[right], gradient[right]
        if not len(active):
            break
        distance = seen.abs() / (gradient.flatten(1).abs().sum(1) + 1e-8) + 1e-4
        total[active] += distance.view(-1, 1, 1, 1) * gradient.sign()
        result[active] = (pixels[active] + (1 + overshoot) * total[active]).clamp_(*bounds)
    return (pixels + (result - pixels).clamp_(-epsilon, epsilon)).clamp_(*bounds)


def gaussian_noise_of_norm(
    pixels: Tensor, *, epsilon: float, rng: np.random.Generator, bounds: tuple[float, float] = PIXEL_BOUNDS
) -> Tensor:
    """Gaussian noise scaled to a Euclidean length of epsilon over the whole image, as foolbox's L2 noise is.

    Args:
        pixels: (n, 3, h, w) float.
        epsilon: length of the noise as one vector of 3 h w values: a pixel changes by about epsilon / sqrt(3 h w).
        rng: of the noise.
        bounds: of a pixel.
    Returns:
        (n, 3, h, w) changed pixels.
    """
    noise = _noise(rng.standard_normal, pixels)
    length = noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return (pixels + epsilon * noise / length).clamp_(*bounds)


def square(
    value: Value,
    pixels: Tensor,
    labels: Tensor,
    *,
    epsilon: float,
    queries: int,
    rng: np.random.Generator,
    share: float = 0.8,
    bounds: tuple[float, float] = PIXEL_BOUNDS,
) -> Tensor:
    """Random search over squares of +-epsilon; needs values only (Square attack, Andriushchenko et al., 2020, algorithms 1 and 2).

    Args:
        value: what is attacked; need not be differentiable, and may abstain (NaN), which ends the search for an image.
        pixels: (n, 3, h, w) float; labels: (n,) int, 1 = unsafe, 0 = safe.
        epsilon: change of every pixel, in units of the pixels.
        queries: at most, for each image; at least 1.
        rng: of the search.
        share: of the image that the first squares cover; it is halved on the published schedule, stretched to `queries`.
        bounds: of a pixel.
    Returns:
        (n, 3, h, w) changed pixels.
    """
    n, channels, height, width = pixels.shape

    def signs(*shape: int) -> Tensor:
        return torch.from_numpy(rng.integers(0, 2, shape, dtype=np.int8) * 2.0 - 1.0).to(pixels)

    with torch.no_grad():
        best = (pixels + epsilon * signs(n, channels, 1, width)).clamp_(*bounds)
        seen = value(best)
        for query in range(1, queries):
            active = is_right(seen, labels).nonzero()[:, 0]
            if not len(active):
                break
            covered = share / 2 ** sum(query * 10_000 / queries > at for at in _HALVE_AT)
            side = min(max(1, round(math.sqrt(covered * height * width))), max(1, min(height, width) - 1))
            tried = best[active]
            for row, image in enumerate(active.tolist()):
                top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
                window = (slice(None), slice(top, top + side), slice(left, left + side))
                step = epsilon * signs(channels, 1, 1)
                changed = (pixels[image][window] + step).clamp_(*bounds)
                if torch.equal(changed, tried[row][window]):  # a query on the same image would be lost
                    changed = (pixels[image][window] - step).clamp_(*bounds)
                tried[row][window] = changed
            now = value(tried)
            away = 1 - 2 * labels[active]
            better = now.isnan() | (away * now > away * seen[active])
            best[active[better]], seen[active[better]] = tried[better], now[better]
    return best


def _value_and_gradient(value: Value, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) values, and (n, 3, h, w) the direction in which each gets more wrong."""
    pixels = pixels.detach().requires_grad_()
    with torch.enable_grad():
        values = value(pixels)
        # images do not see each other, so the gradient of the sum holds each one's own
        (gradient,) = torch.autograd.grad((values * (1 - 2 * labels)).sum(), pixels)
    return values.detach(), gradient


def _keep(best: Tensor, furthest: Tensor, rows: Tensor, x: Tensor, values: Tensor, labels: Tensor) -> None:
    """Writes x into the rows of `best` where its value is further on the wrong side than any before."""
    wrong_by = values.double() * (1 - 2 * labels)
    # a value of exactly 0 flags: for an unsafe image that is right, for a safe one it is wrong
    wrong_by = torch.where((values == 0) & (labels == 0), torch.finfo(torch.float64).tiny, wrong_by)
    better = wrong_by > furthest[rows]
    best[rows[better]], furthest[rows[better]] = x[better].detach(), wrong_by[better]


def _noise(draw: Callable[..., np.ndarray], like: Tensor) -> Tensor:
    # NumPy's generator, because torch's gives other numbers on a GPU
    return torch.from_numpy(draw(tuple(like.shape), dtype=np.float32)).to(like)
