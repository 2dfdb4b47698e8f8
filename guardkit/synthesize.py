"""Makes a pair dataset: python -m guardkit.synthesize source=folder source.root=DIR policy=NAME editor=inpaint"""

from __future__ import annotations

from omegaconf import DictConfig

from guardkit._hydra import main, output_dir


@main("synthesize")
def synthesize(cfg: DictConfig) -> None:
    """Writes a pair dataset and prints its counts."""
    from guardkit.training import synthesize_source

    manifest = synthesize_source(cfg, output_dir())
    names = ("given", "unreadable", "edited", "tries", "accepted", "yield_per_try", "yield_per_image")
    print("\n".join(f"  {name:<16} {_short(manifest[name])}" for name in names))
    print("\n".join(f"  {count:>6} x {reason}" for reason, count in manifest["rejected"].items()))
    print(output_dir())


def _short(value: float | int | None) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    synthesize()
