"""What a verifier lets through: right and wrong edits of unseen scenes, judged against what the world itself knows.

    python benchmarks/verifier_quality.py [n=500] [verifier=encoder] [key=value ...]

Right: the exact counterfactual. Wrong: an irrelevant change; another unsafe feature of the same category; the feature painted
over; the right object in another scene. Prints the share accepted of each, 95 % Wilson intervals, and the precision that follows where a given share
of edits is right. Settings such as `max_score=0.3` go to the verifier.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from guardkit.counterfactual.verifier import Candidate
from guardkit.editors.base import EditRequest
from guardkit.editors.inpaint import InpaintEditor
from guardkit.runs.hydra import CONF_DIR, default_cache_dir
from guardkit.runs.objects import build
from guardkit.scenes.content import SceneContent
from guardkit.scenes.features import KINDS
from guardkit.scenes.world import Scene, ScenePool, find_region
from guardkit.schema import Record


def wilson(k: int, n: int) -> str:
    centre, half = (k + 1.92) / (n + 3.84), 1.96 * (k * (n - k) / n + 0.96) ** 0.5 / (n + 3.84)
    return f"{k / n:.3f} [{max(0.0, centre - half):.3f}, {min(1.0, centre + half):.3f}]"


def wrong_feature(scene: Scene) -> Scene:
    others = [feature for feature in KINDS[str(scene.category)].unsafe if feature != scene.feature]
    return replace(scene, feature=others[0])


def drawn(scene: Scene) -> np.ndarray:
    return SceneContent(scene).load()


def painted_over(scene: Scene) -> np.ndarray:
    (made,) = InpaintEditor().edit([EditRequest(SceneContent(scene), "", find_region(scene), 0)])
    return drawn(scene) if made.image is None else made.image


EDITS = {
    "right: exact counterfactual": lambda scene, _: drawn(scene.counterfactual()),
    "wrong: irrelevant change": lambda scene, _: drawn(scene.null_edit()),
    "wrong: another unsafe feature": lambda scene, _: drawn(wrong_feature(scene)),
    "wrong: painted over": lambda scene, _: painted_over(scene),
    "wrong: another picture": lambda scene, other: drawn(replace(other.counterfactual(), rendering=scene.rendering)),
}


def main(n: int = 500, verifier: str = "encoder", *settings: str) -> None:
    OmegaConf.register_new_resolver("default_cache_dir", default_cache_dir, replace=True)
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose("train", [f"verifier={verifier}", *(f"verifier.{one}" for one in settings)])
    judge = build(cfg).pipeline.verifier
    pools = [ScenePool("test", seed=303, rendering=rendering) for rendering in ("photo", "generated")]
    scenes = [pools[i % 2].scene(1, i) for i in range(n)]
    accepted: dict[str, float] = {}
    print(f"verifier={verifier} {' '.join(settings)}, {n} unseen scenes in both renderings")
    for name, edit in EDITS.items():
        candidates = []
        for scene, other in zip(scenes, [*scenes[2:], *scenes[:2]], strict=True):
            content, region = SceneContent(scene), find_region(scene)
            record = Record(scene.name, 1, scene.category, "scenes", scene.name, content, region, scene.caption)
            request = EditRequest(content, "", region, 0, target=scene.counterfactual().caption)
            candidates.append(Candidate(f"{name} of {content.key}", record, request, content.load(), edit(scene, other)))
        verdicts = judge.verify(candidates)
        k = sum(verdict.reason is None for verdict in verdicts)
        accepted[name] = k / n
        print(f"  accepted of {name:<32} {wilson(k, n)}")
    wrong = float(np.max([share for name, share in accepted.items() if name.startswith("wrong")]))
    right = accepted["right: exact counterfactual"]
    for share in (0.1, 0.23, 0.5, 0.75):
        print(
            f"  precision where {share:.2f} of edits are right, the rest wrong in the likeliest way: {right * share / (right * share + wrong * (1 - share)):.3f}"
        )


if __name__ == "__main__":
    options = dict(one.split("=", 1) for one in sys.argv[1:])
    main(int(options.pop("n", 500)), options.pop("verifier", "encoder"), *(f"{key}={value}" for key, value in options.items()))
