"""How often a calibrated guard breaks its promise: a guard of drawn scenes, calibrated again and again, checked on scenes that it never saw.

    python benchmarks/calibration.py [guard=DIR] [n=6000] [repeats=200]

Without guard= the one of README's first command is trained. n safe and n / 3 unsafe scenes of another seed are embedded once; half of them are to calibrate
on, half to check on. Every repeat draws its calibration images anew and runs the whole of `guardkit.calibrate` on them but the reading. A promise is broken
where the share on the other half is above (a recall: below) what was promised. Printed is in how many of the repeats, with a 95 % interval, beside what was
allowed; the check itself rests on n / 2 images, so that a promise that is just kept looks broken in some.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

from guardkit import GuardClassifier, InputError, OpenClipEncoder, Policy, Record, ScenesEditor, ScenesSource, train_guard
from guardkit.evaluation.calibration import Asked, calibrated
from guardkit.metrics.intervals import clopper_pearson
from guardkit.scenes.content import SceneContent
from guardkit.scenes.world import ScenePool

CASES = [
    # safe and unsafe images, what is asked
    (60, 60, {"max_fpr": 0.05}),
    (100, 60, {"max_fpr": 0.05}),
    (300, 60, {"max_fpr": 0.05}),
    (100, 60, {"max_fpr": 0.01}),
    (300, 60, {"max_fpr": 0.01}),
    (1000, 60, {"max_fpr": 0.01}),
    (60, 60, {"min_recall": 0.95}),
    (60, 300, {"min_recall": 0.95}),
]


def main(arguments: list[str]) -> None:
    given = dict(argument.split("=", 1) for argument in arguments)
    n, repeats = int(given.get("n", 6000)), int(given.get("repeats", 200))
    guard = GuardClassifier.from_pretrained(given["guard"]) if "guard" in given else trained()
    records, vectors = scenes(guard, n)
    scores, labels = guard.score_embeddings(vectors), np.array([record.label for record in records])
    half = np.arange(len(records)) % 2 == 0
    print(
        f"{guard.name} on {n} safe and {n // 3} unsafe scenes; {repeats} calibrations each, confidence 0.9, so that 10.0 % may break their promise\n"
    )
    print("| safe | unsafe images | promised | broken | 95 % interval | share here, mean and 90th percentile | refused |")
    print("|---|---|---|---|---|---|---|")
    for n_safe, n_unsafe, asked in CASES:
        rng = np.random.default_rng(0)
        shares, refused = [], ""
        for _ in range(repeats):
            rows = np.concatenate(
                [rng.choice(np.flatnonzero(half & (labels == label)), size, replace=False) for label, size in ((0, n_safe), (1, n_unsafe))]
            )
            try:
                made, _ = calibrated(guard, [records[row] for row in rows], vectors[rows], Asked(**asked, by_category=False), about={})
            except InputError as error:
                refused = str(error)
                break
            assert made.calibration is not None
            # the same images are flagged by the old scores, without the score of every image being mapped again
            threshold = made.calibration.decision.inverse().of_score(made.thresholds.decision.block)
            shares.append((scores[~half & (labels == (0 if "max_fpr" in asked else 1))] >= threshold).mean())
        ((kind, target),) = asked.items()
        if refused:
            print(f"| {n_safe} | {n_unsafe} | {kind} {target} | | | | {refused} |")
            continue
        values = np.array(shares)
        broken = int((values > target).sum() if kind == "max_fpr" else (values < target).sum())
        low, high = clopper_pearson(broken, repeats)
        end = np.quantile(values, 0.9 if kind == "max_fpr" else 0.1)
        print(
            f"| {n_safe} | {n_unsafe} | {kind} {target} | {broken / repeats:.1%} | {low:.1%} to {high:.1%} | {values.mean():.4f}, {end:.4f} | |",
            flush=True,
        )


def trained() -> GuardClassifier:
    policy, encoder = Policy.load("guardkit:scenes"), OpenClipEncoder(None, "guardkit:scenes_clip")
    return train_guard(
        ScenesSource(policy), policy, encoder=encoder, arm="pairs_aug", editor=ScenesEditor(), cache_dir=Path(tempfile.mkdtemp())
    ).guard


def scenes(guard: GuardClassifier, n: int) -> tuple[list[Record], np.ndarray]:
    """Natural scenes of another seed, each of a group of its own."""
    pool, records, vectors = ScenePool("train", seed=11), [], []
    for label, count in ((0, n), (1, n // 3)):
        for start in range(0, count, 256):
            block = [pool.scene(label, i) for i in range(start, min(count, start + 256))]
            vectors.append(guard.encoder.encode_images([SceneContent(scene).load() for scene in block]))
            records += [
                Record(f"{label}-{i}", label, scene.category if label else None, "scenes", f"{label}-{i}", None)
                for i, scene in enumerate(block, start)
            ]
    return records, np.concatenate(vectors)


if __name__ == "__main__":
    main(sys.argv[1:])
