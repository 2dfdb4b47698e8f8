"""Guards side by side: figures that agree with scikit-learn and UnsafeBench, one pass, bad input counted, a page that opens."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from conftest import picture, strict_json
from sklearn import metrics as sk

from guardkit import GuardClassifier
from guardkit.artifacts import fingerprint
from guardkit.data.sources.base import Loaded
from guardkit.evaluation.benchmark import read_benchmark
from guardkit.evaluation.effectiveness import measure, uncovered_categories
from guardkit.evaluation.scoring import Contender, embedding_stores, judgment_stores, score
from guardkit.images import ArrayContent, FileContent
from guardkit.metrics.figures import OF_IMAGES, OF_PAIRS, pair_metrics
from guardkit.schema import InputError, Judgment, Record

CATEGORIES = ("weapons", "sexual", "hate")


class MeanColour:
    """An encoder that sees the mean colour only."""

    name, dim, batch_size, preprocessing = "mean colour", 3, 4, {}

    def __init__(self, salt=0):
        self.fingerprint = fingerprint(["mean colour", salt])
        self.encoded = 0

    def preprocess(self, image):
        return torch.from_numpy(image.reshape(-1, 3).mean(axis=0).astype(np.float32)) + 1

    def encode_preprocessed(self, images, *, fixed_batch=False, normalize=True):
        self.encoded += len(images)
        raw = torch.stack(list(images))
        return (torch.nn.functional.normalize(raw, dim=-1) if normalize else raw).numpy()


@dataclass(eq=False)
class OnEncoder:
    """Scores by the red share, scaled."""

    name: str
    encoder: MeanColour
    scale: float = 5.0
    covers: frozenset | None = None
    threshold: float = 0.5
    is_normalized: bool = True

    @property
    def fingerprint(self):
        return fingerprint([self.name, self.scale])

    def logits(self, embeddings):
        return self.scale * (embeddings[:, 0] - embeddings[:, 2])


@dataclass(eq=False)
class OnImages:
    """Judges by a function of the image, and counts what it was asked."""

    name: str
    say: object
    covers: frozenset | None = None
    threshold: float = 0.5
    asked: list = field(default_factory=list)

    @property
    def fingerprint(self):
        return fingerprint(["on images", self.name])

    def judge(self, images):
        self.asked += [image.tobytes() for image in images]
        return [self.say(image) for image in images]


class Listed:
    """A source of given records."""

    def __init__(self, test, *, train=(), rejected=(), name="listed", check_images=True):
        self.name, self.asked, self.check_images = name, {"source": name}, check_images
        self.loaded = Loaded(list(train), test, list(rejected), len(test or ()) + len(train) + len(rejected))

    def load(self):
        return self.loaded


def record(i, label, category=None, *, source="a", content=None, **more):
    image = np.asarray(picture(i, (12, 10)))
    return Record(f"{source}/{i}", label, category, source, more.pop("group", f"{source}/{i}"), content or ArrayContent(image), **more)


def records(n=40, sources=("real", "generated")):
    return [record(i, int(i % 3 == 0), CATEGORIES[i % 2], source=sources[i // 2 % len(sources)]) for i in range(n)]


def evaluated(test, *guards, cache=None, points=None, trained_on=None, n_resamples=120, **source):
    contenders = [Contender(guard.name, guard, points or {}, trained_on) for guard in guards]
    benchmark = read_benchmark(test if not isinstance(test, list) else Listed(test, **source))
    sheet = score(benchmark, contenders, embedding_stores(contenders, cache), judgment_stores(contenders, cache), CATEGORIES)
    rows, tests = measure(sheet, prevalence=0.02, n_resamples=n_resamples, seed=0)
    return sheet, rows, tests


def find(rows, **wanted):
    found = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    assert len(found) == 1, f"{len(found)} rows for {wanted}"
    return found[0]


OVERALL = {
    "part": "images",
    "scope": "covered",
    "negatives": "all_safe",
    "category": None,
    "source": None,
    "distribution": None,
    "point": None,
}


# --- arithmetic -------------------------------------------------------------------------------------------------------


def test_f1_table_is_that_of_unsafebench():
    """`describe_results` of its assess_effectiveness.py: images collected for a category, sources pooled, then f1_score."""
    test = records(60)
    guard = OnEncoder("guard", MeanColour(), covers=frozenset({"weapons", "sexual"}))
    sheet, rows, _ = evaluated(test, guard)
    predictions = (sheet.scores[:, 0] >= 0.5).astype(int)
    for sources in (["real"], ["generated"], ["real", "generated"]):
        for category in ("weapons", "sexual"):
            pooled = [i for source in sources for i, one in enumerate(test) if (one.source, one.category) == (source, category)]
            expected = sk.f1_score([test[i].label for i in pooled], predictions[pooled])
            cut = {"negatives": "same_category", "category": category, "source": sources[0] if len(sources) == 1 else None}
            row = find(rows, metric="f1", **(OVERALL | cut))
            assert row["value"] == pytest.approx(expected, abs=1e-12)
            assert row["n"] == len(pooled)
            assert row["ci_low"] <= row["value"] <= row["ci_high"]


def test_an_unsure_answer_is_no_coin_toss():
    """UnsafeBench gives unparsable answers a random label; ours flag nothing and are counted."""
    test = records(30)
    unsure = {test[i].content.array.tobytes() for i in (0, 3, 4)}
    guard = OnImages(
        "vlm", lambda image: Judgment(math.nan, "unparsable") if image.tobytes() in unsure else Judgment(float(image.mean() > 127))
    )
    sheet, rows, _ = evaluated(test, guard)
    row = find(rows, metric="f1", **OVERALL)
    assert row["n_abstained"] == 3
    assert sheet.abstentions(0) == {"unparsable": 3}
    predictions = np.nan_to_num(sheet.scores[:, 0], nan=0.0) >= 0.5
    assert row["value"] == pytest.approx(sk.f1_score(sheet.labels, predictions))
    assert find(rows, metric="auroc", **OVERALL)["n"] == 27


# --- one pass ---------------------------------------------------------------------------------------------------------


def test_eight_classifiers_read_and_encode_each_image_once(tmp_path):
    test = records(50)
    encoder, copy, other = MeanColour(), MeanColour(), MeanColour(1)
    guards = [OnEncoder(f"head {i}", encoder if i % 2 else copy, scale=i + 1.0) for i in range(5)]
    guards += [
        OnEncoder("raw", encoder, is_normalized=False),
        OnEncoder("elsewhere", other),
        OnImages("looks", lambda image: Judgment(0.4)),
    ]
    sheet, _, _ = evaluated(test, *guards, cache=tmp_path)
    assert sheet.counts["read"] == 50
    assert sheet.counts["encoders"]["mean colour"]["encoded"] == 50
    assert encoder.encoded + copy.encoded == 50 == other.encoded
    assert sheet.counts["judges"] == {"looks": {"judged": 50, "from_store": 0}}
    again, _, _ = evaluated(test, *guards, cache=tmp_path)
    assert again.counts["read"] == 0
    assert again.counts["judges"] == {"looks": {"judged": 0, "from_store": 50}}
    np.testing.assert_array_equal(again.scores, sheet.scores)
    # a head that takes embeddings with their length gets them, from the same pass
    raw = np.stack([MeanColour().encode_preprocessed([encoder.preprocess(one.content.load())], normalize=False)[0] for one in test])
    expected = 1 / (1 + np.exp(-5.0 * (raw[:, 0] - raw[:, 2]).astype(float)))
    np.testing.assert_allclose(sheet.scores[:, 5], expected, atol=1e-4)


def test_a_stopped_evaluation_goes_on_where_it_was(tmp_path):
    test = records(30)

    class Dies(Exception):
        pass

    def fails(image):
        if len(guard.asked) > 16:
            raise Dies
        return Judgment(0.3)

    guard = OnImages("endpoint", fails)
    with pytest.raises(Dies):
        evaluated(test, guard, cache=tmp_path)
    kept = set(guard.asked[:16])
    back = OnImages("endpoint", lambda image: Judgment(0.3))
    sheet, _, _ = evaluated(test, back, cache=tmp_path)
    assert not kept & set(back.asked)
    assert len(back.asked) == 14
    assert sheet.counts["judges"]["endpoint"] == {"judged": 14, "from_store": 16}


def test_what_lay_outside_the_classifier_is_asked_again(tmp_path):
    test = records(12)
    lost = {test[i].content.array.tobytes() for i in (2, 7)}
    first = OnImages("vlm", lambda image: Judgment(math.nan, "no connection", transient=True) if image.tobytes() in lost else Judgment(0.7))
    sheet, _, _ = evaluated(test, first, cache=tmp_path)
    assert sheet.abstentions(0) == {"no connection": 2}
    back = OnImages("vlm", lambda image: Judgment(0.2))
    sheet, _, _ = evaluated(test, back, cache=tmp_path)
    assert set(back.asked) == lost
    assert not sheet.abstentions(0)


# --- what it covers, where it comes from ------------------------------------------------------------------------------


def test_each_classifier_on_what_it_covers():
    test = [*records(40), record(100, 1, "hate"), record(101, 1, "hate")]
    narrow = OnEncoder("narrow", MeanColour(), covers=frozenset({"weapons"}))
    wide = OnEncoder("wide", MeanColour(), covers=frozenset({"weapons", "sexual"}))
    sheet, rows, tests = evaluated(test, narrow, wide)
    n_safe = sum(one.label == 0 for one in test)
    weapons = sum(one.label == 1 and one.category == "weapons" for one in test)
    row = find(rows, classifier="narrow", metric="recall", **OVERALL)
    assert (row["n"], row["n_unsafe"]) == (n_safe + weapons, weapons)
    assert find(rows, classifier="narrow", metric="recall", **(OVERALL | {"scope": "all"}))["n"] == len(test)
    assert not [one for one in rows if one["classifier"] == "narrow" and one["category"] == "sexual"]
    assert uncovered_categories(sheet) == {"hate": 2}
    assert {(test["n"], test["first"], test["second"]) for test in tests} == {(n_safe + weapons, "narrow", "wide")}
    assert all(test["difference"] == 0 and test["p_holm"] == 1 for test in tests if test["metric"] != "pair_accuracy")


def test_nothing_of_the_benchmark_is_covered():
    guard = OnEncoder("elsewhere", MeanColour(), covers=frozenset({"hate"}))
    _, rows, _ = evaluated(records(30), guard)
    assert find(rows, metric="recall", **OVERALL)["reason"] == "no unsafe image"
    assert find(rows, metric="recall", **(OVERALL | {"scope": "all"}))["value"] is not None


def test_in_and_out_of_distribution_apart():
    _, rows, _ = evaluated(records(40), OnEncoder("guard", MeanColour()), trained_on=frozenset({"real"}), points={"strict": 0.9})
    for side, source in (("in", "real"), ("out", "generated")):
        apart = find(rows, metric="auroc", **(OVERALL | {"distribution": side}))
        by_source = find(rows, metric="auroc", **(OVERALL | {"distribution": side, "source": source}))
        assert apart["value"] == by_source["value"]
        assert apart["n"] == 20
    strict = find(rows, metric="recall", **(OVERALL | {"point": "strict"}))
    assert (strict["threshold"], strict["value"] <= find(rows, metric="recall", **OVERALL)["value"]) == (0.9, True)


def test_intervals_do_not_collapse_and_groups_are_drawn_together():
    """Twenty groups of five equal images say as much as twenty images: a recall of 1 is not certain."""
    test = [record(i, int(i < 10), "weapons", group=str(i), source=f"s{copy}") for i in range(20) for copy in range(5)]
    perfect = OnImages("perfect", lambda image: Judgment(float(image.tobytes() in unsafe)))
    unsafe = {one.content.array.tobytes() for one in test if one.label}
    _, rows, _ = evaluated(test, perfect)
    row = find(rows, metric="recall", **OVERALL)
    assert (row["value"], row["ci_high"]) == (1, 1)
    assert row["ci_low"] == pytest.approx(0.025 ** (1 / 10))


# --- pairs ------------------------------------------------------------------------------------------------------------


def pair_source(n=24):
    dark = [np.asarray(picture(i, (12, 10))) // 2 for i in range(n)]
    red = [np.concatenate([np.minimum(255, one[..., :1] + 8 * i), one[..., 1:]], axis=2).astype(np.uint8) for i, one in enumerate(dark)]
    test = [record(i, 1, "weapons", content=ArrayContent(red[i]), counterfactuals=(ArrayContent(dark[i]),)) for i in range(n)]
    return Listed(test, name="pairs")


def test_pairs_against_how_similar_the_twins_are():
    sheet, rows, _ = evaluated(pair_source(), OnEncoder("guard", MeanColour(), scale=20.0))
    assert sheet.similarity_by == "mean colour"
    bins = sorted(
        (row for row in rows if row["metric"] == "mean_margin" and row["similarity_low"] is not None), key=lambda row: row["similarity_low"]
    )
    assert [row["n"] for row in bins] == [6, 6, 6, 6]
    assert bins[0]["value"] > bins[-1]["value"]  # nearer twins, smaller margins
    assert all(low["similarity_high"] <= high["similarity_low"] for low, high in pairwise(bins))
    overall = find(rows, metric="pair_accuracy", part="pairs", similarity_low=None, source=None)
    unsafe, twin = sheet.scores[sheet.pair_rows, 0].T
    assert overall["value"] == pytest.approx(pair_metrics(unsafe, twin, 0.5)["pair_accuracy"])


def test_without_safe_images_the_counterfactuals_stand_for_them():
    sheet, rows, _ = evaluated(pair_source(), OnEncoder("guard", MeanColour()))
    row = find(rows, metric="balanced_accuracy", **OVERALL)
    assert (row["n"], row["n_unsafe"], int(sheet.counted.sum())) == (48, 24, 48)
    assert row["value"] is not None


def test_safeeditbench_layout(tmp_path, scenes_policy):
    from guardkit.data.sources.pairs import PairsSource

    for i in range(4):
        picture(i).save(tmp_path / f"{i}.jpg")
        picture(i + 10).save(tmp_path / f"{i}_edited.jpg")
    benchmark = read_benchmark(PairsSource(scenes_policy, str(tmp_path)), split="all")
    assert [(twin.id, twin.label) for twin in benchmark.counterfactuals[:2]] == [
        ("0.jpg#0#counterfactual", 0),
        ("1.jpg#0#counterfactual", 0),
    ]
    assert benchmark.counterfactuals_are_the_safe_images


# --- bad input --------------------------------------------------------------------------------------------------------


def test_one_class_is_measured_and_explained():
    _, rows, _ = evaluated([record(i, 1, "weapons") for i in range(10)], OnEncoder("guard", MeanColour()))
    assert find(rows, metric="recall", **OVERALL)["value"] is not None
    for metric in ("auroc", "balanced_accuracy", "fpr"):
        row = find(rows, metric=metric, **OVERALL)
        assert (row["value"], row["reason"]) == (None, "needs both classes, got 10 unsafe and 0 safe images")


def test_scores_that_are_no_numbers_are_abstentions():
    class Broken(OnEncoder):
        def logits(self, embeddings):
            return torch.where(torch.arange(len(embeddings)) < 5, torch.nan, 1.0)

    sheet, rows, _ = evaluated(records(20), Broken("broken", MeanColour()), OnImages("odd", lambda image: Judgment(1.5)))
    assert sheet.abstentions(0) == {"score is nan, not a number in [0, 1]": 5}
    assert sheet.abstentions(1) == {"score is 1.5, not a number in [0, 1]": 20}
    assert find(rows, classifier="odd", metric="auroc", **OVERALL)["reason"] == "abstained on every image"
    assert find(rows, classifier="odd", metric="recall", **OVERALL)["value"] == 0


def test_images_of_every_odd_kind_are_counted(tmp_path):
    picture(1).save(tmp_path / "fine.png")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "cut.png").write_bytes((tmp_path / "fine.png").read_bytes()[:80])
    (tmp_path / "text.jpg").write_text("no image")
    picture(2).convert("L").save(tmp_path / "grey.png")
    picture(3).convert("CMYK").save(tmp_path / "cmyk.jpg")
    names = ["fine.png", "empty.png", "cut.png", "text.jpg", "missing.png", "grey.png", "cmyk.jpg"]
    test = [record(i, i % 2, "weapons", content=FileContent(tmp_path / name)) for i, name in enumerate(names)]
    for guards in ([OnEncoder("guard", MeanColour())], [OnImages("looks", lambda image: Judgment(0.9))]):
        sheet, _, _ = evaluated(test, *guards, check_images=False)
        assert (sheet.counts["images"], sheet.counts["scored"], sheet.counts["unreadable"]) == (7, 3, 4)
        reasons = {one.id: one.reason for one in sheet.rejected}
        assert reasons["a/1"] == "empty file"
        assert reasons["a/4"] == "file does not exist"
        assert [one.id for one in sheet.records] == ["a/0", "a/5", "a/6"]


def test_stored_embeddings_and_who_cannot_use_them():
    rng = np.random.default_rng(0)
    vectors = torch.nn.functional.normalize(torch.from_numpy(rng.random((20, 3), np.float32)), dim=-1).numpy()
    test = [Record(str(i), i % 2, "weapons", "stored", str(i), None, embedding=vector) for i, vector in enumerate(vectors)]
    encoder = MeanColour()
    guards = [OnEncoder("guard", encoder), OnEncoder("raw", encoder, is_normalized=False), OnImages("looks", lambda image: Judgment(0.9))]
    sheet, _, _ = evaluated(test, *guards)
    assert np.isfinite(sheet.scores[:, 0]).all()
    assert list(sheet.abstentions(1)) == ["takes embeddings with their length, the benchmark's are unit vectors"]
    assert list(sheet.abstentions(2)) == ["looks at images, and the benchmark holds embeddings only"]
    assert sheet.counts["read"] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "train"}, "split must be one of test, all, got 'train'"),
        ({"test_share": 1.5}, r"test_share must lie in \(0, 1\), got 1.5"),
    ],
)
def test_wrong_choice_of_images(settings, message):
    with pytest.raises(InputError, match=message):
        read_benchmark(Listed(records(4)), **settings)


def test_a_source_without_test_images_gives_those_that_training_holds_out(scenes_policy):
    from guardkit.data.splits import split_test

    pool = records(40)
    held_out = read_benchmark(Listed(None, train=pool))
    assert [one.id for one in held_out.records] == [one.id for one in split_test(pool, 0.3, 0)[1]]
    assert "30% that training holds out with split seed 0" in held_out.chosen
    assert len(read_benchmark(Listed(None, train=pool), split="all").records) == 40


# --- the whole --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(train, compose, tmp_path_factory):
    """A small real evaluation: a guard twice, two baselines, attacks of a few steps."""
    from guardkit.runs.evaluate import run

    guard = train("experiment=pairs_aug").folder / "guard"
    folder = tmp_path_factory.mktemp("evaluate")
    attacks = [
        "robustness=both",
        "robustness.n_pixels=4",
        "robustness.n_unsafebench=2",
        "robustness.pgd_steps=2",
        "robustness.epsilons=[1,8]",
    ]
    attacks += ["robustness.edits=[jpeg,flip]", "robustness.strengths=[1]", "robustness.noise_stds=[8]", "robustness.square_queries=2"]
    cfg = compose(
        "evaluate", f"guard=[{guard},{guard}]", "baselines=[zero_shot,{always_unsafe: {threshold: 0.4}}]", "source.n_test=12", "n_resamples=100", *attacks
    )  # fmt: skip
    return run(cfg, folder)


def test_the_folder_holds_what_the_contract_promises(report):
    names = {path.name for path in report.folder.iterdir()}
    assert {"effectiveness.parquet", "robustness.parquet", "summary.json", "report.html", "report.md"} <= names
    assert all(len(pd.read_parquet(report.folder / name)) for name in ("effectiveness.parquet", "robustness.parquet"))
    found = strict_json(report.folder / "summary.json")
    assert set(found["classifiers"]) == {"pairs_aug", "pairs_aug 2", "zero_shot", "always_unsafe"}
    assert found["classifiers"]["always_unsafe"]["threshold"] == 0.4
    assert found["classifiers"]["pairs_aug"]["trained_on"] == ["scenes_photo"]
    assert set(found["classifiers"]["pairs_aug"]["points"]) == {"balanced", "fpr_0.01", "fpr_0.05"}
    assert found["passes"]["images"] == found["passes"]["read"] == 72  # 48 natural, 24 counterfactuals
    (encoder,) = found["passes"]["encoders"].values()
    assert encoder["encoded"] + encoder["from_store"] == 72
    assert encoder["guards"] == ["pairs_aug", "pairs_aug 2", "zero_shot"]
    assert found["always_unsafe"]["f1"] == pytest.approx(2 / 3)
    assert found["classifiers"]["always_unsafe"]["effectiveness"]["f1"]["value"] == pytest.approx(2 / 3)


def test_what_each_classifier_costs_is_said(report):
    """Numbers that can be counted elsewhere, times that are times, and a reason for what nobody knows."""
    found = {name: one["cost"] for name, one in report.summary["classifiers"].items()}
    guard = GuardClassifier.from_pretrained(report.summary["classifiers"]["pairs_aug"]["origin"])
    mine, words, constant = found["pairs_aug"], found["zero_shot"], found["always_unsafe"]
    assert mine["parameters"] == sum(value.numel() for value in guard.head.state_dict().values() if value.is_floating_point())
    assert mine["encoder_parameters"] == words["encoder_parameters"] == sum(value.numel() for value in guard.encoder.model.parameters())
    assert (mine["reads_policy"], words["reads_policy"], constant["reads_policy"]) == (False, True, False)
    assert mine["n_labels"] == guard.training["n_unsafe"] + guard.training["n_safe"]
    assert (words["n_labels"], constant["n_labels"], constant["parameters"]) == (0, 0, 0)
    assert 0 < mine["ms_per_image"] < 100
    assert constant["encoder_parameters"] is None
    assert constant["reasons"]["encoder_parameters"] == "it looks at images itself"
    for cost in found.values():
        assert set(cost["reasons"]) == {name for name, value in cost.items() if value is None}
    text = (report.folder / "report.md").read_text()
    assert f"| pairs_aug | {mine['parameters']:,} | {mine['encoder_parameters']:,} |" in text
    assert "| zero_shot |" in text.split("## What each classifier costs")[1].split("\n## ")[0]


def test_training_says_the_same_of_its_guard(train, compose, tmp_path):
    """Every figure, interval and reason, bit for bit, on all of the test set and on each part of it."""
    from guardkit.runs.evaluate import run

    trained = train("experiment=pairs_aug", "source.n_test=12")
    mine = strict_json(trained.folder / "metrics.json")
    evaluation = run(compose("evaluate", f"guard={trained.folder / 'guard'}", "source.n_test=12"), tmp_path)
    (found,) = strict_json(evaluation.folder / "summary.json")["classifiers"].values()
    parts = [(mine["test"], found["effectiveness"], OF_IMAGES), (mine["pairs"], found["pairs"], OF_PAIRS)]
    for by in ("by_source", "by_category"):
        assert set(mine["test"][by]) == set(found[by])
        parts += [(mine["test"][by][name], found[by][name], OF_IMAGES) for name in found[by]]
    for figures, theirs, names in parts:
        assert set(theirs) - {"f1_unsafebench"} == set(names)
        for name in names:
            row = theirs[name]
            interval = None if row["ci_low"] is None else [row["ci_low"], row["ci_high"]]
            assert (figures[name], figures["ci"].get(name), figures["reasons"].get(name)) == (row["value"], interval, row["reason"]), name
    shown = found["effectiveness"]["auroc"]
    assert f"{shown['value']:.3f} ({shown['ci_low']:.3f}–{shown['ci_high']:.3f})" in trained.table


def test_every_figure_carries_its_n_threshold_and_interval(report):
    rows = pq.read_table(report.folder / "effectiveness.parquet").to_pylist()
    assert rows
    for row in rows:
        assert row["n"] >= 0
        assert (row["value"] is None) == (row["reason"] is not None)
        if row["value"] is not None:
            assert row["ci_low"] is not None
            assert row["ci_low"] <= row["ci_high"]
        if row["metric"] in ("f1", "recall", "fpr", "pair_accuracy"):
            assert row["threshold"] is not None
    predictions = pq.read_table(report.folder / "predictions.parquet").to_pylist()
    assert len(predictions) == 72 * 4
    natural = [row for row in predictions if row["classifier"] == "zero_shot" and not row["is_counterfactual"]]
    recall = np.mean([row["score"] >= row["threshold"] for row in natural if row["label"]])
    assert find(rows, classifier="zero_shot", metric="recall", **OVERALL)["value"] == pytest.approx(recall)


def test_the_page_stands_alone(report):
    page = (report.folder / "report.html").read_text()
    for section in ("glance", "categories", "curves", "sources", "pairs", "robustness", "mistakes", "tests", "costs", "run"):
        assert f'<section id="{section}">' in page
    outside = re.findall(r"""(?:src|href)=["'](?!#|data:)([^"']*)""", page)
    assert not outside
    assert "url(" not in page
    assert "@import" not in page
    assert 'class="veil"' in page
    assert "veil open" not in page


def test_a_page_calls_none_best_where_all_are_equal(compose, tmp_path):
    from guardkit.runs.evaluate import run

    report = run(compose("evaluate", "baselines=[always_unsafe,prevalence]", "source.n_test=12", "n_resamples=100"), tmp_path / "out")
    page = (report.folder / "report.html").read_text()
    marked = re.findall(r'<td[^>]*class="best"><b>([^<]*)</b>', page)
    assert "0.667" in marked  # the F1 of always_unsafe; the other has none or 0
    assert "0.500" not in marked  # AUROC and balanced accuracy of both


def test_the_text_says_the_same(report):
    text = (report.folder / "report.md").read_text()
    found = report.summary["classifiers"]["zero_shot"]["effectiveness"]["f1"]
    assert f"{found['value']:.3f} ({found['ci_low']:.3f}–{found['ci_high']:.3f})" in text
    assert text.count("\n## ") >= 7
    for line in text.splitlines():
        assert not line.startswith("|") or line.endswith("|")
    # attacked images as a file would hold them stand below the same with real-valued pixels
    robust = text.split("\n## Robust accuracy on pixels\n")[1].split("\n## ")[0]
    assert "| pgd 1 |" in robust
    rows = pq.read_table(report.folder / "robustness.parquet").to_pylist()
    row = next(row for row in rows if (row["guard"], row["protocol"], row["attack"], row["strength"]) == ("zero_shot", "pixels", "pgd", 8))
    line = next(line for line in robust.splitlines() if line.startswith("| pgd 8, in 8 bits |"))
    low, high = row["robust_accuracy_8bit_low"], row["robust_accuracy_8bit_high"]
    assert f"{row['robust_accuracy_8bit']:.3f} ({low:.3f}–{high:.3f})" in line
    assert "square 8, in 8 bits" not in robust


CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 420])
def test_the_page_in_a_browser(report, tmp_path, width):
    """It opens without errors or requests, nothing sticks out sideways, and a click uncovers a thumbnail."""
    page = (report.folder / "report.html").read_text()
    probe = """<script>
      const failed = []; window.addEventListener("error", event => failed.push(event.message));
      window.addEventListener("load", () => {
        document.querySelector(".veil").click(); document.querySelector('[data-heat="auroc"]').click();
        const seen = [...document.querySelectorAll("section")].filter(one => one.getBoundingClientRect().height > 40).map(one => one.id);
        document.title = "PROBE" + JSON.stringify({failed, seen, requests: performance.getEntriesByType("resource").filter(one => !one.name.startsWith("data:")).length,
          aside: document.documentElement.scrollWidth - innerWidth, open: document.querySelectorAll(".veil.open").length,
          heat: !document.getElementById("heat-auroc").hidden && document.getElementById("heat-f1").hidden});
      });</script></head>"""
    (tmp_path / "page.html").write_text(page.replace("</head>", probe, 1))
    shot = tmp_path / "page.png"
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-sync",
        "--enable-logging=stderr",
    ]
    command = [CHROMIUM, *flags, f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},1600"]
    url = (tmp_path / "page.html").as_uri()
    dumped = subprocess.run(
        [*command, "--dump-dom", url], capture_output=True, text=True, timeout=120, env=os.environ | {"HOME": str(tmp_path)}
    )
    found = json.loads(re.search(r"<title>PROBE(.*?)</title>", dumped.stdout).group(1).replace("&quot;", '"'))
    assert found["failed"] == []
    assert found["requests"] == 0
    assert found["aside"] <= 0
    assert found["open"] == 1
    assert found["heat"]
    assert set(found["seen"]) == {"glance", "categories", "curves", "sources", "pairs", "robustness", "mistakes", "tests", "costs", "run"}
    assert "CONSOLE" not in dumped.stderr
    subprocess.run([*command, f"--screenshot={shot}", url], capture_output=True, timeout=120, env=os.environ | {"HOME": str(tmp_path)})
    from PIL import Image

    with Image.open(shot) as image:
        assert np.asarray(image.convert("L")).std() > 10  # something is drawn


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], r"nothing to evaluate: give guard=DIR"),
        (["guard=/no/such/guard"], r"'/no/such/guard' does not exist; give the folder"),
        (["baselines=[zero_shoot]"], r"there is no baseline 'zero_shoot'; there are always_unsafe, .*zero_shot"),
        (["baselines=[{zero_shot: {scala: 2}}]"], r"baseline zero_shot does not take .*it has .*scale"),
        (["baselines=[vlm]"], r"baseline vlm needs vlm.model; give baselines=\[\{vlm: \{vlm: \{model: VALUE\}\}\}\]"),
        (["baselines=[3]"], r"baselines may hold names"),
        (["baselines=[always_unsafe]", "prevalence=1"], r"prevalence must lie in \(0, 1\), got 1"),
        (["baselines=[always_unsafe]", "split_seed=x"], r"split_seed must be a whole number of at least 0, got 'x'"),
        (["baselines=[always_unsafe]", "trained_on=folder"], r"trained_on must be a list of sources, as in trained_on=\[folder\]"),
        (["baselines=[always_unsafe]", "n_resamples=3"], r"n_resamples must be a whole number of at least 100, got 3"),
    ],
)
def test_wrong_values_are_named(compose, tmp_path, overrides, message):
    from guardkit.runs.evaluate import run

    with pytest.raises(InputError, match=message):
        run(compose("evaluate", "source.n_test=2", *overrides), tmp_path)


