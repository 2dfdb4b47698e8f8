"""A guard on disk: it travels, it replaces guards only, and nothing that its files say is believed unchecked."""

from __future__ import annotations

import copy
import hashlib
import importlib
import json
import os
import pickle
import shutil
import stat
import sys

import numpy as np
import pytest
import torch
from conftest import picture
from safetensors.torch import load_file, save_file

from guardkit import Band, GuardClassifier
from guardkit.artifacts import fingerprint, shipped, written
from guardkit.encoders.open_clip import OpenClipEncoder
from guardkit.heads import AnchoredHead, LinearHead, MLPHead, PromptHead
from guardkit.schema import InputError

IMAGES = [np.asarray(picture(seed)) for seed in range(3)]


def make(encoder, policy, kind=LinearHead, **options):
    torch.manual_seed(0)
    head = kind.build(encoder, policy)
    for value in head.parameters():
        torch.nn.init.normal_(value, std=0.1) if value.ndim == 2 else None
    points = {
        "balanced": {"threshold": 0.4, "recall": 1.0, "fpr": 0.0, "fpr_ci_high": 0.3, "n_unsafe": 9, "n_safe": 9},
        "fpr_0.01": {
            "threshold": None, "recall": None, "fpr": None, "fpr_ci_high": None, "n_unsafe": 9, "n_safe": 9, "reason": "it rests on 9 safe images",
        },
    }  # fmt: skip
    return GuardClassifier(
        head, encoder, policy, operating_points=points, training={"prevalence": 0.5, "experiment": "unpaired"}, **options
    )


@pytest.fixture(scope="module")
def guard(scenes_encoder, scenes_policy):
    return make(scenes_encoder, scenes_policy)


@pytest.fixture
def folder(guard, tmp_path):
    return guard.save_pretrained(tmp_path / "run" / "guard")


@pytest.fixture(scope="module")
def moved(scenes_policy, tmp_path_factory):
    """A guard whose encoder was in a folder that is no longer there, and the folder that holds it now."""
    here = tmp_path_factory.mktemp("models")
    shutil.copytree(shipped("guardkit:scenes_clip"), here / "old" / "clip")
    encoder = OpenClipEncoder(None, f"local-dir:{here / 'old' / 'clip'}")
    trained = make(encoder, scenes_policy)
    scores = [decision.score for decision in trained.predict(IMAGES)]
    folder = trained.save_pretrained(here / "guard")
    other = here / "new" / "a" / "other"
    shutil.copytree(here / "old" / "clip", other)
    config = json.loads((other / "open_clip_config.json").read_text())
    config["preprocess_cfg"]["mean"] = [0.4, 0.4, 0.4]
    (other / "open_clip_config.json").write_text(json.dumps(config))
    shutil.move(here / "old" / "clip", here / "new" / "b" / "clip")
    return folder, here / "new", scores


# --- it travels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_can_be_read_by_whom_the_umask_allows(guard, tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        folder = guard.save_pretrained(tmp_path / "guard")
    finally:
        os.umask(before)
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == dict.fromkeys(
        ["config.json", "model.safetensors", "policy.yaml", "README.md"], mode
    )


def test_a_writer_of_private_files_leaves_a_usual_one(tmp_path):
    with written(tmp_path / "a.bin") as temporary:
        temporary.write_bytes(b"x")
        temporary.chmod(0o600)
    (tmp_path / "usual").touch()
    assert (tmp_path / "a.bin").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_an_encoder_that_moved_is_asked_for_with_the_call_that_helps(moved):
    folder, _, _ = moved
    with pytest.raises(InputError) as caught:
        GuardClassifier.from_pretrained(folder)
    said = str(caught.value)
    assert "\n" not in said
    for part in (
        "needs encoder local-dir:",
        "could not be had where it was recorded",
        "from_pretrained(..., encoder=...)",
        "a folder that",
    ):
        assert part in said


