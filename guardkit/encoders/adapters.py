"""LoRA adapters of a vision-language model: put into it, written beside a guard, and read back. Nothing in a file is believed unchecked.

Source: Hu et al., 2021, "LoRA: low-rank adaptation of large language models" (arXiv:2106.09685). The layers are PEFT's, and the files have
PEFT's names and layout.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guardkit.artifacts import hash_file, read_json, written
from guardkit.checks import check_whole
from guardkit.schema import InputError, shortened

if TYPE_CHECKING:
    import torch

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."  # in PEFT's files, of a model that PEFT wrapped
_BASE = "base_weights"  # hash over the weights of the model that adapters were trained in
_CONNECTORS = ("merger", "deepstack_merger_list")  # parts of an image encoder that connect it to the language model, as Qwen-VL's
_MODULE = re.compile(r"[A-Za-z0-9_.]{1,200}")
_MAX_MODULES, _MAX_RANK, _MAX_ALPHA, _HEADER_BYTES = 10_000, 1024, 1 << 16, 1 << 22
_MEND = "copy the guard's folder anew"


def require_peft() -> None:
    """Raises InputError where PEFT is not installed."""
    if not find_spec("peft"):
        raise InputError("a LoRA guard needs PEFT, which is not installed; install it with: pip install 'guardkit[lora]'")


def adapted_modules(model: Any) -> list[str]:
    """Names of the linear layers that are adapted: all of the language model and of what connects images to it.

    The image encoder stays as it is: what serves adapters elsewhere adapts the language part alone, and vectors of images are what a few
    dozen labels spoil first.
    """
    import torch

    vision, output = model.get_encoder(modality="image"), model.get_output_embeddings()
    seeing = vision.modules() if vision is not model and vision is not model.base_model else ()
    connecting = {id(module) for name in _CONNECTORS for module in getattr(vision, name, torch.nn.Module()).modules()}
    frozen = ({id(module) for module in seeing} - connecting) | {id(output)}
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and id(module) not in frozen]


def inject(model: Any, modules: Sequence[str], *, rank: int, alpha: int) -> dict[str, torch.nn.Parameter]:
    """Puts adapters that change nothing yet beside linear layers, in place.

    Args:
        model: of transformers, frozen.
        modules: full names of the layers.
        rank: of the change of each layer's weights.
        alpha: the change is multiplied by alpha / rank.
    Returns:
        The adapters' weights by name; they alone take gradients.
    """
    require_peft()
    check_whole("lora.rank", rank, 1, _MAX_RANK)
    check_whole("lora.alpha", alpha, 1, _MAX_ALPHA)
    from peft import inject_adapter_in_model

    inject_adapter_in_model(_config(modules, rank, alpha), model)
    weights = _weights(model)
    for weight in weights.values():
        weight.data = weight.data.float()  # in half precision small steps would be lost
    return weights


def write_adapter(model: Any, modules: Sequence[str], folder: Path, *, rank: int, alpha: int, base: str, base_name: str) -> None:
    """Writes the adapters of a model, in PEFT's files.

    Args:
        model: after `inject`.
        modules, rank, alpha: as there.
        folder: is there.
        base: hash over the weights of the model without adapters; a guard's adapter fits no other.
        base_name: what that is called.
    """
    from safetensors.torch import save_file

    values = {_PREFIX + name.replace(".default.", "."): value.detach().cpu().contiguous() for name, value in _weights(model).items()}
    with written(folder / ADAPTER) as temporary:
        save_file(values, temporary, metadata={_BASE: base})  # one entry: of several, the order would be another one each time
    said = {
        "peft_type": "LORA",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(modules),
        "inference_mode": True,
    }
    with written(folder / ADAPTER_CONFIG) as temporary:
        temporary.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")


def attach(model: Any, folder: Path, base: str) -> str:
    """Puts a written adapter into a model, in place.

    Args:
        model: without adapters.
        folder: with the two files.
        base: hash over the model's weights.
    Returns:
        A hash over the adapter's files.
    Raises:
        InputError: they are not there or damaged, or of another model.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    require_peft()
    path = folder / ADAPTER
    said = read_json(folder / ADAPTER_CONFIG, "an adapter's configuration", _MEND)
    modules, rank, alpha = (said.get(name) for name in ("target_modules", "r", "lora_alpha"))
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    is_right = (
        said.get("peft_type") == "LORA"
        and isinstance(modules, list)
        and 0 < len(modules) <= _MAX_MODULES
        and all(isinstance(name, str) and _MODULE.fullmatch(name) for name in modules)
        and isinstance(rank, int)
        and 0 < rank <= _MAX_RANK
        and isinstance(alpha, int)
        and 0 < alpha <= _MAX_ALPHA
    )
    if not is_right:
        raise InputError(
            f"{folder / ADAPTER_CONFIG} is none that guardkit wrote: it must have LORA's r, lora_alpha and target_modules; {_MEND}"
        )
    assert isinstance(modules, list)
    assert isinstance(rank, int)
    assert isinstance(alpha, int)
    lacking = [name for name in modules if name not in linear]
    expected = {
        f"{_PREFIX}{name}.lora_{side}.weight": (rank, linear[name].in_features) if side == "A" else (linear[name].out_features, rank)
        for name in modules
        if name in linear
        for side in "AB"
    }
    most = _HEADER_BYTES + sum(4 * rows * columns for rows, columns in expected.values())
    try:
        if path.stat().st_size > most:
            raise ValueError("it is larger than an adapter of this model can be")
        with safe_open(path, framework="pt") as file:
            made_for = (file.metadata() or {}).get(_BASE, "")
            if made_for != base:
                raise InputError(
                    f"{path} was trained on a model whose weights have the hash {shortened(made_for[:12] or 'unknown')}, and this one has {base[:12]} "
                    f"({said.get('base_model_name_or_path')}); give the model that it was trained on as encoder=, or train again"
                )
            if lacking:
                raise ValueError(f"the model has no linear layer {lacking[0]}")
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
            if found != expected:
                wrong = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
                raise ValueError(f"{wrong[0]} has shape {found.get(wrong[0])}, expected {expected.get(wrong[0])}")
            values = {name: file.get_tensor(name) for name in expected}
    except InputError:
        raise
    except (OSError, SafetensorError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} is missing or damaged ({reason}); {_MEND}") from error
    if not all(value.is_floating_point() for value in values.values()):
        raise InputError(f"{path} holds other numbers than floating-point ones; {_MEND}")
    if not all(bool(value.float().isfinite().all()) for value in values.values()):
        raise InputError(f"{path} holds NaN or infinite values, which decide nothing; {_MEND}")
    weights = inject(model, modules, rank=rank, alpha=alpha)
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(values[_PREFIX + name.replace(".default.", ".")])
            weight.requires_grad_(False)
    if model.dtype == torch.float32:  # in half precision the sum would lose what was learned
        _merge(model)
    return hash_file(path)


def _merge(model: Any) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()


def _config(modules: Sequence[str], rank: int, alpha: int) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=list(modules))


def _weights(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: value for name, value in model.named_parameters() if ".lora_A." in name or ".lora_B." in name}
