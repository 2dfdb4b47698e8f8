"""The recipe of the small learned editors, in its shortest form: what it writes is a pipeline that edits, of either world."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_editors_pipeline import unsafe_scene

from checkpoints.edit_recipe import main, text_tower
from checkpoints.photos_edit import Photos, is_of_editor
from guardkit.editors.base import EditRequest
from guardkit.editors.diffusers import DiffusersEditor
from guardkit.images import ArrayContent, bytes_key

TEXT = str(ROOT / "checkpoints/scenes_clip")
NAMES = {"n1": "scorpion", "n2": "tarantula", "n3": "teapot"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder like the photographs': 24 images of 64 pixels, a box around the middle of each."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("photographs")
    lines = [f"{wnid},{name},{name}|kind of {name},thing|entity,a {name} of some kind" for wnid, name in NAMES.items()]
    (folder / "classes.csv").write_text("\n".join(["wnid,name,synonyms,hypernyms,gloss", *lines]) + "\n")
    rng, rows = np.random.default_rng(0), []
    for number, wnid in enumerate(list(NAMES) * 8):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (64, 64, 3)).astype(np.uint8)).save(file, "PNG")
        box = {"x_min": 0.25, "y_min": 0.25, "x_max": 0.75, "y_max": 0.75}
        rows.append({"image": {"bytes": file.getvalue(), "path": f"{number}.png"}, "wnid": wnid, "name": NAMES[wnid], **box})
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    return folder


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


def test_the_editor_of_photographs_learns_from_one_half_of_them(data):
    import pyarrow.parquet as pq

    rows = [row for row in pq.read_table(data / "train.parquet").to_pylist() if is_of_editor(bytes_key(row["image"]["bytes"]))]
    assert 4 < len(rows) < 20
    pool = Photos(data=str(data)).pool()
    read = [np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))) for row in rows]
    np.testing.assert_array_equal(pool.before, read)
    np.testing.assert_array_equal(pool.after, read)
    np.testing.assert_array_equal(pool.boxes, [[16, 16, 48, 48]] * len(rows))
    for number, row in enumerate(rows):
        assert NAMES[row["wnid"]] in pool.words(number, np.random.default_rng(number))
    assert len(Photos(data=str(data), n_photographs=3).pool().after) == 3


def test_a_world_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match="world=NAME, NAME one of scenes, photos"):
        main(["world=paintings"])
    with pytest.raises(SystemExit, match="expected classes.csv and train.parquet"):
        main(["world=photos", f"data={tmp_path}"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
@pytest.mark.parametrize("world", ["scenes", "photos"])
def test_the_recipe_writes_a_pipeline_that_edits(world, data, tmp_path, scenes_policy, monkeypatch):
    monkeypatch.chdir(ROOT)  # the defaults of a recipe are paths in a checkout
    settings = {
        "scenes": ["n_scenes=40", "autoencoder_minutes=0.05"],
        "photos": [f"data={data}", "autoencoder_minutes=0"],
    }[world]
    out = tmp_path / "edit"
    out.mkdir()
    (out / "README.md").write_text("a card")
    folder = main([f"world={world}", f"out={out}", "batch_size=16", "unet_minutes=0.05", *settings])
    assert (folder / "README.md").read_text() == "a card"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["edit"]
    editor = DiffusersEditor("auto", str(folder), steps=4, crop_px=64, dilate=0.04)
    record = unsafe_scene(0)
    content = record.content if world == "scenes" else ArrayContent(record.content.load()[:64, :64])
    size = content.load().shape[0]
    region = (0.4, 0.4, 0.7, 0.7)
    other = scenes_policy[record.category].safe_texts[0]
    result = editor.edit([EditRequest(content, f"Replace it with {other}.", region, 0, target=other)])[0]
    assert result.reason is None
    before, after = content.load().astype(int), result.image.astype(int)
    changed = np.abs(before - after).max(axis=2) > 0
    rows, columns = changed.nonzero()
    assert changed.any()
    # nothing beyond the region, its margin and the seam
    assert rows.min() >= 0.3 * size
    assert columns.min() >= 0.3 * size
    assert rows.max() <= 0.8 * size
    assert columns.max() <= 0.8 * size
