"""The recipe of `checkpoints/scenes_edit`: a small inpainting pipeline trained on drawn scenes and their counterfactuals.

    python -m checkpoints.scenes_edit.recipe out=checkpoints/scenes_edit
    python -m guardkit.train experiment=pairs_aug editor=scenes_edit

A latent diffusion model in the parts and the layout of diffusers' `StableDiffusionInpaintPipeline`: an autoencoder, a
U-Net that sees noisy latents, mask and masked latents, and the text tower of `scenes_clip`, frozen. It redraws a square
around the feature at the scenes' own resolution, so that nothing is enlarged and nothing blurred. What it learns from is
what an editor is for: the scene with its feature covered, the words of what shall be there, and the exact counterfactual.
The pool has its own seed; heads are trained and tested on others, and test-only drawing variants never occur.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from checkpoints.arguments import read_recipe
from guardkit.scenes.stage import COLOURS
from guardkit.scenes.world import RENDERINGS, Scene, ScenePool, draw
from guardkit.schema import Region

CROP_PX = 64
SEED = 7_002
LATENT_CHANNELS = 4
MARGIN = 0.04  # by which the covered box reaches beyond the feature, a fraction of the image's width


@dataclass(frozen=True)
class Recipe:
    """Settings of one training run; with the defaults two idle cores see about as many images as the shipped weights did.

    Attributes:
        autoencoder_minutes: of optimisation, after drawing.
        unet_minutes: likewise.
        n_scenes: drawn once per rendering, with their counterfactuals; each pair is learned in both directions.
        start: a folder that this recipe wrote earlier, whose autoencoder is kept and whose U-Net is trained on; or empty.
        text: the encoder whose text tower is taken, an open_clip folder.
        device: "cpu" or "cuda".
    """

    out: str = "scenes_edit"
    autoencoder_minutes: float = 25.0
    unet_minutes: float = 50.0
    n_scenes: int = 10_000
    batch_size: int = 32
    learning_rate: float = 1e-3
    text: str = "checkpoints/scenes_clip"
    device: str = "cpu"
    workers: int = 2
    start: str = ""


def square_around(region: Region, size: int, side: int = CROP_PX) -> tuple[int, int]:
    """Left and top pixel of the square of `side` pixels that has the region in its middle, kept inside the image."""
    x_min, y_min, x_max, y_max = region
    left, top = ((x_min + x_max) * size - side) / 2, ((y_min + y_max) * size - side) / 2
    return int(np.clip(round(left), 0, size - side)), int(np.clip(round(top), 0, size - side))


def pair(index: int, rendering: str, seed: int = SEED) -> tuple[Scene, Scene]:
    """A scene with a feature of either label, in any colour, and its counterfactual."""
    pool = ScenePool("train", seed=seed, rendering=rendering, scene_shift=0.0)
    scene = pool.scene(1, index)
    rng = np.random.default_rng([seed, index])
    scene = replace(scene, colour=list(COLOURS)[int(rng.integers(len(COLOURS)))])
    return scene, scene.counterfactual(int(rng.integers(1 << 30)))


def _draw_block(block: tuple[int, int, str, int]) -> tuple[np.ndarray, np.ndarray]:
    start, stop, rendering, seed = block
    crops, boxes = [], []
    for index in range(start, stop):
        drawn = [draw(scene) for scene in pair(index, rendering, seed)]
        for before, after in (drawn, drawn[::-1]):
            size = before.image.shape[0]
            left, top = square_around(before.region, size)
            crops.append([one.image[top : top + CROP_PX, left : left + CROP_PX] for one in (before, after)])
            grow = MARGIN * size
            x_min, y_min, x_max, y_max = (value * size for value in before.region)
            boxes.append([x_min - left - grow, y_min - top - grow, x_max - left + grow, y_max - top + grow])
    return np.array(crops, np.uint8), np.clip(np.array(boxes), 0, CROP_PX).astype(np.float32)


def draw_pool(n_scenes: int, workers: int, seed: int = SEED) -> tuple[np.ndarray, np.ndarray, list[Scene]]:
    """(4 n, 2, 64, 64, 3) uint8 crops before and after, (4 n, 4) covered boxes in pixels, the scenes to be drawn."""
    edges = [*range(0, n_scenes, 500), n_scenes]
    blocks = [(a, b, rendering, seed) for rendering in RENDERINGS for a, b in itertools.pairwise(edges)]
    with ProcessPoolExecutor(workers) as executor:
        made = list(executor.map(_draw_block, blocks))
    wanted = [scene for rendering in RENDERINGS for i in range(n_scenes) for scene in pair(i, rendering, seed)[::-1]]
    return np.concatenate([one[0] for one in made]), np.concatenate([one[1] for one in made]), wanted


def words(scene: Scene, rng: np.random.Generator) -> str:
    """What the square shows: mostly the whole caption, which is what an instructor gives, else the feature alone."""
    return scene.caption if rng.random() < 0.7 else scene.words


# --- the parts -------------------------------------------------------------------------------------------------------------


def text_tower(folder: str) -> tuple[Any, Any]:
    """The text tower of an open_clip folder as transformers' CLIPTextModel, and its tokenizer; the same weights."""
    import open_clip
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

    settings = json.loads((Path(folder) / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    theirs = open_clip.create_model(f"local-dir:{folder}").state_dict()
    width = settings["width"]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.model_max_length = settings["context_length"]
    config = CLIPTextConfig(
        vocab_size=settings["vocab_size"],
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=settings["layers"],
        num_attention_heads=settings["heads"],
        max_position_embeddings=settings["context_length"],
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = CLIPTextModel(config)
    ours = {
        "embeddings.token_embedding.weight": theirs["token_embedding.weight"],
        "embeddings.position_embedding.weight": theirs["positional_embedding"],
        "final_layer_norm.weight": theirs["ln_final.weight"],
        "final_layer_norm.bias": theirs["ln_final.bias"],
    }
    for i in range(settings["layers"]):
        block, layer = f"transformer.resblocks.{i}.", f"encoder.layers.{i}."
        for kind in ("weight", "bias"):
            parts = theirs[f"{block}attn.in_proj_{kind}"].chunk(3)
            ours |= {f"{layer}self_attn.{name}_proj.{kind}": part for name, part in zip("qkv", parts, strict=True)}
            ours[f"{layer}self_attn.out_proj.{kind}"] = theirs[f"{block}attn.out_proj.{kind}"]
            ours[f"{layer}layer_norm1.{kind}"], ours[f"{layer}layer_norm2.{kind}"] = (theirs[f"{block}ln_{n}.{kind}"] for n in (1, 2))
            ours[f"{layer}mlp.fc1.{kind}"], ours[f"{layer}mlp.fc2.{kind}"] = (
                theirs[f"{block}mlp.{name}.{kind}"] for name in ("c_fc", "c_proj")
            )
    names = list(model.state_dict())
    prefix = "text_model." if any(name.startswith("text_model.") for name in names) else ""
    missing = model.load_state_dict({f"{prefix}{name}": value for name, value in ours.items()}, strict=False)
    if missing.unexpected_keys or any(not name.endswith("position_ids") for name in missing.missing_keys):
        raise RuntimeError(f"the text tower does not fit: {missing}")
    return model.eval().requires_grad_(False), tokenizer


def new_autoencoder() -> Any:
    """Four times smaller on each side; thin where the resolution is full, because that is where the time goes."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=CROP_PX,
    )


def new_unet(text_width: int) -> Any:
    """The usual inpainting U-Net, small: noisy latents, mask and masked latents in, a velocity out."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=CROP_PX // 4,
        in_channels=2 * LATENT_CHANNELS + 1,
        out_channels=LATENT_CHANNELS,
        # attention to the words at a quarter of the positions only: four times as quick on a CPU as at all of them
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(48, 96, 128),
        layers_per_block=1,
        cross_attention_dim=text_width,
        attention_head_dim=32,
        norm_num_groups=16,
    )


# --- training --------------------------------------------------------------------------------------------------------------


class _Clock:
    """Progress over wall-clock time, the learning rate that follows from it, and a log line every so often."""

    def __init__(self, name: str, minutes: float, learning_rate: float) -> None:
        self.name, self.minutes, self.learning_rate = name, minutes, learning_rate
        self.started, self.step, self.sums = time.monotonic(), 0, dict[str, float]()

    def tick(self, optimizer: torch.optim.Optimizer) -> bool:
        """Sets the learning rate; False when the time is over."""
        progress = (time.monotonic() - self.started) / (60 * self.minutes)
        rate = self.learning_rate * min(1.0, (self.step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
        for group in optimizer.param_groups:
            group["lr"] = rate
        return progress < 1

    def log(self, n_images: int, **values: float) -> None:
        self.step += 1
        for key, value in values.items():
            self.sums[key] = self.sums.get(key, 0.0) + value / 100
        if self.step % 100 == 0:
            rate = self.step * n_images / (time.monotonic() - self.started)
            print(
                f"{self.name} step {self.step} " + " ".join(f"{k} {v:.4f}" for k, v in self.sums.items()) + f" images/s {rate:.0f}",
                flush=True,
            )
            self.sums = {}


def _pixels(crops: np.ndarray, device: str) -> torch.Tensor:
    """(n, 64, 64, 3) uint8 -> (n, 3, 64, 64) float in [-1, 1]."""
    return torch.from_numpy(crops).to(device).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def train_autoencoder(model: Any, crops: np.ndarray, recipe: Recipe, rng: np.random.Generator) -> None:
    """Reconstruction by absolute error in pixels and in their gradients, and a slight pull towards unit latents."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    clock = _Clock("autoencoder", recipe.autoencoder_minutes, recipe.learning_rate)
    flat = crops.reshape(-1, CROP_PX, CROP_PX, 3)
    while clock.tick(optimizer):
        pixels = _pixels(flat[rng.integers(len(flat), size=recipe.batch_size // 2)], recipe.device)
        with torch.autocast(recipe.device, dtype=torch.bfloat16):
            posterior = model.encode(pixels).latent_dist
            made = model.decode(posterior.sample()).sample
        made = made.float()
        # blur costs little in absolute error and a lot in gradients
        edges = sum((made.diff(dim=axis) - pixels.diff(dim=axis)).abs().mean() for axis in (2, 3))
        loss = (made - pixels).abs().mean() + 0.5 * edges + 1e-6 * posterior.kl().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        psnr = -10 * math.log10(max((made.detach().clamp(-1, 1) - pixels).square().mean().item() / 4, 1e-9))
        clock.log(len(pixels), loss=loss.item(), psnr=psnr)
    model.eval().requires_grad_(False)


def encode_latents(model: Any, crops: np.ndarray, device: str) -> torch.Tensor:
    """(n, 4, 16, 16) float16, not scaled yet."""
    parts = []
    with torch.inference_mode():
        for start in range(0, len(crops), 256):
            with torch.autocast(device, dtype=torch.bfloat16):
                posterior = model.encode(_pixels(crops[start : start + 256], device)).latent_dist
            parts.append(posterior.mean.half().cpu())
    return torch.cat(parts)


def train_unet(
    unet: Any,
    autoencoder: Any,
    text: Any,
    tokenizer: Any,
    scheduler: Any,
    pool: tuple[np.ndarray, np.ndarray, list[Scene]],
    recipe: Recipe,
    rng: np.random.Generator,
    save: Callable[[], None],
) -> None:
    """Denoises the counterfactual, given the covered original and the words; keeps a moving average of the weights.

    `save` is called every ten minutes and at the end, with the averaged weights in `unet`.
    """
    from diffusers.training_utils import EMAModel

    crops, boxes, scenes = pool
    device, scaling = recipe.device, autoencoder.config.scaling_factor
    targets = encode_latents(autoencoder, crops[:, 1], device) * scaling
    covered = encode_latents(autoencoder, np.stack([_cover(a, b) for a, b in zip(crops[:, 0], boxes, strict=True)]), device) * scaling
    masks = functional.interpolate(torch.from_numpy(np.stack([_mask(box) for box in boxes]))[:, None].float(), scale_factor=0.25)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=1e-3)
    average = EMAModel(unet.parameters(), decay=0.999, use_ema_warmup=True)
    clock = _Clock("unet", recipe.unet_minutes, recipe.learning_rate)
    saved = time.monotonic()
    while clock.tick(optimizer):
        if time.monotonic() - saved > 600:
            average.store(unet.parameters())
            average.copy_to(unet.parameters())
            save()
            average.restore(unet.parameters())
            saved = time.monotonic()
        rows = rng.integers(len(scenes), size=recipe.batch_size)
        # one in ten without words, for classifier-free guidance
        said = ["" if rng.random() < 0.1 else words(scenes[row], rng) for row in rows]
        with torch.inference_mode():
            tokens = tokenizer(said, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt")
            states = text(tokens.input_ids.to(device))[0].clone()
        clean = targets[rows].float().to(device)
        noise, step = torch.randn_like(clean), torch.randint(scheduler.config.num_train_timesteps, (len(rows),), device=device)
        noisy = scheduler.add_noise(clean, noise, step)
        wanted = scheduler.get_velocity(clean, noise, step)
        given = torch.cat([noisy, masks[rows].to(device), covered[rows].float().to(device)], dim=1)
        made = unet(given, step, states.clone()).sample
        # what lies outside is pasted back from the original, so the square's covered part matters most
        weight = 0.2 + 0.8 * masks[rows].to(device)
        loss = (weight * (made.float() - wanted).square()).mean() / weight.mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        average.step(unet.parameters())
        clock.log(len(rows), loss=loss.item())
    average.copy_to(unet.parameters())
    save()


def _mask(box: np.ndarray) -> np.ndarray:
    """(64, 64) bool, True where the picture is to be redrawn."""
    mask = np.zeros((CROP_PX, CROP_PX), bool)
    left, top = np.floor(box[:2]).astype(int)
    right, bottom = np.ceil(box[2:]).astype(int)
    mask[top:bottom, left:right] = True
    return mask


def _cover(crop: np.ndarray, box: np.ndarray) -> np.ndarray:
    """The crop with its box in middle grey, as diffusers' inpainting pipelines cover it."""
    return np.where(_mask(box)[..., None], np.uint8(128), crop)


def train(recipe: Recipe) -> Path:
    """Runs the recipe and returns the folder it wrote; logs a line every 100 steps."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionInpaintPipeline, UNet2DConditionModel

    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    started = time.monotonic()
    pool = draw_pool(recipe.n_scenes, recipe.workers)
    print(f"drew {2 * len(pool[0])} images in {time.monotonic() - started:.0f} s", flush=True)
    text, tokenizer = text_tower(recipe.text)
    autoencoder: Any
    unet: Any
    if recipe.start:
        autoencoder = AutoencoderKL.from_pretrained(recipe.start, subfolder="vae").requires_grad_(False).to(recipe.device)
        unet = UNet2DConditionModel.from_pretrained(recipe.start, subfolder="unet").to(recipe.device)
        for part in (autoencoder, unet):
            part.register_to_config(_name_or_path="")  # where it was started from concerns nobody
    else:
        autoencoder = new_autoencoder().to(recipe.device)
        unet = new_unet(text.config.hidden_size).to(recipe.device)
        train_autoencoder(autoencoder, pool[0], recipe, rng)
        sample = encode_latents(autoencoder, pool[0][:2000, 1], recipe.device).float()
        autoencoder.register_to_config(scaling_factor=1 / sample.std().item())
    scheduler = DDIMScheduler(
        prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing", rescale_betas_zero_snr=True, steps_offset=1
    )
    pipeline: Any = StableDiffusionInpaintPipeline(
        vae=autoencoder,
        text_encoder=text.to(recipe.device),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    train_unet(unet, autoencoder, text, tokenizer, scheduler, pool, recipe, rng, lambda: _save(pipeline, Path(recipe.out)))
    return Path(recipe.out)


def _save(pipeline: Any, out: Path) -> None:
    """Writes the pipeline under a temporary name and puts it in the place of an earlier one."""
    new = out.with_name(f".{out.name}.new")
    pipeline.save_pretrained(new, safe_serialization=True)
    if out.exists():
        shutil.rmtree(out)
    new.rename(out)


if __name__ == "__main__":
    print(train(read_recipe(Recipe, sys.argv[1:])))
