"""The report's index page."""

from __future__ import annotations

import html
from typing import Any

from .figures import label_of

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse } th, td { padding: .25rem .8rem; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left } img { max-width: 100%; height: auto }
figure { margin: 1.5rem 0 } figcaption { color: #555 } code { background: #f4f4f4; padding: 0 .25rem }
"""


def render(report: dict[str, Any]) -> str:
    """The HTML of a report as `report.write_report` builds it."""
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>kdops demo</title>",
        f"<style>{_STYLE}</style><h1>Distilling a detector with kdops</h1>",
        f"<p>{html.escape(report['summary'])}</p>",
        _table(("network", "backbone", "parameters", "GFLOP / image", *_FIGURES), _network_rows(report)),
        "<h2>Stages</h2>",
        _table(("network", "stage", "epochs", "ms / step", "AP"), _stage_rows(report)),
    ]
    for picture in report["pictures"]:
        name, caption = html.escape(picture["file"]), html.escape(picture["caption"])
        parts.append(f"<figure><img src='{name}' alt='{caption}'><figcaption>{caption}</figcaption></figure>")
    rows = [(key, html.escape(str(value))) for key, value in {**report["settings"], **report["versions"]}.items()]
    parts += ["<h2>Settings and versions</h2>", _table(("name", "value"), rows)]
    parts.append("<p>All figures: <a href='report.json'>report.json</a></p></html>")
    return "\n".join(parts)


def table_text(report: dict[str, Any]) -> str:
    """The table of networks and stages for the terminal."""
    lines = [f"{'network':<18} {'backbone':<9} {'params':>8} {'GFLOP':>6} {'AP':>6} {'AP50':>6} {'AP75':>6}"]
    for name, run in report["runs"].items():
        figures = " ".join(f"{_number(run['final'][key]):>6}" for key in ("AP", "AP50", "AP75"))
        size = f"{run['parameters'] / 1e6:>7.2f}M {run['gflop_per_image']:>6.2f}"
        lines.append(f"{label_of(name):<18} {run['backbone']:<9} {size} {figures}")
        if len(run["stages"]) > 1:
            lines += [f"    after {stage['stage']}: AP {_number(stage['AP'])}" for stage in run["stages"]]
    return "\n".join(lines)


_FIGURES = ("AP", "AP50", "AP75", "AR100")


def _network_rows(report: dict[str, Any]):
    for name, run in report["runs"].items():
        size = (f"{run['parameters'] / 1e6:.2f} M", f"{run['gflop_per_image']:.2f}")
        yield (label_of(name), run["backbone"], *size, *(_number(run["final"][key]) for key in _FIGURES))


def _stage_rows(report: dict[str, Any]):
    for name, run in report["runs"].items():
        for stage in run["stages"]:
            yield (label_of(name), stage["stage"], stage["epochs"], f"{stage['step_ms']:.0f}", _number(stage["AP"]))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _table(head, rows) -> str:
    lines = ["<table><tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows]
    return "\n".join([*lines, "</table>"])
