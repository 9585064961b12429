"""Products of two thin matrices, left (out, k) @ right (k, in), without ever making the (out, in) matrix.

Sums of products are products of wider ones: [L1 L2] @ [R1; R2]. Everything is computed in fp64, so that differences of
nearly equal fp32 products still mean something.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Product:
    left: Tensor  # (out, k) fp64
    right: Tensor  # (k, in) fp64

    def __add__(self, other: Product) -> Product:
        if not self.left.numel() or not other.left.numel():  # nothing may have no size either
            return self if self.left.numel() else other
        return Product(torch.cat([self.left, other.left], 1), torch.cat([self.right, other.right]))

    def __sub__(self, other: Product) -> Product:
        return self + Product(-other.left, other.right)

    def __mul__(self, factor: float) -> Product:
        return Product(factor * self.left, self.right)

    def norm(self) -> float:
        """Frobenius: that of the small middle, as the outer factors of a QR keep lengths."""
        return float(self._middle()[1].norm()) if self.left.numel() else 0.0

    def thin(self, rank: int | None = None, least: float = 0.0) -> Product:
        """The nearest product of at most `rank` (Eckart & Young 1936), by QR and SVD; singular values under `least`, or under
        1e-8 of the largest, are dropped. Both sides carry the root of the singular values, largest first."""
        left, middle, right = self._middle()
        u, s, v = torch.linalg.svd(middle, full_matrices=False)
        kept = int(((s > 1e-8 * s[:1]) & (s > least)).sum()) if s.numel() else 0
        kept = kept if rank is None else min(kept, rank)
        root = s[:kept].sqrt()
        return Product(left @ u[:, :kept] * root, root[:, None] * (v[:kept] @ right))

    def _middle(self) -> tuple[Tensor, Tensor, Tensor]:
        """Q_left (out, p), R_left @ R_right^T (p, q), Q_right^T (q, in)."""
        q_left, r_left = torch.linalg.qr(self.left)
        q_right, r_right = torch.linalg.qr(self.right.T)
        return q_left, r_left @ r_right.T, q_right.T


def product(left: Tensor, right: Tensor) -> Product:
    return Product(left.double(), right.double())


def mean(products: Sequence[Product], weights: Sequence[float]) -> Product:
    """Weighted mean of the products themselves, which the product of mean factors is not."""
    whole = math.fsum(weights)
    first, *rest = (one * (weight / whole) for one, weight in zip(products, weights, strict=True))
    return sum(rest, first)
