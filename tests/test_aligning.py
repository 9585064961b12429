"""Tokens of two tokenizers, aligned: by hand on small vocabularies, and on any text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from fedtailor.aligning import Vocabulary, distance, places, projected, spans, texts, whole
from fedtailor.errors import SiloError
from fedtailor.packaged import folder
from fedtailor.tiny import byte_tokenizer

ALPHABET = sorted(ByteLevel.alphabet())
SENTENCES = [
    "The old bear walked slowly through the walking forest.",
    "Tokenizers differ: one keeps café whole, another cuts it into pieces!",
    "the bears were older than the forests, and the tokens shorter",
]
PIECES = ["the", " ", "  ", "\n", "\t", "Bear", "café", "😀", "👩‍🚀", "東京", "é", "e\u0301", "\u3000", "walking", ".", "ß", "İ"]
TEXT = st.one_of(st.lists(st.sampled_from(PIECES), max_size=12).map("".join), st.text(max_size=20))
COMMON = settings(max_examples=60, deadline=None)


def bpe(more: Sequence[str] = (), merges: Sequence[tuple[str, str]] = (), **roles: str) -> Any:
    """Byte-level: ids 0 to 255 are the sorted alphabet, then what merges make, then `more`, then the roles' tokens."""
    words = [*ALPHABET, *(a + b for a, b in merges), *more]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=list(merges)))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)


def wordpiece(words: Sequence[str], **roles: str) -> Any:
    """Ids are the places in `words`, which begin with [UNK] at 0; the roles' tokens come after."""
    vocabulary = {word: i for i, word in enumerate(["[UNK]", *words])}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **roles)


@cache
def trained(kind: str) -> Any:
    """Trained on SENTENCES, so that words are cut; "bytes" is one token a byte."""
    if kind == "bytes":
        return byte_tokenizer()
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer: Any = trainers.BpeTrainer(vocab_size=330, initial_alphabet=ALPHABET, show_progress=False)
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=90, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]" if kind == "wordpiece" else None)


KINDS = st.sampled_from(["bytes", "bpe", "wordpiece"])
MERGES = [("h", "i"), ("c", "a"), ("ca", "f"), ("Ġ", "caf"), ("Ã", "©")]


# spans


def test_spans_by_hand() -> None:
    """hi|Ġcaf|é|Ġ|four bytes of one character, and hi|caf|##é|[UNK]."""
    ids, found = spans(bpe(merges=MERGES), "hi café 😀")
    assert ids[:3] == [256, 259, 260]
    assert found == [(0, 2), (3, 6), (6, 7), (7, 8), (8, 9), (8, 9), (8, 9), (8, 9)]
    assert spans(wordpiece(["hi", "caf", "##é"]), "hi café 😀") == ([1, 2, 3, 0], [(0, 2), (3, 6), (6, 7), (8, 9)])


def test_a_tokenizer_without_offsets_is_refused() -> None:
    for use in (lambda: spans(ByT5Tokenizer(), "a"), lambda: Vocabulary(byte_tokenizer(), ByT5Tokenizer())):
        with pytest.raises(SiloError, match=r"ByT5Tokenizer.*fast tokenizer"):
            use()


@COMMON
@given(KINDS, TEXT)
def test_spans_are_in_order_and_without_white_space_around(kind: str, text: str) -> None:
    ids, found = spans(trained(kind), text)
    assert len(ids) == len(found)
    assert found == sorted(found)
    for begin, end in found:
        part = text[begin:end]
        assert part.strip() in ("", part)


# places


def test_places_by_hand() -> None:
    bytes_ = [(0, 2), (3, 6), (6, 7), (7, 8), (8, 9), (8, 9), (8, 9), (8, 9)]
    words = [(0, 2), (3, 6), (6, 7), (8, 9)]
    assert places(bytes_, words) == [0, 1, 2, 4]
    assert whole(bytes_, words) == [True] * 4
    assert places(words, bytes_) == [0, 1, 2, 2, 3, 3, 3, 3]
    assert whole(words, bytes_) == [True, True, True, False, True, False, False, False]


def test_within_a_token_before_all_and_after_all() -> None:
    mine = [(2, 6), (7, 9)]
    assert places(mine, [(0, 1), (2, 4), (4, 6), (6, 7), (7, 8), (12, 13)]) == [0, 0, 0, 0, 1, 1]
    assert whole(mine, [(0, 1), (2, 4), (4, 6), (6, 7), (7, 8), (12, 13)]) == [False, True, False, False, True, False]


