"""Which silos are worth asking: by noisy means of groups of their vectors, and how often a question's words occur in each.

After RAGRoute (Guerraoui et al. 2025), whose router is a network trained on answered questions; this one needs no training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtailor.retrieval.scoring import Question, Statistics
from fedtailor.retrieval.store import SCALE, Vectors

Floats = npt.NDArray[np.float32]
WORDS, SELDOM = 0.3, 0.001  # the share of passages below which a word says little
LEAST = 5  # passages of a group whose mean is told, on average: of fewer it would be about these


def centroids(vectors: Vectors, count: int, noise: float, seed: int) -> Floats:
    """(at most `count`, size) means of unit vectors in groups (k-means, Lloyd 1982), each number with Gaussian noise.

    noise: standard deviation, as a multiple of how far one passage can move its group's mean, 2 / (passages of the group): the
    Gaussian mechanism for the means. Which passages form a group depends on all of them, and is not hidden by it.
    """
    count = min(count, len(vectors) // LEAST)
    if count < 1:
        return np.zeros((0, vectors.shape[1]), np.float32)
    from sklearn.cluster import KMeans

    unit = vectors.astype(np.float32) / SCALE
    groups: Any = KMeans(count, n_init=1, random_state=seed % 2**32, max_iter=50).fit(unit)
    sizes = np.bincount(groups.labels_, minlength=count).clip(min=1)
    dice = np.random.default_rng(seed % 2**63)
    spread = noise * 2 / sizes[:, None]
    moved = groups.cluster_centers_ + dice.normal(size=groups.cluster_centers_.shape) * spread
    found: Floats = moved.astype(np.float32)
    return found


@dataclass(frozen=True)
class Known:
    """Of one silo."""

    statistics: Statistics
    centroids: Floats


def promises(asked: Question, silos: Mapping[str, Known]) -> dict[str, float]:
    """How much each silo promises: the cosine of the question and its nearest mean, and how much more often than in the average
    silo the question's words are in its passages: the mean of their log ratios, by idf, times `WORDS`."""
    having = {name: silo.statistics.having for name, silo in silos.items()}
    sizes = {name: max(silo.statistics.passages, 1) for name, silo in silos.items()}
    whole = sum(asked.weights.values())
    found = {name: _nearest(asked, silo.centroids) for name, silo in silos.items()}
    for term, weight in asked.weights.items():
        shares = {name: having[name].get(term, 0) / sizes[name] for name in silos}
        mean = sum(shares.values()) / len(shares)
        for name, share in shares.items():
            found[name] += WORDS * weight / whole * math.log((share + SELDOM) / (mean + SELDOM))
    return found


def _nearest(asked: Question, means: Floats) -> float:
    if not len(means) or means.shape[1] != len(asked.vector):  # none told, or by another embedder than the question's
        return 0.0
    norms = np.linalg.norm(means, axis=1).clip(min=1e-9)
    return float((means @ asked.vector.astype(np.float32) / SCALE / norms).max())


def chosen(told: Mapping[str, float], most: int, margin: float) -> tuple[str, ...]:
    """At most `most` silos, those within `margin` of the best one's promise; of equals the first by name. In the order given."""
    ranked = sorted(told, key=lambda silo: (-told[silo], silo))[:most]
    kept = {silo for silo in ranked if told[silo] >= told[ranked[0]] - margin}
    return tuple(silo for silo in told if silo in kept)
