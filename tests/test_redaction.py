"""What points at people is hidden, however it is written; what is hidden stays so."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtailor.errors import SiloError, UserError
from fedtailor.retrieval.redaction import redacted, redacted_title

PIECES = (
    "a", "B", "é", "Ñ", "0", "7", "٣", "²", "①", "½", "፩", "Ⅷ", "三", "の", "@", "＠", ".", "．", ":", "/", "-", "'", '"', "(",
    ")", "[", "]", "{", "}", "<", ">", ",", "!", "_", "+", " ", "  ", "\n", "\u200b", "\u00ad", "\u0301", "\u0336", "\x00", "I",
    "Dr", "van", "the", "Smith", "at", "dot", "www.", "http://", "x.org", "DE89", "[name]", "[number]", "[e-mail]", "ﬁ", "Ǆ",
    "ǅ", "\ud800",
)  # fmt: skip
nasty = st.lists(st.sampled_from(PIECES), max_size=25).map("".join) | st.text(max_size=40)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("Write to ann.lee+x@post.example.org, or call.", "Write to [e-mail], or call."),
        ('It was "Ann Lee"@post.org. It is (ann@post.org).', "It was [e-mail]. It is ([e-mail])."),
        ("write to ann @ post.org now", "write to [e-mail] now"),
        ("write to ann (at) post (dot) org now", "write to [e-mail] now"),
        ("write to ann at post dot org now", "write to [e-mail] now"),
        ("as @ann said", "[e-mail] said"),
        ("see https://x.org/people?id=ann. It is", "see [link]. It is"),
        ("see www.x.org or post.example.org/ann.", "see [link] or [link]."),
        ("from 10.0.0.12 and fe80::1ff:fe23 on", "from [number] and [number] on"),
        ("pay DE89 3704 0044 0532 0130 00 or gb29nwbk60161331926819 now", "pay [account] or [account] now"),
        ("call 0171 / 44 55-66 or +49 (171) 445566.", "call [number] or +[number]."),
        ("on 3.4.1971, 2026-01-31 or 3/4", "on [number] or [number]"),
        ("the 4th, room B12 and case ab_7-x", "the [number], room [number] and case [number]"),
        ("it is ٣٤٥ and ² and ① and Ⅷ here", "it is [number] and [number] and [number] and [name] here"),
        ("it is ½ and ፩ here", "it is [number] and [number] here"),
        ("電話は03-1234-5678です", "電話は[number]です"),
    ],
)
def test_addresses_and_numbers(text: str, left: str) -> None:
    assert redacted(text) == left


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("She saw Smith. It was late.", "She saw [name]. It was late."),
        ("Jan van der Berg came.", "[name] came."),
        ("Then he met J. R. R. Tolkien and J.-P. Sartre there.", "Then he met [name] and [name] there."),
        ("Anne-Marie O'Neill and Łukasz Żak-Źródło left.", "[name] and [name] left."),
        ("we saw dr. Smith, prof. dr. von Weizsäcker and Mrs. Lee.", "we saw [name] and [name]."),
        ("Dr. Lee is in.", "[name] is in."),
        ("We read van Gogh, e.g. Letters, there.", "We read [name], e.g. [name], there."),
        ("Smith left. We know Smith's wife. Smith's son stays.", "[name] left. We know [name] wife. [name] son stays."),
        ("We saw him. Then, cf. Lee, we left. No. She stays.", "We saw him. Then, cf. [name], we left. No. She stays."),
        ("as told by Th. Mann", "as told by [name]"),
        ("patient: SMITH/LEE", "patient: [name]"),
        ("by d'Angelo and by McDonald's", "by [name] and by [name]"),
        ("I think that I'm as I’ve been. So do I.", "I think that I'm as I’ve been. So do I."),
        ("The heart pumps blood. It is a muscle! Is it?", "The heart pumps blood. It is a muscle! Is it?"),
        ('He said: "It rains." The end.', 'He said: "[name] rains." The end.'),
        ("Don't tell me that sir is in the van.", "Don't tell me that sir is in the van."),
    ],
)  # fmt: skip
def test_names(text: str, left: str) -> None:
    assert redacted(text) == left


def test_what_is_not_found_is_as_the_docstring_says() -> None:
    for text in ("Smith left.", "it was smith", "وصل محمد", "王小明来了", "call four four two"):
        assert redacted(text) == text


def test_what_is_left_is_in_plain_forms() -> None:
    assert redacted("a\u200b\u0301 ﬁne\x00 ｄay\n") == "\u00e1 fine day\n"


def test_of_a_heading_each_capitalised_word() -> None:
    assert redacted_title("Smith") == "[name]"
    assert redacted_title("patients > Lee. Visit of 3 May") == "patients > [name]. [name] of [number] [name]"


@given(nasty)
def test_no_digit_is_left(text: str) -> None:
    assert not [letter for letter in redacted(text) if letter.isdigit()]


@given(nasty, st.booleans())
def test_done_again_it_stays(text: str, title: bool) -> None:
    do = redacted_title if title else redacted
    assert do(do(text)) == do(text)


@given(st.emails())
def test_an_address_is_hidden_whole(address: str) -> None:
    assert redacted(f"write to {address} now") == "write to [e-mail] now"


INVISIBLE = st.sampled_from("\u200b\u200c\u200d\u2060\ufeff\u00ad\u202e\u034f\ufe0f\u2800\U000e0041")
telling = st.sampled_from(["write to ann@post.org now", "call 0171 44-55 now", "It was Smith there", "DE89 3704 0044 0532 01"])


@given(telling, st.data())
def test_letters_that_are_not_seen_or_look_alike_hide_nothing(text: str, data: st.DataObject) -> None:
    """Each letter in another of its forms (full width, mathematical, ...), with invisible ones between them."""
    forms = {letter: [letter, *FORMS.get(letter, [])] for letter in text}
    drawn = [data.draw(st.sampled_from(forms[letter])) + data.draw(st.just("") | INVISIBLE) for letter in text]
    assert redacted("".join(drawn)) == redacted(text)


def forms() -> dict[str, list[str]]:
    found = dict[str, list[str]]()
    for number in (*range(0xFF01, 0xFF5F), *range(0x1D400, 0x1D800), 0x2024, 0xFE52, 0xFE6B):
        found.setdefault(unicodedata.normalize("NFKC", chr(number)), []).append(chr(number))
    return found


FORMS = forms()
assert len(FORMS["@"]) == 2
assert len(FORMS["5"]) > 3

OWN = """
def wards(text):
    at = text.find("ward")
    return [(at, at + 4, "Ward 9")] if at >= 0 else []
