"""Rows of a table as text, HTML, LaTeX or CSV."""

from __future__ import annotations

import csv
import html
import io
import textwrap
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]

#: a terminal that shows the table without --wide
WIDTH = 150


@dataclass(frozen=True)
class Column:
    """A column: key in the row, heading (two lines at most), format of its values, shown without --wide or not.

    interval: the row has KEY_low and KEY_high too, shown as ± half of what lies between them.
    """

    key: str
    title: str
    style: str = ""
    narrow: bool = True
    interval: bool = False

    def text(self, row: Row) -> str:
        value = row[self.key]
        if value is None:
            return "-"
        shown = format(value, self.style) if self.style else str(value)
        if self.key == "method" and row["shipped"]:
            shown += "*"
        low, high = (row[f"{self.key}_{end}"] if self.interval else None for end in ("low", "high"))
        if low is None or high is None:
            return shown
        return f"{shown}±{format((high - low) / 2, '.1e' if 'e' in self.style else self.style)}"

    @property
    def keys(self) -> list[str]:
        return [self.key, f"{self.key}_low", f"{self.key}_high"] if self.interval else [self.key]


COLUMNS = (
    Column("method", "method"),
    Column("supervision", "sees"),
    Column("published_mse", "paper\nMSE", ".3e", narrow=False),
    Column("published_psnr", "paper\nPSNR", ".2f"),
    Column("published_ssim", "paper\nSSIM", ".3f"),
    Column("legacy_mse", "legacy\nMSE", ".3e", narrow=False, interval=True),
    Column("legacy_psnr", "legacy\nPSNR", ".2f", interval=True),
    Column("legacy_ssim", "legacy\nSSIM", ".3f", narrow=False, interval=True),
    Column("mse", "fair\nMSE", ".3e", narrow=False, interval=True),
    Column("psnr", "fair\nPSNR", ".2f", interval=True),
    Column("ssim", "fair\nSSIM", ".3f", interval=True),
    Column("psnr_fit", "fitted\nPSNR", ".2f", interval=True),
    Column("excess_db", "dB above\nlimit", ".2f", interval=True),
    Column("rank", "rank", "d"),
    Column("snbr_scale_free", "SNBR'", ".2f"),
    Column("noise_energy", "noise\nenergy", ".4f"),
    Column("noise_passed", "noise\npassed", ".4f", narrow=False),
    Column("noise_correlation", "noise\ncorrelation", ".3f", narrow=False),
    Column("noise_correlation_null", "its\nnull", ".3f", narrow=False),
    Column("fit_seconds", "fit\ns", ".0f"),
    Column("images_per_s", "images\n/s", ".0f"),
    Column("train_images_per_s", "training\nimages/s", ".0f", narrow=False),
    Column("mfu", "MFU", ".1%", narrow=False),
    Column("parameters", "parameters", "d", narrow=False),
    Column("seeds", "seeds", "", narrow=False),
    Column("n", "n", "d", narrow=False),
    Column("state", ""),
)


def text_table(title: str, columns: list[Column], rows: list[Row], warnings: list[str], notes: list[str]) -> str:
    heads = [("\n" + c.title).split("\n")[-2:] for c in columns]
    lines = [list(line) for line in zip(*heads, strict=True)] + [[c.text(r) for c in columns] for r in rows]
    widths = [max(len(line[k]) for line in lines) for k in range(len(columns))]
    # words to the left, numbers to the right
    body = [
        "  ".join(f"{t:>{w}}" if c.style else f"{t:<{w}}" for t, w, c in zip(line, widths, columns, strict=True))
        for line in lines
    ]
    lines_of_text = [textwrap.fill(title, WIDTH), *(line.rstrip() for line in body)]
    return "\n".join([*lines_of_text, *(f"WARNING: {w}" for w in warnings), *(textwrap.fill(n, WIDTH) for n in notes)])


def html_table(
    title: str, columns: list[Column], rows: list[Row], warnings: list[str], notes: list[str], runs: str = ""
) -> str:
    """``runs``: address of the pages of the runs, which each measured method then links to."""
    head = "".join(f"<th>{html.escape(c.title).replace(chr(10), '<br>')}</th>" for c in columns)
    lines = []
    for row in rows:
        shown = [html.escape(c.text(row)) for c in columns]
        # the interval below its value: narrower
        shown = [f"{t.replace('±', '<br><small>±')}</small>" if "±" in t else t for t in shown]
        if runs and row["seeds"]:
            page = f"{runs}/{row['specimen']}__{row['method']}__s{row['seeds'].split()[0]}.html"
            shown[0] = f'<a href="{html.escape(page)}" title="the executed notebook">{shown[0]}</a>'
        lines.append("<tr>" + "".join(f"<td>{text}</td>" for text in shown) + "</tr>")
    body = "\n".join(lines)
    table = f'<table class="cryobench">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>'
    loud = "".join(f'<p class="cryobench-warning">WARNING: {html.escape(w)}</p>\n' for w in warnings)
    quiet = "".join(f'\n<p class="cryobench-note">{html.escape(n)}</p>' for n in notes)
    return f'<p class="cryobench-title">{html.escape(title)}</p>\n{loud}<div class="cryobench">{table}</div>{quiet}'


def latex_table(title: str, columns: list[Column], rows: list[Row], warnings: list[str], notes: list[str]) -> str:
    def line(cells: list[str]) -> str:
        safe = [t.replace("%", r"\%").replace("_", r"\_").replace("±", r"$\pm$") for t in cells]
        return " & ".join(safe) + r" \\"

    form = "".join("r" if c.style else "l" for c in columns)
    top = [f"% {title}", *(f"% WARNING: {w}" for w in warnings), *(f"% {n}" for n in notes)]
    top += [rf"\begin{{tabular}}{{{form}}}", r"\hline"]
    top += [line([c.title.replace("\n", " ") for c in columns]), r"\hline"]
    return "\n".join([*top, *(line([c.text(r) for c in columns]) for r in rows), r"\hline", r"\end{tabular}"])


def csv_table(rows: list[Row]) -> str:
    """All columns; an interval as two columns of numbers."""
    out = io.StringIO()
    names = ["specimen", "dataset", "stand_in_for", *(k for c in COLUMNS for k in c.keys), "beats_limit_db", "shipped"]
    writer = csv.DictWriter(out, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().rstrip("\n")
