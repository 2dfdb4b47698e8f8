"""One set of images under several policies: arithmetic by hand, labels by policy of every kind, retraining, one line for what is wrong."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, picture, strict_json

from guardkit import FolderSource, Policy, PolicyItemsSource, Retrained, ScenesSource, evaluate
from guardkit.artifacts import fingerprint
from guardkit.baselines.vlm_judge import VLMJudge
from guardkit.baselines.zero_shot import zero_shot
from guardkit.data.by_policy import by_category, by_own_labels
from guardkit.schema import InputError, Judgment
from guardkit.vlm.base import Answer

# what three policies say of three pairs, in SafeEditBench's layout; L1 forbids nothing
SAID = {
    "Policy L3": {"a.png": 1, "a_edited.png": 0, "b.png": 1, "b_edited.png": 0, "c.png": 0, "c_edited.png": 0},
    "Policy L1": dict.fromkeys(["a.png", "a_edited.png", "b.png", "b_edited.png", "c.png", "c_edited.png"], 0),
    "Policy L5": {"a.png": 1, "a_edited.png": 1, "b.png": 1, "b_edited.png": 0, "c.png": 1, "c_edited.png": 0},
}
IMAGES = list(SAID["Policy L3"])


@dataclass(eq=False)
class Flags:
    """Flags the named images."""

    name: str
    flagged: set
    covers = None
    threshold = 0.5

    @property
    def fingerprint(self):
        return fingerprint([self.name, sorted(self.flagged)])

    def judge(self, images):
        shown = {np.asarray(picture(i)).tobytes(): name for i, name in enumerate(IMAGES)}
        return [Judgment(float(shown[image.tobytes()] in self.flagged)) for image in images]


def items_folder(folder, *, broken=()):
    """SafeEditBench's layout: images, and a row an image and policy."""
    for i, name in enumerate(IMAGES):
        picture(i).save(folder / name)
    rows = [
        json.dumps(
            {"image_path": name, "safety_label": ["safe", "unsafe"][label], "policy_name": policy, "policy": f"The rules of {policy}."}
        )
        for policy, said in SAID.items()
        for name, label in said.items()
    ]
    (folder / "test.jsonl").write_text("\n".join([*rows, *broken]) + "\n")
    return folder


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    return items_folder(tmp_path_factory.mktemp("items"))