def test_the_bytes_of_a_character_pair_in_order() -> None:
    assert places([(0, 1), (1, 2), (1, 2), (2, 3)], [(1, 2), (1, 2), (1, 2), (2, 3)]) == [1, 2, 2, 3]
    assert whole([(0, 1), (1, 2), (1, 2), (2, 3)], [(1, 2), (1, 2), (1, 2), (2, 3)]) == [True, True, False, True]
    assert places([(0, 2), (2, 2), (2, 5)], [(0, 2), (2, 5)]) == [0, 2]  # one of nothing holds nothing
    assert places([(0, 2), (2, 2), (2, 5)], [(0, 2), (2, 2), (2, 5)]) == [0, 1, 2]
    assert places([(0, 2), (1, 2)], [(0, 1), (1, 2)]) == [0, 1]  # of two that hold it, the one that begins there


def test_nothing_to_align() -> None:
    assert places([], []) == places([(0, 1)], []) == []
    with pytest.raises(ValueError, match="no tokens of mine"):
        places([], [(0, 1)])


@COMMON
@given(KINDS, TEXT)
def test_a_tokenizer_aligns_with_itself_as_it_is(kind: str, text: str) -> None:
    found = spans(trained(kind), text)[1]
    assert places(found, found) == list(range(len(found)))
    assert whole(found, found) == [True] * len(found)


@COMMON
@given(KINDS, KINDS, TEXT)
def test_places_are_in_order_and_hold_the_character(one: str, other: str, text: str) -> None:
    mine, theirs = spans(trained(one), text)[1], spans(trained(other), text)[1]
    if theirs and not mine:
        return
    at = places(mine, theirs)
    assert len(at) == len(theirs)
    assert at == sorted(at)
    for i, (begin, _) in zip(at, theirs, strict=True):
        holders = [k for k, (first, end) in enumerate(mine) if first <= begin < end]
        before = [k for k, (first, _) in enumerate(mine) if first <= begin]
        assert i in (holders or before[-1:] or [0])


# the edit distance


def full(one: str, other: str) -> int:
    matrix = [[i + j for j in range(len(other) + 1)] for i in range(len(one) + 1)]
    for i, a in enumerate(one, 1):
        for j, b in enumerate(other, 1):
            matrix[i][j] = min(matrix[i - 1][j] + 1, matrix[i][j - 1] + 1, matrix[i - 1][j - 1] + (a != b))
    return matrix[-1][-1]


@settings(max_examples=300, deadline=None)
@given(st.text("abc", max_size=9), st.text("abc", max_size=9), st.integers(0, 9))
def test_the_distance_is_that_of_the_full_matrix(one: str, other: str, most: int) -> None:
    assert distance(one, other, most) == min(full(one, other), most + 1)


@settings(max_examples=100, deadline=None)
@given(st.text(" abAé", min_size=1, max_size=7), st.lists(st.text(" abcAÃ", min_size=1, max_size=8), max_size=12))
def test_the_nearest_is_what_a_look_at_all_finds(text: str, words: list[str]) -> None:
    words = sorted({*words} - set(ALPHABET))
    table = Vocabulary(byte_tokenizer(), bpe([word.replace(" ", "Ġ") for word in words]))
    ranks = [(full(text, other), -common(text, other), number) for other, number in table._exact.items() if near(text, other)]
    assert table.nearest(text) == (min(ranks)[2] if ranks else -1)


def near(text: str, other: str) -> bool:
    enough = (max(len(text), len(other)) + 1) // 2
    return full(text, other) <= enough and bool(set(text.strip(" ") or text) & set(other))


def common(one: str, other: str) -> int:
    return max(k for k in range(len(one) + 1) if other.startswith(one[:k]))


# vocabularies


def test_texts_of_three_kinds() -> None:
    assert texts(bpe(["Ġcaf" + "Ã©", "ðŁĺ"], eos_token="<end>"))[256] == " café"
    assert texts(bpe(["ðŁĺ"], eos_token="<end>"))[256] == "\udcf0\udc9f\udc98"
    assert 257 not in texts(bpe(["ðŁĺ"], eos_token="<end>"))
    assert texts(wordpiece(["token", "##s"])) == {1: " token", 2: "s"}
    pieces = {"<unk>": 0, "<0x41>": 1, "<0xC3>": 2, "▁caf": 3, "A": 4}
    sentencepiece = Tokenizer(models.BPE(vocab=pieces, merges=[], unk_token="<unk>", byte_fallback=True))
    sentencepiece.pre_tokenizer = pre_tokenizers.Metaspace()
    known = texts(PreTrainedTokenizerFast(tokenizer_object=sentencepiece, unk_token="<unk>"))
    assert list(known.items()) == [(3, " caf"), (4, "A"), (1, "A"), (2, "\udcc3")]  # a byte's token is the last choice


def test_the_same_space_counts_more_than_the_same_case() -> None:
    mine = bpe(["Ġbear", "Ġelk"])
    assert Vocabulary(mine, wordpiece(["##bear", "BEAR", "##ELK", "##elk"])).ids(torch.tensor([256, 257])).tolist() == [2, 4]


