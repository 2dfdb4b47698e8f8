"""Is the embedded encoder good enough for the heads? The figures of checkpoints/scenes_clip/README.md.

    python benchmarks/encoder_quality.py [n_unsafe=8000] [n_test=1000]

Fits a linear head (scikit-learn's logistic regression) on labelled unsafe scenes and their exact counterfactuals, and
asks zero-shot text matching to name the object in unseen scenes, among all 54 that the world has.
"""

from __future__ import annotations

import sys
from math import sqrt

import numpy as np
from sklearn.linear_model import LogisticRegression

from guardkit.embeddings import EmbeddingStore
from guardkit.encoders.open_clip import OpenClipEncoder
from guardkit.metrics.figures import pair_metrics
from guardkit.scenes.content import SceneContent
from guardkit.scenes.world import TEST_ONLY_VARIANTS, ScenePool, features


def article(noun: str) -> str:
    plural = noun.split()[-1] in ("flames", "tulips") or noun.startswith(("smoke", "flood"))
    return noun if plural else f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def interval(share: float, n: int) -> str:
    return f"{share:.3f} ± {1.96 * sqrt(share * (1 - share) / n):.3f}"


def main(n_unsafe: int = 8000, n_test: int = 1000) -> None:
    encoder = OpenClipEncoder(None, "guardkit:scenes_clip", batch_size=128)
    store = EmbeddingStore(encoder, None)

    def embed(scenes):
        return store.embed([SceneContent(scene) for scene in scenes])

    train = [ScenePool("train", seed=101).scene(1, i) for i in range(n_unsafe)]
    unsafe, twins = embed(train), embed([scene.counterfactual() for scene in train])
    x = np.concatenate([unsafe, twins]) * encoder.dim**0.5
    head = LogisticRegression(C=1.0, max_iter=3000).fit(x, np.repeat([1, 0], n_unsafe))
    names = features(1) | features(0)
    texts = encoder.encode_texts([article(name.replace("{c} ", "").replace(" {c}", "")) for name in names])
    order = list(names)
    print(f"{'test scenes':<12} {'variants':<10} {'pair accuracy':<16} {'ranking':<16} {'object named (of 54)':<22} n")
    for rendering in ("photo", "generated"):
        scenes = [ScenePool("test", seed=101, rendering=rendering).scene(1, i) for i in range(n_test)]
        others = [scene.counterfactual() for scene in scenes]
        a, b = embed(scenes), embed(others)
        scores = [head.predict_proba(vectors * encoder.dim**0.5)[:, 1] for vectors in (a, b)]
        named = np.array([order[i] for i in (np.concatenate([a, b]) @ texts.T).argmax(axis=1)])
        right = named == np.array([scene.feature for scene in scenes + others])
        held_out = np.array([scene.variant in TEST_ONLY_VARIANTS for scene in scenes])
        for label, chosen in (("all", np.ones(n_test, bool)), ("seen", ~held_out), ("test-only", held_out)):
            pairs = pair_metrics(scores[0][chosen], scores[1][chosen], 0.5)
            n = int(chosen.sum())
            share = float(right[np.tile(chosen, 2)].mean())
            print(
                f"{rendering:<12} {label:<10} {interval(pairs['pair_accuracy'], n):<16} {interval(pairs['ranking_accuracy'], n):<16} "
                f"{interval(share, 2 * n):<22} {n}"
            )


if __name__ == "__main__":
    main(**{key: int(value) for key, value in (argument.split("=") for argument in sys.argv[1:])})