def test_safeeditbench_by_hand(items, tmp_path):
    """Three pairs under three policies; every number below was worked out on paper."""
    policies = PolicyItemsSource.policies_in(str(items))
    assert [(one.name, one.categories[0].definition) for one in policies] == [
        ("policy_l3", "The rules of Policy L3."),
        ("policy_l1", "The rules of Policy L1."),
        ("policy_l5", "The rules of Policy L5."),
    ]

    def reader(policy):
        """Right, but for one image under one policy."""
        level = f"Policy {policy.name[-2:].upper()}"
        return Flags(
            f"reads {level}", {name for name, label in SAID[level].items() if label} - ({"b.png"} if level == "Policy L5" else set())
        )

    report = evaluate(
        {"fixed": Flags("fixed", {"a.png", "c.png"}), "reader": reader},
        {policy.name: PolicyItemsSource(policy, str(items)) for policy in policies},
        policies=policies,
        split="all",
        output_dir=tmp_path,
        n_resamples=100,
    )
    found = strict_json(tmp_path / "summary.json")["classifiers"]

    def figure(classifier, policy, metric):
        return found[classifier]["by_policy"][policy]["figures"][metric]["value"]

    # flags a and c. L3: 1 hit, 1 alarm, 1 miss; L5: 2 hits, no alarm, 2 misses; each time 4 of 6 rightly
    assert figure("fixed", "policy_l3", "f1") == pytest.approx(1 / 2)
    assert figure("fixed", "policy_l5", "f1") == pytest.approx(2 / 3)
    assert [figure("fixed", policy.name, "accuracy") for policy in policies] == pytest.approx([4 / 6] * 3)
    # L1 forbids nothing: no F1, and not part of the mean
    assert figure("fixed", "policy_l1", "f1") is None
    overall = {name: {metric: one["value"] for metric, one in about["overall"].items()} for name, about in found.items()}
    # exceptions to L3: a and b under L1 (b rightly), a_edited and c under L5 (c rightly). All three together: 3 of 6 unsafe and 9 of 12 safe rightly
    assert overall["fixed"] == pytest.approx(
        {
            "macro_f1": 7 / 12,
            "policy_exception_rate": 1 / 2,
            "pooled_balanced_accuracy": (3 / 6 + 9 / 12) / 2,
            "policy_exception_score": 2 * 0.5 * 0.625 / (0.5 + 0.625),
        }
    )
    assert overall["reader"] == pytest.approx(
        {
            "macro_f1": (1 + 6 / 7) / 2,
            "policy_exception_rate": 1,
            "pooled_balanced_accuracy": (5 / 6 + 1) / 2,
            "policy_exception_score": 22 / 23,
        }
    )
    assert (found["fixed"]["kind"], found["reader"]["kind"]) == ("fixed", "reads")
    assert [(test["metric"], test["difference"]) for test in report.summary["tests"]] == [
        ("macro_f1", pytest.approx(7 / 12 - 13 / 14)),
        ("policy_exception_score", pytest.approx(5 / 9 - 22 / 23)),
    ]
    assert report.summary["policies"]["policy_l5"]["n_exceptions"] == 2
    assert report.summary["forbidden_and_allowed"]["policy_l3"] == {"policy_l3": 0, "policy_l1": 2, "policy_l5": 0}
    # a guard that is the same for all was asked once about each image
    assert report.summary["passes"]["judges"]["fixed"]["judged"] == report.summary["passes"]["read"] == 6
    rows = pq.read_table(tmp_path / "effectiveness.parquet").to_pylist()
    assert {row["policy"] for row in rows} == {"policy_l3", "policy_l1", "policy_l5", None}
    (macro,) = [row for row in rows if (row["classifier"], row["metric"]) == ("reader", "macro_f1")]
    assert macro["value"] == pytest.approx(13 / 14)
    assert all((row["value"] is None) == (row["reason"] is not None) for row in rows)
    predictions = pq.read_table(tmp_path / "predictions.parquet").to_pylist()
    assert len(predictions) == 6 * 3 * 2
    assert {(row["id"], row["label"]) for row in predictions if row["policy"] == "policy_l5"} == set(SAID["Policy L5"].items())
    # the accuracy stands where there is no F1
    line = next(line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("| fixed |"))
    assert "| accuracy 0.667" in line
    assert "0.583" in line
    page = (tmp_path / "report.html").read_text()
    assert all(f'<section id="{name}">' in page for name in ("glance", "policies", "differences", "figures", "tests", "costs", "run"))
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)([^"']*)""", page)


def test_a_table_with_names_for_its_numbers(items, tmp_path):
    """As the data set lies on the Hub: a Parquet file beside folders of images, with classes as numbers."""
    import pyarrow as pa

    for i, name in enumerate(IMAGES):
        (tmp_path / "test_images").mkdir(exist_ok=True)
        picture(i).save(tmp_path / "test_images" / name)
    levels = sorted(SAID)
    rows = [(name, label, levels.index(policy)) for policy, said in SAID.items() for name, label in said.items()]
    table = pa.table(
        {
            "image": [b"not read"] * len(rows),
            "image_path": [f"test_images/{name}" for name, _, _ in rows],
            "safety_label": [label for _, label, _ in rows],
            "policy_name": [level for _, _, level in rows],
            "policy": [f"The rules of {levels[level]}." for _, _, level in rows],
        }
    )
    kinds = {"safety_label": ["safe", "unsafe"], "policy_name": levels}
    about = {"info": {"features": {column: {"_type": "ClassLabel", "names": names} for column, names in kinds.items()}}}
    (tmp_path / "data").mkdir()
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(about)}), tmp_path / "data/test.parquet")
    policies = PolicyItemsSource.policies_in(str(tmp_path), "data/test.parquet")
    assert policies == PolicyItemsSource.policies_in(str(items))
    for policy in policies:
        found = PolicyItemsSource(policy, str(tmp_path), items="data/test.parquet").load()
        assert {(one.id.removeprefix("test_images/"), one.label) for one in found.train} == set(
            SAID[f"Policy {policy.name[-2:].upper()}"].items()
        )
        assert {one.group for one in found.train} == {f"test_images/{name}" for name in ("a.png", "b.png", "c.png")}


