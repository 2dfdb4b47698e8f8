"""Python without Hydra: the functions give what the commands give, with the same defaults, and need no configuration."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import ROOT

import guardkit
from guardkit.robustness.measuring import RobustnessSettings
from guardkit.schema import InputError


def conf(path):
    return yaml.safe_load((ROOT / "conf" / path).read_text())


def defaults(function):
    return {name: one.default for name, one in inspect.signature(function).parameters.items() if one.default is not inspect.Parameter.empty}


def plain(value):
    return (
        {name: plain(one) for name, one in value.items()}
        if isinstance(value, dict)
        else float(value)
        if isinstance(value, str) and value[0].isdigit()
        else value
    )


@pytest.fixture
def world(scenes_policy, scenes_encoder):
    """The smallest real run's arguments, of a source that is not cross-validated."""
    source = guardkit.ScenesSource(scenes_policy, n_train=90, n_test=9)
    # the session's, as for the commands: what one encoder makes of an image is made once
    return {"source": source, "policy": scenes_policy, "encoder": scenes_encoder, "cache_dir": os.environ["GUARDKIT_CACHE"]}


SMALL = ["source.n_train=90", "source.n_test=9"]


@pytest.mark.parametrize(
    ("arm", "settings"),
    [
        ("pairs_aug", {}),
        ("classic_aug", {}),
        ("null_edits", {"head": "mlp"}),
        ("pairs_plus", {"head": "linear_whitened", "loss": {"l2": 0.1}}),
        ("unpaired", {"head": "anchored", "loss": {"l2": 0.1}}),
    ],
)
def test_train_guard_gives_the_command_s_figures(compose, world, tmp_path, arm, settings):
    from guardkit.runs.train import run

    overrides = [f"head={settings.get('head', 'auto')}", *(f"loss.{name}={value}" for name, value in settings.get("loss", {}).items())]
    cfg = compose("train", f"experiment={arm}", "data.n_unsafe=12", "trainer.max_epochs=10", "seed=3", *SMALL, *overrides)
    by_command = run(cfg, {}, tmp_path / "command")
    fitted = guardkit.train_guard(
        **world,
        arm=arm,
        editor=guardkit.ScenesEditor(),
        n_unsafe=12,
        seed=3,
        trainer={"max_epochs": 10},
        output_dir=tmp_path / "function",
        **settings,
    )
    for name in ("test", "pairs", "edits", "controls", "operating_points", "best_epoch", "n_safe", "n_counterfactuals", "fingerprints"):
        same, other = (
            {key: value for key, value in one[name].items() if key not in ("seconds", "cache_hits")} if name == "edits" else one[name]
            for one in (fitted.metrics, by_command.metrics)
        )
        assert same == other, name
    tables = [pq.read_table(tmp_path / who / "predictions.parquet") for who in ("command", "function")]
    assert tables[0].equals(tables[1])
    assert {path.name for path in fitted.folder.iterdir()} >= {"guard", "metrics.json", "predictions.parquet", "pairs.png", "learning.png"}


