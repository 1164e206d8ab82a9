"""Runs what a plan lacks: each cell is its method's notebook, executed with the cell's coordinates."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from cryobench.bench import records
from cryobench.bench.experiment import Cell, pick_device
from cryobench.bench.notebooks import RUNNING, STOPPING, execute
from cryobench.bench.plan import State, notebook_of, path_of, state_of
from cryobench.errors import CryobenchError
from cryobench.methods.registry import get_method
from cryobench.paths import cache_dir
from cryobench.specimens.catalog import specimen_name

Say = Callable[[str], None]


def run_cells(
    cells: list[Cell], results: Path, device: str = "auto", jobs: int = 1, say: Say = print
) -> list[tuple[Cell, str]]:
    """Run all cells without a valid record and its notebook; returns the failed ones with their errors.

    A failed run is recorded as failed and never stops the others. Safe to kill at any moment: records
    appear whole, and a fit goes on from its checkpoint.
    """
    device_now = pick_device(device)
    states = [state_of(cell, results, device) for cell in cells]
    # a run that was killed just after it had written its record left no notebook to read the number in
    todo = [s for s in states if s.state != "done" or not path_of(s.cell, results).with_suffix(".ipynb").exists()]
    known = _known_seconds()
    todo.sort(key=lambda s: -_expected(s.cell, known))  # the longest first: none is left to run alone at the end
    say(f"{len(cells) - len(todo)} of {len(cells)} cells are recorded, {len(todo)} to run on {device_now}")
    clock = _Clock([s.cell for s in todo], jobs, known)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    failed: list[tuple[Cell, str]] = []
    with _terminable(), ThreadPoolExecutor(max_workers=jobs) as pool:
        try:
            futures = {pool.submit(_run_cell, s, results, device_now, threads): s for s in todo}
            for done, future in enumerate(as_completed(futures), 1):
                state = futures[future]
                seconds, error = future.result()
                name = f"{specimen_name(state.cell.specimen)} {state.cell.method} seed {state.cell.seed}"
                if error is None:
                    clock.done(state.cell, seconds)
                    say(f"[{done}/{len(todo)}] {name}: {seconds:.0f} s, {clock.left()}")
                else:
                    clock.todo.remove(state.cell)
                    failed.append((state.cell, error))
                    say(f"[{done}/{len(todo)}] {name}: FAILED: {error}")
        except BaseException:
            STOPPING.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(RUNNING):
                process.terminate()
            raise
    return failed


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Within, SIGTERM (of ``timeout``, of a batch system) ends a run as Ctrl-C does: with the notebooks it started."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run_cell(state: State, results: Path, device: str, threads: int) -> tuple[float, str | None]:
    cell = state.cell
    path = path_of(cell, results)
    started, launched = time.perf_counter(), time.time()
    parameters = {**dataclasses.asdict(cell), "device": device, "results": str(results.resolve())}
    del parameters["method"]  # the notebook is the method
    for leftover in path.parent.glob(f"{path.stem}.*.part*"):
        leftover.unlink()  # of a run that was killed
    try:
        execute(notebook_of(cell.method), path.with_suffix(".ipynb"), parameters, threads)
        if not path.exists() or path.stat().st_mtime < launched:
            raise CryobenchError("the notebook ended without the record it should have written")
    except Exception as error:  # whatever it is, the other cells go on
        if STOPPING.is_set():
            return time.perf_counter() - started, "stopped"
        _record_failure(cell, path, device, str(error) or type(error).__name__)
        return time.perf_counter() - started, str(error)
    return time.perf_counter() - started, None


def _record_failure(cell: Cell, path: Path, device: str, error: str) -> None:
    machine = records.machine(device)
    unknown = {k: "" for k in ("key", "code_hash", "data_hash", "notebook_hash")}
    record = {
        "schema": records.VERSION,
        **dataclasses.asdict(cell),
        "specimen": specimen_name(cell.specimen),
        "status": "failed",
        "error": error,
        "provenance": {**unknown, "code": {}, "data": {}, **machine},
    }
    records.write_record(path, record)


def _timings() -> Path:
    return cache_dir() / "timings.json"


def _known_seconds() -> dict[str, float]:
    """How long a cell of each profile and method took here before."""
    try:
        known: dict[str, float] = json.loads(_timings().read_text())
    except (OSError, ValueError):
        return {}
    return known


def _expected(cell: Cell, known: dict[str, float]) -> float:
    method = get_method(cell.method)
    guess = 75.0 if (method.trained or method.costly) and cell.profile != "smoke" else 10.0
    return known.get(f"{cell.profile}/{cell.method}", guess)


class _Clock:
    """Estimates what is left from how long each method took before, on this machine."""

    def __init__(self, cells: list[Cell], jobs: int, known: dict[str, float]) -> None:
        self.todo, self.jobs, self.known = list(cells), jobs, known

    def done(self, cell: Cell, seconds: float) -> None:
        self.todo.remove(cell)
        self.known[f"{cell.profile}/{cell.method}"] = round(seconds, 1)
        _timings().parent.mkdir(parents=True, exist_ok=True)
        _timings().write_text(json.dumps(self.known, indent=1, sort_keys=True))

    def left(self) -> str:
        seconds = sum(_expected(c, self.known) for c in self.todo) / self.jobs
        return f"about {seconds / 60:.0f} min left" if seconds > 90 else f"about {seconds:.0f} s left"