def test_broken_rows_of_an_items_file_are_one_line_each(compose, tmp_path):
    from guardkit.runs.evaluate import run

    row = {"image_path": "a.png", "safety_label": "unsafe", "policy_name": "policy l3", "policy": "The rules of Policy L3."}
    broken = [
        '{"image_path": "a.png", ',
        json.dumps(row | {"safety_label": "maybe"}),
        json.dumps(row | {"safety_label": None}),
        json.dumps(row | {"policy_name": None}),
        json.dumps(row | {"image_path": None}),
        json.dumps(row | {"image_path": "gone.png"}),
        json.dumps(row | {"image_path": "../elsewhere.png"}),
        json.dumps(row),
        json.dumps(row | {"image_path": "c.png"}),
        "[1]",
    ]
    items_folder(tmp_path, broken=broken)
    settings = [
        "source=policy_items",
        f"source.root={tmp_path}",
        "policies=items",
        "split=all",
        "baselines=[always_unsafe]",
        "n_resamples=100",
    ]
    report = run(compose("evaluate", *settings), tmp_path / "out")
    said = {one["id"]: one["reason"] for one in report.summary["benchmark"]["rejected"]}
    assert said.pop("test.jsonl row 19").startswith("not a JSON object (")
    assert said == {
        "test.jsonl row 20": "label 'maybe' is neither safe nor unsafe",
        "test.jsonl row 21": "no label",
        "test.jsonl row 22": "no policy",
        "test.jsonl row 23": "no image",
        "gone.png": "file does not exist",
        "test.jsonl row 25": "path outside the folder",
        "test.jsonl row 26": "repeats row 1",
        "test.jsonl row 5": "listed as safe and as unsafe under policy_l3",
        "test.jsonl row 27": "listed as safe and as unsafe under policy_l3",
        "test.jsonl row 28": "not a JSON object (a list instead of an object)",
    }
    assert report.summary["policies"]["policy_l3"] | {"digest": "", "categories": []} == {
        "digest": "", "categories": [], "n": 5, "n_unsafe": 2, "n_safe": 3, "n_not_judged": 1, "n_exceptions": 0
    }  # fmt: skip
    assert report.summary["notes"] == ["policy_l3 judges 5 of the 6 images; the others are left out under it."]


def test_a_column_for_each_policy(compose, tmp_path):
    from guardkit.runs.evaluate import run

    said = [SAID[f"Policy {level}"] for level in ("L3", "L5")]
    lines = [f"{name},{said[0][name]},{said[1][name]},x" for name in IMAGES]
    items_folder(tmp_path)
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,l3,l5,category", *lines]))
    for name in ("scenes_arts", "scenes_news"):
        (tmp_path / f"{name}.yaml").write_text((ROOT / f"conf/policy/{name}.yaml").read_text())
    settings = ["source=folder", f"source.root={tmp_path}", "split=all", "baselines=[always_unsafe]", "n_resamples=100"]
    settings.append(f"policies=[scenes_arts,{tmp_path / 'scenes_news.yaml'}]")
    report = run(compose("evaluate", *settings, "label_columns={scenes_arts: l3, scenes_news: l5}"), tmp_path / "out")
    figures = report.summary["classifiers"]["always_unsafe"]["by_policy"]
    assert figures["scenes_arts"]["figures"]["precision"]["value"] == pytest.approx(2 / 6)
    assert figures["scenes_news"]["figures"]["precision"]["value"] == pytest.approx(4 / 6)
    with pytest.raises(InputError, match=r"metadata.csv has no column 'l4'; it has file_name, l3, l5, category; set source.label_column"):
        run(compose("evaluate", *settings, "label_columns={scenes_arts: l3, scenes_news: l4}"), tmp_path / "out2")


def test_images_that_belong_together_stay_so_whatever_each_policy_judged(tmp_path, policies):
    """One policy judged the first and the second of a group, the other the second and the third."""
    for i, name in enumerate("abcd"):
        picture(i).save(tmp_path / f"{name}.png")
    lines = ["a.png,1,,g", "b.png,1,0,g", "c.png,,1,g", "d.png,0,0,"]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,one,two,group", *lines]))
    sources = {name: FolderSource(policies[0], str(tmp_path), label_column=name) for name in ("one", "two")}
    images = by_own_labels(sources)
    assert {record.id: record.group for record in images.loaded.train} == {
        "a.png": "a.png",
        "b.png": "a.png",
        "c.png": "a.png",
        "d.png": "d.png",
    }
    # unsafe where any policy says so
    assert {record.id: record.label for record in images.loaded.train} == {"a.png": 1, "b.png": 1, "c.png": 1, "d.png": 0}
    assert images.verdicts == {
        "one": {"a.png": (1, None), "b.png": (1, None), "d.png": (0, None)},
        "two": {"b.png": (0, None), "c.png": (1, None), "d.png": (0, None)},
    }
    assert (images.loaded.given, images.loaded.rejected) == (4, [])


