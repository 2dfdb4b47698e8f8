"""Do counterfactual pairs help on photographs? Arms x label budgets over policies that nobody tuned to.

    python benchmarks/photographs.py data=DIR output_dir=DIR [encoder=guardkit:photos_clip] [policies=24] [sizes=8,32,128]
        [seeds=5] [safe_per_unsafe=1,4] [editors=inpaint,paste] [split=test]

DIR holds `train.parquet` and `val.parquet` (columns `image`, `name` and the box). For each of the policies of `class_policies.json`, each
arm's head is trained on so many labelled unsafe photographs, and tested on all natural ones of `val.parquet`. What is printed are
differences in AUROC to the arm `unpaired` with the same budget, means over policies, with 95 % intervals over policies (Student's
t over the policies' means of seeds), and zero-shot beside it. Finished policies are found in output_dir. Any open_clip weights may be
the encoder: "local-dir:FOLDER", "hf-hub:ORG/NAME".
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

import guardkit
from benchmarks.class_policies import ClassPolicy
from benchmarks.class_policies import policies as of_split
from guardkit.artifacts import written
from guardkit.data.sources.parquet import ParquetSource
from guardkit.editors.inpaint import InpaintEditor
from guardkit.editors.paste import PasteEditor
from guardkit.embeddings import EmbeddingStore
from guardkit.encoders.open_clip import OpenClipEncoder
from guardkit.metrics.figures import classification_metrics

EDITORS = {"inpaint": InpaintEditor, "paste": PasteEditor}
EDITED = ("pairs_aug", "pairs_plus", "pairs_balanced")
UNEDITED = ("unpaired", "look_alikes", "pairs_transplanted")
MEASURES = ("auroc", "average_precision")
SCALE = 30.0  # of the cosine before the softmax, as conf/verifier/encoder.yaml


@dataclass(frozen=True)
class Settings:
    data: Path
    output_dir: Path
    sizes: tuple[int, ...]
    safe_per_unsafe: tuple[int, ...]
    seeds: int
    editors: tuple[str, ...]


def source_of(policy: guardkit.Policy, data: Path) -> ParquetSource:
    return ParquetSource(
        policy,
        str(data / "train.parquet"),
        test=str(data / "val.parquet"),
        name="photos",
        class_column="name",
        caption_column="name",
        check_images=False,
    )


def zero_shot(encoder: OpenClipEncoder, store: EmbeddingStore, policy: guardkit.Policy, data: Path) -> dict[str, float | None]:
    """The share of the policy's unsafe texts in the softmax over all its texts, on the same test images."""
    test = source_of(policy, data).load().test
    (category,) = policy.categories
    texts = encoder.encode_texts([*category.unsafe_texts, *category.safe_texts, *policy.safe_texts])
    logits = SCALE * store.embed([record.content for record in test]) @ texts.T
    chances = np.exp(logits - logits.max(axis=1, keepdims=True))
    scores = chances[:, : len(category.unsafe_texts)].sum(axis=1) / chances.sum(axis=1)
    figures = classification_metrics(np.array([record.label for record in test]), scores, 0.5)
    return {measure: figures[measure] for measure in MEASURES}


