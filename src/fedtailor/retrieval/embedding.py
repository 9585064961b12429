"""Texts -> vectors, by any model of sentence-transformers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from fedtailor.errors import UserError
from fedtailor.packaged import PACKAGED, folder
from fedtailor.retrieval.store import SCALE, Vectors


@dataclass(frozen=True)
class Embedder:
    """A model that is open. Two with equal hashes make the same vectors of the same text, but for the last bits."""

    model: Any  # SentenceTransformer
    name: str
    sha256: str  # over its weights

    @property
    def base(self) -> Embedder:
        """What it was trained from: itself, where nothing was."""
        return self

    @property
    def base_sha256(self) -> str:
        return self.base.sha256

    @property
    def size(self) -> int:
        return int(self.model.get_embedding_dimension())

    @property
    def reads(self) -> int:
        """Tokens of a text that it takes in, without its own marks."""
        return int(self.model.max_seq_length - self.model.tokenizer.num_special_tokens_to_add())

    def passages(self, texts: Sequence[str]) -> Vectors:
        """(texts, size) int16, of unit length times `SCALE`."""
        return self._made(texts, "encode_document")

    def questions(self, texts: Sequence[str]) -> Vectors:
        return self._made(texts, "encode_query")

    def _made(self, texts: Sequence[str], how: str) -> Vectors:
        if not texts:
            return np.zeros((0, self.size), np.int16)
        # encode_query and encode_document put in front what the model was trained with, such as "query: "
        found = getattr(self.model, how)(list(texts), normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False)
        made: Vectors = np.rint(found * SCALE).astype(np.int16)
        return made


def load(name: str) -> Embedder:
    """`name`: a packaged encoder, a local folder or a hub id. Raises UserError."""
    try:
        import sentence_transformers as st
        from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    except ModuleNotFoundError:
        raise UserError("embedding documents needs the extra: pip install 'fedtailor[rag]'") from None
    if name not in PACKAGED and Path(name).is_dir():
        name = str(Path(name).resolve())  # it is found again from another folder
    source = str(folder(name)) if name in PACKAGED else name
    try:
        if _bare(Path(source)):
            inner = Transformer(source)
            inner.modality_config.pop("message", None)  # a chat template would be put around each text
            model = st.SentenceTransformer(modules=[inner, Pooling(inner.get_embedding_dimension(), "mean")])
        else:
            model = st.SentenceTransformer(source)
    except (OSError, ValueError) as error:
        raise UserError(f"embedder {name!r}: cannot be loaded ({str(error).splitlines()[0]})") from error
    if not hasattr(model.tokenizer, "num_special_tokens_to_add"):
        raise UserError(f"embedder {name!r}: no transformer, whose tokens passages are cut by; choose another")
    weights = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        weights.update(key.encode() + tensor.cpu().contiguous().float().numpy().tobytes())
    return Embedder(model.eval(), name, weights.hexdigest())


@cache
def resident(name: str) -> Embedder:
    """As `load`, once in a process."""
    return load(name)


def _bare(source: Path) -> bool:
    """A folder of weights without a word of how states become one vector: then it is their mean."""
    if not source.is_dir():
        return False
    file = source / "modules.json"
    parts = json.loads(file.read_text(encoding="utf-8")) if file.exists() else [{"type": "Pooling", "path": "none"}]
    return any(part["type"].endswith("Pooling") and not (source / part["path"] / "config.json").exists() for part in parts)
