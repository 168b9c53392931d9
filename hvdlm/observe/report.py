"""``hvdlm report``: one HTML page about one run or several, with everything in it."""

from __future__ import annotations

import datetime
import html
from collections.abc import Sequence
from typing import Any

from hvdlm.algorithms.stragglers import Times, explain
from hvdlm.observe.charts import bars, lines, number
from hvdlm.observe.runs import Run

__all__ = ["render"]

_STYLE = """
:root{--ink:#0f172a;--soft:#64748b;--line:#e2e8f0;--card:#fff;--page:#f6f7f9;--good:#047857;--bad:#b91c1c}
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1080px;margin:0 auto;padding:28px 20px 56px}h1{font-size:1.6rem;margin:0;line-height:1.25;
overflow-wrap:anywhere}h2{font-size:1.15rem;margin:40px 0 12px}p{margin:4px 0}.soft,small{color:var(--soft)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:20px 0}
.tile,figure,.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px;margin:0}
.tile b{display:block;font-size:1.35rem;line-height:1.3;font-variant-numeric:tabular-nums}
.tile span{color:var(--soft);font-size:.85rem}
.good{color:var(--good)}.bad{color:var(--bad)}.grid2{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr));
gap:14px}figcaption{font-weight:600;margin-bottom:6px}svg{width:100%;height:auto;
display:block;overflow:visible}
svg .grid{stroke:var(--line)}svg .tick,svg .axis{font-size:12px;fill:var(--soft)}
.keys{display:flex;flex-wrap:wrap;gap:4px 14px;font-size:.85rem;margin-bottom:4px}
.key i{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:6px}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;
font-size:.92rem}th,td{text-align:left;padding:6px 14px 6px 0;border-bottom:1px solid var(--line);vertical-align:top}
th{color:var(--soft);font-weight:600}td.num,th.num{text-align:right;font-variant-numeric:tabular-nums}
.say{border-left:4px solid #ea580c;padding-left:12px;margin:14px 0}
@media(max-width:600px){svg .tick,svg .axis{font-size:19px}}
@media print{body{background:#fff;font-size:11pt}main{max-width:none;padding:0}figure,.tile,.card,tr{break-inside:avoid}
.grid2{grid-template-columns:1fr 1fr}h2{break-after:avoid}}
"""


