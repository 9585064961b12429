"""A study's tables: rounded for reading, exact for computing on.

    Table -> HTML by the page;  as_latex -> booktabs;  as_csv -> means, interval bounds, and every seed's value
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fedtailor.figures import MISSING, ROWS, clean, duration, metric_of, number, size
from fedtailor.study import efficiency
from fedtailor.study.compare import LEVEL, Interval, non_inferior
from fedtailor.study.efficiency import Costs
from fedtailor.study.flops import SILOS, STEPS
from fedtailor.study.grid import At, Study, Value, named, shown
from fedtailor.study.measured import Found
from fedtailor.study.points import BACKDOOR, UNSENT, UNTRAINED, Points, gather, key
from fedtailor.study.robustness import drops
from fedtailor.study.wording import over

COLUMNS = 6  # a table of more is cut by its first axis: a small screen shows few
NAMED = 3  # of what is missing, in a note


@dataclass(frozen=True)
class Entry:
    """A cell of a table: as it is shown, and the exact figures behind it, where it has any."""

    shown: str
    exact: Interval | None = None

    def __str__(self) -> str:
        return self.shown


@dataclass(frozen=True)
class Table:
    part: str
    name: str  # of its files: small letters, digits, - and _
    title: str
    head: tuple[str, ...]
    body: tuple[tuple[Entry, ...], ...]  # each as wide as the head; the first says which row
    note: str  # metric, direction, over what, seeds, what is missing


def tables(study: Study, found: Sequence[Found]) -> list[Table]:
    """One at least of every part of which anything is finished."""
    told: list[Table] = []
    for part in study.parts:
        points = gather(study, part, found)
        if not points.rows:
            continue
        if part.asks == "robustness" and part.line:
            told += _lines(study, points)
        else:
            told.append(_quality(study, points))
            told += _costs(study, points)
        told += _backdoors(points)
    return told


def as_csv(table: Table) -> str:
    """Exact figures. A column with intervals becomes: mean, low, high, n, and one of each seed's value; the bounds are
    empty for a single seed."""
    seeds = [sorted({s for row in table.body if (told := row[i].exact) for s in told.values}) for i in range(len(table.head))]
    exact = [any(row[i].exact for row in table.body) for i in range(len(table.head))]
    head: list[str] = []
    for title, known, own in zip(table.head, exact, seeds, strict=True):
        head += [title, *(f"{title} {what}" for what in ("low", "high", "n", *(f"seed {s}" for s in own)) if known)]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    for row in table.body:
        line: list[object] = []
        for entry, known, own in zip(row, exact, seeds, strict=True):
            line += _exactly(entry.exact, own) if known else [entry.shown]
        writer.writerow(line)
    return out.getvalue()


def as_latex(table: Table) -> str:
    """A floating table that needs the package booktabs; all text is escaped."""
    lines = [" & ".join(escaped(str(entry)) for entry in row) + r" \\" for row in (table.head, *table.body)]
    return "\n".join([
        r"\begin{table}", r"\centering", rf"\caption{{{escaped(table.title)}}}", rf"\label{{tab:{table.name}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(table.head) - 1)}}}", r"\toprule", lines[0], r"\midrule", *lines[1:],
        r"\bottomrule", r"\end{tabular}", rf"\par\footnotesize {escaped(table.note)}", r"\end{table}", "",
    ])  # fmt: skip


_LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "×": r"$\times$",
    "↑": r"$\uparrow$", "↓": r"$\downarrow$", MISSING: "--", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}", **{sign: "\\" + sign for sign in "&%$#_{}"},
}  # fmt: skip


def escaped(text: str) -> str:
    """Text as LaTeX prints it, on one line."""
    return "".join(_LATEX.get(sign, sign) for sign in clean(re.sub(r"\s+", " ", text)))


def spread(value: Interval, show: Callable[[float], str] = number) -> Entry:
    """Mean ±half of its 95 % interval; the mean alone for one seed."""
    if not value.n:
        return Entry(MISSING, value)
    return Entry(show(value.mean) + (f" ±{show(value.half)}" if value.known else ""), value)


def plain(value: Interval, show: Callable[[float], str]) -> Entry:
    """The mean alone: of costs that barely differ between seeds."""
    return Entry(show(value.mean) if value.n else MISSING, value)


def _quality(study: Study, points: Points) -> Table:
    """Points by rows, and what federated keeps of centralized."""
    share = {"federated", "centralized"} <= set(points.rows) and bool(points.better)
    body = []
    for at in points.all:
        cells = [spread(points.interval(at, row)) for row in points.rows]
        if share:
            both = points.values(at, "federated"), points.values(at, "centralized")
            ratio = non_inferior(*both, study.margin, points.better).ratio
            cells.append(spread(ratio, lambda v: f"{100 * v:.1f} %"))
        if any(cell.exact and cell.exact.n for cell in cells):
            body.append((Entry(_where(at) or metric_of(points.metric).label), *cells))
    head = (", ".join(points.part.axes), *(ROWS.get(row, row) for row in points.rows), *(["of centralized"] if share else []))
    return Table(points.part.name, points.part.name, _title(points), head, tuple(body), _note(points))


def _backdoors(points: Points) -> Iterator[Table]:
    """How often a backdoor's trigger works, where the part is judged by something else."""
    struck = points.told_in(BACKDOOR)
    if points.metric == BACKDOOR or not struck.rows:
        return
    body = [(Entry(_where(at) or metric_of(BACKDOOR).label), *(spread(struck.interval(at, row)) for row in struck.rows))
            for at in struck.all]  # fmt: skip
    head = (", ".join(points.part.axes), *(ROWS.get(row, row) for row in struck.rows))
    note = f"Of rows with the trigger, where they are not of the label that it is to bring about. {_note(struck)}"
    name, title = points.part.name, f"{_title(points)}: attack success"
    yield Table(name, f"{name}-{BACKDOOR}", title, head, tuple(body), note)


