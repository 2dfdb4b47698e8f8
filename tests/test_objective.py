"""The objective is written once: train, the solver of linear heads, heads trained side by side and the sweep under Lightning have
the same terms, the category loss and those of other packages included."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT

import guardkit
from guardkit import Gaps, Objective, Term
from guardkit.efficiency.cells import Cell
from guardkit.efficiency.engine import LinearProblem
from guardkit.efficiency.lightning_engine import LBFGS
from guardkit.efficiency.results import CellStore
from guardkit.efficiency.solver import fit_linear
from guardkit.fitting.objective import penalised, start_of
from guardkit.heads import LinearHead
from guardkit.schema import InputError


@dataclass(frozen=True)
class Square(Term):
    """No softplus: every logit shall be 1 where its label is, and -1 where not. Reads the decision and all categories."""

    is_convex: ClassVar[bool] = True

    def gaps(self, batch):
        labels = torch.cat([batch["labels"][:, None], batch["targets"].nan_to_num()], dim=1)
        return Gaps(labels, [(1.0, torch.ones_like(labels, dtype=torch.bool))], slice(None))

    def each(self, values, labels):
        return (values - (2 * labels - 1)).square()


@dataclass(frozen=True)
class Ramp(Square):
    """A count of wrong decisions, smoothed."""

    is_convex: ClassVar[bool] = False

    def gaps(self, batch):
        labels = batch["labels"]
        return Gaps(labels, [(1.0, labels >= 0)])

    def each(self, values, labels):
        return torch.sigmoid((1 - 2 * labels) * values)


def batch(n=20, d=6, k=3, seed=0):
    """n unsafe images, each with two views of its counterfactual, the unsafe ones in it twice; one of unknown category."""
    rng = np.random.default_rng(seed)
    unsafe, safe = rng.normal(size=(n, d)) + 0.5, rng.normal(size=(2 * n, d))
    targets = np.zeros((4 * n, k))
    targets[np.arange(2 * n), np.tile(np.arange(n) % k, 2)] = 1
    targets[[0, n]] = np.nan
    return {
        "embeddings": torch.from_numpy(np.concatenate([unsafe, unsafe, safe])),
        "labels": torch.from_numpy(np.repeat([1.0, 0.0], 2 * n)),
        "targets": torch.from_numpy(targets),
        "unsafe_rows": torch.arange(2 * n),
        "counterfactual_rows": torch.arange(2 * n, 4 * n),
    }


OBJECTIVES = {
    "default": Objective(prevalence=0.3, pair_weight=0.7, pair_margin=1.5),
    "no categories": Objective(category_weight=0.0),
    "a term of one's own": Objective(category_weight=0.2, terms={"square": Square(0.3)}),
    "only those without a closed form": Objective(pair_weight=0.0, category_weight=0.0, terms={"square": Square()}),
}


@pytest.mark.parametrize("goal", OBJECTIVES.values(), ids=OBJECTIVES)
def test_a_solved_head_is_at_the_optimum_of_what_training_minimises(goal):
    """The gradient of training's own loss vanishes there, and its value is the solver's; equal images are one row."""
    one, l2 = batch(), 0.05
    head = LinearHead(6, 3).double()
    start = start_of(dict(head.named_parameters()))
    problem = LinearProblem(goal, one, head.features)
    rows = {column: problem.rows(column) for column in problem.columns}
    assert sum(len(mine.shares) for mine in rows.values()) < sum(gaps.labels.numel() for gaps in (term.gaps(one) for term in goal.active))
    value = 0.0
    for column, mine in rows.items():
        solved = fit_linear([mine], np.array([l2]))
        value += float(solved.objective[0, 0])
        with torch.no_grad():
            head.linear.weight[column] = torch.from_numpy(solved.weights[0, 0])
            head.linear.bias[column] = float(solved.bias[0, 0])
    loss = penalised(goal.loss(head(one["embeddings"]), one), dict(head.named_parameters()), start, l2)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(value, rel=1e-9)
    for parameter in head.parameters():
        assert parameter.grad.abs().max() < 1e-6


# --- through the public door ------------------------------------------------------------------------------------------------

N_UNSAFE, SIZES = 16, {"batch_size": 1_000_000, "all_views": True, "variants_per_image": 2}
PLAIN_MLP = partial(guardkit.MLPHead.build, hidden=16, dropout=0.0)  # without coins, which the engines would toss differently
EPOCHS = {"max_epochs": 20}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def arguments(scenes_policy, scenes_encoder, cache):
    source = guardkit.ScenesSource(scenes_policy, n_train=40, n_test=9)
    return {
        "source": source,
        "policy": scenes_policy,
        "encoder": scenes_encoder,
        "editor": guardkit.ScenesEditor(),
        "cache_dir": cache,
        **SIZES,
    }


def trained(arguments, folder, loss, head, **how):
    """Decision logits of the test images, by `train`."""
    guardkit.train_guard(**arguments, arm="pairs_aug", output_dir=folder, head=head, n_unsafe=N_UNSAFE, loss={**loss, "l2": 0.1}, **how)
    scores = [row["score"] for row in pq.read_table(folder / "predictions.parquet").to_pylist() if not row["is_counterfactual"]]
    return np.log(scores) - np.log1p(-np.array(scores))


def swept(arguments, folder, loss, engine, heads):
    """The one cell of each head."""
    few = {"arms": ["pairs_aug"], "baseline": "pairs_aug", "sizes": [N_UNSAFE], "seeds": 1, "strengths": [0.1], "n_resamples": 100}
    guardkit.sweep(**arguments, **few, output_dir=folder, loss=loss, engine=engine, heads=heads, trainer=EPOCHS, early_stopping_patience=99)
    cells = [Cell("pairs_aug", head, N_UNSAFE, 0) for head in heads]
    found = CellStore(folder).get(cells)
    return {cell.head: found[cell] for cell in cells}


LOSSES = {
    "categories": {"category_weight": 0.5},
    "a convex term": {"category_weight": 0.5, "terms": {"square": Square(0.2)}},
    "one that is not": {"terms": {"ramp": Ramp(0.5)}},
}


@pytest.mark.parametrize("kind", LOSSES)
def test_a_cell_of_the_sweep_is_what_train_makes_with_the_same_settings(arguments, tmp_path, kind, caplog):
    """On each engine: linear heads at their optimum where there is one, others along the same steps."""
    loss = LOSSES[kind]
    made = {"linear": LinearHead.build, "mlp": PLAIN_MLP}
    with caplog.at_level(logging.WARNING, logger="guardkit.api.sweep"):
        cells = {engine: swept(arguments, tmp_path / engine, loss, engine, made) for engine in ("batched", "lightning")}
    said = "loss.terms.ramp is not convex: linear heads are trained as others are, by optimizer and trainer, not solved"
    assert (said in caplog.messages) == ("ramp" in loss.get("terms", {}))
    by_steps = {"trainer": EPOCHS, "early_stopping_patience": 99}
    to_optimum = {"optimizer": LBFGS, "trainer": {"max_epochs": 1, "check_val_every_n_epoch": 1}}
    goal = {"category_weight": 0.0, **loss}
    for head, make in made.items():
        how = to_optimum if head == "linear" and "ramp" not in loss.get("terms", {}) else by_steps
        by_train = trained(arguments, tmp_path / head, goal, make, **how)
        for engine, found in cells.items():
            np.testing.assert_allclose(found[head].logits, by_train, atol=5e-3, err_msg=f"{head} {engine}")
        np.testing.assert_allclose(cells["batched"][head].objectives, cells["lightning"][head].objectives, atol=1e-4)
        np.testing.assert_allclose(cells["batched"][head].validation_losses, cells["lightning"][head].validation_losses, atol=1e-2)


def test_the_category_loss_changes_no_decision_of_a_linear_head_and_is_counted(arguments, tmp_path):
    """Its logits have weights of their own, so only what the strength is chosen by is larger."""
    made = {"linear": LinearHead.build}
    without, beside = (
        swept(arguments, tmp_path / name, loss, "batched", made)["linear"] for name, loss in (("0", {}), ("1", LOSSES["categories"]))
    )
    assert np.array_equal(without.logits, beside.logits)
    assert (beside.validation_losses > without.validation_losses).all()
    assert (beside.objectives > without.objectives).all()


# --- what is said -----------------------------------------------------------------------------------------------------------


def test_terms_are_named_in_settings_and_messages():
    named = Objective(terms={"square": Square(0.25)}).settings
    assert named["terms"] == {"square": {"kind": f"{__name__}:Square", "weight": 0.25}}
    assert "terms" not in Objective().settings
    with pytest.raises(InputError, match=r"loss.terms.wrong must be a guardkit.Term, got 3; docs/extension has one"):
        Objective(terms={"wrong": 3})
    with pytest.raises(InputError, match=r"loss.terms.square.weight must be a number of at least 0, got -1"):
        Objective(terms={"square": Square(-1)})


def test_both_commands_list_the_same_settings():
    import yaml

    train, sweep = (yaml.safe_load((ROOT / "conf" / f"{name}.yaml").read_text())["loss"] for name in ("train", "sweep"))
    assert train.keys() - sweep.keys() == {"l2"}  # a sweep has strengths
    assert {**sweep, "l2": None} == Objective(category_weight=0.0).settings