def render(runs: Sequence[Run]) -> str:
    """The page."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    body = _compared(runs) if len(runs) > 1 else ""
    for run in runs:
        body += _one(run, heading=len(runs) > 1)
    made = datetime.datetime.now().strftime("%Y-%m-%d %H:%M")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width,initial-scale=1"><title>{html.escape(title)} · hvdlm</title>'
        f'<link rel="icon" href="data:,"><style>{_STYLE}</style></head><body><main><h1>{html.escape(title)}</h1>'
        f'<p class="soft">hvdlm report of {made}</p>{body}</main></body></html>'
    )


def _tiles(run: Run) -> str:
    s = run.summary
    tiles: list[tuple[str, str, str]] = []
    if "world_size" in s:
        tiles.append((f"{s['world_size']}", f"workers, {s.get('framework', '')}", ""))
    for name, label in (("steps", "steps"), ("samples_seen", "samples seen")):
        if isinstance(s.get(name), int):
            tiles.append((number(s[name]), label, ""))
    if isinstance(s.get("samples_per_second"), (int, float)):
        tiles.append((number(s["samples_per_second"]), "samples a second", ""))
    if isinstance(s.get("loss_last"), (int, float)):
        tiles.append((number(s["loss_last"]), f"loss, from {number(s['loss_first'])}", ""))
    if s.get("samples_missing") is not None:
        wrong = s["samples_missing"] + (s.get("samples_repeated") or 0)
        tiles.append((f"{s['samples_missing']:,} / {s['samples_repeated']:,}", "missing / repeated", _mood(not wrong)))
    if s.get("replicas_identical") is not None:
        same = bool(s["replicas_identical"])
        tiles.append(("identical" if same else "DIFFERENT", "replicas, bit for bit", _mood(same)))
    efficiency = _efficiency(run)
    if efficiency is not None:
        tiles.append((f"{efficiency:.0%}", "of the time computing", ""))
    shown = "".join(
        f'<div class="tile"><b class="{mood}">{html.escape(value)}</b><span>{html.escape(label)}</span></div>'
        for value, label, mood in tiles
    )
    return f'<div class="tiles">{shown}</div>'


def _mood(good: bool) -> str:
    return "good" if good else "bad"


def _efficiency(run: Run) -> float | None:
    """Computing and reading, over all ranks, as a part of the time that the job held them: the scaling efficiency."""
    if not run.ranks:
        return None
    times = Times(run.ranks["data"], run.ranks["compute"], _blocked(run), run.ranks["samples"])
    own = sum(times.compute) / len(times.compute)
    return own / times.step if times.step else None


def _blocked(run: Run) -> list[float]:
    return [w + run.communication for w in run.ranks["waiting"]]


def _one(run: Run, *, heading: bool) -> str:
    parts = [f"<h2>{html.escape(run.name)}</h2>"] if heading else []
    if not run.summary:
        parts.append('<p class="say">The run left no summary: it has not ended yet, or failed.</p>')
    parts += [_tiles(run), _straggler(run), _plan(run)]
    loss = [(p["step"], p["loss"]) for p in run.steps if p["loss"] is not None]
    speed = [(p["step"], p["samples_per_second"]) for p in run.steps if p["samples_per_second"] is not None]
    charts = [
        lines("Training loss", [("loss", loss)], x="step", y=""),
        lines("Throughput", [("samples/s", speed)], x="step", y="samples/s", zero=True),
        _split(run),
        *(lines(name, [(name, points)], x="step", y="") for name, points in list(run.metrics.items())[:8]),
        _ranks(run),
        _shares(run),
        _membership(run),
    ]
    parts.append(f'<div class="grid2">{"".join(charts)}</div>')
    parts += [_events(run), _options(run)]
    return "".join(parts)


def _straggler(run: Run) -> str:
    if not run.ranks:
        return ""
    times = Times(run.ranks["data"], run.ranks["compute"], _blocked(run), run.ranks["samples"])
    found = explain(times)
    told = [e for e in run.events if e.get("event") == "straggler"]
    if found is None and not told:
        return ""
    sentence = found.sentence() if found is not None else ""
    if told and (found is None or found.rank is None):
        last = told[-1]
        sentence = f"rank {last['rank']}: {last['cause']} cost {last['cost']:.0%} of a step until step {last['step']}"
    return f'<p class="say">Over the whole run, {html.escape(sentence)}.</p>'


def _plan(run: Run) -> str:
    """Why gradients travelled as they did, as it was decided last."""
    reasons = [str(e["reason"]) for e in run.events if e.get("event") == "plan" and e.get("reason")]
    return f'<p class="say">Communication: {html.escape(reasons[-1])}</p>' if reasons else ""


def _split(run: Run) -> str:
    points = [p for p in run.steps if p["step_seconds"] and p["communication"] is not None]
    rest = [(p["step"], 1e3 * (p["step_seconds"] - p["communication"])) for p in points]
    sent = [(p["step"], 1e3 * p["communication"]) for p in points]
    return lines(
        "Communication against computing",
        [("computing and data, slowest rank", rest), ("communication", sent)],
        x="step",
        y="ms",
        zero=True,
    )


def _ranks(run: Run) -> str:
    if not run.ranks:
        return ""
    names = [f"rank {i}" for i in range(len(run.ranks["data"]))]
    stacks = [
        ("computing", [1e3 * v for v in run.ranks["compute"]]),
        ("data", [1e3 * v for v in run.ranks["data"]]),
        ("waiting for others", [1e3 * v for v in run.ranks["waiting"]]),
        ("communication", [1e3 * run.communication] * len(names)),
    ]
    return bars("Where a step goes on each rank", names, stacks, unit="ms")


def _shares(run: Run) -> str:
    samples = run.ranks.get("samples") or []
    total = sum(samples)
    if not total:
        return ""
    names = [f"rank {i}" for i in range(len(samples))]
    skew = max(samples) * len(samples) / total
    return bars(
        f"Share of the samples (skew {number(skew)})",
        names,
        [("samples", [100 * v / total for v in samples])],
        unit="%",
    )


def _membership(run: Run) -> str:
    """Workers over time, from events that tell how many there are."""
    told = [(e["time"], e.get("size", e.get("workers"))) for e in run.events if "time" in e]
    points = [(t, float(size)) for t, size in told if isinstance(size, int)]
    if len(points) < 2:
        return ""
    start, stairs = points[0][0], []
    for (t, size), following in zip(points, [*points[1:], None], strict=True):
        stairs.append((t - start, size))
        if following is not None:
            stairs.append((following[0] - start, size))
    return lines("Workers", [("workers", stairs)], x="seconds", y="", zero=True)


def _events(run: Run) -> str:
    if not run.events:
        return ""
    start = run.events[0].get("time", 0.0)
    rows = []
    for e in run.events[-60:]:
        facts = ", ".join(f"{k} {_short(v)}" for k, v in e.items() if k not in ("time", "event"))
        rows.append(
            f'<tr><td class="num">{e.get("time", start) - start:.1f} s</td><td>{html.escape(str(e.get("event", "?")))}'
            f"</td><td>{html.escape(facts)}</td></tr>"
        )
    return (
        '<h2>Events and warnings</h2><div class="card scroll"><table><tr><th class="num">after</th><th>event</th>'
        f"<th>facts</th></tr>{''.join(rows)}</table></div>"
    )


def _short(value: Any) -> str:
    text = number(value) if isinstance(value, float) else str(value)
    return text if len(text) <= 160 else text[:157] + "..."


def _options(run: Run) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(entry.get('value')))}</td>"
        f"<td>{html.escape(str(entry.get('origin')))}</td></tr>"
        for name, entry in run.config.items()
        if isinstance(entry, dict)
    )
    if not rows:
        return ""
    return (
        '<h2>Options</h2><div class="card scroll"><table><tr><th>option</th><th>value</th><th>from</th></tr>'
        f"{rows}</table></div>"
    )


def _compared(runs: Sequence[Run]) -> str:
    def curve(run: Run, name: str) -> list[tuple[float, float]]:
        return [(p["step"], p[name]) for p in run.steps if p[name] is not None]

    rows = []
    for run in runs:
        s = run.summary
        cells = [s.get(n) for n in ("world_size", "steps", "samples_per_second", "loss_last", "seconds")]
        shown = "".join(f'<td class="num">{number(c) if isinstance(c, (int, float)) else ""}</td>' for c in cells)
        rows.append(f"<tr><td>{html.escape(run.name)}</td>{shown}</tr>")
    head = "".join(f'<th class="num">{n}</th>' for n in ("workers", "steps", "samples/s", "last loss", "seconds"))
    names = {name for run in runs for name in run.config}
    differing = []
    for name in sorted(names):
        values = [str((run.config.get(name) or {}).get("value", "")) for run in runs]
        if len(set(values)) > 1:
            cells_ = "".join(f"<td>{html.escape(value)}</td>" for value in values)
            differing.append(f"<tr><td>{html.escape(name)}</td>{cells_}</tr>")
    options = ""
    if differing:
        titles = "".join(f"<th>{html.escape(run.name)}</th>" for run in runs)
        options = (
            f'<h2>Options that differ</h2><div class="card scroll"><table><tr><th>option</th>{titles}</tr>'
            f"{''.join(differing)}</table></div>"
        )
    charts = lines("Training loss", [(r.name, curve(r, "loss")) for r in runs], x="step", y="") + lines(
        "Throughput", [(r.name, curve(r, "samples_per_second")) for r in runs], x="step", y="samples/s", zero=True
    )
    table = f'<div class="card scroll"><table><tr><th>run</th>{head}</tr>{"".join(rows)}</table></div>'
    return f'{table}<div class="grid2" style="margin-top:14px">{charts}</div>{options}'