def clumsy(text):
    return [(0, len(text) + 1, "name")]
def failing(text):
    raise ValueError(text)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "recognizing.py").write_text(OWN, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return "recognizing"


def test_a_recognizer_of_ones_own_besides(own: str) -> None:
    """It sees plain letters, and its kind is written without digits and capitals."""
    assert redacted("in ｗａｒd 7 Smith lay", f"{own}:wards") == "in [ward] [number] [name] lay"
    assert redacted("in [ward] [number] [name] lay", f"{own}:wards") == "in [ward] [number] [name] lay", "not within a mark"
    assert redacted("nothing", f"{own}:wards") == "nothing"


def test_a_recognizer_that_fails_tells_nothing(own: str) -> None:
    with pytest.raises(SiloError, match=r"documents\.recognizer = 'recognizing:failing' failed with ValueError") as told:
        redacted("the secret", f"{own}:failing")
    assert "secret" not in str(told.value)
    with pytest.raises(SiloError, match=r"gave \(0, 11\) of a text of 10 letters"):
        redacted("the secret", f"{own}:clumsy")
    with pytest.raises(UserError, match=r"documents\.recognizer = 'recognizing:none': cannot be imported"):
        redacted("the secret", f"{own}:none")
    with pytest.raises(UserError, match=r"give 'package\.module:function'"):
        redacted("the secret", "none")
