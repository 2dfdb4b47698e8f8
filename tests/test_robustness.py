"""Attacks against foolbox and against models whose answer is known; both protocols on guards of either kind."""

from __future__ import annotations

import dataclasses
import math
import warnings

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import picture
from scipy.stats import binomtest

from guardkit import GuardClassifier
from guardkit.embeddings import EmbeddingStore
from guardkit.encoders.base import encode_in_batches, prepare_pixels
from guardkit.heads import PromptHead
from guardkit.robustness import attacks
from guardkit.robustness.measuring import COLUMNS, RobustnessSettings, measure_robustness, sanity_checks, write_robustness
from guardkit.robustness.perturbations import perturb
from guardkit.robustness.victim import Victim, to_images, to_pixels
from guardkit.scenes.content import SceneContent
from guardkit.scenes.world import ScenePool
from guardkit.schema import InputError, Judgment

QUICK = RobustnessSettings(
    n_unsafebench=24, n_pixels=30, pgd_steps=8, epsilons=(1, 8), noise_stds=(8,), edits=("jpeg", "border"), strengths=(1, 5), batch_size=8
)


class TinyEncoder:
    """A small random convolutional network on 16 x 16 pixels, as an encoder."""

    name, batch_size, dim = "tiny", 8, 6
    config: dict = {}
    preprocessing = {
        "size": [16, 16],
        "mean": [0.5, 0.4, 0.45],
        "std": [0.25, 0.3, 0.27],
        "interpolation": "bicubic",
        "resize_mode": "squash",
    }

    def __init__(self, seed=0):
        self.fingerprint = f"{seed:064d}"
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = torch.nn.Sequential(
                torch.nn.Conv2d(3, 8, 3), torch.nn.GELU(), torch.nn.Conv2d(8, 8, 3, stride=2), torch.nn.GELU(), torch.nn.Flatten(),
                torch.nn.Linear(288, 6),
            ).requires_grad_(False)  # fmt: skip

    def _encode(self, standardised, normalize):
        vectors = self.net(standardised)
        return torch.nn.functional.normalize(vectors, dim=1) if normalize else vectors

    def preprocess(self, image):
        return prepare_pixels(to_pixels([image], torch.device("cpu")), self.preprocessing)[0]

    def encode_preprocessed(self, images, *, fixed_batch=False, normalize=True):
        return encode_in_batches(lambda batch: self._encode(batch, normalize), images, batch_size=8, dim=6, fixed_batch=fixed_batch)

    def encode_images(self, images, *, fixed_batch=False, normalize=True):
        return self.encode_preprocessed([self.preprocess(image) for image in images], fixed_batch=fixed_batch, normalize=normalize)

    def encode_pixels(self, pixels, *, normalize=True, prepared=False):
        return self._encode(prepare_pixels(pixels, self.preprocessing, prepared=prepared), normalize)


@dataclasses.dataclass
class TinyGuard:
    """A linear head on a tiny encoder."""

    name: str = "tiny"
    threshold: float = 0.5
    is_normalized: bool = True
    scale: float = 8.0
    covers: frozenset | None = None
    encoder: TinyEncoder = dataclasses.field(default_factory=TinyEncoder)

    @property
    def fingerprint(self):
        return f"{self.name:0>64}"

    def logits(self, embeddings):
        weights = torch.tensor([1.0, -0.5, 0.8, -1.2, 0.3, 0.6])
        return self.scale * (embeddings.to("cpu", torch.float32) @ weights + (-0.1 if self.is_normalized else 0.02))


class LookingGuard:
    """Scores the mean of red; abstains from dark images."""

    name, fingerprint, covers, threshold = "looking", "1" * 64, None, 0.5

    def __init__(self, dark=0.0):
        self.dark, self.n_asked = dark, 0

    def judge(self, images):
        self.n_asked += len(images)
        assert all(image.dtype == np.uint8 for image in images)
        return [
            Judgment(math.nan, "too dark") if image.mean() < self.dark else Judgment(float(image[:, :, 0].mean() / 255)) for image in images
        ]


