"""What the documentation site shows beyond the pages of docs/: the README as its home, the settings, and the public names of Python.

MkDocs calls the functions whose names begin with `on_` (mkdocs.yml names this file). The others need neither MkDocs nor guardkit.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from posixpath import dirname, join, normpath, relpath
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
_LINK = re.compile(r"\]\(([^)\s#]+)(#[^)]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """The README is the first page."""
    from mkdocs.structure.files import File

    text = relinked((ROOT / "README.md").read_text("utf-8"), "", config["extra"]["repository"])
    files.append(File.generated(config, "index.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:  # noqa: ARG001 - MkDocs passes them by name
    """Adds what is generated, and leads links to files outside docs/ to the repository."""
    if page.file.src_uri == "settings.md":
        markdown += "\n" + settings_reference(ROOT / "conf")
    if page.file.src_uri == "api.md":
        markdown += "\n" + api_reference(ROOT / "guardkit/__init__.py")
    folder = dirname(join("docs", page.file.src_uri))
    return markdown if page.file.src_uri == "index.md" else relinked(markdown, folder, config["extra"]["repository"])


def relinked(markdown: str, folder: str, repository: str) -> str:
    """Links to files of the checkout, as the site needs them.

    Args:
        markdown: a page that lies in `folder` of the checkout ("" is its top) and is shown as a page of docs/.
        repository: the address that files outside docs/ are read at.
    """

    def new(match: re.Match[str]) -> str:
        target, anchor = match[1], match[2] or ""
        if "://" in target:
            return match[0]
        path = normpath(join(folder, target))
        if path.startswith("docs/"):
            return f"]({relpath(path, folder or 'docs')}{anchor})"
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"]({repository}/{kind}/main/{path}{anchor})"

    return _LINK.sub(new, markdown)


# --- settings ---------------------------------------------------------------------------------------------------------------


def settings_reference(conf: Path) -> str:
    """Every file of conf/ as Markdown: what its comments say, its settings with their defaults."""
    commands = sorted(conf.glob("*.yaml"))
    parts = ["## Commands", *(_section(path, f"`{path.stem}`", "") for path in commands)]
    for group in sorted({path.parent for path in conf.rglob("*.yaml")} - {conf}):
        name = group.relative_to(conf).as_posix()
        parts.append(f"## {name}")
        parts += [_section(path, f"`{name}={path.stem}`", f"{name}.") for path in sorted(group.glob("*.yaml"))]
    return "\n\n".join(parts) + "\n"


def _section(path: Path, title: str, prefix: str) -> str:
    lines = path.read_text("utf-8").splitlines()
    head = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    if "# @package _global_" in lines[:head]:
        prefix = ""
    remarks = [_remark(line.lstrip("# ")) for line in lines[:head] if not line.startswith("# @package")]
    if path.parent.name == "policy" or "hydra" in path.parts:
        body = "```yaml\n" + "\n".join(lines[head:]).strip("\n") + "\n```"  # better read whole
    else:
        body = _table(lines, head, prefix)
    return "\n\n".join(part for part in (f"### {title}", "  \n".join(remarks), body) if part)


def _remark(line: str) -> str:
    return f"`{line}`" if line.startswith("python -m ") else _escaped(line)


def _table(lines: list[str], head: int, prefix: str) -> str:
    """The settings of a file in its order, with the comment beside each and those that stand alone between them."""
    rows: dict[int, tuple[str, str, str]] = {}
    root = yaml.compose("\n".join(lines))
    for name, value, end in _settings(root, prefix) if root is not None else ():
        rest = lines[end.line][end.column :].lstrip(": ")
        comment = _escaped(rest[1:].strip()) if rest.startswith("#") else ""
        if value is not None or comment:
            rows[end.line] = (f"`{name}`", _shown(value, lines), comment)
    last = None  # the setting above, whose comment goes on where the next line has one in the same column
    for number in range(head, len(lines)):
        stripped = lines[number].strip()
        if number in rows:
            last = number
        elif not stripped.startswith("#"):
            last = None
        elif last is not None and lines[last].rfind(" # ") + 1 == lines[number].index("#"):
            rows[last] = (*rows[last][:2], f"{rows[last][2]} {_escaped(stripped.lstrip('# '))}")
        else:
            rows[number] = ("", "", _escaped(stripped.lstrip("# ")))
    if not rows:
        return "No settings."
    return "\n".join(["| setting | default | |", "|---|---|---|", *(f"| {a} | {b} | {c} |" for _, (a, b, c) in sorted(rows.items()))])


def _settings(node: yaml.Node, prefix: str) -> Iterator[tuple[str, yaml.Node | None, yaml.Mark]]:
    """The settings below a mapping: dotted name, value (None: settings of its own, which follow) and where that ends.

    The choices of a defaults list are settings that bear the names of their groups.
    """
    for key, value in node.value:
        if key.value == "_target_":
            continue
        if key.value == "defaults":
            for entry in value.value:
                if isinstance(entry, yaml.MappingNode):
                    yield from ((group.value, choice, choice.end_mark) for group, choice in entry.value)
        elif isinstance(value, yaml.MappingNode) and not value.flow_style:
            yield prefix + key.value, None, key.end_mark
            yield from _settings(value, f"{prefix}{key.value}.")
        else:
            yield prefix + key.value, value, value.end_mark


def _shown(value: yaml.Node | None, lines: list[str]) -> str:
    if value is None:
        return ""
    text = lines[value.start_mark.line][value.start_mark.column : value.end_mark.column]
    return "must be given" if text == "???" else f"`{text or 'null'}`"


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_<>|\[\]])", r"\\\1", text)


# --- Python -----------------------------------------------------------------------------------------------------------------


def api_reference(init: Path) -> str:
    """One entry for mkdocstrings for every public name, under the comments that group them."""
    text = init.read_text("utf-8")
    homes = next(
        node.value
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "_HOMES"
    )
    parts = []
    for line in text.splitlines()[homes.lineno : homes.end_lineno]:
        if comment := re.fullmatch(r"\s*# (.+)", line):
            parts.append(f"## {comment[1][0].upper()}{comment[1][1:]}")
        elif name := re.match(r'\s*"(\w+)": "([\w.]+)"', line):
            parts.append(f"::: {name[2]}.{name[1]}")
    return "\n\n".join(parts) + "\n"
