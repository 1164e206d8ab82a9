"""A table as a view of records: measured beside published, with intervals, supervision and cost."""

from __future__ import annotations

import html
import json
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from cryobench.bench import records
from cryobench.bench.comparison import Found, beats_limit, excess, ranks, shared, values
from cryobench.bench.experiment import Cell
from cryobench.bench.plan import state_of
from cryobench.bench.table_format import COLUMNS, WIDTH, Column, Row, csv_table, html_table, latex_table, text_table
from cryobench.bench.tables import TableSpec, load_table
from cryobench.errors import BadFileError, CryobenchError
from cryobench.methods.registry import all_methods
from cryobench.metrics.bootstrap import summarise
from cryobench.paths import shipped_dir
from cryobench.specimens.catalog import available

SCORES = ("mse", "psnr", "ssim", "psnr_fit")
INVENTION = ("snbr_scale_free", "noise_energy", "noise_passed", "noise_correlation", "noise_correlation_null")
NOTES = (
    "paper: as published. legacy: scored as {legacy}, the paper's probable habits. fair: one scale for all images, "
    "noise unclipped. fitted: after the best gain and offset per image.",
    "±: half the 95 % interval, over test images of one seed or over several seeds. dB above limit: mean squared "
    "error against that of the best possible denoiser (bayes), on the same images.",
    "rank: 1 + the methods whose fair PSNR is higher by a paired 95 % interval that leaves out 0 (each pair on its "
    "own); reference rows have none, nor have methods on other images than most.",
    "SNBR': signal against noise and bias in the output, whatever its gain. noise energy: energy of what comes out of "
    "pure noise, per energy of the noise; a fixed image counts too (noise passed: without it). -: not stated, not "
    "built, not measured.",
)

Maker = Callable[[str, list[Column], list[Row], list[str], list[str]], str]


def load_records(spec: TableSpec, profile: str, results: Path) -> Found:
    """All readable records of a table; an unreadable file is left out (``status`` names it).

    Where nothing was run here, the committed record is taken. ``shipped`` says which of the two a record is.
    """
    found: Found = []
    own, shipped = sorted((results / spec.name / profile).glob("*.json")), records.shipped_records(spec.name, profile)
    for path in [*own, *shipped]:
        try:
            record = records.read_record(path)
        except BadFileError:
            continue
        record["shipped"] = path in shipped
        if not (record["shipped"] and any(r["status"] == "done" and _same_cell(r, record) for r in found)):
            found.append(record)
    return found