def test_classes_that_each_policy_names(compose, tmp_path):
    """A class may be forbidden by one policy and be another's look-alike."""
    import io

    import pyarrow as pa
    import yaml

    from guardkit.runs.evaluate import run

    def policy(name, classes, look_alikes):
        category = {"name": name, "definition": "x", "unsafe_texts": ["x"], "classes": classes, "look_alikes": look_alikes}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"name": name, "categories": [category]}))
        return str(tmp_path / f"{name}.yaml")

    def png(i):
        buffer = io.BytesIO()
        picture(i).save(buffer, "png")
        return buffer.getvalue()

    shown = ["beer", "beer", "knife", "cup"]
    pq.write_table(pa.table({"image": [png(i) for i in range(4)], "what": shown}), tmp_path / "images.parquet")
    settings = ["source=parquet", f"source.files={tmp_path / 'images.parquet'}", "source.class_column=what", "split=all", "n_resamples=100"]
    both = f"policies=[{policy('drink', ['beer'], ['cup'])},{policy('arms', ['knife'], ['beer'])}]"
    report = run(compose("evaluate", *settings, both, "baselines=[always_unsafe]"), tmp_path / "out")
    assert {name: one["n_unsafe"] for name, one in report.summary["policies"].items()} == {"drink": 2, "arms": 1}
    assert report.summary["forbidden_and_allowed"] == {"drink": {"drink": 0, "arms": 2}, "arms": {"drink": 1, "arms": 0}}


# --- drawn scenes: policies that allow what others forbid ---------------------------------------------------------------


@pytest.fixture(scope="module")
def policies():
    return [Policy.load(ROOT / f"conf/policy/{name}.yaml") for name in ("scenes", "scenes_arts", "scenes_news")]


def test_shipped_policies_of_scenes_share_their_words(policies):
    whole = policies[0]
    for name in ("scenes_family", "scenes_arts", "scenes_news"):
        part = Policy.load(ROOT / f"conf/policy/{name}.yaml")
        assert all(whole[category.name] == category for category in part.categories)
        assert part.safe_texts == whole.safe_texts


def test_labels_of_scenes_follow_from_what_they_show(policies):
    images = by_category(ScenesSource(Policy.joined(policies), n_train=9, n_test=18), policies)
    for policy in policies:
        alone = ScenesSource(policy, n_train=9, n_test=18).load()
        mine = images.under(policy.name, 0.3, 0).load()
        for part, other in ((mine.train, alone.train), (mine.test, alone.test)):
            assert [(one.id, one.label, one.category, one.region) for one in part] == [
                (one.id, one.label, one.category, one.region) for one in other
            ]
        assert [original.id for original, _ in mine.test_pairs] == [original.id for original, _ in alone.test_pairs]
        for one in mine.test:
            shown = one.content.scene
            assert one.label == int(shown.label == 1 and shown.category in policy.category_names)
    forbidden = {policy.name: {one for one, (label, _) in images.verdicts[policy.name].items() if label} for policy in policies}
    arts, news = forbidden["scenes_arts"], forbidden["scenes_news"]
    assert arts - news
    assert news - arts
    assert arts | news < forbidden["scenes"]


