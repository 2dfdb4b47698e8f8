"""The sample-efficiency engine: many heads at once, each at the optimum of the objective that training has."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from guardkit.efficiency.solver import decision_rows, fit_linear
from guardkit.losses import decision_loss, pair_loss


def problem(n=40, d=16, seed=0, pairs=True):
    rng = np.random.default_rng(seed)
    labels = np.repeat([1, 0], n)
    embeddings = rng.normal(size=(2 * n, d)) + 0.4 * labels[:, None]
    return embeddings, labels, np.stack([np.arange(n), n + np.arange(n)], axis=1) if pairs else np.zeros((0, 2), int)


def test_agrees_with_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    embeddings, labels, pairs = problem(pairs=False)
    rows = decision_rows(embeddings, labels, pairs, prevalence=0.3)
    penalties = np.array([1e-3, 1e-2, 1.0])
    solved = fit_linear(rows, penalties)
    for i, l2 in enumerate(penalties):
        reference = LogisticRegression(C=1 / l2, tol=1e-10, max_iter=10_000).fit(embeddings, labels, sample_weight=rows.shares)
        np.testing.assert_allclose(solved.weights[i], reference.coef_[0], atol=2e-5)
        np.testing.assert_allclose(solved.bias[i], reference.intercept_[0], atol=2e-5)


@pytest.mark.parametrize(("n", "d"), [(40, 16), (4, 64)])
def test_the_optimum_of_the_training_objective(n, d):
    """No step in any direction lowers the losses that training minimises, with few images and with many."""
    embeddings, labels, pairs = problem(n, d)
    solved = fit_linear(decision_rows(embeddings, labels, pairs, pair_weight=0.7, pair_margin=1.5), np.array([0.01, 0.1]))
    assert solved.gradient.max() < 1e-8
    x, y = torch.from_numpy(embeddings), torch.from_numpy(labels).double()
    for i, l2 in enumerate((0.01, 0.1)):
        w = torch.from_numpy(solved.weights[i]).requires_grad_()
        b = torch.tensor(solved.bias[i], requires_grad=True)
        logits = x @ w + b
        loss = decision_loss(logits, y, 0.5) + 0.7 * pair_loss(logits[pairs[:, 0]], logits[pairs[:, 1]], 1.5) + 0.5 * l2 * w.square().sum()
        loss.backward()
        assert w.grad.abs().max() < 1e-7
        assert b.grad.abs() < 1e-7


def test_many_heads_are_the_same_as_one_by_one():
    rows = decision_rows(*problem(20, 32))
    penalties = np.geomspace(1e-5, 10, 13)
    together = fit_linear(rows, penalties)
    alone = [fit_linear(rows, np.array([l2])) for l2 in penalties]
    np.testing.assert_allclose(together.weights, np.concatenate([one.weights for one in alone]), atol=1e-6)
    norms = np.linalg.norm(together.weights, axis=1)
    assert (np.diff(norms) < 0).all()  # a stronger pull, shorter weights


def test_separable_images_do_not_break_it():
    embeddings, labels, pairs = problem(10, 64)
    solved = fit_linear(decision_rows(50 * embeddings, labels, pairs), np.array([1e-8]))
    assert np.isfinite(solved.weights).all()
    assert solved.gradient.max() < 1e-8


def test_wrong_input_is_named():
    rows = decision_rows(*problem())
    with pytest.raises(ValueError, match="l2 must be penalties above 0"):
        fit_linear(rows, np.array([0.1, 0.0]))
    broken = decision_rows(*(problem()[0] * np.nan, *problem()[1:]))
    with pytest.raises(ValueError, match="not finite"):
        fit_linear(broken, np.array([0.1]))