def _costs(study: Study, points: Points) -> Iterator[Table]:
    """What training moves and takes, then what it computes, of the rows that are trained together and of centralized."""
    told = [one for one in efficiency.costs(points, study.target) if one.row in (points.main, "centralized")]
    if not any(one.row == points.main for one in told):
        return
    front = {id(one) for group in efficiency.comparable(points, [one for one in told if one.row == points.main])
             for i in efficiency.pareto([(one.bytes.mean, one.quality.mean) for one in group], points.better)
             for one in [group[i]]}  # fmt: skip
    first = ", ".join([*points.part.axes, "row"])
    name, title = points.part.name, _title(points)
    aimed = any(one.until for one in told)
    body = []
    for one in told:
        cells = [plain(one.up_each, size), plain(one.down_each, size), plain(one.bytes, size), plain(one.seconds, duration)]
        if aimed:
            cells += [_until(one, 0, size), _until(one, 1, duration)]
        mark = "yes" if id(one) in front else "" if one.row == points.main else MISSING
        body.append((Entry(_of(one)), *cells, Entry(mark)))
    head = (first, "up per round and silo", "down per round and silo", "bytes in all", "time",
            *(["bytes to target", "time to target"] if aimed else []), "Pareto")  # fmt: skip
    note = "Means over seeds. Bytes and time of training, all silos and rounds together; evaluation is not counted. "
    if any(one.row in UNSENT for one in told):
        note += f"{MISSING} for bytes: nothing crosses a wire there. "
    if aimed:
        coarse = efficiency.coarse(points, told)
        note += f"Target: {efficiency.goal(study, points)}, of the same seed{f'; {coarse}' if coarse else ''}. "
    note += f"Pareto: no other has fewer bytes and better {metric_of(points.metric).label}. {_counts(points)}"
    yield Table(name, f"{name}-cost", f"{title}: what training costs", head, tuple(body), note)
    yield _computed(points, told, first)


def _computed(points: Points, told: Sequence[Costs], first: str) -> Table:
    columns: list[tuple[str, Callable[[Costs], Entry]]] = [
        ("trained parameters", lambda one: plain(one.parameters, count)),
        ("FLOPs, estimated", lambda one: plain(one.flops["estimated"], count)),
        ("FLOPs, counted", lambda one: plain(one.flops["measured"], count)),
        ("peak memory", lambda one: plain(one.memory, lambda mb: size(mb * 1e6))),
        ("energy", lambda one: plain(one.energy, lambda wh: f"{number(wh)} Wh")),
    ]
    cells = [(title, [take(one) for one in told]) for title, take in columns]
    kept = [(title, column) for title, column in cells if any(entry.exact and entry.exact.n for entry in column)]
    body = tuple((Entry(_of(one)), *(column[i] for _, column in kept)) for i, one in enumerate(told))
    how = ", ".join(dict.fromkeys(one.energy_how for one in told if one.energy_how))
    note = "Means over seeds. FLOPs: of all local steps of all silos; "
    if any(one.flops["measured"].n for one in told):
        note += f"counted: matrix products as torch dispatches them, of {STEPS} steps of {SILOS} silos at most, "
        note += "times all steps; estimated: from sizes. "
    else:
        note += "estimated from sizes. "
    note += "Memory: of the process, all silos in one. "
    note += (f"Energy: {how}. " if how else "") + _counts(points)
    name = points.part.name
    return Table(name, f"{name}-compute", f"{_title(points)}: what training computes", (first, *(t for t, _ in kept)), body, note)


def _until(one: Costs, what: int, show: Callable[[float], str]) -> Entry:
    told = one.spent(what)
    if not one.never or (what == 0 and one.row in UNSENT):
        return plain(told, show)
    missed = f"not reached in {one.never} of {len(one.until)} seeds"
    return Entry(f"{show(told.mean)} ({missed})" if told.n else missed, told)