def _same_cell(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(a[k] == b[k] for k in ("specimen", "method", "seed"))


def records_shown(spec: TableSpec, profile: str, results: Path) -> dict[str, dict[str, Found]]:
    """Records by specimen and method, in the order of the table file, each marked ``stale`` or not.

    Specimens without a record are left out, unless there is none at all: then the stand-ins are there, empty.
    """
    found = load_records(spec, profile, results)
    recorded = {r["specimen"] for r in found}
    specimens = [s for s in spec.specimens if s in recorded] or [s for s in spec.specimens if spec.stands_in(s)]
    shown: dict[str, dict[str, Found]] = {s: {} for s in [*specimens, *sorted(recorded - set(spec.specimens))]}
    for record in found:
        record["stale"] = _is_stale(spec, record, results)
        shown[record["specimen"]].setdefault(record["method"], []).append(record)
    return shown


def measured(found: Found) -> Found:
    """The records whose numbers count, by seed: those of today's code and data, the stale ones only without others."""
    done = sorted((r for r in found if r["status"] == "done"), key=lambda r: r["seed"])
    return [r for r in done if not r["stale"]] or done


def table_rows(spec: TableSpec, profile: str, results: Path, convention: str | None = None) -> dict[str, list[Row]]:
    """Rows per specimen, in the order of the table file.

    convention is the legacy scoring shown beside ``fair``; default: the table's own. ``KEY_low`` and ``KEY_high`` are
    the bounds of the 95 % interval of KEY: over test images of one seed, over seeds where there are several.
    ``limit_seeds``: how many of the row's seeds are on the images of the bayes row, and so compared with it.
    """
    legacy = _legacy(spec, convention)
    table: dict[str, list[Row]] = {}
    for specimen, by_method in records_shown(spec, profile, results).items():
        published = [r["method"] for r in spec.published if r["dataset"] in (spec.dataset(specimen), "any")]
        extra = sorted(set(by_method) - set(spec.methods))
        methods = [m for m in spec.methods if m in published or m in all_methods() or m in by_method]
        counted = {m: measured(found) for m, found in by_method.items()}
        rank, limit = ranks(counted), counted.get("bayes", [])
        table[specimen] = []
        for method in [*methods, *extra]:
            found = counted.get(method, [])
            row = _row(spec, specimen, method, found, legacy)
            row["state"] = cell_state(method, by_method.get(method, []))
            row["rank"] = rank.get(method)
            _put(row, "excess_db", excess(found, limit))
            row["beats_limit_db"] = beats_limit(found, limit)
            row["limit_seeds"] = len(shared(found, limit)) if found and limit else None
            table[specimen].append(row)
    return table


def _legacy(spec: TableSpec, convention: str | None) -> str:
    legacy = convention or next((c for c in spec.conventions if c != "fair"), "fair")
    if legacy not in spec.conventions:
        raise CryobenchError(f"table {spec.name} has no convention {legacy!r}; it has {', '.join(spec.conventions)}")
    return legacy


def _is_stale(spec: TableSpec, record: dict[str, Any], results: Path) -> bool:
    """Whether a run would compute something else now; unknown (False) for specimens that are not here."""
    name = record["specimen"]
    if record["status"] != "done" or name not in spec.specimens or not available(name):
        return False
    if record["method"] not in all_methods():
        return False
    cell = Cell(spec.name, name, record["method"], record["profile"], record["seed"])
    return state_of(cell, shipped_dir() if record["shipped"] else results).state == "stale"


def cell_state(method: str, found: Found) -> str:
    """done, shipped, stale, failed, missing or not built, from all records of a cell."""
    if method not in all_methods():
        return "not built"
    counted = measured(found)
    if counted:
        return "stale" if counted[0]["stale"] else "done" if not all(r["shipped"] for r in counted) else "shipped"
    return "failed" if found else "missing"


def _row(spec: TableSpec, specimen: str, method: str, found: Found, legacy: str) -> Row:
    """One row without its comparisons; ``found`` are the records that count."""
    built = all_methods().get(method)
    row: Row = {k: None for c in COLUMNS for k in c.keys} | dict.fromkeys(("beats_limit_db", "limit_seeds", "shipped"))
    row |= {"specimen": specimen, "dataset": spec.dataset(specimen), "stand_in_for": spec.stands_in(specimen)}
    row |= {"method": method, "supervision": built.supervision if built else None}
    published = spec.published_row(specimen, method)
    for metric, value in (published or {"metrics": {}})["metrics"].items():
        row[f"published_{metric}"] = value
    if not found:
        return row
    for convention, prefix in (("fair", ""), (legacy, "legacy_")):
        for metric in SCORES:
            samples = values(found, convention, metric)
            if samples:
                _put(row, prefix + metric, summarise(samples))
    for name in INVENTION:
        row[name] = _mean([r["invention"].get(name) for r in found])
    row["fit_seconds"] = _mean([r["cost"]["fit_seconds"] for r in found])
    row["images_per_s"] = _mean([r["cost"]["denoise_images_per_s"] for r in found])
    row["train_images_per_s"] = _mean([r.get("fit", {}).get("images_per_second") for r in found])
    row["mfu"] = _mean([r.get("fit", {}).get("mfu") for r in found])
    row["parameters"] = found[0]["cost"]["parameters"]
    row["seeds"] = " ".join(str(r["seed"]) for r in found)
    row["shipped"] = " ".join(str(r["seed"]) for r in found if r["shipped"]) or None
    row["n"] = sum(len(v) for v in values(found, "fair", "psnr"))
    row["supervision"] = found[0]["supervision"]
    return row


def _put(row: Row, key: str, summary: dict[str, Any] | None) -> None:
    if summary:
        row[key], (row[f"{key}_low"], row[f"{key}_high"]) = summary["mean"], summary["ci95"]


def _mean(numbers: list[float | None]) -> float | None:
    known = [x for x in numbers if x is not None]
    return sum(known) / len(known) if known else None


def heading(spec: TableSpec, specimen: str, found: Found) -> str:
    """One line that says what the measured numbers of a specimen are: data, SNR, sizes, machine."""
    stands_in = spec.stands_in(specimen)
    name = f"{specimen} - STAND-IN for {stands_in}: the measured numbers are not of the paper's specimen"
    title = name if stands_in else f"{specimen} {spec.dataset(specimen)}".strip()
    mine = [r for r in found if r["specimen"] == specimen and r["status"] == "done"]
    mine = [r for r in mine if not r["shipped"]] or mine
    if not mine:
        return f"{title}; nothing measured yet"
    data = mine[0]["provenance"]["data"]
    sim = data["simulation"]
    devices = sorted({r["provenance"]["device"] for r in mine})
    return (
        f"{title}; {sim['size']} px at {sim['pixel_size']:g} A, SNR {sim['snr']:g} (var(clean)/var(noise), whole "
        f"stack), {sim['noise']} noise, {'CTF' if sim['ctf'] else 'no CTF'}, {data['n_test']} test images per seed, "
        f"on {', '.join(devices)}"
    )


def origin(specimen: str, found: Found) -> list[str]:
    """What the star at a method stands for: one line where a specimen has committed records, none where not."""
    made: dict[str, Found] = {}
    for r in found:
        if r["specimen"] == specimen and r["shipped"]:
            made.setdefault(r["provenance"]["device"], []).append(r["provenance"])
    places = []
    for device, runs in made.items():
        commits = sorted({p["commit"][:9] for p in runs})
        days = sorted({p["utc"][:10] for p in runs})
        at = commits[0] + (f" and {len(commits) - 1} more" if len(commits) > 1 else "")
        places.append(f"{device}, commit {at}, {' to '.join(dict.fromkeys((days[0], days[-1])))}")
    return [f"*: committed record, made elsewhere ({'; '.join(places)}); not run on this machine"] if places else []


def warnings(table: str, rows: list[Row]) -> list[str]:
    """What is wrong with the rows of a specimen, one line each."""
    found = [
        f"{table} {r['specimen']} {r['method']} beats the Bayes limit by {r['beats_limit_db']:.2f} dB: "
        "a bug in one of the two"
        for r in rows
        if r["beats_limit_db"] is not None
    ]
    where = f"{table} {rows[0]['specimen']}"
    others = [r["method"] for r in rows if r["limit_seeds"] == 0]
    if others:
        found.append(f"{where}: not on the images of the bayes row, so not compared with it: {', '.join(others)}")
    for row in rows:
        seeds = len((row["seeds"] or "").split())
        if row["limit_seeds"] and row["limit_seeds"] < seeds:
            found.append(f"{where} {row['method']} compared with the limit on {row['limit_seeds']} of {seeds} seeds")
    return found


def table_text(
    name: str,
    profile: str,
    results: Path,
    form: str = "text",
    convention: str | None = None,
    wide: bool = False,
    runs: str = "",
) -> str:
    """The whole table as text, csv, html, latex or json. ``wide`` shows all columns; ``runs`` is the address of
    the pages of the runs, which html then links each measured method to."""
    spec = load_table(name)
    table = table_rows(spec, profile, results, convention)
    found = load_records(spec, profile, results)
    headings = {s: heading(spec, s, found) for s in table}
    wrong = {s: warnings(name, rows) for s, rows in table.items()}
    if form == "json":
        loud = [w for lines in wrong.values() for w in lines]
        whole = {"table": name, "profile": profile, "headings": headings, "warnings": loud, "rows": table}
        whole["notes"] = [line for s in table for line in origin(s, found)]
        return json.dumps(whole, indent=1)
    if form == "csv":
        return csv_table([row for rows in table.values() for row in rows])
    columns = [c for c in COLUMNS if c.narrow or wide]
    columns = [c for c in columns if any(r[c.key] is not None for rows in table.values() for r in rows)]
    pages = f"{runs}/{name}" if runs else ""
    makers: dict[str, Maker] = {"text": text_table, "html": partial(html_table, runs=pages), "latex": latex_table}
    parts = [makers[form](headings[s], columns, rows, wrong[s], origin(s, found)) for s, rows in table.items()]
    notes = [n.format(legacy=_legacy(spec, convention)) for n in NOTES]
    if form == "text":
        title = f"{spec.paper['title']} ({spec.paper['year']}), profile {profile}"
        return "\n\n".join([title, *parts, "\n".join(textwrap.fill(n, WIDTH) for n in notes)])
    if form == "html":
        parts.append(f'<p class="cryobench-note">{html.escape(" ".join(notes))}</p>')
    return "\n".join(parts)
