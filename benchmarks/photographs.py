"""Do counterfactual pairs help on photographs? Arms x editors x label budgets over policies that nobody tuned to.

    python benchmarks/photographs.py data=DIR output_dir=DIR [encoder=guardkit:photos_clip] [cache_dir=DIR] [heads=anchored,linear_whitened]
        [policies=24] [sizes=4,8,16,32,64,128,256,512] [seeds=2] [safe_per_unsafe=1,4,16] [editors=inpaint,paste] [split=test]
        [look_alikes=marked]

DIR holds `train.parquet` and `val.parquet` (columns `image`, `name` and the box). For each of the policies of `class_policies.json`, each
arm's heads are trained on so many labelled unsafe photographs, and tested on all natural ones of `val.parquet`, on the look-alikes
among them, and on pairs that each editor makes of the unsafe ones. Finished policies are found in output_dir; tables
(`photographs.md`) and pictures are of those that are finished. Any open_clip weights may be the encoder: "local-dir:FOLDER",
"hf-hub:ORG/NAME". How tables are made is said in `photographs_report.py`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.special import expit, logsumexp

import guardkit
from benchmarks.class_policies import ClassPolicy
from benchmarks.class_policies import policies as of_split
from benchmarks.photographs_report import draw_curves, draw_pairs, report
from guardkit.artifacts import fingerprint, written
from guardkit.counterfactual.edits import Edits
from guardkit.counterfactual.pipeline import CounterfactualPipeline, EditCounts
from guardkit.data.arms import Orders, arm_named
from guardkit.data.datamodule import GuardDataModule, TestSet
from guardkit.data.look_alikes import LookAlikes
from guardkit.data.sources.base import Loaded
from guardkit.data.sources.parquet import ParquetSource
from guardkit.data.transplants import transplant
from guardkit.data.unlabelled import Unlabelled
from guardkit.data.views import ViewMaker
from guardkit.editors.base import Editor
from guardkit.editors.inpaint import InpaintEditor
from guardkit.editors.paste import PasteEditor
from guardkit.efficiency.cells import Cell, CellData, CellError, Stock
from guardkit.efficiency.engine import BatchedEngine, FittedCell
from guardkit.efficiency.stacked import Schedule
from guardkit.embeddings import EmbeddingStore
from guardkit.encoders.open_clip import OpenClipEncoder
from guardkit.fitting.objective import Objective
from guardkit.fitting.parts import Parts, head_factory, new_head
from guardkit.fitting.recipe import ADAMW, TRAINER
from guardkit.metrics.figures import classification_metrics, pair_metrics
from guardkit.metrics.probe import edited_vs_original_auroc
from guardkit.schema import Record

EDITORS: dict[str, type[Editor]] = {"inpaint": InpaintEditor, "paste": PasteEditor}
TRANSPLANTS = "transplants"  # pairs to test on that are edited on both sides
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)  # of the pull, chosen on validation images
FIXED = {"anchored": (1.0,)}  # where `train` has one
SCALE = 30.0  # of the cosine before the softmax, as conf/verifier/encoder.yaml
SAFE_EVERY = 8  # of the safe training photographs, every eighth is there to choose from: each has to be encoded
MOST_SAFE = 1024  # natural safe photographs beside the unsafe ones: larger budgets are not tried with more of them for each
MOST_EDITED = 512  # labels with edits
MOST_TRANSPLANTED = 32  # labels with transplants, of which there are eight for each
MOST_CONTROLLED = 32  # labels in the controls
MOST_REPEATED = 32  # labels with several subsets; with more, one
MAX_FPR = 0.05
N_SHOWN = 6
N_TRIED = 24  # photographs of a policy, of which the first that all editors could edit is shown


@dataclass(frozen=True)
class Settings:
    data: Path
    output_dir: Path
    cache_dir: Path
    sizes: tuple[int, ...]
    safe_per_unsafe: tuple[int, ...]
    seeds: int
    editors: tuple[str, ...]
    heads: tuple[str, ...]
    look_alikes: LookAlikes


@dataclass(frozen=True)
class Block:
    """Cells that share an editor ("": none) and the number of natural safe photographs for each unsafe one."""

    editor: str
    safe_per_unsafe: int
    arms: tuple[str, ...]
    sizes: tuple[int, ...]
    seeds: tuple[int, ...]


class Photographs:
    """The photographs under a policy, listed once."""

    name = "photos"

    def __init__(self, policy: guardkit.Policy, data: Path) -> None:
        self._source = ParquetSource(
            policy,
            str(data / "train.parquet"),
            test=str(data / "val.parquet"),
            name=self.name,
            class_column="name",
            caption_column="name",
            check_images=False,
        )
        self.asked = self._source.asked | {"safe_every": SAFE_EVERY}

    @cached_property
    def _loaded(self) -> Loaded:
        loaded = self._source.load()
        kept = [one for one in loaded.train if one.label == 1 or _is_kept(one)]
        return replace(loaded, train=kept)

    def load(self) -> Loaded:
        """All unsafe photographs to train on, some of the safe ones, and all to test on."""
        return self._loaded


class Data(GuardDataModule):
    """Trains as any arm does, and is tested on the images and pairs that it is given."""

    given: TestSet

    def make_test_set(self) -> TestSet:
        """What it was given."""
        return self.given


class AsTheyOccur(GuardDataModule):
    """As many of the unsafe photographs as of the safe ones, for heads that learn from images without labels how these vary."""

    def load(self) -> list[Record]:
        """Every eighth photograph."""
        return [one for one in super().load() if _is_kept(one)]


def _is_kept(record: Record) -> bool:
    return int(record.id.rsplit("/", 1)[1]) % SAFE_EVERY == 0


@dataclass(frozen=True)
class Trial:
    """What all cells of a policy share.

    Attributes:
        pipelines: by editor; "" edits nothing.
        test: natural photographs; its counterfactuals are those of all pairs, one editor after the other.
        pairs: by editor: rows of the unsafe members, among the natural photographs and after them the counterfactuals, and those
            of the safe ones among the counterfactuals.
    """

    policy: guardkit.Policy
    source: Photographs
    store: EmbeddingStore
    pipelines: dict[str, CounterfactualPipeline]
    test: TestSet
    pairs: dict[str, tuple[np.ndarray, np.ndarray]]

    @classmethod
    def of(cls, policy: guardkit.Policy, store: EmbeddingStore, settings: Settings) -> Trial:
        """Lists the photographs, and makes the pairs to test on."""
        source = Photographs(policy, settings.data)
        pipelines = {
            editor: Edits.of(EDITORS[editor]() if editor else None).pipeline(policy, store, None) for editor in ("", *settings.editors)
        }
        records = source.load().test
        assert records is not None
        vectors, n = store.embed([record.content for record in records if record.content is not None]), len(records)
        pairs: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        made: list[np.ndarray] = []
        unsafe = np.array([row for row, record in enumerate(records) if record.label == 1])

        def take(new: np.ndarray) -> np.ndarray:
            made.append(new)
            return np.arange(len(new)) + sum(len(one) for one in made[:-1])

        for editor in settings.editors:
            pipelines[editor].supply(source.load().train)
            views = _views(store, pipelines[editor]).edited([records[row] for row in unsafe], 1, "counterfactual", EditCounts())
            there = views.there[:, 0]
            pairs[editor] = unsafe[there], take(views.vectors[there, 0])
        pipelines[""].supply(source.load().train)
        both = [_views(store, pipelines[""]).transplanted([records[row] for row in unsafe], is_unsafe) for is_unsafe in (True, False)]
        there = both[0].there[:, 0]
        pairs[TRANSPLANTS] = n + take(both[0].vectors[there, 0]), take(both[1].vectors[there, 0])
        test = TestSet(records, vectors, np.zeros(0, int), np.concatenate(made), "all editors", 0.0)
        return cls(policy, source, store, pipelines, test, pairs)

    def data(self, editor: str, safe_per_unsafe: int, look_alikes: LookAlikes) -> Data:
        """To train on."""
        given: dict[str, Any] = {"safe_per_unsafe": safe_per_unsafe, "look_alikes": look_alikes, "all_views": True}
        module = Data(self.source, self.policy, self.store, self.pipelines[editor], **given)
        module.given = self.test
        return module

    def measured(self, logits: np.ndarray, counterfactual_logits: np.ndarray) -> dict[str, float]:
        """All figures of a head on the test images and pairs."""
        labels = np.array([record.label for record in self.test.records])
        alike = np.array([record.label == 0 and record.category is not None for record in self.test.records])
        scores, made = (expit(values.astype(float)) for values in (logits, counterfactual_logits))
        everything = classification_metrics(labels, scores, 0.5)
        near = (labels == 1) | alike
        safe = np.sort(logits[labels == 0])
        threshold = safe[-1 - int(MAX_FPR * len(safe))]  # above it, at most so many of the safe ones are
        found: dict[str, Any] = {name: everything[name] for name in ("auroc", "average_precision")} | {
            "recall": float((logits[labels == 1] > threshold).mean()),
            "auroc_look_alikes": classification_metrics(labels[near], scores[near], 0.5)["auroc"],
            "look_alikes_flagged": float((logits[alike] > threshold).mean()),
        }
        every = np.concatenate([scores, made])
        for editor, (unsafe, safe_rows) in self.pairs.items():
            figures = pair_metrics(every[unsafe], made[safe_rows], 0.5)
            found |= {f"{name}, {editor}": figures[name] for name in ("ranking_accuracy", "pair_accuracy")}
        return found

    def zero_shot(self) -> dict[str, float]:
        """The figures of the unsafe texts against all others of the policy (log-odds of their shares in the softmax)."""
        (category,) = self.policy.categories
        texts = self.store.encoder.encode_texts([*category.unsafe_texts, *category.safe_texts, *self.policy.safe_texts])
        n = len(category.unsafe_texts)

        def logits(vectors: np.ndarray) -> np.ndarray:
            found = SCALE * vectors @ texts.T
            return logsumexp(found[:, :n], axis=1) - logsumexp(found[:, n:], axis=1)

        return self.measured(logits(self.test.embeddings), logits(self.test.counterfactuals))

    def trace(self, editor: str) -> float | None:
        """How well a probe tells null edits of unsafe photographs from the photographs."""
        unsafe = Orders.of(self.source.load().train, 0).unsafe[:MOST_EDITED]  # which are edited for training too
        views = _views(self.store, self.pipelines[editor])
        edited = views.edited(unsafe, 1, "null", EditCounts())
        there = edited.there[:, 0]
        found = edited_vs_original_auroc(views.embed(unsafe)[there], edited.vectors[there, 0])
        return None if found is None else found.estimate


def _views(store: EmbeddingStore, pipeline: CounterfactualPipeline) -> ViewMaker:
    return ViewMaker(store, pipeline, transform="none", variants_per_image=1, counts=EditCounts())


def blocks(settings: Settings) -> Iterator[Block]:
    """All cells of a policy."""
    first = settings.safe_per_unsafe[0]
    for safe in settings.safe_per_unsafe:
        served = [size for size in settings.sizes if safe == first or size * safe <= MOST_SAFE]
        small = tuple(size for size in served if size <= MOST_REPEATED)
        large = tuple(size for size in served if size > MOST_REPEATED)
        every = tuple(range(settings.seeds))
        for sizes, seeds in ((small, every), (large, (0,))):
            if sizes:
                yield Block("", safe, ("unpaired", "look_alikes"), sizes, seeds)
            # counterfactuals alone are the same whatever the number of natural ones
            arms = ("pairs_plus", "pairs_balanced", *(["pairs_aug"] if safe == first else []))
            edited = tuple(size for size in sizes if size <= MOST_EDITED)
            for editor in settings.editors if edited else ():
                yield Block(editor, safe, arms, edited, seeds)
        yield Block("", safe, ("pairs_transplanted",), tuple(size for size in small if size <= MOST_TRANSPLANTED), every)
        for editor in settings.editors if safe == first else ():
            yield Block(editor, safe, ("shuffled_pairs", "null_edits"), tuple(size for size in small if size <= MOST_CONTROLLED), every)


def permuted(data: CellData) -> CellData:
    """The same images under the arm "permuted_labels", their labels dealt out anew."""
    torch.manual_seed(data.cell.seed)
    batches = [{**batch, "labels": batch["labels"][torch.randperm(len(batch["labels"]))]} for batch in (data.train, data.validation)]
    return replace(data, cell=replace(data.cell, arm="permuted_labels"), train=batches[0], validation=batches[1])


def try_policy(one: ClassPolicy, settings: Settings, encoder: OpenClipEncoder) -> pd.DataFrame:
    """A row for each arm, head, editor, number of safe images, label budget and seed; for zero-shot; and for the trace of each editor."""
    about = [one.policy.digest, encoder.fingerprint, *(str(getattr(settings, name)) for name in ("sizes", "safe_per_unsafe", "seeds"))]
    done = (
        settings.output_dir
        / f"{one.policy.name}_{fingerprint([*about, settings.editors, settings.heads, settings.look_alikes])[:12]}.parquet"
    )
    if done.is_file():
        return pd.read_parquet(done)
    started = time.perf_counter()
    trial = Trial.of(one.policy, EmbeddingStore(encoder, settings.cache_dir), settings)
    plain = AsTheyOccur(trial.source, one.policy, trial.store, trial.pipelines[""])
    parts = Parts(one.policy, encoder, trial.store, trial.pipelines[""], plain, Unlabelled(plain))
    schedule = Schedule(ADAMW, TRAINER["max_epochs"], TRAINER["check_val_every_n_epoch"], 12)
    engines = {
        head: BatchedEngine(
            Objective.of({"category_weight": 0.0, "l2": 0.0}),
            FIXED.get(head, STRENGTHS),
            lambda name, seed: new_head(head_factory(name), parts, seed),
            schedule,
        )
        for head in settings.heads
    }
    rows: list[dict[str, Any]] = [{"arm": "zero_shot", **trial.zero_shot()}]
    for block in blocks(settings):
        arms = [arm_named(arm) for arm in block.arms]
        arms = [arm if arm.variants_per_image else replace(arm, variants_per_image=1) for arm in arms]
        stock = Stock(trial.data(block.editor, block.safe_per_unsafe, settings.look_alikes), arms, block.sizes, block.seeds)
        ready: list[CellData] = []
        for cell in [Cell(arm, "", size, seed) for arm in block.arms for size in block.sizes for seed in block.seeds]:
            with suppress(CellError):  # too few images, or no edit of the few was accepted: it is missing in the tables
                ready.append(stock.data_of(cell))
        if block.safe_per_unsafe == settings.safe_per_unsafe[0]:
            ready += [permuted(one) for one in ready if one.cell.arm == "unpaired" and one.cell.n_unsafe <= MOST_CONTROLLED]
        for head, engine in engines.items():
            own = [replace(one, cell=replace(one.cell, head=head)) for one in ready]
            for data, fitted in zip(own, engine.fit(own, trial.test), strict=True):
                if isinstance(fitted, FittedCell):
                    about_cell = {**asdict(data.cell), **data.counts}
                    where = {"editor": block.editor, "safe_per_unsafe": block.safe_per_unsafe}
                    rows.append(about_cell | where | trial.measured(fitted.logits, fitted.counterfactual_logits))
    rows += [{"arm": "trace", "editor": editor, "auroc": trial.trace(editor)} for editor in settings.editors]
    table = pd.DataFrame(rows).assign(policy=one.policy.name, seconds=time.perf_counter() - started)
    with written(done) as temporary:
        table.to_parquet(temporary)
    return table


def shown_pairs(some: Sequence[ClassPolicy], settings: Settings) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """Of each editor, test photographs and what it makes of them, one a policy; and transplants. The policies are harmless."""
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {editor: [] for editor in (*settings.editors, TRANSPLANTS)}
    for one in some:
        loaded = Photographs(one.policy, settings.data).load()
        assert loaded.test is not None
        assert one.policy.harmless
        unsafe: list[Record] = [record for record in loaded.test if record.label == 1 and record.region is not None][:N_TRIED]
        pipeline = Edits.of(None).pipeline(one.policy, None, None)  # type: ignore[arg-type]
        pipeline.supply(loaded.train)
        edits: dict[str, list[Any]] = {}
        for editor in settings.editors:
            makes = Edits.of(EDITORS[editor]()).pipeline(one.policy, None, None)  # type: ignore[arg-type]
            makes.supply(loaded.train)
            edits[editor] = makes.make(unsafe, [0] * len(unsafe))
        # the same photograph for all of them, the first that all could edit
        row = next((i for i in range(len(unsafe)) if all(made[i] is not None and made[i].accepted for made in edits.values())), None)
        if row is None or unsafe[row].content is None:
            continue
        for editor, made in edits.items():
            found[editor].append((unsafe[row].content.load(), made[row].load()))
        halves = [transplant(unsafe[row].content, unsafe[row].region, pipeline.photographs, 0, is_unsafe=half) for half in (True, False)]
        found[TRANSPLANTS].append((halves[0].load(), halves[1].load()))
    return found


def main(
    data: str,
    output_dir: str,
    encoder: str = "guardkit:photos_clip",
    cache_dir: str = "",
    heads: str = "anchored,linear_whitened",
    policies: str = "24",
    sizes: str = "4,8,16,32,64,128,256,512",
    seeds: str = "2",
    safe_per_unsafe: str = "1,4,16",
    editors: str = "inpaint,paste",
    split: str = "test",
    look_alikes: LookAlikes = "marked",
) -> None:
    folder = Path(output_dir)
    settings = Settings(
        Path(data),
        folder,
        Path(cache_dir) if cache_dir else folder / "cache",
        *(tuple(map(int, text.split(","))) for text in (sizes, safe_per_unsafe)),
        int(seeds),
        tuple(name for name in editors.split(",") if name),
        tuple(heads.split(",")),
        look_alikes,
    )
    folder.mkdir(parents=True, exist_ok=True)
    model = OpenClipEncoder(None, encoder, batch_size=16)  # calls are small, and are padded to whole batches
    chosen = of_split(split)[: int(policies)]
    tables: list[pd.DataFrame] = []
    for row, one in enumerate(chosen):
        tables.append(try_policy(one, settings, model))
        print(f"{row + 1} {one.policy.name} {tables[-1]['seconds'].iloc[0]:.0f} s", file=sys.stderr, flush=True)
    table = pd.concat(tables)
    table.to_parquet(folder / "table.parquet")
    texts = []
    for head in settings.heads:
        own = table[table["head"].isna() | (table["head"] == head)]
        texts += [f"# head={head}", "", report(own)]
        draw_curves(own, folder / f"photographs_curves_{head}.png")
    text = "\n".join(texts)
    (folder / "photographs.md").write_text(text, encoding="utf-8")
    print(text)
    draw_pairs(shown_pairs(chosen[:: max(1, len(chosen) // N_SHOWN)][:N_SHOWN], settings), folder / "photographs_pairs.png")


if __name__ == "__main__":
    main(**dict(argument.split("=", 1) for argument in sys.argv[1:]))
