"""A run folder as one page (`write`), a terminal table (`table`), Markdown (`markdown`) or one sentence (`summary`).

All four iterate over what result.json holds, so rows, metrics and costs unknown here are shown as well. Nothing of the
data is trusted: the page escapes it, loads nothing and runs no script.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtailor import plots
from fedtailor.errors import RunError, UserError
from fedtailor.figures import (
    COSTS,
    METRICS,
    ROWS,
    Cost,
    clean,
    cost_of,
    is_number,
    metric_of,
    number,
    with_spread,
    words,
)
from fedtailor.files import placeless
from fedtailor.printing import prompts

if TYPE_CHECKING:
    from rich.table import Table

VERSION = 1  # of result.json
MOST_PROMPTS = 8
MOST_BARS = 24  # silos with bars; the numbers of all are in the page's table


@dataclass(frozen=True)
class Line:
    """One line of the tables."""

    key: str
    label: str
    metrics: Mapping[str, Mapping[str, Any]]
    row: Mapping[str, Any]  # its costs; empty for `alone.own`, which costs nothing of its own

    def mean(self, metric: str) -> Any:
        return self.metrics.get(metric, {}).get("mean")

    def exact(self, cost: str) -> str:
        """`cost` in full, and beside it what evaluation cost of the same: no column of its own."""
        value, tests = self.row.get(cost), self.row.get(f"evaluation_{cost}")
        apart = f"; evaluation {tests:,}" if is_number(tests) else ""
        apart += f"; {self.row['energy_how']}" if cost == "energy_wh" and "energy_how" in self.row else ""
        return f"{value:,} {COSTS.get(cost, Cost('')).unit}".strip() + apart if is_number(value) else ""


def write(folder: Path) -> Path:
    """Renders `folder`/report.html from the run folder; an older page is replaced in one step, or left as it is."""
    import jinja2

    folder = Path(folder)
    result = read(folder)
    source = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        finalize=lambda value: clean(value) if type(value) is str else value,
    )
    page = environment.from_string(source).render(_view(folder, result))
    path = folder / "report.html"
    draft = folder / f".report-{secrets.token_hex(4)}.tmp"
    try:
        # A lone surrogate in a generated answer has no UTF-8 form.
        draft.write_bytes(page.encode("utf-8", "replace"))
        os.replace(draft, path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}; make room or make the folder writable") from error
    finally:
        draft.unlink(missing_ok=True)
    return path


def read(folder: Path) -> dict[str, Any]:
    """result.json of a run folder. UserError if there is none, or none that this version reads."""
    path = folder / "result.json"
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(
            f"{folder} is not the folder of a finished run (no result.json in it); give one below runs/, "
            "or make one with 'fedtailor run <experiment.toml>'"
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); repeat the run") from None
    version = result.get("version") if isinstance(result, dict) else None
    if version != VERSION or isinstance(version, bool):
        raise UserError(f"{path} has version {version!r}, this fedtailor reads version {VERSION}; "
                        "repeat the run, or use the fedtailor that wrote it")
    return dict(result)


def primary(result: Mapping[str, Any]) -> str:
    """The metric that the run is judged by: accuracy if any row has it, else rouge_l, else loss."""
    there = _metric_names(lines(result))
    return next((name for name in ("accuracy", "rouge_l", "loss") if name in there), there[0] if there else "loss")


def summary(result: Mapping[str, Any]) -> str:
    """One sentence: federated first, then what it is to be compared with; only rows that are there."""
    name, found = primary(result), lines(result)
    metric = metric_of(name)
    there = {line.key: line for line in found if name in line.metrics}
    others = [f"{line.label} {number(line.mean(name))}" for key, line in there.items()
              if key not in ("federated", "alone", "alone.own")]
    if "alone" in there:
        best = _best(name, _per_silo(there["alone"], name).values())
        others.append(f"alone {number(there['alone'].mean(name))}" if best is None
                      else f"best silo alone {number(best)}")
    compared, note = ", ".join(others), " (lower is better)" if metric.better == "lower" else ""
    seeds = len(result.get("seeds") or ())
    ending = f" (means of {seeds} seeds)." if seeds > 1 else "."
    if "federated" in there:
        silos, how = len(_silos(result)), f" ({_method(result)})" if _method(result) else ""
        over = f" over {silos} silo{'' if silos == 1 else 's'}" if silos else ""
        reached = f"{metric.label} {number(there['federated'].mean(name))}{note}"
        return f"Federated customization{how}{over} reaches {reached}" + (f"; {compared}" if compared else "") + ending
    if compared:
        return f"No federated result; {metric.label}{note}: {compared}{ending}"
    return "No test rows, so no results." if result.get("rows") else "No results yet."


def lines(result: Mapping[str, Any]) -> list[Line]:
    """The lines of the tables: known rows in their order, then the others as they come."""
    rows = result.get("rows") or {}
    found = []
    for key in _ordered(rows, ROWS):
        found.append(Line(key, _label(key), _metrics(rows[key]), rows[key]))
        if own := _metrics(rows[key].get("own") or {}):
            found.append(Line(f"{key}.own", ROWS.get(f"{key}.own", f"{words(key)}, own"), own, {}))
    return found


def table(result: Mapping[str, Any]) -> Table:
    """For the terminal: the primary metric's mean and worst, the other metrics' means, the costs."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    first = primary(result)
    head, body = _grid(result, worst=(first,), pooled=())
    if not body:
        return Table(summary(result), box=None)
    # Text, not str: rich reads [words] in a str as markup.
    view = Table(title=Text(clean(result.get("name", ""))), caption=Text(summary(result)), caption_justify="left",
                 box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for i, label in enumerate(head):
        # In a narrow terminal a heading or a spread may go to a second line, a number may not be torn from its unit.
        parts = [*label.split(), *(part for _, cells in body for part in cells[i].split(" ±"))]
        view.add_column(Text(label.rstrip(" ↑↓")), justify="right" if i else "left", min_width=max(map(len, parts)))
    for line, cells in body:
        view.add_row(*map(Text, cells), style="bold" if line.key == "federated" else "")
    return view


def markdown(result: Mapping[str, Any]) -> str:
    """The summary, then a table with each metric's mean, worst and over all rows, and the costs. Ends with a newline."""
    found = lines(result)
    head, body = _grid(result, worst=_metric_names(found), pooled=_pooled(found))
    rows = [[_markdown_text(cell) for cell in head], ["---"] + ["--:"] * (len(head) - 1)]
    for line, cells in body:
        shown = [_markdown_text(cell) for cell in cells]
        rows.append([f"**{cell}**" if cell and line.key == "federated" else cell for cell in shown])
    text = _markdown_text(summary(result)) + "\n"
    return text + "\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in rows) + "\n" if body else text


def _pooled(found: Sequence[Line]) -> list[str]:
    """Metrics that were counted over all rows together."""
    return [name for name in _metric_names(found) if any("pooled" in line.metrics.get(name, {}) for line in found)]


def _grid(
    result: Mapping[str, Any], worst: Sequence[str], pooled: Sequence[str]
) -> tuple[list[str], list[tuple[Line, list[str]]]]:
    """Head and lines of a plain table; the metrics in `worst` have a column for it, and those in `pooled`."""
    found, first, head = lines(result), primary(result), [""]
    names = sorted(_metric_names(found), key=lambda name: name != first)
    for name in names:
        head += [metric_of(name).label + metric_of(name).arrow] + ["worst"] * (name in worst) + ["all rows"] * (name in pooled)
    costs = _cost_names(found)
    head += [cost_of(cost).label for cost in costs]
    body = []
    for line in found:
        cells = [line.label]
        for name in names:
            metric = line.metrics.get(name, {})
            cells += [with_spread(metric)] + [number(metric.get("worst"))] * (name in worst)
            cells += [number(metric.get("pooled"))] * (name in pooled)
        body.append((line, cells + [cost_of(cost).show(line.row.get(cost)) if line.row else "" for cost in costs]))
    return head, body


def _view(folder: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    """All that the template shows; text is still raw here, and escaped there. Only SVG made by `plots` is Markup."""
    from markupsafe import Markup

    found, first = lines(result), primary(result)
    names = _metric_names(found)
    folders = sorted((path for path in folder.glob("seed-*") if path.is_dir()), key=lambda p: (len(p.name), p.name))
    curves = plots.read_curves(folders or [folder])
    adapter = next((path for path in (seed / "adapter" for seed in folders) if path.is_dir()), folder / "adapter")
    kinds = plots.colours(_ordered([*(line.key for line in found), *(curve.row for curve in curves)], ROWS))
    best = {} if folders else {line.key: line.row["best_round"] for line in found if "best_round" in line.row}
    panels = {name: Markup(plots.draw(curves, name, metric_of(name).label, kinds, best))
              for name in dict.fromkeys(("loss", first, "gap"))}
    calls = plots.draw(curves, first, metric_of(first).label, kinds, best, plots.CALLS)
    per_silo = {line.key: _per_silo(line, first) for line in found if _per_silo(line, first)}
    # `alone` counts per silo over all tests; beside the other rows' bars only its models' own tests can stand.
    alone = per_silo.pop("alone", {})
    silos, low, toml = _silos(result), per_silo.get("federated", {}), folder / "experiment.toml"
    sign = -1 if metric_of(first).better == "lower" else 1
    weakest = sorted(silos, key=lambda silo: sign * low.get(silo, sign * math.inf))[:MOST_BARS]
    top = max([1.0, *(value for values in per_silo.values() for value in values.values())])
    return {
        "result": result, "name": result.get("name") or folder.resolve().name, "summary": summary(result),
        "method": _method(result), "seeds": result.get("seeds") or [], "silos": silos, "lines": found, "kinds": kinds,
        "metrics": {name: metric_of(name) for name in names}, "pooled": _pooled(found),
        "costs": {n: cost_of(n) for n in _cost_names(found)},
        "best": {name: _best(name, [line.mean(name) for line in found]) for name in names},
        "panels": {name: svg for name, svg in panels.items() if svg}, "best_rounds": best,
        "calls": Markup(calls), **prompts(folders or [folder], result),
        "legend": {curve.row: Markup(plots.swatch(curve, kinds[curve.row])) for curve in curves},
        "first": metric_of(first), "barred": [silo for silo in silos if silo in weakest], "per_silo": per_silo,
        "alone": alone, "bar": lambda value, row: Markup(plots.bar(value, top, kinds[row])),
        "samples": _samples(folders, found), "adapter": _adapter(adapter),
        "adapter_path": adapter.relative_to(folder).as_posix(),
        "rejected": {line.key: line.row["rejected"] for line in found if line.row.get("rejected")},
        "file": placeless(toml.read_text(encoding="utf-8", errors="replace")) if toml.is_file() else "",
        "label": _label, "metric": metric_of, "number": number, "with_spread": with_spread,
        "plain": lambda value: json.dumps(value, ensure_ascii=False, default=str),
    }


def _samples(folders: Sequence[Path], found: Sequence[Line]) -> list[dict[str, Any]]:
    """Up to MOST_PROMPTS prompts, taken from the silos in turn, with each row's answer to it."""
    rows = {line.key: line.row.get("samples") for line in found}
    if not any(rows.values()) and folders and (folders[0] / "result.json").is_file():
        rows = {line.key: line.row.get("samples") for line in lines(read(folders[0]))}
    prompts: dict[str, dict[tuple[str, str], dict[str, str]]] = {}
    for key, sample in ((key, sample) for key, samples in rows.items() for sample in samples or ()):
        silo, prompt, answer = (str(sample.get(part, "")) for part in ("silo", "prompt", "answer"))
        text = str(sample.get("generated", ""))
        prompts.setdefault(silo, {}).setdefault((prompt, answer), {}).setdefault(key, text)
    turns = zip_longest(*([(silo, *asked) for asked in prompts[silo]] for silo in prompts))
    return [
        {"silo": silo, "prompt": prompt, "answer": answer, "outputs": prompts[silo][prompt, answer]}
        for silo, prompt, answer in [asked for turn in turns for asked in turn if asked][:MOST_PROMPTS]
    ]


def _adapter(folder: Path) -> dict[str, Any] | None:
    """What the loading example needs; None where there is nothing that PEFT or transformers could load."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        base = config["base_model_name_or_path"]
        path = Path(base)
    except (OSError, ValueError, KeyError, TypeError):
        return {} if (folder / "config.json").is_file() else None
    # Pages are passed on: they should not carry the name of the user's home.
    home = path.is_relative_to(Path.home())
    where = f"Path.home() / {json.dumps(path.relative_to(Path.home()).as_posix())}" if home else json.dumps(base)
    return {"base": where, "home": home, "task": str(config.get("task_type"))}


def _metrics(row: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {name: value for name, value in row.items()
            if name not in ("own", "rejected") and isinstance(value, Mapping) and "mean" in value}


def _ordered(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Each name once: the known ones in their order, then the others as they come."""
    there = dict.fromkeys(names)
    return list(dict.fromkeys([*(name for name in known if name in there), *there]))


def _metric_names(found: Sequence[Line]) -> list[str]:
    return _ordered((name for line in found for name in line.metrics), METRICS)


def _cost_names(found: Sequence[Line]) -> list[str]:
    return _ordered((name for line in found for name, value in line.row.items()
                     if is_number(value) and not name.startswith(("rounds", "best_round", "evaluation_"))), COSTS)


def _label(row: str) -> str:
    return ROWS.get(row) or words(row)


def _per_silo(line: Line, name: str) -> dict[str, float]:
    values = line.metrics.get(name, {}).get("per_silo") or {}
    return {silo: value for silo, value in values.items() if is_number(value)}


def _best(name: str, values: Iterable[Any]) -> float | None:
    """The best of the finite values; None without any, or where no direction is known."""
    finite = [float(value) for value in values if is_number(value)]
    choose = {"higher": max, "lower": min}.get(metric_of(name).better)
    return choose(finite) if choose and finite else None


def _silos(result: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(silo for line in lines(result) for metric in line.metrics.values()
                              for silo in metric.get("per_silo") or ()))


def _method(result: Mapping[str, Any]) -> str:
    method = (result.get("experiment") or {}).get("method")
    return clean((method.get("name") or "") if isinstance(method, Mapping) else method or "")


def _markdown_text(text: str) -> str:
    for mark in "\\|*_`[]<":
        text = text.replace(mark, "\\" + mark)
    return " ".join(text.replace("&", "&amp;").split())
