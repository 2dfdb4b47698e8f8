"""Parts from somebody else's package go through every command: docs/extension, installed from its folder, in processes of their own."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
from pkgutil import resolve_name

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from commands import call, execute
from conftest import ROOT

import guardkit
from guardkit.guard_parts import check_encoder, check_head
from guardkit.heads import Head, LinearHead
from guardkit.schema import InputError

CONF = ROOT / "docs" / "extension" / "conf"
PARTS = ["--config-dir", str(CONF), "policy=dots", "source=dots", "encoder=colour_grid", "editor=repaint"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run("guardkit.train", ...) -> finished process, in an environment that has the package and in a folder that knows nothing."""
    here = tmp_path_factory.mktemp("elsewhere")
    site = here / "site"
    install = ["pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--target", str(site)]
    subprocess.run([sys.executable, "-m", *install, str(ROOT / "docs" / "extension")], check=True)

    def start(what, *arguments):
        done = (call if what.startswith("guardkit.") else execute)(what, *arguments, cwd=here, path=[str(site)])
        assert done.returncode == 0, done.stderr[-3000:]
        return done

    return start


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    """A run's folder: all of its parts are foreign."""
    folder = tmp_path_factory.mktemp("run") / "trained"
    settings = ["head=cosine", "experiment=pairs_classic", "data.n_unsafe=32", "trainer.max_epochs=40", f"output_dir={folder}"]
    run("guardkit.train", *PARTS, *settings)
    return folder


def test_a_guard_of_foreign_parts_says_what_they_are(trained):
    config = json.loads((trained / "guard" / "config.json").read_text())
    assert config["head"] == {
        "kind": "guardkit_extension.head:CosineHead",
        "settings": {"dim": 49, "n_categories": 1, "scale": 30.0},
    }
    assert (config["encoder"]["kind"], config["encoder"]["config"]) == ("guardkit_extension.encoder:ColourGrid", {"cells": 4})
    assert config["training"]["experiment"] == "pairs_classic"
    assert json.loads((trained / "metrics.json").read_text())["edits"]["accepted"] > 0


LOADED = """
import json, sys
from guardkit import GuardClassifier
from guardkit.schema import InputError

try:
    GuardClassifier.from_pretrained(sys.argv[1])
except InputError as error:
    refusal = str(error)
before = [name for name in sys.modules if name.startswith("guardkit_extension")]
guard = GuardClassifier.from_pretrained(sys.argv[1], trust=["guardkit_extension"])
from guardkit_extension.source import Dot
names = json.loads(sys.argv[2])
dots = [Dot(int(label), int(seed)).load() for _, label, seed in (name.split("_") for name in names)]
print(json.dumps({"refusal": refusal, "before": before, "scores": [one.score for one in guard.predict(dots)]}))
"""


def test_it_is_loaded_by_those_who_trust_the_package(run, trained):
    rows = [row for row in pq.read_table(trained / "predictions.parquet").to_pylist() if not row["is_counterfactual"]]
    said = json.loads(run(LOADED, str(trained), json.dumps([row["id"] for row in rows])).stdout)
    assert said["before"] == []
    assert "\n" not in said["refusal"]
    for part in (
        "head guardkit_extension.head:CosineHead",
        "encoder guardkit_extension.encoder:ColourGrid",
        'trust=["guardkit_extension"]',
    ):
        assert part in said["refusal"]
    assert said["scores"] == pytest.approx([row["score"] for row in rows], abs=1e-6)