def test_nothing_is_written_where_no_folder_is_given(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fitted = guardkit.train_guard(**world, arm="unpaired", n_unsafe=8, trainer={"max_epochs": 2})
    assert list(tmp_path.iterdir()) == []
    assert fitted.folder is None
    assert "unpaired, seed 0" in fitted.table
    scores = fitted.guard.score_embeddings(np.eye(fitted.guard.encoder.dim, dtype=np.float32))
    assert ((scores >= 0) & (scores <= 1)).all()


def test_embed_synthesize_and_sweep_give_what_the_commands_give(compose, world, scenes_policy, tmp_path):
    from guardkit.counterfactual.score_verifier import ScoreVerifier
    from guardkit.runs import embed, sweep, synthesize

    source, policy, encoder, cache = world["source"], world["policy"], world["encoder"], world["cache_dir"]
    editor = guardkit.ScenesEditor()

    counts = guardkit.embed(source, encoder=encoder, output_dir=tmp_path / "embeddings", limit=10, cache_dir=cache)
    assert counts == embed.run(compose("embed", "limit=10", *SMALL), tmp_path / "by_command")
    assert counts["given"] == counts["written"] == 10
    vectors = [np.load(tmp_path / place / "img_emb/img_emb_0.npy") for place in ("embeddings", "by_command")]
    assert np.array_equal(*vectors)

    made = guardkit.synthesize(source, policy, editor=editor, encoder=encoder, output_dir=tmp_path / "pairs", limit=3)
    assert made == synthesize.run(compose("synthesize", "limit=3", "cache_dir=null", *SMALL), tmp_path / "pairs_by_command")
    assert made["accepted"] == 3

    # a verifier needs the run's embeddings, so that it may be given as what makes it
    verified = guardkit.Edits(editor, verifier=partial(ScoreVerifier.from_texts, min_arrival=0.99), max_tries=2)
    made = guardkit.synthesize(source, policy, editor=verified, encoder=encoder, output_dir=tmp_path / "verified", limit=6)
    asked = ["limit=6", "verifier=encoder", "verifier.min_arrival=0.99", "edit_max_tries=2", "cache_dir=null", *SMALL]
    assert made == synthesize.run(compose("synthesize", *asked), tmp_path / "verified_by_command")
    assert made["max_tries"] == 2

    few = {"arms": ["unpaired", "pairs_aug"], "sizes": [4, 8], "seeds": 2, "strengths": [0.1, 1.0], "n_resamples": 100}
    report = guardkit.sweep(source, policy, encoder=encoder, editor=editor, output_dir=tmp_path / "sweep", cache_dir=cache, **few)
    asked = [f"sweep.{name}={json.dumps(value).replace(' ', '').replace(chr(34), '')}" for name, value in few.items()]
    other = sweep.run(compose("sweep", *asked, *SMALL), {}, tmp_path / "sweep_by_command")
    for name in ("arms", "heads", "sizes", "metric", "curves", "samples_to_target", "tests", "chosen_strengths"):
        assert report.summary[name] == other.summary[name], name


def test_evaluate_gives_what_the_command_gives(compose, world, tmp_path):
    from guardkit.runs.evaluate import run

    guards = {
        arm: guardkit.train_guard(**world, arm=arm, editor=guardkit.ScenesEditor(), n_unsafe=8, trainer={"max_epochs": 3}).guard
        for arm in ("unpaired", "pairs_aug")
    }
    for name, guard in guards.items():
        guard.save_pretrained(tmp_path / name)
    kept = {"n_resamples": 100, "cache_dir": world["cache_dir"]}
    report = guardkit.evaluate(guards, world["source"], output_dir=tmp_path / "out", **kept)
    named = f"guard={{unpaired: {tmp_path / 'unpaired'}, pairs_aug: {tmp_path / 'pairs_aug'}}}"
    other = run(compose("evaluate", named, "n_resamples=100", *SMALL), tmp_path / "by_command")
    assert report.table.replace(str(tmp_path / "out"), "") == other.table.replace(str(tmp_path / "by_command"), "")
    tables = [pq.read_table(tmp_path / who / "effectiveness.parquet") for who in ("out", "by_command")]
    assert tables[0].equals(tables[1])
    # a folder does as well as the guard itself
    again = guardkit.evaluate(tmp_path / "unpaired", world["source"], output_dir=tmp_path / "again", **kept)
    assert list(again.summary["classifiers"]) == ["unpaired"]


def test_guards_of_one_name_are_told_apart_and_keep_it(world, tmp_path):
    first, second = (
        guardkit.train_guard(**world, arm="unpaired", n_unsafe=8, seed=seed, trainer={"max_epochs": 3}).guard for seed in (0, 1)
    )
    attacks = RobustnessSettings(protocols=("unsafebench",), n_unsafebench=2)
    report = guardkit.evaluate([first, second], world["source"], output_dir=tmp_path, n_resamples=100, robustness=attacks)
    assert list(report.summary["classifiers"]) == ["anchored", "anchored 2"]
    assert set(pq.read_table(tmp_path / "robustness.parquet")["guard"].to_pylist()) == {"anchored", "anchored 2"}
    assert first.name == second.name == "anchored"


# --- defaults ---------------------------------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_commands():
    from guardkit.fitting.recipe import TRAINER

    train, data, given = conf("train.yaml"), conf("data/default.yaml"), defaults(guardkit.train_guard)
    for name in ("seed", "threshold", "early_stopping_patience"):
        assert given[name] == train[name], name
    for name in ("n_unsafe", "variants_per_image", "batch_size", "all_views", "test_share", "split_seed"):
        assert given[name] == data[name], name
    chosen = {key: value for one in train["defaults"] if isinstance(one, dict) for key, value in one.items()}
    assert (given["head"], given["arm"]) == (chosen["head"], chosen["experiment"])
    assert train["loss"] == guardkit.Objective().settings
    assert dict(TRAINER) == conf("trainer/default.yaml")
    assert _keywords(given["optimizer"]) == plain(_arguments("optimizer/adamw.yaml"))


def test_defaults_of_a_sweep_are_those_of_the_command():
    sweep, given = conf("sweep.yaml"), defaults(guardkit.sweep)
    for name, value in sweep["sweep"].items():
        if name != "heads":
            assert (list(given[name]) if isinstance(value, list) else given[name]) == value, name
    for name, value in sweep["data"].items():
        assert given[name] == value, name
    for name in ("seed", "threshold", "early_stopping_patience"):
        assert given[name] == sweep[name], name
    assert given["heads"] == next(one["head"] for one in sweep["defaults"] if isinstance(one, dict) and "head" in one)
    assert _keywords(given["linear_optimizer"]) == plain(_arguments("optimizer/lbfgs.yaml"))


@pytest.mark.parametrize("function", ["embed", "synthesize", "evaluate"])
def test_defaults_of_what_is_made_are_those_of_the_command(function):
    said, given = conf(f"{function}.yaml"), defaults(getattr(guardkit, function))
    shared = [name for name in given if name in said and name != "cache_dir"]
    assert {name: said[name] for name in shared} == {
        name: list(given[name]) if isinstance(given[name], tuple) else given[name] for name in shared
    }


@pytest.mark.parametrize("command", ["train", "sweep", "synthesize"])
def test_defaults_of_edits_are_those_of_the_commands(command):
    said, given = conf(f"{command}.yaml"), guardkit.Edits()
    assert (given.batch_size, given.max_tries) == (said["edit_batch_size"], said["edit_max_tries"])
    chosen = {key: value for one in said["defaults"] if isinstance(one, dict) for key, value in one.items()}
    assert (given.instructor.name, given.verifier.name) == (chosen["instructor"], chosen["verifier"])


def test_arms_are_those_of_the_experiments():
    files = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "conf/experiment").glob("*.yaml")}
    known = {arm.name: arm for arm in guardkit.ARMS}
    assert set(files) - set(known) == {"zero_shot"}  # it trains nothing: train_guard(head="prompt", trainer={"max_epochs": 0})
    for name, arm in known.items():
        said = files[name]["data"]
        assert (list(arm.negatives), list(arm.positives), arm.transform, arm.variants_per_image) == (
            said["negatives"],
            said.get("positives", []),
            said.get("transform", "none"),
            said.get("variants_per_image"),
        )


