"""What we write, opened by the libraries that people have, by the call that they would type."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import ROOT, embed_records, strict_json
from PIL import Image
from test_editors_pipeline import CountingEditor, photograph, pipeline
from test_pairs import refuse_some

from guardkit.counterfactual.pair_dataset import write_pair_dataset
from guardkit.data.sources.pairs import PairsSource
from guardkit.embeddings import EmbeddingStore
from guardkit.schema import InputError, Rejected

# every word that the loader takes for a split, between every kind of separator
NAMES = [
    "train_00000.png", "training.png", "test_7.jpg", "a/testing-1.png", "val/3.png", "x valid 9.png", "validation.png", "dev-eval.png",
    "1eval2.png", "b.evaluation.png", "Test.png", "测试.png",
]  # fmt: skip


@pytest.fixture(scope="module")
def pairs(scenes_policy, tmp_path_factory):
    """A dataset in which a third of the tries gave no image, in folders that are named after a split themselves."""
    folder = tmp_path_factory.mktemp("data") / "train" / "test_1"
    records = [replace(photograph(i), id=name) for i, name in enumerate(NAMES)]
    bad = [Rejected("train_9.png", "damaged image")]
    here = pipeline(scenes_policy, CountingEditor(refuse_some), max_tries=2)
    write_pair_dataset(records, here, folder, made_from={}, variants_per_image=2, rejected=bad)
    return folder


@pytest.mark.parametrize("is_named", [True, False], ids=["imagefolder", "by the folder alone"])
def test_hugging_face_reads_both_images_and_every_column_of_a_pair_dataset(pairs, tmp_path, is_named):
    import datasets

    where = {"path": "imagefolder", "data_dir": str(pairs)} if is_named else {"path": str(pairs)}
    loaded = datasets.load_dataset(**where, cache_dir=str(tmp_path))
    assert list(loaded) == ["train"]
    table = pd.read_parquet(pairs / "metadata.parquet")
    assert len(loaded["train"]) == len(table) == 3 * len(NAMES)
    assert set(loaded["train"].column_names) == (set(table.columns) - {"file_name", "edited_file_name"}) | {"image", "edited"}
    for row, expected in zip(loaded["train"], table.to_dict("records"), strict=True):
        for column, file_name in (("image", expected["file_name"]), ("edited", expected["edited_file_name"])):
            if expected["status"] == "rejected" and column == "edited":
                assert row[column] is None
            else:
                with Image.open(pairs / file_name) as image:
                    np.testing.assert_array_equal(np.asarray(row[column]), np.asarray(image))
        for column in ("pair_id", "record_id", "label", "category", "status", "instruction", "seed", "x_min"):
            assert row[column] == expected[column], column
    assert sum(row["edited"] is None for row in loaded["train"]) == len(NAMES)


def test_a_pair_dataset_with_the_names_of_before_is_read_and_not_mixed_with_new_ones(scenes_policy, tmp_path):
    here, folder = pipeline(scenes_policy, CountingEditor(lambda request: refuse_some(request))), tmp_path / "d"
    records = [replace(photograph(i), id=f"x{i}.png") for i in range(3)]
    write_pair_dataset(records, here, folder, made_from={}, variants_per_image=2)
    manifest = json.loads((folder / "manifest.json").read_text())
    table = pd.read_parquet(folder / "metadata.parquet")
    for path in (folder / "images").iterdir():
        path.rename(path.with_name(path.name.replace("X", "train_")))
    for column in ("file_name", "edited_file_name", "pair_id"):
        table[column] = table[column].str.replace("X", "train_")
    table.to_parquet(folder / "metadata.parquet")
    del manifest["format"]
    (folder / ".guardkit.json").unlink()  # that version left no mark
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert [record.id for record in PairsSource(scenes_policy, str(folder)).load().train] == [f"images/train_{i}.png" for i in range(3)]
    with pytest.raises(InputError, match="choose another output_dir"):
        write_pair_dataset(records, here, folder, made_from={}, variants_per_image=2)


def test_embedding_tools_read_the_parts_in_the_order_of_their_names(scenes_encoder, tmp_path):
    """clip-retrieval and autofaiss sort the files of both folders by name and read them side by side."""
    records = [replace(photograph(i), id=f"{i}.png") for i in range(12)]
    store = EmbeddingStore(scenes_encoder, None)
    embed_records(records, scenes_encoder, tmp_path, shard_size=1)
    vectors = {path.stem.removeprefix("img_emb_"): np.load(path) for path in sorted((tmp_path / "img_emb").glob("*.npy"))}
    tables = {path.stem.removeprefix("metadata_"): pd.read_parquet(path) for path in sorted((tmp_path / "metadata").glob("*.parquet"))}
    assert list(vectors) == list(tables) == sorted(map(str, range(12)))
    for number, part in vectors.items():
        assert part.dtype == np.float16
        assert part.shape == (1, scenes_encoder.dim)
        np.testing.assert_allclose(np.linalg.norm(part.astype(float), axis=1), 1, atol=1e-3)
        assert tables[number]["image_path"].tolist() == [f"{number}.png"]
        np.testing.assert_allclose(part, store.embed([records[int(number)].content]), atol=1e-3)
    assert pd.read_parquet(tmp_path / "rejected.parquet").columns.tolist() == ["id", "reason", "shard"]
    assert strict_json(tmp_path / "manifest.json")["written"] == 12


def test_a_guard_and_its_run_open_with_plain_libraries(train):
    from huggingface_hub import ModelCard
    from safetensors.numpy import load_file

    run = train("experiment=pairs_aug").folder
    weights = load_file(run / "guard/model.safetensors")
    assert all(np.isfinite(one).all() for one in weights.values())
    assert strict_json(run / "guard/config.json")["categories"]
    assert yaml.safe_load((run / "guard/policy.yaml").read_text())["name"] == "scenes"
    assert ModelCard.load(run / "guard/README.md").data.to_dict()["tags"]
    assert strict_json(run / "metrics.json")["test"]["n"] <= len(pd.read_parquet(run / "predictions.parquet"))


def test_the_shipped_models_open_with_plain_libraries():
    import open_clip
    import torch
    from diffusers import DiffusionPipeline

    folder = f"local-dir:{ROOT / 'checkpoints/scenes_clip'}"
    model, _, preprocess = open_clip.create_model_and_transforms(folder)
    tokens = open_clip.get_tokenizer(folder)(["a drawing of a hand"])
    with torch.inference_mode():
        image = model.encode_image(preprocess(Image.new("RGB", (64, 64)))[None])
        assert image.shape == model.encode_text(tokens).shape
    editor = DiffusionPipeline.from_pretrained(ROOT / "checkpoints/scenes_edit")
    assert {"unet", "vae", "text_encoder", "tokenizer", "scheduler"} <= {
        name for name, part in editor.components.items() if part is not None
    }
