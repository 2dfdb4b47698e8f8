"""Losses by hand, heads by their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from guardkit.heads import HEADS, LinearHead, MLPHead, PromptHead
from guardkit.losses import category_loss, decision_loss, pair_loss
from guardkit.schema import InputError


def softplus(x):
    return math.log1p(math.exp(x))


def test_decision_loss_weights_classes_by_prevalence():
    logits, labels = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1.0, 0.0, 0.0])
    expected = 0.2 * softplus(-2.0) + 0.8 * (softplus(-1.0) + softplus(0.5)) / 2
    assert float(decision_loss(logits, labels, 0.2)) == pytest.approx(expected, rel=1e-6)
    assert float(decision_loss(logits[:1], labels[:1], 0.2)) == pytest.approx(0.2 * softplus(-2.0), rel=1e-6)


def test_category_loss_leaves_unknown_out():
    logits = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    known = torch.tensor([[1.0, 0.0], [float("nan"), float("nan")]])
    assert float(category_loss(logits, known)) == pytest.approx((softplus(-1.0) + softplus(-2.0)) / 2, rel=1e-6)


def test_pair_loss_is_a_soft_margin():
    assert float(pair_loss(torch.tensor([2.0]), torch.tensor([-1.0]), 1.0)) == pytest.approx(softplus(-2.0), rel=1e-6)
    assert float(pair_loss(torch.zeros(0), torch.zeros(0), 1.0)) == 0.0


class Words:
    """An encoder whose texts are fixed random directions."""

    dim = 8

    def encode_texts(self, texts):
        vectors = [np.random.default_rng(sum(map(ord, text))).normal(size=8) for text in texts]
        return np.stack([vector / np.linalg.norm(vector) for vector in vectors]).astype(np.float32)


@pytest.mark.parametrize("head", [LinearHead, MLPHead, PromptHead])
def test_heads_give_decision_and_categories_and_are_rebuilt_from_settings(head, scenes_policy):
    torch.manual_seed(0)
    built = head.build(Words(), scenes_policy).eval()
    embeddings = torch.nn.functional.normalize(torch.randn(5, 8), dim=1)
    logits = built(embeddings)
    assert logits.shape == (5, 1 + 9)
    again = HEADS[built.kind](**built.settings).eval()
    again.load_state_dict(built.state_dict())
    assert torch.equal(again(embeddings), logits)


def test_untrained_prompt_head_is_zero_shot_classification(scenes_policy):
    head = PromptHead.build(Words(), scenes_policy, scale=10.0)
    image = torch.nn.functional.normalize(torch.randn(1, 8), dim=1)
    unsafe = [text for category in scenes_policy.categories for text in category.unsafe_texts]
    safe = [*scenes_policy.safe_texts, *(text for category in scenes_policy.categories for text in category.safe_texts)]
    cosine = image @ torch.from_numpy(Words().encode_texts(unsafe + safe)).T
    probability = torch.softmax(10.0 * cosine, dim=1)[0, : len(unsafe)].sum()
    assert torch.sigmoid(head(image)[0, 0]).item() == pytest.approx(float(probability), abs=1e-5)


def test_wrong_settings_are_named():
    with pytest.raises(InputError, match="hidden >= 1"):
        MLPHead(4, 2, hidden=0)
    with pytest.raises(InputError, match="scale > 0"):
        PromptHead(4, 2, n_prompts=3, scale=0)
