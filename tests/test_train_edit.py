"""The recipe of a learned editor for drawn scenes, in its shortest form: what it writes is a pipeline that edits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_editors_pipeline import unsafe_scene

from checkpoints.scenes_edit.recipe import Recipe, text_tower, train
from guardkit.editors.base import EditRequest
from guardkit.editors.diffusers import DiffusersEditor

TEXT = str(ROOT / "checkpoints/scenes_clip")


def test_the_text_tower_is_that_of_the_encoder():
    import open_clip

    said = ["an old man in green carrying a yellow dagger in a forest at dusk, with a white chair", "a hair dryer"]
    tower, tokenizer = text_tower(TEXT)
    tokens = tokenizer(said, padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt").input_ids
    theirs = open_clip.create_model(f"local-dir:{TEXT}")
    np.testing.assert_array_equal(tokens, open_clip.get_tokenizer(f"local-dir:{TEXT}")(said))
    with torch.inference_mode():
        pooled = tower(tokens)[0][torch.arange(2), tokens.argmax(dim=1)] @ theirs.text_projection
        np.testing.assert_allclose(pooled, theirs.encode_text(tokens), atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
def test_the_recipe_writes_a_pipeline_that_edits(tmp_path, scenes_policy):
    recipe = Recipe(out=str(tmp_path / "edit"), n_scenes=40, batch_size=16, autoencoder_minutes=0.05, unet_minutes=0.05, text=TEXT)
    folder = train(recipe)
    editor = DiffusersEditor("auto", str(folder), steps=4, crop_px=64, dilate=0.04)
    record = unsafe_scene(0)
    region = (0.4, 0.4, 0.7, 0.7)
    other = scenes_policy[record.category].safe_texts[0]
    result = editor.edit([EditRequest(record.content, f"Replace it with {other}.", region, 0, target=other)])[0]
    assert result.reason is None
    before, after = record.content.load().astype(int), result.image.astype(int)
    changed = np.abs(before - after).max(axis=2) > 0
    rows, columns = changed.nonzero()
    assert changed.any()
    # nothing beyond the region, its margin and the seam
    assert rows.min() >= 40
    assert columns.min() >= 40
    assert rows.max() <= 100
    assert columns.max() <= 100
