"""Every notebook runs in the smoke profile, and the book made of them works in a browser without a network."""

import json
import re
import shutil

import pytest

from cryobench.bench.book import build_book
from cryobench.bench.experiment import Cell
from cryobench.bench.plan import cells_of, notebook_of, path_of, state_of
from cryobench.bench.runner import run_cells
from cryobench.bench.tables import load_table
from cryobench.errors import CryobenchError
from cryobench.methods.registry import all_methods
from cryobench.paths import project_root

TABLES = ("zhang2024", "tang2022")
# the first test waits for all notebooks
pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Both tables in the smoke profile on one specimen: every method's notebook."""
    folder = tmp_path_factory.mktemp("results")
    cells = [c for t in TABLES for c in cells_of(load_table(t), "smoke", ["channel"])]
    assert {c.method for c in cells} == set(all_methods())
    failed = run_cells(cells, folder, "cpu", jobs=2, say=lambda line: None)
    assert failed == []
    assert {state_of(c, folder).state for c in cells} == {"done"}
    return folder


@pytest.fixture(scope="module")
def book(results, tmp_path_factory):
    pytest.importorskip("jupyter_book")
    run = path_of(Cell("tang2022", "channel", "gaussian", "smoke"), results).with_suffix(".ipynb")
    run.write_text(run.read_text().replace("unbiased risk estimate", "prose of another day"))
    return build_book("smoke", results, tmp_path_factory.mktemp("book"), lambda line: None)


def test_every_chapter_ends_in_assertions():
    for path in (project_root() / "notebooks").rglob("*.ipynb"):
        cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
        assert "assert " in "".join(cells[-1]["source"]), path


def test_a_second_build_does_nothing(results, book):
    before = book.stat().st_mtime_ns
    said = []
    assert build_book("smoke", results, book.parents[1], said.append) == book
    assert said == ["the book is up to date"]
    assert book.stat().st_mtime_ns == before


def test_no_page_asks_for_anything_from_the_network(book):
    for page in book.parent.rglob("*.html"):
        for address in re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(https?://[^"]*)"', page.read_text()):
            pytest.fail(f"{page.name} loads {address}")


def test_text_is_of_today_and_outputs_are_of_the_run(results, book):
    page = (book.parent / "methods" / "gaussian.html").read_text()
    assert "unbiased risk estimate" in page
    assert "prose of another day" not in page
    assert "SNR 0.2" in page
    assert str(results) not in page
    assert notebook_of("gaussian").exists()


def test_a_book_without_records_is_refused(tmp_path):
    with pytest.raises(CryobenchError, match="cryobench run"):
        build_book("smoke", tmp_path, tmp_path / "out", lambda line: None)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_pages_work_in_a_browser(book):
    from browser import Browser

    pages = sorted(p.relative_to(book.parent) for p in book.parent.rglob("*.html"))
    shown = [p for p in pages if p.parts[0] != "_static" and p.name != "search.html"]
    with Browser() as browser:
        for page in shown:
            assert browser.open(book.parent / page, settle=0.2) == [], page
            broken = browser.evaluate("[...document.images].filter(i => i.naturalWidth == 0).length")
            assert broken == 0, page
        for page, tables, figures, formulas in (
            ("start.html", 2, 1, 0),
            ("image-formation.html", 0, 8, 3),
            ("metrics.html", 0, 3, 2),
            ("statistics.html", 2, 3, 4),
            ("tables/zhang2024.html", 1, 0, 0),
            ("tables/tang2022.html", 1, 0, 0),
            ("audit.html", 9, 0, 3),
            ("methods/bm3d.html", 0, 4, 1),
        ):
            browser.open(book.parent / page)
            count = "document.querySelectorAll('{}').length"
            assert browser.evaluate(count.format("table.cryobench")) >= tables, page
            assert browser.evaluate(count.format(".cell_output img")) >= figures, page
            assert browser.evaluate(count.format("mjx-container")) >= formulas, page
            height = browser.evaluate(
                "Math.min(...[...document.querySelectorAll('.cell_output img')].map(i => i.height), 999)"
            )
            assert height > 50, page
