"""Builds the static book: chapters and executed method notebooks, in one site that needs no network.

A method's chapter is its executed notebook: outputs from the run, prose from the notebook in git. Chapters
that belong to no method read records and simulate small examples; they are executed here, and kept while
neither they nor the code or the records change.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from cryobench.bench.keys import code_hashes, digest, notebook_code, notebook_hash
from cryobench.bench.notebooks import execute, parameters_of, without_origin
from cryobench.bench.plan import notebook_of
from cryobench.bench.records import read_record, shipped_records
from cryobench.bench.tables import load_table, table_names
from cryobench.errors import BadFileError, CryobenchError
from cryobench.paths import project_root, shipped_dir

#: chapters in reading order: (title of the part, notebooks of the folder notebooks/)
PARTS = (
    ("Foundations", ("image-formation", "metrics", "statistics")),
    ("Limits and honesty", ("limit", "invention", "training")),
    ("Published tables", ("tables/zhang2024", "tables/tang2022", "audit")),
)
LONG = ("limit", "invention")  # chapters that take more than a minute
METHOD_ORDER = (
    "noisy blank shrink lowpass-oracle mean gaussian bilateral lowpass bm3d ksvd cwf dncnn noise2noise restore "
    "unet denoisegan robustgan gan gan-perceptual sr3 sr3-post score score-target em3d bayes"
).split()


def build_book(profile: str, results: Path, output: Path | None, say: Callable[[str], None]) -> Path:
    """Build the site of a profile; returns its index.html. Nothing is done when nothing changed.

    Raises CryobenchError if there is no record of the profile, a chapter fails or the strict build warns.
    """
    output = output or project_root() / "book" / "_build"
    runs = _runs(results, profile)
    if not runs:
        raise CryobenchError(f"no executed run of profile {profile} in {results}: run `cryobench run` first")
    index = output / "html" / "index.html"
    stamp = output / "stamp"
    inputs = _inputs(profile, results, runs)
    if index.exists() and stamp.exists() and stamp.read_text() == inputs:
        say("the book is up to date")
        return index
    chapters = _execute_chapters(profile, results, say)
    source = output / "source"
    shutil.rmtree(source, ignore_errors=True)
    _write_source(source, chapters, runs)
    say("building the pages ...")
    _sphinx(source, output)
    stamp.write_text(inputs)
    return index


def _runs(results: Path, profile: str) -> dict[str, list[Path]]:
    """Executed notebooks that have a record, by method; the first of each becomes the chapter.

    Committed ones stand where nothing was run here, and last.
    """
    found: dict[str, list[Path]] = {}
    for table in table_names():
        order = {s: k for k, s in enumerate(load_table(table).specimens)}
        here = set()
        for path in [*sorted((results / table / profile).glob("*.json")), *shipped_records(table, profile)]:
            try:
                record = read_record(path)
            except BadFileError:
                continue
            if record["status"] == "done" and path.name not in here and path.with_suffix(".ipynb").exists():
                found.setdefault(record["method"], []).append(path.with_suffix(".ipynb"))
                here.add(path.name)
        for method, paths in found.items():
            # the chapter shows the run that the notebook's own parameters name, if it was made
            own = parameters_of(notebook_of(method)).get("table")
            paths.sort(
                key=lambda p: (_shipped(p), p.parent.parent.name != own, order.get(p.name.split("__")[0], 99), p.name)
            )
    return found


def _shipped(path: Path) -> bool:
    return path.is_relative_to(shipped_dir())


def _records(results: Path) -> list[Path]:
    """All that chapters and table pages may read, of every profile."""
    return sorted(results.glob("*/*/*.json")) + sorted(shipped_dir().rglob("*.json"))


def _inputs(profile: str, results: Path, runs: dict[str, list[Path]]) -> str:
    """Digest of all that the site shows."""
    root = project_root()
    files = [p for paths in runs.values() for p in paths] + _records(results)
    files += [
        p
        for folder in ("book", "notebooks", "tables")
        for p in sorted((root / folder).rglob("*"))
        if p.is_file() and "_build" not in p.parts and ".ipynb_checkpoints" not in p.parts
    ]
    hashes = [[str(p.name), hashlib.sha256(p.read_bytes()).hexdigest()] for p in files]
    code = [notebook_code(root / "notebooks" / f"{name}.ipynb") for name in _chapters()]
    return digest([profile, hashes, code, code_hashes(__name__)])


def _chapters() -> list[str]:
    return ["start", *(name for _, names in PARTS for name in names)]


def _execute_chapters(profile: str, results: Path, say: Callable[[str], None]) -> dict[str, Path]:
    """Executed chapters by name, two at a time; a chapter whose inputs are unchanged is not run again."""
    read = [hashlib.sha256(p.read_bytes()).hexdigest() for p in _records(results)]

    def chapter(name: str) -> Path:
        notebook = project_root() / "notebooks" / f"{name}.ipynb"
        target = results / "chapters" / profile / f"{name}.ipynb"
        given: dict[str, Any] = {"profile": profile, "results": str(results.resolve())}
        given = {k: v for k, v in given.items() if k in parameters_of(notebook)}
        reads = "results" in given or name == "training"  # of which the study is in the repository
        state = digest([notebook_hash(notebook), notebook_code(notebook), read if reads else []])
        stamp = target.with_suffix(".stamp")
        if not (target.exists() and stamp.exists() and stamp.read_text() == state):
            say(f"chapter {name} ...")
            stamp.unlink(missing_ok=True)  # a failed notebook takes the place of the last good one
            execute(notebook, target, given, threads=max(1, (os.cpu_count() or 1) // 2))
            stamp.write_text(state)
        return target

    # the longest first, so that the last one does not run alone
    names = sorted(_chapters(), key=lambda name: name not in LONG)
    with ThreadPoolExecutor(max_workers=2) as pool:
        return dict(zip(names, pool.map(chapter, names), strict=True))


def _write_source(source: Path, chapters: dict[str, Path], runs: dict[str, list[Path]]) -> None:
    root = project_root()
    shutil.copytree(root / "book", source, ignore=shutil.ignore_patterns("_build"))
    for name, path in chapters.items():
        _place(path, root / "notebooks" / f"{name}.ipynb", source / f"{name}.ipynb")
    order = [m for m in METHOD_ORDER if m in runs] + sorted(m for m in runs if m not in METHOD_ORDER)
    methods, others = [], []
    for method in order:
        _place(runs[method][0], notebook_of(method), source / "methods" / f"{method}.ipynb")
        methods.append({"file": f"methods/{method}"})
        for path in runs[method]:
            table = path.parent.parent.name
            _place(path, notebook_of(method), source / "runs" / table / path.name, title=f"{table}: {path.stem}")
            others.append({"file": f"runs/{table}/{path.stem}"})
    parts: list[dict[str, Any]] = [
        {"caption": title, "chapters": [{"file": n} for n in names]} for title, names in PARTS
    ]
    parts.insert(1, {"caption": "Methods", "chapters": methods})
    parts.append({"caption": "Records", "chapters": [{"file": "runs", "sections": others}]})
    toc = {"format": "jb-book", "root": "start", "parts": parts}
    (source / "_toc.yml").write_text(yaml.safe_dump(toc, sort_keys=False))


def _place(executed: Path, current: Path, target: Path, title: str = "") -> None:
    """Outputs of the run under the prose of today; title replaces the chapter's own on pages of single runs."""
    book, source = without_origin(json.loads(executed.read_text())), json.loads(current.read_text())
    prose = [c for c in source["cells"] if c["cell_type"] == "markdown"]
    cells = book["cells"]
    shown = [c for c in cells if c["cell_type"] == "markdown"]
    if len(prose) == len(shown):
        for cell, text in zip(shown, prose, strict=True):
            cell["source"] = text["source"]
    if title and cells and cells[0]["cell_type"] == "markdown":
        lines = "".join(cells[0]["source"]).splitlines()
        cells[0]["source"] = "\n".join([f"# {title}", *lines[1:]])
    if _shipped(executed):
        cells.insert(min(1, len(cells)), _not_made_here(executed))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(book))