@pytest.fixture(scope="module")
def data():
    """Random pictures, labelled by the tiny guard itself for nine in ten."""
    images = [np.asarray(picture(seed, (24, 18) if seed % 3 else (16, 16))) for seed in range(48)]
    flagged = Victim(TinyGuard()).decide_images(images) >= 0
    labels = np.where(np.arange(48) % 10 == 9, ~flagged, flagged).astype(int)
    assert 10 < labels.sum() < 38
    return images, labels, [str(i // 2) for i in range(48)]


@pytest.fixture(scope="module")
def rows(data):
    return measure_robustness(TinyGuard(), *data, QUICK)


def row_of(rows, protocol, attack, strength):
    (row,) = [row for row in rows if (row["protocol"], row["attack"], row["strength"]) == (protocol, attack, strength)]
    return row


# --- attacks on models whose answer is known --------------------------------------------------------------------------


def linear(seed=0, n=200, scale=1.0):
    """A linear value, images on both sides of it, and how far each is from the boundary in the maximum norm."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64)
    pixels = 0.3 + 0.4 * torch.rand(n, 3, 5, 4, generator=generator, dtype=torch.float64)
    middle = (pixels * weights).flatten(1).sum(1).median()

    def value(x):
        return scale * ((x * weights).flatten(1).sum(1) - middle + 1e-9)

    labels = (value(pixels) >= 0).long()
    return value, pixels, labels, value(pixels).abs() / (scale * weights.abs().sum())


@pytest.mark.parametrize("epsilon", [0.005, 0.02, 0.1])
def test_attacks_reach_exactly_as_far_as_a_linear_model_allows(epsilon):
    value, pixels, labels, distance = linear()
    robust = distance > epsilon
    assert 0 < robust.sum() < 200 or epsilon == 0.1
    rng = np.random.default_rng(0)
    attacked = {
        "fgsm": attacks.fgsm(value, pixels, labels, epsilon=epsilon),
        "pgd": attacks.pgd(value, pixels, labels, epsilon=epsilon, steps=10, step_size=epsilon / 4, rng=rng, restarts=2),
        "pgd, last step": attacks.pgd(
            value, pixels, labels, epsilon=epsilon, steps=30, step_size=epsilon / 4, rng=rng, keep_strongest=False
        ),
    }
    for name, changed in attacked.items():
        assert (attacks.is_right(value(changed), labels) == robust).all(), name
        assert (changed - pixels).abs().max() <= epsilon + 1e-12
        assert 0 <= changed.min() <= changed.max() <= 1
    # deepfool goes a fiftieth further than needed, and not at all if that is too far
    fooled = attacks.is_right(value(attacks.deepfool(value, pixels, labels, epsilon=epsilon, steps=20)), labels)
    assert not fooled[distance * 1.021 + 2e-4 < epsilon].any()
    assert fooled[robust].all()


def test_bounds_are_kept_and_stop_an_attack():
    value, _, _, _ = linear()
    corners = (torch.rand(40, 3, 5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) > 0.5).double()
    labels = (value(corners) >= 0).long()
    rng = np.random.default_rng(0)
    for changed in (
        attacks.fgsm(value, corners, labels, epsilon=0.3),
        attacks.pgd(value, corners, labels, epsilon=0.3, steps=4, step_size=0.1, rng=rng, restarts=3),
        attacks.deepfool(value, corners, labels, epsilon=0.3, steps=4),
        attacks.square(value, corners, labels, epsilon=0.3, queries=20, rng=rng),
        attacks.gaussian_noise_of_norm(corners, epsilon=5.0, rng=rng),
    ):
        assert 0 <= changed.min() <= changed.max() <= 1
        assert (changed != corners).any()


def test_pgd_runs_again_only_for_images_that_hold_out():
    value, pixels, labels, distance = linear()
    asked = []

    def counted(x):
        asked.append(len(x))
        return value(x)

    attacks.pgd(counted, pixels, labels, epsilon=0.02, steps=5, step_size=0.01, rng=np.random.default_rng(0), restarts=2)
    assert asked == [200] * 6 + [int((distance > 0.02).sum())] * 6


def test_pgd_keeps_the_strongest_of_all_steps():
    """Of a value that grows and falls again along the way, the best is kept; the last step is another."""

    def value(x):
        return torch.cos(40 * x.flatten(1).mean(1))

    pixels, labels = torch.full((1, 3, 2, 2), 0.5), torch.tensor([1])
    settings = {"epsilon": 0.2, "steps": 12, "step_size": 0.05, "rng": np.random.default_rng(0)}
    best = value(attacks.pgd(value, pixels, labels, **settings))
    last = value(attacks.pgd(value, pixels, labels, **settings, keep_strongest=False))
    assert best < last


def test_square_attack_keeps_its_budget_and_beats_random_signs():
    value, pixels, labels, distance = linear(n=60)
    asked = np.zeros(60, int)

    def counted(x):
        # images are told apart by what no attack of this size can change
        nearest = torch.cdist(x.flatten(1), pixels.flatten(1)).argmin(1)
        np.add.at(asked, nearest.numpy(), 1)
        return value(x)

    changed = attacks.square(counted, pixels, labels, epsilon=0.05, queries=80, rng=np.random.default_rng(0))
    right = attacks.is_right(value(changed), labels)
    assert asked.max() == 80
    assert (asked[~right.numpy()] < 80).any()  # it stops when it has won
    assert (changed - pixels).abs().max() <= 0.05 + 1e-9
    signs = pixels + 0.05 * torch.randint(0, 2, pixels.shape, generator=torch.Generator().manual_seed(0)) * 2 - 0.05
    assert right.sum() < attacks.is_right(value(signs), labels).sum() - 10
    assert right[distance > 0.05].all()


def test_an_abstention_is_never_right_and_ends_the_search():
    values, labels = torch.tensor([1.0, -1.0, math.nan, math.nan, 0.0]), torch.tensor([1, 0, 1, 0, 1])
    assert attacks.is_right(values, labels).tolist() == [True, True, False, False, True]
    asked = []

    def value(x):
        asked.append(len(x))
        return torch.full((len(x),), math.nan)

    attacks.square(value, torch.rand(3, 3, 4, 4), torch.tensor([0, 1, 1]), epsilon=0.1, queries=9, rng=np.random.default_rng(0))
    assert asked == [3]


def test_noise_has_the_stated_length():
    pixels = torch.zeros(3, 3, 8, 8)
    noise = attacks.gaussian_noise_of_norm(pixels, epsilon=0.01, rng=np.random.default_rng(0), bounds=(-3, 3))
    np.testing.assert_allclose(noise.flatten(1).norm(dim=1), 0.01, rtol=1e-5)
    assert abs(float(noise.mean())) < 1e-3


# --- attacks against foolbox ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def foolbox():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it imports scipy.ndimage.filters
        import foolbox

    return foolbox


class Softmaxed(torch.nn.Module):
    """A guard as Q16 in UnsafeBench's code: standardised pixels to a softmax over one logit for safe and one for unsafe."""

    def __init__(self, victim):
        super().__init__()
        self.victim = victim

    def forward(self, x):
        logits = self.victim.on_standardised(x)
        return torch.stack([-logits / 2, logits / 2], dim=1).softmax(dim=1)


def by_foolbox(foolbox, victim, pixels, labels):
    """Robust accuracy of the published attacks, as UnsafeBench's code calls foolbox, and the attacked pixels."""
    model = foolbox.PyTorchModel(Softmaxed(victim).eval(), bounds=(-3, 3), preprocessing=None)
    named = {
        "noise": foolbox.attacks.L2AdditiveGaussianNoiseAttack(),
        "fgsm": foolbox.attacks.LinfFastGradientAttack(),
        "pgd": foolbox.attacks.LinfProjectedGradientDescentAttack(steps=100),
        "deepfool": foolbox.attacks.LinfDeepFoolAttack(steps=100, candidates=2),
    }
    found = {}
    for name, attack in named.items():
        torch.manual_seed(0)
        _, changed, _ = attack(model, pixels, labels, epsilons=0.01)
        with torch.no_grad():
            right = model(changed).argmax(dim=1) == labels
        found[name] = (float(right.float().mean()), changed)
    return found


@pytest.mark.parametrize("scale", [3.0, 300.0])
def test_published_attacks_agree_with_foolbox(foolbox, scale):
    images = [np.asarray(picture(seed, (16, 16))) for seed in range(200)]
    # near the boundary, so that an epsilon of 0.01 decides something; at a scale of 300 softmax saturates
    guard = TinyGuard(scale=scale)
    median = float(np.median(Victim(guard).decide_images(images)))
    guard.threshold = 1 / (1 + math.exp(-median)) if scale < 10 else 0.5
    labels = (Victim(guard).decide_images(images) >= 0).astype(int)
    settings = RobustnessSettings(protocols=("unsafebench",), n_unsafebench=200, batch_size=64)
    rows = {row["attack"]: row for row in measure_robustness(guard, images, labels, None, settings)}
    pixels = torch.stack([guard.encoder.preprocess(image) for image in images])
    theirs = by_foolbox(foolbox, Victim(guard), pixels, torch.from_numpy(labels))
    assert 0.05 < theirs["fgsm"][0] < 0.995
    for name, (robust_accuracy, _) in theirs.items():
        assert rows[name]["n"] == 200
        assert rows[name]["robust_accuracy"] == pytest.approx(robust_accuracy, abs=0.01), name
    # what has no chance in it agrees pixel by pixel
    victim, y = Victim(guard), torch.from_numpy(labels)
    bounds = (-3.0, 3.0)

    def value(x):
        return 2 * torch.sigmoid(victim.on_standardised(x)) - 1

    if scale < 10:
        np.testing.assert_allclose(attacks.fgsm(value, pixels, y, epsilon=0.01, bounds=bounds), theirs["fgsm"][1], atol=1e-6)
        np.testing.assert_allclose(
            attacks.deepfool(value, pixels, y, epsilon=0.01, steps=100, bounds=bounds), theirs["deepfool"][1], atol=1e-4
        )


@pytest.mark.slow
def test_attacks_on_the_embedded_encoder_agree_with_foolbox(foolbox, scenes_guard, scenes):
    """On [0, 1] pixels of drawn scenes, with fewer steps than published; chance may move one image."""
    images, labels, _ = (part[:20] for part in scenes)
    victim = Victim(scenes_guard)
    right = ((victim.decide_images(images) >= 0) == labels).nonzero()[0]
    assert len(right) > 15
    x, y = to_pixels([images[row] for row in right], torch.device("cpu")), torch.from_numpy(labels[right])

    class TwoLogits(torch.nn.Module):
        def forward(self, pixels):
            logits = victim.on_pixels(pixels)
            return torch.stack([-logits / 2, logits / 2], dim=1)

    model = foolbox.PyTorchModel(TwoLogits().eval(), bounds=(0, 1))
    epsilon = 1.5 / 255
    rng = np.random.default_rng(0)
    ours = {
        "fgsm": attacks.fgsm(victim.on_pixels, x, y, epsilon=epsilon),
        "pgd": attacks.pgd(victim.on_pixels, x, y, epsilon=epsilon, steps=12, step_size=epsilon / 8, rng=rng, keep_strongest=False),
        "deepfool": attacks.deepfool(victim.on_pixels, x, y, epsilon=epsilon, steps=8),
    }
    theirs = {
        "fgsm": foolbox.attacks.LinfFastGradientAttack(),
        "pgd": foolbox.attacks.LinfProjectedGradientDescentAttack(rel_stepsize=1 / 8, steps=12),
        "deepfool": foolbox.attacks.LinfDeepFoolAttack(steps=8, candidates=2),
    }
    shares = {}
    for name, attack in theirs.items():
        torch.manual_seed(0)
        _, changed, _ = attack(model, x, y, epsilons=epsilon)
        with torch.no_grad():
            mine, other = (attacks.is_right(victim.on_pixels(pixels), y) for pixels in (ours[name], changed))
        assert int((mine != other).sum()) <= 1, name
        shares[name] = float(mine.float().mean())
    assert shares["pgd"] <= shares["fgsm"] < 1
    assert 0 < shares["pgd"] < 0.9


# --- protocols --------------------------------------------------------------------------------------------------------


def test_published_protocol_takes_images_that_the_guard_has_right(data, rows):
    published = [row for row in rows if row["protocol"] == "unsafebench"]
    assert [row["attack"] for row in published] == ["noise", "fgsm", "pgd", "deepfool"]
    for row in published:
        assert row["n"] == 24
        assert row["clean_accuracy"] == 1
        assert row["strength"] == 0.01
        assert row["robust_accuracy_8bit"] is None
        assert row["note"] is None
    assert row_of(rows, "unsafebench", "pgd", 0.01)["n_passes"] == 24 * 100
    assert row_of(rows, "unsafebench", "noise", 0.01)["robust_accuracy"] == 1
    assert row_of(rows, "unsafebench", "noise", 0.01)["unit"] == "Euclidean length over all standardised pixels"
    few = measure_robustness(TinyGuard(), *data, dataclasses.replace(QUICK, protocols=("unsafebench",), n_unsafebench=500))
    n = few[0]["n"]
    assert 40 <= n < 48
    assert few[0]["note"] == f"the guard had {n} of 48 images right; 500 were asked for"
    assert few[0]["clean_accuracy"] == 1


def test_pixel_protocol_chooses_without_a_look_at_the_guard(rows, data):
    on_pixels = [row for row in rows if row["protocol"] == "pixels"]
    assert [(row["attack"], row["strength"]) for row in on_pixels] == [
        ("noise", 8), ("jpeg", 1), ("jpeg", 5), ("border", 1), ("border", 5), ("fgsm", 1), ("fgsm", 8), ("pgd", 1), ("pgd", 8),
    ]  # fmt: skip
    other = measure_robustness(TinyGuard("other", threshold=0.9), *data, QUICK)
    for row, theirs in zip(on_pixels, [row for row in other if row["protocol"] == "pixels"], strict=True):
        assert (row["n"], row["n_unsafe"], row["n_safe"]) == (30, theirs["n_unsafe"], theirs["n_safe"])
        assert 0.7 < row["clean_accuracy"] < 1
        assert row["robust_accuracy_low"] <= row["robust_accuracy"] <= row["robust_accuracy_high"]
        assert theirs["clean_recall"] < row["clean_recall"]
    pgd = row_of(rows, "pixels", "pgd", 8)
    assert pgd["robust_accuracy"] < 0.3
    assert pgd["recall"] < pgd["clean_recall"]
    assert pgd["fpr"] > pgd["clean_fpr"]
    assert abs(pgd["robust_accuracy_8bit"] - pgd["robust_accuracy"]) < 0.1
    assert all(row["violation"] is None for row in rows)
    assert all(check.is_held for check in sanity_checks(rows))


def test_figures_are_those_of_the_images_that_one_would_upload(data):
    """Every image is chosen; FGSM has no chance in it, so its figures can be worked out by hand."""
    images, labels, groups = data
    settings = dataclasses.replace(QUICK, protocols=("pixels",), n_pixels=48, epsilons=(4,))
    rows = measure_robustness(TinyGuard(), images, labels, groups, settings)
    victim = Victim(TinyGuard())
    uploaded = []
    for image, label in zip(images, labels, strict=True):
        pixels = to_pixels([image], torch.device("cpu")).requires_grad_()
        (gradient,) = torch.autograd.grad(victim.on_pixels(pixels).sum(), pixels)
        changed = (pixels + 4 / 255 * gradient.sign() * (1 - 2 * label)).clamp(0, 1)
        uploaded.append(to_images(changed)[0])
        assert np.abs(uploaded[-1].astype(int) - image).max() <= 4
    flagged = victim.decide_images(uploaded) >= 0
    row = row_of(rows, "pixels", "fgsm", 4)
    assert row["robust_accuracy_8bit"] == pytest.approx((flagged == labels).mean())
    assert row["recall_8bit"] == pytest.approx(flagged[labels == 1].mean())
    assert row["fpr_8bit"] == pytest.approx(flagged[labels == 0].mean())
    assert row["largest_change"] == pytest.approx(4, rel=1e-4)
    flagged = victim.decide_images([perturb(image, "jpeg", 5, seed=0) for image in images]) >= 0
    row = row_of(rows, "pixels", "jpeg", 5)
    assert row["robust_accuracy"] == pytest.approx((flagged == labels).mean())
    assert row["unit"] == "quality of the JPEG file"
    clean = victim.decide_images(images) >= 0
    assert row["clean_accuracy"] == pytest.approx((clean == labels).mean())
    assert row["clean_fpr"] == pytest.approx(clean[labels == 0].mean())


def test_the_same_seed_gives_the_same_table(data, rows):
    again = measure_robustness(TinyGuard(), *data, QUICK)
    for row in [*rows, *again]:
        assert row["seconds"] >= 0
    assert [row | {"seconds": 0} for row in again] == [row | {"seconds": 0} for row in rows]
    other = measure_robustness(TinyGuard(), *data, dataclasses.replace(QUICK, seed=1))
    assert [row["clean_accuracy"] for row in other] != [row["clean_accuracy"] for row in rows]


def test_guards_without_gradients_get_edits_and_queries(data):
    images, _, groups = data
    labels = np.array([image[:, :, 0].mean() >= 127.5 for image in images]).astype(int)
    guard = LookingGuard()
    settings = dataclasses.replace(QUICK, epsilons=(1, 8), square_queries=30, n_square=20)
    rows = measure_robustness(guard, images, labels, groups, settings)
    assert all("no gradients" in row["note"] for row in rows if row["protocol"] == "unsafebench")
    assert all(row["n"] == 0 and row["robust_accuracy"] is None for row in rows if row["protocol"] == "unsafebench")
    assert [row["attack"] for row in rows if row["protocol"] == "pixels"] == [
        "noise",
        "jpeg",
        "jpeg",
        "border",
        "border",
        "square",
        "square",
    ]
    square = row_of(rows, "pixels", "square", 8)
    assert square["n"] == 20
    assert 20 < square["n_queries"] <= 20 * 31  # 30 each, and one to look at the result
    assert square["n_passes"] == 0
    assert square["robust_accuracy"] < square["clean_accuracy"] == 1
    assert square["robust_accuracy_8bit"] == square["robust_accuracy"]  # what is asked is 8 bits all along
    assert guard.n_asked == sum(row["n_queries"] for row in rows) + 30  # and once without any edit
    none = measure_robustness(LookingGuard(), images, labels, groups, dataclasses.replace(settings, square_queries=0))
    assert not any(row["attack"] == "square" for row in none)


def test_abstentions_are_counted_and_never_right(data):
    images, labels, groups = data
    rows = measure_robustness(LookingGuard(dark=256), images, labels, groups, dataclasses.replace(QUICK, square_queries=3))
    for row in rows[4:]:
        assert row["n_abstained"] == row["n_abstained_clean"] == row["n"]
        assert row["robust_accuracy"] == row["clean_accuracy"] == row["recall"] == row["fpr"] == 0
    # a black border brings some below the line
    some = measure_robustness(LookingGuard(dark=120), images, labels, groups, dataclasses.replace(QUICK, edits=("border",), strengths=(5,)))
    border = row_of(some, "pixels", "border", 5)
    assert 0 < border["n_abstained_clean"] < border["n_abstained"]


def test_a_guard_whose_logits_are_no_numbers_abstains(data):
    class Broken(TinyGuard):
        def logits(self, embeddings):
            return super().logits(embeddings) * math.nan

    rows = measure_robustness(Broken(), *data, QUICK)
    assert {row["note"] for row in rows[:4]} == {"the guard had none of 48 images right"}
    for row in rows[4:]:
        assert row["n_abstained"] == row["n"] == 30
        assert row["robust_accuracy"] == 0


def test_gradients_can_be_checked_by_queries(data):
    settings = dataclasses.replace(
        QUICK, protocols=("pixels",), square_on_gradients=True, square_queries=20, edits=(), noise_stds=(), n_square=30
    )
    rows = measure_robustness(TinyGuard(), *data, settings)
    texts = [check.text for check in sanity_checks(rows)]
    assert "tiny, pixels: pgd at 8 is at least as strong as square at 8" in texts
    assert row_of(rows, "pixels", "square", 8)["n_passes"] == 0

    class Masked(TinyGuard):
        """Decides as the other, and hides its gradient."""

        def logits(self, embeddings):
            values = super().logits(embeddings)
            return torch.where(values >= 0, 1.0, -1.0) + 0 * values

    masked = measure_robustness(Masked(scale=0.5), *data, dataclasses.replace(settings, epsilons=(24,), square_queries=60))
    violation = row_of(masked, "pixels", "pgd", 24)["violation"]
    assert "more right of 30 than square at 24" in violation


def test_guards_of_one_encoder_share_edited_images(data):
    store = EmbeddingStore(TinyEncoder(), None)
    settings = dataclasses.replace(QUICK, protocols=("pixels",))
    first = measure_robustness(TinyGuard(), *data, settings, store=store)
    n = store.n_encoded
    assert n == 30 * 6  # as they are, noise, and two edits of two strengths
    second = measure_robustness(TinyGuard(), *data, settings, store=store, name="again")
    assert store.n_encoded == n
    unstored = measure_robustness(TinyGuard(), *data, settings)
    for a, b, c in zip(first, second, unstored, strict=True):
        assert (a["guard"], b["guard"]) == ("tiny", "again")
        assert a | {"seconds": 0} == b | {"seconds": 0, "guard": "tiny"} == c | {"seconds": 0}
    with pytest.raises(ValueError, match="guard tiny needs embeddings of tiny"):
        measure_robustness(TinyGuard(), *data, settings, store=EmbeddingStore(TinyEncoder(seed=1), None))


def test_guards_that_take_embeddings_with_their_length(data):
    images, _, groups = data
    guard = TinyGuard(is_normalized=False)
    by_hand = guard.logits(torch.from_numpy(guard.encoder.encode_images(images, normalize=False))).numpy()
    victim = Victim(guard)
    np.testing.assert_allclose(victim.decide_images(images), by_hand, atol=1e-5)
    one = to_pixels(images[:1], torch.device("cpu"))
    np.testing.assert_allclose(victim.on_pixels(one), by_hand[:1], atol=1e-4)
    labels = (by_hand >= 0).astype(int)
    for store in (None, EmbeddingStore(guard.encoder, None), EmbeddingStore(guard.encoder, None, keep_norms=True)):
        rows = measure_robustness(guard, images, labels, groups, QUICK, store=store)
        assert row_of(rows, "pixels", "jpeg", 1)["clean_accuracy"] == 1
        assert row_of(rows, "unsafebench", "pgd", 0.01)["clean_accuracy"] == 1


@pytest.mark.parametrize("threshold", [0.0, 0.02, 0.7, 1.0, 1.5])
def test_values_decide_as_scores_against_any_threshold(data, threshold):
    images, labels, groups = data
    guard = TinyGuard(threshold=threshold)
    scores = torch.sigmoid(guard.logits(torch.from_numpy(guard.encoder.encode_images(images))).double()).numpy()
    np.testing.assert_array_equal(Victim(guard).decide_images(images) >= 0, scores >= threshold)
    rows = measure_robustness(guard, images, labels, groups, dataclasses.replace(QUICK, pgd_steps=2))
    everything = threshold <= 0
    if threshold <= 0 or threshold >= 1:  # nothing can move it
        assert row_of(rows, "pixels", "pgd", 8)["recall"] == row_of(rows, "pixels", "pgd", 8)["fpr"] == float(everything)
    LookingGuard.threshold, before = threshold, LookingGuard.threshold
    try:
        reds = np.array([image[:, :, 0].mean() / 255 for image in images])
        np.testing.assert_array_equal(Victim(LookingGuard()).decide_images(images) >= 0, reds >= threshold)
    finally:
        LookingGuard.threshold = before


def test_large_images_are_made_smaller_and_all_sizes_attacked():
    sizes = [(40, 30), (300, 20), (16, 16), (40, 30), (1, 1)]
    images = [np.asarray(picture(seed, size)) for seed, size in enumerate(sizes)]
    settings = dataclasses.replace(QUICK, max_side_px=60)
    rows = measure_robustness(TinyGuard(), images, [1, 0, 1, 0, 1], None, settings)
    assert {row["n"] for row in rows if row["protocol"] == "pixels"} == {5}
    with pytest.raises(ValueError, match="one length, got 5, 2 and 5"):
        measure_robustness(TinyGuard(), images, [1, 0], None, settings)
    with pytest.raises(ValueError, match="labels \\(0 or 1\\)"):
        measure_robustness(TinyGuard(), images, [1, 0, 2, 0, 0], None, settings)


def test_one_class_leaves_the_other_figure_empty(data):
    images, labels, _ = data
    unsafe = [image for image, label in zip(images, labels, strict=True) if label == 1]
    for row in measure_robustness(TinyGuard(), unsafe, [1] * len(unsafe), None, QUICK):
        assert row["n_safe"] == 0
        assert row["fpr"] is row["clean_fpr"] is None
        assert row["recall"] == row["robust_accuracy"]


def test_intervals_are_clopper_pearson_and_count_groups(data):
    images, labels, groups = data
    settings = dataclasses.replace(QUICK, protocols=("pixels",), n_pixels=48, epsilons=())
    alone = measure_robustness(TinyGuard(), images, labels, None, settings)
    grouped = measure_robustness(TinyGuard(), images, labels, groups, settings)
    for a, b in zip(alone, grouped, strict=True):
        exact = binomtest(round(a["robust_accuracy"] * 48), 48).proportion_ci(method="exact")
        assert (a["robust_accuracy_low"], a["robust_accuracy_high"]) == pytest.approx((exact.low, exact.high))
        assert b["robust_accuracy"] == a["robust_accuracy"]
        assert b["robust_accuracy_low"] < a["robust_accuracy_low"]
        assert b["robust_accuracy_high"] >= a["robust_accuracy_high"]


# --- checks and the table ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("protocol", "attack", "strength", "change", "message"),
    [
        ("pixels", "pgd", 8, {"robust_accuracy": 1.0}, "pgd at 8 leaves [0-9]+ more right of 30 than fgsm at 8"),
        ("pixels", "fgsm", 8, {"robust_accuracy": 1.0}, "fgsm at 8 leaves [0-9]+ more right of 30 than fgsm at 1"),
        ("unsafebench", "pgd", 0.01, {"robust_accuracy": 1.0 + 1 / 24}, "pgd at 0.01 leaves [0-9]+ more right of 24 than fgsm"),
        ("pixels", "pgd", 1, {"largest_change": 1.01}, "pgd at 1 changes at most 1.01 "),
    ],
)
def test_violations_are_found(rows, protocol, attack, strength, change, message):
    changed = [dict(row) for row in rows]
    row_of(changed, protocol, attack, strength).update(change)
    found = [check for check in sanity_checks(changed) if not check.is_held]
    assert found
    import re

    assert any(re.search(message, check.text) for check in found)
    assert all(changed[check.row]["attack"] in ("pgd", "fgsm") for check in found)


def test_a_violation_stands_in_the_table(data):
    class Strange(TinyGuard):
        """Has a gradient that points the wrong way after the first look: FGSM works, PGD does not."""

        n_seen = 0

        def logits(self, embeddings):
            values = super().logits(embeddings)
            if not values.requires_grad:
                return values
            self.n_seen += 1
            return values if self.n_seen <= 4 else 2 * values.detach() - values

    settings = dataclasses.replace(QUICK, protocols=("pixels",), epsilons=(8,), edits=(), noise_stds=(), batch_size=30)
    rows = measure_robustness(Strange(), *data, settings)
    assert "more right of 30 than fgsm at 8" in row_of(rows, "pixels", "pgd", 8)["violation"]


def test_the_table_is_written_with_its_types(tmp_path, rows, data):
    looking = measure_robustness(LookingGuard(), *data, dataclasses.replace(QUICK, square_queries=2))
    write_robustness(tmp_path / "robustness.parquet", [*rows, *looking])
    table = pq.read_table(tmp_path / "robustness.parquet")
    assert table.schema.equals(COLUMNS)
    assert table.to_pylist() == [*rows, *looking]
    write_robustness(tmp_path / "empty.parquet", [])
    assert pq.read_table(tmp_path / "empty.parquet").schema.equals(COLUMNS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"protocols": ("unsafe",)}, "robustness.protocols may hold unsafebench and pixels, got 'unsafe'"),
        ({"n_pixels": 0}, "robustness.n_pixels must be a whole number of at least 1, got 0"),
        ({"pgd_steps": 2.5}, "robustness.pgd_steps must be a whole number of at least 1, got 2.5"),
        ({"seed": True}, "robustness.seed must be a whole number of at least 0, got True"),
        ({"epsilons": (0,)}, "robustness.epsilons are 8-bit levels, above 0 and at most 255, got \\[0\\]"),
        ({"noise_stds": (300,)}, "robustness.noise_stds are 8-bit levels"),
        ({"edits": ("sepia",)}, "there is no edit 'sepia'"),
        ({"strengths": (6,)}, "strength of an edit must be one of 1, 2, 3, 4, 5, got 6"),
    ],
)
def test_wrong_settings_get_one_line(settings, message):
    with pytest.raises(InputError, match=message):
        RobustnessSettings(**settings)


