"""Looking inside an encoder while it runs, whatever library its model is from.

What a model computes is watched where it calls torch, not by the names of its parts: attention is a call of torch's attention, a map of
activations is what convolutions hand on. torch's function modes do this for the thread that asks, so that others may go on using the same
model. What cannot be recognised is not claimed: everything found is tried, and must give the embedding that the encoder gives by itself.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from guardkit.encoders.base import Differentiable

_ATTENTION, _LAYER = "scaled_dot_product_attention", "multi_head_attention_forward"
_LAYER_ARGUMENTS = inspect.signature(functional.multi_head_attention_forward)
_LEAST_SIDE = 6  # places along the shorter side of a map that tells something of where
_CLOSE = 1e-4  # of unit vectors

Grid: TypeAlias = tuple[int, int]


@dataclass(frozen=True)
class InnerMap:
    """A map of activations that everything passes through.

    Attributes:
        call: which of the model's calls of torch makes it, counted from 0.
        grid: its height and width.
    """

    call: int
    grid: Grid


@dataclass(frozen=True)
class Attention:
    """The last attention before the embedding, which depends on one of its queries alone.

    Attributes:
        query: (heads, e) that one.
        keys, values: (heads, n, e) of the image's n places, row by row.
        gradient: (heads, e) of the logit, with respect to what the attention gives for that query.
        grid: how the places lie.
        pools: it gathers the embedding from the places; otherwise it is one of several layers, and the query that of a class token.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    gradient: Tensor
    grid: Grid
    pools: bool


class Inside:
    """An encoder at work on one image.

    Args:
        encoder: with gradients.
        logit: (n, d) embeddings -> (n,), differentiable.
        prepared: (3, height, width) as the encoder's `preprocess` gives it.
    """

    def __init__(self, encoder: Differentiable, logit: Callable[[Tensor], Tensor], prepared: Tensor) -> None:
        self._encoder, self._logit = encoder, logit
        settings = encoder.preprocessing  # type: ignore[attr-defined]
        mean, std = (torch.tensor(settings[key]).view(3, 1, 1) for key in ("mean", "std"))
        self._pixels = (prepared.cpu() * std + mean)[None]

    def _run(self) -> Tensor:
        return self._encoder.encode_pixels(self._pixels, prepared=True)

    @cached_property
    def _survey(self) -> tuple[Tensor, _Survey]:
        with torch.no_grad(), _Survey(self._pixels) as survey:
            return self._run(), survey

    def _gives_the_same(self, embeddings: Tensor) -> bool:
        alone, _ = self._survey
        return embeddings.shape[1:] == alone.shape[1:] and bool(torch.allclose(embeddings, alone.expand_as(embeddings), atol=_CLOSE))

    # --- convolutional towers -----------------------------------------------------------------------------------------

    @cached_property
    def inner_map(self) -> InnerMap | None:
        """The coarsest map of a convolutional tower that still tells where; None in other models."""
        _, survey = self._survey
        maps = survey.maps()
        fine = [one for one in maps if min(one.grid) >= _LEAST_SIDE]
        found = min(reversed(fine), key=lambda one: math.prod(one.grid), default=None)
        if found is None:
            found = max(reversed(maps), key=lambda one: math.prod(one.grid), default=None)
        if found is None:
            return None
        try:
            return found if self._gives_the_same(self._with_map(found, torch.zeros(2, *found.grid, dtype=torch.bool))) else None
        except RuntimeError:  # the rest of the model knows how many images there were
            return None

    def with_map_hidden(self, inner: InnerMap, masks: Tensor) -> Tensor:
        """Logits where places of the inner map hold its mean instead of what they hold.

        Args:
            inner: `inner_map`.
            masks: (n, height, width) bool, of its size.
        Returns:
            (n,) float64 on the CPU.
        """
        with torch.no_grad():
            return self._logit(self._with_map(inner, masks)).double().cpu()

    def _with_map(self, inner: InnerMap, masks: Tensor) -> Tensor:
        def hide(found: Tensor) -> Tensor:
            return torch.where(masks[:, None].to(found.device), found.mean(dim=(2, 3), keepdim=True), found)

        with torch.no_grad(), _Replacing(inner.call, hide):
            return self._run()

    # --- attention ----------------------------------------------------------------------------------------------------

    @cached_property
    def attention(self) -> Attention | None:
        """The last attention; None where there is none, the embedding depends on more than one of its queries, or its places are unknown."""
        _, survey = self._survey
        if not survey.n_attentions or survey.grid_before_attention is None:
            return None
        with torch.enable_grad():
            with _Opened(survey.n_attentions) as opened:
                embedding = self._run()
            if opened.seen is None or not embedding.requires_grad or not self._gives_the_same(embedding.detach()):
                return None
            queries, keys, values, output = opened.seen
            # in a direction that has nothing to do with any head, which may be all zeros
            direction = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(0)).to(embedding.device)
            (any_gradient,) = torch.autograd.grad((embedding * direction).sum(), output, retain_graph=True)
            (gradient,) = torch.autograd.grad(self._logit(embedding).sum(), output)
        used = any_gradient.abs().sum(dim=(0, 1, 3)).nonzero().flatten().tolist()
        n_keys, n_places = keys.shape[2], math.prod(survey.grid_before_attention)
        n_others = n_keys - n_places  # tokens before the places, such as that of the class
        if len(keys) != 1 or len(used) != 1 or not 0 <= n_others <= n_places or n_places < 2:
            return None
        row = used[0]
        return Attention(
            query=queries[0, :, row],
            keys=keys[0, :, n_others:],
            values=values[0, :, n_others:],
            gradient=gradient[0, :, row],
            grid=survey.grid_before_attention,
            pools=survey.n_attentions == 1 or queries.shape[2] != n_keys,
        )


