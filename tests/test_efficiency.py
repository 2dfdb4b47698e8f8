"""The sample-efficiency engine: many heads at once, each at the optimum of the objective that training has."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from guardkit.efficiency.engine import LinearProblem
from guardkit.efficiency.solver import NumpyProducts, TorchProducts, fit_linear
from guardkit.fitting.objective import Objective


def problem(n=40, d=16, seed=0, pairs=True):
    rng = np.random.default_rng(seed)
    labels = np.repeat([1, 0], n)
    embeddings = rng.normal(size=(2 * n, d)) + 0.4 * labels[:, None]
    return embeddings, labels, np.stack([np.arange(n), n + np.arange(n)], axis=1) if pairs else np.zeros((0, 2), int)


def as_batch(embeddings, labels, pairs):
    return {
        "embeddings": torch.from_numpy(embeddings),
        "labels": torch.from_numpy(labels).double(),
        "targets": torch.zeros(len(labels), 0),
        "unsafe_rows": torch.from_numpy(pairs[:, 0]),
        "counterfactual_rows": torch.from_numpy(pairs[:, 1]),
    }


def decision_rows(embeddings, labels, pairs, **loss):
    return LinearProblem(Objective(**loss), as_batch(embeddings, labels, pairs), lambda vectors: vectors).rows(0)


def test_agrees_with_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    embeddings, labels, pairs = problem(pairs=False)
    rows = decision_rows(embeddings, labels, pairs, prevalence=0.3)
    penalties = np.array([1e-3, 1e-2, 1.0])
    solved = fit_linear([rows], penalties)
    shares = np.where(labels == 1, 0.3, 0.7) / (len(labels) / 2)
    for i, l2 in enumerate(penalties):
        reference = LogisticRegression(C=1 / l2, tol=1e-10, max_iter=10_000).fit(embeddings, labels, sample_weight=shares)
        np.testing.assert_allclose(solved.weights[0, i], reference.coef_[0], atol=2e-5)
        np.testing.assert_allclose(solved.bias[0, i], reference.intercept_[0], atol=2e-5)


def test_an_image_that_is_there_three_times_is_one_row_of_three_times_the_weight():
    embeddings, labels, _ = problem(pairs=False)
    repeated = np.repeat(np.arange(len(labels)), np.where(np.arange(len(labels)) % 2, 3, 1))
    rows = decision_rows(embeddings[repeated], labels[repeated], np.zeros((0, 2), int), prevalence=0.3)
    assert len(rows.shares) == len(labels)
    for sign, prevalence in ((1, 0.3), (-1, 0.7)):
        few, many = np.unique(rows.shares[rows.bias == sign])
        assert many == pytest.approx(3 * few)
        assert rows.shares[rows.bias == sign].sum() == pytest.approx(prevalence)


def test_many_heads_are_the_same_as_one_by_one():
    """Problems of different sizes, with fewer rows than dimensions and with more, beside each other and alone."""
    problems = [decision_rows(*problem(n, 32, seed=n)) for n in (3, 20, 5, 40)]
    penalties = np.geomspace(1e-5, 10, 13)
    together = fit_linear(problems, penalties)
    for i, rows in enumerate(problems):
        for j, l2 in enumerate(penalties):
            alone = fit_linear([rows], np.array([l2]))
            np.testing.assert_allclose(together.weights[i, j], alone.weights[0, 0], atol=1e-5)
            assert together.objective[i, j] == pytest.approx(alone.objective[0, 0], abs=1e-9)
    norms = np.linalg.norm(together.weights, axis=2)
    assert (np.diff(norms, axis=1) < 0).all()  # a stronger pull, shorter weights


def test_order_of_penalties_does_not_matter():
    rows, penalties = decision_rows(*problem()), np.array([0.1, 10.0, 0.001])
    back = fit_linear([rows], penalties[::-1])
    np.testing.assert_allclose(fit_linear([rows], penalties).weights, back.weights[:, ::-1], atol=1e-7)


def test_a_head_is_pulled_towards_its_start():
    embeddings, labels, pairs = problem(6, 32)
    start = np.random.default_rng(1).normal(size=32)
    solved = fit_linear([decision_rows(embeddings, labels, pairs)], np.array([1e-2, 1e6]), start=start)
    np.testing.assert_allclose(solved.weights[0, 1], start, atol=1e-4)
    w, w0 = torch.from_numpy(solved.weights[0, 0]).requires_grad_(), torch.from_numpy(start)
    one = as_batch(embeddings, labels, pairs)
    logits = one["embeddings"] @ w + solved.bias[0, 0]
    loss = Objective().loss(logits[:, None], one) + 0.005 * (w - w0).square().sum()
    loss.backward()
    assert w.grad.abs().max() < 1e-7
    assert float(loss.detach()) == pytest.approx(solved.objective[0, 0])


def test_separable_images_do_not_break_it():
    embeddings, labels, pairs = problem(10, 64)
    solved = fit_linear([decision_rows(50 * embeddings, labels, pairs)], np.array([1e-8]))
    assert np.isfinite(solved.weights).all()
    assert solved.gradient.max() < 1e-8


def test_products_on_a_device_are_those_of_the_processor():
    rng = np.random.default_rng(0)
    z, vector, weights = rng.normal(size=(30, 7)), rng.normal(size=7), rng.random(30)
    for products in (NumpyProducts(z), TorchProducts(z, "cpu")):
        np.testing.assert_allclose(products.times(vector), z @ vector, rtol=1e-12)
        np.testing.assert_allclose(products.transposed(weights), z.T @ weights, rtol=1e-12)
        np.testing.assert_allclose(products.curvature(weights), (z.T * weights) @ z, rtol=1e-4, atol=1e-5)


def test_wrong_input_is_named():
    rows = decision_rows(*problem())
    with pytest.raises(ValueError, match="l2 must be penalties above 0"):
        fit_linear([rows], np.array([0.1, 0.0]))
    broken = decision_rows(*(problem()[0] * np.nan, *problem()[1:]))
    with pytest.raises(ValueError, match="not finite"):
        fit_linear([broken], np.array([0.1]))


class Words:
    """An encoder of two-dimensional meaning: the first letters of a text are its side, the rest is its topic, which is loud."""

    dim = 24

    def encode_texts(self, texts):
        vectors = []
        for text in texts:
            topic = np.random.default_rng(sum(map(ord, text.split()[-1]))).normal(size=self.dim)
            vectors.append(topic * np.array([0.0, *[1.0] * (self.dim - 1)]) + (0.5 if "bad" in text else -0.5) * np.eye(self.dim)[0])
        vectors = np.stack(vectors)
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_a_head_that_starts_from_the_policys_texts():
    """It tells the sides of new texts apart by what the sides differ in, though topics differ more."""
    from types import SimpleNamespace

    from guardkit.heads import LinearHead
    from guardkit.schema import InputError

    names = [f"topic{i}" for i in range(12)]
    categories = [
        SimpleNamespace(unsafe_texts=[f"bad {name}" for name in half], safe_texts=[f"good {name}" for name in half])
        for half in (names[:6], names[6:])
    ]
    policy = SimpleNamespace(safe_texts=["good cup"], categories=categories)
    head = LinearHead.from_texts(Words(), policy, scale=20.0)
    with torch.inference_mode():
        new = {side: head(torch.from_numpy(Words().encode_texts([f"{side} new{i}" for i in range(30)])))[:, 0] for side in ("bad", "good")}
        unsafe = head(torch.from_numpy(Words().encode_texts([text for one in categories for text in one.unsafe_texts])))[:, 0]
        safe = [*policy.safe_texts, *(text for one in categories for text in one.safe_texts)]
        gap = unsafe.mean() - head(torch.from_numpy(Words().encode_texts(safe)))[:, 0].mean()
    assert (new["bad"] > new["good"]).all()
    assert float(gap) == pytest.approx(20.0, rel=1e-4)
    with pytest.raises(InputError, match="head.shrinkage must be a number above 0, got 0"):
        LinearHead.from_texts(Words(), policy, shrinkage=0)