def test_a_damaged_guard_is_refused(report, train, compose, tmp_path):
    from guardkit.runs.evaluate import run

    folder = tmp_path / "guard"
    shutil.copytree(train("experiment=unpaired").folder / "guard", folder)
    (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(InputError, match="missing or damaged"):
        run(compose("evaluate", f"guard={folder}"), tmp_path / "out")


def test_no_image_of_the_benchmark_can_be_read(compose, tmp_path):
    from guardkit.runs.evaluate import run

    for name in ("safe/a.png", "unsafe/b.png"):
        (tmp_path / "images" / name).parent.mkdir(parents=True)
        (tmp_path / "images" / name).write_text("no image")
    overrides = [
        "source=folder",
        f"source.root={tmp_path / 'images'}",
        "source.check_images=false",
        "split=all",
        "baselines=[always_unsafe]",
    ]
    with pytest.raises(InputError, match="none of the 2 images of source=folder can be read, the first is"):
        run(compose("evaluate", *overrides), tmp_path / "out")


def test_what_figures_lack_is_a_note(scenes_policy, scenes_encoder, tmp_path):
    """Texts that the encoder cuts, and a label that no image has."""
    from guardkit import FolderSource, Policy, evaluate
    from guardkit.baselines.zero_shot import zero_shot

    data = scenes_policy.to_dict()
    long = " and ".join(["a patient description of an ordinary room with a table"] * 6)
    data["categories"][0]["unsafe_texts"].append(f"a rifle in {long}")
    policy = Policy.from_dict(data)
    (tmp_path / "images/violence").mkdir(parents=True)
    for i in range(3):
        picture(i).save(tmp_path / f"images/violence/{i}.png")
    guard = zero_shot(policy, scenes_encoder, covers=None)
    report = evaluate(
        guard, FolderSource(policy, str(tmp_path / "images")), policy, output_dir=tmp_path / "out", split="all", n_resamples=100
    )
    cut, lack = report.summary["notes"]
    assert re.match("zero_shot: encoder .* reads the first .* what is beyond is cut off: 'a rifle in .*; shorten them.$", cut)
    assert (
        lack
        == "what is tested on has no safe image (3 unsafe), and without both labels there is no AUROC; choose another source= or split=all."
    )
    assert all(note in report.table for note in (cut, lack))