def test_python_makes_the_same_of_the_same_parts(trained, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs" / "extension")
    from guardkit_extension.editor import Repainter
    from guardkit_extension.encoder import ColourGrid
    from guardkit_extension.head import CosineHead
    from guardkit_extension.source import DotsSource

    policy = guardkit.Policy.load(CONF / "policy" / "dots.yaml")
    arm = guardkit.Arm("pairs_classic", ("counterfactual", "natural"), transform="classic")
    made = guardkit.train_guard(
        DotsSource(policy),
        policy,
        encoder=ColourGrid(),
        head=CosineHead,
        arm=arm,
        editor=Repainter(),
        n_unsafe=32,
        trainer={"max_epochs": 40},
    )
    loaded = guardkit.GuardClassifier.from_pretrained(trained, trust=["guardkit_extension"])
    assert made.guard.fingerprint == loaded.fingerprint
    assert made.guard.threshold == loaded.threshold


def test_it_is_evaluated_beside_a_foreign_baseline_on_a_foreign_engine(run, trained, tmp_path):
    settings = [f"guard={trained}", "trust=[guardkit_extension]", "source=dots", "baselines=[redness,always_unsafe]"]
    settings += ["engine=processes", "engine.workers=1"]
    run("guardkit.evaluate", *PARTS[:2], *settings, f"output_dir={tmp_path / 'out'}")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    f1 = {name: one["effectiveness"]["f1"]["value"] for name, one in summary["classifiers"].items()}
    assert list(f1) == ["pairs_classic", "redness", "always_unsafe"]
    assert f1["redness"] == 1
    assert f1["pairs_classic"] > f1["always_unsafe"]


def test_the_files_may_be_in_hydras_search_path_as_well(run, tmp_path):
    settings = [f"hydra.searchpath=[file://{CONF}]", "policy=dots", "source=dots", "baselines=[redness]"]
    run("guardkit.evaluate", *settings, f"output_dir={tmp_path / 'out'}")
    assert list(json.loads((tmp_path / "out" / "summary.json").read_text())["classifiers"]) == ["redness"]


def test_a_foreign_arm_and_head_are_swept(run, tmp_path):
    settings = ["+experiment@arms.pairs_classic=pairs_classic", "+head@heads.cosine=cosine", "sweep.heads=[cosine,linear]"]
    settings += ["sweep.arms=[unpaired,pairs_classic]", "sweep.sizes=[4,8]", "sweep.seeds=2", "trainer.max_epochs=10"]
    run("guardkit.sweep", *PARTS, *settings, f"output_dir={tmp_path / 'out'}")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["arms"] == [f"{arm}/{head}" for head in ("cosine", "linear") for arm in ("unpaired", "pairs_classic")]
    assert all(point["mean"] is not None for curve in summary["curves"].values() for point in curve.values())


HINGE = ["+term@loss.terms.hinge=squared_hinge", "loss.terms.hinge.weight=0.5", "loss.terms.hinge.margin=40", "loss.pair_weight=0"]


def test_a_foreign_loss_is_trained_and_swept_with_on_every_engine(run, tmp_path):
    """A linear head is solved for, another one trained; both engines come to the same, and without the loss to something else."""
    settings = ["sweep.heads=[linear,cosine]", "+head@heads.cosine=cosine", "sweep.arms=[pairs_aug]", "sweep.sizes=[8]", "sweep.seeds=1"]
    settings += ["sweep.strengths=[0.1]", "trainer.max_epochs=10", "loss.pair_weight=0"]
    reached = {}
    for name, more in {"batched": HINGE, "lightning": [*HINGE, "sweep.engine=lightning"], "without": []}.items():
        run("guardkit.sweep", *PARTS, *settings, *more, f"output_dir={tmp_path / name}")
        reached[name] = pq.read_table(tmp_path / name / "cells.parquet").column("objective").to_pylist()
    assert reached["batched"] == pytest.approx(reached["lightning"], rel=1e-4)
    assert min(np.subtract(reached["batched"], reached["without"])) > 1e-3
    short = ["experiment=pairs_aug", "head=linear", "data.n_unsafe=8", "trainer.max_epochs=10"]
    run("guardkit.train", *PARTS, *short, *HINGE, f"output_dir={tmp_path / 'train'}")
    run("guardkit.train", *PARTS, *short, "loss.pair_weight=0", f"output_dir={tmp_path / 'other'}")
    figures = [json.loads((tmp_path / name / "metrics.json").read_text())["pairs"] for name in ("train", "other")]
    assert figures[0] != figures[1]


def test_a_foreign_editor_makes_pairs_that_a_foreign_guard_verifies(run, trained, tmp_path):
    verifier = ["verifier=guard", f"verifier.guard.folder={trained}", "verifier.guard.trust=[guardkit_extension]"]
    run("guardkit.synthesize", *PARTS, *verifier, "limit=6", f"output_dir={tmp_path / 'out'}")
    rows = pq.read_table(tmp_path / "out" / "metadata.parquet").to_pylist()
    assert {row["editor"] for row in rows} == {"repaint"}
    assert [row["status"] for row in rows].count("accepted") > 3


def test_a_part_that_is_not_installed_is_named(train, compose):
    from guardkit.runs.contenders import build_contenders
    from guardkit.runs.errors import user_error

    for target in ("nowhere.Source", "json.Source"):
        with pytest.raises(Exception, match="Error locating target") as caught:
            train(f"source._target_={target}")
        line = user_error(caught.value)
        assert "\n" not in line
        assert f"source names {target}, which cannot be imported (" in line
        with pytest.raises(InputError, match=f"baseline always_unsafe names {target}, which cannot be imported .*; install its package"):
            build_contenders(compose("evaluate", f"baselines=[{{always_unsafe: {{_target_: {target}}}}}]"))


def test_the_parts_are_built_of_public_names():
    for path in (ROOT / "docs" / "extension").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "guardkit":
                assert node.module == "guardkit"
                assert {alias.name for alias in node.names} <= set(guardkit.__all__)


GIVEN_BY_GUARDKIT = {"source": {"policy"}, "head": {"encoder", "policy"}, "baseline": {"policy"}}


@pytest.mark.parametrize("path", sorted(CONF.glob("*/*.yaml")), ids=lambda path: path.relative_to(CONF).as_posix())
def test_a_part_is_a_class_and_a_file_that_lists_its_arguments(path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs" / "extension")
    settings = yaml.safe_load(path.read_text())
    if path.parent.name in ("experiment", "policy"):
        assert "_target_" not in settings
        return
    parameters = inspect.signature(resolve_name(settings.pop("_target_"))).parameters
    assert set(parameters) - GIVEN_BY_GUARDKIT.get(path.parent.name, set()) == set(settings)
    assert {name: parameters[name].default for name in settings} == settings


# --- what cannot be saved and loaded is refused before it is trained ----------------------------------------------------


class Probe(Head):
    """A head that is right; each of those below is wrong in one thing."""

    def __init__(self, dim: int, n_categories: int, *, options: object = None):
        super().__init__()
        self.config = {"dim": dim, "n_categories": n_categories, "options": options}
        self.linear = torch.nn.Linear(dim, 1 + n_categories)

    def forward(self, embeddings):
        return self.linear(embeddings)


class WithoutConfig(Probe):
    def __init__(self, dim, n_categories):
        super().__init__(dim, n_categories)
        del self.config


class ForgetsAnArgument(Probe):
    def __init__(self, dim, n_categories, hidden):
        super().__init__(dim, n_categories)


class OtherWeights(Probe):
    def __init__(self, dim, n_categories, options=None):
        super().__init__(dim, n_categories)
        self.more = torch.nn.Parameter(torch.zeros(3 if options else 2))
        self.config["options"] = not options


class Forgetful(Probe):
    def __init__(self, dim, n_categories, options=None):
        super().__init__(dim, n_categories)
        self.drawn = torch.rand(1)

    def forward(self, embeddings):
        return self.linear(embeddings) * self.drawn


class LooksAtWeights(Probe):
    def __init__(self, dim, n_categories, options=None):
        super().__init__(dim, n_categories)
        self.size = self.linear.weight.abs().max().item()


class Infinite(Probe):
    def __init__(self, dim, n_categories, options=None):
        super().__init__(dim, n_categories)
        self.register_buffer("mask", torch.tensor([float("-inf")]))


class OneLogit(Probe):
    def forward(self, embeddings):
        return self.linear(embeddings)[:, :1]


def local_head():
    class Local(Probe):
        pass

    return Local(256, 2)


def test_a_head_that_is_right_is_left_as_it_was(scenes_encoder):
    head = Probe(256, 2, options={"a": [1]}).train()
    before = {name: value.clone() for name, value in head.state_dict().items()}
    check_head(head, scenes_encoder, 2)
    assert head.training
    assert all(torch.equal(before[name], value) for name, value in head.state_dict().items())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.nn.Linear(256, 3), "must be a subclass of guardkit.heads.Head"),
        (local_head, "its class must stand at the top level of a module"),
        (lambda: WithoutConfig(256, 2), "its config must be a dict that JSON gives back"),
        (lambda: Probe(256, 2, options=(1, 2)), "lists instead of tuples"),
        (lambda: Probe(256, 2, options=torch.zeros(2)), "cannot be saved: Object of type Tensor is not JSON serializable"),
        (lambda: ForgetsAnArgument(256, 2, 8), "its config must be among dim, n_categories, hidden, got dim, n_categories, options"),
        (
            lambda: OtherWeights(256, 2),
            r"could not be saved and loaded again: more is float32 of shape \(2,\), expected float32 of shape \(3,\)",
        ),
        (lambda: Forgetful(256, 2), "built again from its config and its weights, it gives other logits"),
        (lambda: LooksAtWeights(256, 2), "cannot be called on meta tensors"),
        (lambda: Infinite(256, 2), "mask holds NaN or infinite values"),
        (
            lambda: OneLogit(256, 2),
            r"cannot be used: for embeddings of shape \(2, 256\) the head must give .* shape \(2, 3\), .*got float32 of shape \(2, 1\)",
        ),
    ],
)
def test_a_head_that_could_not_be_loaded_again_is_refused(scenes_encoder, make, message):
    with pytest.raises(InputError, match=message) as caught:
        check_head(make(), scenes_encoder, 2)
    assert "\n" not in str(caught.value)


