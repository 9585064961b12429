"""The shipped experiments and the documents beside them name only what is there."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer

from fedtailor import cli, experiment
from fedtailor.study import grid

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "experiments").glob("*.toml"))
STUDIES = sorted((ROOT / "studies").glob("*.toml"))
DOCUMENTS = [*ROOT.glob("[A-Z]*.md"), *ROOT.glob("docs/*.md")]
UNITS = [*ROOT.glob("examples/systemd/*.service"), ROOT / "examples" / "Containerfile"]
COMMANDS: Any = typer.main.get_command(cli.app)


def command(words: list[str]) -> Any:
    """The command of these words, every option of it known."""
    found, rest = COMMANDS, list(words)
    while hasattr(found, "commands"):
        assert rest, f"{shlex.join(words)}: which command?"
        assert rest[0] in found.commands, f"there is no command {shlex.join(words)}"
        found = found.commands[rest.pop(0)]
    known = {name for parameter in found.params for name in parameter.opts}
    unknown = [word for word in rest if word.startswith("--") and word.partition("=")[0] not in known]
    assert not unknown, f"{shlex.join(words)}: there is no option {unknown[0]}"
    return found


def sets(words: list[str]) -> list[str]:
    return [value for option, value in pairwise(words) if option == "--set"]


def opening(file: Path) -> list[str]:
    """The command in the first line, without its `# fedtailor`."""
    first = file.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# fedtailor "), f"{file.name} begins with {first!r}, not with its command"
    return shlex.split(first.removeprefix("# fedtailor "))


def test_some_are_shipped() -> None:
    assert {"tiny.toml", "quickstart.toml"} <= {file.name for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_an_experiment_parses_from_any_folder(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = experiment.load(file)
    assert found.name == file.stem
    assert experiment.parse(experiment.as_table(found), "again") == found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_an_experiment_opens_with_its_own_command(file: Path) -> None:
    words = opening(file)
    command(words)
    assert words[0] == "run"
    assert f"experiments/{file.name}" in words
    experiment.load(file, sets(words))


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.name)
def test_a_study_parses_from_any_folder_and_opens_with_its_own_command(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = opening(file)
    command(words)
    assert words[:2] == ["study", f"studies/{file.name}"]
    monkeypatch.chdir(tmp_path)
    found = grid.load(file)
    assert found.name == file.stem
    assert {part.asks for part in found.parts} == {"performance", "efficiency", "robustness"}


def blocks(text: str) -> list[str]:
    """The lines of code: fenced without a language or with a shell's, or indented by four."""
    fenced = re.findall(r"^```(?:sh|bash|console|)\n(.*?)^```", text, flags=re.M | re.S)
    indented = re.findall(r"^ {4}(\S.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), flags=re.M)
    return [line.removeprefix("$ ").strip() for block in fenced for line in block.splitlines()] + indented


def spans(text: str) -> list[str]:
    """What stands between backticks within a line."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def told(document: Path, program: str) -> list[list[str]]:
    """Every call of a program that a document tells of, as words; FILE and FOLDER stand for anything."""
    text = document.read_text(encoding="utf-8")
    lines = [line for line in [*blocks(text), *spans(text)] if re.match(rf"{program} [a-z]", line)]
    return [shlex.split(line, comments=True)[1:] for line in lines]


def alternatives(words: list[str]) -> list[list[str]]:
    """`data list|fetch NAME` is two commands."""
    if not words:
        return [[]]
    return [[word, *rest] for word in words[0].split("|") for rest in alternatives(words[1:])]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
def test_a_document_tells_of_commands_that_exist(document: Path) -> None:
    for words in told(document, "fedtailor"):
        for one in alternatives(words):
            command(one)
            files = [ROOT / word for word in one if word.startswith("experiments/")]
            for file in files:
                assert file.is_file(), f"{document.name}: {shlex.join(one)}"
                experiment.load(file, sets(one))


@pytest.mark.parametrize("file", UNITS, ids=lambda file: file.name)
def test_a_unit_and_the_container_start_commands_that_exist(file: Path) -> None:
    text = re.sub(r'[",\[\]]+', " ", file.read_text(encoding="utf-8"))
    told = re.findall(r"(?:ExecStart=\S*/|CMD\s+|: (?:sudo|podman)\b.*[ /])fedtailor ([^.\n]+)", text)
    assert told
    for line in told:
        command(shlex.split(line))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
def test_a_document_tells_of_make_targets_that_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert {"demo", "check"} <= targets
    assert {words[0] for words in told(document, "make")} <= targets


def test_the_readme_opens_with_the_two_commands_of_a_fresh_machine() -> None:
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("not written yet")
    assert told(readme, "make")[:2] == [["demo"], ["check"]]


PATHS = re.compile(
    r"(?:[\w.-]+/)*[\w-]+\.(?:toml|py|md|lock|jsonl)|(?:src|tests|examples|experiments|benchmarks)/[\w/.-]*"
)
MADE = (
    "runs/",
    "path/",
    "package.module",
    "visits.jsonl",
    "reviews.csv",
    "rounds.jsonl",
    "experiment.toml",
    "urgency.toml",
    "silo.toml",
    "kits/",
    "load.py",
)  # made by a run, or the reader's


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
def test_a_document_names_files_that_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    named = links + [span for span in spans(text) if PATHS.fullmatch(span)]
    missing = [
        name
        for name in named
        if not name.startswith(MADE)
        and not any((base / name).exists() for base in (ROOT, ROOT / "src" / "fedtailor"))
        and not list((ROOT / "src").rglob(name))
    ]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
def test_a_documents_experiment_is_a_good_one(document: Path) -> None:
    """Every TOML block of a document that has a method is an experiment without an error."""
    import tomllib

    for block in re.findall(r"^```toml\n(.*?)^```", document.read_text(encoding="utf-8"), flags=re.M | re.S):
        table = tomllib.loads(block)
        if "method" in table:
            experiment.parse({"name": "document", **table}, document.name)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
def test_a_documents_python_compiles_and_imports_what_is_there(document: Path) -> None:
    import ast
    import importlib

    for block in re.findall(r"^```python\n(.*?)^```", document.read_text(encoding="utf-8"), flags=re.M | re.S):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fedtailor"):
                module = importlib.import_module(node.module or "")
                for alias in node.names:
                    name = f"{node.module}.{alias.name}"
                    assert hasattr(module, alias.name) or importlib.util.find_spec(name), name
