"""Sentences with a human sentiment rating, from four places that talk differently.

C.J. Hutto and E. Gilbert (2014), VADER: A parsimonious rule-based model for sentiment analysis of social media text,
ICWSM. The ground truth is in the source distribution of vaderSentiment: `*_GroundTruth.txt` (id, mean of about twenty
ratings from -4 to 4, text) and `*_anonDataRatings.txt` (their standard deviation).
"""

from __future__ import annotations

import html
import io
import re
import tarfile
from pathlib import Path
from typing import Any

from fedtailor import fetch
from fedtailor.demo import split_of

DESCRIPTION = "23,446 rated sentences, negative / neutral / positive; 4 silos: tweets, products, movies, editorials"
LICENCE = "MIT (vaderSentiment, C.J. Hutto)"

REQUIREMENT = "vaderSentiment==3.3.2"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
MEMBER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
SILOS = {
    "tweets": "tweets",
    "product_reviews": "amazonReviewSnippets",
    "movie_reviews": "movieReviewSnippets",
    "news_editorials": "nytEditorialSnippets",
}


def build() -> list[dict[str, Any]]:
    return from_sdist(fetch.package(REQUIREMENT, SHA256, kind="sdist"))


def from_sdist(path: Path) -> list[dict[str, Any]]:
    """Columns: id, silo, text, label, score, rater_sd, doc, split. Split by document: a review's sentences stay
    together. Of sentences that differ in case or punctuation only, the first is kept."""
    with tarfile.open(path) as sdist:
        inner = sdist.extractfile(MEMBER)
        assert inner is not None
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as corpus:
            files = {
                silo: (
                    _lines(corpus, f"{stem}_GroundTruth.txt", "cp1252"),
                    _lines(corpus, f"{stem}_anonDataRatings.txt", "utf-8-sig"),
                )
                for silo, stem in SILOS.items()
            }
    rows = []
    seen = set()
    for silo, (truth, ratings) in files.items():
        deviation = {number: float(sd) for number, _, sd, *_ in ratings}
        for number, mean, raw in truth:
            # Twice: part of the corpus was escaped twice.
            text = html.unescape(html.unescape(raw)).strip()
            folded = re.sub(r"\W+", " ", text.casefold()).strip()
            if not folded or folded in seen:
                continue
            seen.add(folded)
            score = float(mean)
            label = "negative" if score <= -0.5 else "positive" if score >= 0.5 else "neutral"
            doc = f"{silo}:{number.split('_')[0]}"
            rows.append(
                {
                    "id": f"{silo}:{number}",
                    "silo": silo,
                    "text": text,
                    "label": label,
                    "score": round(score, 3),
                    "rater_sd": deviation[number],
                    "doc": doc,
                    "split": split_of(doc),
                }
            )
    return rows


def _lines(corpus: tarfile.TarFile, name: str, encoding: str) -> list[list[str]]:
    file = corpus.extractfile(f"hutto_ICWSM_2014/{name}")
    assert file is not None
    text = file.read().decode(encoding, errors="replace")
    return [line.split("\t") for line in text.replace("\r\n", "\n").split("\n") if line.strip()]