def test_an_encoder_that_moved_is_found_by_its_weights(moved):
    folder, models, scores = moved
    places = [models, str(models), models / "b" / "clip", f"local-dir:{models / 'b' / 'clip'}", "guardkit:scenes_clip"]
    places += [next((models / "b" / "clip").glob("*.safetensors"))]
    for place in places:
        loaded = GuardClassifier.from_pretrained(folder, encoder=place, batch_size=2, device="cpu")
        assert (loaded.encoder.batch_size, loaded.encoder.device) == (2, "cpu")
        assert [decision.score for decision in loaded.predict(IMAGES)] == pytest.approx(scores, abs=1e-6)


def test_another_encoder_is_refused_wherever_it_comes_from(moved, tmp_path):
    folder, models, _ = moved
    with pytest.raises(InputError, match=r"needs encoder local-dir:.*clip \(256-d.*, got local-dir:.*other"):
        GuardClassifier.from_pretrained(folder, encoder=models / "a" / "other")
    with pytest.raises(InputError, match="none of the 1 models below .* has these weights"):
        GuardClassifier.from_pretrained(folder, encoder=models / "a")
    with pytest.raises(InputError, match="holds no model"):
        GuardClassifier.from_pretrained(folder, encoder=tmp_path)
    with pytest.raises(InputError, match="could not be had as encoder=openai .*no folder and no file"):
        GuardClassifier.from_pretrained(folder, encoder="openai")
    with pytest.raises(InputError, match="encoder must be a folder .* got int"):
        GuardClassifier.from_pretrained(folder, encoder=3)


def test_settings_of_an_encoder_that_is_there_are_refused(folder, scenes_encoder):
    with pytest.raises(InputError, match="device and batch_size belong to an encoder that is built here"):
        GuardClassifier.from_pretrained(folder, encoder=scenes_encoder, device="cpu", batch_size=4)


def test_the_folder_of_the_run_and_the_home_directory_will_do(folder, scenes_encoder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent.parent))
    for place in (folder.parent, "~/run", "~/run/guard"):
        assert GuardClassifier.from_pretrained(place, encoder=scenes_encoder).training["experiment"] == "unpaired"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda guard: pickle.loads(pickle.dumps(guard))], ids=["deepcopy", "pickle"])
def test_a_copy_decides_alike(guard, copied):
    scores = [decision.score for decision in guard.predict(IMAGES)]
    twin = copied(guard)
    assert [decision.score for decision in twin.predict(IMAGES)] == scores
    assert twin.fingerprint == guard.fingerprint
    with torch.no_grad():
        twin.head.linear.bias += 1
    twin.threshold = 0.9
    assert [decision.score for decision in guard.predict(IMAGES)] == scores
    assert guard.threshold == 0.5


def test_a_pickled_guard_is_small_and_notices_other_weights(tmp_path, scenes_policy):
    place = tmp_path / "clip"
    shutil.copytree(shipped("guardkit:scenes_clip"), place)
    data = pickle.dumps(make(OpenClipEncoder(None, f"local-dir:{place}"), scenes_policy))
    assert len(data) < 1 << 17
    weights = next(place.glob("*.safetensors"))
    save_file({name: value * 1.01 if value.is_floating_point() else value for name, value in load_file(weights).items()}, weights)
    with pytest.raises(InputError, match="changed after it was pickled"):
        pickle.loads(data).predict(IMAGES)


# --- what it overwrites -----------------------------------------------------------------------------------------------


def test_a_folder_of_something_else_is_left_alone(guard, tmp_path):
    for name, text in (("notes.txt", "mine"), ("config.json", '{"model_type": "clip"}'), ("README.md", "mine"), ("policy.yaml", "mine")):
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        (folder / name).write_text(text)
        with pytest.raises(InputError, match=f"holds '{name}', which is not a guard's; save the guard in a new or empty folder"):
            guard.save_pretrained(folder)
        assert {path.name: path.read_text() for path in folder.iterdir()} == {name: text}
    with pytest.raises(InputError, match="is a file"):
        guard.save_pretrained(tmp_path / "notes_txt" / "notes.txt")