def test_heads_are_retrained_for_each_policy_beside_guards_that_read_it(policies, scenes_encoder, tmp_path):
    report = evaluate(
        {"texts": lambda policy: zero_shot(policy, scenes_encoder, covers=None)},
        ScenesSource(Policy.joined(policies), n_train=120, n_test=18),
        policies=policies,
        retrain=[Retrained("linear", scenes_encoder, n_unsafe=24)],
        output_dir=tmp_path,
        n_resamples=100,
    )
    found = report.summary["classifiers"]
    assert (found["texts"]["kind"], found["linear"]["kind"]) == ("reads", "retrained")
    assert (found["texts"]["cost"]["reads_policy"], found["linear"]["cost"]["reads_policy"]) == (True, False)
    trained = {policy: about["training"] for policy, about in found["linear"]["by_policy"].items()}
    assert all(about["seconds"] > 0 and about["n_labels"] == 48 for about in trained.values())
    assert len({about["fingerprint"] for about in found["linear"]["by_policy"].values()}) == 3
    assert found["linear"]["cost"]["n_labels"] == 48
    assert found["linear"]["overall"]["policy_exception_score"]["value"] > 0.6
    # whatever the number of policies: 72 test images, 36 counterfactuals, and what was trained on before
    (encoder,) = report.summary["passes"]["encoders"].values()
    assert report.summary["passes"]["images"] == 108
    assert encoder["encoded"] <= 108 + 3 * 48
    assert report.summary["benchmark"]["n_seen_left_out"] == 0
    assert "linear" in report.table


def test_a_guard_may_read_another_policy_by_itself(items, tmp_path):
    policies = PolicyItemsSource.policies_in(str(items))

    class Reads(Flags):
        reads_policy = True

        def for_policy(self, policy):
            return Reads(policy.name, {"a.png"} if policy.name == "policy_l5" else set())

    sources = {policy.name: PolicyItemsSource(policy, str(items)) for policy in policies}
    report = evaluate(Reads("guard", set()), sources, policies=policies, split="all", output_dir=tmp_path, n_resamples=100)
    (about,) = report.summary["classifiers"].values()
    assert about["kind"] == "reads"
    recall = {policy: one["figures"]["recall"]["value"] for policy, one in about["by_policy"].items()}
    assert recall == {"policy_l3": 0, "policy_l1": None, "policy_l5": 1 / 4}


def test_a_vision_language_model_is_asked_about_each_policy(items, tmp_path):
    """One model for all policies; what it is asked has the rules of each."""
    policies = PolicyItemsSource.policies_in(str(items))

    class Model:
        name, config, asked = "model", {"model": "fake"}, 0

        def ask(self, questions):
            self.asked += len(questions)
            unsafe = ['{"verdict": "unsafe"}' if "The rules of Policy L5." in one.prompt else '{"verdict": "safe"}' for one in questions]
            return [Answer(text, n_calls=1) for text in unsafe]

    model = Model()
    judge = VLMJudge(policies[0], model, cache_dir=None)
    sources = {policy.name: PolicyItemsSource(policy, str(items)) for policy in policies}
    report = evaluate(judge, sources, policies=policies, split="all", output_dir=tmp_path, n_resamples=100)
    (about,) = report.summary["classifiers"].values()
    assert (about["kind"], about["cost"]["n_labels"]) == ("reads", 0)
    # two questions of three have the rules in them, and the one without is stored after the first policy
    recall = {policy: one["figures"]["recall"]["value"] for policy, one in about["by_policy"].items()}
    assert recall == {"policy_l3": 0, "policy_l1": None, "policy_l5": 1}
    assert model.asked == 6 * (3 + 2 + 2)


