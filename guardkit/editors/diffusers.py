"""Learned editing: diffusers' instruction and inpainting pipelines, from a Hub id or a local folder.

It knows how each pipeline is called, which image sizes it wants, and what is commonly wrong with its results: shifted
pixels, ignored instructions, blank or NaN images. Whether an edit is a good one it cannot tell; that is for a verifier.

Source: Brooks et al. (2023), "InstructPix2Pix" (with its two guidance scales); Black Forest Labs (2025), "FLUX.1 Kontext"; Wu
et al. (2025), "Qwen-Image Technical Report"; Rombach et al. (2022), "High-Resolution Image Synthesis with Latent Diffusion
Models" (inpainting).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from guardkit.checks import check_choice, check_number, check_whole
from guardkit.editors.base import NEEDS_REGION, EditRequest, EditResult, lacks_region
from guardkit.editors.diffusers_pipelines import KINDS, PipelineWeights, is_out_of_memory, load_pipeline, one_line
from guardkit.editors.inpaint import elsewhere
from guardkit.editors.registration import global_shift, largest_change, moved, pasted
from guardkit.schema import ImageError, InputError

if TYPE_CHECKING:
    import torch

_VERSION = 1  # counts up when the same settings give other pixels
_LATENT_ROUNDING = 8  # some pipelines refuse sides that are no multiple of it, whatever their autoencoder
_CROP_CONTEXT = 1.5  # side of the crop around a region that is larger than `crop_px`, as a multiple of the region's
_DTYPES, _OFFLOADS = ("auto", "float32", "bfloat16", "float16"), ("none", "model", "sequential")


@dataclass(frozen=True)
class _Job:
    """An edit that is ready to be made.

    Attributes:
        row: of its request.
        original: (h, w, 3) uint8, the whole image.
        view: the part that the pipeline sees, rows and columns.
        mask: (h, w) bool over the view, what may change; None when nobody knows.
        size: width and height that the pipeline works at, in pixels.
    """

    row: int
    request: EditRequest
    prompt: str
    original: np.ndarray
    view: tuple[slice, slice]
    mask: np.ndarray | None
    size: tuple[int, int]


class DiffusersEditor:
    """Edits by a diffusers pipeline, which is loaded when the first edit is asked for. Only safetensors are read, and no code
    that comes with weights is run.

    Noise comes from each request's seed alone and is drawn on the CPU: up to rounding, an edit depends neither on its batch
    nor on the device. Safety checkers are not loaded, because they blacken the very images that are to be edited, and no
    invisible watermark is added, because a guard could learn to find it.

    Args:
        pipeline: "instruct_pix2pix", "instruct_pix2pix_xl", "flux_kontext" or "qwen_image_edit" (Plus too), which follow the
            instruction; "inpaint" (Stable Diffusion and SDXL) or "flux_fill", which redraw a region after `request.target`;
            "auto" for what a local folder says.
        weights: a local folder in diffusers' layout, or a Hub id "ORG/NAME".
        revision: branch, tag or commit of a Hub id; None for its main branch.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", ...
        dtype: "float32", "bfloat16", "float16", or "auto": float32 on a CPU, bfloat16 on GPUs that have it, else float16.
        offload: "none", "model" (one part of the pipeline on the GPU at a time) or "sequential" (one layer at a time, slow).
        steps: of denoising; None for the pipeline's own default, as with the next three.
        guidance: how strictly the words are followed, at least 0; above 1 to have an effect.
        image_guidance: how strictly the image is kept, at least 1; InstructPix2Pix only.
        strength: share of the noise schedule that is run, in (0, 1]; inpainting only.
        negative_prompt: what not to show. Qwen's guidance acts only beside one and gets " " when this is None.
        size: the pipeline works on as many pixels as a square of this side has, in the shape of the image; None for the size
            that the model was trained on. Results are scaled back to the original's size (Lanczos).
        crop_px: shows the pipeline only a square of this side around the region, in pixels of the original; around a larger
            region one of 1.5 times its side. None, or no region, shows the whole image.
        dilate: how far the region reaches beyond the given one, a fraction of the image's longer side, in [0, 0.5).
        paste_outside: takes pixels outside the region from the original, with a soft seam, where a region is known. None
            does so with `crop_px` and with inpainting pipelines.
        max_shift: a result that lies off by no more than this fraction of the longer side, in [0, 0.5), is moved back; one
            that lies off by more is rejected.
        min_change: in levels of 255. An edit that changes no patch, of 1/16 of the longer side, by as much on average ignored
            its instruction and is rejected. Null edits may change as little as they like.
        batch_size: images of one working size edited at once, where the pipeline can.
    Raises:
        InputError: an argument out of range or of no effect on the pipeline, or a folder that does not hold that pipeline.
            Weights that cannot be fetched or loaded are reported by `config` or at the first edit.
    """

    def __init__(
        self,
        pipeline: str,
        weights: str,
        *,
        revision: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        offload: str = "none",
        steps: int | None = None,
        guidance: float | None = None,
        image_guidance: float | None = None,
        strength: float | None = None,
        negative_prompt: str | None = None,
        size: int | None = None,
        crop_px: int | None = None,
        dilate: float = 0.02,
        paste_outside: bool | None = None,
        max_shift: float = 0.02,
        min_change: float = 3.0,
        batch_size: int = 1,
    ) -> None:
        check_choice("editor.pipeline", pipeline, ("auto", *KINDS))
        check_choice("editor.dtype", dtype, _DTYPES)
        check_choice("editor.offload", offload, _OFFLOADS)
        check_choice("editor.paste_outside", paste_outside, (None, True, False))
        check_whole("editor.steps", steps, 1, optional=True)
        check_number("editor.guidance", guidance, "[0, inf)", optional=True)
        check_number("editor.image_guidance", image_guidance, "[1, inf)", optional=True)
        check_number("editor.strength", strength, "[0.001, 1]", optional=True)
        check_whole("editor.size", size, 16, optional=True)
        check_whole("editor.crop_px", crop_px, 16, optional=True)
        check_number("editor.dilate", dilate, "[0, 0.5)")
        check_number("editor.max_shift", max_shift, "[0, 0.5)")
        check_number("editor.min_change", min_change, "[0, 255]")
        check_whole("editor.batch_size", batch_size, 1)
        if offload != "none" and find_spec("accelerate") is None:
            raise InputError(f"editor.offload={offload} needs accelerate; install it with: pip install accelerate")
        if paste_outside is False and crop_px is not None:
            raise InputError("editor.crop_px takes what lies around the crop from the original; leave paste_outside null or true")
        self.weights = PipelineWeights(weights, revision)
        if self.weights.folder is not None:
            pipeline = self.weights.kind(pipeline)
        elif pipeline == "auto":
            raise InputError(f"editor.pipeline=auto reads a local folder, got weights={weights}; name one of {', '.join(KINDS)}")
        self.name, self.pipeline, self._kind = f"diffusers/{pipeline}", pipeline, KINDS[pipeline]
        for name, value, taken in (
            ("image_guidance", image_guidance, self._kind.image_guidance),
            ("strength", strength, self._kind.masked),
            ("negative_prompt", negative_prompt, self._kind.negative),
        ):
            if value is not None and not taken:
                raise InputError(f"editor.{name} has no effect on pipeline={pipeline}; leave it null, got {value!r}")
        self.device, self.dtype, self.offload, self.batch_size = device, dtype, offload, batch_size
        self.steps, self.guidance, self.image_guidance, self.strength = steps, guidance, image_guidance, strength
        self.negative_prompt = self._kind.default_negative if negative_prompt is None else negative_prompt
        self.size, self.crop_px, self.dilate, self.max_shift, self.min_change = size, crop_px, dilate, max_shift, min_change
        self.paste_outside = (self._kind.masked or crop_px is not None) if paste_outside is None else paste_outside

    def __getstate__(self) -> dict[str, Any]:
        """Without the pipeline, which a copy loads again. An "auto" precision stays what it is here: it is in the key of every edit."""
        loaded = ("_pipeline", "_torch_device", "_torch_dtype")
        state = {name: value for name, value in self.__dict__.items() if name not in loaded}
        return state | ({"dtype": self.config["dtype"]} if "config" in self.__dict__ else {})

    @cached_property
    def config(self) -> dict[str, Any]:
        """Everything that edits depend on; weights by their commit, which may have to be asked for, or by their files' contents.
        Device, offloading and batch size are left out, because they change rounding only.

        Raises:
            InputError: the weights cannot be found, or the device cannot be used.
        """
        names = ["pipeline", "steps", "guidance", "image_guidance", "strength", "negative_prompt", "size", "crop_px", "dilate"]
        return {
            "editor": "diffusers",
            "version": _VERSION,
            **{name: getattr(self, name) for name in [*names, "paste_outside", "max_shift", "min_change"]},
            "weights": self.weights.key,
            "dtype": str(self._torch_dtype).removeprefix("torch."),
            "diffusers": version("diffusers"),
            "transformers": version("transformers"),
        }

    # --- the pipeline, loaded once ------------------------------------------------------------------------------------

    @cached_property
    def _torch_device(self) -> torch.device:
        import torch

        try:
            device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise InputError(
                f"editor.device {self.device!r} cannot be used ({one_line(error)}); give auto, cpu or the name of a GPU"
            ) from error
        if self.offload != "none" and device.type == "cpu":
            raise InputError(f"editor.offload={self.offload} moves weights off a GPU, and there is none; give offload=none")
        return device

    @cached_property
    def _torch_dtype(self) -> torch.dtype:
        import torch

        if self.dtype != "auto":
            return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[self.dtype]
        if self._torch_device.type != "cuda":
            return torch.float32
        # older GPUs only emulate bfloat16, slowly
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16

    @cached_property
    def _pipeline(self) -> Any:
        return load_pipeline(self.weights, self.pipeline, self._torch_device, self._torch_dtype, self.offload)

    # --- editing ------------------------------------------------------------------------------------------------------

    def edit(self, requests: Sequence[EditRequest]) -> list[EditResult]:
        """One result per request, in order. A null edit is made beside the region, by a pipeline that follows instructions
        without `paste_outside` on the whole image. A round trip passes through the autoencoder what an edit would redraw.

        Rejected: no instruction, no region where one is needed, an image that cannot be read, and results that are not
        finite, blank, of another size, shifted too far, or without a change.

        Raises:
            InputError: the weights cannot be fetched or loaded, or the device cannot be used or has not enough memory.
        """
        results: dict[int, EditResult] = {}
        jobs: dict[tuple[tuple[int, int], bool], list[_Job]] = {}
        for row, request in enumerate(requests):
            job = self._prepare(row, request)
            if isinstance(job, _Job):
                jobs.setdefault((job.size, request.kind == "round_trip"), []).append(job)
            else:
                results[row] = EditResult(None, job)
        at_once = self.batch_size if self._kind.batched else 1
        for (_, is_trip), alike in jobs.items():
            for start in range(0, len(alike), at_once):
                batch = alike[start : start + at_once]
                made = self._round_trip(batch) if is_trip else self._run(batch)
                results |= {job.row: self._finish(job, one) for job, one in zip(batch, made, strict=True)}
        return [results[row] for row in range(len(requests))]

    def refuses(self, request: EditRequest) -> str | None:
        """Why an image will not be edited, or None."""
        return f"no region: pipeline={self.pipeline} {NEEDS_REGION}" if self._kind.masked and lacks_region(request) else None

    def _prepare(self, row: int, request: EditRequest) -> _Job | str:
        """What is to be done, or why nothing is."""
        is_null, is_trip, region, prompt = request.kind == "null", request.kind == "round_trip", request.region, request.instruction
        if self._kind.masked:
            # a null instruction describes no image: without words, the surroundings are continued
            prompt = "" if is_null else request.target or request.instruction
        if not prompt.strip() and request.kind == "counterfactual":
            return "no instruction"
        reason = self.refuses(request)
        if reason is not None:
            return reason
        try:
            original = request.content.load()
        except ImageError as error:
            return f"unreadable image: {error}"
        if is_null and not self.paste_outside and not self._kind.masked:
            region = None  # the whole image passes through the editor
        elif is_null and (region is not None or request.label == 0):
            region = elsewhere(region, np.random.default_rng([request.seed, *original.shape]))
            if region is None:
                return "no room for a null edit beside the region"
        height, width = original.shape[:2]
        view, mask = (slice(0, height), slice(0, width)), None
        if region is not None:
            grow = self.dilate * max(height, width)
            rows, columns = _stretch(region[1], region[3], height, grow), _stretch(region[0], region[2], width, grow)
            mask = np.zeros((height, width), bool)
            mask[rows, columns] = True
            if not mask.any() or (self._kind.masked and mask.all() and not is_trip):
                return "the region covers the whole image" if mask.any() else "the region is empty"
            if self.crop_px is not None:
                longer = max(rows.stop - rows.start, columns.stop - columns.start)
                side = self.crop_px if longer <= self.crop_px else round(_CROP_CONTEXT * longer)
                view = _middle(region[1], region[3], height, side), _middle(region[0], region[2], width, side)
                mask = mask[view]
        size = self._working_size(view[1].stop - view[1].start, view[0].stop - view[0].start)
        return _Job(row, request, prompt, original, view, mask, size)

    def _working_size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height in pixels, of about the wanted area and the given shape."""
        pipeline, side = self._pipeline, self.size or self._kind.side
        if self.pipeline == "flux_kontext" and self.size is None:
            from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

            return min(PREFERRED_KONTEXT_RESOLUTIONS, key=lambda size: abs(math.log(size[0] / size[1] * height / width)))
        if side is None:
            if not isinstance(pipeline.unet.config.sample_size, int):
                raise InputError(f"{self.weights.name} do not say which image size they were trained on; give editor.size")
            side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
        multiple = math.lcm(_LATENT_ROUNDING, pipeline.vae_scale_factor * self._kind.patch)
        scale = side / math.sqrt(width * height)
        wide, high = (max(1, round(length * scale / multiple)) * multiple for length in (width, height))
        return wide, high

    def _run(self, jobs: Sequence[_Job]) -> np.ndarray:
        """(n, h, w, 3) float in [0, 1], at the working size."""
        import torch

        kind, (width, height) = self._kind, jobs[0].size
        images = [Image.fromarray(job.original[job.view]) for job in jobs]
        call: dict[str, Any] = {
            "prompt": [job.prompt for job in jobs],
            # what takes one image at a time also scales it, to the size that it was trained on whatever that of the result
            "image": [_scaled(image, (width, height)) for image in images] if kind.batched else images[0],
            "generator": [torch.Generator("cpu").manual_seed(job.request.seed) for job in jobs],
            "num_inference_steps": self.steps,
            kind.guidance: self.guidance,
            "image_guidance_scale": self.image_guidance,
            "strength": self.strength,
        }
        call = {name: value for name, value in call.items() if value is not None}
        if kind.sized:
            call |= {"width": width, "height": height}
        if self.pipeline == "flux_kontext":
            # by itself it would return a square of its own size, whatever the shape of the image
            call |= {"max_area": width * height, "_auto_resize": False}
        if kind.masked:
            masks = [np.asarray(job.mask, np.uint8) * 255 for job in jobs]
            # every pixel of the working image that the region touches
            touched = [_scaled(Image.fromarray(mask), (width, height), Image.Resampling.BOX) for mask in masks]
            call["mask_image"] = [mask.point(lambda value: 255 * (value > 0)) for mask in touched]
        if self.negative_prompt is not None and (self.guidance is None or self.guidance > 1):
            call["negative_prompt"] = [self.negative_prompt] * len(jobs)
        try:
            return self._pipeline(**call, output_type="np").images
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise InputError(
                f"{self._torch_device} has not enough memory for {len(jobs)} of {width}x{height} pixels at once with {self.weights.name} in "
                f"{self.config['dtype']}; lower editor.batch_size or editor.size, or give editor.offload=model or sequential"
            ) from error

    def _round_trip(self, jobs: Sequence[_Job]) -> np.ndarray:
        """What the autoencoder makes of the images: (n, h, w, 3) float in [0, 1], at the working size."""
        import torch

        pipeline, (width, height) = self._pipeline, jobs[0].size
        vae, processor = pipeline.vae, pipeline.image_processor
        images = [_scaled(Image.fromarray(job.original[job.view]), (width, height)) for job in jobs]
        dtype = vae.dtype
        # half precision overflows in some autoencoders, which say so
        upcast = dtype == torch.float16 and vae.config.get("force_upcast", False)
        if upcast:
            vae.to(torch.float32)
        with torch.inference_mode():
            pixels = processor.preprocess(images, height=height, width=width).to(self._torch_device, torch.float32 if upcast else dtype)
            if self._kind.video_autoencoder:
                pixels = pixels.unsqueeze(2)
            made = vae.decode(vae.encode(pixels).latent_dist.mode(), return_dict=False)[0]
        if upcast:
            vae.to(dtype)
        return processor.postprocess(made[:, :, 0] if self._kind.video_autoencoder else made, output_type="np")

    def _finish(self, job: _Job, made: np.ndarray) -> EditResult:
        """From what the pipeline made to an image like the original, or the reason why there is none."""
        width, height = job.size
        if made.shape != (height, width, 3):
            return EditResult(None, f"editor returned an image of shape {made.shape}, not {(height, width, 3)}")
        if not np.isfinite(made).all():
            return EditResult(None, f"editor returned NaN in {self.config['dtype']}; another editor.dtype may help")
        small = np.round(np.clip(made, 0, 1) * 255).astype(np.uint8)
        if small.max() == small.min():
            return EditResult(None, "editor returned a blank image")
        before = job.original[job.view]
        edited = np.array(_scaled(Image.fromarray(small), (before.shape[1], before.shape[0])))
        right, down = global_shift(before, edited, job.mask)
        if max(abs(right), abs(down)) > self.max_shift * max(before.shape[:2]):
            return EditResult(None, f"editor shifted the image by more than {self.max_shift:.1%} of its longer side")
        edited = moved(before, edited, -right, -down)
        if job.request.kind == "counterfactual" and largest_change(before, edited, job.mask) < self.min_change:
            return EditResult(None, f"editor ignored the instruction (mean change below {self.min_change:g} of 255)")
        if self.paste_outside and job.mask is not None:
            edited = pasted(before, edited, job.mask)
        image = job.original.copy()
        image[job.view] = edited
        return EditResult(image)


def _stretch(low: float, high: float, length: int, grow: float) -> slice:
    """Pixels between two fractions of the length, `grow` pixels more on either side."""
    return slice(max(0, int(low * length - grow)), max(0, min(length, math.ceil(high * length + grow))))


def _middle(low: float, high: float, length: int, side: int) -> slice:
    """`side` pixels, or what there is, with the stretch in their middle."""
    side = min(side, length)
    start = int(np.clip(round(((low + high) * length - side) / 2), 0, length - side))
    return slice(start, start + side)


def _scaled(image: Image.Image, size: tuple[int, int], how: Image.Resampling = Image.Resampling.LANCZOS) -> Image.Image:
    return image if image.size == size else image.resize(size, how)
