"""The documentation site: what its hook makes of conf/, of the public names and of links, and that its menu names every page."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import guardkit

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs/hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def settings(hooks):
    """Title of a section to its text."""
    parts = re.split(r"^### `(.+)`$", hooks.settings_reference(CONF), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def dotted(settings, prefix=""):
    for key, value in settings.items():
        if key in ("defaults", "_target_"):
            continue
        if isinstance(value, dict) and value:
            yield from dotted(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def test_the_menu_names_every_page_once():
    def pages(menu):
        for entry in menu:
            (value,) = entry.values()
            yield from pages(value) if isinstance(value, list) else [value]

    named = sorted(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    there = sorted(path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md"))
    assert named == sorted([*there, "index.md"])  # the home page is made of the README


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: path.relative_to(CONF).as_posix())
def test_the_settings_page_has_every_setting_of_every_file(path, settings):
    group = path.parent.relative_to(CONF).as_posix()
    text = settings[path.stem if group == "." else f"{group}={path.stem}"]
    whole = group == "." or "@package _global_" in path.read_text()
    prefix = "" if whole else f"{group}."
    for name in dotted(yaml.safe_load(path.read_text())):
        shown = name.split(".")[0] + ":" if group == "policy" or group.startswith("hydra") else f"| `{prefix}{name}` |"
        assert shown in text


def test_a_setting_stands_beside_its_default_and_its_comment(hooks, tmp_path):
    (tmp_path / "head").mkdir()
    (tmp_path / "walk.yaml").write_text(
        "# python -m guardkit.walk\n# Walks.\ndefaults:\n  - shared\n  - head: linear   # a head\n\n"
        "where: ???   # a place,\n             # or two\n# one more: +x=1\nsteps:       # of the walk\n  many: [1, 2]\n  names: {a: b}   # of_a[b]\nnone:\n"
    )
    (tmp_path / "head/big.yaml").write_text("width: '#1'   # wide\n")
    (tmp_path / "head/none.yaml").write_text("# Nothing.\n_target_: a.B\n")
    assert hooks.settings_reference(tmp_path) == (
        "## Commands\n\n### `walk`\n\n`python -m guardkit.walk`  \nWalks.\n\n| setting | default | |\n|---|---|---|\n"
        "| `head` | `linear` | a head |\n| `where` | must be given | a place, or two |\n|  |  | one more: +x=1 |\n"
        "| `steps` |  | of the walk |\n| `steps.many` | `[1, 2]` |  |\n| `steps.names` | `{a: b}` | of\\_a\\[b\\] |\n| `none` | `null` |  |\n\n"
        "## head\n\n### `head=big`\n\n| setting | default | |\n|---|---|---|\n| `head.width` | `'#1'` | wide |\n\n### `head=none`\n\nNothing.\n\nNo settings.\n"
    )


def test_the_python_page_has_every_public_name(hooks):
    names = re.findall(r"^::: guardkit\.(?:\w+\.)+(\w+)$", hooks.api_reference(ROOT / "guardkit/__init__.py"), re.MULTILINE)
    assert sorted([*names, "__version__"]) == sorted(guardkit.__all__)


@pytest.mark.parametrize(
    ("folder", "link", "there"),
    [
        ("", "docs/encoders.md#presets", "encoders.md#presets"),
        ("", "docs/pairs.png", "pairs.png"),
        ("", "conf/policy/template.yaml", "https://git.test/blob/main/conf/policy/template.yaml"),
        ("", "conf", "https://git.test/tree/main/conf"),
        ("", "https://else.test/docs/x.md", "https://else.test/docs/x.md"),
        ("docs", "encoders.md", "encoders.md"),
        ("docs", "../LICENSE", "https://git.test/blob/main/LICENSE"),
        ("docs/extension", "../encoders.md", "../encoders.md"),
        ("docs/extension", "../../guardkit/heads.py", "https://git.test/blob/main/guardkit/heads.py"),
        ("docs/extension", "conf/head/cosine.yaml", "conf/head/cosine.yaml"),
    ],
)
def test_links_lead_to_the_site_or_to_the_repository(hooks, folder, link, there):
    assert hooks.relinked(f"a [word]({link}) b", folder, "https://git.test") == f"a [word]({there}) b"


@pytest.mark.slow
def test_the_site_builds_strictly_and_asks_nobody_for_anything(tmp_path):
    pytest.importorskip("mkdocs", reason='needs pip install -e ".[docs]"')
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    loaded = r"<(?:script|img|iframe)[^>]*\bsrc=[\"']?(?:https?:)?//|<link[^>]*rel=[\"']?(?:stylesheet|preconnect|icon)[^>]*(?:https?:)?//"
    for page in tmp_path.rglob("*.html"):
        assert not re.search(loaded, page.read_text("utf-8")), page
    assert "train_guard" in (tmp_path / "api/index.html").read_text("utf-8")