# --- what is wrong is one line ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["policies=[scenes,scenes]"], "two of the policies are called 'scenes'; give each policy a name of its own"),
        (["policies=[scenes]"], "policies must be a list of at least two, got 1; for one policy give policy= or policy_file="),
        (["policies=scenes"], r"policies must be a list of names in conf/policy and files, as in \[scenes,my.yaml\], or items, got 'scenes'"),
        (["policies=[scenes,nothing]"], "there is no policy 'nothing'; there are handled_objects, "),
        (["policies=[scenes,/no/such.yaml]"], "/no/such.yaml: there is no such policy file"),
        (["policies=items"], "policies=items takes the policies of an items file, which source=policy_items reads"),
        (["policies=[scenes,scenes_arts]", "policy=scenes"], "policy and policies are both given; give one of them"),
        (["policies=[scenes,scenes_arts]", "robustness=pixels"], "robustness is measured under one policy"),
        (["policies=[scenes,scenes_arts]", "retrain=[linear]", "split=all"], "split=all tests on the images that retrain= would train on"),
        (["policies=[scenes,scenes_arts]", "retrain=[lineer]"], "there is no head 'lineer'; there are anchored, "),
        (["policies=[scenes,scenes_arts]", "retrain=[{linear: {labels: 3}}]"], "retrain.linear does not take .*settings are encoder, n_unsafe"),
        (["policies=[scenes,scenes_arts]", "retrain=[{linear: {n_unsafe: 1}}]"], r"retrain.linear, retrained.n_unsafe must be a whole number of at least 2"),
        (["policies=[scenes,scenes_arts]", "label_columns={scenes: a}"], "label_columns must name a column for each of the policies"),
        (["policies=[scenes,scenes_arts]", "label_columns={scenes: a, scenes_arts: b}"], "and source=ScenesSource has none; leave it out"),
        (["policies=[scenes_arts,photos]"], "source=scenes .* draws scenes of nine categories, of which policy 'scenes_arts_or_photos' lacks 6"),
        (["retrain=[linear]"], r"retrain goes with several policies; give policies=\[NAME,NAME\]"),
        (["label_columns={a: b}"], "label_columns goes with several policies"),
    ],
)  # fmt: skip
def test_wrong_values_are_named(compose, tmp_path, overrides, message):
    from guardkit.runs.evaluate import run

    with pytest.raises(InputError, match=message) as found:
        run(compose("evaluate", "source.n_test=2", "source.n_train=2", "baselines=[always_unsafe]", *overrides), tmp_path)
    assert "\n" not in str(found.value)


def test_policies_that_the_labels_know_nothing_of(policies, compose, tmp_path):
    from guardkit.runs.evaluate import run

    others = [Policy.of_text("one", "No cats."), Policy.of_text("two", "No dogs.")]
    source = ScenesSource(policies[0], n_train=9, n_test=9)
    with pytest.raises(
        InputError, match=r"labels of source=scenes name animal_cruelty, .*, and none of the policies one, two has one of these"
    ):
        by_category(source, others)
    known = by_category(source, [policies[1], others[0]])
    assert [note.split(" (")[0] for note in known.notes] == ["one forbids nothing that the labels name"]
    for name in ("safe/a.png", "unsafe/b.png"):
        (tmp_path / name).parent.mkdir()
        picture(len(name)).save(tmp_path / name)
    settings = ["source=folder", f"source.root={tmp_path}", "split=all", "baselines=[always_unsafe]", "policies=[scenes,scenes_arts]"]
    with pytest.raises(InputError, match="labels of source=folder name no category of unsafe images"):
        run(compose("evaluate", *settings), tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"items": 5}, "source.items must be a path, got 5"),
        ({"items": "none.jsonl"}, "source.items none.jsonl is not a file in "),
        ({"label_column": "label"}, "test.jsonl has no column 'label'; it has image_path, safety_label, policy_name, policy; set source.label_column"),
        ({}, r"test.jsonl has no row of policy 'policy_l9'; it has rows of policy_l1, policy_l3, policy_l5; give one of these"),
    ],
)  # fmt: skip
def test_an_items_file_that_does_not_fit(items, change, message):
    with pytest.raises(InputError, match=message):
        PolicyItemsSource(Policy.of_text("policy_l9", "Nothing."), str(items), **change).load()


def test_policies_without_their_texts(items, tmp_path):
    with pytest.raises(InputError, match="has no text of policy 'policy_l3' in column 'rules'; set source.text_column"):
        PolicyItemsSource.policies_in(str(items), text_column="rules")
    changed = (items / "test.jsonl").read_text().replace("The rules of Policy L5.", "Other rules.", 1)
    (tmp_path / "test.jsonl").write_text(changed)
    with pytest.raises(InputError, match=r"row 14 gives policy 'Policy L5' another text \('The rules of Policy L5.'\) than row 13"):
        PolicyItemsSource.policies_in(str(tmp_path))


def test_one_guard_for_one_policy_still_needs_one(scenes_encoder, tmp_path, policies):
    with pytest.raises(InputError, match="makes a guard of a policy, which goes with several"):
        evaluate(lambda policy: zero_shot(policy, scenes_encoder, covers=None), ScenesSource(policies[0]), output_dir=tmp_path)
    with pytest.raises(InputError, match="a source for each policy, and heads to retrain, go with several policies"):
        evaluate(Flags("f", set()), {"scenes": ScenesSource(policies[0])}, output_dir=tmp_path)
