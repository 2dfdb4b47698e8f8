"""Does a learned editor of photographs draw what was asked for? Judged by a classifier that learned from other photographs.

    python benchmarks/photos_editor.py data=DIR editor=FOLDER [n=300] [per_class=200] [steps=20] [guidance=3] [cache_dir=DIR] [picture=FILE]

DIR holds `train.parquet` and `val.parquet` (columns `image`, `name` and the box); FOLDER is what `checkpoints.edit_recipe world=photos` wrote.
Photographs of the unsafe classes of conf/policy/photos.yaml, n of `val.parquet`, are edited twice: into a look-alike of their
category, and into any other class. The judge is a linear probe (multinomial logistic regression) on `photos_clip`, fitted on at
most `per_class` photographs a class of the half of `train.parquet` that the editor never saw; the encoder itself saw all of
`train.parquet`. Its calls of real photographs stand beside those of edits: no editor need do better than a photograph.
Intervals are 95 %, Wilson.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.nn import functional
from verifier_quality import wilson

from benchmarks.class_policies import photo_of, source_of
from benchmarks.photos_encoder import fit
from checkpoints.photos_edit import is_of_editor
from guardkit.artifacts import written
from guardkit.editors.base import EditRequest
from guardkit.editors.diffusers import DiffusersEditor
from guardkit.embeddings import EmbeddingStore
from guardkit.encoders.open_clip import OpenClipEncoder
from guardkit.images import ArrayContent
from guardkit.policy import Policy
from guardkit.runs.hydra import CONF_DIR
from guardkit.schema import Content, Record

DECAY = 1e-3  # of the judge; benchmarks/photos_encoder.py chose it for a probe on all photographs
SEED = 14
DRAWN = 12


class Judge:
    """Logits of all classes, from embeddings of contents.

    Attributes:
        names: of the classes, in the order of the logits.
    """

    def __init__(self, store: EmbeddingStore, records: Sequence[Record], per_class: int) -> None:
        self.names = sorted({record.caption for record in records})
        self._store = store
        seen: Counter[str] = Counter()
        own = []
        for record in records:
            if seen[record.caption] < per_class and not is_of_editor(record.content.key):
                seen[record.caption] += 1
                own.append(record)
        vectors = torch.from_numpy(store.embed([record.content for record in own]))
        self._mean, self._spread = vectors.mean(dim=0), vectors.std(dim=0)
        classes = torch.tensor([self.names.index(record.caption) for record in own])
        self._weights = fit((vectors - self._mean) / self._spread, classes, DECAY)
        self.n = len(own)

    def __call__(self, contents: Sequence[Content]) -> np.ndarray:
        """(n, n_classes)."""
        vectors = (torch.from_numpy(self._store.embed(contents)) - self._mean) / self._spread
        return (functional.pad(vectors, (0, 1), value=1.0) @ self._weights).numpy()


def report(name: str, judge: Judge, logits: np.ndarray, wanted: Sequence[str], source: Sequence[str], own: Sequence[str]) -> None:
    """A row of the table: how often the judge calls the class `wanted`.

    Args:
        logits: (n, n_classes) of the judge.
        source: what the original shows.
        own: the policy's classes and look-alikes.
    """
    columns = {one: column for column, one in enumerate(judge.names)}
    target, before = (np.array([columns[one] for one in some]) for some in (wanted, source))
    rows, n = np.arange(len(logits)), len(logits)
    among = np.full(len(judge.names), -np.inf)
    among[[columns[one] for one in own]] = 0.0
    among_own = np.tile(among, (n, 1))
    among_own[rows, target] = 0.0
    called = int((logits.argmax(axis=1) == target).sum())
    cells = [wilson(called, n), wilson(int(((logits + among_own).argmax(axis=1) == target).sum()), n)]
    differs = target != before
    beats = logits[rows, target] > logits[rows, before]
    cells.append(wilson(int(beats[differs].sum()), int(differs.sum())) if differs.any() else "")
    print(f"| {name} | {n} | " + " | ".join(cells) + " |", flush=True)


def edit(editor: DiffusersEditor, records: Sequence[Record], wanted: Sequence[str], kind: str = "counterfactual") -> dict[int, np.ndarray]:
    """Images by row, of those that the editor did not refuse."""
    requests = [
        EditRequest(record.content, f"Replace it with {photo_of(name)}.", record.region, SEED + row, kind, target=photo_of(name))
        for row, (record, name) in enumerate(zip(records, wanted, strict=True))
    ]
    return {row: result.image for row, result in enumerate(editor.edit(requests)) if result.image is not None}


def draw(path: Path, records: Sequence[Record], edits: dict[int, np.ndarray], asked: Sequence[str], called: Callable[[int], str]) -> None:
    """The first originals and edits side by side, four pairs in a row; below each what was asked for and what the judge calls it."""
    side, label = 160, 28
    rows = list(edits)[:DRAWN]
    sheet = Image.new("RGB", (4 * (2 * side + 12), -(-len(rows) // 4) * (side + label + 6)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        left, top = (i % 4) * (2 * side + 12), (i // 4) * (side + label + 6)
        for k, pixels in enumerate((records[row].content.load(), edits[row])):
            sheet.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS), (left + k * (side + 4), top))
        pen.text((left, top + side + 2), f"{records[row].caption}; asked for {asked[row]}", fill="black")
        pen.text((left, top + side + 14), f"called {called(row)}", fill="#15803d" if called(row) == asked[row] else "#b91c1c")
    with written(path) as temporary:
        sheet.save(temporary, format="PNG")


def main(
    data: str,
    editor: str,
    n: str = "300",
    per_class: str = "200",
    steps: str = "20",
    guidance: str = "3",
    cache_dir: str = "",
    picture: str = "",
) -> None:
    policy = Policy.load(CONF_DIR / "policy/photos.yaml")
    loaded = source_of(policy, Path(data)).load()
    store = EmbeddingStore(OpenClipEncoder(None, "guardkit:photos_clip", batch_size=128), Path(cache_dir) if cache_dir else None)
    judge = Judge(store, loaded.train, int(per_class))
    print(f"judge: linear probe on {judge.n} photographs of the half that the editor did not see, {len(judge.names)} classes", flush=True)
    rng = np.random.default_rng(SEED)
    unsafe = [record for record in loaded.test if record.label == 1]
    unsafe = [unsafe[i] for i in rng.permutation(len(unsafe))[: int(n)]]
    category = {one: part for part in policy.categories for one in part.classes}
    own = [one for part in policy.categories for one in (*part.classes, *part.look_alikes)]
    source = [record.caption for record in unsafe]
    asked = {
        "a look-alike": [str(rng.choice(category[one].look_alikes)) for one in source],
        "any other class": [str(rng.choice([name for name in judge.names if name != one])) for one in source],
    }
    pipeline = DiffusersEditor("auto", editor, steps=int(steps), guidance=float(guidance), dilate=0.0, batch_size=32)
    print(
        f"| photographs | n | called so, of {len(judge.names)} classes | of the policy's classes and the one asked for | above the source's class |"
    )
    print("|---|---|---|---|---|")
    real = [record for record in loaded.test if record.caption in own]
    every = loaded.test
    report("real, any class", judge, judge([one.content for one in every]), *[[one.caption for one in every]] * 2, own)
    report("real, the policy's classes", judge, judge([one.content for one in real]), *[[one.caption for one in real]] * 2, own)
    trips = edit(pipeline, unsafe, source, "round_trip")
    kept = [source[row] for row in trips]
    report("through the autoencoder", judge, judge([ArrayContent(image) for image in trips.values()]), kept, kept, own)
    before = judge([record.content for record in unsafe])
    for name, wanted in asked.items():
        report(f"originals, called {name}", judge, before, wanted, source, own)
        edits = edit(pipeline, unsafe, wanted)
        logits = judge([ArrayContent(image) for image in edits.values()])
        some = [[words[row] for row in edits] for words in (wanted, source)]
        report(f"edited into {name}", judge, logits, *some, own)
        if picture and name == "a look-alike":
            called = dict(zip(edits, (judge.names[i] for i in logits.argmax(axis=1)), strict=True))
            draw(Path(picture), unsafe, edits, wanted, called.__getitem__)
    print(f"{len(unsafe) - len(edits)} of {len(unsafe)} photographs cannot be edited, mostly because the box covers them whole")


if __name__ == "__main__":
    main(**dict(argument.split("=", 1) for argument in sys.argv[1:]))