def test_a_guard_replaces_a_guard_whole(guard, folder, scenes_encoder, scenes_policy):
    (folder / ".gitattributes").write_text("")
    make(scenes_encoder, scenes_policy, MLPHead, threshold=0.7).save_pretrained(folder)
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "policy.yaml", "README.md", ".gitattributes"}
    loaded = GuardClassifier.from_pretrained(folder, encoder=scenes_encoder)
    assert (loaded.head.kind, loaded.threshold) == ("mlp", 0.7)
    (folder / "mine.txt").touch()
    with pytest.raises(InputError, match="holds 'mine.txt'"):
        guard.save_pretrained(folder)


def test_a_write_that_fails_leaves_the_old_guard_whole(guard, folder, scenes_encoder, monkeypatch):
    import guardkit.guard_folder

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(guardkit.guard_folder, "model_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        guard.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert GuardClassifier.from_pretrained(folder, encoder=scenes_encoder).threshold == 0.5


# --- what it believes -------------------------------------------------------------------------------------------------


def sign(folder, change):
    """Changes config.json as somebody who knows how its digest is made."""
    config = json.loads((folder / "config.json").read_text())
    del config["digest"]
    change(config)
    text = json.dumps(config)
    try:
        config["digest"] = fingerprint(config)
        text = json.dumps(config)
    except ValueError:
        text = text[:-1] + ', "digest": "0"}'
    (folder / "config.json").write_text(text)


def put(*path_and_value):
    *path, last, value = path_and_value

    def change(config):
        for key in path:
            config = config[key]
        config[last] = value

    return change


def drop(*path):
    def change(config):
        for key in path[:-1]:
            config = config[key]
        del config[path[-1]]

    return change


TAMPERED = {
    "threshold below": (put("thresholds", "decision", "review", -1), r"thresholds.decision.review must be a number in \[0, 1\], got -1"),
    "threshold text": (put("thresholds", "decision", "block", "x"), r"thresholds.decision.block must be a number in \[0, 1\], got \"x\""),
    "threshold true": (put("thresholds", "decision", "block", True), "thresholds.decision.block must be"),
    "threshold null": (put("thresholds", "decision", "review", None), "thresholds.decision.review must be"),
    "threshold huge": (put("thresholds", "decision", "review", 10**400), "a number that is too large"),
    "threshold NaN": (put("thresholds", "decision", "review", float("nan")), "is no JSON number"),
    "threshold infinite": (put("thresholds", "decision", "block", float("inf")), "is no JSON number"),
    "thresholds crossed": (put("thresholds", "decision", "review", 0.9), "thresholds.decision.review must not be above"),
    "no threshold": (drop("thresholds"), "thresholds is missing"),
    "no band of the decision": (drop("thresholds", "decision"), "thresholds.decision must have review and block"),
    "a category without a band": (put("thresholds", "categories", {}), "thresholds.categories must be those of the guard"),
    "a band with more": (put("thresholds", "decision", "warn", 0.1), "thresholds.decision must have review and block"),
    "a calibration that is a number": (put("calibration", 3), "a calibration must have a map for the decision"),
    "a calibration that turns scores round": (
        put("calibration", {"decision": {"kind": "platt", "knots": [0], "values": [0], "slopes": [-1, -1]}, "categories": {}, "about": {}}),
        "knots and values must increase, and slopes be above 0",
    ),
    "promises that are no texts": (
        put(
            "calibration",
            {"decision": {"kind": "platt", "knots": [0], "values": [0], "slopes": [1, 1]}, "categories": {}, "about": {"promises": [1]}},
        ),
        "promises of a calibration must be a list of texts",
    ),
    "a calibrated category that is not there": (
        put(
            "calibration",
            {
                "decision": {"kind": "platt", "knots": [0], "values": [0], "slopes": [1, 1]},
                "categories": {"spam": {"kind": "platt", "knots": [0], "values": [0], "slopes": [1, 1]}},
                "about": {},
            },
        ),
        "calibration has the category 'spam'",
    ),
    "history a text": (put("history", "x"), "history must be a list of objects"),
    "no head": (drop("head"), "head is missing"),
    "no digest of the policy": (drop("policy", "digest"), "policy.digest is missing"),
    "head of another kind": (put("head", "kind", "forest"), "head.kind must be one of linear"),
    "head kind a list": (put("head", "kind", []), "head.kind must be one of linear"),
    "width": (put("head", "settings", "dim", 10**15), "head.settings.dim must be 256, as encoder"),
    "another width": (put("head", "settings", "dim", 255), "head.settings.dim must be 256, as encoder"),
    "unknown setting": (put("head", "settings", "hooks", 1), "head.settings must be among dim, n_categories, whitened"),
    "setting of another type": (put("head", "settings", "whitened", "yes"), "head.settings.whitened must be true or false"),
    "whitened weights": (put("head", "settings", "whitened", True), "map is not there, expected float32"),
    "categories": (put("categories", 0, "nudity"), "categories must be those of"),
    "more categories": (put("categories", ["a"] * 99999), "head.settings.n_categories must be 99999"),
    "categories a text": (put("categories", "abc"), "categories must be a list"),
    "a point out of range": (put("operating_points", "balanced", "threshold", 7), "operating_points.balanced.threshold must be"),
    "a point without reason": (drop("operating_points", "fpr_0.01", "reason"), "operating_points.fpr_0.01.reason is missing"),
    "a point that is a number": (put("operating_points", "balanced", 0.5), "operating_points.balanced must be an object"),
    "points a list": (put("operating_points", []), "operating_points must be an object"),
    "notes a text": (put("metrics", "notes", "good"), "metrics.notes must be a list of texts"),
    "metrics a list": (put("metrics", [1]), "metrics must be an object"),
    "test metrics a text": (put("metrics", "test", "good"), "metrics.test must be an object"),
    "training": (put("training", "experiment", ["x"]), "training.experiment must be a text"),
    "fingerprint": (put("encoder", "fingerprint", "abc"), "encoder.fingerprint must be 64 hex digits"),
    "format": (put("format", 99), "has guard format 99, this guardkit reads 1 and 2"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_configuration_signed_anew_is_refused_in_one_line(folder, scenes_encoder, name):
    change, message = TAMPERED[name]
    sign(folder, change)
    with pytest.raises(InputError, match=message) as caught:
        GuardClassifier.from_pretrained(folder, encoder=scenes_encoder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            put("encoder", "config", "hook", "x"),
            "encoder.config must be among architecture, weights, preprocess, backend, decode, dtype, got architecture, backend, decode, dtype, hook",
        ),
        (
            put("encoder", "config", "device", "cuda"),
            "encoder.config must be among architecture, weights, preprocess, backend, decode, dtype, got",
        ),
        (put("encoder", "config", "weights", 3), "encoder.config.weights must be a text, got 3"),
        (put("encoder", "config", "preprocess", [1]), r"encoder.config.preprocess must be an object or null, got \[1\]"),
        (drop("encoder", "config", "weights"), "encoder.config.weights is missing"),
        (put("encoder", "kind", "flux"), "encoder.kind must be one of open_clip, .*, or package.module:Class, got"),
    ],
)
def test_an_encoder_is_built_of_nothing_but_its_arguments(folder, change, message):
    sign(folder, change)
    with pytest.raises(InputError, match=message) as caught:
        GuardClassifier.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_a_guard_that_names_no_kind_of_encoder_has_one_of_open_clip(guard, folder, scenes_encoder):
    sign(folder, drop("encoder", "kind"))
    loaded = GuardClassifier.from_pretrained(folder)
    assert type(loaded.encoder) is OpenClipEncoder
    assert [one.score for one in loaded.predict(IMAGES)] == [one.score for one in guard.predict(IMAGES)]


# --- parts of other packages --------------------------------------------------------------------------------------------

MINE = """
from guardkit.encoders.open_clip import OpenClipEncoder
from guardkit.heads import Head, LinearHead

class MyHead(LinearHead):
    pass

class Sized(LinearHead):
    def __init__(self, dim, n_logits):
        super().__init__(dim, n_logits - 1)
        self.config = {"dim": dim, "n_logits": n_logits}
        self.words = {10: "ten", 11: "eleven"}[n_logits]

    @classmethod
    def build(cls, encoder, policy):
        return cls(encoder.dim, 1 + len(policy.categories))

class MyEncoder(OpenClipEncoder):
    pass

class Gone(OpenClipEncoder):
    def __init__(self, architecture, weights, *, preprocess=None, backend=None, decode="full", dtype="float32"):
        open("/nowhere/at all")
"""


@pytest.fixture
def foreign(tmp_path, monkeypatch, scenes_policy):
    """A guard whose head and encoder are of a package of somebody else, and the package's name; it is not imported."""
    (tmp_path / "site" / "minepackage").mkdir(parents=True)
    (tmp_path / "site" / "minepackage" / "__init__.py").touch()
    (tmp_path / "site" / "minepackage" / "parts.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path / "site")
    parts = importlib.import_module("minepackage.parts")
    guard = make(parts.MyEncoder(None, "guardkit:scenes_clip"), scenes_policy, parts.MyHead)
    folder = guard.save_pretrained(tmp_path / "guard")
    for name in ("minepackage", "minepackage.parts"):
        monkeypatch.delitem(sys.modules, name)
    yield folder, guard
    for name in ("minepackage", "minepackage.parts"):
        sys.modules.pop(name, None)


def test_code_of_another_package_is_not_imported_unasked(foreign):
    folder, _ = foreign
    for trust in ((), ["otherpackage"], ["os"]):
        with pytest.raises(InputError) as caught:
            GuardClassifier.from_pretrained(folder, trust=trust)
        assert "minepackage" not in sys.modules
        said = str(caught.value)
        assert "\n" not in said
        for part in ("head minepackage.parts:MyHead", "encoder minepackage.parts:MyEncoder", 'trust=["minepackage"]', "head= and encoder="):
            assert part in said


def test_a_trusted_package_is_imported(foreign):
    folder, guard = foreign
    loaded = GuardClassifier.from_pretrained(folder, trust=["minepackage"])
    assert (loaded.head.kind, type(loaded.encoder).__name__) == ("minepackage.parts:MyHead", "MyEncoder")
    assert [one.score for one in loaded.predict(IMAGES)] == [one.score for one in guard.predict(IMAGES)]
    assert 'from_pretrained("THIS_FOLDER", trust=["minepackage"])' in (folder / "README.md").read_text()


def test_parts_that_are_given_need_no_import(foreign):
    folder, guard = foreign
    for head in (type(guard.head), guard.head):
        loaded = GuardClassifier.from_pretrained(folder, encoder=guard.encoder, head=head)
        assert loaded.head is not guard.head
        assert [one.score for one in loaded.predict(IMAGES)] == [one.score for one in guard.predict(IMAGES)]
    assert "minepackage" not in sys.modules
    with pytest.raises(InputError, match=r"needs code that is not guardkit's \(encoder minepackage.*or the part itself as encoder="):
        GuardClassifier.from_pretrained(folder, head=type(guard.head))
    with pytest.raises(InputError, match="a head of kind minepackage.parts:MyHead, got head=mlp; give the class that it was trained with"):
        GuardClassifier.from_pretrained(folder, encoder=guard.encoder, head=MLPHead)
    with pytest.raises(InputError, match="head must be a subclass of guardkit.heads.Head.*got torch.nn.modules.linear:Linear"):
        GuardClassifier.from_pretrained(folder, encoder=guard.encoder, head=torch.nn.Linear(2, 2))


def test_what_a_trusted_class_is_given_must_fit_the_rest(foreign):
    folder, guard = foreign
    parts = importlib.import_module("minepackage.parts")
    make(guard.encoder, guard.policy, parts.Sized).save_pretrained(folder)
    given = {"encoder": guard.encoder, "trust": ["minepackage"]}
    assert GuardClassifier.from_pretrained(folder, **given).head.words == "ten"
    sign(folder, put("head", "settings", "n_logits", 12))
    with pytest.raises(InputError, match=r"do not make a head of kind 'minepackage.parts:Sized' \(12\)"):
        GuardClassifier.from_pretrained(folder, **given)
    sign(folder, put("head", "settings", "n_logits", 11))
    resign_weights(folder, lambda tensors: {name: torch.cat([value, value[:1]]) for name, value in tensors.items()})
    with pytest.raises(InputError, match=r"does not fit its configuration: .* the head must give float32 logits of shape \(2, 10\)"):
        GuardClassifier.from_pretrained(folder, **given)


def test_an_encoder_of_another_width_than_the_guard_says_is_refused(folder, scenes_encoder):
    resign_weights(folder, lambda tensors: tensors | {"linear.weight": tensors["linear.weight"][:, :255].clone()})
    sign(folder, put("head", "settings", "dim", 255))
    sign(folder, put("encoder", "dim", 255))
    with pytest.raises(InputError, match=r"needs encoder guardkit:scenes_clip \(255-d, .* got guardkit:scenes_clip \(256-d"):
        GuardClassifier.from_pretrained(folder, encoder=scenes_encoder)


def test_a_foreign_encoder_whose_files_are_gone_is_told_in_one_line(foreign):
    folder, _ = foreign
    sign(folder, put("encoder", "kind", "minepackage.parts:Gone"))
    with pytest.raises(InputError, match=r"could not be had where it was recorded \(FileNotFoundError: .*/nowhere/at all"):
        GuardClassifier.from_pretrained(folder, trust=["minepackage"])


def test_a_class_of_a_notebook_can_only_be_given(foreign):
    folder, guard = foreign
    sign(folder, put("head", "kind", "__main__:MyHead"))
    with pytest.raises(InputError) as caught:
        GuardClassifier.from_pretrained(folder, encoder=guard.encoder)
    assert str(caught.value).endswith("if you do, give the part itself as head=")
    assert GuardClassifier.from_pretrained(folder, encoder=guard.encoder, head=type(guard.head)).head.kind == "minepackage.parts:MyHead"


@pytest.mark.parametrize(
    ("part", "kind", "message"),
    [
        ("head", "guardkit.runs.hydra:Jobs", "head must be a subclass of guardkit.heads.Head"),
        ("encoder", "guardkit.heads:LinearHead", "encoder must have"),
        ("head", "subprocess:Popen", "head must be a subclass of guardkit.heads.Head"),
        ("head", "minepackage.parts:LinearHead", "is no class that is defined there"),
        ("head", "minepackage.parts:none", "cannot be imported"),
        ("head", "minepackage.elsewhere:MyHead", "cannot be imported"),
        (
            "head",
            "minepackage.parts:MyHead.forward",
            "head.kind must be one of linear, anchored, mlp, prompt, joined, or package.module:Class",
        ),
        ("head", "minepackage:parts:MyHead", "head.kind must be one of linear"),
        ("encoder", "minepackage.parts:OpenClipEncoder", "is no class that is defined there"),
        ("encoder", "subprocess:Popen", "encoder must have"),
    ],
)
def test_trust_goes_no_further_than_what_a_package_defines(foreign, part, kind, message):
    folder, _ = foreign
    sign(folder, put(part, "kind", kind))
    with pytest.raises(InputError, match=message) as caught:
        GuardClassifier.from_pretrained(folder, trust=["minepackage", "subprocess"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("trust", ["minepackage", ["minepackage.parts"], [3], None])
def test_trust_is_a_list_of_packages(folder, scenes_encoder, trust):
    with pytest.raises(InputError, match=r'trust must be a list of top-level packages, such as trust=\["mypackage"\], got'):
        GuardClassifier.from_pretrained(folder, encoder=scenes_encoder, trust=trust)


# --- damage -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"format": 1, "a": ' + '{"a": ' * 5000 + "1" + "}" * 5001, "[]", "7", "", "\xff", '{"format": ' + "9" * 9000 + "}"],
)
def test_a_configuration_that_is_none_is_refused(folder, scenes_encoder, text):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"config.json") as caught:
        GuardClassifier.from_pretrained(folder, encoder=scenes_encoder)
    assert "\n" not in str(caught.value)


def resign_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors")
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    sign(folder, put("weights_sha256", digest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors | {"linear.weight": tensors["linear.weight"] * float("nan")},
            "linear.weight holds NaN or infinite values",
        ),
        (lambda tensors: tensors | {"linear.bias": tensors["linear.bias"] + float("inf")}, "linear.bias holds NaN or infinite values"),
        (
            lambda tensors: tensors | {"linear.bias": tensors["linear.bias"][:-1].clone()},
            r"linear.bias is float32 of shape \(\d\d?,\), expected",
        ),
        (lambda tensors: tensors | {"linear.bias": tensors["linear.bias"].double()}, "linear.bias is float64"),
        (lambda tensors: tensors | {"more": torch.zeros(2)}, "more is float32 of shape .*, expected not there"),
        (lambda tensors: {"linear.bias": tensors["linear.bias"]}, "linear.weight is not there"),
        (lambda tensors: tensors | {"more": torch.zeros(1 << 20)}, "is missing or damaged"),
    ],
)
def test_weights_signed_anew_are_refused(folder, scenes_encoder, change, message):
    resign_weights(folder, change)
    with pytest.raises(InputError, match=message) as caught:
        GuardClassifier.from_pretrained(folder, encoder=scenes_encoder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [LinearHead, AnchoredHead, MLPHead, PromptHead])
def test_every_kind_of_head_comes_back(kind, scenes_encoder, scenes_policy, tmp_path):
    embeddings = np.random.default_rng(0).normal(size=(5, 256)).astype(np.float32)
    saved = make(scenes_encoder, scenes_policy, kind)
    loaded = GuardClassifier.from_pretrained(saved.save_pretrained(tmp_path / "guard"), encoder=scenes_encoder)
    np.testing.assert_array_equal(loaded.probabilities(embeddings), saved.probabilities(embeddings))


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -float("inf"), 3e38, -3e38])
def test_a_score_that_is_no_number_is_never_safe(scenes_encoder, scenes_policy, weight):
    guard = make(scenes_encoder, scenes_policy)
    with torch.no_grad():
        guard.head.linear.weight.fill_(weight)
        guard.head.linear.bias.fill_(weight)
    for decision in guard.predict(IMAGES):
        assert (decision.action, decision.label) == ("error", None)
        assert "not a finite score" in decision.error


def test_a_guard_of_the_first_format_keeps_its_threshold(folder, scenes_encoder):
    """It had one threshold, for the decision, and knew no calibration."""

    def older(config):
        config["format"], config["threshold"] = 1, 0.7
        del config["thresholds"], config["calibration"], config["history"]

    sign(folder, older)
    loaded = GuardClassifier.from_pretrained(folder, encoder=scenes_encoder)
    assert (loaded.thresholds.decision, loaded.calibration, loaded.history) == (Band.at(0.7), None, [])
    assert set(loaded.thresholds.categories.values()) == {Band.at(0.5)}
    sign(folder, lambda config: config.update(threshold=-1))
    with pytest.raises(InputError, match=r"threshold must lie in \[0, 1\], got -1"):
        GuardClassifier.from_pretrained(folder, encoder=scenes_encoder)
