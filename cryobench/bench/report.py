"""A table as a view of records: measured beside published, with intervals, supervision and cost."""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cryobench.bench import records
from cryobench.bench.experiment import Cell
from cryobench.bench.plan import state_of
from cryobench.bench.tables import TableSpec, load_table
from cryobench.errors import BadFileError, CryobenchError
from cryobench.methods.registry import all_methods
from cryobench.metrics.bootstrap import summarise
from cryobench.specimens.catalog import available

FAIR = ("mse", "psnr", "ssim", "psnr_fit")


@dataclass(frozen=True)
class Column:
    """A column of the table: key in the row, heading, format of its values, shown without --wide or not."""

    key: str
    title: str
    style: str = ""
    narrow: bool = True


COLUMNS = (
    Column("method", "method"),
    Column("supervision", "sees"),
    Column("published_mse", "paper MSE", ".3e"),
    Column("published_psnr", "paper PSNR", ".2f"),
    Column("published_ssim", "paper SSIM", ".3f"),
    Column("legacy_mse", "legacy MSE", ".3e", narrow=False),
    Column("legacy_psnr", "legacy PSNR", ".2f"),
    Column("legacy_ssim", "legacy SSIM", ".3f", narrow=False),
    Column("mse", "MSE", ".3e"),
    Column("psnr", "PSNR", ".2f"),
    Column("psnr_interval", "95 %"),
    Column("ssim", "SSIM", ".3f"),
    Column("psnr_fit", "PSNR fit", ".2f"),
    Column("excess_db", "dB over limit", ".2f", narrow=False),
    Column("noise_energy", "noise energy", ".4f", narrow=False),
    Column("fit_seconds", "fit s", ".1f"),
    Column("images_per_s", "images/s", ".0f"),
    Column("parameters", "parameters", "d", narrow=False),
    Column("seeds", "seeds", "", narrow=False),
    Column("n", "n", "d", narrow=False),
    Column("state", "state"),
)


Maker = Callable[[str, list[Column], list[dict[str, Any]]], str]


def load_records(spec: TableSpec, profile: str, results: Path) -> list[dict[str, Any]]:
    """All readable records of a table; an unreadable file is left out (``status`` names it)."""
    found = []
    for path in sorted((results / spec.name / profile).glob("*.json")):
        try:
            found.append(records.read_record(path))
        except BadFileError:
            continue
    return found


