"""Which of diffusers' pipelines can be called and how, where their weights lie, what names them in a key, and how they are loaded.

Knows no request and no image.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guardkit.artifacts import fingerprint, hash_file, read_json, shipped, weights_variant
from guardkit.hub import hub_file
from guardkit.progress import bars_on_terminals_only
from guardkit.schema import InputError

if TYPE_CHECKING:
    import torch

_INDEX = "model_index.json"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".jinja")  # what a pipeline is loaded from


@dataclass(frozen=True)
class PipelineKind:
    """How one kind of pipeline differs from the others.

    Attributes:
        classes: that model_index.json may name.
        masked: paints within a mask, is told what the result shows, and takes a strength; else it is told what to do.
        guidance: the argument that sets how strictly the words are followed.
        image_guidance: takes a second scale, for how strictly the image is kept.
        negative: takes a negative prompt.
        default_negative: passed when none is given, because guidance acts only beside one.
        side: of the square images that the model was trained on, in pixels; None where its U-Net says it.
        patch: sides of images are multiples of this many latent pixels.
        sized: takes height and width; else the result has the size of the given image.
        batched: takes several images at once, without one changing the result of another.
        video_autoencoder: its autoencoder wants a dimension for time.
    """

    classes: tuple[str, ...]
    masked: bool = False
    guidance: str = "guidance_scale"
    image_guidance: bool = False
    negative: bool = True
    default_negative: str | None = None
    side: int | None = None
    patch: int = 1
    sized: bool = True
    batched: bool = True
    video_autoencoder: bool = False


_SD_INPAINT = ("StableDiffusionInpaintPipeline", "StableDiffusionXLInpaintPipeline", "StableDiffusionPipeline", "StableDiffusionXLPipeline")
# of the two, one pads prompts to the longest of a batch, and the other refuses batches
_QWEN = ("QwenImageEditPipeline", "QwenImageEditPlusPipeline")
KINDS = {
    "instruct_pix2pix": PipelineKind(("StableDiffusionInstructPix2PixPipeline",), image_guidance=True, sized=False),
    "instruct_pix2pix_xl": PipelineKind(("StableDiffusionXLInstructPix2PixPipeline",), image_guidance=True),
    "flux_kontext": PipelineKind(("FluxKontextPipeline",), negative=False, side=1024, patch=2),
    "qwen_image_edit": PipelineKind(
        _QWEN, guidance="true_cfg_scale", default_negative=" ", side=1024, patch=4, batched=False, video_autoencoder=True
    ),
    "inpaint": PipelineKind(_SD_INPAINT, masked=True),
    "flux_fill": PipelineKind(("FluxFillPipeline",), masked=True, negative=False, side=1024, patch=2),
}


class PipelineWeights:
    """A saved pipeline in diffusers' layout.

    Args:
        weights: a local folder, a Hub id "ORG/NAME", or "guardkit:NAME" for one that ships.
        revision: branch, tag or commit of a Hub id; None for its main branch.
    Raises:
        InputError: no folder and no Hub id, a folder without model_index.json, or a revision of a folder.
    """

    def __init__(self, weights: str, revision: str | None) -> None:
        if not isinstance(weights, str) or not weights:
            raise InputError(f"editor.weights must be a local folder or a Hub id ORG/NAME, got {weights!r}")
        self.name, self.revision = weights, revision
        folder = shipped(weights) or Path(weights).expanduser()
        self.folder = folder if folder.exists() else None
        if self.folder is None and not _HUB_ID.fullmatch(weights):
            raise InputError(f"editor.weights {weights} does not exist; give a local folder or a Hub id ORG/NAME")
        if self.folder is not None and not (folder / _INDEX).is_file():
            raise InputError(f"editor.weights {weights} holds no {_INDEX}; give a folder that a diffusers pipeline was saved to")
        if self.folder is not None and revision is not None:
            raise InputError(f"editor.revision belongs to a Hub id, and {weights} is a local folder; leave it null")

    @cached_property
    def index(self) -> dict[str, Any]:
        """model_index.json: the pipeline's class as `_class_name`, and its parts.

        Raises:
            InputError: it cannot be had or read.
        """
        mend = "give a folder in diffusers' layout"
        index = read_json(self._index_file, "the index of a pipeline", mend)
        if "_class_name" not in index:
            raise InputError(f"{self._index_file} names no pipeline; {mend}")
        return index

    def kind(self, wanted: str) -> str:
        """Which of KINDS the weights hold.

        Args:
            wanted: a name of KINDS, or "auto".
        Raises:
            InputError: it is another one, or unknown.
        """
        found = self.index["_class_name"]
        name = next((name for name, kind in KINDS.items() if found in kind.classes), None)
        if name is None:
            known = ", ".join(one for kind in KINDS.values() for one in kind.classes)
            raise InputError(f"editor.weights {self.name} hold a {found}, which editor=diffusers cannot call; it can call {known}")
        if wanted not in ("auto", name):
            raise InputError(f"editor.weights {self.name} hold a {found}, got pipeline={wanted}; give pipeline={name}")
        return name

    @cached_property
    def commit(self) -> str | None:
        """The commit of a Hub id, asked for once, so that key and loaded weights agree; None for a folder."""
        # a file of the Hub lies in snapshots/COMMIT of the local cache
        return self._index_file.parent.name if self.folder is None else None

    @cached_property
    def key(self) -> str:
        """Names the weights: by the commit, or by the contents of a folder's files.

        Raises:
            InputError: a Hub id that cannot be resolved.
        """
        if self.folder is None:
            return f"{self.name}@{self.commit}"
        files = sorted(path for path in self.folder.rglob("*") if path.suffix in _SUFFIXES and path.is_file())
        return fingerprint({path.relative_to(self.folder).as_posix(): _hash(path) for path in files})

    @cached_property
    def variant(self) -> str | None:
        """Of the files' names, where there are only weights in half precision; they are cast to the working dtype."""
        if self.folder is not None:
            return weights_variant(_below(self.folder))
        from huggingface_hub import list_repo_files

        try:
            return weights_variant(list_repo_files(self.name, revision=self.commit))
        except Exception:  # no network: what was fetched before is all there is
            return weights_variant(_below(self._index_file.parent))

    @cached_property
    def _index_file(self) -> Path:
        if self.folder is not None:
            return self.folder / _INDEX
        at = f" at revision {self.revision}" if self.revision else ""
        return hub_file(
            self.name,
            _INDEX,
            refusal=f"editor.weights {self.name}{at} is no local folder and could not be fetched from the Hub",
            remedy="check the name, log in if the model is gated, or without a network give a folder that holds it",
            revision=self.revision,
        )


