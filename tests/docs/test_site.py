"""``make docs``: the documents as a site, with every link and heading there."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None,
    reason="mkdocs is not installed; `make venv` brings it (the extra `docs`)",
)


def build(site: Path) -> subprocess.CompletedProcess[str]:
    """The command of ``make docs``, in a process that may reach no network."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    return subprocess.run(
        command,
        cwd=ROOT,
        env={
            "NO_MKDOCS_2_WARNING": "1",
            "PYTHONPATH": str(ROOT),
            "http_proxy": "http://127.0.0.1:9",
            "https_proxy": "http://127.0.0.1:9",
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("site")
    done = build(path)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return path


def test_the_site_has_every_document(site: Path) -> None:
    pages = {page.relative_to(ROOT) for page in (ROOT / "docs").rglob("*.md")}
    built = {page.with_suffix(".html") for page in pages if page.name != "README.md"}
    assert {page for page in built if not (site / page).is_file()} == set()
    assert (site / "index.html").is_file()
    assert (site / "docs" / "index.html").is_file()


def test_a_page_asks_nobody_but_its_own_site(site: Path) -> None:
    outside = re.compile(r"<(?:script|link|img)[^>]+(?:src|href)=[\"']?(https?:)?//")
    asking = [page for page in site.rglob("*.html") if outside.search(page.read_text())]
    assert asking == []


def test_a_broken_link_ends_the_build(tmp_path: Path) -> None:
    clone = tmp_path / "docs"
    shutil.copytree(ROOT / "docs", clone)
    for name in ("README.md", "mkdocs.yml"):
        shutil.copy(ROOT / name, tmp_path / name)
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=tmp_path,
        env={"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1  # the packages, deploy/ and tests/ are not in that copy
    assert "is not found among documentation files" in done.stderr
