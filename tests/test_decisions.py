"""What `predict` takes and gives: any image-like thing, one or many, and no undecided image that looks safe."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, picture

from guardkit import Decision, GuardClassifier
from guardkit.heads import LinearHead
from guardkit.images import encode_png
from guardkit.metrics.operating_points import operating_points
from guardkit.schema import InputError

IMAGE = np.asarray(picture(1))
PNG = encode_png(IMAGE)


@pytest.fixture(scope="module")
def guard(scenes_encoder, scenes_policy):
    torch.manual_seed(0)
    head = LinearHead.build(scenes_encoder, scenes_policy)
    torch.nn.init.normal_(head.linear.weight, std=0.1)
    return GuardClassifier(head, scenes_encoder, scenes_policy)


@pytest.fixture(scope="module")
def score(guard):
    return guard.predict(IMAGE)[0].score


def at_end(data):
    file = io.BytesIO()
    file.write(data)
    return file


class Stubborn:
    """An object that says it is an array, and is none."""

    def __array__(self, *args, **kwargs):
        raise RuntimeError("no\nvalues here")


CHW = torch.from_numpy(IMAGE.copy()).permute(2, 0, 1)
ONE = {
    "bytes": PNG,
    "bytearray": bytearray(PNG),
    "memoryview": memoryview(PNG),
    "file object": io.BytesIO(PNG),
    "file object at its end": at_end(PNG),
    "uint8 array": IMAGE,
    "channels first": np.moveaxis(IMAGE, 2, 0),
    "float array": IMAGE / 255,
    "float32 array": (IMAGE / np.float32(255)).astype(np.float32),
    "with opaque alpha": np.dstack([IMAGE, np.full(IMAGE.shape[:2], 255, np.uint8)]),
    "uint8 tensor": CHW,
    "tensor of rows": CHW.permute(1, 2, 0),
    "float tensor": (CHW / 255).requires_grad_(),
    "array in an array": np.array([PNG], dtype=object),
    "generator": (one for one in [PNG]),
    "batch of one": IMAGE[None],
    "batch tensor": CHW[None],
}


@pytest.mark.parametrize("name", ONE)
def test_one_image_of_any_kind_is_one_decision(guard, score, name):
    (decision,) = guard.predict(ONE[name])
    assert decision.error is None
    assert decision.score == pytest.approx(score, abs=1e-6)


def test_a_file_is_read_whole_and_never_line_by_line(guard, score, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    with open(path, "rb") as file:
        assert [decision.score for decision in guard.predict(file)] == pytest.approx([score], abs=1e-6)
    with open(path, encoding="latin-1") as file:
        (decision,) = guard.predict(file)
    assert "open it in binary mode" in decision.error


def test_grey_images_are_read_as_such(guard):
    grey = IMAGE[..., 0].copy()
    scores = [one.score for one in guard.predict([grey, grey[..., None], grey[None], torch.from_numpy(grey), grey / 255])]
    assert max(scores) - min(scores) < 1e-6
    assert scores[0] == pytest.approx(guard.predict(np.repeat(grey[..., None], 3, axis=2))[0].score, abs=1e-6)


def test_a_transparent_array_lies_on_white(guard):
    clear = np.dstack([IMAGE, np.zeros(IMAGE.shape[:2], np.uint8)])
    assert guard.predict(clear)[0].score == pytest.approx(guard.predict(np.full_like(IMAGE, 255))[0].score, abs=1e-6)


def test_a_batch_is_many_images(guard):
    images = [np.asarray(picture(seed)) for seed in range(4)]
    expected = [decision.score for decision in guard.predict(images)]
    batch = np.stack(images)
    for many in (
        batch,
        batch / 255,
        torch.from_numpy(batch),
        torch.from_numpy(batch).permute(0, 3, 1, 2) / 255,
        iter(images),
        tuple(images),
    ):
        assert [decision.score for decision in guard.predict(many)] == pytest.approx(expected, abs=1e-5)


WRONG = {
    "floats up to 255": (IMAGE.astype(float), r"must lie in 0 to 1, got 0|divide by 255"),
    "standardised": (torch.randn(3, 32, 32), "before it was standardised"),
    "not a number": (np.full((8, 8, 3), np.nan), "must lie in 0 to 1"),
    "whole numbers": (IMAGE.astype(int), "must be uint8 in 0 to 255 or floating-point in 0 to 1, got int64"),
    "booleans": (np.ones((8, 8), bool), "got bool"),
    "ambiguous": (torch.zeros(3, 8, 3), r"may be \(c, h, w\) or \(h, w, c\)"),
    "two channels": (np.zeros((8, 8, 2), np.uint8), "no dimension of 1, 3 or 4 channels"),
    "five dimensions": (np.zeros((1, 2, 8, 8, 3), np.uint8), "must have the shape"),
    "no pixels": (np.zeros((0, 8, 3), np.uint8), "no pixels"),
    "on no device": (torch.zeros(3, 8, 8, device="meta"), "cannot be read"),
    "address": ("https://example.com/cat.jpg", "is a URL, and nothing is fetched"),
    "data address": ("data:image/png;base64,AAAA", "is a URL, and nothing is fetched"),
    "a dictionary": ({"image": PNG}, "an image must be a path, .* got dict"),
    "nothing": (None, "an image must be a path, .* got NoneType"),
    "an array that raises": (Stubborn(), "cannot be read .no values here"),
    "a masked array": (np.ma.masked_less(IMAGE, 128), "hides pixels behind a mask"),
    "closed": (io.BytesIO(), "empty"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_image_says_what_to_pass(guard, name):
    value, reason = WRONG[name]
    bad, good = guard.predict([value, IMAGE])
    assert bad.action == "error"
    assert re.search(reason, bad.error)
    assert good.action in ("allow", "block")


@pytest.mark.parametrize("value", [{"a": PNG}, {"a.png"}, None, 3])
def test_what_is_no_collection_is_refused(guard, value):
    with pytest.raises(InputError, match=r"image.* got (a )?(dict|set|NoneType|int)"):
        guard.predict(value)


def test_a_file_has_a_limit(guard, monkeypatch):
    monkeypatch.setattr("guardkit.inputs._MAX_FILE_BYTES", 100)
    (decision,) = guard.predict(io.BytesIO(PNG))
    assert "more than 100 bytes" in decision.error


def test_large_arrays_are_not_converted(guard):
    huge = np.broadcast_to(np.float32(0.5), (60_000, 60_000, 3))
    (decision,) = guard.predict(huge)
    assert "is more than 100000000 pixels" in decision.error


# --- decisions --------------------------------------------------------------------------------------------------------


def test_an_undecided_image_is_never_taken_for_a_safe_one(guard):
    (bad,) = guard.predict(b"rubbish")
    assert (bad.label, bad.action, bad.top_category) == (None, "error", None)
    with pytest.raises(ValueError, match=r"was not decided \(.*not an image"):
        bad.flagged  # noqa: B018
    for decision in (bad, *guard.predict(IMAGE)):
        with pytest.raises(TypeError, match="ask for decision.action"):
            bool(decision)
    assert Decision(0, float("nan"), 0.5).action == "error"


def test_a_decision_says_what_to_do(guard):
    (blocked,), (allowed,) = guard.predict(IMAGE, threshold=0), guard.predict(IMAGE, threshold=1)
    assert (blocked.action, blocked.flagged) == ("block", True)
    assert (allowed.action, allowed.flagged) == ("allow", False)
    assert blocked.categories[blocked.top_category] == max(blocked.categories.values())


def test_a_decision_is_valid_json(guard):
    for decision in guard.predict([IMAGE, b"rubbish"]):
        found = json.loads(json.dumps(decision.to_dict(), allow_nan=False))
        assert set(found) == {
            "action",
            "label",
            "score",
            "threshold_review",
            "threshold_block",
            "categories",
            "violated",
            "top_category",
            "error",
        }
        assert (found["score"] is None) == (decision.action == "error") == (found["error"] is not None)


def test_one_array_that_raises_is_one_decision(guard):
    (decision,) = guard.predict(Stubborn())
    assert decision.action == "error"


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_an_embedding_without_a_direction_has_no_score(guard, value):
    rows = np.eye(2, guard.encoder.dim, dtype=np.float32)
    assert guard.score_embeddings(rows).shape == (2,)
    rows[1] = value
    with pytest.raises(InputError, match="NaN or infinite values, or rows of zeros"):
        guard.score_embeddings(rows)


@pytest.mark.parametrize("value", [0, "many", None, True])
def test_a_wrong_limit_is_not_blamed_on_the_images(guard, value):
    with pytest.raises(InputError, match="max_pixels must be a whole number of at least 1"):
        guard.predict([np.zeros((8, 8, 3), np.uint8)], max_pixels=value)


@pytest.mark.parametrize("value", [float("nan"), -0.1, 2, 10**400, "0.5", True, None])
def test_a_threshold_is_a_number(guard, value):
    before = guard.threshold
    with pytest.raises(InputError, match=r"threshold must lie in \[0, 1\]"):
        guard.threshold = value
    assert guard.threshold == before


# --- operating points -------------------------------------------------------------------------------------------------


def test_an_operating_point_can_be_set(scenes_encoder, scenes_policy):
    rng = np.random.default_rng(0)
    labels = np.repeat([1, 0], [40, 40])
    points = operating_points(labels, np.clip(rng.normal(0.3 + 0.4 * labels, 0.1), 0, 1))
    guard = GuardClassifier(LinearHead.build(scenes_encoder, scenes_policy), scenes_encoder, scenes_policy, operating_points=points)
    assert guard.set_operating_point("fpr_0.05") == guard.threshold == points["fpr_0.05"]["threshold"]
    with pytest.raises(InputError, match=r"fpr_0.01 cannot be promised: it rests on 40 safe validation images, .* takes 100 to be seen"):
        guard.set_operating_point("fpr_0.01")
    with pytest.raises(InputError, match=r"'strict' is not among the operating points \(balanced, fpr_0.01, fpr_0.05\)"):
        guard.set_operating_point("strict")
    assert guard.threshold == points["fpr_0.05"]["threshold"]


def test_three_images_promise_nothing(scenes_encoder, scenes_policy, tmp_path):
    points = operating_points(np.array([1, 0, 0, 0]), np.array([0.2, 0.1, 0.3, 0.9]))
    for name, needed in (("fpr_0.05", 20), ("fpr_0.01", 100)):
        assert points[name]["threshold"] is None
        assert points[name]["n_safe"] == 3
        assert f"takes {needed}" in points[name]["reason"]
    guard = GuardClassifier(LinearHead.build(scenes_encoder, scenes_policy), scenes_encoder, scenes_policy, operating_points=points)
    assert (
        "it rests on 3 safe validation images, counterfactuals included, and"
        in (guard.save_pretrained(tmp_path / "guard") / "README.md").read_text()
    )
    loaded = GuardClassifier.from_pretrained(tmp_path / "guard", encoder=scenes_encoder)
    with pytest.raises(InputError, match="rests on 3 safe validation images"):
        loaded.set_operating_point("fpr_0.05")


def test_scores_that_leave_no_threshold_are_said_so():
    labels = np.repeat([1, 0], [50, 200])
    points = operating_points(labels, np.where(labels == 1, 0.2, 0.9))
    assert points["fpr_0.05"]["threshold"] is None
    assert "no threshold flags an unsafe validation image" in points["fpr_0.05"]["reason"]


# --- forks ------------------------------------------------------------------------------------------------------------

FORK = """
import os, signal
import numpy as np, torch
torch.set_num_threads(2)
from guardkit import GuardClassifier, Policy
from guardkit.encoders.open_clip import OpenClipEncoder
from guardkit.heads import MLPHead
encoder, policy = OpenClipEncoder(None, "guardkit:scenes_clip", device="cpu"), Policy.load("conf/policy/scenes.yaml")
guard = GuardClassifier(MLPHead.build(encoder, policy, hidden=2048), encoder, policy)
images = [np.random.default_rng(seed).integers(0, 256, (300, 300, 3), dtype=np.uint8) for seed in range(12)]
before = [decision.score for decision in guard.predict(images)]
torch.randn(1500, 1500) @ torch.randn(1500, 1500)
child = os.fork()
if not child:
    signal.alarm(60)
    after = [decision.score for decision in guard.predict(images)]
    torch.randn(1500, 1500) @ torch.randn(1500, 1500)
    os._exit(0 if np.allclose(before, after, atol=1e-5) else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_predicts():
    env = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK], capture_output=True, text=True, timeout=300, cwd=ROOT, env=env, check=True
    )
    assert done.stdout.split() == ["0"]
