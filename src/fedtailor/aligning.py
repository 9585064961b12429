"""Tokens of one tokenizer told as tokens of another: where in a text they are, and which is which.

Knowledge passes between models of different tokenizers as the likeliest next tokens at each place of a shared text, as in
FedMKT (Fan et al., COLING 2025, arXiv 2406.02224). There, places are aligned by dynamic programming over the tokens'
spelling; here by the characters they begin at, which both tokenizers tell. Tokens map by minimum edit distance, as there.
"""

from __future__ import annotations

import re
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedtailor.errors import SiloError

NONE = -1  # no such token over there
ROLES = ("eos_token_id", "bos_token_id", "pad_token_id")  # of a token with several, the first is meant
BITS = 120  # of a set of letters: with more, fewer letters share one

Span = tuple[int, int]  # the first character, and the one after the last


def spans(tokenizer: Any, text: str) -> tuple[list[int], list[Span]]:
    """(token ids, character spans), in order, no special tokens added.

    A span has no white space at its ends, unless it is nothing else. Bytes of one character each have that character's span.
    Raises SiloError where the tokenizer does not tell.
    """
    _check(tokenizer)
    read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(read["input_ids"]), [_trimmed(text, *span) for span in read["offset_mapping"]]


def places(mine: Sequence[Span], theirs: Sequence[Span]) -> list[int]:
    """For each of their tokens, the index of mine that holds the character where it begins; both are in order.

    Where none holds it, the last that begins before it, else 0. Never decreases. Of several tokens that begin at one character
    (its bytes), the second is given my second, and so on. Raises ValueError where there are none of mine.
    """
    if theirs and not mine:
        raise ValueError("no tokens of mine to align theirs with")
    if list(mine) == list(theirs):
        return list(range(len(mine)))
    found: list[int] = []
    first = last = 0  # of mine that begin at one character, the nearest up to theirs
    for j, (begin, _) in enumerate(theirs):
        while last + 1 < len(mine) and mine[last + 1][0] <= begin:
            last += 1
            if mine[last][0] > mine[first][0]:
                first = last
        before = found[-1] if found else 0
        again = j > 0 and begin == theirs[j - 1][0]
        rest = range(max(first, before + again), last + 1)
        found.append(next((i for i in rest if begin < mine[i][1]), last))
    return found


def whole(mine: Sequence[Span], theirs: Sequence[Span]) -> list[bool]:
    """For each of their tokens, whether that of mine at its place begins at the same character, and is not taken by one before.

    Elsewhere what was predicted in mine is about other text: the place is to be left out.
    """
    at = places(mine, theirs)
    taken = [False, *((i, a) == (k, b) for i, k, (a, _), (b, _) in zip(at, at[1:], theirs, theirs[1:], strict=False))]
    return [mine[i][0] == begin and not past for i, (begin, _), past in zip(at, theirs, taken, strict=False)]


class Vocabulary:
    """My token ids as theirs. Each is looked up once, when it is first met."""

    def __init__(self, mine: Any, theirs: Any) -> None:
        """Two tokenizers. Raises SiloError where one is not fast: its tokens' text is not known then."""
        _check(mine)
        _check(theirs)
        self.same = bool(mine.get_vocab() == theirs.get_vocab())
        self._known: dict[int, int] = {}
        self._mine: dict[int, str] = {}
        self._exact: dict[str, int] = {}
        self._alike: dict[str, list[tuple[str, int]]] = defaultdict(list)
        self._long: dict[int, list[tuple[int, str, int]]] = defaultdict(list)  # (letters, text, id) by length
        if self.same:
            return
        self._mine = texts(mine)
        for role in reversed(ROLES):
            if (number := getattr(mine, role)) is not None:
                other = getattr(theirs, role)
                self._known[number] = NONE if other is None else other
        for number, text in texts(theirs).items():
            if text not in self._exact:
                self._exact[text] = number
                self._alike[_plain(text)].append((text, number))
                self._long[len(text)].append((_letters(text), text, number))

    def ids(self, token_ids: Tensor) -> Tensor:
        """My ids, int64 of any shape -> theirs, -1 where they have none like it. The same vocabulary: as given.

        End, beginning and padding go by their roles; other special tokens have no like. Else by text: the same; one that
        differs in case or in the leading space only, with the same leading space where there is; the nearest, see `nearest`.
        """
        if self.same:
            return token_ids
        met, where = token_ids.unique(return_inverse=True)
        found = [self._id(number) for number in met.tolist()]
        return torch.tensor(found, dtype=torch.int64, device=token_ids.device)[where]

    def nearest(self, text: str) -> int:
        """The id of the token at the least Levenshtein distance; of equals the longest common prefix, then the lowest id.

        -1 where none is within half of the longer one's length (rounded up) and shares a letter.
        """
        letters, sign = set(text.strip(" ") or text), _letters(text)
        best = (sys.maxsize, 1, NONE)  # distance, common prefix times -1, id: the least is the best
        for length in sorted(self._long, key=lambda length: abs(length - len(text))):
            apart, enough = abs(length - len(text)), (max(length, len(text)) + 1) // 2
            if apart > best[0]:
                break
            for held, other, number in self._long[length] if apart <= enough else ():
                most = min(best[0], enough)
                # a letter that the other lacks is one edit at least
                if (sign & ~held).bit_count() > most or (held & ~sign).bit_count() > most or letters.isdisjoint(other):
                    continue
                rank = (-_common(text, other), number)
                most = min(most, best[0] - (rank > best[1:]))  # one that loses among equals must be nearer
                if (edits := distance(text, other, most)) <= most:
                    best = (edits, *rank)
        return best[2]

    def _id(self, number: int) -> int:
        if number not in self._known:
            text = self._mine.get(number)
            self._known[number] = NONE if text is None else self._of(text)
        return self._known[number]

    def _of(self, text: str) -> int:
        if text in self._exact:
            return self._exact[text]

        def differs(one: tuple[str, int]) -> tuple[bool, bool, int]:
            return one[0].startswith(" ") != text.startswith(" "), one[0].lstrip(" ") != text.lstrip(" "), one[1]

        if alike := self._alike.get(_plain(text)):
            return min(alike, key=differs)[1]
        return self.nearest(text)


