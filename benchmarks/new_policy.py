"""A new policy on stored embeddings: how long from its file to a calibrated guard on disk, and what that guard is worth.

    python benchmarks/new_policy.py [--folder DIR] [--n-unsafe 64] [--turns 3]

Not counted: drawing scenes and embedding them once into a folder (`guardkit.embed`), as anybody has it who has served another policy before. Counted, in
a process of its own: starting Python and importing, reading the policy, reading embeddings and labels, training a head on 64 unsafe and 64 safe images, setting
its threshold with a promise (at most 5 % of safe images flagged, with 90 % confidence) on images that it was not trained on, and writing the guard. A third of
the images is held back and says what the guard is worth. Stages are of the turn with the smallest total; nothing else should run meanwhile.
"""

from __future__ import annotations

import time

STARTED = time.perf_counter()

import argparse  # noqa: E402
import json  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from dataclasses import dataclass, replace  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

KNOWN, NEW = "scenes", ("scenes_family", "scenes_arts", "scenes_news")
HEADS = ("linear", "anchored")
MAX_FPR = 0.05


@dataclass
class Part:
    """A source of given images."""

    loaded: Any
    name: str = "stored embeddings"

    @property
    def asked(self) -> dict[str, Any]:
        return {"source": self.name}

    def load(self) -> Any:
        return self.loaded


def one(folder: Path, policy_file: str, head: str, n_unsafe: int, out: Path) -> dict[str, Any]:
    """Seconds by stage, and figures, of one policy."""
    stages, last = {}, STARTED

    def done(stage: str) -> None:
        nonlocal last
        stages[stage], last = time.perf_counter() - last, time.perf_counter()

    from guardkit import EmbeddingsSource, OpenClipEncoder, Policy, Retrained, calibrate
    from guardkit.data.by_policy import by_category
    from guardkit.embeddings import EmbeddingStore
    from guardkit.fitting.retraining import retrain

    done("start, imports")
    policy, known = Policy.load(policy_file), Policy.load(f"guardkit:{KNOWN}")
    encoder = OpenClipEncoder(None, "guardkit:scenes_clip", batch_size=64)
    _ = encoder.fingerprint
    done("policy, encoder")
    images = by_category(EmbeddingsSource(Policy.joined([known, policy]), str(folder)), [known, policy])
    mine = images.under(policy.name, 1 / 3, 0).load()
    done("embeddings, labels")
    made = retrain(Retrained(head, encoder, head, n_unsafe=n_unsafe), Part(mine), policy, EmbeddingStore(encoder, None))
    done("training")
    guard = calibrate(made.guard, Part(replace(mine, test=None)), max_fpr=MAX_FPR, by_category=False).guard
    done("threshold")
    guard.save_pretrained(out / "guard")
    done("writing")
    total = time.perf_counter() - STARTED
    import numpy as np

    scores = guard.score_embeddings(np.stack([record.embedding for record in mine.test]))
    unsafe = np.array([record.label == 1 for record in mine.test])
    flagged = scores >= guard.threshold
    hits, alarms = int((flagged & unsafe).sum()), int((flagged & ~unsafe).sum())
    return {
        "stages": stages,
        "total": total,
        "rows": len(mine.train) + len(mine.test),
        "labels": made.n_labels,
        "f1": 2 * hits / (hits + alarms + int(unsafe.sum())),
        "recall": hits / int(unsafe.sum()),
        "fpr": alarms / int((~unsafe).sum()),
        "n_test": len(mine.test),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="an embedding folder that an earlier run made; made here if it is not there")
    parser.add_argument("--n-unsafe", type=int, default=64)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--one", nargs=3, metavar=("POLICY_FILE", "HEAD", "OUT"), help="one policy, in this process; prints JSON")
    asked = parser.parse_args()
    if asked.one:
        policy_file, head, out = asked.one
        print(json.dumps(one(asked.folder, policy_file, head, asked.n_unsafe, Path(out))))
        return
    from guardkit import OpenClipEncoder, Policy, ScenesSource, embed

    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.folder or Path(temporary) / "embeddings"
        if not folder.is_dir():
            embed(
                ScenesSource(Policy.load(f"guardkit:{KNOWN}")),
                encoder=OpenClipEncoder(None, "guardkit:scenes_clip", batch_size=64),
                output_dir=folder,
            )
        print("| policy | head | seconds, all | " + "of these: ", end="")
        for number, (name, head) in enumerate((name, head) for head in HEADS for name in NEW):
            command = [
                sys.executable,
                __file__,
                "--folder",
                str(folder),
                "--n-unsafe",
                str(asked.n_unsafe),
                "--one",
                f"guardkit:{name}",
                head,
                temporary,
            ]
            found = []
            for _ in range(asked.turns):
                before = time.perf_counter()
                said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                found.append(json.loads(said.splitlines()[-1]) | {"wall": time.perf_counter() - before})
            best = min(found, key=lambda one: one["total"])
            if not number:
                print(" | ".join(best["stages"]) + f" | F1, recall, FPR on {best['n_test']} of {best['rows']} images |")
                print("|---" * (4 + len(best["stages"])) + "|")
            stages = " | ".join(f"{seconds:.2f}" for seconds in best["stages"].values())
            print(
                f"| {name} | {head} | **{best['total']:.1f}** | {stages} | {best['f1']:.3f}, {best['recall']:.3f}, {best['fpr']:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
