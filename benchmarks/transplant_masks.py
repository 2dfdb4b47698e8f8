"""Do better masks make better transplants? The shipped soft ellipse, GrabCut masks and seamless cloning, on photographs.

    python benchmarks/transplant_masks.py data=DIR output_dir=DIR [cache_dir=DIR] [policies=6] [sizes=8,32] [seeds=2] [heads=anchored,linear_whitened]

DIR as for `photographs.py`. Policies to tune on; differences in AUROC on natural photographs to `unpaired` with the same labels and one safe
photograph for each unsafe one, 95 % intervals over policies.
"""

from __future__ import annotations

import sys
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cv2
import numpy as np
import pandas as pd

from benchmarks.class_policies import policies as of_split
from benchmarks.photographs import FIXED, STRENGTHS, AsTheyOccur, Settings, Trial
from benchmarks.photographs_report import interval
from guardkit.artifacts import fingerprint
from guardkit.data import transplants
from guardkit.data.arms import arm_named
from guardkit.data.transplants import TransplantContent, transplant
from guardkit.data.unlabelled import Unlabelled
from guardkit.editors.blending import box, cloned, cut_out, in_colours_of
from guardkit.efficiency.cells import Cell, Stock
from guardkit.efficiency.engine import BatchedEngine, FittedCell
from guardkit.efficiency.stacked import Schedule
from guardkit.embeddings import EmbeddingStore
from guardkit.encoders.open_clip import OpenClipEncoder
from guardkit.fitting.objective import Objective
from guardkit.fitting.parts import Parts, head_factory, new_head
from guardkit.fitting.recipe import ADAMW, TRAINER
from guardkit.limits import shrink

_LEAST, _MOST = 0.1, 0.95  # share of a patch that a mask may cover; others are no object's, and the ellipse is taken


class GrabCut(TransplantContent):
    """The object's own outline, found in its box, softened by a pixel or two."""

    variant = "GrabCut"

    @cached_property
    def key(self) -> str:
        """Of the variant too."""
        return f"{self.variant}:{fingerprint(super().key)}"

    def load(self) -> np.ndarray:
        """As the shipped one, but for the mask."""
        with patch.object(transplants, "_ellipse", self._mask):
            return super().load()

    def _mask(self, height: int, width: int) -> np.ndarray:
        part = cut_out(self.donor.load(), self.region, width, height)
        found = np.zeros((height, width), np.uint8)
        edge = max(1, min(height, width) // 16)
        if min(height, width) < 4 * edge:
            return _ELLIPSE(height, width)
        cv2.setRNGSeed(0)
        inside = (edge, edge, width - 2 * edge, height - 2 * edge)
        cv2.grabCut(part[..., ::-1].copy(), found, inside, np.zeros((1, 65)), np.zeros((1, 65)), 3, cv2.GC_INIT_WITH_RECT)
        mask = ((found == cv2.GC_FGD) | (found == cv2.GC_PR_FGD)).astype(np.float32)
        if not _LEAST < mask.mean() < _MOST:
            return _ELLIPSE(height, width)
        return cv2.GaussianBlur(mask, (0, 0), max(0.6, min(height, width) / 40))


class Seamless(GrabCut):
    """The whole box, cloned into the colours of its surroundings."""

    variant = "seamless"

    def load(self) -> np.ndarray:
        """Another blending in the same place."""
        host = shrink(self.host.load())
        place = box(transplants._place(self.shape[1], np.random.default_rng([self.seed, 31])), host.shape)
        height, width = (part.stop - part.start for part in place)
        try:
            return cloned(host, in_colours_of(host, cut_out(self.donor.load(), self.region, width, height)), place)
        except cv2.error:  # a place of a pixel or two
            return TransplantContent.load(self)


_ELLIPSE = transplants._ellipse
VARIANTS: dict[str, type[TransplantContent]] = {"ellipse": TransplantContent, "GrabCut": GrabCut, "seamless": Seamless}


def made_by(kind: type[TransplantContent]) -> Any:
    def make(*arguments: Any, **settings: Any) -> TransplantContent:
        plain = transplant(*arguments, **settings)
        return kind(**{one.name: getattr(plain, one.name) for one in fields(plain)})

    return make


def main(
    data: str,
    output_dir: str,
    cache_dir: str = "",
    policies: str = "6",
    sizes: str = "8,32",
    seeds: str = "2",
    heads: str = "anchored,linear_whitened",
) -> None:
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    budgets, names = tuple(map(int, sizes.split(","))), tuple(heads.split(","))
    settings = Settings(
        Path(data), folder, Path(cache_dir) if cache_dir else folder / "cache", budgets, (1,), int(seeds), (), names, "marked"
    )
    encoder = OpenClipEncoder(None, "guardkit:photos_clip", batch_size=16)
    schedule = Schedule(ADAMW, TRAINER["max_epochs"], TRAINER["check_val_every_n_epoch"], 12)
    rows: list[dict[str, Any]] = []
    for number, one in enumerate(of_split("tune")[: int(policies)]):
        trial = Trial.of(one.policy, EmbeddingStore(encoder, settings.cache_dir), settings)
        plain = AsTheyOccur(trial.source, one.policy, trial.store, trial.pipelines[""])
        parts = Parts(one.policy, encoder, trial.store, trial.pipelines[""], plain, Unlabelled(plain))
        for variant, kind in {"unpaired": TransplantContent, **VARIANTS}.items():
            arm = arm_named("unpaired" if variant == "unpaired" else "pairs_transplanted")
            with patch("guardkit.data.views.transplant", made_by(kind)):
                stock = Stock(trial.data("", 1, "marked"), [arm], budgets, range(int(seeds)))
                for head in names:
                    engine = BatchedEngine(
                        Objective.of({"category_weight": 0.0, "l2": 0.0}),
                        FIXED.get(head, STRENGTHS),
                        lambda name, seed, parts=parts: new_head(head_factory(name), parts, seed),
                        schedule,
                    )
                    cells = [Cell(arm.name, head, size, seed) for size in budgets for seed in range(int(seeds))]
                    ready = [stock.data_of(cell) for cell in cells]
                    for cell, fitted in zip(cells, engine.fit(ready, trial.test), strict=True):
                        if isinstance(fitted, FittedCell):
                            figures = trial.measured(fitted.logits, fitted.counterfactual_logits)
                            where = {"policy": one.policy.name, "variant": variant, "head": head, "n": cell.n_unsafe}
                            rows.append(where | {"auroc": figures["auroc"]})
        print(f"{number + 1} {one.policy.name}", file=sys.stderr, flush=True)
    means = pd.DataFrame(rows).groupby(["head", "n", "variant", "policy"])["auroc"].mean()
    print("| head, labels | `unpaired` | " + " | ".join(VARIANTS) + " |\n|" + "---|" * (2 + len(VARIANTS)))
    for head in names:
        for size in budgets:
            base = means.loc[head, size, "unpaired"]
            cells_of = [interval((means.loc[head, size, variant] - base).to_numpy()) for variant in VARIANTS]
            print(f"| `{head}`, {size} | {interval(base.to_numpy())} | " + " | ".join(cells_of) + " |")


if __name__ == "__main__":
    main(**dict(argument.split("=", 1) for argument in sys.argv[1:]))