def _not_made_here(executed: Path) -> dict[str, Any]:
    run = read_record(executed.with_suffix(".json"))["provenance"]
    text = (
        f"```{{note}}\nThis run was not made on this machine: it is a committed one, of commit {run['commit'][:9]} on "
        f"{run['device']}, {run['utc'][:10]}. Its text is kept, its figures are not; `cryobench run` makes them.\n```"
    )
    return {"cell_type": "markdown", "id": "not-made-here", "metadata": {}, "source": text}


def _sphinx(source: Path, output: Path) -> None:
    start = "from jupyter_book.cli.main import main; main()"  # it has no __main__ module
    command = [sys.executable, "-c", start, "build", "-W", "-n", "--keep-going"]
    work = output / "work"
    shutil.rmtree(work, ignore_errors=True)
    done = subprocess.run(
        [*command, "--path-output", str(work), str(source)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    built = work / "_build" / "html"
    log = output / "sphinx.log"
    log.write_text(done.stdout + done.stderr)
    if done.returncode or not (built / "index.html").exists():
        lines = [x for x in log.read_text().splitlines() if "WARNING" in x or "ERROR" in x or "Error" in x]
        raise CryobenchError(f"the book did not build: {lines[0] if lines else 'no reason given'} (see {log})")
    for page in built.rglob("*.html"):
        page.write_text(_without_extra_scripts(page.read_text()))
    shutil.rmtree(output / "html", ignore_errors=True)
    built.rename(output / "html")
    shutil.rmtree(work)


def _without_extra_scripts(page: str) -> str:
    """Jupyter Book adds the loader of Thebe (live code over the network, unused here) and adds MathJax twice."""
    page = re.sub(r"<script>const THEBE_JS_URL.*?</script>|<(script|link)[^>]*sphinx-thebe[^>]*>(</script>)?", "", page)
    seen: set[str] = set()

    def once(tag: re.Match[str]) -> str:
        kept = "" if tag[1] in seen else tag[0]
        seen.add(tag[1])
        return kept

    return re.sub(r'<script[^>]*src="([^"]*)"[^>]*></script>', once, page)
