"""How the shipped encoders' vectors of images that they know differ from those of other images, for docs/encoders.md.

    python benchmarks/known_images.py [n=600] [NAME=PATH ...]

PATH is a folder of images, a tar of them, or a Parquet file with a column `image` of bytes: NAME is what the table calls it. Drawn
scenes, noise and plain grey images are there without. Prints, for each encoder and kind of images, the mean cosine to the nearest text
that scenes_clip's description has (of that encoder only), the mean cosine of two images, and the smallest and largest of both among 20
draws of 40 images; then what train and evaluate would say.
"""

from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from guardkit.encoders.known import mean_cosine, nearest_text, unknown_images
from guardkit.encoders.open_clip import OpenClipEncoder
from guardkit.scenes.content import SceneContent
from guardkit.scenes.world import ScenePool

N_DRAWS, N_DRAWN = 20, 40


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def read(path: Path, n: int, rng: np.random.Generator) -> list[np.ndarray]:
    def some(found: list) -> list:
        return [found[i] for i in rng.permutation(len(found))[:n]]

    if path.is_dir():
        return [pixels(one.read_bytes()) for one in some(sorted([*path.rglob("*.jpg"), *path.rglob("*.png")]))]
    if path.suffix == ".tar":
        with tarfile.open(path) as tar:
            return [pixels(tar.extractfile(one).read()) for one in some([one for one in tar.getmembers() if one.name.endswith(".jpg")])]
    column = pq.read_table(path, columns=["image"])["image"]
    return [pixels(column[i].as_py()["bytes"]) for i in some(list(range(len(column))))]


def main(n: int, places: dict[str, str]) -> None:
    rng = np.random.default_rng(0)
    pool = ScenePool("test")
    images = {"drawn scenes": [SceneContent(pool.scene(i % 2, i // 2)).load() for i in range(n)]}
    images |= {name: read(Path(place), n, rng) for name, place in places.items()}
    images["noise"] = [rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(60)]
    images["plain grey"] = [np.full((64, 64, 3), 4 * value, np.uint8) for value in range(60)]
    print("| encoder | images | n | nearest text | mean cosine of two | warned |\n|---|---|---|---|---|---|")
    for weights in ("guardkit:scenes_clip", "guardkit:photos_clip"):
        encoder = OpenClipEncoder(None, weights)
        texts = encoder.encode_texts(list(encoder.known_images.texts)) if encoder.known_images.texts else None
        for name, mine in images.items():
            vectors = encoder.encode_images(mine)
            drawn = [vectors[rng.permutation(len(vectors))[:N_DRAWN]] for _ in range(N_DRAWS)]

            def cell(measure, vectors=vectors, drawn=drawn) -> str:
                values = [measure(some) for some in drawn]
                return f"{measure(vectors):.3f} ({min(values):.3f} to {max(values):.3f})"

            by_text = "" if texts is None else cell(lambda some, texts=texts: nearest_text(some, texts))
            warned = unknown_images(encoder, lambda vectors=vectors: vectors)
            print(f"| {encoder.name} | {name} | {len(mine)} | {by_text} | {cell(mean_cosine)} | {'yes' if warned else 'no'} |")
            for said in warned[:1]:
                print(said, file=sys.stderr)


if __name__ == "__main__":
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    main(int(given.pop("n", 600)), given)
