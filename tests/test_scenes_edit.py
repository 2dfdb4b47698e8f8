"""The learned editor that ships: it loads from its folder, redraws what it is asked to, and trains a guard on the fly."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT
from test_editors_pipeline import unsafe_scene

from guardkit.artifacts import shipped
from guardkit.runs.objects import build
from guardkit.scenes.world import find_region

# diffusers' schedulers hand torch tensors to NumPy, which torch does not yet support as NumPy 2 wants it
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
FOLDER = ROOT / "checkpoints/scenes_edit"


def test_the_folder_is_small_and_holds_safetensors_only():
    assert shipped("guardkit:scenes_edit") == FOLDER
    # all but its recipe, which a wheel leaves out
    files = [path for path in FOLDER.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert sum(path.stat().st_size for path in files) < 40e6
    assert {path.suffix for path in files} == {".json", ".safetensors", ".md"}


def test_it_loads_as_the_pipeline_that_it_says():
    from diffusers import StableDiffusionInpaintPipeline

    pipeline = StableDiffusionInpaintPipeline.from_pretrained(FOLDER, low_cpu_mem_usage=False)
    assert pipeline.unet.config.in_channels == 9


def test_most_edits_of_unseen_scenes_pass_the_verifier(compose, tmp_path):
    """0.87 of 500 first tries did, and an independent judge saw what was asked for in 0.93 (benchmarks/learned_editor.py)."""
    pipeline = build(compose("train", "editor=scenes_edit", "verifier=encoder", f"cache_dir={tmp_path}")).pipeline
    records = [replace(record, region=find_region(record.content.scene)) for record in map(unsafe_scene, range(16))]
    tries = pipeline.make(records, list(range(16)))
    assert sum(one.accepted for one in tries) >= 9
    for record, one in zip(records, tries, strict=True):
        if not one.accepted:
            continue
        before, after = record.content.load().astype(float), one.load().astype(float)
        rows, columns = np.nonzero(np.abs(before - after).max(axis=2))
        x_min, y_min, x_max, y_max = (128 * value for value in record.region)
        # the region, its margin of 0.04 and the seam
        assert rows.min() >= y_min - 9
        assert rows.max() <= y_max + 9
        assert columns.min() >= x_min - 9
        assert columns.max() <= x_max + 9


@pytest.mark.slow
def test_a_guard_trains_on_its_edits(compose, tmp_path):
    from guardkit.runs.train import run

    overrides = ["experiment=pairs_aug", "editor=scenes_edit", "verifier=encoder", "edit_max_tries=2", f"cache_dir={tmp_path}"]
    small = ["data.n_unsafe=16", "source.n_train=60", "source.n_test=30", "trainer.max_epochs=30"]
    metrics = run(compose("train", *overrides, *small), {}, tmp_path / "run").metrics
    assert metrics["edits"]["requested"] == 16
    assert metrics["edits"]["accepted"] >= 9
    assert metrics["n_counterfactuals"] == metrics["edits"]["accepted"]
    assert metrics["fingerprints"]["editor"]["editor"] == "diffusers"
    # the editor has an autoencoder, and the report says what it leaves behind
    assert metrics["controls"]["autoencoder"]["n"] >= 10
    assert 0.5 < metrics["controls"]["autoencoder"]["mean_cosine"] <= 1
