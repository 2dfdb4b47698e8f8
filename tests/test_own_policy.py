"""A user's own policy file and own class folders, from the command's settings to the guard."""

from __future__ import annotations

import pytest
from conftest import picture

from guardkit import GuardClassifier
from guardkit.schema import InputError

POLICY = """
name: no_vehicles
description: No motor vehicles.
categories:
  - name: motor_vehicles
    definition: A car or a lorry.
    covered: [a parked car]
    not_covered: [a bicycle]
    edit: Replace the vehicle with a bicycle.
    unsafe_texts: [a photo of a car]
    safe_texts: [a photo of a bicycle]
"""


def test_class_folders_and_policy_file(compose, tmp_path):
    from guardkit.runs.train import run

    for number, (folder, dark) in enumerate([("automobile", True), ("truck", True), ("bird", False), ("ship", False)]):
        (tmp_path / "data" / folder).mkdir(parents=True)
        for i in range(12):
            image = picture(100 * number + i, (32, 32))
            shown = image.point(lambda value: value // 3) if dark else image
            shown.save(tmp_path / "data" / folder / f"{i}.png")
    (tmp_path / "data/bird/broken.png").write_bytes(b"no image")
    (tmp_path / "policy.yaml").write_text(POLICY)
    overrides = ["experiment=unpaired", "source=folder", f"source.root={tmp_path / 'data'}", f"policy_file={tmp_path / 'policy.yaml'}"]
    overrides += [
        "+source.categories={automobile: motor_vehicles, truck: motor_vehicles}".removeprefix("+"),
        "data.n_unsafe=12",
        "trainer.max_epochs=30",
    ]
    report = run(compose("train", *overrides), {}, tmp_path / "run")
    metrics = report.metrics
    assert metrics["inputs"]["given"] == 49
    assert "  note: of 49 inputs 1 could not be used (1 x " in report.table
    assert list(metrics["test"]["by_category"]) == ["motor_vehicles"]
    assert metrics["test"]["auroc"] > 0.7  # dark pictures are easy, whatever the encoder knows of cars
    assert GuardClassifier.from_pretrained(tmp_path / "run/guard").policy.name == "no_vehicles"


def test_a_broken_policy_file_is_named(compose, tmp_path):
    from guardkit.runs.train import run

    (tmp_path / "policy.yaml").write_text(POLICY.replace("definition", "defintion"))
    with pytest.raises(InputError, match=r"policy.yaml: .*categories\[0\].*defintion"):
        run(compose("train", f"policy_file={tmp_path / 'policy.yaml'}"), {}, tmp_path / "run")