def load_pipeline(weights: PipelineWeights, name: str, device: torch.device, dtype: torch.dtype, offload: str) -> Any:
    """The pipeline, ready to be called.

    Args:
        weights: of which only safetensors are read; code that comes with them is not run.
        name: in KINDS.
        device: to calculate on.
        dtype: of weights and calculation.
        offload: "none", or "model" or "sequential" to keep on a GPU only what is calculating.
    Raises:
        InputError: they are of another kind, cannot be fetched, are incomplete, or do not fit into memory.
    """
    import diffusers
    import transformers

    weights.kind(name)
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "revision": weights.commit, "variant": weights.variant}
    options["low_cpu_mem_usage"] = find_spec("accelerate") is not None
    if "safety_checker" in weights.index:
        # it blackens the very images that are to be edited
        options |= {"safety_checker": None, "requires_safety_checker": False}
    if "XL" in weights.index["_class_name"]:
        # an invisible watermark is what a guard could learn to find
        options["add_watermarker"] = False
    # the first knows how to paint within a mask by a Stable Diffusion that was not made for it
    loader: Any = diffusers.AutoPipelineForInpainting if name == "inpaint" else diffusers.DiffusionPipeline
    try:
        with bars_on_terminals_only(diffusers.utils.logging, transformers.utils.logging):
            loaded = loader.from_pretrained(str(weights.folder or weights.name), **options)
        loaded.set_progress_bar_config(disable=True)
        if offload == "model":
            loaded.enable_model_cpu_offload(device=device)
        elif offload == "sequential":
            loaded.enable_sequential_cpu_offload(device=device)
        else:
            loaded.to(device)
    except Exception as error:
        remedy = "a complete folder in diffusers' layout, with safetensors, is expected"
        if is_out_of_memory(error):
            remedy = f"{device} has not enough memory; give editor.offload=model or sequential, or a smaller editor.dtype"
        raise InputError(
            f"editor.weights {weights.name} could not be loaded ({type(error).__name__}: {one_line(error)}); {remedy}"
        ) from error
    return loaded


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU or the machine had no memory left."""
    import torch

    # the CPU's allocator has no class of its own
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def one_line(error: BaseException) -> str:
    """What an error says, fit for a message of ours."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _below(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*")]


def _hash(path: Path) -> str:
    state = path.stat()
    return _hash_once(path.resolve(), state.st_size, state.st_mtime_ns)


@cache
def _hash_once(path: Path, size_bytes: int, modified_ns: int) -> str:  # noqa: ARG001 - they tell whether the file is still the same
    return hash_file(path)
