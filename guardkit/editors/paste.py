"""Pasting: a safe object of another photograph in the place of the unsafe one, in its light. Works offline, on any photographs
with boxes.

What it pastes comes from safe photographs of the training pool, which it is given (`supply`): the look-alikes among them where
some are known as such. Which object is asked for it reads from the caption of the wanted result; it knows no policy.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import cv2
import numpy as np

from guardkit.artifacts import fingerprint
from guardkit.checks import check_number, check_whole
from guardkit.editors.base import NEEDS_REGION, NO_ROUND_TRIP, EditRequest, EditResult, Photograph, lacks_region
from guardkit.editors.blending import box, cloned, colour_step, cut_out, in_colours_of, resized, stretch
from guardkit.editors.inpaint import elsewhere
from guardkit.editors.registration import pasted
from guardkit.schema import ImageError, InputError

_VERSION = 1  # counts up when the same settings give other pixels
_DRAWN = 12  # objects of which the best fitting one is pasted
_SEEDS = 8  # of an image that draw different ones, if there are as many
_FAR = 60.0  # levels of 255 between a place's colours and an object's that count as much as a stretch by a factor of e
_LEAST_PX = 4  # of a place: a smaller one shows nothing
_NO_BANK = "no photograph to paste from: editor=paste needs safe training images with a box; give them boxes, or choose editor=inpaint"


class PasteEditor:
    """Pastes another photograph's object over a region. A null edit pastes the region's own content, mirrored, at the same cost in
    detail, so that being pasted says nothing of the label.

    Args:
        bank_size: photographs to paste from; None: all that there are.
        dilate: how far the pasted place reaches beyond the region, a fraction of the image's longer side, in [0, 0.5).
        max_side: places are blended at most at this size in pixels and enlarged again.
        max_area: a place that covers a larger share of the image is rejected, in (0, 1]: nothing of the scene would be left.
    Raises:
        InputError: an argument out of range.
    """

    name = "paste"

    def __init__(self, *, bank_size: int | None = None, dilate: float = 0.02, max_side: int = 768, max_area: float = 0.85) -> None:
        check_whole("editor.bank_size", bank_size, 1, optional=True)
        check_number("editor.dilate", dilate, "[0, 0.5)")
        check_whole("editor.max_side", max_side, 16)
        check_number("editor.max_area", max_area, "(0, 1]")
        self.bank_size, self.dilate, self.max_side, self.max_area = bank_size, dilate, max_side, max_area
        self._bank = _Bank([])

    @property
    def config(self) -> dict[str, Any]:
        """The settings, and a hash of the photographs to paste from."""
        return {
            "editor": self.name,
            "version": _VERSION,
            "bank": self._bank.key,
            "bank_size": self.bank_size,
            "dilate": self.dilate,
            "max_side": self.max_side,
            "max_area": self.max_area,
            "opencv": cv2.__version__,
        }

    @property
    def lent(self) -> Sequence[Photograph]:
        """What it may paste from."""
        return self._bank.photographs

    def supply(self, photographs: Sequence[Photograph]) -> None:
        """Chooses what to paste from: look-alikes, where there are some.

        Raises:
            InputError: fewer than `bank_size`.
        """
        look_alikes = [one for one in photographs if one.is_look_alike]
        chosen = look_alikes or list(photographs)
        if self.bank_size is not None:
            if len(chosen) < self.bank_size:
                what = "safe look-alikes" if look_alikes else "safe images"
                raise InputError(
                    f"editor.bank_size={self.bank_size} photographs to paste from are asked for, and training has {len(chosen)} {what} with "
                    "a box; lower it, or set it to null for all"
                )
            chosen = [chosen[i] for i in np.random.default_rng(len(chosen)).permutation(len(chosen))[: self.bank_size]]
        self._bank = _Bank(chosen)

    def edit(self, requests: Sequence[EditRequest]) -> list[EditResult]:
        """One result per request. Rejected: no region is known, one too small or too large, an image that cannot be read, or nothing
        to paste from."""
        return [self._edit_one(request) for request in requests]

    def refuses(self, request: EditRequest) -> str | None:
        """Why an image will not be edited, or None."""
        if lacks_region(request):
            return f"no region: editor=paste {NEEDS_REGION}"
        return None if self._bank.photographs else _NO_BANK

    def _edit_one(self, request: EditRequest) -> EditResult:
        if request.kind == "round_trip":
            return EditResult(None, NO_ROUND_TRIP)
        reason = self.refuses(request)
        if reason is not None:
            return EditResult(None, reason)
        try:
            image = request.content.load()
            name = int(fingerprint(request.content.key)[:12], 16)
            region = request.region or elsewhere(None, np.random.default_rng([request.seed, name]))
            assert region is not None
            place = box(region, image.shape, grow=self.dilate)
            height, width = (part.stop - part.start for part in place)
            if min(height, width) < _LEAST_PX:
                return EditResult(None, f"region of {width}x{height} pixels is too small to paste into")
            if height * width > self.max_area * image.shape[0] * image.shape[1]:
                return EditResult(None, f"region covers more than {self.max_area:.0%} of the image")
            drawn = self._bank.draw(request.target, name, request.seed)
        except ImageError as error:
            return EditResult(None, f"unreadable image: {error}")
        patches = [in_colours_of(image, cut_out(other, one.region, width, height)) for one, other in drawn]
        misfits = [
            stretch((other.shape[1], other.shape[0]), one.region, width, height)
            + float(np.abs(colour_step(image, patch, place)).mean()) / _FAR
            for (one, other), patch in zip(drawn, patches, strict=True)
        ]
        best = int(np.argmin(misfits))
        patch = patches[best]
        if request.kind == "null":
            photograph, other = drawn[best]
            # with no more detail than another object would have brought
            x_min, y_min, x_max, y_max = photograph.region
            across, down = max(1, round((x_max - x_min) * other.shape[1])), max(1, round((y_max - y_min) * other.shape[0]))
            patch = resized(resized(image[place][:, ::-1], min(across, width), min(down, height)), width, height)
        return EditResult(self._blend(image, patch, place))

    def _blend(self, image: np.ndarray, patch: np.ndarray, place: tuple[slice, slice]) -> np.ndarray:
        scale = self.max_side / max(patch.shape[:2])
        if scale >= 1:
            return cloned(image, patch, place)
        height, width = image.shape[:2]
        small = cv2.resize(image, (max(1, round(width * scale)), max(1, round(height * scale))), interpolation=cv2.INTER_AREA)
        # the same part of the image in smaller pixels, never empty
        rows, columns = (
            slice(
                min(round(part.start * scale), side - 1),
                max(min(round(part.start * scale), side - 1) + 1, min(side, round(part.stop * scale))),
            )
            for part, side in zip(place, small.shape[:2], strict=True)
        )
        small = cloned(small, resized(patch, columns.stop - columns.start, rows.stop - rows.start), (rows, columns))
        mask = np.zeros((height, width), bool)
        mask[place] = True
        return pasted(image, cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC), mask)


class _Bank:
    """Photographs to paste from."""

    def __init__(self, photographs: Sequence[Photograph]) -> None:
        self.photographs = list(photographs)

    @cached_property
    def key(self) -> str | None:
        """A hash of all of them; None without any."""
        if not self.photographs:
            return None
        return fingerprint([[_key(one), one.region, one.caption] for one in self.photographs])

    @cached_property
    def _by_caption(self) -> list[tuple[re.Pattern[str], list[int]]]:
        """The photographs of each caption, longest captions first."""
        rows: dict[str, list[int]] = {}
        for row, one in enumerate(self.photographs):
            if one.caption:
                rows.setdefault(one.caption.casefold(), []).append(row)
        return [(re.compile(rf"\b{re.escape(caption)}\b"), rows[caption]) for caption in sorted(rows, key=lambda one: (-len(one), one))]

    def draw(self, target: str, name: int, seed: int) -> list[tuple[Photograph, np.ndarray]]:
        """A few drawn at random, with their pixels: of those whose caption the target contains, else of all.

        Args:
            target: a caption.
            name: of the image that is edited, as a number.
            seed: of the edit; several in a row draw different ones.
        Raises:
            ImageError: all that were drawn cannot be read.
        """
        target = target.casefold()
        rows = next((rows for pattern, rows in self._by_caption if pattern.search(target)), range(len(self.photographs)))
        found: list[tuple[Photograph, np.ndarray]] = []
        reason = ""
        n = min(_DRAWN, max(1, len(rows) // _SEEDS))
        first = n * (seed % (len(rows) // n))
        for i in np.random.default_rng(name).permutation(len(rows))[first : first + n]:
            one = self.photographs[rows[i]]
            try:
                found.append((one, one.content.load()))
            except ImageError as error:
                reason = str(error)
        if not found:
            raise ImageError(f"no photograph to paste from can be read, the last: {reason}")
        return found


def _key(photograph: Photograph) -> str:
    try:
        return photograph.content.key
    except ImageError as error:  # it cannot be pasted either
        return f"unreadable: {error}"
