"""Which categories a calibrated guard names, and what a scope changes: a nine-category guard of drawn scenes, on scenes that it never saw.

    python benchmarks/scope.py [guard=DIR] [n=3000] [max_fpr=0.01] [min_recall=0.9]

Without guard= the one of `python -m guardkit.train experiment=unpaired data.safe_per_unsafe=4 data.n_unsafe=256` is trained. n safe and n / 3 unsafe scenes of
another seed are embedded; the guard is calibrated on half of them and decides over the other half. For each category: the share of its images that are flagged
without a scope and of which it is the first that is named; and, with a scope of it alone, the share of its own images, of other categories' and of safe ones that
are flagged. 95 % intervals are Clopper and Pearson's.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
from calibration import scenes

from guardkit import GuardClassifier, OpenClipEncoder, Policy, ScenesSource, train_guard
from guardkit.evaluation.calibration import Asked, calibrated
from guardkit.metrics.intervals import clopper_pearson


def main(arguments: list[str]) -> None:
    given = dict(argument.split("=", 1) for argument in arguments)
    asked = Asked(float(given.get("max_fpr", 0.01)), float(given.get("min_recall", 0.9)))
    guard = GuardClassifier.from_pretrained(given["guard"]) if "guard" in given else trained()
    records, vectors = scenes(guard, int(given.get("n", 3000)))
    rows = np.arange(len(records))[::2]
    made, _ = calibrated(guard, [records[row] for row in rows], vectors[rows], asked, about={})
    rest = np.arange(len(records))[1::2]
    labels = np.array([records[row].label for row in rest])
    categories = np.array([records[row].category if records[row].label else "" for row in rest])
    whole = made.decide(vectors[rest])
    flagged = np.array([one.flagged for one in whole])
    first = np.array([one.violated[0] if one.violated else "" for one in whole])
    n_named = np.array([len(one.violated) for one in whole])
    print(
        f"{guard.name}, calibrated on {len(rows)} scenes (max_fpr={asked.max_fpr:g}, min_recall={asked.min_recall:g}), decides over {len(rest)} others\n"
    )
    print(f"all categories: {share(flagged[labels == 1])} of unsafe scenes flagged, {share(flagged[labels == 0])} of safe ones; ", end="")
    print(f"{n_named[(labels == 1) & flagged].mean():.2f} categories named of a flagged unsafe scene\n")
    print("| category | flagged | named first | scope of it alone: its own | other categories' | safe |")
    print("|---|---|---|---|---|---|")
    for name in made.policy.category_names:
        own, others = categories == name, (labels == 1) & (categories != name)
        alone = np.array([one.flagged for one in made.decide(vectors[rest], scope=[name])])
        cells = [flagged[own], first[own] == name, alone[own], alone[others], alone[labels == 0]]
        print(f"| {name} | {' | '.join(share(cell) for cell in cells)} |", flush=True)


def trained() -> GuardClassifier:
    policy, encoder = Policy.load("guardkit:scenes"), OpenClipEncoder(None, "guardkit:scenes_clip")
    source = ScenesSource(policy)
    return train_guard(source, policy, encoder=encoder, n_unsafe=256, safe_per_unsafe=4, cache_dir=Path(tempfile.mkdtemp())).guard


def share(hits: np.ndarray) -> str:
    low, high = clopper_pearson(int(hits.sum()), len(hits))
    return f"{hits.mean():.3f} ({low:.3f}–{high:.3f})"


if __name__ == "__main__":
    main(sys.argv[1:])
