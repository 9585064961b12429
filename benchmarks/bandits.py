"""Which bandit to search prompts with: every candidate is tried on every row once, then each bandit plays on those scores.

    python benchmarks/bandits.py --scores scores.safetensors     # computes them where the file is not there, then plays

Candidates are the hand-written prompts of experiments/prompts.toml and some proposals of each kind; rows are training
rows of its silos. Told: how often the bandit's winner is the one of trying everything, how much worse its winner is (in
the mean score of all rows), over shuffles of the rows, at shares of the calls that trying everything takes.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedtailor import bandits, data, experiment, models, proposing
from fedtailor.answering import fresh
from fedtailor.prefixes import Prefixes
from fedtailor.prompts import Prompt, made, opened
from fedtailor.tally import Tally, empty, folded
from fedtailor.trying import Tried

FILE = Path(__file__).resolve().parents[1] / "experiments" / "prompts.toml"
SHARES = (0.1, 0.2, 1 / 3, 0.5)


def pool(asked: experiment.Experiment, base: models.Resident, dice: random.Random) -> list[Prompt]:
    found = [made(prompt) for prompt in asked.method.prompts]
    hand = list(found)
    texts = proposing.requests(hand, 9, dice)
    rows = [data.Row(text, "") for text, _ in texts]
    wrote = fresh(base).generate(rows, max_new_tokens=proposing.WRITES, temperature=0.8, top_p=0.95, seed=1)
    laid_out, _ = proposing._laid_out([proposing.cleaned(text) for text in wrote], [layout for _, layout in texts])
    found += [prompt for prompt in laid_out if prompt not in found]
    for count, make in (
        (6, lambda: proposing.crossed(hand, dice)),
        (9, lambda: proposing.exemplified(dice.choice(hand), asked.method.examples, 3, dice)),
    ):
        whole = len(found) + count
        while len(found) < whole:
            if (prompt := make()) not in found:
                found.append(prompt)
    return found


def scores(rows: int) -> dict[str, Tensor]:
    """"probability" and "accuracy" of each candidate on each row: (candidates, silos, rows)."""
    asked = experiment.load(FILE)
    loaded, base = data.load(asked.data, {}, 100), models.load(asked.model)
    labels, chosen = asked.data.labels, []
    for name, silo in loaded.silos.items():
        order = list(range(len(silo.train)))
        random.Random(f"m/{name}").shuffle(order)
        chosen += [silo.train[i] for i in order[:rows]]
    true = torch.tensor([labels.index(row.answer) for row in chosen])
    found: dict[str, list[Tensor]] = {"probability": [], "accuracy": []}
    prefixes = Prefixes()
    for number, prompt in enumerate(pool(asked, base, random.Random(7))):
        logits = opened(base, prompt, labels, prefixes).scores(chosen, labels).double()
        right = (logits.argmax(1) == true).double()
        found["probability"].append(logits.softmax(1).gather(1, true[:, None])[:, 0].view(-1, rows))
        found["accuracy"].append(right.view(-1, rows))
        print(f"{number:3d}  accuracy {right.mean():.3f}  {prompt.template!r}", flush=True)
    return {name: torch.stack(parts) for name, parts in found.items()}


def played(table: Tensor, how: bandits.Bandit, calls: int) -> int:
    """The candidate that this bandit chooses, as one round of a search would."""
    known = empty(table.shape[1]).grown(len(table))

    def attempt(wants: Mapping[int, int]) -> Tally:
        nonlocal known
        replies = []
        for silo in range(table.shape[1]):
            some = [table[c, silo, int(known.asked[c]) : end] for c, end in wants.items()]
            sums, squares = torch.stack([s.sum() for s in some]), torch.stack([s.square().sum() for s in some])
            replies.append((silo, Tried(sums, squares, torch.tensor([len(s) for s in some]), (False,) * len(some))))
        known = folded(known, wants, replies)
        return known

    everyone = range(len(table))
    finalists = how(known, everyone, round(0.75 * calls), 1, attempt)[:3]
    bandits.confirm(known, finalists, calls - bandits.spent(known), 1, attempt)
    return known.best(finalists)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scores", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=50, help="of each silo")
    parser.add_argument("--plays", type=int, default=200)
    given = parser.parse_args()
    if not given.scores.exists():
        save_file(scores(given.rows), given.scores)
    tables = load_file(given.scores)
    print("| chosen by | share of the calls | bandit | same winner | accuracy lost |\n|---|--:|---|--:|--:|")
    accuracy = tables["accuracy"].mean((1, 2))
    for by, table in tables.items():
        winner = int(table.mean((1, 2)).argmax())
        for share in SHARES:
            for name in ("halving", "ucb"):
                calls, same, lost = round(share * len(table) * table.shape[2]), 0, 0.0
                for seed in range(given.plays):
                    dice = torch.Generator().manual_seed(seed)
                    orders = [torch.randperm(table.shape[2], generator=dice) for _ in range(table.shape[1])]
                    mixed = torch.stack([table[:, s, order] for s, order in enumerate(orders)], 1)
                    found = played(mixed, bandits.find(name), calls)
                    same += found == winner
                    lost += float(accuracy.max() - accuracy[found])
                print(f"| {by} | {share:.2f} | {name} | {same / given.plays:.2f} | {lost / given.plays:.4f} |", flush=True)


if __name__ == "__main__":
    main()