def test_a_sign_begins_no_word() -> None:
    """It is cut off from the word before, so `##.` is hardly met; "Ġ." is not what "." of a WordPiece is."""
    mine, theirs = bpe(["Ġ."]), wordpiece(["##.", ".", "a", "##a"])
    assert list(texts(theirs).items()) == [(2, "."), (3, " a"), (4, "a"), (1, ".")]
    assert Vocabulary(mine, theirs).ids(torch.tensor([256, ALPHABET.index("."), ALPHABET.index("a")])).tolist() == [2, 2, 4]
    assert Vocabulary(theirs, mine).ids(torch.tensor([1, 2])).tolist() == [ALPHABET.index(".")] * 2


def test_every_byte_is_read_as_the_library_reads_it() -> None:
    known = texts(bpe())
    for number, letter in enumerate(ALPHABET):
        assert decoders.ByteLevel().decode([letter]) == known[number].encode(errors="surrogateescape").decode(errors="replace")


def test_vocabularies_by_hand() -> None:
    """Ids of mine from 256; theirs from 1."""
    mine = bpe(["Ġbear", "Bear", "Ġforests", "ing", "Ġwalk", "Ġzzzz", "Ġtoken", "<x>"], eos_token="<end>", pad_token="<pad>")
    theirs = wordpiece(["bear", "##bear", "forest", "wing", "walk", "##token", "stokes"], pad_token="[PAD]", eos_token="[END]")
    mine.add_special_tokens({"additional_special_tokens": ["<x>"]})
    mine.add_tokens([AddedToken("<bear>", special=True)])  # special, with no role
    end, pad = mine.eos_token_id, mine.pad_token_id
    other = mine.convert_tokens_to_ids("<bear>")
    asked = torch.tensor([[256, 257, 258, 259, 260, other], [261, 262, 263, end, pad, 9999]])
    # as it is; case; one letter; one letter; as it is; special | none near; space; special; roles; no such token
    assert Vocabulary(mine, theirs).ids(asked).tolist() == [
        [1, 2, 3, 4, 5, -1],
        [-1, 6, -1, theirs.eos_token_id, theirs.pad_token_id, -1],
    ]
    back = Vocabulary(theirs, mine).ids(torch.tensor([0, 1, 2, 3, 4, 5, 7, theirs.eos_token_id]))
    assert back.tolist() == [-1, 256, 257, 258, 259, 260, 262, end]


def test_an_end_has_no_like_where_there_is_none() -> None:
    mine = bpe(eos_token="<end>", pad_token="<end>")
    assert Vocabulary(mine, wordpiece(["end"], pad_token="[PAD]")).ids(torch.tensor([256, 257, -1])).tolist() == [-1, -1, -1]
    assert Vocabulary(mine, wordpiece(["a"], pad_token="[P]", eos_token="[E]", bos_token="[E]")).ids(torch.tensor(256)) == 2


def test_ids_of_no_tokens_keep_their_shape() -> None:
    table = Vocabulary(bpe(), wordpiece(["a"]))
    assert table.ids(torch.zeros(0, 3, dtype=torch.int64)).shape == (0, 3)
    assert table.ids(torch.zeros(2, 1, 3, dtype=torch.int64)).shape == (2, 1, 3)


def test_each_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    table, asked = Vocabulary(bpe(["Ġforests"]), wordpiece(["forest"])), []
    monkeypatch.setattr(table, "nearest", lambda text: asked.append(text) or 1)
    for _ in range(2):
        assert table.ids(torch.tensor([256, 256])).tolist() == [1, 1]
    assert asked == [" forests"]


# projections

HALVES = torch.tensor([[0.5, 0.25, 0.125, 0.0625]]).log()


def table_by_hand() -> Vocabulary:
    """Mine 256 to 260: " bear" and " Bear" are their 1, " walk" their 2, "qqqq" nothing, " forest" their 3."""
    return Vocabulary(bpe(["Ġbear", "ĠBear", "Ġwalk", "qqqq", "Ġforest"]), wordpiece(["bear", "walk", "forest"]))


def test_a_projection_by_hand() -> None:
    """0.25 + 0.5 are more than 0.125 of the other; 0.0625 is dropped."""
    ids, logp = projected(torch.tensor([[257, 258, 256, 259]]), HALVES[:, [0, 2, 1, 3]], table_by_hand())
    assert ids.tolist() == [[1, 2, -1, -1]]
    assert logp.exp().tolist()[0] == pytest.approx([0.75, 0.125, 0.0, 0.0])
    ids, logp = projected(torch.tensor([[260, 256, 258, 257]]), HALVES[:, [2, 1, 0, 1]], table_by_hand())
    assert ids.tolist() == [[1, 2, 3, -1]]  # 0.5 twice: the lower id first
    assert logp.exp().tolist()[0] == pytest.approx([0.5, 0.5, 0.125, 0.0])


