"""The rooms of the package, the arrows between them, and what passes through them in each command; drawn from the code.

    python benchmarks/architecture.py            # writes docs/rooms.svg and the tables of docs/architecture.md
    python benchmarks/architecture.py BEFORE     # prints tables: the checkout BEFORE beside this one

A room is a folder or a file of guardkit/. Lines and imports are read with `ast`, levels from `LEVELS` in tests/test_design.py. For the ways,
each command runs once, on a few drawn scenes, and every call of a function of the package is looked at: is it given the configuration
(anything of OmegaConf), is it given an image (a record, a content, pixels; or numbers made of them), and does it lie on a higher
level than the function of the package that called it? What one run does not enter is not on its way.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from html import escape
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
SCENES = ["source.n_train=120", "source.n_test=27"]
# heads that leave something to embed and to draw for the commands after them, which share a cache
COMMANDS = {
    "train": ["experiment=pairs_aug", "head=linear", "data.n_unsafe=24", "trainer.max_epochs=20"],
    "embed": ["limit=24"],
    "synthesize": [],
    "sweep": ["head=linear_whitened", "sweep.sizes=[4,8]", "sweep.seeds=2", "sweep.arms=[unpaired,pairs_aug]", "sweep.n_resamples=100"],
    "evaluate": ["guard={folder}/train/guard", "n_resamples=100"],
}
NUMBERS = {"ndarray", "Tensor"}
MARK = "<!-- benchmarks/architecture.py writes what follows -->"


class House:
    """What the text of a checkout's code says.

    Attributes:
        levels: of each room, 0 is the ground.
        lines: of each room, templates included.
        imports: (room, room that it imports).
    """

    def __init__(self, checkout: Path):
        self.package = checkout / "guardkit"
        self.levels: dict[str, int] = {}
        for node in ast.parse((checkout / "tests/test_design.py").read_text()).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "LEVELS":
                self.levels = ast.literal_eval(node.value)
        self.lines: Counter[str] = Counter()
        self.imports: set[tuple[str, str]] = set()
        for path in sorted(self.package.rglob("*")):
            if path.suffix not in (".py", ".html", ".css", ".js") or "__pycache__" in path.parts:
                continue
            text = path.read_text()
            self.lines[self.room(path)] += len(text.splitlines())
            if path.suffix == ".py":
                self.imports |= {(self.room(path), other) for other in self._imported(text) if other != self.room(path)}
        self.imports = {(one, other) for one, other in self.imports if one in self.levels and other in self.levels}

    def room(self, path: Path | str) -> str:
        return Path(path).relative_to(self.package).parts[0].removesuffix(".py")

    @staticmethod
    def _imported(text: str) -> set[str]:
        found = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            found |= {name.split(".")[1] for name in names if name.startswith("guardkit.")}
        return found

    def climbs(self) -> list[tuple[str, str]]:
        return sorted((one, other) for one, other in self.imports if self.levels[other] > self.levels[one])


# ---- the ways: this part runs in a process of its own, in the checkout that is looked at


class Tracer:
    """Looks at every call of a function of the package.

    Attributes:
        settings: (file, parameter) of functions that were given the configuration, in the order of the calls.
        image: room -> forms in which an image came there, in the order of the first.
        up: (file, function, file that called it) of calls to a higher level, with what came along.
    """

    def __init__(self, house: House):
        self.house = house
        self.settings: list[tuple[str, str]] = []
        self.image: dict[str, list[str]] = {}
        self.up: dict[tuple[str, str, str], set[str]] = defaultdict(set)
        self._seen: Counter[Any] = Counter()
        self._prefix = str(house.package) + os.sep

    def __call__(self, frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(self._prefix):
            return
        if (
            code.co_name.startswith("<") and code.co_name != "<lambda>"
        ) or not code.co_flags & 0x2:  # comprehensions, modules, class bodies
            return
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        given = [(name, frame.f_locals[name]) for name in names if name in frame.f_locals]
        file, room = code.co_filename.removeprefix(self._prefix), self.house.room(code.co_filename)
        came = {name for name, value in given if type(value).__module__.startswith("omegaconf")}
        self.settings += [(file, name) for name in sorted(came)]
        carried = {"settings"} if came else set()
        self._seen[code] += 1
        if self._seen[code] <= 50:
            forms = {form for name, value in given if name != "self" for form in [form_of(value)] if form}
            if forms and (self.image or forms - NUMBERS):  # before the first record, numbers are weights
                carried.add("image")
                known = self.image.setdefault(room, [])
                known += sorted(forms - set(known))
        caller = frame.f_back
        while caller is not None and not caller.f_code.co_filename.startswith(self._prefix):
            caller = caller.f_back
        if caller is not None:
            other = self.house.room(caller.f_code.co_filename)
            if self.house.levels.get(room, 0) > self.house.levels.get(other, 0):
                self.up[file, code.co_name, caller.f_code.co_filename.removeprefix(self._prefix)] |= carried


def form_of(value: Any, depth: int = 2) -> str | None:
    """The type that carries an image, or numbers made of one; None: it carries none."""
    kind = type(value)
    name = kind.__name__
    if isinstance(value, (list, tuple)):
        return form_of(value[0], depth) if len(value) and depth else None
    if isinstance(value, dict):
        return form_of(next(iter(value.values())), depth) if value and depth else None
    if kind.__module__.startswith("PIL."):
        return "Image"
    if name in NUMBERS:
        return name if "float" in str(value.dtype) or value.ndim >= 3 else None
    if not kind.__module__.startswith("guardkit."):
        return None
    attributes = {field.name for field in fields(kind)} if is_dataclass(kind) else set()
    if {"content", "label"} <= attributes or (hasattr(kind, "load") and "key" in {*attributes, *dir(kind)}):
        return name
    if depth and any(form_of(getattr(value, one, None), depth - 1) for one in sorted(attributes)):
        return name
    return None


def trace(command: str, checkout: Path, folder: Path) -> dict[str, Any]:
    tracer = Tracer(House(checkout))
    extra = [one.format(folder=folder) for one in COMMANDS[command]]
    sys.argv = [f"guardkit.{command}", *SCENES, *extra, f"output_dir={folder / command}", f"cache_dir={folder / 'cache'}"]
    # told of calls of Python functions alone: a profile function hears of returns and of C as well, and takes four times as long
    threading.settrace(tracer)
    sys.settrace(tracer)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            runpy.run_module(f"guardkit.{command}", run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.settrace(None)
        threading.settrace(None)
    up = [[*call, sorted(carried)] for call, carried in sorted(tracer.up.items())]
    return {"settings": tracer.settings, "image": tracer.image, "up": up}


def ways(checkout: Path, commands: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What `trace` found of each command of a checkout."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for command in commands:
            arguments = [sys.executable, str(Path(__file__).resolve()), "--trace", command, str(checkout), folder]
            environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
            ended = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True)
            if ended.returncode:
                raise SystemExit(f"{command} of {checkout} ended with status {ended.returncode}:\n{ended.stderr[-3000:]}")
            found[command] = json.loads(ended.stdout.splitlines()[-1])
    return found


def settings_way(way: dict[str, Any], house: House) -> dict[str, Any]:
    """Files, rooms, names and calls upward of the configuration."""
    files = list(dict.fromkeys(file for file, _ in way["settings"]))
    return {
        "files": files,
        "rooms": list(dict.fromkeys(house.room(house.package / file) for file in files)),
        "names": sorted({name for _, name in way["settings"]}),
        "up": [call for call in way["up"] if "settings" in call[3]],
    }


def image_way(way: dict[str, Any]) -> dict[str, Any]:
    return {
        "rooms": list(way["image"]),
        "forms": sorted({form for forms in way["image"].values() for form in forms}),
        "up": [call for call in way["up"] if "image" in call[3]],
    }


# ---- the picture


def needed(imports: set[tuple[str, str]]) -> list[tuple[str, str]]:
    """Imports without those that also follow by a detour: what is left says the same with fewer arrows."""
    below: dict[str, set[str]] = defaultdict(set)
    for one, other in imports:
        below[one].add(other)

    def reached(start: str, seen: set[str]) -> set[str]:
        for other in below[start] - seen:
            seen.add(other)
            reached(other, seen)
        return seen

    return sorted((one, other) for one, other in imports if not any(other in reached(mid, set()) for mid in below[one] - {other, one}))


def draw(house: House) -> str:
    """SVG: a row a level, a box a room, as wide as its name or the root of its lines; arrows to what it imports."""
    rows: dict[int, list[str]] = defaultdict(list)
    for room in sorted(house.lines):
        if room in house.levels:
            rows[house.levels[room]].append(room)
    arrows = needed(house.imports)
    width, gap, height, step, left = 1300, 10, 40, 105, 30
    boxes: dict[str, tuple[float, float, float]] = {}  # left, top, width
    for number, level in enumerate(sorted(rows, reverse=True)):
        above = {
            room: [boxes[one][0] + boxes[one][2] / 2 for one, other in arrows if other == room and one in boxes] for room in rows[level]
        }
        row = sorted(rows[level], key=lambda room: (sum(above[room]) / len(above[room]) if above[room] else width / 2, room))
        widths = [max(6.6 * len(room) + 12, 1.9 * house.lines[room] ** 0.5) for room in row]
        x = left + (width - left - sum(widths) - gap * (len(row) - 1)) / 2
        for room, wide in zip(row, widths, strict=True):
            boxes[room] = (x, 20 + number * step, wide)
            x += wide + gap
    total = 20 + len(rows) * step
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {total}" font-family="sans-serif" font-size="11">',
        '<defs><marker id="tip" viewBox="0 0 6 6" refX="6" refY="3" markerWidth="6" markerHeight="6" orient="auto"><path d="M0,0 L6,3 L0,6 z" fill="#4a6fa5"/></marker></defs>',
        f'<rect width="{width}" height="{total}" fill="#ffffff"/>',
    ]
    for number, level in enumerate(sorted(rows, reverse=True)):
        out.append(f'<text x="10" y="{20 + number * step + height / 2 + 4:.0f}" fill="#888888" font-size="14">{level}</text>')
    for one, other in arrows:
        (x, y, wide), (to_x, to_y, to_wide) = boxes[one], boxes[other]
        start, end = x + wide / 2, to_x + to_wide / 2
        if y == to_y:
            path = f"M{start:.0f},{y:.0f} Q{(start + end) / 2:.0f},{y - 30:.0f} {end:.0f},{y:.0f}"
        else:
            down = to_y > y
            begin, stop = (y + height, to_y) if down else (y, to_y + height)
            path = f"M{start:.0f},{begin:.0f} C{start:.0f},{begin + (35 if down else -35):.0f} {end:.0f},{stop - (35 if down else -35):.0f} {end:.0f},{stop:.0f}"
        upward = house.levels[other] > house.levels[one]
        out.append(
            f'<path d="{path}" fill="none" stroke="{"#c0392b" if upward else "#4a6fa5"}" stroke-opacity="0.45" marker-end="url(#tip)"><title>{one} imports {other}</title></path>'
        )
    for room, (x, y, wide) in boxes.items():
        out.append(f'<rect x="{x:.0f}" y="{y:.0f}" width="{wide:.0f}" height="{height}" rx="4" fill="#eef3fa" stroke="#4a6fa5"/>')
        out.append(f'<text x="{x + wide / 2:.0f}" y="{y + 17:.0f}" text-anchor="middle">{escape(room)}</text>')
        out.append(f'<text x="{x + wide / 2:.0f}" y="{y + 32:.0f}" text-anchor="middle" fill="#888888">{house.lines[room]}</text>')
    return "\n".join([*out, "</svg>", ""])


# ---- the tables


def table(header: list[str], rows: list[list[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def page(house: House, found: dict[str, dict[str, Any]]) -> str:
    """The part of docs/architecture.md that is written by this program."""
    by_level = [
        [level, ", ".join(f"`{room}` {house.lines[room]}" for room in sorted(house.lines) if house.levels.get(room) == level)]
        for level in sorted(set(house.levels.values()), reverse=True)
    ]
    by_level.append(["", ", ".join(f"`{room}` {house.lines[room]}" for room in sorted(house.lines) if room not in house.levels)])
    settings = {command: settings_way(way, house) for command, way in found.items()}
    images = {command: image_way(way) for command, way in found.items()}
    climbs = [f"- `{one}` imports `{other}`" for one, other in house.climbs()]
    up: dict[tuple[str, str], set[str]] = defaultdict(set)
    for way in found.values():
        for file, name, caller, _ in way["up"]:
            up[caller, file].add(name)
    return "\n".join(
        [
            MARK,
            "",
            f"## Lines by room: {sum(house.lines.values())} in all",
            "",
            table(["level", "rooms and their lines"], by_level),
            "",
            "## The way of the settings",
            "",
            "Files with a function that is given the configuration, in the order of the first call:",
            "",
            table(
                ["command", "files", "names for it"],
                [
                    [f"`{command}`", " → ".join(f"`{file}`" for file in way["files"]), ", ".join(f"`{name}`" for name in way["names"])]
                    for command, way in settings.items()
                ],
            ),
            "",
            "## The way of an image",
            "",
            "Rooms with a function that is given an image, as record, content, pixels or numbers, in the order of the first call:",
            "",
            table(
                ["command", "rooms", "forms"],
                [
                    [f"`{command}`", " → ".join(f"`{room}`" for room in way["rooms"]), ", ".join(f"`{form}`" for form in way["forms"])]
                    for command, way in images.items()
                ],
            ),
            "",
            "## Climbs",
            "",
            f"Imports from a lower level to a higher one: {len(climbs) or 'none'}.",
            *climbs,
            "",
            "Calls of a function on a higher level, which was handed down as an object or a function:" if up else "Calls upward: none.",
            "",
            *(
                f"- `{caller}` calls {', '.join(f'`{name}`' for name in sorted(up[caller, file]))} of `{file}`"
                for caller, file in sorted(up)
            ),
            "",
        ]
    )


def comparison(before: House, after: House, found: list[dict[str, dict[str, Any]]]) -> str:
    """Tables of two checkouts in Markdown."""
    houses = (before, after)
    rooms = sorted({*before.lines, *after.lines} - {"__init__"})
    lines = [[f"`{room}`", *(house.lines.get(room, "") for house in houses)] for room in rooms if before.lines[room] != after.lines[room]]
    lines.append(["all", *(sum(house.lines.values()) for house in houses)])
    rows = [["imports to a higher level", *(len(house.climbs()) for house in houses)]]
    for command in found[0]:
        settings = [settings_way(way[command], house) for way, house in zip(found, houses, strict=True)]
        images = [image_way(way[command]) for way in found]
        rows += [
            [f"`{command}`: files that are given the configuration", *(len(way["files"]) for way in settings)],
            [f"`{command}`: rooms that are given it", *(", ".join(f"`{room}`" for room in way["rooms"]) for way in settings)],
            [f"`{command}`: names for it", *(len(way["names"]) for way in settings)],
            [f"`{command}`: calls upward with the configuration", *(len(way["up"]) for way in settings)],
            [f"`{command}`: rooms that an image passes", *(len(way["rooms"]) for way in images)],
            [f"`{command}`: forms that it has", *(len(way["forms"]) for way in images)],
            [f"`{command}`: calls upward with an image", *(len(way["up"]) for way in images)],
        ]
    return table(["lines, where they differ", "before", "after"], lines) + "\n\n" + table(["ways", "before", "after"], rows)


def main() -> None:
    if sys.argv[1:2] == ["--trace"]:
        print(json.dumps(trace(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", nargs="?", type=Path, help="a checkout to compare with")
    parser.add_argument("--out", type=Path, default=HERE / "docs", help="where picture and tables go")
    parser.add_argument("--commands", nargs="*", choices=COMMANDS, default=list(COMMANDS), help="whose ways are looked at")
    chosen = parser.parse_args()
    here = House(HERE)
    if chosen.before:
        before = chosen.before.resolve()
        print(comparison(House(before), here, [ways(before, chosen.commands), ways(HERE, chosen.commands)]))
        return
    tables = page(here, ways(HERE, chosen.commands))
    (chosen.out / "rooms.svg").write_text(draw(here))
    target = chosen.out / "architecture.md"
    above = target.read_text().split(MARK)[0] if target.exists() else ""
    target.write_text(above + tables)


if __name__ == "__main__":
    main()
