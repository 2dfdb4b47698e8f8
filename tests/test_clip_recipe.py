"""The recipe of the small CLIPs, in its shortest form: what it writes is an open_clip folder, of either world."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from checkpoints.clip_recipe import main
from checkpoints.photos_clip.world import Photos, read_classes
from guardkit.encoders.open_clip import OpenClipEncoder

TINY = ROOT.parent / "shared/data/tiny_imagenet"
CLASSES = {
    "n1": ("scorpion", "scorpion", "arachnid|arthropod|animal|entity", "an arachnid with a long segmented tail"),
    "n2": ("tarantula", "tarantula", "spider|arachnid|arthropod|animal|entity", "large hairy tropical spider; its bite is painful"),
    "n3": ("teapot", "teapot", "pot|vessel|artifact|entity", "pot for brewing tea"),
    "n4": ("beer bottle", "beer bottle|bottle of beer", "bottle|vessel|artifact|entity", "a bottle that holds beer"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder like the photographs': six images of 64 pixels for each class, each class of its own colour."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("photographs")
    with (folder / "classes.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["wnid", "name", "synonyms", "hypernyms", "gloss"])
        table.writerows([wnid, *row] for wnid, row in CLASSES.items())
    rng, rows = np.random.default_rng(0), []
    for number, wnid in enumerate(list(CLASSES) * 6):
        colour = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 200, 0)][number % 4])
        file = io.BytesIO()
        Image.fromarray((colour * 0.7 + rng.integers(0, 70, (64, 64, 3))).astype(np.uint8)).save(file, "PNG")
        rows.append({"image": {"bytes": file.getvalue(), "path": f"{number}.png"}, "wnid": wnid})
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    return folder


@pytest.mark.parametrize("world", ["photos", "scenes"])
def test_it_writes_an_encoder_that_open_clip_loads(world, data, tmp_path):
    settings = {"photos": [f"data={data}", "batch_size=8"], "scenes": ["n_scenes=12", "batch_scenes=4", "workers=1"]}[world]
    folder = main([f"world={world}", f"out={tmp_path / 'clip'}", "minutes=0.03", *settings])
    encoder = OpenClipEncoder(None, f"local-dir:{folder}")
    assert encoder.encode_images([np.zeros((64, 64, 3), np.uint8)]).shape == (1, 256)
    assert encoder.encode_texts(["a photo of something"]).shape == (1, 256)
    assert "unsafe" not in (folder / "tokenizer.json").read_text()


def test_a_sentence_that_holds_for_another_class_too_counts_neither_for_nor_against_it(data):
    world = Photos(data=str(data), batch_size=24)
    world.prepare()
    shared = 0
    for seed in range(40):
        _, [texts] = world.batch(0.0, np.random.default_rng(seed))
        assert not texts.also_true[np.arange(24), texts.own].any()
        for text, column in zip(texts.said, texts.also_true.T, strict=True):
            words = text.replace("qqq", " ").split()
            # "a photo of an arachnid" holds for scorpions and tarantulas; naming one of them does not hold for the other
            if ("arachnid" in words or "arachnids" in words) and not {
                "scorpion",
                "scorpions",
                "tarantula",
                "tarantulas",
                "segmented",
            } & set(words):
                shared += int(column.any())
            if "teapot" in words:
                assert not column.any()
    assert shared > 0


def test_a_world_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match="world=NAME, NAME one of scenes, photos"):
        main(["out=x"])
    with pytest.raises(SystemExit, match="expected classes.csv and train.parquet"):
        main(["world=photos", f"data={tmp_path}", f"out={tmp_path / 'clip'}"])


def test_the_encoder_of_photographs_that_ships_is_small_and_knows_no_verdicts():
    files = [path for path in (ROOT / "checkpoints/photos_clip").iterdir() if path.suffix not in (".py", ".pyc") and path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors", ".md"}
    assert sum(path.stat().st_size for path in files) < 25e6
    words = json.loads((ROOT / "checkpoints/photos_clip/tokenizer.json").read_text())["model"]["vocab"]
    assert {"bottle", "tarantula", "[UNK]"} <= set(words)
    assert not {"safe", "unsafe"} & set(words)


@pytest.mark.skipif(not TINY.is_dir(), reason="the photographs are not here")
def test_the_encoder_of_photographs_that_ships_names_them():
    """0.367 of 10,000 (benchmarks/photos_encoder.py); of 400, 0.29 and more with a chance of 0.999."""
    import pyarrow.parquet as pq

    encoder = OpenClipEncoder(None, "guardkit:photos_clip", batch_size=100)
    classes = read_classes(TINY / "classes.csv")
    rows = pq.read_table(TINY / "val.parquet", columns=["image", "wnid"]).to_pylist()[::25]
    images = encoder.encode_images([np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")) for row in rows])
    texts = encoder.encode_texts([f"a photo of a {one.synonyms[0]}" for one in classes.values()])
    named = np.array(list(classes))[(images @ texts.T).argmax(axis=1)]
    assert np.mean(named == np.array([row["wnid"] for row in rows])) > 0.29