def _arguments(path):
    return {name: value for name, value in conf(path).items() if not name.startswith("_")}


def _keywords(function):
    return dict(function.keywords)


# --- the door ---------------------------------------------------------------------------------------------------------------


def test_no_configuration_is_needed(tmp_path):
    """Neither the public names nor a whole training import Hydra; embedding imports no Lightning."""
    code = f"""
import sys
import guardkit
from guardkit import FolderSource, OpenClipEncoder, Policy, ScenesEditor, ScenesSource
policy = Policy.load({str(ROOT / "conf/policy/scenes.yaml")!r})
encoder = OpenClipEncoder(None, "guardkit:scenes_clip")
source = ScenesSource(policy, n_train=90, n_test=9)
guardkit.embed(source, encoder=encoder, output_dir={str(tmp_path / "embeddings")!r}, limit=3)
print("lightning" in sys.modules)
guardkit.train_guard(source, policy, encoder=encoder, editor=ScenesEditor(), n_unsafe=6, trainer={{"max_epochs": 1}})
print("hydra" in sys.modules, "omegaconf" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.split() == ["False", "False", "False"]


def test_a_command_s_module_is_called_like_the_function():
    code = "import guardkit.embed, guardkit\ntry: guardkit.embed(1, encoder=2, output_dir='x', limit=0)\nexcept guardkit.InputError as error: print(error)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "limit must be a whole number of at least 1, or null, got 0"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"head": "liner"}, "there is no head 'liner'; there are auto, linear, linear_whitened, linear_texts, anchored, mlp, prompt"),
        ({"arm": "pears"}, "there is no arm 'pears'; there are pairs_aug, unpaired"),
        ({"editor": "scenes"}, "editor must be an object with a method edit, such as guardkit.InpaintEditor"),
        ({"editor": guardkit.Edits(max_tries=0)}, "edit_max_tries must be a whole number of at least 1, got 0"),
        ({"n_unsafe": 1}, "data.n_unsafe must be a whole number of at least 2, got 1"),
        ({"seed": -1}, "seed must be a whole number from 0 to 9223372036854775807, got -1"),
        ({"threshold": "best"}, "threshold must be a number"),
        ({"loss": {"l2": -1}}, "loss.l2 must be a number of at least 0, or null, got -1"),
        ({"head": 3}, "head must be a name, a class, or a function of encoder and policy, got 3"),
        ({"arm": 3}, "arm must be the name of one or a guardkit.Arm, got 3"),
        ({"loss": 3}, "loss must be a dictionary of settings, got 3"),
        ({"trainer": {"max_epochs": "many"}}, "trainer.max_epochs must be a whole number"),
    ],
)
def test_wrong_arguments_are_named(world, wrong, message):
    with pytest.raises(InputError, match=message):
        guardkit.train_guard(**world, **{"arm": "unpaired"} | wrong)
