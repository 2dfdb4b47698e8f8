"""The whole chain with the learned editor that ships, on unseen scenes, judged by what the world itself knows.

    python benchmarks/learned_editor.py chain [n=500] [max_tries=4] [judge=outputs/scene_judge.safetensors] [picture=docs/learned_editor.png] [key=value ...]
    python benchmarks/learned_editor.py gain [seeds=5] [n_unsafe=64]

`chain`: yield, retries, precision and recall of the verifier against an independent judge (benchmarks/scene_judge.py, trained
when it is missing), PSNR and seconds an image. An edit is right when the judge names the very object that was asked for.
Settings such as `verifier.min_arrival=0.7` or `seed=606` (of the scenes) go to the chain.
`gain`: pair accuracy of `pairs_aug` with this editor, with the exact one, and of `unpaired`; Student's t intervals over seeds.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
from hydra import compose, initialize_config_dir
from imperfect_editor import interval
from omegaconf import OmegaConf
from PIL import Image, ImageDraw
from scene_judge import FEATURES, N_UNSAFE, NOTHING, crop, index_of, load
from verifier_quality import wilson

from guardkit.artifacts import written
from guardkit.counterfactual.store import Try
from guardkit.images import decode_png
from guardkit.runs.hydra import CONF_DIR, default_cache_dir
from guardkit.runs.objects import build
from guardkit.runs.train import run
from guardkit.scenes.content import SceneContent
from guardkit.scenes.world import Scene, ScenePool, find_region
from guardkit.schema import Record

EXPERIMENTS = {
    "unpaired": ["experiment=unpaired"],
    "exact editor": ["experiment=pairs_aug", "editor=scenes"],
    "learned editor, no verifier": ["experiment=pairs_aug", "editor=scenes_edit"],
    "learned editor, verified": ["experiment=pairs_aug", "editor=scenes_edit", "verifier=encoder", "edit_max_tries=4"],
}


def chain(n: int, max_tries: int, judge_path: Path, picture: Path, seed: int, settings: list[str]) -> None:
    judge = load(judge_path)
    with tempfile.TemporaryDirectory() as cache:
        settings = ["editor=scenes_edit", "verifier=encoder", f"edit_max_tries={max_tries}", f"cache_dir={cache}", *settings]
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            cfg = compose("train", settings)
        pipeline = build(cfg).pipeline
        pools = [ScenePool("test", seed=seed, rendering=rendering) for rendering in ("photo", "generated")]
        scenes = [pools[i % 2].scene(1, i) for i in range(n)]
        records = [_record(scene) for scene in scenes]
        pipeline.make(records[:2], [0, 1])  # loads the weights
        started = time.perf_counter()
        tries = pipeline.make_all(records, list(range(n)))
        seconds = time.perf_counter() - started
        editor = pipeline.editor
    print(f"{n} unseen scenes, {editor.name}, verifier=encoder, up to {max_tries} tries")
    _judge_on_truth(judge, scenes)
    rows = [(scene, record, one) for scene, record, some in zip(scenes, records, tries, strict=True) for one in some]
    images = [None if one.png is None else decode_png(one.png) for _, _, one in rows]
    asked = np.array([index_of(scene.counterfactual(wanted=one.instruction)) for scene, _, one in rows])
    there = np.array([image is not None for image in images])
    named = np.full(len(rows), NOTHING)
    named[there] = judge.names(
        np.array([crop(image, record.region) for image, (_, record, _) in zip(images, rows, strict=True) if image is not None])
    )
    safe, right = (named >= N_UNSAFE) & (named != NOTHING), named == asked
    accepted = np.array([one.accepted for _, _, one in rows])
    first = np.concatenate([[True] + [False] * (len(some) - 1) for some in tries])
    of_image = np.array([any(one.accepted for one in some) for some in tries])
    psnr = np.array([_psnr_outside(record, image) for image, (_, record, _) in zip(images, rows, strict=True) if image is not None])
    print(f"  first tries: show a safe object     {wilson(int(safe[first].sum()), n)}")
    print(f"  first tries: show what was asked    {wilson(int(right[first].sum()), n)}   (aim 0.60)")
    print(f"  accepted, of first tries            {wilson(int(accepted[first].sum()), n)}   SafetyPairs (2025): 0.23, by hand")
    print(f"  accepted, of all {len(rows):5d} tries       {wilson(int(accepted.sum()), len(rows))}")
    print(f"  accepted, of images                 {wilson(int(of_image.sum()), n)}   with {len(rows) / n:.2f} tries an image")
    print(
        f"  verifier: accepted and still unsafe or nothing {wilson(int((accepted & ~safe).sum()), max(1, int(accepted.sum())))}   (aim 0.02)"
    )
    print(f"  verifier: accepted and not what was asked      {wilson(int((accepted & ~right).sum()), max(1, int(accepted.sum())))}")
    print(
        f"  verifier: accepted of what is right            {wilson(int((accepted & right).sum()), max(1, int(right.sum())))}   (aim 0.75)"
    )
    print(f"  PSNR outside the box                {np.mean(psnr):.1f} dB mean, {psnr.min():.1f} dB worst   (aim 25)")
    print(f"  seconds a try, everything           {seconds / len(rows):.3f}   (aim 1 for the edit)")
    reasons, counts = np.unique([str(one.verdict.reason) for _, _, one in rows if not one.accepted], return_counts=True)
    for i in np.argsort(-counts):
        print(f"  rejected {counts[i]:5d}  {reasons[i]}")
    _draw(
        [
            (scene, one, image, int(name), bool(ok))
            for (scene, _, one), image, name, ok in zip(rows, images, named, right, strict=True)
            if image is not None
        ],
        picture,
    )


def _record(scene: Scene) -> Record:
    return Record(
        scene.name, 1, scene.category, f"scenes_{scene.rendering}", scene.name, SceneContent(scene), find_region(scene), scene.caption
    )


def _judge_on_truth(judge, scenes: list[Scene]) -> None:
    """How far the judge itself may be trusted."""
    twins = [scene.counterfactual(i) for i, scene in enumerate(scenes)]
    for name, shown, allowed in (("originals", scenes, range(N_UNSAFE)), ("exact twins", twins, range(N_UNSAFE, NOTHING))):
        crops = np.array([crop(SceneContent(one).load(), find_region(one)) for one in shown])
        named = judge.names(crops)
        hits = int(sum(name == index_of(one) for name, one in zip(named, shown, strict=True)))
        sides = int(sum(int(one) in allowed for one in named))
        print(f"  judge on {name:<12} names the object {wilson(hits, len(shown))}, its side {wilson(sides, len(shown))}")


def _psnr_outside(record: Record, edited: np.ndarray) -> float:
    """In dB, over what lies outside the box; 99 where nothing differs."""
    original = record.content.load().astype(float)
    high, wide = original.shape[:2]
    x_min, y_min, x_max, y_max = record.region
    outside = np.ones((high, wide), bool)
    outside[int(y_min * high) : int(np.ceil(y_max * high)), int(x_min * wide) : int(np.ceil(x_max * wide))] = False
    error = float(np.square(original - edited)[outside].mean())
    return 99.0 if error == 0 else 10 * np.log10(255**2 / error)


def _draw(rows: list[tuple[Scene, Try, np.ndarray, int, bool]], path: Path) -> None:
    """Originals and edits, accepted ones first; under each what the judge sees."""
    scale, label = 2, 26
    kept = [row for row in rows if row[1].accepted][:9]
    chosen = kept + [row for row in rows if not row[1].accepted][: 12 - len(kept)]
    width, height = 128 * scale * 2 + 8, 128 * scale + label
    sheet = Image.new("RGB", (3 * (width + 12), 4 * (height + 8)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (scene, one, image, name, ok) in enumerate(chosen):
        left, top = (i % 3) * (width + 12), (i // 3) * (height + 8)
        for k, pixels in enumerate((SceneContent(scene).load(), image)):
            sheet.paste(Image.fromarray(pixels).resize((128 * scale,) * 2, Image.Resampling.LANCZOS), (left + k * (128 * scale + 4), top))
        seen = "nothing" if name == NOTHING else FEATURES[name].replace("{c} ", "")
        asked = scene.counterfactual(wanted=one.instruction).feature.replace("{c} ", "")
        verdict = "accepted" if one.accepted else "rejected"
        pen.text((left + 2, top + 128 * scale + 2), f"asked for {asked}; judge sees {seen}", fill="black")
        pen.text((left + 2, top + 128 * scale + 13), verdict, fill="#15803d" if one.accepted == ok else "#b91c1c")
    with written(path) as temporary:
        sheet.quantize(256, dither=Image.Dither.NONE).save(temporary, optimize=True)


def gain(seeds: int, n_unsafe: int) -> None:
    results: dict[str, list[dict]] = {name: [] for name in EXPERIMENTS}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, experiment in EXPERIMENTS.items():
            for seed in range(seeds):
                with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
                    cfg = compose("train", ["head=linear", *experiment, f"data.n_unsafe={n_unsafe}", f"seed={seed}"])
                results[name].append(run(cfg, {}, Path(folder)).metrics)
    baseline = [one["pairs"]["pair_accuracy"] for one in results["unpaired"]]
    print(f"n_unsafe={n_unsafe}, {seeds} seeds, 95 % intervals; gain over unpaired paired by seed; the test pairs are exact")
    print("| training | pair accuracy | gain over unpaired | AUROC | edited against original | accepted of images | tries an image |")
    print("|---|---|---|---|---|---|---|")
    for name, runs in results.items():
        accuracy = [one["pairs"]["pair_accuracy"] for one in runs]
        cells = ["{:.3f} ± {:.3f}".format(*interval(accuracy))]
        cells.append(
            "" if name == "unpaired" else "{:+.3f} ± {:.3f}".format(*interval([a - b for a, b in zip(accuracy, baseline, strict=True)]))
        )
        cells.append("{:.3f} ± {:.3f}".format(*interval([one["test"]["auroc"] for one in runs])))
        cells.append(f"{np.mean([one['edited_vs_original_auroc'] for one in runs]):.2f}")
        edits = [one["edits"] for one in runs]
        requested = sum(one["requested"] for one in edits)
        cells += [f"{sum(one[key] for one in edits) / requested:.2f}" if requested else "" for key in ("accepted", "tries")]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def main(command: str, *arguments: str) -> None:
    logging.disable(logging.WARNING)
    OmegaConf.register_new_resolver("default_cache_dir", default_cache_dir, replace=True)
    options = dict(one.split("=", 1) for one in arguments)
    if command == "gain":
        gain(int(options.get("seeds", 5)), int(options.get("n_unsafe", 64)))
    elif command == "chain":
        n, tries, seed = (int(options.pop(key, default)) for key, default in (("n", 500), ("max_tries", 4), ("seed", 505)))
        judge = Path(options.pop("judge", "outputs/scene_judge.safetensors"))
        chain(
            n,
            tries,
            judge,
            Path(options.pop("picture", "docs/learned_editor.png")),
            seed,
            [f"{key}={value}" for key, value in options.items()],
        )
    else:
        raise SystemExit(f"say chain or gain, got {command!r}")


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["chain"]))
