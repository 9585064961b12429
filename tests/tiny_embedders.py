"""What tests of trained embedders share: tiny ones of random weights, as folders."""

from __future__ import annotations

from pathlib import Path

import torch

from fedtailor.models import Resident

PROMPTS = {"query": "asked: ", "document": "held: "}


def bare(bert: Resident, folder: Path) -> str:
    """As transformers writes it: without a word of how states become one vector."""
    bert.tuned()
    bert.module.save_pretrained(folder)
    bert.save_reader(folder)
    return str(folder)


def whole(bert: Resident, folder: Path) -> str:
    """As sentence-transformers writes it, with prompts, and a layer after the mean of the states."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

    inner = Transformer(bare(bert, folder / "inner"), max_seq_length=48)
    inner.modality_config.pop("message", None)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layer = Dense(32, 16)
    made = SentenceTransformer(modules=[inner, Pooling(32, "mean"), layer, Normalize()], prompts=PROMPTS)
    made.save_pretrained(str(folder / "made"), create_model_card=False)
    return str(folder / "made")
