"""How well questions were answered, told by who asked: was the right document found, how like the right answer is what it got.

recall_at_5: share of questions whose document is among the first 5 passages; mrr: mean of 1 / rank of its first passage, 0 beyond
10; token_f1: of the words of answers (Rajpurkar et al. 2016); rouge_l: see `evaluate`. All 0 to 1, higher is better. silos_asked:
on average, of a question.
"""

from __future__ import annotations

import re
import string
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from fedtailor.baselines import POOLED
from fedtailor.data import Row
from fedtailor.evaluate import over_silos, rouge_l
from fedtailor.retrieval.answered import Source
from fedtailor.retrieval.answerer import Asking, question_of

METRICS = ("recall_at_5", "mrr", "token_f1", "rouge_l", "silos_asked")
DEEP = 10


def summary(found: Mapping[str, Mapping[str, float]], rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """{metric: {"mean", "worst", "per_silo", "pooled"}} of figures by question, `rows` by whose they are: a silo of their id."""
    by_silo = defaultdict[str, dict[str, list[float]]](lambda: defaultdict(list))
    pooled = defaultdict[str, list[float]](list)
    for row in rows:
        for name, value in found.get(row.id, {}).items():
            by_silo[row.id.partition("/")[0]][name].append(value)
            pooled[name].append(value)
    told = over_silos({silo: {n: sum(v) / len(v) for n, v in some.items()} for silo, some in by_silo.items()})
    for name, values in pooled.items():
        told[name]["pooled"] = sum(values) / len(values)
    return told


def figures(model: Asking, rows: Sequence[Row], answered: Sequence[Row] = ()) -> dict[str, dict[str, float]]:
    """By row id. `rows`: their ids are silo/document of the right one. `answered`: those that are answered in text, too."""
    told: dict[str, dict[str, float]] = {row.id: {} for row in rows}
    if model.asks is not None and rows:
        results = model.finder.find([question_of(row) for row in rows])
        names = model.finder.sources(results, DEEP, texts=False)
        for row, result, some in zip(rows, results, names, strict=True):
            ranks = [rank for rank, one in enumerate(some, 1) if document(one) == row.id]
            told[row.id] |= {
                "recall_at_5": float(bool(ranks and ranks[0] <= 5)), "mrr": 1 / ranks[0] if ranks else 0.0,
                "silos_asked": float(len(result.silos)),
            }  # fmt: skip
    written = model.generate(answered) if answered else []
    for row, text in zip(answered, written, strict=True):
        told[row.id] |= {"token_f1": token_f1(text, row.answer), "rouge_l": rouge_l(text, row.answer)}
    return told


def document(source: Source) -> str:
    """silo/document, as in an index over all of them."""
    return source.document if source.silo == POOLED else f"{source.silo}/{source.document}"


def token_f1(told: str, reference: str) -> float:
    """Harmonic mean of precision and recall of the words, without articles and punctuation (as SQuAD's own evaluation)."""
    one, other = Counter(_words(told)), Counter(_words(reference))
    shared = (one & other).total()
    return 2 * shared / (one.total() + other.total()) if shared else float(not one and not other)


def _words(text: str) -> list[str]:
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()
