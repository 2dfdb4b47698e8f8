"""The recipe of `checkpoints/scenes_clip`: a small CLIP trained on drawn scenes and their captions.

    python -m checkpoints.scenes_clip.recipe out=checkpoints/scenes_clip

Every batch holds scenes beside their twins, so that each image's hardest negative caption is in the same batch, and every
image has two texts: its whole caption, and the bare name of its object. Captions name objects, actors, places and colours;
the words safe and unsafe never occur. The proportions and leans of test-only drawing variants never occur either. The
result is a folder that `open_clip.create_model_and_transforms("local-dir:...")`
loads, with half-precision weights.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from checkpoints.arguments import read_recipe
from guardkit.scenes.stage import COLOURS
from guardkit.scenes.world import RENDERINGS, Scene, ScenePool, draw

IMAGE_PX = 64
CONTEXT = 30
SEED = 7_001  # of the pool that trains the encoder; heads are trained and tested on pools with other seeds
_LATE = 0.4  # share of the time after which the logit scale is lowered
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


@dataclass(frozen=True)
class Recipe:
    """Settings of one training run; the defaults made the shipped encoder.

    Attributes:
        minutes: of optimisation, after drawing.
        n_scenes: drawn once per rendering; each adds itself and its twin.
        logit_scale: until two fifths of the time are over. Learned, it grows until objects share a handful of
            dimensions, told apart by text but not by a linear head.
        late_logit_scale: from then on. The smaller the scale, the wider the angles that the loss asks for between
            objects, and the more dimensions they fill.
    """

    out: str = "checkpoints/scenes_clip"
    minutes: float = 70.0
    n_scenes: int = 30_000
    batch_scenes: int = 192
    learning_rate: float = 1e-3
    logit_scale: float = 10.0
    late_logit_scale: float = 4.0
    weight_decay: float = 0.05
    workers: int = 2


def model_config(vocabulary: int) -> dict:
    """The open_clip model configuration."""
    return {
        "embed_dim": 256,
        "vision_cfg": {"image_size": IMAGE_PX, "layers": [1, 1, 1, 1], "width": 32, "patch_size": None},
        "text_cfg": {
            "context_length": CONTEXT,
            "vocab_size": vocabulary,
            "width": 128,
            "heads": 4,
            "layers": 2,
            "hf_tokenizer_name": "scenes_clip",
            "tokenizer_kwargs": {"clean": "lower"},
        },
    }


def twins(index: int, rendering: str) -> tuple[Scene, Scene]:
    """A scene and its hardest neighbour: its counterfactual, or a null edit where it has none.

    The feature may have any colour that captions name, as objects do in the pictures that real CLIP models learn
    from; the proportions and leans of the test-only variants never occur.
    """
    pool = ScenePool("train", seed=SEED, rendering=rendering, scene_shift=0.0)
    scene = pool.scene(label=int(index % 4 != 0), index=index)
    scene = replace(scene, colour=list(COLOURS)[int(np.random.default_rng([SEED, index]).integers(len(COLOURS)))])
    return scene, scene.counterfactual() if scene.category else scene.null_edit()


def captions(scene: Scene, *, with_colours: bool) -> tuple[str, str]:
    """What a scene shows, whole and by its object's bare name."""
    bare = replace(scene, clothes="", colour="", distractors=((scene.distractors[0][0], "", 0.0),))
    whole = scene.caption if with_colours else " ".join(bare.caption.replace(" in  ", " ").split())
    return whole, " ".join(bare.words.split())


def shrink(image: np.ndarray) -> np.ndarray:
    """Resizes as the encoder's preprocessing does: bicubic with antialiasing."""
    return np.asarray(Image.fromarray(image).resize((IMAGE_PX, IMAGE_PX), Image.Resampling.BICUBIC))


def _draw_block(block: tuple[int, int, str]) -> np.ndarray:
    start, stop, rendering = block
    return np.stack([np.stack([shrink(draw(scene).image) for scene in twins(i, rendering)]) for i in range(start, stop)])


