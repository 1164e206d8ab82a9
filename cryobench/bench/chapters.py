"""What the chapters show of records: tables in HTML that needs no script, and images."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from IPython.display import HTML

from cryobench import plots
from cryobench.bench.records import read_samples, record_path
from cryobench.bench.report import cell_state, measured, records_shown, table_text
from cryobench.bench.tables import TableSpec
from cryobench.metrics import audit
from cryobench.plots import Figure


def show_tables(
    names: Sequence[str], profile: str, results: str, convention: str | None = None, wide: bool = False, top: str = "."
) -> HTML:
    """Published beside measured; each measured method links to its executed notebook (``top``: way to the root; empty
    for a profile that the book has no such pages of)."""
    runs = f"{top}/runs" if top else ""
    parts = [table_text(name, profile, Path(results), "html", convention, wide, runs=runs) for name in names]
    return HTML("\n".join(parts))


def gallery(table: str, specimen: str, methods: Sequence[str], profile: str, results: str) -> Figure:
    """The same particles clean, noisy and as each method recorded them; methods without a run are left out."""
    stacks: dict[str, torch.Tensor] = {}
    for method in methods:
        path = record_path(Path(results), table, profile, specimen, method, 0)
        samples = read_samples(path)
        for name in ("clean", "noisy") if samples and not stacks else ():
            stacks[name] = torch.from_numpy(samples[name])
        if samples:
            stacks[method] = torch.from_numpy(samples["denoised"])
    return plots.images(stacks)


def show_rows(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, tuple[str, str]]) -> HTML:
    """Plain rows as a table; columns: key -> (heading, format), in order."""
    head = "".join(f"<th>{html.escape(title)}</th>" for title, _ in columns.values())
    body = []
    for row in rows:
        cells = []
        for key, (_, style) in columns.items():
            value = row[key]
            text = "-" if value is None else format(value, style) if style else str(value)
            cells.append(f"<td>{html.escape(text)}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    table = f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody>"
    return HTML(f'<div class="cryobench"><table class="cryobench">{table}</table></div>')


def audit_rows(spec: TableSpec, profile: str, results: str) -> list[dict[str, Any]]:
    """Each published row beside our own run of it: one row a published row and specimen that stands beside it.

    :func:`~cryobench.metrics.audit.implied` of the printed numbers; :func:`~cryobench.metrics.audit.closest` over the
    conventions of our records, means over seeds; ``fair_psnr`` and ``fair_gap`` = published - ours; ``state``: what
    there is of our run.
    """
    shown = records_shown(spec, profile, Path(results))
    rows = []
    for row in spec.published:
        stands_for = [s for s in spec.specimens if row["dataset"] in (spec.dataset(s), "any")]
        # without any run, the specimen that is always here stands beside the row
        for specimen in [s for s in stands_for if s in shown] or stands_for[:1]:
            records = shown.get(specimen, {}).get(row["method"], [])
            ours = _means(measured(records))
            fair, printed = ours.get("fair", {}).get("psnr"), row["metrics"].get("psnr")
            rows.append(
                {"table": spec.name, "specimen": specimen, **audit.implied([row])[0]}
                | audit.closest(row["metrics"], ours)
                | {"fair_psnr": fair, "fair_gap": None if None in (fair, printed) else printed - fair}
                | {"state": cell_state(row["method"], records)}
            )
    return rows


def _means(found: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Convention -> metric -> mean over seeds, of what is finite."""
    means: dict[str, dict[str, float]] = {}
    for convention in found[0]["metrics"] if found else ():
        scores = [r["metrics"].get(convention, {}) for r in found]
        for metric in scores[0]:
            values = [s[metric]["mean"] for s in scores if metric in s]
            if None not in values:
                means.setdefault(convention, {})[metric] = sum(values) / len(values)
    return means
