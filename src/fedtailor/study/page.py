"""A study as one page that opens anywhere: what it found, the charts and tables behind it, how it was run.

    <root>/report.html   tables/<part>-<name>.{csv,tex}   plots/<part>-<name>{.svg,.png,-column.svg}

Nothing of the data is trusted: the page escapes it, loads nothing and runs no script.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from fedtailor import wire
from fedtailor.errors import RunError
from fedtailor.figures import clean, duration, is_number
from fedtailor.files import placeless, read_json
from fedtailor.study import charts, conduct, findings, tables
from fedtailor.study.grid import Asks, Part, Study, named, shown
from fedtailor.study.marks import plain
from fedtailor.study.measured import Found
from fedtailor.study.series import label_of

QUESTIONS: Mapping[Asks, tuple[str, str]] = {
    "performance": ("Performance", "Does federated customization reach what the rows in one place would give, and is it "
                                   "better than each silo alone?"),
    "efficiency": ("Efficiency", "What does it cost in bytes, time and memory, and which method gives most for it?"),
    "robustness": ("Robustness", "What do skewed data, many silos, failures and attacks take from it?"),
}  # fmt: skip
MARKS = {True: ("✓", "holds", "yes"), False: ("✗", "fails", "no"), None: ("–", "no test", "open")}  # sign, word, class
OPEN = ("○", "not shown", "open")  # a test that does not tell is no proof of the contrary
FIRST = 6  # findings of a part that stand open; the others are folded in
LONG = 16  # lines of a table that stands open
NAMED = 40  # points that are named as missing; the others are counted
VERSIONS = ("fedtailor", "torch", "transformers", "peft", "python", "system")


@dataclass(frozen=True)
class Section:
    """One part on the page."""

    part: Part
    findings: Sequence[findings.Finding]
    charts: Sequence[charts.Chart]
    tables: Sequence[tables.Table]

    @property
    def title(self) -> str:
        return self.part.title or self.part.name

    @property
    def counts(self) -> str:
        """How many findings hold, fail, are not shown or have no test."""
        said = Counter(f"{sign} {word}" for sign, word, _ in map(_mark, self.findings))
        return ", ".join(f"{count} {what}" for what, count in said.most_common())

    @property
    def axes(self) -> str:
        told = {axis: ", ".join(plain(shown(value)) for value in values) for axis, values in self.part.axes.items()}
        return "; ".join(f"{axis}: {values}" for axis, values in told.items())


def write(study: Study, found: Sequence[Found], root: Path) -> Path:
    """Renders root/report.html and what it links to; each file is replaced in one step, or left as it is.

    Raises UserError where matplotlib is missing, RunError where nothing can be written.
    """
    root, command = Path(root), without_places(_command(found, root))
    drawn, told = charts.charts(study, found, command), tables.tables(study, found)
    files: dict[str, bytes] = {}
    for table in told:
        files[f"tables/{table.part}-{table.name}.csv"] = _bytes(tables.as_csv(table))
        files[f"tables/{table.part}-{table.name}.tex"] = _bytes(tables.as_latex(table))
    for chart in drawn:
        files[f"plots/{chart.part}-{chart.name}.svg"] = _bytes(chart.svg)
        files[f"plots/{chart.part}-{chart.name}-column.svg"] = _bytes(chart.column)
        files[f"plots/{chart.part}-{chart.name}.png"] = chart.png
    said = findings.findings(study, found)
    sections = [
        Section(part, *([one for one in all_of if one.part == part.name] for all_of in (said, drawn, told)))  # type: ignore[arg-type]
        for part in study.parts
    ]
    files["report.html"] = _bytes(_render(study, found, root, command, sections))
    for name, content in files.items():
        path = root / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            wire.write_bytes(path, content)
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror}; make room or make the folder writable") from error
    return root / "report.html"


def without_places(text: str) -> str:
    """A text without the folders that absolute paths in it lie in: a page is passed on."""
    quoted = re.sub(r'(["\'])(?:/|[A-Za-z]:[/\\])[^"\'\n]*[/\\]([^"\'/\\\n]+)\1', r"\1\2\1", placeless(text))
    return re.sub(r"(?<![\w.:/~<-])/(?:[^\s/\"'<>]+/)+([^\s/\"'<>]+)", r"\1", quoted)


def source_of(study: Study) -> str:
    """The study's file, lists of values in one line each; "" where it was not read from one."""
    text = tomli_w.dumps(dict(study.source)) if study.source else ""
    flat = re.sub(r"\[\n((?: +[^\n\[\]{}]*,\n)+) *\]", lambda found: f"[{' '.join(found[1].split()).rstrip(',')}]", text)
    return without_places(flat)


