"""What the counterfactual pipeline costs beyond its editor.

    python benchmarks/pipeline.py [n=96] [editor=scenes_edit] [key=value ...]

In one run: the editor alone at several batch sizes, then instructing, editing, verifying, embedding and storing together, then
the same again, when everything is in the store. Settings go to the configuration, as in `editor.weights=FOLDER`.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from guardkit.editors.base import EditRequest
from guardkit.fitting.parts import Parts
from guardkit.runs.hydra import CONF_DIR, default_cache_dir
from guardkit.runs.objects import build
from guardkit.scenes.content import SceneContent
from guardkit.scenes.world import ScenePool, find_region
from guardkit.schema import Record

BATCHES = (1, 4, 16, 32)


def clock(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main(n: int, settings: list[str]) -> None:
    logging.disable(logging.WARNING)
    OmegaConf.register_new_resolver("default_cache_dir", default_cache_dir, replace=True)

    def built(folder: str, batch: int) -> Parts:
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            cfg = compose("train", [*settings, "verifier=encoder", f"cache_dir={folder}", f"edit_batch_size={batch}"])
        return build(cfg)

    pool = ScenePool("test", seed=808)
    scenes = [pool.scene(1, i) for i in range(n + 1)]
    records = [
        Record(scene.name, 1, scene.category, "scenes_photo", scene.name, SceneContent(scene), find_region(scene), scene.caption)
        for scene in scenes
    ]
    with tempfile.TemporaryDirectory() as folder:
        parts = built(folder, 16)
        pipeline, editor = parts.pipeline, parts.pipeline.editor
        instructions = pipeline.instructor.instruct(records, range(n + 1), parts.policy)
        requests = [
            EditRequest(record.content, one.text, record.region, seed, target=one.target)
            for seed, (record, one) in enumerate(zip(records, instructions, strict=True))
            if record.content is not None
        ]
        # weights are loaded and every library is warm before anything is timed
        pipeline.make(records[-1:], [n])
        alone: dict[int, float] = {}
        for batch in BATCHES:
            if hasattr(editor, "batch_size"):
                editor.batch_size = batch
            alone[batch] = min(
                clock(lambda size=batch: [editor.edit(requests[start : min(n, start + size)]) for start in range(0, n, size)])
                for _ in range(2)
            )
            print(f"editor alone, batch {batch:<3}        {alone[batch] / n:8.4f} s an image", flush=True)
        best = min(alone, key=lambda batch: alone[batch])
        if hasattr(editor, "batch_size"):
            editor.batch_size = best
        pipeline.batch_size = best

        def whole() -> None:
            tries = pipeline.make(records[:n], list(range(n)))
            parts.store.embed([one for one in tries if one is not None and one.accepted])

        first = clock(whole)
        again = built(folder, best)
        again.store.embed([SceneContent(scenes[-1])])  # start-up: the encoder's weights
        second = clock(lambda: again.pipeline.make(records[:n], list(range(n))))
    print(f"{n} images, {editor.name}, {torch.get_num_threads()} threads")
    print(
        f"pipeline, first run           {first / n:8.4f} s an image   over the editor alone at batch {best}: {first / alone[best]:.2f} (aim: at most 1.15)"
    )
    print(f"pipeline, second run          {second / n:8.4f} s an image   over the first: {second / first:.3f} (aim: at most 0.02)")


if __name__ == "__main__":
    options = [one for one in sys.argv[1:] if not one.startswith("n=")]
    if not any(one.startswith("editor=") for one in options):
        options.append("editor=scenes_edit")
    main(next((int(one[2:]) for one in sys.argv[1:] if one.startswith("n=")), 96), options)
