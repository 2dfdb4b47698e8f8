"""Losses by hand, heads by their definitions."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from guardkit import GuardModule
from guardkit.data.unlabelled import Unlabelled
from guardkit.data.views import Views
from guardkit.fitting.objective import Objective
from guardkit.fitting.terms import CategoryTerm, DecisionTerm, PairTerm
from guardkit.heads import AnchoredHead, LinearHead, MLPHead, PromptHead
from guardkit.schema import InputError, Record, Rejected


def softplus(x):
    return math.log1p(math.exp(x))


def test_decision_loss_weights_classes_by_prevalence():
    logits, labels = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1.0, 0.0, 0.0])
    expected = 0.2 * softplus(-2.0) + 0.8 * (softplus(-1.0) + softplus(0.5)) / 2
    term = DecisionTerm(prevalence=0.2)
    assert float(term.loss(logits[:, None], {"labels": labels})) == pytest.approx(expected, rel=1e-6)
    assert float(term.loss(logits[:1, None], {"labels": labels[:1]})) == pytest.approx(0.2 * softplus(-2.0), rel=1e-6)


def test_category_loss_leaves_unknown_out():
    logits = torch.tensor([[9.0, 1.0, -2.0], [9.0, 3.0, 4.0]])
    known = torch.tensor([[1.0, 0.0], [float("nan"), float("nan")]])
    assert float(CategoryTerm().loss(logits, {"targets": known})) == pytest.approx((softplus(-1.0) + softplus(-2.0)) / 2, rel=1e-6)


def test_pair_loss_is_a_soft_margin():
    logits, (pair, none) = (
        torch.tensor([[2.0], [-1.0]]),
        ({"unsafe_rows": torch.arange(n), "counterfactual_rows": torch.arange(n) + 1} for n in (1, 0)),
    )
    assert float(PairTerm(margin=1.0).loss(logits, pair)) == pytest.approx(softplus(-2.0), rel=1e-6)
    assert float(PairTerm().loss(logits, none)) == 0.0


class Words:
    """An encoder whose texts are fixed random directions."""

    dim = 8

    def encode_texts(self, texts):
        vectors = [np.random.default_rng(sum(map(ord, text))).normal(size=8) for text in texts]
        return np.stack([vector / np.linalg.norm(vector) for vector in vectors]).astype(np.float32)


@pytest.mark.parametrize("head", [LinearHead, AnchoredHead, MLPHead, PromptHead])
def test_heads_give_decision_and_categories_and_are_rebuilt_from_settings(head, scenes_policy):
    torch.manual_seed(0)
    built = head.build(Words(), scenes_policy).eval()
    embeddings = torch.nn.functional.normalize(torch.randn(5, 8), dim=1)
    logits = built(embeddings)
    assert logits.shape == (5, 1 + 9)
    again = type(built)(**built.config).eval()
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


FINE, BROKEN = object(), object()


class Images:
    """Stands in for a data module: images of 8 dimensions, of which the first varies most. Notes what is embedded."""

    name = "vectors"

    def __init__(self, n=400, relabel=lambda label: label, broken=lambda i: False):
        vectors = np.random.default_rng(0).normal(size=(n, 8)) * np.array([5.0, *[0.3] * 7])
        self.vectors = vectors.astype(np.float32)
        self.records = [Record(f"{i:03}", relabel(i % 2), None, "photo", str(i), BROKEN if broken(i) else FINE) for i in range(n)]
        self.source, self.store, self.seen = self, self, []
        self.views = self.pipeline = self.editor = self.other_edits = self
        self.trace, self.refused, self.seconds = np.array([1.0, 1.0, *[0.0] * 6], np.float32), 0, 0.0

    def load(self):
        return self.records

    def embed(self, records):
        return self.vectors[[int(record.id) for record in records]]

    def edited(self, records, variants_per_image, kind, counts):
        assert (variants_per_image, kind) == (1, "null")
        there = np.arange(len(records))[:, None] >= self.refused
        counts.rejected["looks wrong"] += self.refused
        return Views((self.embed(records) + self.trace)[:, None], there)

    def embed_readable(self, records):
        self.seen.append([record.id for record in records])
        readable = [record for record in records if record.content is not BROKEN]
        rejected = [Rejected(record.id, "not an image") for record in records if record.content is BROKEN]
        return readable, self.vectors[[int(record.id) for record in readable]], rejected


def whitened(images, scenes_policy, **settings):
    head = LinearHead.whitened(Words(), scenes_policy, **settings)
    head.prepare(Unlabelled(images))
    return head


def test_a_whitened_head_sees_images_vary_alike_in_all_directions(scenes_policy):
    images = Images()
    head = whitened(images, scenes_policy, n_images=400, shrinkage=1e-9)
    variances = np.linalg.eigvalsh(np.cov(head.features(torch.from_numpy(images.vectors)).numpy().T, bias=True))
    assert variances.max() == pytest.approx(variances.min(), rel=1e-3)
    # shrinkage leaves some of the differences
    shrunk = whitened(images, scenes_policy, n_images=400, shrinkage=0.1)
    variances = np.linalg.eigvalsh(np.cov(shrunk.features(torch.from_numpy(images.vectors)).numpy().T, bias=True))
    assert variances.max() > 1.2 * variances.min()


def test_whitening_looks_at_no_label_and_at_no_more_images_than_asked_for(scenes_policy):
    images, swapped = Images(), Images(relabel=lambda label: 1 - label)
    maps = [whitened(one, scenes_policy, n_images=50).map for one in (images, swapped)]
    assert torch.equal(*maps)
    assert [len(ids) for ids in images.seen] == [50]
    assert len(set(images.seen[0])) == 50
    few = Images(n=5)
    assert torch.isfinite(whitened(few, scenes_policy).map).all()
    assert [len(ids) for ids in few.seen] == [5]


def test_an_unlabelled_image_that_cannot_be_read_is_left_out(scenes_policy, caplog):
    head = whitened(Images(broken=lambda i: i == 7), scenes_policy, n_images=400)
    assert "whitening leaves out 1 image(s) that cannot be read, the first is 007: not an image" in caplog.text
    whole = whitened(Images(), scenes_policy, n_images=400)
    assert not torch.equal(head.map, whole.map)
    torch.testing.assert_close(head.map, whole.map, atol=0.05, rtol=0.05)
    with pytest.raises(InputError, match="none of 10 images of source=vectors can be read"):
        whitened(Images(broken=lambda i: True), scenes_policy, n_images=10)


def test_embeddings_that_a_source_brings_are_taken_as_they_are(scenes_policy):
    images, brought = Images(), Images()
    brought.records = [
        replace(record, content=None, embedding=vector) for record, vector in zip(images.records, images.vectors, strict=True)
    ]
    assert torch.equal(whitened(images, scenes_policy).map, whitened(brought, scenes_policy).map)
    assert brought.seen == [[]]


def test_images_are_embedded_once_for_heads_that_want_the_same(scenes_policy):
    images = Images()
    known = Unlabelled(images)
    for settings in ({"n_images": 50}, {"n_images": 50}, {"n_images": 50, "shrinkage": 0.1}):
        LinearHead.whitened(Words(), scenes_policy, **settings).prepare(known)
    AnchoredHead.build(Words(), scenes_policy, n_images=50).prepare(known)
    LinearHead.build(Words(), scenes_policy).prepare(known)
    assert len(images.seen) == 1


def test_a_whitened_head_is_rebuilt_from_its_settings(scenes_policy):
    head = whitened(Images(), scenes_policy)
    torch.nn.init.normal_(head.linear.weight)
    again = type(head)(**head.config)
    again.load_state_dict(head.state_dict())
    embeddings = torch.randn(5, 8)
    assert torch.equal(again(embeddings), head(embeddings))
    assert not torch.allclose(LinearHead(8, 9).features(embeddings), head.features(embeddings))
    # guards that were saved before heads could be whitened
    assert LinearHead(dim=8, n_categories=9).map is None


def test_an_anchored_head_starts_as_zero_shot_classification_beside_a_linear_probe(scenes_policy):
    images = Images()
    anchored = AnchoredHead.build(Words(), scenes_policy, strength=3.0, scale=10.0, n_images=400)
    with pytest.raises(InputError, match="the head is not prepared"):
        GuardModule(anchored, torch.optim.AdamW)
    anchored.prepare(Unlabelled(images))
    GuardModule(anchored, torch.optim.AdamW)
    vectors = torch.from_numpy(images.vectors)
    with torch.inference_mode():
        logits, zero_shot = anchored(vectors), PromptHead.build(Words(), scenes_policy, scale=10.0)(vectors)
        np.testing.assert_allclose(logits, 3 * zero_shot / zero_shot.std(dim=0, correction=0), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(anchored.features(vectors)[:, :8], LinearHead.build(Words(), scenes_policy).features(vectors))
    # only its weights are trained: the texts and their number of standard deviations stay what they are
    assert [name for name, _ in anchored.named_parameters()] == ["linear.weight", "linear.bias"]


def test_a_head_has_its_own_pull_where_none_is_given(scenes_policy):
    anchored = AnchoredHead.build(Words(), scenes_policy)
    anchored.prepare(Unlabelled(Images()))
    plain = LinearHead.build(Words(), scenes_policy)

    def pull(head, *objective):
        return GuardModule(head, torch.optim.AdamW, *objective).l2

    assert (pull(anchored), pull(plain)) == (1, 0)
    assert (pull(anchored, Objective(l2=0.0)), pull(plain, Objective(l2=3.0))) == (0, 3)


def test_an_anchored_head_knows_what_its_texts_say_alone(scenes_policy):
    images = Images()
    head = AnchoredHead.build(Words(), scenes_policy, strength=1.0)
    head.prepare(Unlabelled(images))
    vectors = torch.from_numpy(images.vectors)
    alone = head.of_texts_alone(vectors)
    torch.testing.assert_close(alone, head(vectors))
    torch.nn.init.normal_(head.linear.weight)
    assert torch.equal(head.of_texts_alone(vectors), alone)
    assert LinearHead.build(Words(), scenes_policy).of_texts_alone(vectors) is None


@pytest.mark.parametrize("wrong", [{"strength": 0.0}, {"scale": -1.0}, {"n_images": 1}, {"leace_images": -1}])
def test_wrong_settings_of_an_anchored_head_are_named(scenes_policy, wrong):
    (name,) = wrong
    with pytest.raises(InputError, match=f"head.{name} must be a .*, got {wrong[name]}"):
        AnchoredHead.build(Words(), scenes_policy, **wrong)


@pytest.mark.parametrize("build", [LinearHead.build, LinearHead.whitened, AnchoredHead.build])
def test_leace_takes_the_editor_s_trace_out_of_a_linear_head_and_no_more(scenes_policy, build):
    images = Images()
    plain, erased = build(Words(), scenes_policy), build(Words(), scenes_policy, leace_images=100)
    assert not erased.is_prepared
    for head in (plain, erased):
        head.prepare(Unlabelled(images))
    assert (plain.is_erased, erased.is_erased) == (False, True)

    def seen(head, vectors):
        return head.features(torch.from_numpy(vectors.astype(np.float64))).numpy()[:, :8]

    # images that it was not fitted on and their edits have one mean, and whatever differs along no trace is there as before
    others = np.random.default_rng(1).normal(size=(50, 8))
    np.testing.assert_allclose(seen(erased, others + images.trace), seen(erased, others), atol=1e-5)
    assert np.abs(seen(plain, others + images.trace) - seen(plain, others)).max() > 1
    change = seen(erased, np.eye(8)) - seen(plain, np.eye(8))
    assert np.linalg.svd(change, compute_uv=False)[1] < 1e-5
    # of all such maps it changes images least, weighed by how they vary: it takes nothing from where the trace is uncorrelated
    covariance = np.cov(images.vectors.T)
    uncorrelated = np.eye(8) - np.outer(images.trace, images.trace @ np.linalg.inv(covariance)) / (
        images.trace @ np.linalg.inv(covariance) @ images.trace
    )
    if build != LinearHead.whitened:
        np.testing.assert_allclose(seen(erased, others), seen(plain, others @ uncorrelated.T), atol=0.1)


def test_a_trace_that_is_not_there_takes_nothing_out(scenes_policy):
    images = Images()
    images.trace = np.zeros(8, np.float32)
    head, plain = (LinearHead.whitened(Words(), scenes_policy, leace_images=n) for n in (50, 0))
    for one in (head, plain):
        one.prepare(Unlabelled(images))
    assert torch.equal(head.map, plain.map)


def test_too_few_null_edits_for_leace_are_one_line(scenes_policy):
    images = Images()
    images.refused = 15
    head = LinearHead.build(Words(), scenes_policy, leace_images=20)
    with pytest.raises(
        InputError, match=r"head.leace_images=20: LEACE needs at least 10 null edits .* made 5 of 20 images \(15 x looks wrong\)"
    ):
        head.prepare(Unlabelled(images))


@pytest.mark.parametrize("build", [LinearHead.build, LinearHead.whitened])
def test_a_wrong_number_of_images_for_leace_is_named(scenes_policy, build):
    with pytest.raises(InputError, match="head.leace_images must be a whole number of at least 0, got -1"):
        build(Words(), scenes_policy, leace_images=-1)


@pytest.mark.parametrize("wrong", [{"n_images": 1}, {"n_images": 2.5}, {"shrinkage": 0.0}])
def test_wrong_settings_of_whitening_are_named(scenes_policy, wrong):
    (name,) = wrong
    with pytest.raises(InputError, match=f"head.{name} must be a .*, got {wrong[name]}"):
        LinearHead.whitened(Words(), scenes_policy, **wrong)


def test_wrong_settings_are_named():
    with pytest.raises(InputError, match="head.hidden must be a whole number from 1 to 1048576, got 0"):
        MLPHead(4, 2, hidden=0)
    with pytest.raises(InputError, match="head.scale must be a number above 0, got 0"):
        PromptHead(4, 2, n_prompts=3, scale=0)


def test_a_head_that_waits_for_its_whitening_is_not_trained(scenes_policy):
    head = LinearHead.whitened(Words(), scenes_policy)
    with pytest.raises(InputError, match="the head is not prepared; call head.prepare"):
        GuardModule(head, torch.optim.AdamW)
    head.prepare(Unlabelled(Images()))
    GuardModule(head, torch.optim.AdamW)
