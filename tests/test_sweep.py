"""The sample-efficiency experiment: it finds gains that are there, invents none, keeps what is finished, and both engines agree."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import groupby
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, picture, strict_json

from guardkit.data.arms import Orders
from guardkit.data.datamodule import TestSet
from guardkit.efficiency.cells import COUNTS, Arm, Cell, CellError, Stock
from guardkit.efficiency.curves import SWEPT, Curve, Yardstick, compare, samples_to_target
from guardkit.efficiency.engine import BatchedEngine, FittedCell, LinearProblem, chosen
from guardkit.efficiency.results import CellStore, opened, run_cells
from guardkit.fitting.objective import Objective
from guardkit.heads import LinearHead
from guardkit.metrics.draws import GroupDraws
from guardkit.runs.hydra import user_error
from guardkit.schema import InputError, Record

ARMS = (
    Arm("unpaired", ("natural",), "none", 1),
    Arm("pairs_aug", ("counterfactual",), "none", 1),
    Arm("pairs_plus", ("counterfactual", "natural"), "none", 1),
    Arm("shuffled_pairs", ("shuffled",), "none", 1),
    Arm("null_edits", ("natural",), "null_edit", 1),
)
NAMES = tuple(arm.name for arm in ARMS)
DIM = 16


class World:
    """Stands in for a data module: vectors instead of images. Unsafe images differ from their twins by one small step; safe
    images lie elsewhere by a large one, which says nothing of safety."""

    def __init__(self, n=120, n_test=60, *, step=1.5, elsewhere=1.5, swap=False, accept=lambda record: True, seed=0):
        rng = np.random.default_rng(seed)
        self.step, self.accept = step * np.eye(DIM)[0], accept
        self.counterfactuals = {}
        self.source = SimpleNamespace(name="vectors", asked={"source": "vectors"})
        self.policy = SimpleNamespace(category_names=("a", "b"))
        self.store, self.pipeline = self, self
        self.encoder = SimpleNamespace(dim=DIM)
        self.safe_per_unsafe, self.photographs = 1, []
        self.pool = [self._record(rng, "train", label, i, elsewhere, swap) for label in (1, 0) for i in range(n)]
        test = [self._record(rng, "test", label, i, 0.0, False) for label in (1, 0) for i in range(n_test)]
        vectors = np.array([record.embedding for record in test])
        rows = np.arange(n_test)
        self.test = TestSet(test, vectors, rows, np.array([self.counterfactuals[test[i].id] for i in rows]), "vectors", 0.0)

    def _record(self, rng, split, label, i, elsewhere, swap):
        there = rng.normal(size=DIM) * np.array([0.3, *[1.0] * (DIM - 1)])
        side = 1 if label else -1
        if swap and rng.random() < 0.5:  # the labels mean nothing
            side = -side
        vector = there + side * self.step / 2 + (0 if label else elsewhere) * np.eye(DIM)[1]
        twin = there - side * self.step / 2 + 0.5 * rng.normal(size=DIM)
        name = f"{split}/{label}/{i}"
        self.counterfactuals[name] = twin.astype(np.float32)
        return Record(name, label, "ab"[i % 2], "photo" if i % 4 < 2 else "drawn", name, None, embedding=vector.astype(np.float32))

    def load(self):
        return self.pool

    def orders(self, seed, kinds):
        return Orders.of(self.pool, seed)

    def make_test_set(self):
        return self.test

    def refusals(self, records, kind):
        return Counter()

    def make(self, records, seeds, kind, counts):
        tries = []
        for record in records:
            counts.requested += 1
            accepted = self.accept(record)
            counts.accepted += accepted
            counts.rejected["not accepted"] += not accepted
            vector = self.counterfactuals[record.id] if kind == "counterfactual" else record.embedding
            tries.append(SimpleNamespace(accepted=accepted, vector=vector))
        return tries

    def embed(self, contents):
        return np.array([one.vector for one in contents])


def engine(strengths=(0.01, 0.1, 1.0), **settings):
    return BatchedEngine(Objective(category_weight=0.0), strengths, lambda name, seed: LinearHead(DIM, 2), None, **settings)


def fitted(world, folder, sizes=(4, 8, 16), seeds=range(6), arms=ARMS):
    stock = Stock(world, arms, sizes, seeds)
    cells = [Cell(arm.name, "linear", size, seed) for arm in arms for size in sizes for seed in seeds]
    with opened(folder, {"shared": {}, "arms": {}, "heads": {}}) as store:
        failed, _ = run_cells(cells, stock, engine(), store)
        return stock, store.get(cells), failed


def measured(stock, finished, metric, n_resamples=300):
    yardstick = Yardstick(metric, stock.test, GroupDraws([record.group for record in stock.test.records], n_resamples=n_resamples))
    parts = {}
    for (arm, size), cells in groupby(sorted(finished, key=lambda cell: (cell.arm, cell.n_unsafe)), lambda cell: (cell.arm, cell.n_unsafe)):
        mine = [finished[cell] for cell in cells]
        parts.setdefault(arm, []).append(yardstick.curve(size, mine, [0.0] * len(mine)))
    return {arm: Curve.joined(parts[arm]) for arm in NAMES if arm in parts}


# --- what may be concluded ---------------------------------------------------------------------------------------------------


def test_a_gain_that_is_there_is_found(tmp_path):
    known = measured(*fitted(World(step=0.8, elsewhere=2.5), tmp_path, seeds=range(10), arms=ARMS[:2])[:2], "ranking_accuracy")
    assert known["pairs_aug"].interval(8).low > known["unpaired"].interval(8).estimate
    (row,) = compare(known, "unpaired")["overall"]
    assert row["p_holm"] < 0.05
    (target,) = [row for row in samples_to_target(known, "unpaired", [16], []) if row["arm"] == "pairs_aug"]
    assert target["ratio"] > 1
    assert target["ratio_ci"][0] <= target["ratio"] <= target["ratio_ci"][1]


@pytest.mark.parametrize("metric", ["ranking_accuracy", "auroc"])
def test_permuted_labels_leave_every_arm_at_chance(tmp_path, metric):
    """Whether an image or its twin is called unsafe is decided by a coin; safe images lie where unsafe ones do."""
    known = measured(*fitted(World(n=400, swap=True, elsewhere=0.0), tmp_path, seeds=range(8))[:2], metric)
    assert set(known) == set(NAMES)
    intervals = [one.interval(size) for one in known.values() for size in one.sizes]
    assert np.mean([found.low <= 0.5 <= found.high for found in intervals]) >= 0.85
    assert np.mean([found.estimate for found in intervals]) == pytest.approx(0.5, abs=0.05)
    assert min(row["p_holm"] for row in compare(known, "unpaired")["overall"]) > 0.05


def test_identical_twins_bring_no_gain(tmp_path):
    world = World(elsewhere=0.3)
    for record in world.pool:
        world.counterfactuals[record.id] = record.embedding
    known = measured(*fitted(world, tmp_path)[:2], "auroc")
    for arm in ("pairs_aug", "shuffled_pairs", "pairs_plus"):
        for size in known[arm].sizes:
            assert known[arm].values[known[arm].sizes.index(size)] <= known["unpaired"].interval(size).high
    better = [row for row in compare(known, "unpaired")["by_size"] if row["difference"] > 0 and row["p_holm"] < 0.05]
    assert not better


# --- cells ---------------------------------------------------------------------------------------------------------------------


def test_subsets_are_nested_and_shared_by_all_arms():
    stock = Stock(World(), ARMS, (4, 8, 16), (0, 1))
    for seed in (0, 1):
        unsafe = {}
        for arm in NAMES:
            before = set()
            for size in (4, 8, 16):
                choice = stock.subset_of(Cell(arm, "linear", size, seed))
                names = {record.id for record in choice.of("unsafe")}
                assert len(names) == size
                assert before < names or not before
                assert unsafe.setdefault(size, names) == names
                others = {record.id for record in choice.of("shuffled")}
                assert not others & names
                before = names
    assert stock.subset_of(Cell("unpaired", "linear", 8, 0)) != stock.subset_of(Cell("unpaired", "linear", 8, 1))


def test_budget_and_edits_are_counted():
    stock = Stock(World(accept=lambda record: int(record.id.split("/")[2]) % 4 != 0), ARMS, (8,), (0,))
    plus, null = (stock.data_of(Cell(arm, "linear", 8, 0)) for arm in ("pairs_plus", "null_edits"))
    assert (plus.counts["n_safe"], plus.counts["n_requested"]) == (8, 8)
    unsafe = stock.subset_of(Cell("pairs_plus", "linear", 8, 0)).of("unsafe")
    assert plus.counts["n_accepted"] == sum(int(record.id.split("/")[2]) % 4 != 0 for record in unsafe)
    assert null.counts["n_requested"] == 16  # both labels pass through the editor
    n = sum(len(batch["labels"]) for batch in (plus.train, plus.validation))
    assert n == 8 + 8 + plus.counts["n_accepted"]
    assert len(plus.train["unsafe_rows"]) + len(plus.validation["unsafe_rows"]) == plus.counts["n_accepted"]


def test_an_arm_without_any_edit_is_reported_and_the_rest_carried_on(tmp_path):
    _, finished, failed = fitted(World(accept=lambda record: False), tmp_path, sizes=(4, 8), seeds=(0,))
    assert {cell.arm for cell in finished} == {"unpaired", "pairs_plus"}
    assert {cell.arm for cell in failed} == {"pairs_aug", "shuffled_pairs", "null_edits"}
    assert "no safe image to train on: all edits were rejected" in failed[Cell("pairs_aug", "linear", 4, 0)]
    assert "x not accepted" in failed[Cell("pairs_aug", "linear", 4, 0)]


def test_sizes_larger_than_the_data():
    stock = Stock(World(n=20), ARMS, (4, 16, 32), (0,))
    assert stock.reason_against(Cell("unpaired", "linear", 16, 0)) is None
    assert (
        stock.reason_against(Cell("unpaired", "linear", 32, 0))
        == "more unsafe images are needed than the 20 that source=vectors has for training"
    )
    with pytest.raises(CellError, match="as many other unsafe images are needed beside the labelled ones, and source=vectors has 20"):
        stock.data_of(Cell("shuffled_pairs", "linear", 16, 0))


def test_one_class_only(tmp_path):
    world = World()
    world.pool = [record for record in world.pool if record.label == 1]
    _, finished, failed = fitted(world, tmp_path, sizes=(4,), seeds=(0,))
    assert {cell.arm for cell in finished} == {"pairs_aug", "shuffled_pairs"}
    assert failed[Cell("unpaired", "linear", 4, 0)] == "more safe images are needed than the 0 that source=vectors has for training"


def test_embeddings_that_are_not_finite_are_named():
    world = World()
    world.pool[3].embedding[2] = np.nan
    with pytest.raises(InputError, match=r"1 embedding\(s\) among originals hold NaN or infinite values, the first is train/1/3"):
        Stock(world, ARMS[:1], (120,), (0,))


def test_a_folder_never_mixes_two_experiments(tmp_path):
    one = {"shared": {"loss": {"pair_margin": 1.0}, "engine": "batched"}, "arms": {"a": {"transform": "none"}}, "heads": {}}
    with opened(tmp_path, one):
        pass
    with opened(tmp_path, {**one, "arms": {"b": {"transform": "none"}}}):  # more arms go on in the same folder
        pass
    changed = {**one, "shared": {"loss": {"pair_margin": 2.0}, "engine": "batched"}}
    with (
        pytest.raises(InputError, match=r"holds a sweep with other settings: loss.pair_margin was 1.0, now 2.0. Choose another"),
        opened(tmp_path, changed),
    ):
        pass
    with (
        pytest.raises(InputError, match="arms.a.transform was none, now classic"),
        opened(tmp_path, {**one, "arms": {"a": {"transform": "classic"}}}),
    ):
        pass
    with opened(tmp_path, one), pytest.raises(InputError, match="is being written by another process"), opened(tmp_path, one):
        pass


def test_stored_cells_come_back_as_they_were(tmp_path):
    _, finished, _ = fitted(World(), tmp_path, sizes=(4,), seeds=(0, 1), arms=ARMS[:1])
    again = CellStore(tmp_path).get(list(finished))
    assert set(again) == set(finished)
    for cell, one in finished.items():
        assert again[cell].chosen == one.chosen
        np.testing.assert_array_equal(again[cell].logits, one.logits)
        assert again[cell].counts == one.counts
        assert one.counts["n_safe"] == 4


def test_memory_does_not_grow_with_the_number_of_cells(tmp_path):
    """Scores of 360 cells, 8.6 MB of them, are measured with a few of them in memory at a time."""
    import tracemalloc

    from guardkit.efficiency.measure import measure
    from guardkit.efficiency.plan import Plan

    stock = Stock(World(n=4, n_test=2000), ARMS[1:2], (2,), (0,))
    rng = np.random.default_rng(0)
    sizes, seeds = tuple(range(2, 122)), (0, 1, 2)
    plan = Plan(("pairs_aug",), ("linear",), "pairs_aug", sizes, seeds, "pair_accuracy", (), (), 2, 0.5, n_resamples=100, draw_seed=0)

    def cell(size):
        logits, counterfactual_logits = (rng.normal(size=n).astype(np.float32) for n in (4000, 2000))
        counts = dict(zip(COUNTS, (size, 1, 0, size, size), strict=True))
        return FittedCell(0, *np.ones((3, 1)), logits, counterfactual_logits, np.ones(1), np.ones(1), counts, seconds=0.0)

    with opened(tmp_path, {"shared": {}, "arms": {}, "heads": {}}) as store:
        for size in sizes:
            store.put({Cell("pairs_aug", "linear", size, seed): cell(size) for seed in seeds})
        tracemalloc.start()
        summary = measure(tmp_path, plan, store, {}, stock, (1.0,), engine={"name": "batched"})
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert summary["engine"]["fits"] == 360
    assert [point["n_seeds"] for point in summary["curves"]["pairs_aug"].values()] == [3] * len(sizes)
    assert pq.read_metadata(tmp_path / "cells.parquet").num_rows == 360
    assert peak < 7 << 20


def test_images_without_several_views_are_taken_once(tmp_path):
    """Where only counterfactuals have several views, an image beside three of them is fitted once, with three times the weight."""
    arms = [replace(arm, variants_per_image=3) for arm in ARMS[:2]]
    stock = Stock(World(), arms, (8,), (0,))
    unpaired, pairs = (stock.data_of(Cell(arm.name, "linear", 8, 0)) for arm in arms)
    n = len(stock.subset_of(Cell("pairs_aug", "linear", 8, 0)).train["unsafe"])
    assert len(unpaired.train["labels"]) == 2 * n
    assert len(pairs.train["labels"]) == 6 * n
    rows = LinearProblem(Objective(), pairs.train, LinearHead(DIM, 2).features).rows(0)
    assert sorted(np.round(rows.shares[rows.bias == 1] * n, 9)) == [0.5] * n
    assert rows.shares.sum() == pytest.approx(2)  # decision and pairs


@pytest.mark.parametrize("arm", ["pairs_plus", "shuffled_pairs", "null_edits", "look_alikes", "pairs_balanced", "unpaired of 3"])
def test_a_cell_is_fitted_to_the_images_of_a_training(compose, arm):
    """The same arm, budget and seed: as many times the same embeddings, with every view in the training batch."""
    from guardkit.runs.objects import build

    asked = (
        "data.n_unsafe=12",
        "data.variants_per_image=2",
        "data.all_views=true",
        "source.n_train=60",
        "source.n_test=9",
        "cache_dir=null",
    )
    arm, _, ratio = arm.partition(" of ")
    data = build(compose("train", f"experiment={arm}", f"data.safe_per_unsafe={ratio or 1}", "seed=5", *asked)).data
    stock = Stock(data, [Arm(arm, data.negatives, data.transform, 2, data.positives)], (4, 12), (0, 5))
    cell = stock.data_of(Cell(arm, "linear", 12, 5))

    def rows(batch):
        return sorted(zip(batch["labels"].tolist(), map(tuple, batch["embeddings"].tolist()), strict=True))

    (batch,) = data.batches(1)
    of_arm = {"pairs_plus": 54, "shuffled_pairs": 36, "null_edits": 18, "look_alikes": 27, "pairs_balanced": 72, "unpaired": 9 + 29}
    assert len(batch["labels"]) == of_arm[arm]
    assert rows(cell.train) == rows(batch)
    assert len(cell.train["unsafe_rows"]) == len(batch["unsafe_rows"])
    assert rows(cell.validation) == rows(data.validation_batch())


def test_unsafe_images_that_cannot_be_divided_all_train(tmp_path):
    """Images of one group stay together, so that only safe ones validate, as in a training."""
    world = World()
    world.pool = [replace(record, group="burst") if record.label else record for record in world.pool]
    _, finished, failed = fitted(world, tmp_path, sizes=(4,), seeds=(0,), arms=ARMS[:1])
    assert not failed
    assert [(one.counts["n_train"], one.counts["n_validation"]) for one in finished.values()] == [(7, 1)]


# --- choosing and measuring ----------------------------------------------------------------------------------------------------


def test_the_strength_is_chosen_on_validation_images():
    """Of equal losses the strongest regularisation wins; the losses are those of the validation batch."""
    assert chosen(np.array([0.5, 0.4, 0.4]), (0.1, 1.0, 10.0)) == 2
    stock = Stock(World(), ARMS[:1], (32,), (0,))
    (one,) = engine().fit([stock.data_of(Cell("unpaired", "linear", 32, 0))], stock.test)
    logits, labels = one.validation_logits, one.validation_labels
    by_label = [np.log1p(np.exp(-logits[labels == 1])).mean(), np.log1p(np.exp(logits[labels == 0])).mean()]
    assert np.mean(by_label) == pytest.approx(one.validation_losses[one.chosen])
    assert one.chosen == one.validation_losses.argmin()


def test_metrics_are_those_of_training(tmp_path):
    from guardkit.metrics.figures import classification_metrics, pair_metrics

    stock, finished, _ = fitted(World(), tmp_path, sizes=(8,), seeds=(0, 1))
    test = stock.test
    labels = np.array([record.label for record in test.records])
    for cell, one in finished.items():
        scores, twins = (1 / (1 + np.exp(-logits.astype(float))) for logits in (one.logits, one.counterfactual_logits))
        reference = {**classification_metrics(labels, scores, 0.5), **pair_metrics(scores[test.pair_rows], twins, 0.5)}
        for metric in SWEPT:
            found = Yardstick(metric, test).values([one], [0.0])
            assert found[0] == pytest.approx(reference[metric]), (cell, metric)


def test_redraws_of_a_metric_are_the_metric_of_redrawn_images():
    from sklearn.metrics import f1_score, roc_auc_score

    rng = np.random.default_rng(0)
    world = World(n=8, n_test=10)
    groups = [f"g{i % 10}" for i in range(20)]  # an unsafe and a safe image each
    draws = GroupDraws(groups, n_resamples=12, seed=3)
    logits = np.round(rng.normal(size=20), 1)
    empty = np.zeros(0)
    one = FittedCell(0, empty, empty, empty, logits, rng.normal(size=10), empty, empty, {}, seconds=0.0)
    labels = np.repeat([1, 0], 10)
    rows = draws.weights(np.arange(20)).astype(int).T[1:]
    reference = {
        "auroc": lambda chosen: roc_auc_score(labels[chosen], logits[chosen]),
        "f1": lambda chosen: f1_score(labels[chosen], logits[chosen] >= 0.2),
        "balanced_accuracy": lambda chosen: np.mean([((logits >= 0.2) == y)[chosen][labels[chosen] == y].mean() for y in (0, 1)]),
    }  # fmt: skip
    for metric, expected in reference.items():
        drawn = Yardstick(metric, world.test, draws).curve(8, [one], [0.2]).draws[0]
        for i, counts in enumerate(rows):
            chosen_rows = np.repeat(np.arange(20), counts)
            assert drawn[i] == pytest.approx(expected(chosen_rows)), metric


def curve(values, sizes=(4, 8, 16, 32), noise=0.0, seed=0):
    draws = np.array(values)[:, None] + noise * np.random.default_rng(seed).normal(size=(len(values), 400))
    return Curve(tuple(sizes), np.array(values, float), draws, (5,) * len(values))


def test_samples_to_target_by_hand():
    known = {"unpaired": curve([0.5, 0.6, 0.7, 0.8]), "pairs_aug": curve([0.6, 0.8, 0.9, 0.9]), "weak": curve([0.5, 0.5, 0.5, 0.55])}
    rows = {(row["arm"], row["target_size"]): row for row in samples_to_target(known, "unpaired", [16, 32], [])}
    first = rows["pairs_aug", 32]
    assert (first["n"], first["baseline_n"], first["ratio"]) == pytest.approx((8, 32, 4))
    assert first["ratio_ci"] == pytest.approx([4, 4])
    # .7 lies halfway between 4 and 8 on the log axis
    assert rows["pairs_aug", 16]["n"] == pytest.approx(32**0.5)
    weak = rows["weak", 32]
    assert weak["n"] is None
    assert weak["ratio"] is None
    assert "does not reach it with 32 labels (it ends at 0.550)" in weak["reason"]
    assert weak["ratio_ci"] == [0, 0]
    (at_once, *_) = [row for row in samples_to_target(known, "unpaired", [4], []) if row["arm"] == "pairs_aug"]
    assert at_once["n"] == 4
    assert "at most 4" in at_once["bound"]


def test_a_target_that_the_baseline_never_reaches():
    known = {"unpaired": curve([0.5, 0.6, 0.7, 0.75]), "pairs_aug": curve([0.6, 0.8, 0.9, 0.9])}
    rows = {row["arm"]: row for row in samples_to_target(known, "unpaired", [], [0.9])}
    assert rows["pairs_aug"]["n"] == pytest.approx(16)
    assert rows["pairs_aug"]["ratio"] is None
    assert rows["pairs_aug"]["ratio_ci"] == [None, None]
    assert "unpaired does not reach it with 32 labels" in rows["pairs_aug"]["reason"]
    json.dumps(rows, allow_nan=False)


def test_a_curve_that_falls_is_made_monotone_first():
    known = {"unpaired": curve([0.5, 0.7, 0.6, 0.8]), "other": curve([0.5, 0.65, 0.65, 0.8])}
    rows = {row["arm"]: row for row in samples_to_target(known, "unpaired", [16], [])}
    assert rows["unpaired"]["target"] == pytest.approx(0.65)
    assert rows["unpaired"]["n"] == rows["other"]["n"] == pytest.approx(8)


# --- the command -----------------------------------------------------------------------------------------------------------------

SMALL = (
    "source.n_train=40", "source.n_test=18", "sweep.sizes=[4,8,16]", "sweep.seeds=2", "sweep.n_resamples=200",
    "sweep.strengths=[0.01,0.1,1.0]",
)  # fmt: skip
LISTED = ("unpaired", "pairs_aug", "pairs_plus", "shuffled_pairs", "null_edits", "classic_aug")


@pytest.fixture
def sweep(compose, tmp_path):
    from guardkit.runs.sweep import run as run_sweep

    def start(*overrides, folder=None):
        return run_sweep(compose("sweep", *SMALL, *overrides), {"some": "settings"}, folder or tmp_path / "sweep")

    return start


def test_the_folder_holds_what_the_contract_promises(sweep):
    report = sweep()
    assert {"cells.parquet", "summary.json", "sample_efficiency.png", "report.md", "report.html"} <= {
        path.name for path in report.folder.iterdir()
    }
    assert len(pd.read_parquet(report.folder / "cells.parquet"))
    summary = strict_json(report.folder / "summary.json")
    assert {"arms", "sizes", "seeds", "metric", "curves", "samples_to_target", "engine"} <= set(summary)
    assert summary["arms"] == list(LISTED)
    assert summary["sizes"] == [4, 8, 16]
    assert summary["engine"]["fits"] == 6 * 3 * 2 * 3
    assert summary["engine"]["name"] == "batched"
    assert summary["heads"] == ["auto"]
    for arm in LISTED:
        for size in ("4", "8", "16"):
            point = summary["curves"][arm][size]
            assert 0 <= point["ci_low"] <= point["mean"] <= point["ci_high"] <= 1
    assert {"target", "arm", "n", "baseline_n", "ratio", "ratio_ci"} <= set(summary["samples_to_target"][0])
    assert {row["arm"] for row in summary["samples_to_target"]} == set(LISTED)
    assert set(summary["by_source"]) == {"scenes_photo", "scenes_generated"}
    assert summary["by_source"]["scenes_photo"]["in_training"]
    assert not summary["by_source"]["scenes_generated"]["in_training"]
    assert len(summary["by_category"]["categories"]) == 9
    assert summary["cost"]["null_edits"]["sizes"]["8"]["edits_requested"] == 16
    assert len(summary["tests"]["overall"]) == 15
    rows = pq.read_table(report.folder / "cells.parquet").to_pylist()
    assert len(rows) == 6 * 3 * 2 * 3
    kept = [row for row in rows if row["is_chosen"]]
    assert len(kept) == 36
    found = [row["pair_accuracy"] for row in kept if (row["arm"], row["n_unsafe"]) == ("pairs_aug", 16)]
    assert np.mean(found) == pytest.approx(summary["curves"]["pairs_aug"]["16"]["mean"])
    for row in kept:
        same = [one for one in rows if all(one[name] == row[name] for name in ("arm", "n_unsafe", "seed"))]
        assert row["validation_loss"] == min(one["validation_loss"] for one in same)
        assert [one["auroc"] for one in same if not one["is_chosen"]] == [None, None]
    page = (report.folder / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "http" not in page.replace("http-equiv", "")
    assert (report.folder / "csv/metrics.csv").is_file()


def test_an_interrupted_sweep_goes_on_where_it_was(sweep, monkeypatch):
    calls = []
    original = BatchedEngine.fit

    def interrupted(self, cells, test):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append([one.cell for one in cells])
        return original(self, cells, test)

    monkeypatch.setattr(BatchedEngine, "fit", interrupted)
    arms = "sweep.arms=[unpaired,pairs_aug]"
    with pytest.raises(KeyboardInterrupt):
        sweep(arms)
    first = [cell for block in calls for cell in block]
    calls[:] = [0, 0, 0, 0]  # no further interruption
    report = sweep(arms)
    second = [cell for block in calls[4:] for cell in block]
    assert len(first) == 6
    assert len(second) == 6
    assert not set(first) & set(second)
    assert report.summary["engine"]["fits"] == 12 * 3
    assert report.summary["engine"]["fits_now"] == 6 * 3
    # a larger sweep keeps them too
    assert sweep("sweep.arms=[unpaired,pairs_aug,pairs_plus]", "sweep.metric=auroc").summary["engine"]["fits_now"] == 6 * 3
    with pytest.raises(InputError, match="loss.pair_margin was 1.0, now 2.0"):
        sweep(arms, "loss.pair_margin=2.0")
    with pytest.raises(InputError, match="source.scene_shift was 0.5, now 1"):
        sweep(arms, "source.scene_shift=1")


SHORT = "as many other unsafe images are needed beside the labelled ones, and source=scenes has 40 for training"


def test_an_editor_that_gives_nothing_and_too_few_images(sweep, caplog):
    report = sweep("editor=none", "sweep.sizes=[4,32]", "sweep.target_sizes=[4]")
    curves_ = report.summary["curves"]
    assert curves_["unpaired"]["4"]["mean"] is not None
    assert curves_["pairs_aug"]["4"]["mean"] is None
    assert "editor=none edits nothing" in curves_["pairs_aug"]["4"]["reason"]
    assert curves_["shuffled_pairs"]["32"]["reason"] == SHORT
    assert f"size 32 is left out for shuffled_pairs: {SHORT} (set sweep.sizes)" in caplog.text
    assert "cells were left out" in report.table
    assert f"  size 32 is left out for shuffled_pairs: {SHORT}" in report.table
    assert "editor=none edits nothing" in (report.folder / "report.md").read_text()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sweep.sizes=[1,4]"], "sweep.sizes must be whole numbers of at least 2 .* got 1"),
        (["sweep.sizes=[]"], "sweep.sizes is empty"),
        (["sweep.sizes=[4,x]"], "sweep.sizes must be whole numbers of at least 2 .* got 'x'"),
        (["sweep.arms=[pairs]"], "sweep.arms names 'pairs'; there are unpaired, pairs_aug"),
        (["sweep.heads=[conv]"], "sweep.heads names 'conv'; there are auto, linear, linear_whitened, linear_texts, anchored, mlp, prompt"),
        (["sweep.seeds=0"], "sweep.seeds must be a number of seeds from 1 to 10000"),
        (["sweep.seeds=10000000000"], "sweep.seeds must be a number of seeds from 1 to 10000"),
        (["sweep.strengths=[0.1,-1]"], "sweep.strengths must be different numbers above 0"),
        (["sweep.metric=accuracy"], "sweep.metric must be one of f1"),
        (["sweep.engine=magic"], "sweep.engine must be one of batched, lightning"),
        (["sweep.target_sizes=[7]"], "sweep.target_sizes must be among sweep.sizes"),
        (["sweep.target_scores=[2]"], r"sweep.target_scores must be numbers in \(0, 1\], got 2"),
        (["sweep.n_resamples=3"], "sweep.n_resamples must be a whole number of at least 100"),
        (["loss.prevalence=1.5"], r"loss.prevalence must lie in \(0, 1\)"),
        (["threshold=3"], r"threshold must lie in \[0, 1\], got 3"),
        (["sweep.device=tpu"], "sweep.device must be auto, cpu or cuda"),
    ],
)
def test_wrong_values_get_one_readable_line(sweep, overrides, message):
    import re

    with pytest.raises(Exception) as caught:  # noqa: PT011 - Hydra wraps what constructors raise
        sweep("sweep.arms=[unpaired]", *overrides) if not any("arms" in one for one in overrides) else sweep(*overrides)
    line = user_error(caught.value)
    assert line is not None
    assert "\n" not in line
    assert re.search(message, line), line


def test_a_metric_that_the_test_set_does_not_have(sweep, compose, tmp_path):
    from guardkit.runs.embed import run as embed_source

    embed_source(compose("embed", "source.n_train=40", "source.n_test=18"), tmp_path / "emb")
    stored = ["source=embeddings", f"source.root={tmp_path / 'emb'}", "~source.n_train", "~source.n_test"]
    from guardkit.runs.sweep import run as run_sweep

    def start(*more):
        settings = [one for one in SMALL if not one.startswith("source.")]
        cfg = compose("sweep", *settings, *stored[:2], "sweep.arms=[unpaired]", *more)
        return run_sweep(cfg, {}, tmp_path / "stored")

    with pytest.raises(
        InputError,
        match=r"sweep.metric=pair_accuracy is undefined: there is no test pair .* choose sweep.metric from f1, balanced_accuracy, auroc",
    ):
        start()
    assert start("sweep.metric=auroc").summary["curves"]["unpaired"]["16"]["mean"] > 0.5


def test_named_thresholds_and_several_heads(sweep):
    report = sweep(
        "threshold=balanced", "sweep.heads=[linear,prompt]", "sweep.arms=[unpaired,pairs_aug]", "sweep.sizes=[4,8]", "trainer.max_epochs=10"
    )
    assert report.summary["arms"] == ["unpaired/linear", "pairs_aug/linear", "unpaired/prompt", "pairs_aug/prompt"]
    # arms are compared within a head
    assert {(row["arm"], row["against"]) for row in report.summary["tests"]["overall"]} == {
        ("unpaired/linear", "pairs_aug/linear"), ("unpaired/prompt", "pairs_aug/prompt"),
    }  # fmt: skip
    # half of the largest size is the smallest one, at which there is nothing to save
    assert {row["target_size"] for row in report.summary["samples_to_target"]} == {8}


@pytest.mark.parametrize("policy", ["scenes", "handled_objects"])
def test_the_default_head_is_called_what_it_became(compose, tmp_path, policy):
    """The encoder that comes along knows the words of drawn scenes, and not those of other policies."""
    from guardkit.runs.sweep import run as run_sweep

    source = ["source.n_train=40", "source.n_test=18"]
    if policy != "scenes":
        for i in range(60):
            folder = tmp_path / "photos" / ("safe", "weapons")[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            picture(i).save(folder / f"{i}.png")
        source = ["source=folder", f"source.root={tmp_path / 'photos'}"]
    settings = [
        "policy=" + policy,
        "editor=none",
        "sweep.arms=[unpaired]",
        "sweep.sizes=[4,8]",
        "sweep.seeds=1",
        "sweep.metric=auroc",
        *source,
    ]
    report = run_sweep(compose("sweep", *settings, "sweep.n_resamples=100", "sweep.strengths=[0.1,1.0]"), {}, tmp_path / "sweep")
    became = "anchored" if policy == "scenes" else "linear"
    assert (report.summary["heads"], report.summary["heads_became"]) == (["auto"], {"auto": became})
    assert report.table.splitlines()[0].endswith(f", mean of 1 seeds, head auto (here {became})")
    assert f"Head `auto` (here {became}). Engine" in (report.folder / "report.md").read_text()
    assert f"(here {became})" in (report.folder / "report.html").read_text()
    assert sum("learns from labels alone" in note for note in report.summary["notes"]) == (became == "linear")


def test_a_setting_that_no_arm_has_a_use_for_is_told(sweep):
    few = ["sweep.sizes=[4]", "sweep.target_sizes=[4]", "data.look_alikes=texts", "data.safe_per_unsafe=2", "data.variants_per_image=2"]
    report = sweep("sweep.arms=[unpaired,pairs_aug]", *few)
    assert [note for note in report.summary["notes"] if "has no effect" in note] == [
        "data.look_alikes=texts has no effect: none of the arms uses any look-alikes; the arm look_alikes does",
    ]


def test_there_is_a_target_between_sizes_of_any_step(sweep):
    report = sweep("sweep.arms=[unpaired,pairs_aug]", "sweep.sizes=[2,5,16]")
    assert {row["target_size"] for row in report.summary["samples_to_target"]} == {5}


def test_wandb_runs_offline_with_table_and_picture(sweep):
    report = sweep("logger=wandb", "sweep.arms=[unpaired,pairs_aug]")
    (run,) = report.folder.glob("wandb/offline-run-*")
    assert list(run.glob("*.wandb"))
    media = [path.name for path in (run / "files/media").rglob("*") if path.is_file()]
    assert any(name.startswith("sample_efficiency") for name in media)
    assert any(name.startswith("samples_to_target") for name in media)
    assert any(name.startswith("curves") for name in media)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arms", "heads"),
    [(LISTED, ("linear_whitened",)), (("pairs_plus", "classic_aug"), ("linear", "anchored", "mlp", "prompt"))],
    ids=["every arm", "every other head"],
)
def test_both_engines_make_the_same_decisions(sweep, tmp_path, arms, heads):
    """Linear heads at the optimum, MLP and prompt heads along the same steps (without dropout, whose coins differ)."""
    grid = (
        "sweep.seeds=1",
        f"sweep.arms=[{','.join(arms)}]",
        "sweep.baseline=pairs_plus",
        f"sweep.heads=[{','.join(heads)}]",
        "heads.linear.leace_images=12",
        "heads.mlp.dropout=0",
        "trainer.max_epochs=15",
        "sweep.sizes=[4,16]",
        "data.variants_per_image=2",
    )
    folders = {name: tmp_path / name for name in ("batched", "lightning")}
    reports = {name: sweep(*grid, f"sweep.engine={name}", folder=folder) for name, folder in folders.items()}
    cells = [Cell(arm, head, size, 0) for arm in arms for head in heads for size in (4, 16)]
    batched, lightning = (CellStore(folders[name]).get(cells) for name in ("batched", "lightning"))
    assert len(batched) == len(lightning) == len(cells)
    same, strengths = [], np.array([0.01, 0.1, 1.0])  # of SMALL
    for cell in cells:
        first, second = batched[cell], lightning[cell]
        gaps = np.abs(first.objectives - second.objectives)
        assert gaps.max() < 2e-5, cell
        # an objective with l2 as its curvature holds the head, and so the validation loss, to the square root of 2 gap / l2
        room = 2e-2 + 5 * np.sqrt(2 * gaps / strengths)
        assert (np.abs(first.validation_losses - second.validation_losses) <= room).all(), cell
        same.append(
            np.mean(
                np.concatenate(
                    [(first.logits >= 0) == (second.logits >= 0), (first.counterfactual_logits >= 0) == (second.counterfactual_logits >= 0)]
                )
            )
        )
    assert np.mean(same) >= 0.995
    for arm, points in reports["batched"].summary["curves"].items():
        for size, point in points.items():
            assert point["mean"] == pytest.approx(reports["lightning"].summary["curves"][arm][size]["mean"], abs=0.03)


@pytest.mark.gpu
def test_the_batched_engine_on_a_gpu(tmp_path):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    stock = Stock(World(), ARMS, (16,), (0, 1))
    cells = [stock.data_of(Cell(arm, "linear", 16, seed)) for arm in NAMES for seed in (0, 1)]
    for here, there in zip(engine().fit(cells, stock.test), engine(device="cuda").fit(cells, stock.test), strict=True):
        np.testing.assert_allclose(here.logits, there.logits, atol=1e-4)


def test_the_experiments_are_the_arms(compose):
    cfg = compose("sweep")
    assert list(cfg.sweep.arms) == list(LISTED)
    assert set(LISTED) <= {path.stem for path in (ROOT / "conf/experiment").glob("*.yaml")}
    for arm in LISTED:
        assert compose("train", f"experiment={arm}").data.negatives == cfg.arms[arm].data.negatives


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [["joblib", "n_jobs=2"], ["submitit_local", "timeout_min=10"]], ids=["joblib", "submitit"])
def test_multirun_with_a_launcher_goes_on_past_a_failure_and_leaves_out_what_is_finished(tmp_path, launcher):
    """Two fail at once, before the one that is right: with joblib in both of its processes."""
    from test_cli import start

    name, setting = launcher
    arguments = [
        "-m", f"hydra/launcher={name}", f"hydra.launcher.{setting}", "encoder=open_clip,onnx,scenes_clip", "experiment=unpaired", "editor=none",
        "data.n_unsafe=8", "source.n_train=90", "source.n_test=9", "trainer.max_epochs=5", f"output_dir={tmp_path / 'runs'}",
    ]  # fmt: skip
    first = start("train", *arguments)
    assert first.returncode == 2, first.stderr
    assert "Traceback" not in first.stderr
    assert "2 job(s) failed" in first.stderr
    failed = [path.read_text() for path in (tmp_path / "runs").glob("*/error.txt")]
    assert ["must be given, as in encoder." in text for text in failed] == [True, True]
    (done,) = (tmp_path / "runs").glob("*/metrics.json")
    written = done.stat().st_mtime_ns
    again = start("train", *arguments)
    assert again.returncode == 2
    if name == "joblib":  # the other one's jobs have their own output
        assert again.stdout.count("finished before") == 1
    assert done.stat().st_mtime_ns == written


def test_a_launcher_that_is_missing_is_one_line(tmp_path):
    from test_cli import start

    done = start("train", "-m", "hydra/launcher=submitit_elsewhere", "seed=0,1", f"output_dir={tmp_path}")
    assert done.returncode == 2
    assert 'pip install "guardkit[slurm]"' in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