def projected(ids: Tensor, logp: Tensor, table: Vocabulary) -> tuple[Tensor, Tensor]:
    """(n, k) of my token ids and log-probabilities -> (n, k) of theirs, the likeliest first, the lower id of equals.

    Of several that become one, the probabilities are added. What has no like is dropped: id -1, log-probability -inf, at
    the end of its row.
    """
    mapped = table.ids(ids)
    mapped, order = mapped.where(mapped >= 0, torch.iinfo(mapped.dtype).max).sort(dim=1, stable=True)
    gone = mapped == torch.iinfo(mapped.dtype).max
    logp = logp.gather(1, order).masked_fill(gone, -torch.inf)
    group = torch.zeros_like(mapped)  # which of the row's distinct ids
    group[:, 1:] = (mapped[:, 1:] != mapped[:, :-1]).cumsum(1)
    likeliest = torch.full_like(logp, -torch.inf).scatter_reduce(1, group, logp, "amax")
    times = torch.zeros_like(logp).scatter_add(1, group, (logp - likeliest.gather(1, group)).exp())
    total = torch.where(times > 1, likeliest + times.log(), likeliest)  # one alone stays as it is, bit for bit
    theirs = torch.full_like(mapped, NONE).scatter(1, group, mapped.masked_fill(gone, NONE))
    total, order = total.sort(dim=1, descending=True, stable=True)
    return theirs.gather(1, order), total


def distance(one: str, other: str, most: int) -> int:
    """Levenshtein's: letters to insert, delete or replace; `most` + 1 where it is more than `most` >= 0."""
    beyond = most + 1
    if abs(len(one) - len(other)) > most:
        return beyond
    above = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        row = [i] + [beyond] * len(other)
        for j in range(max(1, i - most), min(len(other), i + most) + 1):  # elsewhere it is more
            same = above[j - 1]
            row[j] = same if letter == other[j - 1] else 1 + min(same, above[j], row[j - 1])
        if min(row) > most:
            return beyond
        above = row
    return min(above[-1], beyond)


def texts(tokenizer: Any) -> dict[int, str]:
    """The text of each token that is not special, by id: a word's beginning is a leading space.

    Bytes that are no UTF-8 by themselves are lone surrogates, as Python's `surrogateescape` makes them. Tokens that hardly
    occur come last: those that stand for a byte where others stand for text (`<0x41>`), signs that go on a word (`##.`).
    """
    from tokenizers import models

    backend, added = tokenizer.backend_tokenizer, tokenizer.added_tokens_decoder
    special = {*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}
    pieces = backend.model if isinstance(backend.model, models.WordPiece) else None
    alphabet = _alphabet() if "ByteLevel" in f"{backend.pre_tokenizer} {backend.decoder}" else None
    usual: dict[int, str] = {}
    rare: dict[int, str] = {}
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1]):
        known = usual
        if number in special:
            continue
        if number in added:
            text = token
        elif pieces is not None:
            text = token.removeprefix(pieces.continuing_subword_prefix)
            begins = text == token
            if len(text) == 1 and _alone(backend, text):
                known = usual if begins else rare
            elif begins:
                text = " " + text
        elif alphabet is not None:
            text = _decoded(bytes(alphabet[letter] for letter in token) if alphabet.keys() >= set(token) else token.encode())
        elif byte := re.fullmatch("<0x([0-9A-F]{2})>", token):
            text, known = _decoded(bytes.fromhex(byte[1])), rare
        else:
            text = token.replace("▁", " ")
        if text:
            known[number] = text
    return usual | rare


def _alone(backend: Any, sign: str) -> bool:
    """Whether it is cut off from a word that it follows, as signs and ideographs are: then it begins none."""
    said = f"a{sign}"
    if backend.normalizer is not None:
        said = backend.normalizer.normalize_str(said)
    return backend.pre_tokenizer is not None and len(backend.pre_tokenizer.pre_tokenize_str(said)) > 1


def _decoded(held: bytes) -> str:
    return held.decode(errors="surrogateescape")


def _alphabet() -> dict[str, int]:
    """The letters that byte-level BPE writes bytes as: printable ones stay, the others follow from 256 on (GPT-2's)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = sorted(set(range(256)) - set(shown))
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(rest)}


def _letters(text: str) -> int:
    """The set of its letters, as bits, a second one of a kind apart from the first; several may share a bit."""
    met: Counter[str] = Counter()
    bits = 0
    for letter in text:
        bits |= 1 << (ord(letter) + 37 * met[letter]) % BITS
        met[letter] += 1
    return bits


def _common(one: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _plain(text: str) -> str:
    return text.removeprefix(" ").casefold()


def _trimmed(text: str, begin: int, end: int) -> Span:
    part = text[begin:end]
    if not part.strip():
        return begin, end
    return end - len(part.lstrip()), begin + len(part.rstrip())


def _check(tokenizer: Any) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise SiloError(
            f"{type(tokenizer).__name__} tells no places of its tokens in a text: alignment needs a fast tokenizer;"
            " give one with a tokenizer.json"
        )
