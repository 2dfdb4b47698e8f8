"""Which head learns most from 4 to 64 labels? Heads and regularisers of the literature on cached embeddings, in both worlds.

    python benchmarks/heads.py output_dir=DIR [data=DIR] [policies=tune:22] [sizes=4,8,16,32,64] [seeds=3] [safe_per_unsafe=1,4]
        [loose=false] [part=plain] [per_class=30] [encoder=guardkit:photos_clip]

With `data` (a folder with `train.parquet` and `val.parquet`, see `benchmarks/photographs.py`) for the policies of `class_policies.json`,
without it for the drawn scenes. Everything is NumPy: nothing here is part of the package, and what won is built there. All labels of a
budget are trained on; hyperparameters are the same for all cells and stand in each row's name, so that those that are best on policies
to tune can be fixed before policies to test are looked at. Measures: AUROC, average precision, recall at 5 % false positives on natural
test images. `loose` replaces the unsafe texts by one that names the hypernym alone. Formulas: see each function.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from benchmarks.class_policies import ClassPolicy, photo_of, source_of
from benchmarks.class_policies import policies as of_split
from benchmarks.photographs_report import interval
from guardkit.artifacts import written
from guardkit.counterfactual.edits import Edits
from guardkit.data.arms import Orders, choose
from guardkit.data.datamodule import GuardDataModule
from guardkit.data.sources.base import Loaded, Source
from guardkit.data.sources.scenes import ScenesSource
from guardkit.data.splits import nested_order
from guardkit.data.unlabelled import Unlabelled
from guardkit.editors.inpaint import InpaintEditor
from guardkit.editors.scenes import ScenesEditor
from guardkit.efficiency.engine import chosen
from guardkit.efficiency.solver import Rows, fit_linear
from guardkit.embeddings import EmbeddingStore
from guardkit.encoders.open_clip import OpenClipEncoder
from guardkit.fitting.parts import HEADS
from guardkit.heads import AnchoredHead, LinearHead
from guardkit.metrics.probe import edited_vs_original_auroc
from guardkit.policy import Policy
from guardkit.runs.hydra import CONF_DIR
from guardkit.schema import Record

L2 = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
STRENGTHS = (1e-6, 3e-5, 1e-3, 1e-2, 1e-1, 1.0, 30.0)  # as conf/sweep.yaml
SHARES = (0.25, 0.5, 0.75)  # of the trained head in an average with the text head
N_ERASE = 256  # unlabelled images whose null edits the eraser is fitted on
N_SPREAD = 2048  # unlabelled images that say how much logits vary
N_SAFE_TESTED = 2000
DIFFERENCES = (("anchored", "linear"), ("anchored", "zero-shot"), ("anchored", "linear_whitened"), ("linear", "linear_whitened"))
MEASURES = ("auroc", "average_precision", "recall_at_fpr_0.05")


@dataclass(frozen=True)
class World:
    """One policy with its images, embedded.

    Attributes:
        name: of the policy.
        policy: with its texts.
        encoder: of images and texts.
        orders: of the training pool, by seed.
        row_of, vectors: where in (n, d) a training record stands.
        test, labels: (t, d) and (t,) natural test images.
        data: makes edits.
    """

    name: str
    policy: Policy
    encoder: OpenClipEncoder
    orders: Mapping[int, Orders]
    row_of: Mapping[str, int]
    vectors: np.ndarray
    test: np.ndarray
    labels: np.ndarray
    data: GuardDataModule

    def of(self, records: Sequence[Record]) -> np.ndarray:
        return self.vectors[[self.row_of[one.id] for one in records]]

    @cached_property
    def unlabelled(self) -> np.ndarray:
        """(N_SPREAD, d), labels not looked at."""
        return self.of(nested_order(self.data.load(), 0)[:N_SPREAD])

    @cached_property
    def whitening(self) -> np.ndarray:
        return Unlabelled(self.data).whitening(N_SPREAD, 0.003)

    @cached_property
    def scale(self) -> float:
        return self.test.shape[1] ** 0.5

    @cached_property
    def text_sides(self) -> tuple[np.ndarray, np.ndarray]:
        """Encoded safe and unsafe texts."""
        safe = [*self.policy.safe_texts, *(text for one in self.policy.categories for text in one.safe_texts)]
        unsafe = [text for one in self.policy.categories for text in one.unsafe_texts]
        return self.encoder.encode_texts(safe), self.encoder.encode_texts(unsafe)

    def zero_shot(self, x: np.ndarray, scale: float = 30.0) -> np.ndarray:
        """Log-odds of a softmax over all texts, as an untrained prompt head."""
        safe, unsafe = (np.logaddexp.reduce(scale * x @ side.T, axis=1) for side in self.text_sides)
        return unsafe - safe

    @cached_property
    def null_edits(self) -> tuple[np.ndarray, np.ndarray]:
        """Unlabelled images and their null edits: of the same label, whatever it is."""
        return self.edited(nested_order(self.data.load(), 0)[:N_ERASE], "null")

    def edited(self, records: Sequence[Record], kind: str) -> tuple[np.ndarray, np.ndarray]:
        """Those that came through, and their edits."""
        views = self.data.views.edited(list(records), 1, kind, self.data.edits)  # type: ignore[arg-type]
        there = views.there[:, 0]
        return self.of(records)[there], views.vectors[there, 0]


@dataclass(frozen=True)
class Cell:
    """Labelled embeddings of one subset: unsafe, natural safe, and edits of the unsafe ones (counterfactuals, null edits)."""

    unsafe: np.ndarray
    safe: np.ndarray
    counterfactuals: np.ndarray
    null_edits: np.ndarray

    @property
    def x(self) -> np.ndarray:
        return np.concatenate([self.unsafe, self.safe])

    @property
    def y(self) -> np.ndarray:
        return np.repeat([1, 0], [len(self.unsafe), len(self.safe)])


# --- measures ---------------------------------------------------------------------------------------------------------------------------


def measured(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(m, n) scores, (n,) labels -> (m, 3) MEASURES. Scores are continuous: ties are broken at random by rounding."""
    order = np.argsort(-scores, axis=1)
    hit = labels[order]
    n_unsafe, n_safe = labels.sum(), (1 - labels).sum()
    true, false = hit.cumsum(axis=1), (1 - hit).cumsum(axis=1)
    auroc = 1 - (false * hit).sum(axis=1) / (n_unsafe * n_safe)
    precision = (true / np.arange(1, len(labels) + 1) * hit).sum(axis=1) / n_unsafe
    recall = np.where(false <= 0.05 * n_safe, true, 0).max(axis=1) / n_unsafe
    return np.stack([auroc, precision, recall], axis=1)


