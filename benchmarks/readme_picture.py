"""The picture of the README: photographs, what `editor=inpaint` makes of them, and the difference.

python benchmarks/readme_picture.py FOLDER docs/photograph_pairs.jpg

FOLDER holds two photographs that come with scikit-image, both free of copyright: rocket.jpg (SpaceX, public domain) and coffee.png
(Rachel Michetti, CC0). Their boxes stand below.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from guardkit import EditRequest, InpaintEditor
from guardkit.images import FileContent

BOXES = {"rocket.jpg": (0.45, 0.26, 0.55, 1.0), "coffee.png": (0.12, 0.02, 0.81, 0.99)}  # left, top, right, bottom; fractions
SIZE, GAP, TITLE = (360, 240), 6, 26

folder, out = Path(sys.argv[1]), Path(sys.argv[2])
columns = ("photograph and box", "counterfactual by editor=inpaint", "difference")
width, height = SIZE
sheet = Image.new("RGB", (3 * width + 2 * GAP, TITLE + 2 * height + GAP), "white")
pen = ImageDraw.Draw(sheet)
for column, title in enumerate(columns):
    pen.text((column * (width + GAP) + 4, 5), title, "black", font_size=15)
for row, (name, box) in enumerate(BOXES.items()):
    content = FileContent(folder / name)
    (result,) = InpaintEditor().edit([EditRequest(content, "Take it away.", box, seed=0)])
    before = np.asarray(content.load())
    after = np.asarray(result.image)
    changed = np.abs(before.astype(int) - after).max(axis=2).astype(np.uint8)
    shown = [Image.fromarray(one).convert("RGB").resize(SIZE) for one in (before, after, changed)]
    ImageDraw.Draw(shown[0]).rectangle([round(side * SIZE[i % 2]) - (i > 1) for i, side in enumerate(box)], outline="yellow", width=2)
    for column, image in enumerate(shown):
        sheet.paste(image, (column * (width + GAP), TITLE + row * (height + GAP)))
sheet.save(out, quality=85)