def draw_pool(n_scenes: int, workers: int) -> np.ndarray:
    """(n_scenes * 2, 2, 64, 64, 3) uint8: both renderings, each scene beside its twin."""
    edges = [*list(range(0, n_scenes, 500)), n_scenes]
    blocks = [(a, b, rendering) for rendering in RENDERINGS for a, b in itertools.pairwise(edges)]
    with ProcessPoolExecutor(workers) as executor:
        return np.concatenate(list(executor.map(_draw_block, blocks)))


def write_tokenizer(folder: Path) -> int:
    """Writes a word-level tokenizer over the words that captions can hold; returns its vocabulary size.

    The end token has the highest id because open_clip pools the text tower at the largest token.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {"a", "an", "of", "photo", "image", "picture", "drawing", "cartoon", "and", "the", "no", "person", "someone", "something"}
    for rendering in RENDERINGS:
        for index in range(4_000):
            for scene in twins(index, rendering):
                words |= set(scene.caption.replace(",", " ").lower().split())
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[BOS]": 2, ",": 3}
    for word in sorted(words):
        vocabulary[word] = len(vocabulary)
    vocabulary["[EOS]"] = len(vocabulary)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", vocabulary["[BOS]"]), ("[EOS]", vocabulary["[EOS]"])]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", bos_token="[BOS]", eos_token="[EOS]")
    fast.save_pretrained(folder)
    return len(vocabulary)


def train(recipe: Recipe) -> Path:
    """Runs the recipe and returns the folder it wrote; logs a line every 100 steps."""
    import open_clip
    from safetensors.torch import save_file

    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    out = Path(recipe.out)
    out.mkdir(parents=True, exist_ok=True)
    vocabulary = write_tokenizer(out)
    config = {
        "model_cfg": model_config(vocabulary),
        "preprocess_cfg": {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"},
    }
    (out / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    started = time.monotonic()
    pool = draw_pool(recipe.n_scenes, recipe.workers)
    _log(f"drew {2 * len(pool)} images in {time.monotonic() - started:.0f} s")

    model = open_clip.create_model(f"local-dir:{out}", require_pretrained=False).to(memory_format=torch.channels_last)
    model.logit_scale.data.fill_(math.log(recipe.late_logit_scale))
    model.logit_scale.requires_grad_(False)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{out}")
    tables = [[twins(i, rendering) for i in range(recipe.n_scenes)] for rendering in RENDERINGS]
    scenes = [pair for table in tables for pair in table]
    decay = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    rest = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98))
    mean, std = torch.tensor(MEAN).view(1, 3, 1, 1), torch.tensor(STD).view(1, 3, 1, 1)
    started, step, order = time.monotonic(), 0, np.array([], dtype=int)
    running = {"loss": 0.0, "named": 0.0}
    weights = out / "open_clip_model.safetensors"
    while (progress := (time.monotonic() - started) / (60 * recipe.minutes)) < 1:
        if len(order) < recipe.batch_scenes:
            order = np.concatenate([order, rng.permutation(len(pool))])
        batch, order = order[: recipe.batch_scenes], order[recipe.batch_scenes :]
        # a cosine over wall-clock time, so that the recipe fits the hour it is given on any machine
        warm_up = min(1.0, (step + 1) / 200)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * warm_up * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
        pixels = torch.from_numpy(pool[batch].reshape(-1, IMAGE_PX, IMAGE_PX, 3)).permute(0, 3, 1, 2).float() / 255
        pixels, coloured = _augment(pixels, rng)
        pixels = ((pixels - mean) / std).contiguous(memory_format=torch.channels_last)
        said = [captions(scene, with_colours=keep) for i, keep in zip(batch, coloured, strict=True) for scene in scenes[i]]
        wholes, objects = zip(*said, strict=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            image = model.encode_image(pixels)
        image = functional.normalize(image.float(), dim=-1)
        scale = recipe.logit_scale if progress < _LATE else recipe.late_logit_scale
        # whole captions teach the rest of the picture; they are long, so half of the batch has to do
        half = len(said) // 2
        whole_loss, _ = _contrast(model, tokenizer, image[:half], wholes[:half], scale)
        object_loss, right = _contrast(model, tokenizer, image, objects, scale)
        loss = 0.5 * whole_loss + object_loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running["loss"] += loss.item() / 100
        running["named"] += right / 100
        step += 1
        if step % 100 == 0:
            rate = step * 2 * recipe.batch_scenes / (time.monotonic() - started)
            _log(f"step {step} progress {progress:.3f} loss {running['loss']:.3f} objects named {running['named']:.3f} images/s {rate:.0f}")
            running = dict.fromkeys(running, 0.0)
        if step % 500 == 0:
            _save(model, weights, save_file)
    _save(model, weights, save_file)
    _log(f"{step} steps of {2 * recipe.batch_scenes} images in {time.monotonic() - started:.0f} s")
    return out


def _contrast(model: Any, tokenizer: Any, image: torch.Tensor, said: Sequence[str], scale: float) -> tuple[torch.Tensor, float]:
    """CLIP's symmetric loss, where a text that several images share is right for each of them.

    Returns:
        The loss, and the share of images whose own text is the nearest.
    """
    texts, own = np.unique(said, return_inverse=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        text = model.encode_text(tokenizer(list(texts)))
    logits = scale * image @ functional.normalize(text.float(), dim=-1).T
    target = torch.from_numpy(own)
    shares = functional.one_hot(target, len(texts)).float()
    shares = shares / shares.sum(dim=0)
    loss = (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, shares.T)) / 2
    return loss, (logits.argmax(dim=1) == target).float().mean().item()


def _augment(pixels: torch.Tensor, rng: np.random.Generator) -> tuple[torch.Tensor, np.ndarray]:
    """Shifts, stretches, leans, mirrors and relights a batch; twins share each change because only their difference
    should teach. A quarter of the scenes lose their colours or have them swapped, and the words for them.

    Returns:
        The pixels, and which scenes kept their colours.
    """
    n = len(pixels) // 2
    stretch, turn = np.exp(rng.uniform(-0.15, 0.15, n)), rng.uniform(-0.12, 0.12, n)
    lean, zoom, flip = rng.uniform(-0.22, 0.22, n), rng.uniform(0.92, 1.08, n), np.where(rng.random(n) < 0.5, -1.0, 1.0)
    theta = np.zeros((n, 2, 3), np.float32)
    theta[:, 0, 0], theta[:, 0, 1] = flip * zoom * stretch * np.cos(turn), lean - np.sin(turn)
    theta[:, 1, 0], theta[:, 1, 1] = flip * np.sin(turn), zoom / stretch * np.cos(turn)
    theta[:, :, 2] = rng.uniform(-0.1, 0.1, (n, 2))
    grid = functional.affine_grid(torch.from_numpy(theta).repeat_interleave(2, 0), list(pixels.shape), align_corners=False)
    pixels = functional.grid_sample(pixels, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    gain = torch.from_numpy(rng.uniform(0.85, 1.15, (n, 3)).astype(np.float32)).repeat_interleave(2, 0)
    pixels = (pixels * gain[:, :, None, None]).clamp(0, 1)
    coloured = rng.random(n) >= 0.25
    for i in np.flatnonzero(~coloured):
        pair = pixels[2 * i : 2 * i + 2]
        pixels[2 * i : 2 * i + 2] = pair.mean(dim=1, keepdim=True) if rng.random() < 0.3 else pair[:, torch.from_numpy(rng.permutation(3))]
    return pixels, coloured


def _save(model: torch.nn.Module, path: Path, save_file: Callable[..., None]) -> None:
    temporary = path.with_suffix(".tmp")
    state = {name: value.half().contiguous() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    save_file(state, temporary)
    os.replace(temporary, path)


def _log(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    print(train(read_recipe(Recipe, sys.argv[1:])))
