"""Whose documents are which: [data] corpus -> each silo's corpus, in one process."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fedtailor import rows, sources
from fedtailor.errors import UserError
from fedtailor.retrieval.corpus import Corpus
from fedtailor.retrieval.policy import Policy
from fedtailor.retrieval.reading import Document, Section

PLACE = "{silo}"


def read(corpus: str, silo_column: str, silos: Collection[str], policies: Mapping[str, Policy]) -> dict[str, Corpus]:
    """`corpus`: a path with {silo}, each silo's own index; or a table (demo set, file, hub id) with the columns text and
    `silo_column`, and if it has them document (else id), by which rows belong together, and section. Raises UserError."""
    if PLACE in corpus:
        paths = {silo: Path(corpus.replace(PLACE, silo)).expanduser() for silo in silos}
        return {silo: Corpus(silo, policies[silo], path.resolve()) for silo, path in paths.items()}
    try:
        table = sources.read(corpus, config="", revision="", split_column="")
    except UserError as error:
        raise UserError(str(error).replace("[data] source", "[data] corpus")) from error
    if not silo_column:
        raise UserError(f"[data] corpus: whose each passage of {table.name} is says silo_column; set it, in place of a partition")
    if tagged := [silo for silo in silos if policies[silo].share == "shareable"]:
        why = f"no passage of {table.name} has the tag, so silo {tagged[0]!r} would tell nothing"
        raise UserError(f"[data] documents: share = 'shareable', and {why}; set corpus to '{PLACE}.index' files with tags")
    needed = (("text", "text"), ("silo_column", silo_column))
    if errors := [error for what, name in needed for error in rows.missing(f"[data] corpus {what}", name, table)]:
        raise UserError("\n".join(errors))
    found = defaultdict[str, dict[str, list[Section]]](lambda: defaultdict(list))
    for index, row in enumerate(table.rows):
        silo = rows.word(silo_column, table, index, "silo's name")
        named = (str(row[key]).strip() for key in ("document", "id") if row.get(key) is not None)
        name = next(filter(None, named), f"row {index + 1}")
        text = rows.word("text", table, index, "passage")
        found[silo][name].append(Section(tuple(filter(None, (str(row.get("section") or ""),))), text))
    lacking = [silo for silo in silos if silo not in found]
    if lacking:
        raise UserError(f"[data] corpus: {table.name} has no passage of silo {lacking[0]!r}; add some, or leave it out of only")
    return {
        silo: Corpus(silo, policies[silo], documents=[_document(name, some) for name, some in sorted(found[silo].items())])
        for silo in silos
    }


def _document(name: str, sections: list[Section]) -> Document:
    told: list[Any] = [[one.headings, one.text] for one in sections]
    return Document(name, rows.digest(json.dumps(told, ensure_ascii=False)), tuple(sections))
