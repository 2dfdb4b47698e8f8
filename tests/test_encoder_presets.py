"""Encoder presets: docs/encoders.md has a row for each, and says what conf/encoder and open_clip say."""

from __future__ import annotations

import pytest
import yaml
from conftest import ROOT
from hydra.utils import instantiate

from guardkit.artifacts import read_json, shipped

FILES = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "conf/encoder").glob("*.yaml")}
PRESETS = {name: settings for name, settings in FILES.items() if settings["weights"] != "???"}


def rows():
    """The table of presets: {name: {column: cell}}."""
    section = (ROOT / "docs/encoders.md").read_text().partition("## Presets")[2].partition("\n## ")[0]
    header, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|"))
    return {cells[0].strip("`"): dict(zip(header, cells, strict=True)) for cells in lines}


def test_every_preset_has_a_row_and_every_row_a_preset():
    assert set(rows()) == set(PRESETS)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_row_says_what_the_preset_is(name):
    import open_clip

    row, settings = rows()[name], PRESETS[name]
    assert all(row.values())
    assert "](" in row["licence of the weights"], "it names its source"
    instantiate(settings)  # the settings are well-formed; nothing is loaded
    if settings["_target_"].endswith("TransformersEncoder"):
        return  # its width and images are told by files on the Hub
    if (folder := shipped(settings["weights"])) is not None:
        said = read_json(folder / "open_clip_config.json", "a model's configuration")
        model, images = said["model_cfg"], said["preprocess_cfg"]
    else:
        model = open_clip.get_model_config(settings["architecture"])
        images = open_clip.get_pretrained_cfg(settings["architecture"], settings["weights"])
        assert images, "open_clip knows the weights"
        assert model.get("quick_gelu", False) == images.get("quick_gelu", False)
    assert row["width"] == str(model["embed_dim"])
    how = {"shortest": "shortest side, crop", "squash": "squashed"}[images["resize_mode"]]
    assert row["images"] == f"{model['vision_cfg']['image_size']}, {how}"
