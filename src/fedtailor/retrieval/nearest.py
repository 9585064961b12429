"""The nearest of many vectors, most of them, by a graph over all (HNSW: Malkov & Yashunin 2018, in FAISS): few are compared.

A graph says which passages are worth scoring, no more: whoever asks computes the scores, so these are those of an exact search.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fedtailor import progress
from fedtailor.errors import SiloError
from fedtailor.retrieval.store import SCALE, Vectors

LEAST = 10_000  # passages: fewer are compared one by one in 1 ms; a graph takes seconds to make, half a millisecond to search
LINKS, COMPARED = 32, 80  # of a passage that is put in; by 40, 1 in 60 of the nearest of 100,000 in groups was not found
LOOKED = 256  # passages that a search keeps in view, at least; twice as many as are wanted where that is more
GONE = 0.25  # of a graph's passages, from which on it is made anew: they are still walked through
AT_ONCE = 1 << 14  # vectors that are held as 4 bytes a number
Places = npt.NDArray[np.int64]


class Graph:
    """Over an index's vectors, in memory: 2 bytes a number, and some 300 a passage.

    The same versions of an index, one after the other, give the same graph, with any number of threads (FAISS 1.15.1 and later).
    """

    def __init__(self, size: int) -> None:
        self.faiss, self.size = _faiss(), size
        self._empty()

    def _empty(self) -> None:
        kind = self.faiss.ScalarQuantizer.QT_fp16
        self.index = self.faiss.IndexHNSWSQ(self.size, kind, LINKS, self.faiss.METRIC_INNER_PRODUCT)
        self.index.hnsw.efConstruction = COMPARED
        self.ids = np.zeros(0, np.int64)  # in the order in which they were put in

    def follow(self, ids: npt.NDArray[np.int64], vectors: Vectors) -> None:
        """To an index's passages as they are now. ids: (n,), each once, and never given to another vector; vectors: (n, size)."""
        import torch

        if np.isin(self.ids, ids, assume_unique=True).sum() < (1 - GONE) * len(self.ids):
            self._empty()
        new = np.flatnonzero(~np.isin(ids, self.ids, assume_unique=True))
        self.faiss.omp_set_num_threads(torch.get_num_threads())
        with progress.bar("a graph of passages", -(-len(new) // AT_ONCE)) as advance:
            for begin in range(0, len(new), AT_ONCE):
                some = new[begin : begin + AT_ONCE]
                self.index.add(vectors[some].astype(np.float32) / SCALE)
                self.ids = np.concatenate([self.ids, ids[some]])
                advance()
        _, there, here = np.intersect1d(self.ids, ids, assume_unique=True, return_indices=True)
        self.places = np.full(len(self.ids), -1)
        self.places[there] = here
        self.left = self.faiss.IDSelectorBitmap(np.packbits(self.places >= 0, bitorder="little"))

    def nearest(self, vector: Vectors, most: int) -> Places:
        """Places in `ids` and `vectors` as they were told last, ascending: the nearest `most` are likely among them. There are
        more than `most`, where it has more, so that whoever scores them chooses among equals."""
        looked = max(LOOKED, 2 * most)
        how = self.faiss.SearchParametersHNSW(efSearch=looked, sel=self.left)
        _, found = self.index.search(vector[None].astype(np.float32) / SCALE, looked, params=how)
        places: Places = np.sort(self.places[found[0][found[0] >= 0]])
        return places


def _faiss() -> Any:
    """Raises SiloError where it is not installed."""
    try:
        import faiss
    except ImportError:
        why = f'search = "approximate" among {LEAST:,} passages or more needs the extra'
        raise SiloError(f"{why}: pip install 'fedtailor[ann]' at the silo; or set search = \"exact\"") from None
    return faiss
