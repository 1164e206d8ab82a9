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
from cryobench.bench.report import table_text
from cryobench.plots import Figure


def show_tables(
    names: Sequence[str], profile: str, results: str, convention: str | None = None, wide: bool = False, top: str = "."
) -> HTML:
    """Published beside measured; each measured method links to its executed notebook (``top``: way to the root)."""
    parts = [table_text(name, profile, Path(results), "html", convention, wide, runs=f"{top}/runs") for name in names]
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
