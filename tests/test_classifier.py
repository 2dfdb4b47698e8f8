"""GuardClassifier: decides over anything image-like, survives bad input, and notices a changed byte."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import picture

from guardkit import GuardClassifier
from guardkit.encoders.open_clip import OpenClipEncoder
from guardkit.heads import AnchoredHead, LinearHead, PromptHead
from guardkit.images import encode_png
from guardkit.scenes.content import SceneContent
from guardkit.scenes.world import ScenePool
from guardkit.schema import InputError


@pytest.fixture(scope="module")
def guard(scenes_encoder, scenes_policy):
    torch.manual_seed(0)
    head = LinearHead.build(scenes_encoder, scenes_policy)
    torch.nn.init.normal_(head.linear.weight, std=0.1)
    return GuardClassifier(head, scenes_encoder, scenes_policy, threshold=0.4, training={"n_unsafe": 3})


@pytest.fixture
def folder(guard, tmp_path):
    return guard.save_pretrained(tmp_path / "guard")


def test_predict_takes_anything_and_never_stops(guard, tmp_path):
    from PIL import Image

    image = SceneContent(ScenePool().scene(1, 0)).load()
    path = tmp_path / "a.png"
    path.write_bytes(encode_png(image))
    decisions = guard.predict([str(path), path, Image.fromarray(image), encode_png(image), image, b"rubbish", tmp_path / "none.jpg"])
    scores = [decision.score for decision in decisions[:5]]
    assert max(scores) - min(scores) < 1e-6
    for decision in decisions[:5]:
        assert decision.label == int(decision.score >= 0.4)
        assert decision.threshold == 0.4
        assert tuple(decision.categories) == guard.policy.category_names
        assert decision.error is None
    for decision, reason in zip(decisions[5:], ["not an image", "does not exist"], strict=True):
        assert decision.label is None
        assert math.isnan(decision.score)
        assert reason in decision.error
    assert len(guard.predict(path)) == 1
    assert guard.predict([]) == []
    assert guard.predict(image, threshold=0.0)[0].label == 1


def test_many_images_go_through_in_batches(guard):
    images = [np.asarray(picture(seed)) for seed in range(40)]
    one_by_one = [guard.predict(image)[0].score for image in images]
    assert [decision.score for decision in guard.predict(iter(images))] == pytest.approx(one_by_one, abs=1e-5)


def test_score_embeddings_checks_its_input(guard):
    assert guard.score_embeddings(np.eye(256, dtype=np.float32)[:4]).shape == (4,)
    with pytest.raises(ValueError, match=r"must be \(n, 256\).*got shape \(2, 9\)"):
        guard.score_embeddings(np.ones((2, 9)))
    with pytest.raises(ValueError, match="NaN or infinite"):
        guard.score_embeddings(np.full((1, 256), np.nan))
    with pytest.raises(ValueError, match=r"threshold must lie in \[0, 1\]"):
        guard.predict([], threshold=2)


@pytest.fixture(scope="module")
def rows(guard):
    return np.random.default_rng(0).normal(size=(70_000, guard.encoder.dim)).astype(np.float16)  # more than a block


def test_score_embeddings_reads_what_lies_on_disk(guard, rows, tmp_path):
    np.save(tmp_path / "rows.npy", rows)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    scores = guard.score_embeddings(mapped)
    np.testing.assert_allclose(scores[::700], guard.probabilities(rows[::700])[:, 0], atol=1e-5)
    out = np.lib.format.open_memmap(tmp_path / "scores.npy", "w+", np.float32, (len(rows),))
    assert guard.score_embeddings(mapped, out=out) is out
    np.testing.assert_allclose(out, scores, atol=1e-7)
    np.testing.assert_array_equal(guard.score_embeddings(rows.astype(">f4")), scores)
    mine = np.load(tmp_path / "rows.npy", mmap_mode="c")
    mine[0] = -mine[0]
    negated = guard.score_embeddings(mine)
    assert negated[0] != scores[0]
    np.testing.assert_array_equal(mine[0], -rows[0])  # what was written to a private map is still there


def test_score_embeddings_gives_a_row_without_a_direction_nan_where_it_is_asked_to(guard, rows):
    rows = rows.copy()
    rows[[3, 66_000]], rows[5, 7] = 0, np.inf
    scores = guard.score_embeddings(rows, unusable="nan")
    assert np.flatnonzero(np.isnan(scores)).tolist() == [3, 5, 66_000]
    with pytest.raises(InputError, match='rows of zeros.*row 3 first, or pass unusable="nan"'):
        guard.score_embeddings(rows)
    tiny = np.full((1, guard.encoder.dim), 1e-30, np.float32)  # its square is zero
    assert np.isfinite(guard.score_embeddings(tiny)).all()
    with pytest.raises(InputError, match="unusable must be one of"):
        guard.score_embeddings(rows, unusable="skip")


@pytest.mark.parametrize("out", [np.zeros(3), np.zeros(2, int), [0.0, 0.0]])
def test_score_embeddings_writes_only_where_it_fits(guard, out):
    with pytest.raises(InputError, match=r"out must be an array of \(2,\) floating-point numbers, got"):
        guard.score_embeddings(np.eye(2, 256), out=out)


def embedding_folder(folder, parts, fingerprint=None):
    for name, part in parts.items():
        (folder / "img_emb").mkdir(parents=True, exist_ok=True)
        np.save(folder / "img_emb" / f"img_emb_{name}.npy", part)
    if fingerprint:
        n = sum(len(part) for part in parts.values())
        manifest = {"n_shards": len(parts), "dim": 256, "given": n, "written": n, "rejected": 0}
        manifest |= {"encoder_fingerprint": fingerprint, "normalized": True}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_score_embeddings_takes_a_folder(guard, rows, tmp_path):
    unit = (rows / np.linalg.norm(rows.astype(np.float32), axis=1, keepdims=True)).astype(np.float16)
    parts = {"10": unit[300:700], "2": unit[:300], "11": unit[:0]}  # in the order of their numbers
    folder = embedding_folder(tmp_path / "ours", parts, guard.encoder.fingerprint)
    scores = guard.score_embeddings(unit[:700])
    np.testing.assert_allclose(guard.score_embeddings(str(folder)), scores, atol=1e-6)
    longer = {name: 3 * part for name, part in parts.items()}
    np.testing.assert_allclose(guard.score_embeddings(embedding_folder(tmp_path / "theirs", longer)), scores, atol=1e-3)
    with pytest.raises(InputError, match=r"embeddings of another encoder \(0000.*than the guard's"):
        guard.score_embeddings(embedding_folder(tmp_path / "other", parts, "0" * 64))
    with pytest.raises(InputError, match="is no embedding folder"):
        guard.score_embeddings(tmp_path)


def test_the_decision_alone_is_what_a_head_says_with_all_its_categories(scenes_encoder, scenes_policy):
    class Doubled(LinearHead):
        def forward(self, embeddings):
            return 2 * super().forward(embeddings)

    vectors = torch.randn(5, scenes_encoder.dim)
    for kind, whitened in [(LinearHead, False), (LinearHead, True), (Doubled, False)]:
        head = kind(scenes_encoder.dim, 3, whitened=whitened)
        torch.nn.init.normal_(head.linear.weight)
        torch.nn.init.normal_(head.linear.bias)
        if whitened:
            head.map.normal_()
        with torch.inference_mode():
            np.testing.assert_allclose(head.decision(vectors), head(vectors)[:, 0], rtol=1e-3)
    for head in (PromptHead.build(scenes_encoder, scenes_policy), AnchoredHead.build(scenes_encoder, scenes_policy)):
        head._n_images = None
        torch.nn.init.normal_(head.prompts if isinstance(head, PromptHead) else head.linear.weight)
        for given in (vectors, 1e4 * vectors):  # so far apart that exponentials vanish
            with torch.inference_mode():
                np.testing.assert_allclose(head.decision(given), head(given)[:, 0], rtol=1e-3, atol=1e-3)


def test_saving_and_loading_keeps_every_score(guard, folder):
    loaded = GuardClassifier.from_pretrained(folder)
    embeddings = torch.nn.functional.normalize(torch.randn(9, 256), dim=1).numpy()
    np.testing.assert_array_equal(loaded.probabilities(embeddings), guard.probabilities(embeddings))
    assert (loaded.threshold, loaded.policy, loaded.training) == (guard.threshold, guard.policy, guard.training)
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "policy.yaml", "README.md"}
    config = json.loads((folder / "config.json").read_text())
    assert config["encoder"]["config"]["weights"] == "guardkit:scenes_clip"
    assert "/" not in config["encoder"]["config"]["weights"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "policy.yaml"])
def test_one_changed_byte_is_noticed(folder, name):
    data = bytearray((folder / name).read_bytes())
    # a letter in the middle of a word, or a bit of a weight
    at = data.index(b"scenes") + 2 if name != "model.safetensors" else len(data) - 5
    data[at] ^= 1
    (folder / name).write_bytes(bytes(data))
    with pytest.raises(InputError, match=rf"{name}.*(does not match|not a guard)"):
        GuardClassifier.from_pretrained(folder)


def test_missing_pieces_are_named(folder, tmp_path):
    with pytest.raises(InputError, match="does not exist; give the folder"):
        GuardClassifier.from_pretrained(tmp_path / "nowhere" / "deep")
    with pytest.raises(InputError, match="is a file; give the folder `guard/`"):
        GuardClassifier.from_pretrained(folder / "config.json")
    with pytest.raises(InputError, match="the guard's folder must be a path, got ''"):
        GuardClassifier.from_pretrained("")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model.safetensors is missing or damaged"):
        GuardClassifier.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"holds no guard \(no config.json, nor guard/config.json\); give the folder"):
        GuardClassifier.from_pretrained(folder)


def test_another_encoder_is_refused_and_both_are_named(folder, scenes_encoder, tmp_path):
    from guardkit.artifacts import shipped

    other = tmp_path / "other_clip"
    shutil.copytree(shipped("guardkit:scenes_clip"), other)
    config = json.loads((other / "open_clip_config.json").read_text())
    config["preprocess_cfg"]["mean"] = [0.4, 0.4, 0.4]
    (other / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as caught:
        GuardClassifier.from_pretrained(folder, encoder=OpenClipEncoder(None, f"local-dir:{other}"))
    assert "guardkit:scenes_clip" in str(caught.value)
    assert str(other) in str(caught.value)
    assert GuardClassifier.from_pretrained(folder, encoder=scenes_encoder).encoder is scenes_encoder


def test_the_hub_is_asked_for_ids_only(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="is no folder here, and no guard of that name can be had from the Hub"):
        GuardClassifier.from_pretrained("nobody/no-such-guard")