def test_a_probability_of_nought_or_one_stays_as_it_is() -> None:
    ids, logp = projected(torch.tensor([[256, 257, 260, 259]]), torch.full((1, 4), -torch.inf), table_by_hand())
    assert ids.tolist() == [[1, 3, -1, -1]]
    assert logp.tolist() == [[-torch.inf] * 4]
    assert projected(torch.tensor([[256]]), torch.tensor([[-0.0]]), table_by_hand())[1].signbit().all()
    assert projected(torch.zeros(0, 4, dtype=torch.int64), torch.zeros(0, 4), table_by_hand())[0].shape == (0, 4)


def rows(data: st.DataObject, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    n, k = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 8))
    dice = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    ids = torch.stack([torch.randperm(most, generator=dice)[:k] for _ in range(n)])
    logp = torch.randn(n, k + 3, generator=dice).mul(3).log_softmax(1)[:, :k]
    return ids, logp.sort(dim=1, descending=True).values


@COMMON
@given(st.data())
def test_projections_add_no_probability_and_are_sorted(data: st.DataObject) -> None:
    table = small_table()
    ids, logp = rows(data, 330)
    theirs, told = projected(ids, logp, table)
    assert (told.exp().sum(1) <= logp.exp().sum(1) + 1e-6).all()
    mapped = table.ids(ids)
    for row in range(len(ids)):
        kept = [(p, i) for i, p in zip(theirs[row].tolist(), told[row].tolist(), strict=True) if i >= 0]
        assert kept == sorted(kept, key=lambda pair: (-pair[0], pair[1]))
        assert {i for _, i in kept} == {i for i in mapped[row].tolist() if i >= 0}
        assert len({i for _, i in kept}) == len(kept)
        assert theirs[row, len(kept) :].tolist() == [-1] * (len(ids[row]) - len(kept))
        assert told[row, len(kept) :].tolist() == [-torch.inf] * (len(ids[row]) - len(kept))
        for p, i in kept:
            assert logp[row][mapped[row] == i].exp().sum().log().item() == pytest.approx(p, abs=1e-5)


@cache
def small_table() -> Vocabulary:
    return Vocabulary(trained("bpe"), trained("wordpiece"))


@COMMON
@given(st.data())
def test_the_same_vocabulary_changes_nothing(data: st.DataObject) -> None:
    table = Vocabulary(trained("bpe"), trained("bpe"))
    ids, logp = rows(data, 330)
    assert table.ids(ids) is ids
    theirs, told = projected(ids, logp, table)
    assert torch.equal(theirs, ids)
    assert torch.equal(told.view(torch.int32), logp.contiguous().view(torch.int32))


# the packaged tokenizers


@pytest.mark.slow
def test_two_real_tokenizers_on_a_sentence() -> None:
    smollm, minilm = AutoTokenizer.from_pretrained(folder("smollm2-135m")), AutoTokenizer.from_pretrained(folder("minilm"))
    mine, at = spans(smollm, "The unbelievable Tokenizer chose café.")
    theirs, there = spans(minilm, "The unbelievable Tokenizer chose café.")
    assert [*map(smollm.decode, mine)] == ["The", " unbelie", "vable", " Token", "izer", " chose", " café", "."]
    assert minilm.convert_ids_to_tokens(theirs) == ["the", "unbelievable", "token", "##izer", "chose", "cafe", "."]
    assert at == [(0, 3), (4, 11), (11, 16), (17, 22), (22, 26), (27, 32), (33, 37), (37, 38)]
    assert there == [(0, 3), (4, 16), (17, 22), (22, 26), (27, 32), (33, 37), (37, 38)]
    assert places(at, there) == [0, 1, 3, 4, 5, 6, 7]
    assert places(there, at) == [0, 1, 1, 2, 3, 4, 5, 6]
    assert whole(there, at) == [True, True, False, True, True, True, True, True]
    told = Vocabulary(smollm, minilm).ids(torch.tensor([*mine, smollm.eos_token_id])).tolist()
    assert told[:3] == [10760, 20458, 12423]
    assert minilm.convert_ids_to_tokens(told[:-1]) == ["##the", "unbeaten", "##vable", "token", "##izer", "chose", "cafe", "."]
    assert told[-1] == -1  # an encoder has no end
    theirs += minilm.convert_tokens_to_ids(["東", "[PAD]", "[CLS]"])
    told = Vocabulary(minilm, smollm).ids(torch.tensor(theirs)).tolist()
    assert [*map(smollm.decode, told[:7])] == [" the", " unreliable", " token", "izer", " chose", " caffe", "."]
    assert told[7:] == [-1, 2, -1]
    assert Vocabulary(smollm, smollm).same
