"""`GuardClassifier`: an encoder, a head, thresholds and the policy they enforce. The thing other code imports."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from guardkit.artifacts import fingerprint
from guardkit.checks import check_choice, check_whole
from guardkit.embedding_blocks import decide_blocks
from guardkit.embedding_folder import find_embedding_parts
from guardkit.encoders.base import Encoder, ReadsPolicy, enough
from guardkit.encoders.lookup import ENCODER_KINDS, find_encoder
from guardkit.encoders.ways import N_DRAWN, moved_by, of_the_same_weights, said_way
from guardkit.explaining.explanation import Explanation
from guardkit.explaining.methods import heat_map
from guardkit.guard_folder import FILES, read_guard, upload_guard, write_guard
from guardkit.heads import Head, JoinedHead, LinearHead
from guardkit.hub import upload_folder
from guardkit.images import read_image
from guardkit.inputs import each_image, readable
from guardkit.licences import all_licences, check_licences
from guardkit.metrics.operating_points import operating_threshold
from guardkit.policy import Policy
from guardkit.schema import Decision, ImageError, InputError
from guardkit.score_maps import Calibration, ScoreMap
from guardkit.seen import SeenImages
from guardkit.storage import is_url, local_path
from guardkit.thresholds import DEFAULT, Band, Thresholds, check_scope, undecided

log = logging.getLogger(__name__)

_UNUSABLE = "embeddings hold NaN or infinite values, or rows of zeros; embed those images again or leave them out"
_BEYOND = "the guard's weights or the image's embedding are beyond all bounds"


class GuardClassifier:
    """Tells images that a policy forbids from those it allows. Meets the `EmbeddingGuard` protocol.

    Args:
        head: trained, (n, d) -> (n, 1 + k) logits.
        encoder: whose embeddings the head takes.
        policy: with k categories.
        threshold: flag when score >= threshold; or the thresholds of the decision and of each category.
        operating_points: named thresholds and what they gave on validation images; see `set_operating_point`.
        training: facts of the training, plain JSON (prevalence, label budget).
        metrics: measured on a test set, plain JSON.
        training_images: those it was trained and validated on, so that it is tested on others; None: nobody knows.
        calibration: makes its scores probabilities; None: they are the head's own.
        history: earlier thresholds and calibrations, and why they were changed; oldest first, plain JSON.
        licences: of head, data and encoder, as far as somebody states them, such as {"head": "mit", "data": "cc-by-4.0"}.

    Raises:
        InputError: a threshold is no number in [0, 1], or of a category that the policy does not have.

    Attributes:
        name: for tables: the experiment it was trained in, else the kind of its head.
    """

    is_normalized = True

    def __init__(
        self,
        head: Head,
        encoder: Encoder,
        policy: Policy,
        *,
        threshold: float | Thresholds = 0.5,
        operating_points: Mapping[str, dict] | None = None,
        training: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
        training_images: SeenImages | None = None,
        calibration: Calibration | None = None,
        history: Sequence[Mapping[str, Any]] = (),
        licences: Mapping[str, str] | None = None,
    ) -> None:
        self.head = head.eval()
        self.encoder = encoder
        self.policy = policy
        self.thresholds = threshold if isinstance(threshold, Thresholds) else Thresholds.usual(policy.category_names, threshold)
        self.operating_points = dict(operating_points or {})
        self.training = dict(training or {})
        self.metrics = dict(metrics or {})
        self.training_images = training_images
        self.calibration = calibration
        self.history = list(history)
        self.licences = check_licences(licences or {})
        self.name = str(self.training.get("experiment", head.kind))

    def __repr__(self) -> str:
        return f"GuardClassifier(policy={self.policy.name!r}, head={self.head.kind!r}, encoder={self.encoder.name!r}, threshold={self.threshold:g})"

    @property
    def thresholds(self) -> Thresholds:
        """The bands of the decision and of each category."""
        return self._thresholds

    @thresholds.setter
    def thresholds(self, value: Thresholds) -> None:
        if not isinstance(value, Thresholds):
            raise InputError(
                f"thresholds must be guardkit.Thresholds, got {type(value).__name__}; for one threshold of the decision set threshold"
            )
        missing = [name for name in self.policy.category_names if name not in value.categories]
        unknown = [name for name in value.categories if name not in self.policy.category_names]
        if missing or unknown:
            which = f"{missing[0]} is missing" if missing else f"{unknown[0]} is none of them"
            raise InputError(f"thresholds must be given for the categories {', '.join(self.policy.category_names)}: {which}")
        self._thresholds = value

    @property
    def threshold(self) -> float:
        """Flag when score >= threshold, in [0, 1]: the one from which on images are reviewed. Set, it blocks from there on."""
        return self.thresholds.decision.review

    @threshold.setter
    def threshold(self, value: float) -> None:
        self.thresholds = Thresholds(Band.at(value), self.thresholds.categories)

    @property
    def covers(self) -> frozenset[str] | None:
        """The categories of its policy."""
        return frozenset(self.policy.category_names)

    @property
    def all_licences(self) -> dict[str, str]:
        """Of code, head, encoder and data: as stated in `licences`, of an encoder's preset as known, "unknown" otherwise."""
        return all_licences(check_licences(self.licences), self.encoder.config)

    # --- deciding -----------------------------------------------------------------------------------------------------

    def set_operating_point(self, name: str) -> float:
        """Decides from now on at a named threshold that was chosen on validation images.

        Args:
            name: of `operating_points`, such as "fpr_0.05": at most that share of safe validation images was flagged.
        Returns:
            The threshold.
        Raises:
            InputError: there is none of that name, or too few images stand behind it.
        """
        self.threshold = operating_threshold(name, self.operating_points)
        return self.threshold

    def predict(
        self, images: Any, *, threshold: float | None = None, scope: Sequence[str] | None = None, max_pixels: int = 100_000_000
    ) -> list[Decision]:
        """Decides over one image or many; never stops at a bad one.

        Args:
            images: paths, encoded bytes, file objects, PIL images, arrays or tensors of one image each ((h, w), (h, w, c) or
                (c, h, w); uint8, or floating-point in [0, 1]), one or any iterable of them; or an array or tensor with four
                dimensions.
            threshold: instead of the guard's own, in [0, 1]; nothing is reviewed then.
            scope: categories of the policy: only what violates one of them is flagged, by the category's own score and thresholds.
                None: whatever the policy forbids, by the score of unsafe.
            max_pixels: larger images are not decoded.
        Returns:
            One decision per image, in order. A decision on an image that cannot be decided has the action "error", no
            label, a NaN score and the reason in `error`.
        Raises:
            ValueError: threshold or max_pixels is out of range, the scope has a category that the policy does not have, or `images` is
                neither an image nor a collection.
        """
        inside = check_scope(scope, self.policy.category_names)
        thresholds = self.thresholds
        if threshold is not None:
            band = Band.at(threshold)
            thresholds = Thresholds(band, thresholds.categories if inside is None else dict.fromkeys(self.policy.category_names, band))
        check_whole("max_pixels", max_pixels, 1)
        decisions: list[Decision] = []
        batch: list[Any] = []
        for image in each_image(images):
            batch.append(image)
            if len(batch) == self.encoder.batch_size:
                decisions += self._decide(batch, thresholds, inside, max_pixels)
                batch = []
        return decisions + self._decide(batch, thresholds, inside, max_pixels)

    def explain(self, image: Any, category: str | None = None, *, method: str = "auto", max_pixels: int = 100_000_000) -> Explanation:
        """Which parts of an image a score comes from, as a heat map at the image's size.

        Args:
            image: one, as for `predict`; of an animation the first frame.
            category: of the policy, whose score is explained; None: that of the decision.
            method: "grad_eclip" (encoders with a class token), "activation" (convolutional ones), "attention_pooling" (such as SigLIP),
                "occlusion" (any), or "auto": the first of these that the encoder can do. See docs/explanations.md.
            max_pixels: a larger image is not decoded.
        Returns:
            The heat map, and more; see `Explanation`. What calibration did to scores does not change it.
        Raises:
            InputError: the image cannot be read, or has no finite score; no category of the policy; an unknown method, or one that this
                encoder cannot do.
        """
        column = 0
        if category is not None:
            check_choice("category", category, self.policy.category_names)
            column = 1 + self.policy.category_names.index(category)
        check_whole("max_pixels", max_pixels, 1)
        pixels = read_image(readable(image, max_pixels), max_pixels=max_pixels, at_least=enough(self.encoder))
        score = float(self._rows(self.encoder.encode_images([pixels]))[0, column])
        if not np.isfinite(score):
            raise InputError(f"the image has no finite score: {_BEYOND}")

        def logit(embeddings: torch.Tensor) -> torch.Tensor:
            return self.head(embeddings.to("cpu", torch.float32))[:, column]

        heat, used = heat_map(self.encoder, logit, pixels, method)
        return Explanation(heat=heat, method=used, category=category, score=score, image=pixels)

    def logits(self, embeddings: torch.Tensor) -> torch.Tensor:
        """(n, d) embeddings, on any device -> (n,) float32 logits of unsafe on the CPU, differentiable."""
        logits = self.head(embeddings.to("cpu", torch.float32))[:, 0]
        return logits if self.calibration is None else self.calibration.decision(logits)

    @property
    def fingerprint(self) -> str:
        """A hash over everything its probabilities depend on: head, encoder, policy and calibration; 64 hex digits."""
        weights = {name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in self.head.state_dict().items()}
        head = {"kind": self.head.kind, "settings": self.head.config, "weights": weights}
        parts: dict[str, Any] = {"head": head, "encoder": self.encoder.fingerprint, "policy": self.policy.digest}
        if self.calibration is not None:
            maps = self.calibration.to_dict()
            parts["calibration"] = [maps["decision"], maps["categories"]]
        return fingerprint(parts)

    def score_embeddings(
        self,
        embeddings: np.ndarray | str | Path,
        *,
        out: np.ndarray | None = None,
        unusable: Literal["raise", "nan"] = "raise",
    ) -> np.ndarray:
        """(n, d) embeddings of the guard's encoder -> (n,) probability of unsafe in [0, 1].

        They are worked on in blocks. What lies on disk stays there: an array of `np.load(..., mmap_mode="r")`, or a folder of embeddings, takes
        no memory but for the scores, however many rows it has.

        Args:
            embeddings: an array, float16 or another kind of number, or a folder that `guardkit.embed` or clip-retrieval wrote, whose
                parts are scored in the order of their numbers. Rows of an array, and of a folder of ours, are taken as the unit vectors that
                they are; those of another tool's folder are brought to unit length first.
            out: (n,) floating-point, such as a memory-mapped array; written to and returned. None: a new one, float64.
            unusable: what a row gives that is zero or not finite: an error, or NaN, so that the others have their scores. NaN is no
                score: `scores >= guard.threshold` says False of it, which does not mean safe; `decide` says "error" of such rows.
        Raises:
            InputError: another width, a folder of another encoder, `out` does not fit, or there are such rows.
        """
        check_choice("unusable", unusable, ("raise", "nan"))
        is_unit = True
        if isinstance(embeddings, (str, os.PathLike)):
            found = find_embedding_parts(Path(embeddings))
            self.check_made_by((found.manifest or {}).get("encoder_fingerprint"), str(embeddings))
            is_unit = (found.manifest or {}).get("normalized") is True
            n, parts = found.n_rows, (part for part in found.mapped() if len(part))
        else:
            array = (
                embeddings if isinstance(embeddings, np.ndarray) and embeddings.dtype.kind == "f" else np.asarray(embeddings, np.float32)
            )
            n, parts = len(array) if array.ndim else 0, (one for one in [array])
        scores = np.empty(n) if out is None else out
        if not isinstance(scores, np.ndarray) or scores.shape != (n,) or scores.dtype.kind != "f":
            got = f"{scores.dtype} of shape {scores.shape}" if isinstance(scores, np.ndarray) else type(scores).__name__
            raise InputError(f"out must be an array of ({n},) floating-point numbers, got {got}")
        done = 0
        for part in parts:
            self._check_width(part)
            for rows, logits, without in decide_blocks(part, self.head.decision, normalize=not is_unit):
                if without.any() and unusable == "raise":
                    first = done + rows.start + int(without.argmax())
                    raise InputError(f'{_UNUSABLE}, row {first} first, or pass unusable="nan"')
                logits = logits.double() if self.calibration is None else self.calibration.decision(logits.double())
                scores[done + rows.start : done + rows.stop] = np.where(without, np.nan, _probabilities(logits).numpy())
            done += len(part)
        return scores

    def probabilities(self, embeddings: np.ndarray) -> np.ndarray:
        """(n, d) embeddings -> (n, 1 + k) float64: probability of unsafe, then of each category, in [0, 1].

        Where the head gives no finite logit, the probability is NaN.

        Raises:
            InputError: another width, or rows that are not finite or zero.
        """
        logits = self.head_logits(embeddings)
        if self.calibration is not None:
            logits = self.calibration.apply(logits, self.policy.category_names)
        return _probabilities(logits).numpy()

    def head_logits(self, embeddings: np.ndarray) -> torch.Tensor:
        """(n, d) embeddings -> (n, 1 + k) float64 logits of the head itself, before any calibration.

        Raises:
            InputError: another width, or rows that are not finite or zero.
        """
        embeddings = np.asarray(embeddings, dtype=np.float32)
        self._check_width(embeddings)
        if not np.isfinite(embeddings).all() or not embeddings.any(axis=1).all():
            raise InputError(_UNUSABLE)
        with torch.inference_mode():
            return self.head(torch.from_numpy(embeddings)).double()

    def check_made_by(self, fingerprint: str | None, what: str, *, width: int | None = None) -> None:
        """Refuses embeddings that another encoder made.

        Args:
            fingerprint: of the encoder that made them; None: nobody knows.
            what: holds them, for the message.
            width: of them; None: nobody knows.
        Raises:
            InputError: it is another one than the guard's, or makes vectors of another width.
        """
        if fingerprint not in (None, self.encoder.fingerprint):
            raise InputError(
                f"{what} holds embeddings of another encoder ({fingerprint[:12]}...) than the guard's, {self.encoder.name} "
                f"({self.encoder.fingerprint[:12]}...); embed the images with the guard's"
            )
        if width not in (None, self.encoder.dim):
            raise InputError(
                f"{what} holds vectors of {width} columns, the guard's encoder {self.encoder.name} makes {self.encoder.dim}; embed the images with it"
            )

    def _check_width(self, embeddings: np.ndarray) -> None:
        if embeddings.ndim != 2 or embeddings.shape[1] != self.encoder.dim:
            raise InputError(f"embeddings must be (n, {self.encoder.dim}) for encoder {self.encoder.name}, got shape {embeddings.shape}")

    def _decide(self, batch: list[Any], thresholds: Thresholds, scope: tuple[str, ...] | None, max_pixels: int) -> list[Decision]:
        pixels: list[torch.Tensor] = []
        errors: dict[int, str] = {}
        for i, image in enumerate(batch):
            try:
                shown = read_image(readable(image, max_pixels), max_pixels=max_pixels, at_least=enough(self.encoder))
                pixels.append(self.encoder.preprocess(shown))
            except ImageError as error:
                errors[i] = str(error)
        decided = iter(self._of_embeddings(self.encoder.encode_preprocessed(pixels), thresholds, scope) if pixels else ())
        return [undecided(thresholds, errors[i]) if i in errors else next(decided) for i in range(len(batch))]

    def decide(self, embeddings: np.ndarray, *, scope: Sequence[str] | None = None) -> list[Decision]:
        """Decides over images by their embeddings, as `predict` does by their pixels.

        Args:
            embeddings: (n, d) of the guard's encoder; a row that is not finite or zero gives an error.
            scope: as for `predict`.
        Returns:
            (n,) decisions.
        Raises:
            InputError: another width, or a category that the policy does not have.
        """
        return self._of_embeddings(np.asarray(embeddings, np.float32), self.thresholds, check_scope(scope, self.policy.category_names))

    def _of_embeddings(self, embeddings: np.ndarray, thresholds: Thresholds, scope: tuple[str, ...] | None) -> list[Decision]:
        decisions = []
        for values in self._rows(embeddings):
            if not np.isfinite(values).all():
                decisions.append(undecided(thresholds, f"not a finite score: {_BEYOND}"))
                continue
            score, *categories = (float(value) for value in values)
            decisions.append(thresholds.decide(score, dict(zip(self.policy.category_names, categories, strict=True)), scope))
        return decisions

    def _rows(self, embeddings: np.ndarray) -> np.ndarray:
        """`probabilities`, with NaN for an embedding that is not finite or zero."""
        rows = np.full((len(embeddings), 1 + len(self.policy.categories)), np.nan)
        sound = np.isfinite(embeddings).all(axis=1) & embeddings.any(axis=1) if embeddings.ndim == 2 else np.full(len(embeddings), True)
        rows[sound] = self.probabilities(embeddings[sound])
        return rows

    def extended_by(self, other: GuardClassifier) -> GuardClassifier:
        """A guard for the categories of both, on the same embeddings.

        What this guard says of its categories stays the same to the last bit. An image is as unsafe as the guard says that finds it most
        unsafe, so that the decision has to be calibrated anew: its thresholds are those of before, or 0.5 where they were calibrated.

        Args:
            other: trained on the same encoder, for other categories.
        Raises:
            InputError: another encoder, a category that both have, or a head that is not guardkit's own.
        """
        if other.encoder.fingerprint != self.encoder.fingerprint:
            raise InputError(
                f"both guards must be on one encoder, got {self.encoder.name} and {other.encoder.name}; train the new one with the first one's"
            )
        both = [name for name in other.policy.category_names if name in self.policy.category_names]
        if both:
            raise InputError(f"the guard has the category {both[0]!r} already; give a policy with the new categories alone")
        policy = replace(
            self.policy,
            name=f"{self.policy.name}_and_{other.policy.name}",
            description=f"{self.policy.description} {other.policy.description}",
            categories=(*self.policy.categories, *other.policy.categories),
            safe_texts=tuple(dict.fromkeys((*self.policy.safe_texts, *other.policy.safe_texts))),
            harmless=self.policy.harmless and other.policy.harmless,
        )
        before = [one for one in (self.calibration, other.calibration) if one is not None]
        maps = {name: one for calibration in before for name, one in calibration.categories.items()}
        decision = Band.at(DEFAULT) if before else self.thresholds.decision
        reason = f"extended by {', '.join(other.policy.category_names)}"
        seen = [one for one in (self.training_images, other.training_images) if one is not None]
        return GuardClassifier(
            JoinedHead.of(self.head, other.head),
            self.encoder,
            policy,
            threshold=Thresholds(decision, {**self.thresholds.categories, **other.thresholds.categories}),
            training={**self.training, "extended_by": {"policy": other.policy.name, **other.training}},
            metrics={
                "notes": [
                    f"This guard was put together of one for {', '.join(self.policy.category_names)} and one for {', '.join(other.policy.category_names)}. Each was measured by "
                    "itself, on its own images; what they decide together was not."
                ],
                "parts": [self.metrics, other.metrics],
            },
            training_images=seen[0].joined(seen[1]) if len(seen) == 2 else None,
            calibration=Calibration(ScoreMap.line("none", 1.0, 0.0), maps) if before else None,
            history=[*self.history, {"thresholds": self.thresholds.to_dict(), "reason": reason}],
            licences={part: name for part, name in self.licences.items() if other.licences.get(part) == name},
        )

    @property
    def reads_policy(self) -> bool:
        """Whether it can be told another policy, see `for_policy`; else what its head has learned is of one."""
        has_place = isinstance(self.encoder, ReadsPolicy) and self.encoder.reads_policy
        return has_place and isinstance(self.head, LinearHead) and self.head.map is None

    def for_policy(self, policy: Policy) -> GuardClassifier:
        """This guard under another policy, which it reads: nothing is trained.

        Its encoder must read policies in its prompt, as one that `guardkit.finetune` tuned does, and the decision's weights are those of
        before: whatever the prompt forbids is unsafe. It has learned nothing of the new policy's categories, so that their scores are the
        decision's; thresholds are the decision's of before, and calibrations and figures are left behind, because they were of another policy.

        Raises:
            InputError: the encoder reads no policy, or the head is no linear one.
        """
        if policy.digest == self.policy.digest:
            return self
        if not self.reads_policy:
            raise InputError(
                f"guard {self.name} does not read policies: that takes an encoder whose prompt has a place for one (encoder=vlm) and a plain linear "
                f"head, and it has {self.encoder.name} and a {self.head.kind} head; train one for policy {policy.name}"
            )
        assert isinstance(self.encoder, ReadsPolicy)
        assert isinstance(self.head, LinearHead)
        head = LinearHead(self.encoder.dim, len(policy.categories))
        with torch.no_grad():
            head.linear.weight.copy_(self.head.linear.weight[:1].expand_as(head.linear.weight))
            head.linear.bias.copy_(self.head.linear.bias[:1].expand_as(head.linear.bias))
        return GuardClassifier(
            head,
            self.encoder.for_policy(policy),
            policy,
            threshold=self.threshold,
            training=self.training,
            training_images=self.training_images,
            licences=self.licences,
        )

    # --- keeping ------------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> Path | str:
        """Writes `config.json`, `model.safetensors`, `policy.yaml`, `training_images.parquet` and a model card; config.json comes last.

        Args:
            folder: new, empty, or that of a guard, which is replaced as a whole; or such a place in object storage, "s3://bucket/guard".
        Returns:
            The folder, or the URL as it was given.
        Raises:
            InputError: the folder holds something else or cannot be written, or head or encoder could not be built again.
        """
        if isinstance(folder, str) and is_url(folder) and local_path(folder) is None:
            upload_guard(folder, self._save)
            return folder
        return self._save(folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload a guard",
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Puts the guard on the Hugging Face Hub, as one commit of the files that `save_pretrained` writes, and nothing else.

        It is what huggingface_hub's `ModelHubMixin` has under this name, without its base class: that one takes the old config.json away
        before the new one is written, fills constructor arguments from its keys, and copies every argument at construction, the hashes of all
        training images among them.

        State the licences first: `guard.licences = {"head": "mit", "data": "cc-by-4.0"}`. The encoder does not go with it: it is named as it
        was given, so that a guard for others is best trained on an encoder of the Hub.

        Args:
            repo_id: "ORG/NAME"; made where there is none.
            commit_message: what the commit is called.
            private: whether a new repository is; None: as its owner has set it, which is mostly public.
            token: to write with; None: HF_TOKEN or that of `hf auth login`.
            revision: a branch, which is made where there is none; None: the main branch.
            create_pr: ask for the change instead of making it.
        Returns:
            The address of the commit.
        Raises:
            InputError: head or encoder could not be built again, or the Hub refuses the guard or cannot be reached.
        """
        with tempfile.TemporaryDirectory() as place:
            folder = self._save(Path(place) / "guard", called=str(repo_id))
            return upload_folder(
                folder, repo_id, FILES, message=commit_message, private=private, token=token, revision=revision, create_pr=create_pr
            )

    def _save(self, folder: str | Path, **said: str) -> Path:
        kind, built_of = ENCODER_KINDS.describe(self.encoder)
        config = {
            "thresholds": self.thresholds.to_dict(),
            "calibration": None if self.calibration is None else self.calibration.to_dict(),
            "history": self.history,
            "licences": check_licences(self.licences),
            "operating_points": self.operating_points,
            "training": self.training,
            "encoder": {
                "kind": kind,
                "name": self.encoder.name,
                "config": built_of,
                "fingerprint": self.encoder.fingerprint,
                "preprocessing": self.encoder.preprocessing,
                "dim": self.encoder.dim,
            },
            "metrics": self.metrics,
        }
        return write_guard(folder, self.head, self.policy, config, self.training_images, **said)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        encoder: Encoder | str | Path | None = None,
        head: Head | type[Head] | None = None,
        trust: Sequence[str] = (),
        device: str | None = None,
        batch_size: int | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> GuardClassifier:
        """Loads a guard from a folder, from object storage, or from the Hugging Face Hub by its id.

        Args:
            folder: a guard's folder, that of the training run, the URL of one ("s3://bucket/guard"), or "organisation/name" on the Hub.
            encoder: where the guard's encoder is, when it is not where it was trained: an encoder, or a text that
                `find_encoder` understands, such as a folder that is searched for it. It must be the same one; an encoder with the same
                weights that resizes images by another library is taken, with a warning that says how far scores moved.
            head: the class of its head, or a head of that class, where it is not guardkit's and not to be imported.
            trust: top-level packages of other people, such as ["mypackage"], that head and encoder may be imported from.
                What is imported runs, with arguments that the guard holds: name only packages that you installed yourself.
            device: to build the encoder on, like "cpu" or "cuda"; by default a GPU if there is one.
            batch_size: images that the encoder takes at once.
            revision: of a guard on the Hub: a branch, tag or commit; None: the main branch. A commit is the one that stays the same.
            token: to ask the Hub with; None: HF_TOKEN or that of `hf auth login`, False: none.
        Raises:
            InputError: not a guard folder, a damaged file, code of a package that is not trusted, an encoder that is not
                found, or one with other weights or preprocessing.
        """
        is_built = encoder is not None and not isinstance(encoder, (str, os.PathLike))
        stored = read_guard(folder, trust=trust, head=head, needs_encoder=not is_built, revision=revision, token=token)
        config = stored.config
        found = find_encoder(
            config["encoder"], encoder, needed_by=f"guard {stored.folder}", trust=trust, device=device, batch_size=batch_size
        )
        guard = cls(
            stored.head,
            found,
            stored.policy,
            threshold=Thresholds.from_dict(config["thresholds"]),
            operating_points=config["operating_points"],
            training=config["training"],
            metrics=config["metrics"],
            training_images=stored.training_images,
            calibration=None if config["calibration"] is None else Calibration.from_dict(config["calibration"]),
            history=config["history"],
            licences=config.get("licences"),
        )
        trained_on = config["encoder"]["fingerprint"]
        own = None if found.fingerprint == trained_on else of_the_same_weights(trained_on, found)
        if own is not None:
            log.warning("%s", guard._moved(own, stored.folder))
        return guard

    def _moved(self, own: Encoder, folder: Path) -> str:
        """What it changes that its encoder goes another way than for its training: one sentence."""
        return (
            f"guard {folder} was trained with {said_way(own)} and is given {self.encoder.name} with "
            f"{said_way(self.encoder)}: on {N_DRAWN} drawn images its scores moved by up to "
            f"{moved_by(self.probabilities, own, self.encoder):.4f}; "
            f"for its own scores give that encoder with {said_way(own)}, or none"
        )


def _probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Of any shape; NaN where a logit is not finite: an infinite one is an overflow, and its sign says nothing."""
    return torch.sigmoid(logits.where(logits.isfinite(), torch.nan))
