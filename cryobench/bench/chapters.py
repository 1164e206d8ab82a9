"""What the chapters show of tables: HTML that needs no script."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from IPython.display import HTML

from cryobench.bench.report import table_text


def show_tables(
    names: Sequence[str], profile: str, results: str, convention: str | None = None, wide: bool = False, top: str = "."
) -> HTML:
    """Published beside measured; each measured method links to its executed notebook (``top``: way to the root)."""
    parts = [table_text(name, profile, Path(results), "html", convention, wide, runs=f"{top}/runs") for name in names]
    return HTML("\n".join(parts))


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