# --- the embedded encoder ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes_guard(scenes_encoder, scenes_policy):
    return GuardClassifier(PromptHead.build(scenes_encoder, scenes_policy), scenes_encoder, scenes_policy)


@pytest.fixture(scope="module")
def scenes():
    drawn = [ScenePool("test", seed=3).scene(1, i) for i in range(50)]
    images = [SceneContent(one).load() for scene in drawn for one in (scene, scene.counterfactual())]
    return images, np.tile([1, 0], 50), [str(i // 2) for i in range(100)]


def test_a_guard_on_the_embedded_encoder(scenes_guard, scenes):
    images, labels, groups = (part[:16] for part in scenes)
    settings = RobustnessSettings(
        protocols=("pixels",), n_pixels=16, epsilons=(1, 8), pgd_steps=4, noise_stds=(8,), edits=("jpeg", "mosaic"), strengths=(1, 5)
    )
    rows = measure_robustness(scenes_guard, images, labels, groups, settings)
    assert {row["guard"] for row in rows} == {scenes_guard.name}
    assert all(row["violation"] is None for row in rows)
    assert rows[0]["clean_accuracy"] > 0.9
    assert row_of(rows, "pixels", "pgd", 8)["robust_accuracy_8bit"] < 0.2
    assert row_of(rows, "pixels", "jpeg", 1)["robust_accuracy"] > 0.8
    decisions = [decision.label for decision in scenes_guard.predict(images)]
    assert rows[0]["clean_accuracy"] == pytest.approx((np.array(decisions) == labels).mean())
