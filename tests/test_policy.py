"""What leaves of a passage under each policy; of a snippet no more than its words, and no better run is there."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from fedtailor.errors import SiloError
from fedtailor.retrieval.policy import Policy, Share, cited, counted, let_out, snippet
from fedtailor.retrieval.terms import terms

TEXT = "Ann Lee came on 3 May. She had a fever of 39 degrees. The doctor gave her aspirin, then she slept. It helped."


def weights(**words: float) -> dict[int, float]:
    return {next(iter(terms(word))): weight for word, weight in words.items()}


def test_each_share_lets_out_its_part() -> None:
    aspirin, words = weights(aspirin=2.0), 4
    left = {
        "full": TEXT,
        "shareable": TEXT,
        "redacted": "[name] came on [number] [name]. She had a fever of [number] degrees. The doctor gave her aspirin, "
        "then she slept. It helped.",
        "snippets": "… doctor gave her aspirin, …",
        "answers": "",
    }  # fmt: skip
    shares: tuple[Share, ...] = ("full", "shareable", "redacted", "snippets", "answers")
    assert {share: let_out(Policy(share=share, words=words), TEXT, aspirin) for share in shares} == left
    assert let_out(Policy(redact=True), TEXT, {}) == left["redacted"]


def test_a_snippet_is_cut_from_what_was_redacted() -> None:
    """Smith begins no sentence, though it begins the snippet: what is left of the passage would not show it."""
    text = "In the evening we saw Smith and all slept. Then we took his 2 keys."
    policy = Policy(share="snippets", words=4, redact=True)
    asked = {**weights(slept=1.0), **weights(**{"and": 1.0})}
    assert let_out(Policy(share="snippets", words=4), text, asked) == "… Smith and all slept. …"
    assert let_out(policy, text, asked) == "… [name] and all slept. …"
    assert let_out(policy, text, weights(keys=1.0, took=1.0)) == "… took his [number] keys."
    assert let_out(policy, text, weights(Smith=9.0)) == "In the evening we …", "what is hidden cannot be searched for"


@pytest.mark.parametrize(
    ("text", "words", "left"),
    [
        ("a cat b c dog d", 3, "a cat b …"),  # cat 1; dog 1 later
        ("a cat b c sat dog d", 3, "… c sat dog …"),  # sat 3 + dog 1
        ("a cat. B c dog sat d. E", 3, "… c dog sat …"),
        ("a dog b cat c dog cat d", 3, "… dog b cat …"),  # 1 + 1; so has "dog cat", later
        ("x y z. Here a cat is. And more words", 4, "… Here a cat is. …"),  # "z. Here a cat" is first, but begins no sentence
        ("x y z. Here a dog a cat is", 4, "… a dog a cat …"),
        ("cat cat cat sat", 1, "… sat"),
        ("x y z. Cat", 3, "… Cat"),
        ("no word of it. Is here now", 3, "no word of …"),
        ("cat and dog", 3, "cat and dog"),
        ("  cat  ", 3, "  cat  "),
        ("", 3, ""),
        ("CAT-dog, a b c sat-CAT", 2, "… c sat-CAT"),
    ],
)
def test_snippets_by_hand(text: str, words: int, left: str) -> None:
    """cat and dog weigh 1, sat 3."""
    assert snippet(text, weights(cat=1.0, dog=1.0, sat=3.0), words) == left


def test_a_text_without_spaces_is_counted_by_letters() -> None:
    """Each Han letter is a word, a long run of other letters one for each 20."""
    assert counted("我在北京 and Tokyo.") == 6
    assert counted("x" * 41) == 3
    assert snippet("他去年在北京住过三个月", dict.fromkeys(terms("北京"), 1.0), 4) == "… 去年在北 …"
    assert snippet("x" * 50, {}, 1) == f"{'x' * 20} …"


some = st.sampled_from(["a", "b.", "cat", "Dog.", "sat", "the", "cat,", "C", "d!"])


weighing = st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=4, max_size=4)


@given(st.lists(some, max_size=25).map(" ".join), st.integers(1, 6), weighing)
def test_no_better_run_is_there(text: str, most: int, four: list[float]) -> None:
    known = weights(**dict(zip(("cat", "dog", "sat", "the"), four, strict=True)))
    words = text.split()
    found = snippet(text, known, most)
    inside = [word for word in found.split() if word != "…"]
    assert len(inside) == counted(found) == min(most, len(words)) or (words and found.endswith(words[-1]))
    assert counted(found) <= most

    def worth(run: list[str]) -> float:
        return sum(known.get(term, 0.0) for term in terms(" ".join(run)))

    runs = [words[at : at + most] for at in range(len(words))]
    assert worth(inside) == max(map(worth, runs), default=0.0)
    begins = [at for at in range(len(words)) if not at or words[at - 1][-1] in ".!"]
    best = [at for at in range(len(words)) if worth(runs[at]) == worth(inside)]
    at = min([at for at in best if at in begins] or best or [0])
    assert inside == words[at : at + most]
    assert found.startswith("… ") == (at > 0 and len(words) > most)
    assert found.endswith(" …") == (at + most < len(words))


@given(st.text(max_size=60), st.integers(1, 5), st.sampled_from([float("nan"), float("inf"), -1.0, 1e308]))
def test_any_text_and_any_weights_give_a_part_of_it(text: str, most: int, weight: float) -> None:
    """A server sends the weights."""
    found = snippet(text, dict.fromkeys(terms(text), weight), most)
    assert counted(found) <= most
    assert found.removeprefix("… ").removesuffix(" …") in text
    if not weight > 0:
        assert found == snippet(text, {}, most), "it weighs nothing"


def test_how_a_passage_is_cited() -> None:
    name, section = "patients/ann-lee.md", "Visits > Lee in May, with all that she said"
    assert cited(Policy(), name, 12, section) == (name, section)
    assert cited(Policy(share="snippets", words=3), name, 12, section) == (name, "Visits > Lee …")
    assert cited(Policy(share="redacted"), name, 12, section) == ("document 12", "[name] in [name], with all that she said")
    assert cited(Policy(share="snippets", words=2, redact=True), name, 12, section) == ("document 12", "[name] in …")
    assert cited(Policy(share="answers"), name, 12, section) == ("document 12", "")


def test_a_recognizer_is_asked_of_texts_and_headings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "finding.py").write_text("def all(text):\n    return [(0, len(text), 'x')]\ndef none(text):\n    raise OSError\n")
    monkeypatch.syspath_prepend(tmp_path)
    policy = Policy(redact=True, recognizer="finding:all")
    assert let_out(policy, "it was", {}) == "[x]"
    assert cited(policy, "a.md", 1, "it was") == ("document 1", "[x]")
    failing = Policy(share="redacted", recognizer="finding:none")
    for ask in (lambda: let_out(failing, "it was", {}), lambda: cited(failing, "a.md", 1, "it was")):
        with pytest.raises(SiloError, match="OSError"):
            ask()
    assert let_out(Policy(share="answers", redact=True, recognizer="finding:none"), "it was", {}) == ""


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ({"share": "all"}, "'full', 'shareable', 'redacted', 'snippets' or 'answers'"),
        ({"words": 0}, "greater than or equal to 1"),
        ({"questions_per_hour": 0}, "greater than or equal to 1"),
        ({"words_per_day_all": -1}, "greater than or equal to 1"),
        ({"recognizer": "a:b"}, "nothing is redacted; set redact = true"),
        ({"recognizer": "a:b", "share": "snippets"}, "nothing is redacted; set redact = true"),
    ],
)
def test_a_wrong_setting_is_refused(table: dict[str, object], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        TypeAdapter(Policy).validate_python(table)


def test_a_table_of_a_silo_toml_is_read() -> None:
    table = {"share": "snippets", "redact": True, "recognizer": "a:b", "questions_per_hour_all": 60}
    policy = TypeAdapter(Policy).validate_python(table)
    assert (policy.redacts, policy.words, policy.questions_per_hour_all, policy.words_per_day) == (True, 30, 60, None)
    assert not Policy().redacts
