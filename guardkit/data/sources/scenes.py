"""Drawn scenes as a source: natural pools for training, balanced test sets in both renderings, exact test pairs."""

from __future__ import annotations

from guardkit.checks import check_whole
from guardkit.data.sources.base import Loaded
from guardkit.policy import Policy
from guardkit.scenes.content import SceneContent
from guardkit.scenes.world import CATEGORIES, RENDERINGS, Scene, ScenePool, find_region
from guardkit.schema import SAFE, UNSAFE, InputError, Record


class ScenesSource:
    """The embedded world.

    Args:
        policy: has some of the world's nine categories and no others, or all nine and whatever else. Scenes of a category that it lacks
            are safe: it allows them.
        n_train: natural scenes of each label in the training pool.
        n_test: natural test scenes of each label, per rendering; as many test pairs per rendering.
        rendering: of the training pool, "photo" or "generated"; test sets have both.
        scene_shift: how differently places and actors are distributed between unsafe and safe training scenes, [0, 1].
        look_alike_rate: share of natural safe scenes that show a safe look-alike, [0, 1].
        seed: of the world's scenes, not of the training.
        size: width and height of the drawn images in pixels.
    Raises:
        InputError: an argument out of range, or a policy that lacks a category of the world and has others.
    """

    name = "scenes"

    def __init__(
        self,
        policy: Policy,
        *,
        n_train: int = 2048,
        n_test: int = 450,
        rendering: str = "photo",
        scene_shift: float = 0.5,
        look_alike_rate: float = 0.25,
        seed: int = 0,
        size: int = 128,
    ) -> None:
        for label, value, least in (("n_train", n_train, 1), ("n_test", n_test, 1), ("size", size, 32)):
            check_whole(f"source.{label}", value, least)
        missing = [category for category in CATEGORIES if category not in policy.category_names]
        if missing and not set(policy.category_names) <= set(CATEGORIES):
            raise InputError(
                f"source=scenes (the default) draws scenes of nine categories, of which policy {policy.name!r} lacks {len(missing)}, {missing[0]!r} first; give "
                "the source of your own images, as in source=folder source.root=DIR, or use policy=scenes"
            )
        self.n_train, self.n_test, self.size = n_train, n_test, size
        self._allowed = frozenset(missing)
        shared = {"seed": seed, "scene_shift": scene_shift, "look_alike_rate": look_alike_rate}
        try:
            self._train = ScenePool("train", rendering=rendering, **shared)  # type: ignore[arg-type]
            self._tests = [ScenePool("test", rendering=name, **shared) for name in RENDERINGS]  # type: ignore[arg-type]
        except ValueError as error:
            raise InputError(f"source.{error}") from error
        self.asked = {"source": self.name, "n_train": n_train, "n_test": n_test, "rendering": rendering, "size": size} | shared

    def load(self) -> Loaded:
        """Describes all scenes; none is drawn yet."""
        train = [self._record(self._train.scene(label, i)) for label in (1, 0) for i in range(self.n_train)]
        test, pairs = [], []
        for pool in self._tests:
            unsafe = [pool.scene(1, i) for i in range(self.n_test)]
            records = [self._record(scene) for scene in unsafe]
            test += records + [self._record(pool.scene(0, i)) for i in range(self.n_test)]
            pairs += [
                (record, self._record(scene.counterfactual()))
                for record, scene in zip(records, unsafe, strict=True)
                if record.label == UNSAFE
            ]
        return Loaded(train=train, test=test, test_pairs=pairs, rejected=[], given=len(train) + len(test), is_drawn=True)

    def _record(self, scene: Scene) -> Record:
        is_allowed = scene.category in self._allowed
        label = SAFE if is_allowed else scene.label
        return Record(
            id=scene.name,
            label=label,
            category=None if is_allowed else scene.category,
            source=f"scenes_{scene.rendering}",
            group=str(scene.key),
            content=SceneContent(scene, self.size),
            region=find_region(scene) if label else None,
            caption=scene.caption,
        )
