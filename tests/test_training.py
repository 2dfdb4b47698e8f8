"""The main job: every arm runs, the budget is kept, runs repeat bit for bit, and pairs do what they promise."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, picture
from safetensors.numpy import load_file

from guardkit import GuardClassifier
from guardkit.data.splits import folds, nested_order, split_test, split_validation
from guardkit.evaluation.verdicts import no_better
from guardkit.metrics.label_errors import probable_label_errors
from guardkit.reports.training import summary_table
from guardkit.schema import InputError, Record

ARMS = ("pairs_aug", "unpaired", "pairs_plus", "shuffled_pairs", "null_edits", "classic_aug")


@pytest.fixture(scope="module")
def pairs_aug(train):
    return train("experiment=pairs_aug", "head=linear")  # which errs, as one that knows the policy's words does not


# pairs_transplanted needs boxes around safe objects: test_transplants.py
EXPERIMENTS = sorted({path.stem for path in (ROOT / "conf/experiment").glob("*.yaml")} - {"pairs_transplanted"})


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_runs_within_its_budget(train, experiment):
    report = train(f"experiment={experiment}")
    metrics, rows = report.metrics, rows_of(report.table)
    assert metrics["experiment"] == experiment
    assert metrics["n_unsafe"] == 24
    natural = {"pairs_aug": 0, "shuffled_pairs": 0, "look_alikes": 48}.get(experiment, 24)
    assert metrics["n_safe"] == natural
    # the rows of what this arm has not are left out
    assert [rows[name][0] for name in ("of these look-alikes", "transplants") if name in rows] == (
        ["24"] if experiment == "look_alikes" else []
    )
    edits = metrics["edits"]
    assert edits["requested"] == edits["accepted"] + sum(edits["rejected"].values())
    assert metrics["n_counterfactuals"] == (24 if experiment in ("pairs_aug", "pairs_plus", "pairs_balanced", "shuffled_pairs") else 0)
    if experiment in ("null_edits", "pairs_balanced"):
        assert edits["accepted"] == 48  # both labels pass through the editor
    assert metrics["test"]["n"] == 108
    assert metrics["pairs"]["n"] == 54
    assert set(metrics["test"]["by_source"]) == {"scenes_photo", "scenes_generated"}
    rows = pq.read_table(report.folder / "predictions.parquet").to_pylist()
    alike = [row["score"] for row in rows if not row["label"] and row["category"] and not row["is_counterfactual"]]
    found = metrics["test"]["look_alikes"]
    assert (found["n"], found["fpr"]) == (len(alike), sum(score >= metrics["test"]["threshold"] for score in alike) / len(alike))
    assert len(metrics["test"]["by_category"]) == 9


def test_all_six_arms_have_an_experiment():
    assert set(ARMS) <= {path.stem for path in (ROOT / "conf/experiment").glob("*.yaml")}


def test_the_folder_holds_what_the_contract_promises(pairs_aug):
    folder = pairs_aug.folder
    assert {"guard", "metrics.json", "predictions.parquet", "pairs.png", "learning.png", "mistakes.html", "checkpoints"} <= {
        path.name for path in folder.iterdir()
    }
    metrics = json.loads((folder / "metrics.json").read_text())
    for key in (
        "experiment",
        "seed",
        "n_unsafe",
        "n_safe",
        "n_counterfactuals",
        "test",
        "pairs",
        "always_unsafe",
        "edits",
        "edited_vs_original_auroc",
        "timing_s",
        "fingerprints",
    ):
        assert key in metrics
    assert {"total", "encode", "edit", "fit"} == set(metrics["timing_s"])
    assert {"auroc", "recall_at_fpr_0.01", "by_category", "by_source", "ece"} <= set(metrics["test"])
    table = pq.read_table(folder / "predictions.parquet").to_pydict()
    guard = GuardClassifier.from_pretrained(folder / "guard")
    natural = ~np.array(table["is_counterfactual"])
    labels, scores = np.array(table["label"]), np.array(table["score"])
    recall = (scores[natural & (labels == 1)] >= guard.threshold).mean()
    assert recall == pytest.approx(metrics["test"]["recall"])
    by_id = dict(zip(np.array(table["id"])[natural], scores[natural], strict=True))
    twins = {table["pair_id"][i]: scores[i] for i in np.flatnonzero(~natural)}
    right = [by_id[name] >= guard.threshold > score for name, score in twins.items()]
    assert np.mean(right) == pytest.approx(metrics["pairs"]["pair_accuracy"])


def rows_of(table):
    """Name -> (value, what it means) of the printed table."""
    cells = [re.split(r"\s{2,}", line.strip(), maxsplit=2) for line in table.splitlines()[1:] if not line.startswith("  note:")]
    return {name: (value, said[0] if said else "") for name, value, *said in cells}


def test_the_table_says_what_it_means(pairs_aug):
    rows, test = rows_of(pairs_aug.table), pairs_aug.metrics["test"]
    assert rows["threshold"] == ("0.500", "an image is flagged when its score reaches it")
    for title, name in (("test recall", "recall"), ("test false-positive rate", "fpr")):
        low, high = test["ci"][name]
        assert rows[title][0] == f"{test[name]:.3f} ({low:.3f}–{high:.3f})"
    value, why = rows["autoencoder-versus-original AUROC"]
    assert value == "-"
    assert "this editor has no autoencoder" in why
    assert "no better" not in pairs_aug.table


def test_the_table_counts_transplants(pairs_aug):
    table = summary_table(pairs_aug.metrics | {"n_transplants": 96})
    assert rows_of(table)["transplants"][0] == "96"


def test_a_guard_that_is_no_better_than_chance_says_so(train):
    """An untrained linear head gives every image the same score, and flags everything."""
    report = train("experiment=unpaired", "head=linear", "trainer.max_epochs=0")
    (said,) = [note for note in report.metrics["notes"] if "no better" in note]
    assert "no better than chance (95 % interval of AUROC 0.500–0.500, chance is 0.5)" in said
    assert "no better than flagging everything (F1 0.667 against 0.667); try other texts" in said
    assert "another encoder (docs/encoders.md), training (experiment=unpaired)" in said
    assert f"  note: {said}" in report.table
    assert said in (report.folder / "guard/README.md").read_text()
    assert GuardClassifier.from_pretrained(report.folder / "guard").metrics["notes"] == report.metrics["notes"]


def test_zero_shot_says_nothing_of_labels_to_train_on(train):
    report = train("experiment=zero_shot", "head=auto", "trainer.max_epochs=0")
    assert report.metrics["notes"] == []
    assert report.metrics["test"]["auroc"] == report.metrics["texts_alone"]["auroc"]


def test_zero_shot_without_texts_that_the_encoder_knows_is_refused_first(train, tmp_path):
    with pytest.raises(
        InputError,
        match=r"with trainer.max_epochs=0 \(experiment=zero_shot\) nothing is learned from labels, and the guard learns from labels alone .* are "
        r"the same to the encoder .*; choose another encoder, or train \(experiment=unpaired\)",
    ):
        train("experiment=zero_shot", "head=auto", "trainer.max_epochs=0", "encoder=photos_clip", folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_threshold_that_flags_everything_is_told_from_scores_that_tell_nothing():
    figures = {"n": 100, "auroc": 0.9, "f1": 0.6, "ci": {"auroc": [0.8, 0.95], "f1": [0.5, 0.7]}}
    metrics = {"test": figures, "always_unsafe": {"f1": 0.667}, "n_safe": 10}
    (said,) = no_better(metrics)
    assert said.endswith(
        "no better than flagging everything (F1 0.600 against 0.667); try another threshold (threshold=balanced), and look at mistakes.html"
    )
    assert no_better(metrics | {"always_unsafe": {"f1": 0.5}}) == []
    assert no_better({"test": {"n": 3, "auroc": None, "f1": None, "ci": {}}, "always_unsafe": {"f1": None}, "n_safe": 0}) == []


def test_the_guard_scores_pixels_as_it_scored_the_test_set(pairs_aug):
    from guardkit.scenes.content import SceneContent
    from guardkit.scenes.world import ScenePool

    guard = GuardClassifier.from_pretrained(pairs_aug.folder / "guard")
    scene = ScenePool("test").scene(1, 4)
    table = pq.read_table(pairs_aug.folder / "predictions.parquet").to_pydict()
    stored = table["score"][table["id"].index(scene.name)]
    assert guard.predict(SceneContent(scene).load())[0].score == pytest.approx(stored, abs=1e-4)


class SlowEditor:
    """The exact editor, but late."""

    name = "scenes"

    def __init__(self):
        from guardkit.editors.scenes import ScenesEditor

        self._editor = ScenesEditor()
        self.config = self._editor.config

    def edit(self, requests):
        time.sleep(0.05 * len(requests))
        return self._editor.edit(requests)


def test_same_seed_same_guard_cold_warm_partly_warm(train, tmp_path):
    def weights(cache, *overrides):
        report = train(
            "experiment=pairs_plus",
            "head=mlp",
            "data.variants_per_image=2",
            "data.batch_size=7",
            "data.n_unsafe=12",
            "source.n_train=90",
            "source.n_test=9",
            "trainer.max_epochs=8",
            f"cache_dir={cache}",
            *overrides,
        )
        return report, load_file(report.folder / "guard/model.safetensors")

    cold_report, cold = weights(tmp_path / "a")
    warm_report, warm = weights(tmp_path / "a")
    assert cold_report.metrics["edits"]["cache_hits"] == 0
    assert warm_report.metrics["edits"]["cache_hits"] == warm_report.metrics["edits"]["requested"] == 24
    weights(tmp_path / "b", "data.n_unsafe=5", "seed=3")  # leaves some of the stores filled, in another order
    _, partly = weights(tmp_path / "b")
    _, other_seed = weights(tmp_path / "a", "seed=1")
    for name, value in cold.items():
        np.testing.assert_array_equal(warm[name], value)
        np.testing.assert_array_equal(partly[name], value)
    assert any((other_seed[name] != value).any() for name, value in cold.items())


def test_a_slow_editor_changes_nothing(compose, tmp_path):
    from guardkit.runs.objects import build

    def batches(editor):
        cfg = compose(
            "train",
            "source.n_train=60",
            "source.n_test=9",
            "data.n_unsafe=20",
            "data.batch_size=5",
            "data.variants_per_image=2",
            f"cache_dir={tmp_path / editor.__class__.__name__}",
        )
        data = build(cfg).data
        data.pipeline.editor = editor
        data.setup("fit")
        try:
            return [batch for epoch in (1, 2, 3) for batch in data.batches(epoch)]
        finally:
            data.close()

    from guardkit.editors.scenes import ScenesEditor

    for quick, slow in zip(batches(ScenesEditor()), batches(SlowEditor()), strict=True):
        assert all((quick[key].equal(slow[key])) for key in ("embeddings", "labels", "unsafe_rows", "counterfactual_rows"))


def test_training_starts_before_the_last_edit(compose, tmp_path):
    """The editor runs ahead in the background: the first batch is there long before the last edit is."""
    from guardkit.runs.objects import build

    cfg = compose(
        "train",
        "source.n_train=90",
        "source.n_test=9",
        "data.n_unsafe=60",
        "experiment=pairs_aug",
        "data.batch_size=6",
        "edit_batch_size=6",
        f"cache_dir={tmp_path}",
    )
    data = build(cfg).data
    data.pipeline.editor = SlowEditor()
    data.setup("fit")
    try:
        first = next(data.batches(1))
        n_edited = data.edits.requested
        assert len(first["counterfactual_rows"]) == 6
        assert n_edited < 30
        list(data.batches(1))
    finally:
        data.close()
    assert data.edits.requested >= 48


def test_variants_take_turns(compose, tmp_path):
    from guardkit.runs.objects import build

    few = ["experiment=pairs_aug", "source.n_train=60", "source.n_test=9", "data.n_unsafe=10", "data.variants_per_image=3"]
    cfg = compose("train", *few, f"cache_dir={tmp_path}")
    data = build(cfg).data
    data.setup("fit")
    try:
        twins = [next(data.batches(epoch)) for epoch in (1, 2, 3)]
        rows = [{tuple(vector[:8].tolist()) for vector in batch["embeddings"][batch["counterfactual_rows"]]} for batch in twins]
        assert len(rows[0] | rows[1] | rows[2]) > len(rows[0])
    finally:
        data.close()


def record(name, label=1, group=None):
    return Record(name, label, None, "s", group or name, None)


def test_smaller_subsets_are_contained_in_larger_ones():
    records = [record(f"r{i}") for i in range(200)]
    for seed in range(3):
        order = nested_order(records, seed)
        assert nested_order(records[::-1], seed) == order
        previous_train: set[str] = set()
        previous_validation: set[str] = set()
        for n in (8, 50, 100):
            train, validation = split_validation(order, n)
            names = {r.id for r in train}, {r.id for r in validation}
            assert len(names[0]) + len(names[1]) == n
            assert previous_train <= names[0]
            assert previous_validation <= names[1]
            previous_train, previous_validation = names
    assert nested_order(records, 0) != nested_order(records, 1)


def test_no_group_straddles_a_split():
    records = [record(f"r{i}", label=i % 2, group=f"g{i // 3}") for i in range(90)]
    pool, test = split_test(records, 0.3, 0)
    assert not {r.group for r in pool} & {r.group for r in test}
    assert len(pool) + len(test) == 90
    assert 20 <= len(test) <= 36
    train, validation = split_validation(nested_order(pool, 1), 40)
    assert not {r.group for r in train} & {r.group for r in validation}


def test_fewer_images_than_asked_for_is_said_and_used(train, caplog):
    metrics = train("experiment=shuffled_pairs", "source.n_train=30", "trainer.max_epochs=5").metrics
    assert "experiment=shuffled_pairs takes the counterfactuals of 24 others: using 6" in caplog.text
    assert metrics["n_unsafe"] == 24


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.n_unsafe=1"], "data.n_unsafe must be a whole number of at least 2, got 1"),
        (["data.n_unsafe=abc"], "data.n_unsafe must be a whole number of at least 2, got 'abc'"),
        (["data.negatives=[cats]"], "data.negatives must be a list of some of counterfactual, natural, shuffled"),
        (["data.positives=[dogs]"], "data.positives must be a list of some of null_edit, transplant, or empty, got"),
        (["data.safe_per_unsafe=0"], "data.safe_per_unsafe .* must be"),
        (["data.look_alikes=some"], "data.look_alikes must be one of marked, texts"),
        (["data.safe_per_unsafe=many"], "data.safe_per_unsafe .* must be"),
        (
            ["experiment=look_alikes", "source.look_alike_rate=0"],
            "has 0 other safe images that are marked .by a category. or found as such; mark some or let the policy's texts find them",
        ),
        (["experiment=pairs_transplanted"], "source=scenes has 0 safe training images with a box, and transplants need at least 2"),
        (["source.scene_shift=2"], r"source.scene_shift must be a number in \[0, 1\], got 2"),
        (["policy=handled_objects"], "draws scenes of nine categories, of which policy 'handled_objects' lacks "),
        (["threshold=best"], "threshold must be a number in .0, 1. or an operating point .balanced"),
        (["threshold=7"], r"threshold must lie in \[0, 1\], got 7"),
        (["editor=none"], "none of the 24 unsafe images of source=scenes can be edited .24 x editor=none edits nothing"),
        (["editor=inpaint", "editor.method=magic"], "editor.method must be one of telea"),
        (["loss.prevalence=0"], r"loss.prevalence must lie in \(0, 1\)"),
        (["seed=-1"], "seed must be a whole number from 0 to"),
        (["encoder=open_clip", "encoder.weights=local-dir:/nowhere"], "is not a folder; python -m guardkit.fetch"),
    ],
)
def test_wrong_values_get_one_readable_line(train, overrides, message):
    from guardkit.runs.hydra import user_error

    with pytest.raises(Exception) as caught:  # noqa: PT011 - Hydra wraps what constructors raise
        train("experiment=pairs_aug", "trainer.max_epochs=5", *overrides)
    line = user_error(caught.value)
    assert line is not None
    assert "\n" not in line
    import re

    assert re.search(message, line), line


@pytest.fixture
def photographs(tmp_path):
    """30 pictures, half of them with a black square in a known box."""
    rows = ["file_name,label,category,x_min,y_min,x_max,y_max"]
    for i in range(30):
        image = picture(i, (80, 80))
        if i % 2:
            image.paste("black", (20, 20, 50, 50))
        image.save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png," + ("unsafe,weapons,0.25,0.25,0.625,0.625" if i % 2 else "safe,,,,,"))
    (tmp_path / "metadata.csv").write_text("\n".join(rows))
    return tmp_path


def test_without_an_editor_the_table_has_no_rows_of_edits(compose, photographs, tmp_path):
    from guardkit.runs.train import run

    settings = ["source=folder", f"source.root={photographs}", "policy=handled_objects", "data.n_unsafe=10", "trainer.max_epochs=5"]
    report = run(compose("train", "experiment=unpaired", "editor=none", *settings), {}, tmp_path / "none")
    assert not [value for value, _ in rows_of(report.table).values() if value == "-"]
    assert "editor=none edits nothing" not in report.table
    # the figures say why they are missing
    assert report.metrics["pairs"]["pair_accuracy"] is None
    assert "editor=none edits nothing" in report.metrics["pairs"]["reason"]
    assert "editor=none edits nothing" in report.metrics["edited_vs_original_auroc_reason"]
    asked = rows_of(run(compose("train", "experiment=unpaired", "editor=inpaint", *settings), {}, tmp_path / "inpaint").table)
    assert {"ranking accuracy", "edited-versus-original AUROC", "autoencoder-versus-original AUROC"} <= asked.keys()


@pytest.mark.parametrize(
    ("groups", "lack"),
    [({"unsafe"}, r"no unsafe image \(4 safe\)"), ({"safe"}, r"no safe image \(4 unsafe\)"), ({"unsafe", "safe"}, "no image")],
    ids=["unsafe", "safe", "both"],
)
def test_a_test_set_that_lacks_a_label_is_told_once(compose, photographs, tmp_path, groups, lack):
    """Images of one group are not divided, so that none of them is tested on."""
    from guardkit.runs.train import run

    rows = [f"{i}.png,{label},{label if label in groups else i}" for i in range(30) for label in [("safe", "unsafe")[i % 2]]]
    (photographs / "metadata.csv").write_text("\n".join(["file_name,label,group", *rows]))
    settings = ["source=folder", f"source.root={photographs}", "policy=handled_objects", "editor=none", "trainer.max_epochs=5"]
    report = run(compose("train", "experiment=unpaired", *settings), {}, tmp_path / "out")
    assert report.metrics["test"]["auroc"] is None
    (note,) = [note for note in report.metrics["notes"] if "this guard" in note]
    assert re.match(
        f"nothing shows how good this guard is: its test set has {lack}, and without both labels there is no AUROC; label more", note
    )
    assert "or raise data.test_share, or test it on other images: python -m guardkit.evaluate guard=GUARD" in note
    assert f"  note: {note}" in report.table


@pytest.mark.parametrize("settings", [["experiment=unpaired"], ["experiment=pairs_plus", "editor=inpaint"]], ids=["embedded", "edited"])
def test_an_image_that_nobody_looked_at_before_is_named_by_its_file(compose, photographs, tmp_path, settings):
    from guardkit.runs.train import run

    for number in (7, 9, 11, 13, 15):
        (photographs / f"{number}.png").write_bytes(b"no image")
    common = ["source=folder", f"source.root={photographs}", "policy=handled_objects", "editor=none", "source.check_images=false"]
    with pytest.raises(InputError) as caught:
        run(compose("train", *common, *settings), {}, tmp_path / "out")
    assert re.match(rf"{photographs}/\d+.png cannot be read \(not an image of a known type\); mend it or take it out", str(caught.value))
    for number in (7, 9, 11, 13, 15):
        (photographs / f"{number}.png").unlink()
    with pytest.raises(InputError, match=r"\d+.png cannot be read \(file does not exist\)"):
        run(compose("train", *common, *settings), {}, tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        (
            ["experiment=unpaired", "data.look_alikes=texts"],
            "data.look_alikes=texts has no effect: the arm unpaired uses no look-alikes; the arm look_alikes does",
        ),
        (
            ["experiment=pairs_aug", "data.safe_per_unsafe=4"],
            "data.safe_per_unsafe=4 has no effect: the arm pairs_aug uses no natural safe images",
        ),
        (
            ["experiment=unpaired", "data.variants_per_image=4"],
            "data.variants_per_image=4 has no effect: the arm unpaired uses no edits or other views",
        ),
    ],
    ids=["look_alikes", "safe_per_unsafe", "variants_per_image"],
)
def test_a_setting_that_an_arm_has_no_use_for_is_told(train, settings, note, caplog):
    report = train(*settings, "trainer.max_epochs=1")
    (said,) = [one for one in report.metrics["notes"] if "has no effect" in one]
    assert said.startswith(note)
    assert said in caplog.messages
    assert f"  note: {said}" in report.table


def test_few_labels_are_cross_validated(compose, photographs, tmp_path):
    """A black square is easily seen: out of fold, nearly every image is told rightly; nothing of the run itself changes."""
    from guardkit.runs.train import run

    overrides = ["source=folder", f"source.root={photographs}", "policy=handled_objects", "editor=none", "data.n_unsafe=10"]
    report = run(compose("train", "experiment=unpaired", *overrides, "trainer.max_epochs=40"), {}, tmp_path / "out")
    found, test = report.metrics["cross_validated"], report.metrics["test"]
    assert (found["n_folds"], found["n"]) == (5, 30)
    assert (test["n"], found["threshold"]) == (8, test["threshold"])
    low, high = found["ci"]["auroc"]
    assert low <= found["auroc"] <= high
    rows = rows_of(report.table)
    assert rows["cross-validated AUROC (n=30)"][0] == f"{found['auroc']:.3f} ({low:.3f}–{high:.3f})"
    assert rows["cross-validated recall"][0].startswith(f"{found['recall']:.3f} ")
    assert report.guard.metrics["test"] == test
    page = (tmp_path / "out/mistakes.html").read_text()
    assert "5 guards" not in page
    assert re.search(r"Labels that may be wrong: \d+ of 30 labelled images", page)


def test_mistakes_are_a_page_of_its_own_blurred_until_clicked(pairs_aug):
    page = (pairs_aug.folder / "mistakes.html").read_text()
    table = pq.read_table(pairs_aug.folder / "predictions.parquet").to_pylist()
    natural = [row for row in table if not row["is_counterfactual"]]
    alarms = [row for row in natural if row["label"] == 0 and row["score"] >= 0.5]
    missed = [row for row in natural if row["label"] == 1 and row["score"] < 0.5]
    assert f"False alarms: {len(alarms)} of 54 safe test images" in page
    assert f"Misses: {len(missed)} of 54 unsafe test images" in page
    worst = max(alarms, key=lambda row: row["score"])
    assert f"<b>{worst['score']:.3f}</b>" in page
    assert page.index(f"show {worst['id']}") == page.index('aria-label="show ') + len('aria-label="')
    n_shown = min(12, len(alarms)) + min(12, len(missed))
    assert page.count('class="veil"') == page.count("data:image/jpeg;base64,") == n_shown
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert "Labels that may be wrong: not looked for" in page
    assert "It takes guards that did not see an image: done where a source has fewer than 200 labelled images" in page
    assert len(page) < 400_000


def test_labels_that_guards_out_of_fold_contradict_are_found():
    rng = np.random.default_rng(0)
    truth = np.repeat([1, 0], [40, 60])
    scores = np.clip(0.15 + 0.7 * truth + rng.normal(0, 0.08, 100), 0, 1)
    labels = truth.copy()
    labels[[3, 50]] = [0, 1]
    scores[[3, 50]] = [0.97, 0.02]
    found = probable_label_errors(labels, scores)
    assert {3, 50} <= set(found.tolist())
    assert len(found) < 8
    other = np.where(labels == 1, 1 - scores, scores)[found]
    assert (np.diff(other) <= 0).all()
    assert not len(probable_label_errors(np.ones(4, int), np.full(4, 0.2)))


def test_many_labels_are_not_cross_validated_and_the_reason_is_said(pairs_aug):
    found = pairs_aug.metrics["cross_validated"]
    assert found["n_folds"] is None
    assert re.fullmatch(r"done where a source has fewer than 200 labelled images, and source=scenes has \d+", found["reason"])
    assert "cross-validated" not in pairs_aug.table


def test_folds_hold_whole_groups_and_as_much_of_each_label():
    records = [record(f"r{i}", label=int(i % 4 == 0), group=f"g{i // 2}") for i in range(80)]
    fold = folds(records, 5, 0)
    of_group = {}
    for one, number in zip(records, fold, strict=True):
        assert of_group.setdefault(one.group, number) == number
    assert np.bincount(fold).tolist() == [16] * 5
    assert np.bincount(fold, weights=[one.label for one in records]).tolist() == [4] * 5
    assert set(folds(records[:4], 5, 0)) == {0, 1}
    assert (folds(records, 5, 1) != fold).any()


def test_out_of_fold_scores_are_of_guards_that_did_not_see_the_image(compose, photographs):
    """Labels made at random are learned by heart: an image that was seen would be told rightly."""
    from guardkit.data.arms import arm_named
    from guardkit.fitting.cross_validation import cross_validate
    from guardkit.fitting.parts import HEADS, make_parts, new_head
    from guardkit.fitting.recipe import Recipe
    from guardkit.runs.objects import build

    cfg = compose("train", "experiment=unpaired", "source=folder", f"source.root={photographs}", "policy=handled_objects", "editor=none")
    source = build(cfg).data.source
    loaded = source.load()
    labels = np.random.default_rng(0).permutation([one.label for one in loaded.train])
    noisy = replace(loaded, train=[replace(one, label=int(label)) for one, label in zip(loaded.train, labels, strict=True)])
    arm, data = arm_named("unpaired"), {"n_unsafe": 12, "split_seed": 0}
    first = build(cfg)
    parts = make_parts(
        SimpleNamespace(name="noisy", asked={}, load=lambda: noisy), first.policy, first.store, first.pipeline, arm, seed=0, **data
    )
    recipe = Recipe(trainer={"max_epochs": 150})
    fitted = recipe.fit(new_head(HEADS["linear"], parts, 0), parts)
    found = cross_validate(HEADS["linear"], parts, recipe, arm, fitted, 0, **data)
    assert len(found.records) == 30
    truth = np.array([one.label for one in found.records])
    assert ((found.scores[:, 0] >= 0.5) == truth).mean() < 0.75
    seen = parts.data.choice.train["unsafe"]
    assert (fitted.guard.score_embeddings(parts.data.views.embed(seen)) >= 0.5).mean() > 0.8


def test_own_photographs_with_boxes(compose, photographs, tmp_path):
    from guardkit.runs.train import run

    overrides = [
        "source=folder",
        f"source.root={photographs}",
        "policy=handled_objects",
        "editor=inpaint",
        "data.n_unsafe=10",
        "trainer.max_epochs=20",
    ]
    for experiment in ("pairs_aug", "null_edits"):
        metrics = run(compose("train", f"experiment={experiment}", *overrides), {}, tmp_path / experiment).metrics
        assert metrics["n_unsafe"] == 10
        assert metrics["edits"]["accepted"] >= 10
        assert metrics["pairs"]["made_by"] == "editor=inpaint"
        assert metrics["inputs"] == {"given": 30, "rejected": []}
        assert metrics["edited_vs_original_auroc"] is None
        assert "needs 10 images that came through" in metrics["edited_vs_original_auroc_reason"]


def test_leace_takes_the_trace_of_an_editor_out_of_a_guard_that_is_saved(compose, photographs, scenes_encoder, tmp_path):
    from guardkit.runs.train import run

    overrides = ["source=folder", f"source.root={photographs}", "policy=handled_objects", "editor=inpaint", "data.test_share=0.1"]
    cfg = compose(
        "train", "experiment=pairs_aug", *overrides, "data.n_unsafe=13", "trainer.max_epochs=3", "head=linear", "head.leace_images=24"
    )
    report = run(cfg, {}, tmp_path / "run")
    metrics = report.metrics
    assert all(0 <= metrics[f"edited_vs_original_auroc{name}"] <= 1 for name in ("", "_after_leace"))
    assert "the same after LEACE" in report.table
    embeddings = np.random.default_rng(0).normal(size=(5, scenes_encoder.dim)).astype(np.float32)
    again = GuardClassifier.from_pretrained(tmp_path / "run/guard", encoder=scenes_encoder)
    np.testing.assert_array_equal(again.probabilities(embeddings), report.guard.probabilities(embeddings))


def test_leace_with_an_editor_that_edits_nothing_is_one_line(train):
    with pytest.raises(InputError, match="head.leace_images=40: LEACE needs at least 10 null edits .* editor=none made 0 of 40 images"):
        train("experiment=unpaired", "editor=none", "head=anchored", "head.leace_images=40")


def test_training_from_an_embedding_folder(compose, tmp_path):
    from guardkit.runs.embed import run as embed_source
    from guardkit.runs.train import run

    cfg = compose("embed", "source.n_train=40", "source.n_test=5")
    counts = embed_source(cfg, tmp_path / "emb")
    assert counts == {"given": 100, "written": 100, "rejected": 0}
    overrides = ["source=embeddings", f"source.root={tmp_path / 'emb'}", "data.n_unsafe=20", "trainer.max_epochs=20"]
    metrics = run(compose("train", "experiment=unpaired", *overrides), {}, tmp_path / "run").metrics
    assert metrics["n_unsafe"] == metrics["n_safe"] == 20
    assert metrics["test"]["auroc"] > 0.5
    assert metrics["pairs"]["pair_accuracy"] is None
    assert "the source holds embeddings only" in metrics["pairs"]["reason"]
    with pytest.raises(InputError, match=r"none of the 20 unsafe images of source=embeddings can be edited .20 x no image"):
        run(compose("train", "experiment=pairs_aug", *overrides), {}, tmp_path / "run2")


def test_wandb_runs_offline(train, tmp_path):
    report = train("experiment=unpaired", "logger=wandb", "trainer.max_epochs=10", folder=tmp_path)
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert report.metrics["test"]["n"] == 108