def _lines(study: Study, points: Points) -> Iterator[Table]:
    """Values along the line by combinations of the other axes: a table of each row; many combinations are cut up."""
    others = [axis for axis in points.part.axes if axis != points.part.line]
    rests = [rest for rest, _ in points.apart(points.part.line)]
    cut = others[0] if len(rests) > COLUMNS and len(others) > 1 else ""
    for value in points.part.axes[cut] if cut else ("",):
        mine = [rest for rest in rests if not cut or rest[cut] == value]
        rows = [row for row in points.rows if row not in UNTRAINED and row != points.main]
        for row in ([points.main] if points.main in points.rows else []) + rows:
            yield _line(study, points, row, mine, {cut: value} if cut else {})


def _line(study: Study, points: Points, row: str, rests: Sequence[At], of: At) -> Table:
    part, label = points.part, ROWS.get(row, row)
    marks = {(key(rest), drop.value) for rest in rests for drop in drops(points, rest, row, study.margin) if drop.p < LEVEL}
    body = []
    for value in part.axes[part.line]:
        cells = []
        for rest in rests:
            at = {axis: {**rest, part.line: value}[axis] for axis in part.axes}
            entry = spread(points.interval(at, row))
            cells.append(Entry(entry.shown + ("*" if (key(rest), value) in marks else ""), entry.exact))
        body.append((Entry(shown(value)), *cells))
    heads = [_where({axis: v for axis, v in rest.items() if axis not in of}) or label for rest in rests]
    name = "-".join([part.name, *map(_slug, of.values()), *([row] if row != points.main else [])])
    title = f"{_title(points)}: {label}{f', {named(of)}' if of else ''}"
    columns = ", ".join(axis for axis in part.axes if axis != part.line and axis not in of)
    note = _note(points) + (f" Columns: {columns}." if columns else "") + _floors(points)
    if marks:
        note += f" *: differs from {part.line} {shown(part.against)} (paired two-sided t, Holm over the column, 5 %)."
    return Table(part.name, name, title, (part.line, *heads), tuple(body), note)


def _floors(points: Points) -> str:
    """Of rows without training: their means, which mostly are the same at all points."""
    told = ""
    for row in points.rows:
        means = [one.mean for at in points.all if (one := points.interval(at, row)).n]
        if row in UNTRAINED and row != points.main and means:
            low, high = number(min(means)), number(max(means))
            told += f" {ROWS.get(row, row).capitalize()}: {low if low == high else f'{low} to {high}'}."
    return told


def count(value: float) -> str:
    """256, 1.8 k, 3.4 M, 2.6 T, 3.4e+15"""
    if abs(value) >= 1e15:
        return f"{value:.1e}"
    power, unit = next((pair for pair in _UNITS if abs(value) >= 10 ** pair[0]), (0, ""))
    return f"{value / 10**power:.{1 if power else 0}f}{unit}"


_UNITS = ((12, " T"), (9, " G"), (6, " M"), (3, " k"))


def _exactly(value: Interval | None, seeds: Sequence[int]) -> list[object]:
    if value is None or not value.n:
        return [""] * (4 + len(seeds))
    bounds = [value.low, value.high] if value.known else ["", ""]
    return [value.mean, *bounds, value.n, *(value.values.get(seed, "") for seed in seeds)]


def _note(points: Points) -> str:
    metric = metric_of(points.metric)
    better = f", {metric.better} is better" if metric.better else ""
    what = "over all test rows together" if points.over == "rows" else "unweighted mean over silos"
    return f"{metric.label}{better}; {what}; mean ±half of the 95 % t interval over seeds. {_counts(points)}"


def _counts(points: Points) -> str:
    """Seeds, experiment, and what is not there."""
    told = f"{over(len(points.seeds))[0].upper()}{over(len(points.seeds))[1:]} ({', '.join(map(str, points.seeds))})"
    if points.part.about:
        told += f". {points.part.about.rstrip('.')}"
    if points.base:
        told += f". Experiment: {points.base}"
    if points.missing:
        more = len(points.missing) - NAMED
        told += f". Not there yet: {'; '.join([*points.missing[:NAMED], *([f'{more} more'] if more > 0 else [])])}"
    return f"{told}."


def _title(points: Points) -> str:
    return points.part.title or points.part.name


def _where(at: At) -> str:
    """The values alone: their axes stand in the head or the note."""
    return ", ".join(shown(value) for value in at.values())


def _of(one: Costs) -> str:
    return ", ".join(filter(None, [_where(one.at), ROWS.get(one.row, one.row)]))


def _slug(value: Value) -> str:
    return re.sub(r"[^a-z0-9_]+", "-", str(value).lower()).strip("-") or "value"
