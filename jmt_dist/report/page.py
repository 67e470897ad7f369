"""The HTML report: one file that needs nothing but itself, no network and no server. plotly.js is inside; the mouse works."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from jmt_dist.report.figures import Figure
from jmt_dist.report.tables import Table
from jmt_dist.report.traces import Trace

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1b1b1b;background:#fff;max-width:1160px;margin:2.5em auto;padding:0 1.5em}
h1{font-size:1.6em;margin-bottom:.1em}h2{font-size:1.15em;margin-top:2.2em}.sub{color:#5f5f5f;margin-top:0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.93em}
th,td{padding:.35em .8em;text-align:left;border-bottom:1px solid #e3e3e3}th{border-bottom:2px solid #1b1b1b}
td{white-space:nowrap}td.reason{color:#a33a00;white-space:normal}.note{color:#5f5f5f;font-size:.88em;max-width:62em}
.omissions,.notice{border-left:4px solid #d55e00;background:#fdf3ec;padding:.6em 1em;margin:1em 0}
figure{margin:1.2em 0}details{margin-top:2em}pre{font-size:.85em;overflow-x:auto;background:#f6f6f6;padding:1em}
.wide{overflow-x:auto}.unit{display:grid;grid-template-columns:minmax(0,1fr) 130px;gap:1em;align-items:center}
.unit img{width:112px;height:112px;background:#eee;display:block}.unit aside{font-size:.85em;min-height:9em}
.bare{grid-template-columns:minmax(0,1fr)}.bare aside{min-height:0}
"""

# the cursor's frame: its picture (the nearest that is embedded) and its numbers
SCRIPT = """
const config = {displaylogo: false, responsive: true, modeBarButtonsToRemove: ["sendDataToCloud", "lasso2d", "select2d"]};
for (const [id, figure] of Object.entries(figures)) Plotly.newPlot(id, figure.data, figure.layout, config);
for (const [id, frames] of Object.entries(pictures)) {
  const known = Object.keys(frames).map(Number), plot = document.getElementById(id), side = plot.parentElement.querySelector("aside");
  if (known.length) side.querySelector("img").src = frames[known[0]];
  plot.on("plotly_hover", event => {
    const frame = event.points[0].x;
    side.querySelector("p").textContent = `frame ${frame}`;
    if (!known.length) return;
    const nearest = known.reduce((best, one) => Math.abs(one - frame) < Math.abs(best - frame) ? one : best);
    side.querySelector("img").src = frames[nearest];
    side.querySelector("p").textContent = `frame ${frame}` + (nearest === frame ? "" : `, picture of ${nearest}`);
  });
}
"""


@dataclass
class Content:
    """What a page shows, in its order: tables and (caption, figure), then the traces of units."""

    title: str
    subtitle: str
    parts: list[Table | tuple[str, Figure]] = field(default_factory=list)
    traces: list[Trace] = field(default_factory=list)
    notice: str = ""  # about the traces' pictures
    omissions: list[str] = field(default_factory=list)
    recipe: Mapping[str, str] = field(default_factory=dict)


def page(content: Content) -> str:
    """The whole file, about 5 MB: nearly all of it is plotly.js."""
    from plotly.offline import get_plotlyjs

    figures: dict[str, Figure] = {}
    body = [*_head(content), *(_part(part, figures) for part in content.parts)]
    pictures: dict[str, dict[int, str]] = {}
    if content.traces:
        body += _traces(content, figures, pictures)
    if content.recipe:
        lines = html.escape("\n".join(f"{key} = {value}" for key, value in content.recipe.items()))
        body.append(f"<details><summary>Recipe</summary><pre>{lines}</pre></details>")
    scripts = [f"<script>{get_plotlyjs()}</script>"] if figures else []
    if figures:
        scripts.append(f"<script>const figures = {_json(figures)}, pictures = {_json(pictures)};{SCRIPT}</script>")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(content.title)}</title>'
    head += f'<link rel="icon" href="data:,"><style>{STYLE}</style>'  # without an icon of its own a browser asks for one
    text = "\n".join([*body, *scripts])
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{text}\n</body></html>\n'


def _head(content: Content) -> list[str]:
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    parts = [f"<h1>{html.escape(content.title)}</h1>", f'<p class="sub">{html.escape(content.subtitle)} · {made}</p>']
    if content.omissions:
        items = "".join(f"<li>{html.escape(line)}</li>" for line in content.omissions)
        parts.append(f'<div class="omissions"><strong>Missing here</strong><ul>{items}</ul></div>')
    return parts


def _part(part: Table | tuple[str, Figure], figures: dict[str, Figure]) -> str:
    if isinstance(part, Table):
        return html_table(part)
    caption, figure = part
    return f"<h2>{html.escape(caption)}</h2><figure>{_place(figure, figures)}</figure>"


def _place(figure: Figure, figures: dict[str, Figure]) -> str:
    name = f"figure{len(figures)}"
    figures[name] = figure
    return f'<div id="{name}" style="height:{figure["layout"]["height"]}px"></div>'


def _traces(content: Content, figures: dict[str, Figure], pictures: dict[str, dict[int, str]]) -> list[str]:
    parts = ["<h2>Units over time: prediction and annotation</h2>"]
    if content.notice:
        parts.append(f'<div class="notice">{html.escape(content.notice)}</div>')
    for trace in content.traces:
        place = _place(trace.figure, figures)
        pictures[f"figure{len(figures) - 1}"] = trace.pictures
        image = '<img alt="face under the cursor">' if trace.pictures else ""
        kind = "unit" if trace.pictures else "unit bare"
        title = html.escape(trace.title)
        parts.append(f'<h3>{title}</h3><div class="{kind}">{place}<aside>{image}<p>move the mouse over the curves</p></aside></div>')
    return parts


def html_table(table: Table) -> str:
    """A table with its title and note."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in table.columns)
    body = []
    for i, row in enumerate(table.rows):
        missing = len(row) > 3 and row[1] and row[2] == "" and row[3] == ""
        cells = []
        for j, cell in enumerate(row):
            text = html.escape(cell)
            text = f"<strong>{text}</strong>" if (i, j) in table.bold else text
            cells.append(f'<td class="reason">{text}</td>' if missing and j == 1 else f"<td>{text}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    return f'<h2>{html.escape(table.title)}</h2><div class="wide"><table><tr>{head}</tr>{"".join(body)}</table></div>{note}'


def _json(values: object) -> str:
    """JSON that may stand in a script element, whatever its texts say."""
    return json.dumps(values, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