# --- watching calls of torch ------------------------------------------------------------------------------------------


class _Survey(TorchFunctionMode):
    """Notes which calls make tensors of which, from the image on."""

    def __init__(self, pixels: Tensor) -> None:
        super().__init__()
        self._numbers: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._numbers[pixels] = 0
        self._made: list[_Made] = []
        self._n_calls = self._n_convolutions = self.n_attentions = 0
        self._grid: Grid | None = None  # of the last convolution
        self.grid_before_attention: Grid | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        call, self._n_calls = self._n_calls, self._n_calls + 1
        outputs = list(_tensors(result))
        used = [self._numbers[one] for one in (*_tensors(args), *_tensors(kwargs)) if one in self._numbers]
        if not outputs or not used:
            return result
        if _name(func) in (_ATTENTION, _LAYER):
            self.n_attentions += 1
            self.grid_before_attention = self._grid
        if _name(func) == "conv2d":
            self._n_convolutions += 1
            self._grid = _grid(result)
        number = len(self._made) + 1
        for one in outputs:
            self._numbers[one] = number
        is_map = len(outputs) == 1 and outputs[0].ndim == 4 and len(outputs[0]) == 1 and _grid(outputs[0]) == self._grid
        # one convolution alone cuts an image into patches, and makes no convolutional tower
        self._made.append(_Made(call, min(used), self._grid if is_map and self._n_convolutions > 1 else None))
        return result

    def maps(self) -> list[InnerMap]:
        """Those that no path from the image to the embedding leads around, in order."""
        found: list[InnerMap] = []
        earliest = len(self._made)  # that anything later is made of
        for number, made in reversed(list(enumerate(self._made, start=1))):
            if earliest >= number and made.grid is not None and min(made.grid) > 1:
                found.append(InnerMap(made.call, made.grid))
            earliest = min(earliest, made.of)
        return found[::-1]


@dataclass(frozen=True)
class _Made:
    """What one call made: its place among all calls, the number of the earliest that it was made of, its grid if it is a map."""

    call: int
    of: int
    grid: Grid | None


class _Replacing(TorchFunctionMode):
    """Puts something else in the place of what one call gives."""

    def __init__(self, call: int, replace: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._left, self._replace = call, replace

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._left -= 1
        return self._replace(result) if self._left == -1 else result


class _Opened(TorchFunctionMode):
    """Keeps what the last of n attentions works on, and begins the gradients at its output.

    Attributes:
        seen: queries, keys, values and output, (b, heads, tokens, e) each; None where it did not come by, or does more than attend.
    """

    def __init__(self, n: int) -> None:
        super().__init__()
        self._left = n
        self.seen: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if _name(func) not in (_ATTENTION, _LAYER):
            return func(*args, **kwargs)
        self._left -= 1
        if self._left:
            return func(*args, **kwargs)
        if _name(func) == _LAYER:
            given = _LAYER_ARGUMENTS.bind(*args, **kwargs)
            given.apply_defaults()
            return self._layer(given.arguments) if _is_plain(given.arguments) else func(*args, **kwargs)
        return self._attend(*args, **kwargs)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, **how: Any) -> Tensor:
        result = functional.scaled_dot_product_attention(query, key, value, **how)
        if result.ndim != 4:
            return result
        result = result.detach().requires_grad_()
        self.seen = query.detach(), key.detach(), value.detach(), result
        return result

    def _layer(self, given: Mapping[str, Any]) -> tuple[Tensor, None]:
        """torch's own layer of attention, by its parts: (tokens, b, width) in and out."""
        if given["use_separate_proj_weight"]:
            weights = [given[f"{one}_proj_weight"] for one in "qkv"]
        else:
            weights = list(given["in_proj_weight"].chunk(3))
        biases = [None] * 3 if given["in_proj_bias"] is None else list(given["in_proj_bias"].chunk(3))

        def split(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            made = functional.linear(tokens, weight, bias)
            return made.unflatten(2, (given["num_heads"], -1)).permute(1, 2, 0, 3)

        parts = [split(given[name], *of) for name, *of in zip(("query", "key", "value"), weights, biases, strict=True)]
        joined = self._attend(*parts).permute(2, 0, 1, 3).flatten(2)
        return functional.linear(joined, given["out_proj_weight"], given["out_proj_bias"]), None


def _is_plain(given: Mapping[str, Any]) -> bool:
    extras = ("bias_k", "bias_v", "key_padding_mask", "attn_mask", "static_k", "static_v")
    return given["query"].ndim == 3 and not given["add_zero_attn"] and all(given[name] is None for name in extras)


def _name(func: Any) -> str:
    return str(getattr(func, "__name__", ""))


def _grid(made: Tensor) -> Grid | None:
    return (int(made.shape[2]), int(made.shape[3])) if made.ndim == 4 else None


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for one in values:
            yield from _tensors(one)
    elif isinstance(values, Mapping):
        yield from _tensors(list(values.values()))
