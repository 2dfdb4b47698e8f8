"""An encoder may lack texts or gradients: what needs them says so in one line, before the long part, and the rest works."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import picture

from guardkit import GuardClassifier, GuardModule
from guardkit.baselines.zero_shot import zero_shot
from guardkit.counterfactual.score_verifier import ScoreVerifier
from guardkit.embeddings import EmbeddingStore
from guardkit.heads import AnchoredHead, LinearHead, MLPHead, PromptHead, automatic
from guardkit.robustness.measuring import RobustnessSettings, measure_robustness
from guardkit.schema import InputError


class ImagesOnly:
    """The least that an encoder is: another encoder's images, no texts, no gradients."""

    name = "images-only"

    def __init__(self, encoder):
        self._encoder = encoder
        self.batch_size, self.dim, self.config = encoder.batch_size, encoder.dim, {}
        self.fingerprint, self.preprocessing = "5" * 64, encoder.preprocessing

    def preprocess(self, image):
        return self._encoder.preprocess(image)

    def encode_preprocessed(self, images, *, fixed_batch=False, normalize=True):
        return self._encoder.encode_preprocessed(images, fixed_batch=fixed_batch, normalize=normalize)

    def encode_images(self, images, *, fixed_batch=False, normalize=True):
        return self._encoder.encode_images(images, fixed_batch=fixed_batch, normalize=normalize)


@pytest.fixture
def blind(scenes_encoder):
    return ImagesOnly(scenes_encoder)


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        (
            PromptHead.build,
            "head=prompt needs an encoder that reads texts, and images-only does not; choose head=linear or another encoder",
        ),
        (AnchoredHead.build, "head=anchored needs an encoder that reads texts, and images-only does not; choose head=linear or"),
        (LinearHead.from_texts, "head=linear_texts needs an encoder that reads texts, and images-only does not; choose head=linear"),
    ],
)
def test_heads_that_start_from_texts_say_so(blind, scenes_policy, needs, message):
    with pytest.raises(InputError, match=f"^{message}"):
        needs(blind, scenes_policy)
    assert LinearHead.build(blind, scenes_policy).config["dim"] == MLPHead.build(blind, scenes_policy).config["dim"] == blind.dim


def test_the_default_head_does_without_texts_and_says_why(blind, scenes_encoder, scenes_policy):
    without = automatic(blind, scenes_policy)
    assert type(without) is LinearHead
    (note,) = without.notes
    assert "learns from labels alone (head=linear), not from the policy's texts" in note
    assert note.endswith(": encoder images-only reads no texts")  # and no advice to take the head that it is
    assert GuardModule(without, torch.optim.AdamW).l2 == 1
    # two texts that the encoder cannot tell apart are no start either
    category = replace(scenes_policy.categories[0], unsafe_texts=scenes_policy.safe_texts[:1])
    misread = automatic(scenes_encoder, replace(scenes_policy, categories=(category, *scenes_policy.categories[1:])))
    assert type(misread) is LinearHead
    assert "are the same to the encoder" in misread.notes[0]
    reads = automatic(scenes_encoder, scenes_policy)
    assert type(reads) is AnchoredHead
    assert reads.notes == ()


def test_the_default_head_hides_no_fault_of_the_encoder(blind, scenes_policy):
    class Missing(ImagesOnly):
        @property
        def dim(self):
            raise InputError("weights cannot be found")

        @dim.setter
        def dim(self, value):
            pass

    with pytest.raises(InputError, match="weights cannot be found"):
        automatic(Missing(blind), scenes_policy)


def test_zero_shot_says_so(blind, scenes_policy):
    with pytest.raises(InputError, match="baseline zero_shot needs an encoder that reads texts, and images-only does not"):
        zero_shot(scenes_policy, blind, covers=None)


def test_the_verifier_by_texts_says_so_before_the_first_edit(blind, scenes_policy):
    verifier = ScoreVerifier.from_texts(EmbeddingStore(blind, None), scenes_policy)
    with pytest.raises(InputError, match="verifier=encoder needs an encoder that reads texts, and images-only does not; choose verifier="):
        verifier.prepare()


def test_a_guard_without_gradients_is_attacked_by_queries(blind, scenes_policy):
    guard = GuardClassifier(LinearHead.build(blind, scenes_policy), blind, scenes_policy)
    images, labels = [np.asarray(picture(seed)) for seed in range(6)], np.array([0, 1] * 3)
    settings = RobustnessSettings(n_pixels=6, epsilons=(8,), noise_stds=(8,), edits=("jpeg",), strengths=(1,), square_queries=4)
    rows = measure_robustness(guard, images, labels, None, settings)
    published = [row for row in rows if row["protocol"] == "unsafebench"]
    assert {row["note"] for row in published} == {"the guard has no gradients: encoder images-only has none"}
    assert {row["attack"]: row["n"] for row in rows if row["protocol"] == "pixels"} == {"noise": 6, "jpeg": 6, "square": 6}
    assert all(row["n_passes"] == 0 for row in rows)
