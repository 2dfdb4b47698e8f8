"""The recipe of the small inpainting editors in `checkpoints/`: one trainer, and a world for each that says what it learns from.

    python -m checkpoints.edit_recipe world=scenes out=checkpoints/scenes_edit
    python -m checkpoints.edit_recipe world=photos data=DIR out=photos_edit

A latent diffusion model in the parts and the layout of diffusers' `StableDiffusionInpaintPipeline`: an autoencoder, a
U-Net that sees noisy latents, mask and masked latents, and the text tower of a small CLIP, frozen. It redraws a box within
a square of 64 pixels at the world's own resolution, so that nothing is enlarged and nothing blurred. What it learns from is
what an editor is for: a picture with a box covered, the words of what shall be there, and the picture that shows it.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from checkpoints.arguments import read_world

CROP_PX = 64
LATENT_CHANNELS = 4


@dataclass(frozen=True)
class Pool:
    """What the editor learns from.

    Attributes:
        before: (n, 64, 64, 3) uint8, the pictures whose boxes are covered.
        after: (n, 64, 64, 3) uint8, what shall come out; may be `before` itself.
        boxes: (n, 4) covered boxes in pixels: left, top, right, bottom.
        words: of a row, what its picture shall show; drawn anew each time.
    """

    before: np.ndarray
    after: np.ndarray
    boxes: np.ndarray
    words: Callable[[int, np.random.Generator], str]


class World(Protocol):
    """What an editor learns from; a dataclass of settings with defaults, each of which an argument can change.

    Attributes:
        autoencoder_minutes: of optimisation; 0 takes the autoencoder of `start` as it is.
        unet_minutes: likewise.
        text: the encoder whose text tower is taken, an open_clip folder.
        device: "cpu" or "cuda".
        start: a folder that this recipe wrote earlier, whose autoencoder and U-Net are trained on; or empty.
        pooled_words: the U-Net also sees all words at once at every resolution, beside the time; without, it attends to
            them at a quarter of the positions only.
    """

    out: str
    autoencoder_minutes: float
    unet_minutes: float
    batch_size: int
    learning_rate: float
    text: str
    device: str
    start: str
    seed: ClassVar[int]
    pooled_words: ClassVar[bool]

    def pool(self) -> Pool:
        """Draws or reads the pictures, once."""


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


def new_unet(text_width: int, pooled_words: bool) -> Any:
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
        addition_embed_type="text" if pooled_words else None,
        addition_embed_type_num_heads=4,
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

    def close(self, n_images: int) -> None:
        """Logs what was seen in all."""
        seconds = time.monotonic() - self.started
        print(f"{self.name}: {self.step} steps, {self.step * n_images} images in {seconds:.0f} s", flush=True)


def _half(device: str) -> Any:
    """Half precision where it is quicker: a CPU without instructions for it takes ten times as long with it."""
    quick = device != "cpu" or torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device, dtype=torch.bfloat16, enabled=quick)


def _pixels(crops: np.ndarray, device: str) -> torch.Tensor:
    """(n, 64, 64, 3) uint8 -> (n, 3, 64, 64) float in [-1, 1]."""
    return torch.from_numpy(crops).to(device).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def train_autoencoder(model: Any, pool: Pool, recipe: World, rng: np.random.Generator) -> None:
    """Reconstruction by absolute error in pixels and in their gradients, and a slight pull towards unit latents."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    clock = _Clock("autoencoder", recipe.autoencoder_minutes, recipe.learning_rate)
    while clock.tick(optimizer):
        crops = pool.before if rng.random() < 0.5 else pool.after
        pixels = _pixels(crops[rng.integers(len(crops), size=recipe.batch_size // 2)], recipe.device)
        with _half(recipe.device):
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
    clock.close(recipe.batch_size // 2)
    sample = encode_latents(model, pool.after[:2000], recipe.device).float()
    model.register_to_config(scaling_factor=1 / sample.std().item())


def encode_latents(model: Any, crops: np.ndarray, device: str) -> torch.Tensor:
    """(n, 4, 16, 16) float16, not scaled yet."""
    parts = []
    with torch.inference_mode():
        for start in range(0, len(crops), 256):
            with _half(device):
                posterior = model.encode(_pixels(crops[start : start + 256], device)).latent_dist
            parts.append(posterior.mean.half().cpu())
    return torch.cat(parts)


def train_unet(
    unet: Any,
    autoencoder: Any,
    text: Any,
    tokenizer: Any,
    scheduler: Any,
    pool: Pool,
    recipe: World,
    rng: np.random.Generator,
    save: Callable[[], None],
) -> None:
    """Denoises the counterfactual, given the covered original and the words; keeps a moving average of the weights.

    `save` is called every ten minutes and at the end, with the averaged weights in `unet`.
    """
    from diffusers.training_utils import EMAModel

    device, scaling = recipe.device, autoencoder.config.scaling_factor
    targets = encode_latents(autoencoder, pool.after, device) * scaling
    hidden = np.stack([_cover(picture, box) for picture, box in zip(pool.before, pool.boxes, strict=True)])
    covered = encode_latents(autoencoder, hidden, device) * scaling
    masks = functional.interpolate(torch.from_numpy(np.stack([_mask(box) for box in pool.boxes]))[:, None].float(), scale_factor=0.25)
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
        rows = rng.integers(len(targets), size=recipe.batch_size)
        # one in ten without words, for classifier-free guidance
        said = ["" if rng.random() < 0.1 else pool.words(row, rng) for row in rows]
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
    clock.close(recipe.batch_size)


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


def train(recipe: World) -> Path:
    """Runs the recipe and returns the folder it wrote; logs a line every 100 steps."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionInpaintPipeline, UNet2DConditionModel

    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    started = time.monotonic()
    pool = recipe.pool()
    print(f"{len(pool.after)} pictures ready after {time.monotonic() - started:.0f} s", flush=True)
    text, tokenizer = text_tower(recipe.text)
    autoencoder, unet = new_autoencoder(), new_unet(text.config.hidden_size, recipe.pooled_words)
    if recipe.start:
        for part, kind, name in ((autoencoder, AutoencoderKL, "vae"), (unet, UNet2DConditionModel, "unet")):
            earlier: Any = kind.from_pretrained(recipe.start, subfolder=name)
            # an editor of another world may lack the words pooled
            part.load_state_dict(earlier.state_dict(), strict=False)
            if name == "vae":
                part.register_to_config(scaling_factor=earlier.config.scaling_factor)
    autoencoder, unet = autoencoder.to(recipe.device), unet.to(recipe.device)
    if recipe.autoencoder_minutes:
        train_autoencoder(autoencoder, pool, recipe, rng)
    autoencoder.eval().requires_grad_(False)
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
    """Writes the pipeline under a temporary name, then puts each of its parts in the place of an earlier one."""
    new = out.with_name(f".{out.name}.new")
    pipeline.save_pretrained(new, safe_serialization=True)
    out.mkdir(parents=True, exist_ok=True)
    for part in new.iterdir():
        if (out / part.name).is_dir():
            shutil.rmtree(out / part.name)
        part.replace(out / part.name)
    new.rmdir()


def main(arguments: Sequence[str]) -> Path:
    from checkpoints.photos_edit import Photos
    from checkpoints.scenes_edit.world import Scenes

    worlds: dict[str, type[Any]] = {"scenes": Scenes, "photos": Photos}
    return train(read_world(worlds, arguments))


if __name__ == "__main__":
    print(main(sys.argv[1:]))
