"""The correction loop once round: a guard with a planted weakness, 50 corrections, a new guard, and what it wins and loses.

    python benchmarks/correction_loop.py [corrections=50] [seeds=5] [head=auto]

The weakness: the guard is trained on drawn scenes among whose safe ones none shows an allowed look-alike, so that it takes these for unsafe. It decides over 800 uploads, of which
one in twenty is unsafe and half of the others are look-alikes; the first images of the review queue get the verdict that is true. They go back into the training beside the images of before, and `compare`
measures both guards on fresh scenes: at the thresholds that both have, for each label and for look-alikes by themselves.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from guardkit import CorrectedSource, OpenClipEncoder, Policy, ScenesSource, collect_corrections, compare, moderate, train_guard
from guardkit.images import encode_png
from guardkit.reports.moderation import queue_order
from guardkit.scenes.content import SceneContent
from guardkit.scenes.world import ScenePool

N_UPLOADS = 800


def main(arguments: list[str]) -> None:
    given = dict(argument.split("=", 1) for argument in arguments)
    n_corrections, n_seeds = int(given.get("corrections", 50)), int(given.get("seeds", 5))
    head = given.get("head", "auto")
    policy, encoder = Policy.load("guardkit:scenes"), OpenClipEncoder(None, "guardkit:scenes_clip")
    place = Path(tempfile.mkdtemp())
    truth = uploads(place / "uploads")
    rows: dict[str, list[float]] = {}
    for seed in range(n_seeds):
        weak = ScenesSource(policy, look_alike_rate=0.0)
        settings = {"encoder": encoder, "head": head, "n_unsafe": 64, "seed": seed, "cache_dir": place / "cache"}
        old = train_guard(weak, policy, **settings).guard
        decided = moderate(old, place / "uploads", output_dir=place / f"decided_{seed}").folder
        queue = queue_order(pq.read_table(decided / "decisions.parquet").to_pylist())[:n_corrections]
        with open(place / f"reviews_{seed}.jsonl", "w") as file:
            for row in queue:
                label, category = truth[row["id"]]
                said = {"verdict": "overturn"} if not label else {"verdict": "wrong_category", "category": category}
                file.write(json.dumps({"id": row["id"], "reviewer": "truth", **said}) + "\n")
        counts = collect_corrections(
            decided, place / f"reviews_{seed}.jsonl", place / "uploads", policy, output=place / f"corrections_{seed}.parquet"
        )
        new = train_guard(CorrectedSource(weak, place / f"corrections_{seed}.parquet", policy), policy, **settings).guard
        fresh = compare(old, new, ScenesSource(policy, n_train=600, n_test=1, seed=41), cache_dir=place / "cache").figures
        for row in fresh["figures"]:
            if row["part"] == "all":
                rows.setdefault(f"{row['metric']}, {row['at']}", []).append([row["old"], row["new"]])
        alike = look_alikes(encoder)
        rows.setdefault("false-positive rate of look-alikes", []).append(
            [(guard.score_embeddings(alike) >= guard.threshold).mean() for guard in (old, new)]
        )
        print(f"seed {seed}: {counts}", flush=True)
    print(
        f"\n| {n_seeds} seeds, {n_corrections} corrections | old | new | difference | lowest and highest of the seeds |\n|---|---|---|---|---|"
    )
    for name, values in rows.items():
        both = np.array(values, float)
        gap = both[:, 1] - both[:, 0]
        print(f"| {name} | {both[:, 0].mean():.3f} | {both[:, 1].mean():.3f} | {gap.mean():+.3f} | {gap.min():+.3f} to {gap.max():+.3f} |")


def uploads(folder: Path) -> dict[str, tuple[int, str | None]]:
    """Label and category by file name."""
    folder.mkdir(parents=True)
    truth = {}
    pool = ScenePool("train", seed=31, look_alike_rate=0.5)
    for i in range(N_UPLOADS):
        label = int(i % 20 == 0)
        scene = pool.scene(label, i)
        name = f"{i:04d}.png"
        (folder / name).write_bytes(encode_png(SceneContent(scene).load()))
        truth[name] = (label, scene.category)
    return truth


def look_alikes(encoder: OpenClipEncoder) -> np.ndarray:
    pool = ScenePool("train", seed=51, look_alike_rate=1.0)
    return encoder.encode_images([SceneContent(pool.scene(0, i)).load() for i in range(300)])


if __name__ == "__main__":
    main(sys.argv[1:])