def missing(study: Study, found: Iterable[Found]) -> list[str]:
    """The results that are asked and not there, a line for each point and its rows, with the seeds."""
    there = {(one.part, tuple(one.at.items()), one.seed, one.row) for one in found}
    seeds: dict[str, list[int]] = {}
    for cell in study.cells:
        rows = [row for row in cell.part.rows if (cell.part.name, tuple(cell.at.items()), cell.seed, row) not in there]
        point = f"{cell.part.name} ({named(cell.at)})" if cell.at else cell.part.name
        if rows:
            which = "" if len(rows) == len(cell.part.rows) else f", {', '.join(map(label_of, rows))}"
            seeds.setdefault(point + which, []).append(cell.seed)
    return [f"{label}: seed{'' if len(of) == 1 else 's'} {', '.join(map(str, of))}" for label, of in seeds.items()]


def run_of(study: Study, found: Sequence[Found], command: str) -> dict[str, str]:
    """How the study was run: a word -> what is to be said of it; several machines or models are all told."""
    kept = {(one.cell.key, one.row): one.figures for one in found}
    each = [figures.get(name) for figures in kept.values() for name in ("seconds", "evaluation_seconds")]
    spent = sum(float(seconds) for seconds in each if seconds is not None and is_number(seconds))
    cells, seeds = len(study.runs()), sorted({cell.seed for cell in study.cells})
    told = {
        "command": command, "seeds": ", ".join(map(str, seeds)),
        "cells": f"{len({one.cell.key for one in found})} of {cells} have figures", "work": duration(spent) if spent else "",
        "versions": "; ".join(_each(found, lambda env: ", ".join(f"{name} {env[name]}" for name in VERSIONS if env.get(name)))),
        "machine": charts.machine(found).removeprefix("Machine: ").rstrip("."),
        "model": "; ".join(_each(found, lambda env: without_places(str(env.get("model", ""))))),
        "weights, sha256": "; ".join(_each(found, lambda env: env.get("model_sha256"))),
        "rows, sha256": "; ".join(_each(found, lambda env: env.get("data_sha256"))),
    }  # fmt: skip
    return {name: text for name, text in told.items() if text}


def _each(found: Iterable[Found], tell: Any) -> list[str]:
    """What the environments say, each once; of more than four, the first and how many there are."""
    said = list(dict.fromkeys(str(text) for one in found if one.environment and (text := tell(one.environment))))
    return said if len(said) <= 4 else [*said[:3], f"and {len(said) - 3} others"]


def _command(found: Sequence[Found], root: Path) -> str:
    for one in found[:1]:
        file = root / "cells" / one.cell.key / "result.json"
        if file.exists():
            return str(read_json(file).get("command") or "")
    return ""


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "replace")  # a lone surrogate in what a silo is called has no UTF-8 form


def _render(study: Study, found: Sequence[Found], root: Path, command: str, sections: Sequence[Section]) -> str:
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        finalize=lambda value: clean(value) if type(value) is str else value,
    )  # fmt: skip
    left, failed = missing(study, found), conduct.failures(study, root)
    asked = {asks: [one for one in sections if one.part.asks == asks] for asks in QUESTIONS}
    return environment.from_string(Path(__file__).with_name("study.html.j2").read_text(encoding="utf-8")).render(
        study=study, name=study.title or study.name, mark=_mark, first=FIRST, long=LONG, svg=Markup, shown=_shown,
        questions={asks: (*QUESTIONS[asks], mine) for asks, mine in asked.items() if mine},
        missing=left[:NAMED], more=max(0, len(left) - NAMED), count=len(left),
        failed={label: without_places(why) for label, why in failed.items()},
        run=run_of(study, found, command), source=source_of(study),
    )  # fmt: skip


def _mark(finding: findings.Finding) -> tuple[str, str, str]:
    """Sign, word and class; what was tested and not shown is told apart from what was not tested."""
    return OPEN if finding.holds is None and not finding.test.startswith("none") else MARKS[finding.holds]


def _shown(cell: Any) -> str:
    """A cell of a table; a number is not torn from its unit."""
    return re.sub(r"(?<=\d) (?=%|±|(?:[kMGT]?B|s|min|h|k|M|G)\b)", "\N{NO-BREAK SPACE}", str(cell))
