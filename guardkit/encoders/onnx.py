"""Any image model in ONNX, through ONNX Runtime. The file says neither how images are prepared nor whether it was changed;
the configuration states the first, the fingerprint notices the second."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from guardkit.artifacts import fingerprint, hash_file
from guardkit.checks import check_path
from guardkit.encoders.base import checked_preprocess, prepare_image
from guardkit.encoders.frozen import Built, FrozenEncoder, checked_device, trial
from guardkit.encoders.places import HUB, encoder_folder
from guardkit.local_copies import local_folder
from guardkit.schema import InputError
from guardkit.storage import is_url, local_path

if TYPE_CHECKING:
    import torch

_SUFFIX = ".onnx"
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class OnnxEncoder(FrozenEncoder):
    """A frozen model in ONNX: images only, no texts and no gradients.

    It takes one input, standardised images as (batch, 3, height, width) or (batch, height, width, 3); its batch may be
    dynamic or fixed. A vector is one of its outputs, (batch, d).

    Args:
        weights: an .onnx file, its URL in object storage, or "hf-hub:ORG/NAME/PATH.onnx". What it keeps outside itself must lie beside it or below.
        preprocess: size (pixels, or height and width), mean, std (3 numbers each), interpolation (bicubic, bilinear),
            resize_mode (shortest, longest, squash), and optionally resize: what images are resized to before `size` is
            cropped from their middle.
        output: name of the output that is the image's vector; None: the only one.
        backend: what resizes images, "pil" or "torchvision"; they differ by up to two of 255 levels. None: pil.
        decode: of JPEG files: "full", or "reduced": one whose sides are at least four times what the model sees is decoded at a half, a quarter or an
            eighth, never below twice what it sees. Several times as quick on photographs of a camera, and further from "full" than the backends.
        device: "auto" (a GPU, if ONNX Runtime can use one), "cpu", "cuda", "cuda:1", ...
        batch_size: images encoded at once.
    Raises:
        InputError: ONNX Runtime is not installed, the file is not there, or the preprocessing is not stated.
    """

    def __init__(
        self,
        weights: str,
        *,
        preprocess: Mapping[str, Any],
        output: str | None = None,
        backend: str | None = None,
        decode: str = "full",
        device: str = "auto",
        batch_size: int = 32,
    ) -> None:
        if not find_spec("onnxruntime") or not find_spec("onnx"):
            raise InputError('encoder=onnx needs ONNX and ONNX Runtime; install them with: pip install "guardkit[onnx]"')
        if not isinstance(weights, str) or not weights.endswith(_SUFFIX):
            raise InputError(f"encoder.weights must be an {_SUFFIX} file or {HUB}ORG/NAME/PATH{_SUFFIX}, got {weights!r}")
        if weights.startswith(HUB) and weights.count("/") < 2:
            raise InputError(f"encoder.weights must name a file of the repository, {HUB}ORG/NAME/PATH{_SUFFIX}, got {weights}")
        if not weights.startswith(HUB) and not _path(weights).is_file():
            raise InputError(f"encoder.weights: {weights} does not exist; give an {_SUFFIX} file or {HUB}ORG/NAME/PATH{_SUFFIX}")
        self.weights, self.output = weights, output
        self._preprocess = _stated(preprocess)
        name = weights if weights.startswith(HUB) else Path(weights).name
        super().__init__(name, device=device, batch_size=batch_size, backend=backend, decode=decode)

    # --- where it is, and may have moved: see `guardkit.encoders.lookup` ------------------------------------------------

    @classmethod
    def named(cls, recorded: Mapping[str, Any], text: str) -> dict[str, Any] | None:
        """See `Movable`."""
        if Path(text).expanduser().is_dir():
            return None
        return dict(recorded["config"]) | {"weights": text}

    @classmethod
    def candidates(cls, recorded: Mapping[str, Any], place: Path, files: Sequence[str]) -> list[dict[str, Any]]:
        """See `Movable`."""
        return [dict(recorded["config"]) | {"weights": str(place / name)} for name in files if name.endswith(_SUFFIX)]

    @property
    def config(self) -> dict[str, Any]:
        """Arguments that build this encoder again."""
        return {
            "weights": self.weights,
            "preprocess": self._preprocess,
            "output": self.output,
            "backend": self._backend,
            "decode": self.decode,
        }

    # --- the model, built once ----------------------------------------------------------------------------------------

    def _find(self) -> Path:
        if not self.weights.startswith(HUB):
            return _path(self.weights)
        organisation, name, path = self.weights.removeprefix(HUB).split("/", 2)
        remedy = "without a network, copy the file from a machine that has one, and give its path"
        # what a large model keeps outside itself is by habit named after it: model.onnx_data, model.onnx.data
        return encoder_folder(f"{HUB}{organisation}/{name}", [path, f"{path}?*"], remedy=remedy) / path

    def _build(self) -> Built:
        path, device = self._find(), checked_device(self.device)
        said = self._preprocess
        try:
            parts = [path, *_outside(path)]
            weights = fingerprint([hash_file(part) for part in parts])
            session = _Session(path, device, self.output, said["size"])
            dim = trial(session.run, said["size"])
            if session.batch is None and len(session.run(_black(2, said["size"]))) != 2:
                raise ValueError(
                    "it was exported for a batch of 1, and says otherwise: export it anew, with a batch that is dynamic or said to be 1"
                )
        except InputError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"encoder {self.weights} could not be loaded ({type(error).__name__}: {reason}); it must be an image model in ONNX"
            ) from error
        return Built(
            session,
            preprocess=prepare_image,
            encode=session.run,
            dim=dim,
            preprocessing=said,
            architecture={"output": session.output},
            hash_weights=lambda: weights,
        )


def _stated(preprocess: Mapping[str, Any]) -> dict[str, Any]:
    """A preprocessing as `prepare_image` takes it."""
    stated = checked_preprocess(preprocess, resizes=True)
    for key in {"size", "resize"} & set(stated):
        stated[key] = stated[key] if isinstance(stated[key], list) else [stated[key]] * 2
    crops = any(large < small for large, small in zip(stated.get("resize", stated["size"]), stated["size"], strict=True))
    if crops or ("resize" in stated and stated["resize_mode"] == "longest"):
        raise InputError(
            f"encoder.preprocess.resize must be at least preprocess.size, with resize_mode shortest or squash, got {preprocess['resize']!r} "
            f"and {stated['resize_mode']}"
        )
    return stated


class _Session:
    """A model that ONNX Runtime runs.

    Args:
        path: of the file.
        device: to run it on.
        output: of its outputs; None: the only one.
        size: height and width of the images that it will be given.
    Raises:
        ValueError: its inputs or outputs are not those of an image model.
    """

    def __init__(self, path: Path, device: torch.device, output: str | None, size: Sequence[int]) -> None:
        self._path, self._device = path, device
        self._start()
        self.input = _only("input", self._session.get_inputs())
        if self.input.type not in _TYPES:
            raise ValueError(f"its input {self.input.name} takes {self.input.type}, expected floating-point pixels")
        shape = [side if isinstance(side, int) else None for side in self.input.shape]
        if len(shape) != 4 or 3 not in (shape[1], shape[3], shape[1] or 3):
            raise ValueError(
                f"its input {self.input.name} has shape {self.input.shape}, expected (batch, 3, height, width) or (batch, height, width, 3)"
            )
        self._is_channels_last = shape[1] != 3 and shape[3] == 3
        sides = shape[1:3] if self._is_channels_last else shape[2:]
        if any(side not in (None, wanted) for side, wanted in zip(sides, size, strict=True)):
            raise ValueError(f"its input takes images of {sides[0]} x {sides[1]} pixels, preprocess.size says {size[0]} x {size[1]}")
        self.batch = shape[0]
        outputs = {one.name: one for one in self._session.get_outputs()}
        if output is not None and output not in outputs:
            raise InputError(f"encoder.output must be one of {', '.join(outputs)}, got {output!r}")
        if output is None and len(outputs) > 1:
            shapes = ", ".join(f"{name} {one.shape}" for name, one in outputs.items())
            raise InputError(f"encoder.output is needed: {path.name} has the outputs {shapes}; name the one that is a vector an image")
        self.output = output or next(iter(outputs))

    def _start(self) -> None:
        import onnxruntime
        import torch

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
        options.use_deterministic_compute = True
        options.log_severity_level = 3  # errors, which are raised as well
        providers: list[Any] = ["CPUExecutionProvider"]
        if self._device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": self._device.index or 0}))
        self._session, self._process = onnxruntime.InferenceSession(str(self._path), options, providers), os.getpid()

    def run(self, images: torch.Tensor) -> torch.Tensor:
        """(n, 3, height, width) -> (n, d) float32."""
        import torch

        if self._process != os.getpid():
            self._start()  # its threads do not survive a fork
        pixels = images.cpu().numpy().astype(_TYPES[self.input.type])
        if self._is_channels_last:
            pixels = pixels.transpose(0, 2, 3, 1)
        step = self.batch or len(pixels)
        parts = []
        for start in range(0, len(pixels), step):
            part = pixels[start : start + step]
            missing = step - len(part)
            full = np.concatenate([part, np.repeat(part[-1:], missing, axis=0)]) if missing else part
            (found,) = self._session.run([self.output], {self.input.name: np.ascontiguousarray(full)})
            parts.append(found[: len(part)])
        vectors = np.concatenate(parts).astype(np.float32)
        # a pooled map of one pixel is a vector
        return torch.from_numpy(vectors.reshape(vectors.shape[:2]) if vectors.ndim > 2 and vectors[0, 0].size == 1 else vectors)


def _only(what: str, found: Sequence[Any]) -> Any:
    if len(found) != 1:
        raise ValueError(f"it has {len(found)} {what}s ({', '.join(one.name for one in found)}), expected one, the images")
    return found[0]


def _path(weights: str) -> Path:
    """What `weights` is if it is a path, or a URL, of which there is a copy here then, with what lies beside it under a name that goes on."""
    if not is_url(weights) or local_path(weights) is not None:
        return check_path("encoder.weights", weights)
    above, _, name = weights.rpartition("/")
    return local_folder(above, only=lambda one: one.startswith(name)) / name


def _black(n: int, size: Sequence[int]) -> torch.Tensor:
    import torch

    return torch.zeros(n, 3, *size)


def _outside(path: Path) -> list[Path]:
    """The files beside a model in which it keeps weights, sorted.

    Raises:
        ValueError: the file is no ONNX, or a name leads out of its folder, or a file is not there.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    names = {entry.value for tensor in _tensors(model) for entry in tensor.external_data if entry.key == "location"}
    for name in sorted(names):
        place = PurePosixPath(name)
        if place.is_absolute() or ".." in place.parts or "\\" in name:
            raise ValueError(f"it keeps weights in {name!r}, outside its folder, and is not read")
        if not (path.parent / name).is_file():
            raise ValueError(f"it keeps weights in {name!r}, which is not beside it")
    return [path.parent / name for name in sorted(names)]


def _tensors(model: Any) -> Iterator[Any]:
    """All tensors that a model holds, in nested graphs and functions too."""
    nodes = [node for function in model.functions for node in function.node]
    graphs = [model.graph, *(one for info in model.training_info for one in (info.initialization, info.algorithm))]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            yield from (part for sparse in graph.sparse_initializer for part in (sparse.values, sparse.indices))
            nodes += graph.node
        else:
            for attribute in nodes.pop().attribute:
                yield attribute.t
                yield from attribute.tensors
                yield from (
                    part for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors) for part in (sparse.values, sparse.indices)
                )
                graphs += [attribute.g, *attribute.graphs]
