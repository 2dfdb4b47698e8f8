"""What an image costs with each encoder preset on a processor, with random weights: nothing is fetched.

    python benchmarks/encoder_presets.py [batch_size=8] [repeats=3]

Prints a row a preset, for docs/encoders.md: width, size of all weights in single precision, and the processor's time of the
image tower on one thread over that of clip_vit_b32. The smallest of the repeats counts, taken in turns.
"""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import open_clip
import torch
import yaml

from guardkit.artifacts import shipped
from guardkit.runs.hydra import CONF_DIR

warnings.simplefilter("ignore")
logging.disable()  # open_clip warns of random weights

REFERENCE = "clip_vit_b32"
# sizes of presets that open_clip does not build, from microsoft/Cream, TinyCLIP/src/open_clip/model_configs/TinyCLIP-40M.json
TOWERS = {
    "tinyclip_40m": {
        "vision_config": {
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "num_attention_heads": 8,
            "patch_size": 32,
        },
        "text_config": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 8},
        "projection_dim": 512,
    }
}


class Tower(NamedTuple):
    encode: Callable[[torch.Tensor], torch.Tensor]
    size: Sequence[int]  # height and width
    megabytes: float


def random_tower(preset: str, settings: Mapping[str, Any]) -> Tower:
    """The preset's image tower with random weights."""
    if preset in TOWERS:
        import transformers

        model = transformers.CLIPModel(transformers.CLIPConfig(**TOWERS[preset])).eval()
        vision, project, side = model.vision_model, model.visual_projection, model.config.vision_config.image_size
        return Tower(lambda images: project(vision(images).pooler_output), (side, side), _megabytes(model))
    folder = shipped(settings["weights"])
    model = open_clip.create_model(f"local-dir:{folder}" if folder else settings["architecture"], load_weights=False).eval()
    side = model.visual.image_size
    return Tower(model.visual, (side, side) if isinstance(side, int) else side, _megabytes(model))


def _megabytes(model: torch.nn.Module) -> float:
    return sum(value.numel() for value in model.state_dict().values()) * 4 / 1e6


def main(batch_size: int = 8, repeats: int = 3) -> None:
    torch.set_num_threads(1)
    files = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((CONF_DIR / "encoder").glob("*.yaml"))}
    towers = {name: random_tower(name, settings) for name, settings in files.items() if settings["weights"] != "???"}
    best, widths = dict.fromkeys(towers, float("inf")), {}
    with torch.inference_mode():
        for _ in range(repeats + 1):  # once to warm up
            for name, tower in towers.items():
                images = torch.randn(batch_size, 3, *tower.size)
                started = time.process_time()
                widths[name] = tower.encode(images).shape[1]
                best[name] = min(best[name], time.process_time() - started)
    print(f"| preset | width | MB | time on one thread, batch {batch_size}, {REFERENCE} = 1 |\n|---|---|---|---|")
    for name in sorted(towers, key=best.__getitem__):
        print(f"| {name} | {widths[name]} | {towers[name].megabytes:.0f} | {best[name] / best[REFERENCE]:.2f} |")


if __name__ == "__main__":
    main(**{name: int(value) for name, value in (argument.split("=") for argument in sys.argv[1:])})