# --- heads ------------------------------------------------------------------------------------------------------------------------------


def logistic(problems: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], start: np.ndarray | None = None) -> np.ndarray:
    """(z, sign, shares) of each problem -> (p, len(L2), d) weights."""
    rows = [Rows(sign[:, None] * z, sign.astype(float), np.zeros(len(z)), shares) for z, sign, shares in problems]
    return fit_linear(rows, np.array(L2), start=start, tolerance=1e-6).weights


def balanced(groups: Sequence[tuple[np.ndarray, int, float]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(vectors, label, weight of the group) -> rows in which each group has its weight, both labels one half."""
    groups = [one for one in groups if len(one[0])]
    z = np.concatenate([one[0] for one in groups])
    sign = np.concatenate([np.full(len(one[0]), 2 * one[1] - 1) for one in groups])
    total = {label: sum(weight for _, mine, weight in groups if mine == label) for label in (0, 1)}
    shares = np.concatenate([np.full(len(v), 0.5 * weight / total[label] / len(v)) for v, label, weight in groups])
    return z, sign, shares


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def ss_text(world: World, cell: Cell, s: float) -> np.ndarray:
    """SS-Text+ (Silva-Rodriguez et al., 2025): w_c = t_c + s * mean of x in c, then repulsion from the mean of all w."""
    safe, unsafe = (unit(side.mean(axis=0)) for side in world.text_sides)
    w = np.stack([safe + s * cell.safe.mean(axis=0), unsafe + s * cell.unsafe.mean(axis=0)])
    away = 2 * w - w.mean(axis=0)
    w = w - unit(away)
    return world.test @ (unit(w[1]) - unit(w[0]))


def clap(world: World, cells: Sequence[Cell], s: float, adaptive: bool) -> np.ndarray:
    """CLAP (Silva-Rodriguez et al., 2024): cosine logits, pulled to the texts with a strength per class. (cells, t) scores."""
    x, y, shares = padded(cells)
    texts = torch.from_numpy(np.stack([unit(side.mean(axis=0)) for side in world.text_sides])).float()
    w = texts.repeat(len(cells), 1, 1).requires_grad_()

    def logits(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return s * x @ torch.nn.functional.normalize(w, dim=-1).mT

    with torch.no_grad():
        chance = logits(w, x).softmax(-1).gather(2, y[..., None])[..., 0]
        strength = torch.stack([(chance * shares * (y == c)).sum(1) / 0.5 for c in (0, 1)], 1)
        strength = strength if adaptive else torch.zeros_like(strength)
    optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    for _ in range(300):
        optimizer.zero_grad()
        each = torch.nn.functional.cross_entropy(logits(w, x).transpose(1, 2), y, reduction="none")
        loss = (each * shares).sum() + (strength * (w - texts).square().sum(-1)).mean(1).sum()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        found = logits(w, torch.from_numpy(world.test).float())
    return (found[..., 1] - found[..., 0]).double().numpy()


def prompt(world: World, cells: Sequence[Cell], l2: float) -> np.ndarray:
    """The prompt head (Zhou et al., 2022, on vectors instead of words): Adam for 150 steps, pulled to the texts. (cells, t) scores."""
    x, y, shares = padded(cells)
    safe, unsafe = (torch.from_numpy(side).float() for side in world.text_sides)
    start, n_safe = torch.cat([safe, unsafe]), len(safe)
    vectors = start.repeat(len(cells), 1, 1).requires_grad_()
    bias = torch.zeros(len(cells), 1, requires_grad=True)

    def logits(x: torch.Tensor) -> torch.Tensor:
        each = 30.0 * x @ torch.nn.functional.normalize(vectors, dim=-1).mT
        return each[..., n_safe:].logsumexp(-1) - each[..., :n_safe].logsumexp(-1) + bias

    optimizer = torch.optim.Adam([vectors, bias], lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        each = torch.nn.functional.binary_cross_entropy_with_logits(logits(x), y.float(), reduction="none")
        ((each * shares).sum() + 0.5 * l2 * (vectors - start).square().sum()).backward()
        optimizer.step()
    with torch.no_grad():
        return logits(torch.from_numpy(world.test).float()).double().numpy()


def padded(cells: Sequence[Cell]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(cells, n, d) images, (cells, n) labels and weights; padding has none."""
    n = max(len(cell.x) for cell in cells)
    x = torch.zeros(len(cells), n, cells[0].x.shape[1])
    y, shares = torch.zeros(len(cells), n, dtype=torch.long), torch.zeros(len(cells), n)
    for i, cell in enumerate(cells):
        m = len(cell.x)
        x[i, :m], y[i, :m] = torch.from_numpy(cell.x), torch.from_numpy(cell.y)
        shares[i, :m] = torch.from_numpy(0.5 / np.where(cell.y, len(cell.unsafe), len(cell.safe)))
    return x, y, shares


def discriminant(precision: np.ndarray, cell: Cell) -> tuple[np.ndarray, np.ndarray]:
    """w = P (mean unsafe - mean safe), and each labelled image's score by the discriminant without it, in closed form."""
    means = {1: cell.unsafe.mean(axis=0), 0: cell.safe.mean(axis=0)}
    w = precision @ (means[1] - means[0])

    def bias(one: np.ndarray, zero: np.ndarray) -> np.ndarray:
        return 0.5 * (((one @ precision) * one).sum(-1) - ((zero @ precision) * zero).sum(-1))

    left_out = []
    for x, label in ((cell.unsafe, 1), (cell.safe, 0)):
        n = len(x)
        own = (n * means[label] - x) / (n - 1)
        other = np.broadcast_to(means[1 - label], own.shape)
        one, zero = (own, other) if label else (other, own)
        left_out.append(((x @ precision) * (one - zero)).sum(axis=1) - bias(one, zero))
    return w, np.concatenate(left_out)


def by_leave_one_out(text: np.ndarray, left_out: np.ndarray, y: np.ndarray) -> float:
    """The share a of the trained head, of 0, 1/8, ... 1, whose leave-one-out scores have the smallest logistic loss at their best slope and bias."""
    shares = np.linspace(0, 1, 9)
    weights = np.where(y, 0.5 / y.sum(), 0.5 / (1 - y).sum())
    losses = []
    for a in shares:
        z = (1 - a) * text + a * left_out
        rows = Rows((2 * y - 1)[:, None] * z[:, None], (2.0 * y - 1), np.zeros(len(y)), weights)
        losses.append(fit_linear([rows], np.array([1e-2]), tolerance=1e-6).objective[0, 0])
    losses = np.array(losses)
    return float(shares[np.abs(losses - losses.min()) < 1e-9].mean())


# --- everything on one policy -----------------------------------------------------------------------------------------------------------


def try_plain(world: World, cells: Sequence[Cell]) -> Iterator[tuple[str, np.ndarray]]:
    """Heads on natural images of both labels: names and (cells, t) scores."""
    t, n = world.test, len(cells)
    text = {name: world.zero_shot(t, scale) for name, scale in (("zs30", 30.0), ("zs100", 100.0))}
    spread = {name: world.zero_shot(world.unlabelled, scale).std() for name, scale in (("zs30", 30.0), ("zs100", 100.0))}
    for name, scores in text.items():
        yield name, np.tile(scores, (n, 1))
    fisher = LinearHead.from_texts(world.encoder, world.policy).linear.weight[0].detach().double().numpy()
    safe, unsafe = world.text_sides
    gap = unsafe.mean(axis=0) - safe.mean(axis=0)
    yield "text_fisher", np.tile(t @ fisher, (n, 1))
    yield "text_mean", np.tile(t @ gap, (n, 1))
    m = world.whitening * world.scale
    gap_white = world.whitening.T @ gap  # weights in whitened space of Fisher's discriminant with the images' covariance
    yield "text_image_fisher", np.tile(t @ m @ gap_white, (n, 1))

    rows = [(cell, balanced([(cell.unsafe, 1, 1), (cell.safe, 0, 1)])) for cell in cells]
    plain = logistic([(z * world.scale, sign, shares) for _, (z, sign, shares) in rows])
    white = logistic([(z @ m, sign, shares) for _, (z, sign, shares) in rows])
    from_texts = logistic([(z * world.scale, sign, shares) for _, (z, sign, shares) in rows], fisher)
    of_unlabelled = {"linear": world.unlabelled * world.scale, "whitened": world.unlabelled @ m}
    for j, l2 in enumerate(L2):
        yield f"linear l2={l2:g}", plain[:, j] @ (t * world.scale).T
        yield f"linear_texts l2={l2:g}", from_texts[:, j] @ (t * world.scale).T
        trained = {"linear": plain[:, j] @ (t * world.scale).T, "whitened": white[:, j] @ (t @ m).T}
        yield f"whitened l2={l2:g}", trained["whitened"]
        deviations = {
            name: (each[:, j] @ of_unlabelled[name].T).std(axis=1, keepdims=True) for name, each in (("linear", plain), ("whitened", white))
        }
        if l2 in (1e-2, 1.0):
            for a in SHARES:
                for head in trained:
                    yield (
                        f"wise {head} zs30 l2={l2:g} a={a}",
                        (1 - a) * text["zs30"] / spread["zs30"] + a * trained[head] / deviations[head],
                    )
                yield (
                    f"wise whitened text_fisher l2={l2:g} a={a}",
                    (1 - a) * (t @ fisher) / (world.unlabelled @ fisher).std() + a * trained["whitened"] / deviations["whitened"],
                )
    # a whitened head that starts from the texts' gap
    unit_gap = gap_white / (world.unlabelled @ m @ gap_white).std()
    for k in (1.0, 2.0, 4.0):
        found = logistic([(z @ m, sign, shares) for _, (z, sign, shares) in rows], k * unit_gap)
        for j, l2 in enumerate(L2):
            yield f"whitened_texts start={k:g} l2={l2:g}", found[:, j] @ (t @ m).T
    # a whitened head beside the text head's logit, which is one more feature of weight k at the start
    for k in (1.0, 2.0, 4.0):
        start = np.append(np.zeros(t.shape[1]), k)
        z_of = {id(cell): np.column_stack([z @ m, world.zero_shot(z) / spread["zs30"]]) for cell, (z, _, _) in rows}
        found = logistic([(z_of[id(cell)], sign, shares) for cell, (_, sign, shares) in rows], start)
        on_test = np.column_stack([t @ m, text["zs30"] / spread["zs30"]])
        for j, l2 in enumerate(L2):
            yield f"beside_texts start={k:g} l2={l2:g}", found[:, j] @ on_test.T
    for s in (1.0, 10.0, 100.0):
        yield f"ss_text+ s={s:g}", np.stack([ss_text(world, cell, s) for cell in cells])
    for l2 in (0.1,):
        yield f"prompt l2={l2:g}", prompt(world, cells, l2)
    yield "clap s=30", clap(world, cells, 30.0, adaptive=True)

    covariance = np.cov(world.unlabelled.T)
    shared = np.linalg.inv(covariance + 0.003 * np.trace(covariance) / len(covariance) * np.eye(len(covariance)))
    for name in ("own", "unlabelled"):
        alone, joined, halves = [], [], []
        for cell in cells:
            if name == "own":
                centred = np.concatenate([cell.unsafe - cell.unsafe.mean(axis=0), cell.safe - cell.safe.mean(axis=0)])
                s_n = centred.T @ centred
                d = len(s_n)
                precision = d * np.linalg.inv(s_n + np.trace(s_n) / (len(centred) - 1) * np.eye(d))
            else:
                precision = shared
            w, left_out = discriminant(precision, cell)
            size = (world.unlabelled @ w).std()
            a = by_leave_one_out(world.zero_shot(cell.x) / spread["zs30"], left_out / size, cell.y)
            alone.append(t @ w)
            halves.append(0.5 * text["zs30"] / spread["zs30"] + 0.5 * (t @ w) / size)
            joined.append((1 - a) * text["zs30"] / spread["zs30"] + a * (t @ w) / size)
        yield f"gda {name}", np.stack(alone)
        yield f"gda {name} + text a=loo", np.stack(joined)
        yield f"gda {name} + text a=0.5", np.stack(halves)


def try_anchors(world: World, cells: Sequence[Cell]) -> Iterator[tuple[str, np.ndarray]]:
    """A second round, once the first had shown that plain features do better than whitened ones: which text head to stand beside, how strongly."""
    t, x = world.test * world.scale, world.unlabelled * world.scale
    rows = [(cell, balanced([(cell.unsafe, 1, 1), (cell.safe, 0, 1)])) for cell in cells]
    strengths = np.array([0.1, 1.0, 10.0, 100.0])

    def solved(problems: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], start: np.ndarray | None = None) -> np.ndarray:
        made = [Rows(sign[:, None] * z, sign.astype(float), np.zeros(len(z)), shares) for z, sign, shares in problems]
        return fit_linear(made, strengths, start=start, tolerance=1e-6).weights

    plain = solved([(z * world.scale, sign, shares) for _, (z, sign, shares) in rows])
    for j, l2 in enumerate(strengths):
        yield f"linear l2={l2:g}", plain[:, j] @ t.T
    covariance = np.cov(x.T)
    values, axes = np.linalg.eigh(covariance / np.trace(covariance) * len(covariance))
    for shrinkage in (0.03, 0.3, 1.0):
        m = (axes * ((values + shrinkage).mean() / (values + shrinkage)) ** 0.5) @ axes.T
        found = solved([(z * world.scale @ m, sign, shares) for _, (z, sign, shares) in rows])
        for j, l2 in enumerate(strengths):
            yield f"whitened shrinkage={shrinkage:g} l2={l2:g}", found[:, j] @ (t @ m).T
    safe, unsafe = world.text_sides
    gap = unsafe.mean(axis=0) - safe.mean(axis=0)
    texts: dict[str, Callable[[np.ndarray], np.ndarray]] = {"mean": lambda z: z @ gap}
    texts |= {f"zs{scale:g}": lambda z, scale=scale: world.zero_shot(z, scale) for scale in (5.0, 10.0, 20.0, 30.0)}
    for text, of in texts.items():
        spread = of(world.unlabelled).std()
        yield text, np.tile(of(world.test), (len(cells), 1))
        for k in (1.0, 2.0, 4.0):
            start = np.append(np.zeros(t.shape[1]), k)
            found = solved([(np.column_stack([z * world.scale, of(z) / spread]), sign, shares) for _, (z, sign, shares) in rows], start)
            on_test = np.column_stack([t, of(world.test) / spread])
            for j, l2 in enumerate(strengths):
                yield f"anchored {text} start={k:g} l2={l2:g}", found[:, j] @ on_test.T
        for j, l2 in enumerate(strengths[1:3], start=1):
            deviation = (plain[:, j] @ x.T).std(axis=1, keepdims=True)
            for a in SHARES:
                yield f"wise linear {text} l2={l2:g} a={a}", (1 - a) * of(world.test) / spread + a * plain[:, j] @ t.T / deviation


def try_package(world: World, keys: Sequence[tuple[int, int, int]]) -> Iterator[tuple[str, np.ndarray]]:
    """The package's heads as `guardkit.sweep` has them in the arm `unpaired`: a fifth of the labels chooses the strength."""
    yield "zero-shot", np.tile(world.zero_shot(world.test), (len(keys), 1))
    factories = {name: HEADS[name] for name in ("linear", "linear_whitened", "anchored")}
    for name, make in factories.items():
        head = make(encoder=world.encoder, policy=world.policy)
        head.prepare(Unlabelled(world.data))
        assert isinstance(head, LinearHead | AnchoredHead)

        def seen(vectors: np.ndarray, head: LinearHead | AnchoredHead = head) -> np.ndarray:
            return head.features(torch.from_numpy(vectors).double()).numpy()

        problems, held_out = [], []
        for size, ratio, seed in keys:
            choice = choose(world.orders[seed], size, ("unsafe", "natural"), ratio)
            train, validation = (
                [(seen(world.of(part[kind])), label, 1.0) for kind, label in (("unsafe", 1), ("natural", 0))]
                for part in (choice.train, choice.validation)
            )
            z, sign, shares = balanced(train)
            problems.append(Rows(sign[:, None] * z, sign.astype(float), np.zeros(len(z)), shares))
            held_out.append(balanced(validation))
        solved = fit_linear(problems, np.array(STRENGTHS), start=head.linear.weight[0].detach().double().numpy(), tolerance=1e-6)
        best = []
        for weights, bias, (z, sign, shares) in zip(solved.weights, solved.bias, held_out, strict=True):
            losses = np.logaddexp(0, -sign * (weights @ z.T + bias[:, None])) @ shares
            best.append(chosen(losses, STRENGTHS))
        yield name, solved.weights[np.arange(len(keys)), best] @ seen(world.test).T
        for l2 in (1.0, 30.0):
            yield f"{name} l2={l2:g}", solved.weights[:, STRENGTHS.index(l2)] @ seen(world.test).T


def eraser(world: World, rank: int, whitening: np.ndarray) -> np.ndarray:
    """(d, d) E with x' = E x + a constant: LEACE (Belrose et al., 2023) for z = "edited"; rank above 1: further directions in which null edits differ."""
    original, edited = world.null_edits
    moved = (edited - original) @ whitening  # whitening is symmetric
    directions = [unit(moved.mean(axis=0))]
    if rank > 1:
        rest = moved - np.outer(moved @ directions[0], directions[0])
        directions += list(np.linalg.svd(rest, full_matrices=False)[2][: rank - 1])
    u = np.stack(directions)
    return np.linalg.inv(whitening) @ (np.eye(len(whitening)) - u.T @ u) @ whitening


def arms_with_edits(cell: Cell, by_group: bool) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Rows of the arms. Without `by_group` each image of a label counts alike."""

    def group(x: np.ndarray, label: int) -> tuple[np.ndarray, int, float]:
        return x, label, 1.0 if by_group else float(len(x))

    c, u, s, n = group(cell.counterfactuals, 0), group(cell.unsafe, 1), group(cell.safe, 0), group(cell.null_edits, 1)
    return {"pairs_aug": balanced([u, c]), "pairs_plus": balanced([u, s, c]), "pairs_balanced": balanced([u, n, s, c])}


def try_edits(world: World, cells: Sequence[Cell], paired: Sequence[tuple[np.ndarray, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
    """Whitened and plain heads of the arms with edits, with the regularisers for them."""
    t, m, d = world.test, world.whitening * world.scale, world.test.shape[1]
    maps: dict[str, np.ndarray] = {"": np.eye(d), " leace": eraser(world, 1, world.whitening)}
    maps |= {f" erased rank={rank}": eraser(world, rank, world.whitening) for rank in (4, 16)}
    for by_group in (False, True):
        arms = [arms_with_edits(cell, by_group) for cell in cells]
        for arm in arms[0]:
            for erased, e in maps.items():
                for head, features in (("whitened", e.T @ m), ("linear", e.T * world.scale)):
                    if (by_group and erased not in ("", " leace")) or (head == "linear" and erased not in ("", " leace")):
                        continue
                    found = logistic([(arm_rows[arm][0] @ features, *arm_rows[arm][1:]) for arm_rows in arms])
                    for j, l2 in enumerate(L2):
                        if l2 in (1e-2, 1e-1, 1.0):
                            yield f"{arm} {head}{erased}{' by_group' if by_group else ''} l2={l2:g}", found[:, j] @ (t @ features).T
    for strength in (0.1, 1.0):
        scores = []
        for unsafe, twins in paired:  # difference discriminant
            gaps, middles = (unsafe - twins) @ m, (unsafe + twins) @ m / 2
            spread = (np.cov(gaps.T, bias=True) + np.cov(middles.T, bias=True)) if len(gaps) > 1 else np.zeros((d, d))
            w = np.linalg.solve(spread + strength * np.eye(d), gaps.mean(axis=0)) if len(gaps) else np.zeros(d)
            scores.append(t @ m @ w)
        yield f"pairs_aug difference_discriminant lambda={strength:g}", np.stack(scores)
    for mu in (0.0, 1.0):  # conditional logistic, mu times cross-entropy beside it
        problems = []
        for cell, (unsafe, twins) in zip(cells, paired, strict=True):
            z, sign, shares = arms_with_edits(cell, by_group=False)["pairs_plus"]
            gaps = (unsafe - twins) @ m
            problems.append(
                Rows(
                    np.concatenate([gaps, sign[:, None] * (z @ m)]),
                    np.concatenate([np.zeros(len(gaps)), sign]),
                    np.zeros(len(gaps) + len(z)),
                    np.concatenate([np.full(len(gaps), 1 / max(1, len(gaps))), mu * shares]),
                )
            )
        found = fit_linear(problems, np.array(L2), tolerance=1e-6).weights
        for j, l2 in enumerate(L2):
            if l2 in (1e-2, 1e-1, 1.0):
                yield f"{'pairs_plus' if mu else 'pairs_aug'} conditional mu={mu:g} l2={l2:g}", found[:, j] @ (t @ m).T


def try_policy(world: World, sizes: Sequence[int], ratios: Sequence[int], seeds: int, *, part: str) -> pd.DataFrame:
    """A row for each head, label budget, number of safe images and seed."""
    keys = [(size, ratio, seed) for ratio in ratios for size in sizes for seed in range(seeds)]
    most = {seed: world.orders[seed].unsafe[: max(sizes)] for seed in range(seeds)}
    twins: dict[str, np.ndarray] = {}
    nulls: dict[str, np.ndarray] = {}
    if part == "edits":
        every = list({one.id: one for records in most.values() for one in records}.values())
        for kind, found in (("counterfactual", twins), ("null", nulls)):
            views = world.data.views.edited(every, 1, kind, world.data.edits)  # type: ignore[arg-type]
            found |= {one.id: views.vectors[i, 0] for i, one in enumerate(every) if views.there[i, 0]}
    cells, paired = [], []
    empty = np.zeros((0, world.test.shape[1]), np.float32)
    for size, ratio, seed in keys:
        choice = choose(world.orders[seed], size, ("unsafe", "natural"), ratio)
        unsafe, safe = choice.of("unsafe"), choice.of("natural")

        def pick(found: Mapping[str, np.ndarray], records: Sequence[Record] = unsafe) -> np.ndarray:
            return np.stack([empty[:0].sum(axis=0), *(found[one.id] for one in records if one.id in found)])[1:]

        cells.append(Cell(*(x.astype(np.float64) for x in (world.of(unsafe), world.of(safe), pick(twins), pick(nulls)))))
        kept = [one for one in unsafe if one.id in twins]
        paired.append((world.of(kept).astype(np.float64).reshape(-1, world.test.shape[1]), pick(twins).astype(np.float64)))
    frames = []
    tried = {
        "plain": lambda: try_plain(world, cells),
        "anchors": lambda: try_anchors(world, cells),
        "edits": lambda: try_edits(world, cells, paired),
        "package": lambda: try_package(world, keys),
    }
    for head, scores in tried[part]():
        figures = measured(scores, world.labels)
        frames.append(pd.DataFrame(figures, columns=list(MEASURES)).assign(head=head, key=range(len(keys))))
    table = pd.concat(frames)
    at = np.array(keys)[table.pop("key")]
    return table.assign(n_unsafe=at[:, 0], safe_per_unsafe=at[:, 1], seed=at[:, 2], policy=world.name)


def traces(world: World) -> dict[str, float | None]:
    """How well a probe tells null edits from originals that no eraser saw, before and after erasing."""
    records = nested_order(world.data.load(), 0)[N_ERASE : N_ERASE + 128]
    original, edited = world.edited(records, "null")
    m = world.whitening
    found = {"before": edited_vs_original_auroc(original, edited).estimate}
    for rank in (1, 4, 16):
        e = eraser(world, rank, m)
        found[f"rank={rank}"] = edited_vs_original_auroc(original @ e.T, edited @ e.T).estimate
    return found


# --- worlds -----------------------------------------------------------------------------------------------------------------------------


def loosely(one: ClassPolicy, policy: Policy) -> Policy:
    """The policy described by its category's hypernym alone: no forbidden class and no look-alike is named."""
    (category,) = policy.categories
    return replace(policy, categories=(replace(category, unsafe_texts=(photo_of(one.hypernym),), safe_texts=("a photo",)),))


class Relabelled:
    """The photographs of a source, read once, as another policy labels them; of each class so many in training."""

    def __init__(self, loaded: Loaded, one: ClassPolicy, policy: Policy, per_class: int) -> None:
        self.name, self.asked = "photos", {"policy": policy.digest, "per_class": per_class}
        self._loaded, self._unsafe, self._category = loaded, set(one.classes), policy.categories[0].name
        self._per_class = per_class

    def load(self) -> Loaded:
        seen: Counter[str] = Counter()
        kept = []
        for record in self._loaded.train:
            seen[record.caption] += 1
            if seen[record.caption] <= self._per_class:
                kept.append(self._labelled(record))
        return replace(self._loaded, train=kept, test=[self._labelled(one) for one in self._loaded.test or ()])

    def _labelled(self, record: Record) -> Record:
        is_unsafe = record.caption in self._unsafe
        return replace(record, label=int(is_unsafe), category=self._category if is_unsafe else None)


def make_world(
    name: str,
    policy: Policy,
    source: Source,
    encoder: OpenClipEncoder,
    store: EmbeddingStore,
    editor: object,
    seeds: int,
    known: dict[str, np.ndarray],
) -> World:
    data = GuardDataModule(source, policy, store, Edits.of(editor).pipeline(policy, store, None))  # type: ignore[arg-type]
    pool = data.load()
    if not known:
        known["train"] = store.embed([one.content for one in pool])  # type: ignore[misc]
        known["test"] = store.embed([one.content for one in data.test])  # type: ignore[misc]
        known["ids"] = np.array([one.id for one in pool])
    row_of = {str(one): i for i, one in enumerate(known["ids"])}
    labels = np.array([one.label for one in data.test])
    safe_rows = np.random.default_rng(0).permutation(np.flatnonzero(labels == 0))[:N_SAFE_TESTED]
    tested = np.sort(np.concatenate([np.flatnonzero(labels == 1), safe_rows]))
    orders = {seed: Orders.of(pool, seed) for seed in range(seeds)}
    return World(name, policy, encoder, orders, row_of, known["train"], known["test"][tested], labels[tested], data)


def worlds(
    data: str, split: str, count: int, encoder: str, cache: Path, seeds: int, per_class: int, *, loose: bool
) -> Iterator[Callable[[], World]]:
    known: dict[str, np.ndarray] = {}
    if not data:
        model = OpenClipEncoder(None, "guardkit:scenes_clip", batch_size=64)
        policy = Policy.load(Path(CONF_DIR) / "policy" / "scenes.yaml")
        store = EmbeddingStore(model, cache)
        yield lambda: make_world("scenes", policy, ScenesSource(policy, n_train=512), model, store, ScenesEditor(), seeds, known)
        return
    model = OpenClipEncoder(None, encoder, batch_size=128)
    store = EmbeddingStore(model, cache)
    ones = of_split(split)[:count]
    loaded = source_of(ones[0].policy, Path(data)).load()
    loaded = replace(loaded, train=nested_order(loaded.train, 0))
    for one in ones:

        def make(one: ClassPolicy = one) -> World:
            policy = loosely(one, one.policy) if loose else one.policy
            return make_world(policy.name, policy, Relabelled(loaded, one, policy, per_class), model, store, InpaintEditor(), seeds, known)

        yield make


def report(table: pd.DataFrame) -> str:
    """AUROC of every head, mean over policies, and of the package's heads the differences with intervals over policies."""
    lines = []
    for ratio, part in table.groupby("safe_per_unsafe"):
        means = part.groupby(["head", "n_unsafe", "policy"])[list(MEASURES)].mean()
        auroc = means["auroc"].unstack("policy")
        sizes = sorted(part["n_unsafe"].unique())
        lines += ["", f"{ratio} safe for each unsafe, {part['policy'].nunique()} policies", ""]
        lines += [f"| head | {' | '.join(f'{size} labels' for size in sizes)} |", "|---|" + "---|" * len(sizes)]
        order = auroc.mean(axis=1).groupby("head").mean().sort_values(ascending=False).index
        lines += [f"| {head} | {' | '.join(f'{auroc.loc[(head, size)].mean():.3f}' for size in sizes)} |" for head in order]
        for first, second in DIFFERENCES if auroc.shape[1] > 1 else ():
            if {first, second} <= set(order):
                cells = [interval((auroc.loc[(first, size)] - auroc.loc[(second, size)]).to_numpy()) for size in sizes]
                lines.append(f"| {first} − {second} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(
    output_dir: str,
    data: str = "",
    policies: str = "tune:22",
    sizes: str = "4,8,16,32,64",
    seeds: str = "3",
    safe_per_unsafe: str = "1,4",
    loose: str = "false",
    part: str = "plain",
    encoder: str = "guardkit:photos_clip",
    per_class: str = "30",
    cache_dir: str = "",
) -> None:
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    split, count = policies.split(":")
    some = [tuple(map(int, text.split(","))) for text in (sizes, safe_per_unsafe)]
    made = worlds(data, split, int(count), encoder, Path(cache_dir or folder / "cache"), int(seeds), int(per_class), loose=loose == "true")
    for i, make in enumerate(made):
        done = folder / f"{split}_{i:02d}.parquet"
        if done.is_file():
            continue
        world = make()
        table = try_policy(world, *some, int(seeds), part=part)  # type: ignore[misc]
        found = traces(world) if part == "edits" else {}
        with written(done) as temporary:
            table.to_parquet(temporary)
        print(
            i, world.name, {name: None if value is None else round(value, 3) for name, value in found.items()}, file=sys.stderr, flush=True
        )

    print(report(pd.concat([pd.read_parquet(one) for one in sorted(folder.glob(f"{split}_*.parquet"))])))


if __name__ == "__main__":
    main(**dict(argument.split("=", 1) for argument in sys.argv[1:]))
