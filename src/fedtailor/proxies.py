"""Public rows that stand for private ones: written by the base where there are none, and how far they are from a silo's own."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedtailor.answering import fresh
from fedtailor.core import Silo
from fedtailor.data import Row
from fedtailor.errors import UserError
from fedtailor.rows import columns, filled

WRITES = 48  # tokens of a row at most
ENOUGH = 2000  # rows of a silo's that its distance is taken over
UNSEEN = 0.1  # Lidstone smoothing: what a token counts besides how often it was seen


def generated(here: Silo, count: int, begin: str) -> tuple[Row, ...]:
    """`count` different rows whose text the base wrote, sampled at temperature 1 as it goes on with `begin`, in the experiment's
    template. Raises UserError where that has not exactly one field, or where the base keeps writing the same."""
    template = str(here.data.settings.get("template", ""))
    if len(names := columns(template)) != 1:
        raise UserError(f"[method] generated: the template must have one field, not {list(names)}; name public rows instead")
    found: dict[str, None] = {}
    for attempt in range(4):
        wrote = fresh(here.models["base"]).generate(
            [Row(begin, "")] * count, max_new_tokens=WRITES, temperature=1.0, top_p=0.95, seed=here.seed % 2**31 + attempt
        )
        found |= dict.fromkeys(line for text in wrote if len(line := " ".join(text.split())) > 2)
        if len(found) >= count:
            made = (filled(template, {names[0]: text}) for text in list(found)[:count])
            return tuple(Row(prompt, "", frame=frame) for prompt, frame in made)
    raise UserError(f"[method] generated = {count}: the base wrote {len(found)} rows that differ; ask for fewer")


def distance(tokenizer: Any, public: Sequence[Row], own: Sequence[Row]) -> float:
    """The Jensen-Shannon divergence between the distributions of their tokens, in bits: 0 (alike) to 1 (no token in common).

    A similarity of domains by Ruder & Plank 2017, there of words. Few rows are further from anything than many are.
    """
    one, other = (_shares(tokenizer, rows[:ENOUGH]) for rows in (public, own))
    ids = sorted(one.keys() | other.keys())
    if not one or not other:
        return 0.0
    p, q = (torch.tensor([shares.get(i, 0.0) for i in ids], dtype=torch.float64) for shares in (one, other))
    middle = (p + q) / 2
    halves = [torch.special.xlogy(x, x / middle).nansum() for x in (p, q)]
    return min(1.0, max(0.0, float(sum(halves) / 2 / torch.log(torch.tensor(2.0, dtype=torch.float64)))))


def strangeness(tokenizer: Any, public: Sequence[Row], own: Sequence[Row]) -> Tensor:
    """(rows,) of each public row the mean of -log p of its tokens, in nats, by how often a silo's own rows have them: lower where
    the row is as the silo's own are. A token that they lack counts as seen `UNSEEN` times. 0 for a row without tokens."""
    counts = Counter(token for some in _tokens(tokenizer, own) for token in some)
    whole = counts.total() + UNSEEN * len(tokenizer)
    return torch.tensor(
        [-sum(math.log((counts[t] + UNSEEN) / whole) for t in some) / max(len(some), 1) for some in _tokens(tokenizer, public)]
    )


def _shares(tokenizer: Any, rows: Sequence[Row]) -> dict[int, float]:
    counts = Counter(token for some in _tokens(tokenizer, rows) for token in some)
    return {token: n / counts.total() for token, n in counts.items()}


def _tokens(tokenizer: Any, rows: Sequence[Row]) -> list[list[int]]:
    """Of what each row asks, without the template's words around it."""
    texts = [row.input or " ".join(turn["content"] for turn in row.messages) for row in rows]
    return tokenizer(texts, add_special_tokens=False).input_ids if texts else []