class Colour:
    """An encoder that is right, unless it is told to be wrong."""

    name, batch_size, dim = "colour", 8, 3
    preprocessing: dict = {}

    def __init__(self, fault: str = ""):
        self.fault, self.config = fault, {} if fault == "forgets its config" else {"fault": fault}
        self.fingerprint = ("f" if fault == "forgets its config" else "0") * 64
        if fault == "has no fingerprint":
            self.fingerprint = "red"

    def preprocess(self, image):
        return torch.tensor(image).float().mean(dim=(0, 1))

    def encode_preprocessed(self, images, *, fixed_batch=False, normalize=True):
        vectors = torch.stack(list(images)).numpy()
        vectors /= 1 if self.fault == "is no unit vector" else np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors.astype(float) if self.fault == "is double" else vectors[:, :2] if self.fault == "is narrow" else vectors

    def encode_images(self, images, *, fixed_batch=False, normalize=True):
        return self.encode_preprocessed([self.preprocess(one) for one in images])


class WithoutImages(Colour):
    encode_preprocessed = None


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (Colour("is no unit vector"), r"encode_images must give a float32 unit vector of shape \(1, 3\)"),
        (Colour("is double"), "must give a float32 unit vector"),
        (Colour("is narrow"), "must give a float32 unit vector"),
        (Colour("has no fingerprint"), "must have the same fingerprint, 64 hex digits"),
        (Colour("forgets its config"), "built again from its config it must have the same fingerprint"),
        (WithoutImages(), "encoder test_extension:WithoutImages cannot be used and found again"),
    ],
    ids=lambda one: getattr(one, "fault", None),
)
def test_an_encoder_that_would_not_be_found_again_is_refused(encoder, message):
    check_encoder(Colour())
    with pytest.raises(InputError, match=message) as caught:
        check_encoder(encoder)
    assert "\n" not in str(caught.value)


def test_training_begins_with_these_checks(train, tmp_path):
    with pytest.raises(InputError, match="the head must give float32 logits of shape"):
        train("head._target_=test_extension.one_logit", folder=tmp_path / "run")
    assert not (tmp_path / "run" / "guard").exists()


def one_logit(encoder, policy):
    return OneLogit(encoder.dim, len(policy.categories))


def test_a_subclass_of_the_linear_head_is_not_solved_as_if_it_were_one(compose, tmp_path):
    """A sweep brings linear heads to their optimum by their weights alone, which says nothing of what a subclass computes."""
    from guardkit.runs.sweep import run

    small = ["source.n_train=60", "source.n_test=9", "sweep.arms=[unpaired]", "sweep.sizes=[8]", "sweep.seeds=1", "trainer.max_epochs=5"]
    target = "head._target_=test_extension.blind"
    summary = run(compose("sweep", *small, target), {}, tmp_path / "out").summary
    (curve,) = summary["curves"].values()
    assert curve["8"]["mean"] == 0  # a head that always says the same decides no pair rightly


class BlindHead(LinearHead):
    def forward(self, embeddings):
        return super().forward(torch.zeros_like(embeddings))


def blind(encoder, policy):
    return BlindHead.build(encoder, policy)