def try_policy(row: int, one: ClassPolicy, settings: Settings, encoder: OpenClipEncoder) -> pd.DataFrame:
    """A row for each arm, editor, label budget and number of safe images: means over seeds."""
    done = settings.output_dir / f"policy_{row:02d}.parquet"
    if done.is_file():
        return pd.read_parquet(done)
    cache = settings.output_dir / "cache"
    frames = [pd.DataFrame([{"arm": "zero_shot", **zero_shot(encoder, EmbeddingStore(encoder, cache), one.policy, settings.data)}])]
    for safe in settings.safe_per_unsafe:
        for editor in (None, *settings.editors):
            folder = settings.output_dir / f"policy_{row:02d}" / f"{editor or 'unedited'}_{safe}"
            # arms that use no natural safe image are the same whatever their number
            edited = EDITED if safe == settings.safe_per_unsafe[0] else tuple(arm for arm in EDITED if arm != "pairs_aug")
            guardkit.sweep(
                source_of(one.policy, settings.data),
                one.policy,
                encoder=encoder,
                output_dir=folder,
                arms=UNEDITED if editor is None else ("unpaired", *edited),
                sizes=settings.sizes,
                seeds=settings.seeds,
                strengths=(1e-3, 1e-2, 1e-1, 1.0),
                metric="auroc",
                n_resamples=100,  # its own intervals are not used
                editor=None if editor is None else EDITORS[editor](),
                safe_per_unsafe=safe,
                cache_dir=cache,
            )
            cells = pd.read_parquet(folder / "cells.parquet")
            cells = cells[cells["is_chosen"] & ((cells["arm"] != "unpaired") | (editor is None))]
            means = cells.groupby(["arm", "n_unsafe"], as_index=False)[list(MEASURES)].mean()
            frames.append(means.assign(editor=editor or "", safe_per_unsafe=safe))
    table = pd.concat(frames).assign(policy=one.policy.name)
    with written(done) as temporary:
        table.to_parquet(temporary)
    return table


def interval(values: np.ndarray) -> str:
    """Mean and half the 95 % interval over policies."""
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
    return f"{values.mean():.3f} ± {half:.3f}"


def report(table: pd.DataFrame, settings: Settings) -> str:
    """The table of AUROC, and of differences to `unpaired` with as many labels and one safe image for each."""
    arms = table[table["arm"] != "zero_shot"].pivot_table(
        index=["safe_per_unsafe", "arm", "editor", "n_unsafe"], columns="policy", values="auroc"
    )
    first = settings.safe_per_unsafe[0]
    lines = [
        f"zero-shot AUROC {interval(table[table['arm'] == 'zero_shot']['auroc'].to_numpy())}, {table['policy'].nunique()} policies",
        "",
    ]
    lines += [
        f"| arm | editor | safe per unsafe | {' | '.join(f'{size} labels' for size in settings.sizes)} |",
        "|---|---|---|" + "---|" * len(settings.sizes),
    ]
    for (safe, arm, editor), part in arms.groupby(level=["safe_per_unsafe", "arm", "editor"], sort=False):
        cells = []
        for size in settings.sizes:
            values, base = part.loc[(safe, arm, editor, size)], arms.loc[(first, "unpaired", "", size)]
            both = pd.concat([values, base], axis=1).dropna().to_numpy()
            plain = arm == "unpaired" and safe == first
            cells.append(interval(both[:, 0]) if plain else f"{both[:, 0].mean():.3f} ({interval(both[:, 0] - both[:, 1])})")
        lines.append(f"| {arm} | {editor or '–'} | {int(safe)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(
    data: str,
    output_dir: str,
    encoder: str = "guardkit:photos_clip",
    policies: str = "24",
    sizes: str = "8,32,128",
    seeds: str = "5",
    safe_per_unsafe: str = "1,4",
    editors: str = "inpaint,paste",
    split: str = "test",
) -> None:
    settings = Settings(
        Path(data),
        Path(output_dir),
        *(tuple(map(int, text.split(","))) for text in (sizes, safe_per_unsafe)),
        int(seeds),
        tuple(editors.split(",")),
    )
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    model = OpenClipEncoder(None, encoder, batch_size=128)
    tables: list[pd.DataFrame] = []
    for row, one in enumerate(of_split(split)[: int(policies)]):
        tables.append(try_policy(row, one, settings, model))
        print(f"{row + 1} {one.policy.name}", file=sys.stderr, flush=True)
    table = pd.concat(tables)
    table.to_parquet(settings.output_dir / "table.parquet")
    print(report(table, settings))


if __name__ == "__main__":
    main(**dict(argument.split("=", 1) for argument in sys.argv[1:]))
