"""Heat maps of an encoder and a logit, by the method that the encoder's structure allows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from guardkit.checks import check_choice
from guardkit.encoders.base import Differentiable, Encoder
from guardkit.explaining.geometry import on_image
from guardkit.explaining.inside import Attention, Inside
from guardkit.explaining.windows import CELLS, from_drops, windows
from guardkit.schema import InputError

AUTO, OCCLUSION = "auto", "occlusion"
METHODS = ("grad_eclip", "activation", "attention_pooling", OCCLUSION)  # that of the first which an encoder can do is taken

Logit = Callable[[Tensor], Tensor]
"""(n, d) embeddings -> (n,), differentiable."""


def heat_map(encoder: Encoder, logit: Logit, image: np.ndarray, method: str = AUTO) -> tuple[np.ndarray, str]:
    """Which parts of an image raise a logit.

    Args:
        encoder: any; one with gradients, whose model runs in torch, can do more than occlusion.
        logit: of its embeddings.
        image: (h, w, 3) uint8 RGB.
        method: "auto" or one of `METHODS`.
    Returns:
        (h, w) float32 in [0, 1], and the method.
    Raises:
        InputError: an unknown method, or one that this encoder cannot do.
    """
    check_choice("method", method, (AUTO, *METHODS))
    with torch.inference_mode(False):  # what is made there takes no gradients
        prepared = encoder.preprocess(image)
        inside = Inside(encoder, logit, prepared) if isinstance(encoder, Differentiable) else None
        tries: dict[str, Callable[[], Any]] = (
            {name: partial(way, inside, encoder.batch_size) for name, way in _INSIDE.items()} if inside else {}
        )
        tries[OCCLUSION] = partial(occlusion, encoder, logit, prepared)
        for used in METHODS if method == AUTO else (method,):
            grid = tries[used]() if used in tries else None
            if grid is not None:
                rows, columns = image.shape[:2]
                heat = on_image(grid, rows, columns, encoder.preprocessing)
                heat /= max(float(heat.max()), np.finfo(np.float32).tiny)
                return heat, used
        able = [name for name in METHODS if name == OCCLUSION or (name in tries and tries[name]() is not None)]
    raise InputError(f"encoder {encoder.name} cannot do method={method}; it can do {', '.join(able)}")


def grad_eclip(inside: Inside, batch_size: int) -> np.ndarray | None:
    """Of the last attention of a class token: what each place hands over, as far as the logit wants it, times how alike it is.

    Source: Zhao et al., 2024, "Gradient-based visual explanation for transformer-based CLIP" (arXiv:2502.18816), section 3:
    ReLU(sum over channels of g * v_i * s_i), with g the gradient with respect to the attention's output at the class token, v_i a place's
    value, and s_i the cosine of the class token's query and the place's key, all heads as one, stretched to [0, 1] over the places.

    Args:
        inside: the encoder at work on the image.
        batch_size: not needed.
    Returns:
        (gh, gw) float64, at least 0; None where no class token gathers the embedding.
    """
    del batch_size
    attention = inside.attention
    if attention is None or attention.pools:
        return None
    alike = functional.cosine_similarity(attention.query.flatten()[None], attention.keys.transpose(0, 1).flatten(1), dim=1)
    stretched = (alike - alike.min()) / (alike.max() - alike.min()).clamp(min=torch.finfo(alike.dtype).tiny)
    wanted = torch.einsum("he,hne->n", attention.gradient, attention.values)
    return _as_grid((wanted * stretched).clamp(min=0), attention)


def attention_pooling(inside: Inside, batch_size: int) -> np.ndarray | None:
    """Of an attention that gathers the embedding: how the logit changes with the attention to each place.

    Source: Bousselham et al., 2024, "LeGrad" (arXiv:2404.03214), section 3: the mean over heads of the gradient of the score with respect
    to the attention to place i, where it is above 0. By the chain rule it is g * v_i, summed over a head's channels. The paper adds maps
    of all layers; here only the pooling's counts, whose places are those of the image.

    Args:
        inside: the encoder at work on the image.
        batch_size: not needed.
    Returns:
        (gh, gw) float64, at least 0; None where no attention gathers the embedding.
    """
    del batch_size
    attention = inside.attention
    if attention is None or not attention.pools:
        return None
    return _as_grid(torch.einsum("he,hne->hn", attention.gradient, attention.values).clamp(min=0).mean(dim=0), attention)


def activation(inside: Inside, batch_size: int) -> np.ndarray | None:
    """Of a convolutional tower: how far the logit falls where places of an inner map hold the map's mean instead. Without gradients.

    Squares of a quarter and of half the map's side are hidden, which costs at most 107 forwards of the part behind the map. Like
    Ablation-CAM (Desai and Ramaswamy, 2020), which leaves out channels, it measures what activations are worth by leaving them out.

    Args:
        inside: the encoder at work on the image.
        batch_size: maps behind which the model is run at once.
    Returns:
        (gh, gw) float64, at least 0; None where the model is no convolutional tower.
    """
    inner = inside.inner_map
    if inner is None:
        return None
    rows, columns = inner.grid
    masks, sizes = windows(min(rows, CELLS), min(columns, CELLS))
    every = torch.from_numpy(_enlarged(np.concatenate([np.zeros_like(masks[:1]), masks]), rows, columns))
    logits = torch.cat([inside.with_map_hidden(inner, part) for part in every.split(batch_size)]).numpy()
    return from_drops(masks, sizes, logits[0] - logits[1:])


def occlusion(encoder: Encoder, logit: Logit, prepared: Tensor) -> np.ndarray:
    """Of any encoder: how far the logit falls where squares of what it sees have the mean colour of it. 107 forwards, whatever the image.

    Source: Zeiler and Fergus, 2014, "Visualizing and understanding convolutional networks", section 4.2; here with squares of a quarter
    and of half the side.

    Args:
        encoder: any.
        logit: of its embeddings.
        prepared: (3, height, width) as its `preprocess` gives it.
    Returns:
        (8, 8) float64, at least 0.
    """
    masks, sizes = windows(CELLS, CELLS)
    mean = prepared.mean(dim=(1, 2), keepdim=True)
    every = np.concatenate([np.zeros_like(masks[:1]), masks])
    logits = []
    for start in range(0, len(every), encoder.batch_size):
        hidden = torch.from_numpy(_enlarged(every[start : start + encoder.batch_size], *prepared.shape[1:]))
        embeddings = encoder.encode_preprocessed([torch.where(one, mean, prepared) for one in hidden])
        with torch.no_grad():
            logits.append(logit(torch.from_numpy(embeddings)).double().cpu().numpy())
    values = np.concatenate(logits)
    return from_drops(masks, sizes, values[0] - values[1:])


_INSIDE = {"grad_eclip": grad_eclip, "activation": activation, "attention_pooling": attention_pooling}


def _enlarged(masks: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """(n, gh, gw) -> (n, rows, columns): each place has what its cell has."""
    in_rows, in_columns = (np.arange(n) * cells // n for n, cells in zip((rows, columns), masks.shape[1:], strict=True))
    return masks[:, in_rows][:, :, in_columns]


def _as_grid(values: Tensor, attention: Attention) -> np.ndarray:
    return cast(np.ndarray, values.detach().double().cpu().numpy().reshape(attention.grid))
