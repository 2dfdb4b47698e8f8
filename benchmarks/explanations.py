"""Are heat maps faithful? On drawn scenes, where the box of what makes an image unsafe is known, for docs/explanations.md.

    OMP_NUM_THREADS=1 python benchmarks/explanations.py [n=120] [seed=0] [photos=VAL.parquet]

Trains a small guard on scenes (scenes_clip, pairs), and explains n unsafe test scenes that it flags, half of each rendering, by every
method that its encoder can do, and by a random map: 8 x 8 random numbers, as smooth as the others. With `photos`, a Parquet file of
photographs with a box around the object (as for source=photos), n more of photos_clip, which decides by the policy's texts: of classes
that the policy forbids, and of whose category it thinks first; the score of that category is explained. Prints, as means with 95 %
intervals over images:

- the share of a map's heat that lies in the box, beside the box's share of the image, and the first divided by the second: 1 is chance;
- how often the hottest place lies in the box;
- deletion: the area under the score, from the untouched image to one that is blurred altogether, as the hottest places are blurred
  first. Lower is better. Insertion: the same the other way round, from the blurred image. Higher is better. (Petsiuk et al., 2018,
  "RISE", section 4.3.) Then by how much both are better than those of the random map on the same image;
- processor seconds of an explanation, and how many times those of `predict` on the same image.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import TypeAlias

import cv2
import numpy as np

from guardkit import (
    GuardClassifier,
    InputError,
    OpenClipEncoder,
    ParquetSource,
    Policy,
    PromptHead,
    ScenesEditor,
    ScenesSource,
    train_guard,
)
from guardkit.scenes.content import SceneContent
from guardkit.scenes.world import RENDERINGS, ScenePool, find_region
from guardkit.schema import Region

METHODS = ("grad_eclip", "activation", "attention_pooling", "occlusion")
STEPS = np.linspace(0, 1, 9)  # of the pixels that are blurred, or not any more
BLUR = 1 / 6  # of the longer side, standard deviation: what is there cannot be made out any more
RANDOM = "random map"
Case: TypeAlias = tuple[np.ndarray, Region, str | None] | None
"""An image, the box of what makes it unsafe, and whose score is explained (None: the decision's); or one to be passed over."""


@dataclass(frozen=True)
class Measured:
    """One map of one image."""

    in_box: float
    box: float
    hit: float
    deletion: float
    insertion: float
    seconds: float


def trained(seed: int) -> GuardClassifier:
    policy = Policy.load("guardkit:scenes")
    source = ScenesSource(policy, n_train=256, n_test=45, seed=seed)
    encoder = OpenClipEncoder(None, "guardkit:scenes_clip", device="cpu")
    return train_guard(source, policy, encoder=encoder, editor=ScenesEditor(), arm="pairs_plus", seed=seed).guard


def from_texts() -> GuardClassifier:
    policy, encoder = Policy.load("guardkit:photos"), OpenClipEncoder(None, "guardkit:photos_clip", device="cpu")
    return GuardClassifier(PromptHead.build(encoder, policy), encoder, policy)


def scenes(guard: GuardClassifier, seed: int) -> Iterator[Case]:
    """Unsafe test scenes; None where the guard does not flag one."""
    pools = [ScenePool("test", rendering=name, seed=seed) for name in RENDERINGS]
    for i in count():
        scene = pools[i % 2].scene(1, i // 2)
        image = SceneContent(scene).load()
        yield (image, find_region(scene), None) if guard.predict(image)[0].flagged else None


def photographs(guard: GuardClassifier, file: str, seed: int) -> Iterator[Case]:
    """Unsafe photographs; None where the guard thinks of another category first."""
    records = ParquetSource(guard.policy, file, class_column="name", check_images=False).load().train
    unsafe = [record for record in records if record.label and record.region and record.content]
    for i in np.random.default_rng(seed).permutation(len(unsafe)):
        record = unsafe[i]
        image = record.content.load()
        is_first = guard.predict(image)[0].top_category == record.category
        yield (image, record.region, record.category) if is_first else None


def box(region: Region, height: int, width: int) -> np.ndarray:
    x_min, y_min, x_max, y_max = region
    inside = np.zeros((height, width), bool)
    inside[round(y_min * height) : round(y_max * height), round(x_min * width) : round(x_max * width)] = True
    return inside


def curves(
    guard: GuardClassifier, image: np.ndarray, category: str | None, heat: np.ndarray, rng: np.random.Generator
) -> tuple[float, float]:
    """Areas under the deletion and the insertion curve."""
    blurred = cv2.GaussianBlur(image, (0, 0), BLUR * max(image.shape))
    rank = np.empty(heat.size, int)  # 0: the hottest; ties in a random order
    rank[np.lexsort((rng.random(heat.size), -heat.ravel()))] = np.arange(heat.size)
    rank = rank.reshape(*heat.shape, 1)
    hidden = [np.where(rank < share * heat.size, blurred, image) for share in STEPS]
    shown = [np.where(rank < share * heat.size, image, blurred) for share in STEPS]
    column = 0 if category is None else 1 + guard.policy.category_names.index(category)
    scores = guard.probabilities(guard.encoder.encode_images(hidden + shown))[:, column].reshape(2, -1)
    deletion, insertion = np.trapezoid(scores, STEPS, axis=1)
    return float(deletion), float(insertion)


def mean(values: list[float], digits: int = 2) -> str:
    redrawn = np.random.default_rng(0).choice(np.asarray(values, float), (2000, len(values))).mean(axis=1)
    low, high = np.quantile(redrawn, [0.025, 0.975])
    return f"{np.mean(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def report(guard: GuardClassifier, cases: Iterator[Case], n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    found: dict[str, list[Measured]] = {}
    alone: list[float] = []
    able = [RANDOM, *METHODS]
    passed_over = 0
    for case in cases:
        if case is None:
            passed_over += 1
            continue
        image, region, category = case
        inside = box(region, *image.shape[:2])
        start = time.process_time()
        guard.predict(image)
        alone.append(time.process_time() - start)
        for method in list(able):
            start = time.process_time()
            try:
                if method == RANDOM:
                    heat = cv2.resize(rng.random((8, 8)), image.shape[1::-1])
                else:
                    heat = guard.explain(image, category, method=method).heat
            except InputError:
                able.remove(method)  # this encoder cannot do it
                continue
            seconds = time.process_time() - start
            deletion, insertion = curves(guard, image, category, heat, rng)
            hit = bool(inside[np.unravel_index(heat.argmax(), heat.shape)])
            found.setdefault(method, []).append(
                Measured(heat[inside].sum() / max(heat.sum(), 1e-9), inside.mean(), hit, deletion, insertion, seconds)
            )
        if len(alone) == n:
            break
    print(f"\n{guard.encoder.name}, {len(alone)} images, {passed_over} passed over; seed {seed}\n")
    print("| method | heat in the box | box | ratio | hottest place in the box | deletion | insertion |\n|---|---|---|---|---|---|---|")
    for method, rows in found.items():
        cells = [mean([one.in_box for one in rows]), f"{np.mean([one.box for one in rows]):.2f}"]
        cells += [mean([one.in_box / one.box for one in rows]), mean([one.hit for one in rows])]
        cells += [mean([one.deletion for one in rows], 3), mean([one.insertion for one in rows], 3)]
        print(f"| {method} | {' | '.join(cells)} |")
    print("\n| better than the random map by | deletion | insertion | seconds | times predict |\n|---|---|---|---|---|")
    usual = float(np.median(alone))
    for method, rows in found.items():
        if method != RANDOM:
            pairs = list(zip(rows, found[RANDOM], strict=True))
            seconds = float(np.median([one.seconds for one in rows]))
            gains = mean([b.deletion - a.deletion for a, b in pairs], 3), mean([a.insertion - b.insertion for a, b in pairs], 3)
            print(f"| {method} | {' | '.join(gains)} | {seconds:.3f} | {seconds / usual:.0f} |")
    print(f"\npredict: {usual:.4f} s; so far: {time.process_time():.0f} s of the processor", flush=True)


def main(n: str = "120", seed: str = "0", photos: str | None = None) -> None:
    guard = trained(int(seed))
    report(guard, scenes(guard, int(seed)), int(n), int(seed))
    if photos is not None:
        guard = from_texts()
        report(guard, photographs(guard, photos, int(seed)), int(n), int(seed))


if __name__ == "__main__":
    main(**dict(argument.split("=", 1) for argument in sys.argv[1:]))
