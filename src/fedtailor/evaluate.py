"""Evaluation goes to the data: the served model travels, sums and counts come back, never a row or an answer.

Metrics (all over one silo's rows, then `mean` unweighted over silos and the `worst` silo beside it):
accuracy, macro_f1, exact_match, rouge_l, bleu: 0 to 1, higher is better; loss: nats per answer token, lower is better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from fedtailor import limits
from fedtailor.answering import Answers
from fedtailor.core import Ask, Reply, Silo, in_silo
from fedtailor.data import Row

LOWER_IS_BETTER = frozenset({"loss", "silos_asked", "attack_success"})
TOGETHER = 64  # silos whose rows are scored in one go


@dataclass(frozen=True)
class Evaluation:
    """The [evaluate] part of an experiment."""

    max_new_tokens: Annotated[int, Field(ge=1)] = 32
    every: Annotated[int, Field(ge=1)] = 1  # rounds between validations; the last round is always validated
    best_by: Literal["loss", "accuracy", "macro_f1", "exact_match", "rouge_l", "bleu", "recall_at_5", "mrr"] = "loss"
    """The validation metric that chooses the round. On generation only loss is cheap."""
    examples: Annotated[int, Field(ge=1)] = 3  # of the few-shot row
    samples: Annotated[int, Field(ge=0)] = 4  # answers shown in the report; in process only


@dataclass(frozen=True)
class Evaluate:
    """Down: what is served, and which rows to try it on."""

    served: Any
    split: str  # "val" or "test"
    max_new_tokens: int
    generate: bool = True  # false: loss alone, which needs no text to be made


@dataclass(frozen=True)
class Counts:
    """Up: sums over the silo's rows, of none where they are fewer than its minimum. No row and no answer leaves; of a silo
    with one row, and no minimum, the sums are that row's score."""

    rows: int
    places: int  # answer tokens
    nll: float  # summed negative log-likelihood of the answers, nats
    confusion: tuple[tuple[int, ...], ...] = ()  # [true label][told label]
    exact: int = 0
    rouge_l: float = 0.0  # summed F-measure
    bleu: tuple[int, ...] = ()  # matched 1..4-grams, told 1..4-grams, told length, reference length: corpus BLEU's sums
    told: bool = False  # whether text was made: exact, rouge_l and bleu hold

    def problem(self, asked: Evaluate) -> str | None:
        flat = [n for row in self.confusion for n in row]
        square = all(len(row) == len(self.confusion) for row in self.confusion)
        told = min([self.rows, self.places, self.exact, *flat, *self.bleu]) >= 0 and (not flat or sum(flat) == self.rows)
        if math.isnan(self.nll):
            return "the loss is nan: lower method.lr or method.server_lr"
        if not told or not square or not 0 <= self.nll < math.inf or not 0 <= self.rouge_l <= self.rows + 1e-6:
            return f"counts are out of bounds: {self.rows} rows, {self.places} places, nll {self.nll}"
        return None


def metrics(counts: Counts) -> dict[str, float]:
    """The figures of one silo. Empty when it has no rows."""
    if not counts.rows:
        return {}
    found = {"loss": counts.nll / max(counts.places, 1)}
    if counts.confusion:
        found["accuracy"] = sum(row[i] for i, row in enumerate(counts.confusion)) / counts.rows
        found["macro_f1"] = macro_f1(counts.confusion)
    elif counts.told:
        from sacrebleu.metrics.bleu import BLEU

        found["exact_match"] = counts.exact / counts.rows
        found["rouge_l"] = counts.rouge_l / counts.rows
        matched, told, (told_length, reference_length) = counts.bleu[:4], counts.bleu[4:8], counts.bleu[8:]
        score = BLEU.compute_bleu(list(matched), list(told), told_length, reference_length, smooth_method="exp")
        found["bleu"] = score.score / 100
    return found


def macro_f1(confusion: Sequence[Sequence[int]]) -> float:
    """Mean F1 over the labels that occur, as true or as told."""
    from sklearn.metrics import f1_score

    pairs = [(t, p, n) for t, row in enumerate(confusion) for p, n in enumerate(row) if n]
    true, told, weights = zip(*pairs, strict=True)
    return float(f1_score(true, told, sample_weight=weights, average="macro", zero_division=0))


def summary(counts: Mapping[str, Counts]) -> dict[str, dict[str, Any]]:
    """{metric: {"mean", "worst", "per_silo", "pooled"}}; "pooled" is over all silos' rows together, each row counting the same.

    Silos that tell apart other labels have nothing pooled.
    """
    out = over_silos({silo: metrics(one) for silo, one in counts.items()})
    if len({len(one.confusion) for one in counts.values() if one.rows}) == 1:
        for name, value in metrics(joint(list(counts.values()))).items():
            out[name]["pooled"] = value
    return out


def success(counts: Mapping[str, Counts]) -> dict[str, dict[str, Any]]:
    """Of a backdoor: the accuracy on rows that its trigger is in, as one metric. Lower is better. Empty where there is no row."""
    found = over_silos({silo: {"attack_success": metrics(one)["accuracy"]} for silo, one in counts.items() if one.rows})
    return {name: {**one, "pooled": metrics(joint(list(counts.values())))["accuracy"]} for name, one in found.items()}


