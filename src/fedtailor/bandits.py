"""How a budget of model calls is spread over candidates: one function each, found by name.

Each takes what is known, the candidates in the running, and `calls`, the rows that one silo may still score; it asks
through `attempt`, which tries candidates up to so many of each silo's rows and returns what is known then; and it
returns the candidates, the best first. All see a silo's rows in one order, so those tried equally far are compared on the
same rows. Means over other rows differ by the rows' luck, too, which a ranking has to allow for.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence

from fedtailor import find as finding
from fedtailor.tally import UNKNOWN, Tally

Attempt = Callable[[Mapping[int, int]], Tally]  # candidate -> up to which row; higher than there are is all of them
Bandit = Callable[[Tally, Sequence[int], int, int, Attempt], list[int]]

ALL = 2**31  # more rows than a silo has
PULL, PULLS = 8, 40  # under `ucb`: rows of a pull at least; and as many of its calls as make so many pulls, where that is more
TOGETHER = 2  # candidates of one exchange under `ucb`: an exchange costs the network more than it costs the bandit
WIDTH = 1.0  # standard errors, times sqrt(log(pulls)), that `ucb` adds


def halving(known: Tally, running: Sequence[int], calls: int, least: int, attempt: Attempt) -> list[int]:
    """Successive halving (Karnin et al. 2013; Jamieson & Talwalkar 2016): the same share of the budget for each halving.

    A share first goes to those that were tried least, so that new candidates catch up with earlier rounds' survivors.
    """
    alive = list(running)
    gone: list[int] = []  # the last dropped first
    stages = max(1, math.ceil(math.log2(max(len(alive), 2))))
    for stage in range(stages):
        share = max(calls // (stages - stage), min(calls, least * len(alive)))  # none is dropped untried
        wants = leveled(known, alive, share, least)
        if wants:
            before = spent(known)
            known = attempt(wants)
            calls -= spent(known) - before
        order = by_mean(known, alive)
        half = math.ceil(len(alive) / 2)
        alive, gone = order[:half], order[half:] + gone
    return [*alive, *gone]


def ucb(known: Tally, running: Sequence[int], calls: int, least: int, attempt: Attempt) -> list[int]:
    """Upper confidence bounds with the candidates' own variances (Auer et al. 2002, Audibert et al. 2009); ranked by lower
    ones, as rows are not the same for all."""
    # half of the calls, at most, for the first look at each
    batch = max(least, min(max(PULL, calls // PULLS), calls // (2 * len(running))))
    # each pull is a sum with noise of its own: one of fewer rows would tell of the noise and not of them
    batch = max(batch, min(math.ceil(known.noise / UNKNOWN), calls // len(running)))
    while calls >= batch:
        open_ones = [c for c in running if not known.over[c]]
        if not open_ones:
            break
        pulls = max(2.0, float((known.asked[list(running)] / batch).sum()))
        means, errors = known.mean().tolist(), known.error().tolist()
        wide = WIDTH * math.sqrt(math.log(pulls))
        bounds = {c: means[c] + wide * errors[c] if known.counts[c].any() else math.inf for c in open_ones}
        chosen = sorted(open_ones, key=lambda c: (-bounds[c], c))[: max(1, min(TOGETHER, calls // batch))]
        before, at = spent(known), known.asked
        known = attempt({c: int(at[c]) + batch for c in chosen})
        moved = any(known.asked[c] != at[c] or known.over[c] for c in chosen)
        calls -= max(spent(known) - before, 1 if moved else batch)
    lower = known.lower().tolist()
    return sorted(running, key=lambda c: (-lower[c], c))


def exhaustive(known: Tally, running: Sequence[int], calls: int, least: int, attempt: Attempt) -> list[int]:
    """Every candidate on every row, whatever it costs."""
    wants = {c: ALL for c in running if not known.over[c]}
    return by_mean(attempt(wants) if wants else known, running)


def leveled(known: Tally, running: Sequence[int], calls: int, least: int) -> dict[int, int]:
    """candidate -> up to which row, so that `calls` more rows bring those behind level with the others, then all further.

    Steps of fewer than `least` rows, of which a silo would say nothing, are left for later.
    """
    asked = {c: int(known.asked[c]) for c in running if not known.over[c]}
    if not asked:
        return {}
    levels = sorted(asked.values())
    for count in range(1, len(levels) + 1):
        level = (calls + sum(levels[:count])) // count
        if count == len(levels) or level <= levels[count]:
            break
    return {c: level for c, done in asked.items() if level - done >= max(least, 1)}


def spent(known: Tally) -> int:
    """Model calls of this round so far, of the silo that made most."""
    return known.spent


def find(name: str) -> Bandit:
    """The bandit of that name. Raises UserError with the choices."""
    found: Bandit = finding.function(__name__, name, "method.bandit", names())
    return found


def names() -> set[str]:
    return finding.functions(sys.modules[__name__]) - {"find", "names", "leveled", "spent", "confirm", "by_mean"}


def confirm(known: Tally, finalists: Sequence[int], calls: int, least: int, attempt: Attempt) -> Tally:
    """The same rows for all of the last few, as many as the rest of the budget allows."""
    wants = leveled(known, finalists, calls, least)
    return attempt(wants) if wants else known


def by_mean(known: Tally, among: Sequence[int]) -> list[int]:
    """The highest mean first; of equals the first; those never tried last."""
    means = known.mean().tolist()
    return sorted(among, key=lambda c: (-means[c], c))