def table_rows(
    spec: TableSpec, profile: str, results: Path, convention: str | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Rows per specimen, in the order of the table file; several seeds are pooled.

    convention is the legacy scoring shown beside ``fair``; default: the table's own.
    """
    legacy = convention or next((c for c in spec.conventions if c != "fair"), "fair")
    if legacy not in spec.conventions:
        raise CryobenchError(f"table {spec.name} has no convention {legacy!r}; it has {', '.join(spec.conventions)}")
    by_cell: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in load_records(spec, profile, results):
        record["stale"] = _is_stale(spec, record, results)
        by_cell.setdefault((record["specimen"], record["method"]), []).append(record)
    recorded = [s for s, _ in by_cell]
    specimens = [s for s in spec.specimens if s in recorded] or [s for s in spec.specimens if spec.stands_in(s)]
    specimens += sorted({s for s in recorded if s not in spec.specimens})
    table = {}
    for specimen in specimens:
        published = [r["method"] for r in spec.published if r["dataset"] in (spec.dataset(specimen), "any")]
        extra = sorted({m for s, m in by_cell if s == specimen} - set(spec.methods))
        methods = [m for m in spec.methods if m in published or m in all_methods() or (specimen, m) in by_cell]
        rows = [_row(spec, specimen, m, by_cell.get((specimen, m), []), legacy) for m in [*methods, *extra]]
        limit = next((r["mse"] for r in rows if r["method"] == "bayes"), None)
        for row in rows:
            if limit and row["mse"]:
                row["excess_db"] = 10 * float(np.log10(row["mse"] / limit))
        table[specimen] = rows
    return table


def _is_stale(spec: TableSpec, record: dict[str, Any], results: Path) -> bool:
    """Whether a run would compute something else now; unknown (False) for specimens that are not here."""
    name = record["specimen"]
    if record["status"] != "done" or name not in spec.specimens or not available(name):
        return False
    if record["method"] not in all_methods():
        return False
    cell = Cell(spec.name, name, record["method"], record["profile"], record["seed"])
    return state_of(cell, results).state == "stale"


def _row(spec: TableSpec, specimen: str, method: str, found: list[dict[str, Any]], legacy: str) -> dict[str, Any]:
    built = all_methods().get(method)
    row: dict[str, Any] = {c.key: None for c in COLUMNS}
    row |= {"specimen": specimen, "dataset": spec.dataset(specimen), "stand_in_for": spec.stands_in(specimen)}
    row |= {"method": method, "supervision": built.supervision if built else None, "state": "not built"}
    published = spec.published_row(specimen, method)
    for metric, value in (published or {"metrics": {}})["metrics"].items():
        row[f"published_{metric}"] = value
    done = [r for r in found if r["status"] == "done"]
    # numbers of another code or other data are not averaged with those of today
    done = [r for r in done if not r["stale"]] or done
    if built:
        row["state"] = "stale" if done and done[0]["stale"] else "done" if done else "failed" if found else "missing"
    if not done:
        return row
    for convention, prefix in (("fair", ""), (legacy, "legacy_")):
        for metric in FAIR:
            values = [
                torch.from_numpy(records.unpack(r["per_image"][convention][metric]).copy())
                for r in done
                if metric in r["per_image"].get(convention, {})
            ]
            if values:
                summary = summarise(torch.cat(values))
                row[prefix + metric] = summary["mean"]
                if prefix + metric == "psnr" and summary["ci95"][0] is not None:
                    row["psnr_interval"] = "{:.2f}..{:.2f}".format(*summary["ci95"])
                    row["n"] = summary["n"]
    costs = [r["cost"] for r in done]
    row["fit_seconds"] = sum(c["fit_seconds"] for c in costs) / len(costs)
    row["images_per_s"] = sum(c["denoise_images_per_s"] for c in costs) / len(costs)
    row["parameters"] = costs[0]["parameters"]
    row["noise_energy"] = sum(r["invention"]["noise_energy"] for r in done) / len(done)
    row["seeds"] = " ".join(str(r["seed"]) for r in done)
    row["supervision"] = done[0]["supervision"]
    return row


def heading(spec: TableSpec, specimen: str, found: list[dict[str, Any]]) -> str:
    """One line that says what the measured numbers of a specimen are: data, SNR, sizes, machine."""
    stands_in = spec.stands_in(specimen)
    name = f"{specimen} - STAND-IN for {stands_in}: the measured numbers are not of the paper's specimen"
    title = name if stands_in else f"{specimen} {spec.dataset(specimen)}".strip()
    mine = [r for r in found if r["specimen"] == specimen and r["status"] == "done"]
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


def _text_of(value: Any, style: str) -> str:
    if value is None:
        return "-"
    return format(value, style) if style else str(value)


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
    if form == "json":
        return json.dumps({"table": name, "profile": profile, "headings": headings, "rows": table}, indent=1)
    if form == "csv":
        return _csv(table)
    columns = [c for c in COLUMNS if c.narrow or wide]
    columns = [c for c in columns if wide or any(r[c.key] is not None for rows in table.values() for r in rows)]
    pages = f"{runs}/{name}" if runs else ""
    makers: dict[str, Maker] = {"text": _text, "html": partial(_html, runs=pages), "latex": _latex}
    make = makers[form]
    parts = [make(headings[s], columns, table[s]) for s in table]
    legacy = convention or next((c for c in spec.conventions if c != "fair"), "fair")
    note = (
        f"legacy: scored as {legacy}; MSE, PSNR and SSIM without it: fair. 95 %: of the mean over images. "
        "'-': not stated, not built or not measured."
    )
    if form == "text":
        title = f"{spec.paper['title']} ({spec.paper['year']}), profile {profile}"
        return "\n\n".join([title, *parts, note])
    return "\n".join(parts)


def _cells(columns: list[Column], rows: list[dict[str, Any]]) -> list[list[str]]:
    return [[_text_of(row[c.key], c.style) for c in columns] for row in rows]


def _text(title: str, columns: list[Column], rows: list[dict[str, Any]]) -> str:
    lines = [[c.title for c in columns], *_cells(columns, rows)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(columns))]
    # words to the left, numbers to the right
    body = [
        "  ".join(f"{t:<{w}}" if not c.style else f"{t:>{w}}" for t, w, c in zip(line, widths, columns, strict=True))
        for line in lines
    ]
    return "\n".join([title, *(line.rstrip() for line in body)])


def _html(title: str, columns: list[Column], rows: list[dict[str, Any]], runs: str) -> str:
    head = "".join(f"<th>{html.escape(c.title)}</th>" for c in columns)
    lines = []
    for row, cells in zip(rows, _cells(columns, rows), strict=True):
        shown = [html.escape(text) for text in cells]
        if runs and row["seeds"]:
            page = f"{runs}/{row['specimen']}__{row['method']}__s{row['seeds'].split()[0]}.html"
            shown[0] = f'<a href="{html.escape(page)}" title="the executed notebook">{shown[0]}</a>'
        lines.append("<tr>" + "".join(f"<td>{text}</td>" for text in shown) + "</tr>")
    body = "\n".join(lines)
    table = f'<table class="cryobench">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>'
    return f'<p class="cryobench-title">{html.escape(title)}</p>\n<div class="cryobench">{table}</div>'


def _latex(title: str, columns: list[Column], rows: list[dict[str, Any]]) -> str:
    def line(cells: list[str]) -> str:
        return " & ".join(t.replace("%", r"\%").replace("_", r"\_") for t in cells) + r" \\"

    form = "".join("r" if c.style else "l" for c in columns)
    caption = title.replace("%", r"\%").replace("_", r"\_")
    body = [line(cells) for cells in _cells(columns, rows)]
    top = [rf"% {caption}", rf"\begin{{tabular}}{{{form}}}", r"\hline", line([c.title for c in columns]), r"\hline"]
    return "\n".join([*top, *body, r"\hline", r"\end{tabular}"])


def _csv(table: dict[str, list[dict[str, Any]]]) -> str:
    out = io.StringIO()
    names = ["specimen", "dataset", "stand_in_for", *(c.key for c in COLUMNS)]
    writer = csv.DictWriter(out, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for rows in table.values():
        writer.writerows(rows)
    return out.getvalue().rstrip("\n")