def over_silos(per_silo: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """{metric: {"mean", "worst", "per_silo"}} over the silos that have it."""
    names = sorted({name for found in per_silo.values() for name in found})
    out = {}
    for name in names:
        values = {silo: found[name] for silo, found in per_silo.items() if name in found}
        worst = max if name in LOWER_IS_BETTER else min
        out[name] = {"mean": sum(values.values()) / len(values), "worst": worst(values.values()), "per_silo": values}
    return out


def better(name: str, new: float, old: float) -> bool:
    return new < old if name in LOWER_IS_BETTER else new > old


def joint(some: Sequence[Counts]) -> Counts:
    """The counts of all rows of these."""
    wide = [one for one in some if one.rows]
    return Counts(
        rows=sum(one.rows for one in wide),
        places=sum(one.places for one in wide),
        nll=math.fsum(one.nll for one in wide),
        confusion=tuple(
            tuple(map(sum, zip(*rows, strict=True))) for rows in zip(*(one.confusion for one in wide), strict=True)
        ),
        exact=sum(one.exact for one in wide),
        rouge_l=math.fsum(one.rouge_l for one in wide),
        bleu=tuple(map(sum, zip(*(one.bleu for one in wide), strict=True))),
        told=any(one.told for one in wide),
    )


def ask_all(ask: Ask, body: Evaluate, to: Sequence[str] | None = None) -> dict[str, Counts]:
    """Each silo's counts."""
    replies: Sequence[Reply[Counts]] = list(ask(evaluate, body, to=to))
    return {reply.silo: reply.body for reply in replies}


def evaluate_many(silos: Sequence[Silo], body: Evaluate) -> list[Counts]:
    """Many silos in one go: their rows are scored in shared batches, and counted apart."""
    if any(silo.data.labels != silos[0].data.labels for silo in silos):  # [silo.NAME] may ask another question
        return [evaluate_many([silo], body)[0] for silo in silos]
    model: Answers = body.served.open(silos[0].models)
    rows = [limits.counted(silo.data, body.split) for silo in silos]
    together = [row for some in rows for row in some]
    labels = silos[0].data.labels
    one_by_one = _classes(model, together, labels) if labels else _texts(model, together, body)
    ends = [sum(map(len, rows[: i + 1])) for i in range(len(rows))]
    return [_added(one_by_one[end - len(some) : end], labels) for some, end in zip(rows, ends, strict=True)]


evaluate_many.together = TOGETHER  # type: ignore[attr-defined]


@in_silo(cohort=evaluate_many, memory=False)
def evaluate(silo: Silo, body: Evaluate) -> Counts:
    return evaluate_many([silo], body)[0]


@dataclass(frozen=True)
class _Scored:
    places: int
    nll: float
    cell: tuple[int, int] | None = None  # (true, told)
    exact: int = 0
    rouge_l: float = 0.0
    bleu: tuple[int, ...] = field(default=(0,) * 10)
    told: bool = False


def _classes(model: Answers, rows: Sequence[Row], labels: Sequence[str]) -> list[_Scored]:
    """The causal model's scores for the label words (an encoder's: its head's); the likeliest is told."""
    scores = model.scores(rows, labels)
    true = [labels.index(row.answer) for row in rows]
    lengths = model.places(rows, labels)
    told = scores.argmax(1).tolist() if rows else []
    return [
        _Scored(length, -scores[i, t].item(), (t, p))
        for i, (t, p, length) in enumerate(zip(true, told, lengths, strict=True))
    ]


def _texts(model: Answers, rows: Sequence[Row], body: Evaluate) -> list[_Scored]:
    likely = model.logprobs(rows)
    if not body.generate:
        return [_Scored(places, -total) for total, places in likely]
    told = model.generate(rows, max_new_tokens=body.max_new_tokens)
    return [
        _Scored(
            places,
            -total,
            None,
            int(text.strip() == row.answer.strip()),
            rouge_l(text, row.answer),
            bleu(text, row.answer),
            True,
        )
        for (total, places), text, row in zip(likely, told, rows, strict=True)
    ]


def _added(scored: Sequence[_Scored], labels: Sequence[str]) -> Counts:
    confusion = torch.zeros(len(labels), len(labels), dtype=torch.long)
    for one in scored:
        if one.cell is not None:
            confusion[one.cell] += 1
    return Counts(
        rows=len(scored),
        places=sum(s.places for s in scored),
        nll=sum(s.nll for s in scored),
        confusion=tuple(map(tuple, confusion.tolist())),
        exact=sum(s.exact for s in scored),
        rouge_l=sum(s.rouge_l for s in scored),
        bleu=tuple(sum(s.bleu[i] for s in scored) for i in range(10)),
        told=any(s.told for s in scored),
    )


@cache
def _rouge() -> Callable[[str, str], Any]:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False).score  # type: ignore[no-any-return]


def rouge_l(told: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words (Lin 2004), 0 to 1."""
    return float(_rouge()(reference, told)["rougeL"].fmeasure)


def bleu(told: str, reference: str) -> tuple[int, ...]:
    """One row's sums for corpus BLEU: matched and told 1..4-grams, told length, reference length."""
    from sacrebleu import corpus_bleu

    score = corpus_bleu([told], [[reference]])
    return (*map(int, score.counts), *map(int, score.totals), int(score.sys_len), int(score.ref_len))
