"""A guard in the places that other libraries have: transformers' shape, datasets, and interfaces of libraries that are not installed."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import pytest
import torch
from conftest import picture, strict_json

from guardkit import (
    Band,
    GuardClassifier,
    ImageError,
    InputError,
    Thresholds,
    coop_signals,
    curator_stage,
    dataset_columns,
    image_classifier,
    threatexchange_classifier,
)
from guardkit.heads import LinearHead
from guardkit.images import encode_png


@pytest.fixture(scope="module")
def guard(scenes_encoder, scenes_policy):
    torch.manual_seed(0)
    head = LinearHead.build(scenes_encoder, scenes_policy)
    torch.nn.init.normal_(head.linear.weight, std=0.3)
    names = scenes_policy.category_names
    thresholds = Thresholds(Band(0.3, 0.7), dict.fromkeys(names, Band(0.4, 0.8)))
    measured = {"test": {"auroc": 0.91, "by_category": {}, "n": 40}}
    return GuardClassifier(head, scenes_encoder, scenes_policy, threshold=thresholds, training={"experiment": "unpaired"}, metrics=measured)


@pytest.fixture(scope="module")
def images():
    return [picture(seed) for seed in range(5)]


@pytest.fixture(scope="module")
def scores(guard, images):
    return [{"unsafe": one.score, **one.categories} for one in guard.predict(images)]


# --- transformers ----------------------------------------------------------------------------------------------------------


def test_the_classifier_has_the_shape_of_the_pipeline_of_transformers(guard, images, scores):
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, pipeline

    labels = dict(enumerate(["unsafe", *guard.policy.category_names]))
    config = ViTConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16)
    config.id2label = labels
    theirs = pipeline(
        "image-classification", model=ViTForImageClassification(config), image_processor=ViTImageProcessor(size={"height": 32, "width": 32})
    )
    ours = image_classifier(guard)
    assert (ours.task, ours.id2label) == (theirs.task, labels)

    def shape(answer):
        return sorted(answer) if isinstance(answer, dict) else [shape(one) for one in answer]

    for inputs in (images[0], images[:3], [images[0]]):
        assert shape(ours(inputs)) == shape(theirs(inputs))
        assert shape(ours(inputs, top_k=2, function_to_apply="softmax")) == shape(theirs(inputs, top_k=2, function_to_apply="softmax"))
    for answer, expected in zip(ours(images, top_k=20), scores, strict=True):
        assert {one["label"]: one["score"] for one in answer} == pytest.approx(expected, abs=1e-5)
        assert answer == sorted(answer, key=lambda one: -one["score"])
    assert len(image_classifier(guard, top_k=1)(images[0])) == 1
    assert len(image_classifier(guard, top_k=None)(images[0])) == len(labels)


def test_the_classifier_keeps_errors_apart_and_reads_as_it_goes(guard, images, tmp_path):
    images[0].save(tmp_path / "a.png")
    classify = image_classifier(guard)
    good, bad, other = classify([str(tmp_path / "a.png"), b"rubbish", images[1]])
    assert bad == [{"label": "error", "score": None, "error": "not an image of a known type"}]
    assert good[0]["score"] > good[1]["score"]
    assert len(other) == 5
    assert classify(str(tmp_path / "none.png"))[0]["label"] == "error"
    assert classify([]) == []
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield images[len(taken) % 5]

    answers = classify(endless())
    assert len(next(answers)) == 5
    assert len(taken) == guard.encoder.batch_size
    array = np.stack([np.asarray(image) for image in images])
    assert len(classify(array)) == 5
    assert isinstance(classify(array[0])[0], dict)
    with pytest.raises(InputError, match="top_k must be a whole number of at least 1"):
        classify(images, top_k=0)


# --- datasets --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decode", [True, False])
def test_columns_of_a_dataset(guard, images, decode):
    import datasets

    features = datasets.Features({"image": datasets.Image(decode=decode), "name": datasets.Value("string")})
    cells = [{"bytes": encode_png(np.asarray(image)), "path": None} for image in images]
    if not decode:
        cells[2]["bytes"] = b"rubbish"
    data = datasets.Dataset.from_dict({"image": cells, "name": list("abcde")}, features=features)
    mapped = data.map(dataset_columns(guard, scope=guard.policy.category_names), batched=True, batch_size=2)
    about = ["guard_action", "guard_score", "guard_violated", "guard_error"]
    assert mapped.column_names == ["image", "name", *about, *(f"guard_{name}" for name in guard.policy.category_names)]
    assert mapped["name"][:] == list("abcde")
    expected = guard.predict(images, scope=guard.policy.category_names)
    for i, (row, decision) in enumerate(zip(mapped.remove_columns("image"), expected, strict=True)):
        if not decode and i == 2:
            assert np.isnan(row["guard_score"])
            assert [row[name] for name in about if name != "guard_score"] == ["error", "", "not an image of a known type"]
        else:
            assert [row[name] for name in about] == [
                decision.action,
                pytest.approx(decision.score, abs=1e-5),
                ", ".join(decision.violated),
                "",
            ]
    with pytest.raises(InputError, match="has a column 'guard_action' already; give another prefix="):
        mapped.map(dataset_columns(guard), batched=True)
    with pytest.raises(InputError, match="has no column 'picture'; give column= one of image, name"):
        data.map(dataset_columns(guard, column="picture"), batched=True)
    assert len(data.map(dataset_columns(guard, categories=False), batched=True, num_proc=None if decode else 2).column_names) == 6


def test_the_first_batch_says_nothing_of_the_types_of_the_others(guard, images):
    import datasets

    data = datasets.Dataset.from_dict({"image": [encode_png(np.asarray(images[0])), b"rubbish", encode_png(np.asarray(images[1]))]})
    for order in ([0, 1, 2], [1, 0, 2]):
        mapped = data.select(order).map(dataset_columns(guard), batched=True, batch_size=1)
        assert [bool(text) for text in mapped["guard_error"]] == [i == 1 for i in order]


def test_a_cell_without_an_image_is_an_error(guard, images, tmp_path):
    images[0].save(tmp_path / "a.png")
    cells = [None, {"bytes": None, "path": str(tmp_path / "a.png")}, {"bytes": None, "path": None}, {"path": "http://a.test/b.png"}]
    assert dataset_columns(guard)({"image": cells})["guard_action"] == ["error", guard.predict(images[0])[0].action, "error", "error"]


# --- libraries that are not here -------------------------------------------------------------------------------------------


@pytest.fixture
def install(monkeypatch):
    """install("a.b", Name=value): a module of a library that is not installed; its packages are made with it."""

    def make(name, **contents):
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            if ".".join(parts[:i]) not in sys.modules:
                monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
        for key, value in contents.items():
            setattr(sys.modules[name], key, value)

    return make


@pytest.mark.parametrize(
    ("adapter", "module", "reason"),
    [
        (threatexchange_classifier, "threatexchange", "needs it; install it with: pip install threatexchange"),
        (curator_stage, "nemo_curator", "needs it; install it with: pip install nemo-curator"),
    ],
)
def test_a_library_that_is_missing_is_named(guard, monkeypatch, adapter, module, reason):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=reason):
        adapter(guard)


@pytest.fixture
def threatexchange(install):
    """The parts of threatexchange 1.2.17 that the adapter uses."""

    @dataclass
    class ClassificationInfo:
        is_match: bool

    Info = TypeVar("Info", bound=ClassificationInfo)

    @dataclass
    class ClassificationResult(Generic[Info]):
        labels: dict[str, Info]

    class Classifier:
        pass

    class PhotoContent:
        pass

    class TextContent:
        get_name = classmethod(lambda cls: "text")

    classes = {"ClassificationInfo": ClassificationInfo, "ClassificationResult": ClassificationResult, "Classifier": Classifier}
    install("threatexchange.classifier.classifier", **classes)
    install("threatexchange.content_type.photo", PhotoContent=PhotoContent)
    return PhotoContent, TextContent


def test_a_classifier_of_threatexchange(guard, images, scores, threatexchange, tmp_path):
    photo, text = threatexchange
    classifier = threatexchange_classifier(guard)
    assert classifier.get_content_types() == [photo]
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.png")
        labels = classifier.classify(photo, str(tmp_path / f"{i}.png")).labels
        assert {name: info.score for name, info in labels.items()} == pytest.approx(scores[i], abs=1e-5)
        assert labels["unsafe"].is_match == (scores[i]["unsafe"] >= 0.3)
        assert labels["unsafe"].is_match == any(info.is_match for name, info in labels.items() if name != "unsafe")
        assert labels["unsafe"].weight_str() == f"{labels['unsafe'].score:.1%}"
    with pytest.raises(ImageError, match="file does not exist"):
        classifier.classify(photo, str(tmp_path / "none.png"))
    with pytest.raises(ImageError, match="is a URL, and nothing is fetched"):
        classifier.classify(photo, "https://a.test/b.png")
    with pytest.raises(InputError, match="a guard classifies photos, got text"):
        classifier.classify(text, "words")


@pytest.fixture
def curator(install):
    """The parts of nemo_curator 1.4.0 that the adapter uses."""
    Given, Made = TypeVar("Given"), TypeVar("Made")

    class ProcessingStage(Generic[Given, Made]):
        name = "ProcessingStage"

    @dataclass
    class ImageObject:
        image_path: str = ""
        metadata: dict = field(default_factory=dict)
        image_data: np.ndarray | None = None
        nsfw_score: float | None = None

    @dataclass
    class ImageBatch:
        dataset_name: str
        data: list[ImageObject] = field(default_factory=list)
        _metadata: dict = field(default_factory=dict)
        task_id: str = field(init=False, default="")

    install("nemo_curator.stages.base", ProcessingStage=ProcessingStage)
    install("nemo_curator.tasks", ImageBatch=ImageBatch)
    return ImageObject, ImageBatch


def test_a_stage_of_curator(guard, images, scores, curator, tmp_path):
    image_object, batch = curator
    images[0].save(tmp_path / "a.png")
    given = [
        image_object(image_path=str(tmp_path / "a.png")),
        *(image_object(image_data=np.asarray(one)) for one in images[1:]),
        image_object(),
    ]
    task = batch("data", given, _metadata={"key": 1})
    stage = curator_stage(guard)
    assert (stage.name, stage.inputs(), stage.outputs()) == ("guardkit", (["data"], []), (["data"], []))
    done = stage.process(task)
    assert (done.dataset_name, done._metadata, len(done.data)) == ("data", {"key": 1}, 6)
    assert [one.nsfw_score for one in done.data[:5]] == pytest.approx([one["unsafe"] for one in scores], abs=1e-5)
    assert not done.data[5].nsfw_score < 1  # NaN: kept by no threshold
    actions = [one.metadata["guardkit"]["action"] for one in done.data]
    assert actions == [*(one.action for one in guard.predict(images)), "error"]
    json.dumps([one.metadata for one in done.data], allow_nan=False)
    kept = curator_stage(guard, drop=("error", "block")).process(task).data
    assert [one.metadata["guardkit"]["action"] for one in kept] == [one for one in actions if one in ("allow", "review")]
    with pytest.raises(InputError, match="drop must be one of allow, review, block, error, got 'unsafe'"):
        curator_stage(guard, drop=["unsafe"])


def test_signals_of_coop(guard, images, scores, tmp_path):
    coop = coop_signals(guard)
    coop.save(tmp_path / "coop.json")
    saved = strict_json(tmp_path / "coop.json")
    manifest, signals = saved["manifest"], saved["signals"]
    assert manifest["id"] == "GUARDKIT_SCENES"
    assert manifest["signalTypeIds"] == [one["id"]["type"] for one in signals] == [
        f"GUARDKIT_SCENES_{name.upper()}" for name in ("unsafe", *guard.policy.category_names)
    ]  # fmt: skip
    assert signals[0]["recommendedThresholds"] == {"highPrecisionThreshold": 0.7, "highRecallThreshold": 0.3}
    assert signals[1]["recommendedThresholds"] == {"highPrecisionThreshold": 0.8, "highRecallThreshold": 0.4}
    sections = {one["id"]: {entry["label"]: entry["value"] for entry in one["fields"]} for one in manifest["modelCard"]["sections"]}
    # REQUIRED_MODEL_CARD_SECTION_IDS of Coop's types
    assert set(sections) == {
        "trainingData", "policyAndTaxonomy", "annotationMethodology", "performanceBenchmarks", "biasAndLimitations",
        "implementationGuidance", "relevantLinks",
    }  # fmt: skip
    assert all(isinstance(value, str) for fields in sections.values() for value in fields.values())
    assert sections["performanceBenchmarks"] == {"auroc": "0.91", "n": "40", "Promises": "none: it was not calibrated"}
    for kind, name in zip(manifest["signalTypeIds"], scores[0], strict=True):
        assert coop.run(kind, images[0]) == {"outputType": {"scalarType": "NUMBER"}, "score": pytest.approx(scores[0][name], abs=1e-5)}
    with pytest.raises(ImageError, match="not an image"):
        coop.run(manifest["signalTypeIds"][0], b"rubbish")
    with pytest.raises(InputError, match="there is no signal 'SAFE'; there are GUARDKIT_SCENES_UNSAFE, "):
        coop.run("SAFE", images[0])
