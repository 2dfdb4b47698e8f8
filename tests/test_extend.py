"""A category is added to a guard: the others stay the same to the last bit."""

from __future__ import annotations

import numpy as np
import pytest
import yaml
from commands import call

import guardkit
from guardkit import Band, FolderSource, GuardClassifier, InputError, Policy
from guardkit.images import encode_png
from guardkit.scenes.content import SceneContent
from guardkit.scenes.world import ScenePool

FILM = {
    "name": "film",
    "categories": [{"name": "negative", "definition": "A negative of a film.", "unsafe_texts": ["a photographic negative"]}],
}


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """A folder of safe scenes, half of them as negatives, and the policy that forbids these."""
    folder = tmp_path_factory.mktemp("film")
    for name in ("safe", "negative"):
        (folder / "images" / name).mkdir(parents=True)
    for i in range(60):
        image = SceneContent(ScenePool(seed=3).scene(0, i)).load()
        image = 255 - image if i % 2 else image
        (folder / "images" / ("negative" if i % 2 else "safe") / f"{i}.png").write_bytes(encode_png(image))
    (folder / "film.yaml").write_text(yaml.safe_dump(FILM))
    return folder


@pytest.fixture(scope="module")
def base(train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    train(folder=folder)
    return folder / "guard"


@pytest.fixture(scope="module")
def vectors(film, scenes_encoder):
    scenes = [SceneContent(ScenePool(seed=9).scene(label, i)).load() for label in (0, 1) for i in range(10)]
    return scenes_encoder.encode_images(scenes)


def test_a_tenth_category_leaves_the_other_nine_as_they_were(base, film, vectors, tmp_path):
    ran = call(
        "guardkit.train", f"extend={base}", "source=folder", f"source.root={film / 'images'}", f"policy_file={film / 'film.yaml'}",
        "editor=none", "head=linear", "trainer.max_epochs=60", f"output_dir={tmp_path / 'out'}",
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "these figures are of negative alone" in ran.stdout
    old, new = GuardClassifier.from_pretrained(base), GuardClassifier.from_pretrained(tmp_path / "out")
    assert new.policy.category_names == (*old.policy.category_names, "negative")
    before, after = old.probabilities(vectors), new.probabilities(vectors)
    np.testing.assert_array_equal(after[:, 1:10], before[:, 1:])
    assert (after[:, 0] >= before[:, 0]).all()
    # and it knows its new category
    images = [path for kind in ("negative", "safe") for path in sorted((film / "images" / kind).glob("*.png"))[:10]]
    scores = [one.categories["negative"] for one in new.predict(images)]
    assert np.mean(scores[:10]) > np.mean(scores[10:]) + 0.2
    assert [one.flagged for one in new.predict(images, scope=["negative"])] == [score >= 0.5 for score in scores]
    # neither the images of the one nor those of the other are tested on
    assert len(new.training_images) > len(old.training_images)
    assert new.history[-1]["reason"] == "extended by negative"
    # the card says whose figures it does not show
    card = (tmp_path / "out/guard/README.md").read_text()
    assert "policy `scenes_and_film`" in card
    assert "Each was measured by itself" in card
    assert "| auroc | not measured |" in card


def test_calibrated_categories_stay_and_the_decision_starts_anew(base, film, vectors, scenes_policy):
    calibrated = guardkit.calibrate(base, guardkit.ScenesSource(scenes_policy, n_train=60, n_test=30, seed=4), max_fpr=0.1).guard
    policy = Policy.load(film / "film.yaml")
    source = FolderSource(policy, str(film / "images"))
    fitted = guardkit.train_guard(
        source, policy, encoder=calibrated.encoder, head="linear", n_unsafe=16, extend=calibrated, trainer={"max_epochs": 5}
    )
    np.testing.assert_array_equal(fitted.guard.probabilities(vectors)[:, 1:10], calibrated.probabilities(vectors)[:, 1:])
    assert fitted.guard.thresholds.decision == Band.at(0.5)
    assert dict(fitted.guard.thresholds.categories) == {**calibrated.thresholds.categories, "negative": Band.at(0.5)}
    assert fitted.guard.calibration.promises == []
    # once more, on top of that
    twice = fitted.guard.extended_by(_renamed(fitted.guard, "blue_stamp"))
    assert len(twice.head.heads) == 3


def _renamed(guard, name):
    """The last category of a guard, as a guard of its own under another name."""
    policy = Policy.from_dict({"name": "other", "categories": [{"name": name, "definition": "Another.", "unsafe_texts": ["another"]}]})
    return GuardClassifier(guard.head.heads[-1], guard.encoder, policy)


def test_what_does_not_fit_is_refused_before_the_training(base, film, scenes_policy):
    guard = GuardClassifier.from_pretrained(base)
    source = guardkit.ScenesSource(scenes_policy, n_train=10, n_test=5)
    with pytest.raises(
        InputError, match="the guard that is extended has the category 'hate' already; give a policy with the new categories alone"
    ):
        guardkit.train_guard(source, scenes_policy, encoder=guard.encoder, extend=guard)
    with pytest.raises(InputError, match="has the category 'hate' already"):
        guard.extended_by(guard)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parts: parts.clear(), "parts have 0 categories, expected 2"),
        (lambda parts: parts[0].update(kind="mypackage.heads:Head"), "must be one of guardkit's heads"),
        (lambda parts: parts[0].update(kind="joined"), "must be one of guardkit's heads"),
        (lambda parts: parts[0]["settings"].update(dim=3), "settings.dim must be 8"),
        (lambda parts: parts[0]["settings"].update(n_categories=9), "parts have 10 categories, expected 2"),
        (lambda parts: parts.append(3), "must have kind and settings"),
    ],
)
def test_a_file_cannot_make_it_of_anything_else(change, message):
    parts = [{"kind": "linear", "settings": {"dim": 8, "n_categories": 1, "whitened": False}} for _ in range(2)]
    change(parts)
    with pytest.raises(ValueError, match=message):
        guardkit.JoinedHead(8, 2, parts=parts)
