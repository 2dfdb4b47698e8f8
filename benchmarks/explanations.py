"""Are heat maps faithful? On drawn scenes, where the box of what makes an image unsafe is known, for docs/explanations.md.

    OMP_NUM_THREADS=1 python benchmarks/explanations.py [n=120] [seed=0]

Trains a small guard on scenes (scenes_clip, pairs), and explains n unsafe test scenes that it flags, half of each rendering, by every
method that its encoder can do, and by a random map: 8 x 8 random numbers, as smooth as the others. Prints, as means with 95 % intervals
over images:

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
from dataclasses import dataclass

import cv2
import numpy as np

from guardkit import GuardClassifier, InputError, OpenClipEncoder, Policy, ScenesEditor, ScenesSource, train_guard
from guardkit.scenes.content import SceneContent
from guardkit.scenes.world import RENDERINGS, ScenePool, find_region
from guardkit.schema import Region

SIZE = 128
METHODS = ("grad_eclip", "activation", "attention_pooling", "occlusion")
STEPS = np.linspace(0, 1, 9)  # of the pixels that are blurred, or not any more
BLUR = SIZE / 6  # standard deviation in pixels: what is drawn cannot be made out any more
RANDOM = "random map"


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


def box(region: Region) -> np.ndarray:
    x_min, y_min, x_max, y_max = (round(SIZE * side) for side in region)
    inside = np.zeros((SIZE, SIZE), bool)
    inside[y_min:y_max, x_min:x_max] = True
    return inside


def curves(guard: GuardClassifier, image: np.ndarray, heat: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """Areas under the deletion and the insertion curve."""
    blurred = cv2.GaussianBlur(image, (0, 0), BLUR)
    rank = np.empty(heat.size, int)  # 0: the hottest; ties in a random order
    rank[np.lexsort((rng.random(heat.size), -heat.ravel()))] = np.arange(heat.size)
    rank = rank.reshape(*heat.shape, 1)
    hidden = [np.where(rank < share * heat.size, blurred, image) for share in STEPS]
    shown = [np.where(rank < share * heat.size, image, blurred) for share in STEPS]
    scores = guard.score_embeddings(guard.encoder.encode_images(hidden + shown)).reshape(2, -1)
    deletion, insertion = np.trapezoid(scores, STEPS, axis=1)
    return float(deletion), float(insertion)


def mean(values: list[float], digits: int = 2) -> str:
    redrawn = np.random.default_rng(0).choice(np.asarray(values, float), (2000, len(values))).mean(axis=1)
    low, high = np.quantile(redrawn, [0.025, 0.975])
    return f"{np.mean(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def main(n: int = 120, seed: int = 0) -> None:
    began = time.perf_counter()
    guard, rng = trained(seed), np.random.default_rng(seed)
    pools = [ScenePool("test", rendering=name, seed=seed) for name in RENDERINGS]
    found: dict[str, list[Measured]] = {}
    alone: list[float] = []
    able = [RANDOM, *METHODS]
    i = 0
    while len(alone) < n:
        scene, i = pools[i % 2].scene(1, i // 2), i + 1
        image, inside = SceneContent(scene, SIZE).load(), box(find_region(scene))
        start = time.process_time()
        decision = guard.predict(image)[0]
        alone.append(time.process_time() - start)
        if not decision.flagged:
            alone.pop()
            continue
        for method in list(able):
            start = time.process_time()
            try:
                heat = cv2.resize(rng.random((8, 8)), (SIZE, SIZE)) if method == RANDOM else guard.explain(image, method=method).heat
            except InputError:
                able.remove(method)  # this encoder cannot do it
                continue
            seconds = time.process_time() - start
            deletion, insertion = curves(guard, image, heat, rng)
            hit = bool(inside[np.unravel_index(heat.argmax(), heat.shape)])
            found.setdefault(method, []).append(
                Measured(heat[inside].sum() / max(heat.sum(), 1e-9), inside.mean(), hit, deletion, insertion, seconds)
            )
    print(f"{n} unsafe test scenes, {i - n} passed over that the guard did not flag; seed {seed}\n")
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
    print(f"\npredict: {usual:.4f} s; the whole: {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main(**{name: int(value) for name, value in (argument.split("=", 1) for argument in sys.argv[1:])})
