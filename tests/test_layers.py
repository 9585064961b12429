"""The lines between the layers, read from the source by `ast`: nothing is imported.

Each rule is a function `(root of the package) -> problems`. Each is tried on a small package that breaks it, too.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[1] / "src" / "fedtailor"
PACKAGE = "fedtailor"
FILE_LIMIT, CORE_LIMIT = 400, 105
PICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNSAFE_SETTINGS = {"trust_remote_code", "allow_pickle"}


def sources(root: Path) -> Iterator[tuple[Path, str, ast.Module]]:
    for path in sorted(root.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        yield path, text, ast.parse(text, str(path))


def layer(root: Path, name: str) -> Iterator[tuple[Path, str, ast.Module]]:
    """The files of a package `name/`, or the file `name.py`."""
    for path, text, tree in sources(root):
        if path.relative_to(root).parts[0] in (name, f"{name}.py"):
            yield path, text, tree


def imports(root: Path, path: Path, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every module, or name in one, that a file reaches at any depth: relative, in a function, by text or attribute."""
    package = (PACKAGE, *path.relative_to(root).parts[:-1])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*above, *filter(None, [node.module])))
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield from ((node.lineno, start) for start in map(_opening, node.args[:1]) if start)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == PACKAGE:
            yield node.lineno, f"{PACKAGE}.{node.attr}"


def _opening(node: ast.expr) -> str:
    """The constant opening of a text: `"a.b"`, `f"a.{x}"` or `"a." + x`."""
    if isinstance(node, ast.BinOp):
        return _opening(node.left)
    first = node.values[0] if isinstance(node, ast.JoinedStr) and node.values else node
    return str(first.value) if isinstance(first, ast.Constant) and isinstance(first.value, str) else ""


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def crossings(root: Path, importer: str, imported: str) -> list[str]:
    return [
        f"{path.relative_to(root)}:{line}: {importer} imports {name}"
        for path, _, tree in layer(root, importer)
        for line, name in imports(root, path, tree)
        if within(name, f"{PACKAGE}.{imported}")
    ]


def engines_import_no_methods(root: Path) -> list[str]:
    return crossings(root, "engines", "methods")


def methods_import_no_engines(root: Path) -> list[str]:
    return crossings(root, "methods", "engines")


def core_imports_the_standard_library_alone(root: Path) -> list[str]:
    return [
        f"core.py:{line}: imports {name}"
        for path, _, tree in layer(root, "core")
        for line, name in imports(root, path, tree)
        if name.split(".")[0] not in sys.stdlib_module_names
    ]


def core_fits_on_a_screen(root: Path) -> list[str]:
    lengths = [len(text.splitlines()) for _, text, _ in layer(root, "core")]
    return [f"core.py: {length} lines, over {CORE_LIMIT}" for length in lengths if length > CORE_LIMIT]


def files_are_short(root: Path) -> list[str]:
    lengths = [(path, len(text.splitlines())) for path, text, _ in sources(root)]
    return [f"{path.relative_to(root)}: {n} lines, over {FILE_LIMIT}" for path, n in lengths if n > FILE_LIMIT]


def loading_is_safe(root: Path) -> list[str]:
    """No pickle, by whatever way in; prose may name it."""
    return [
        f"{path.relative_to(root)}:{line}: {what}"
        for path, _, tree in sources(root)
        for line, what in _unsafe(root, path, tree)
    ]


def _unsafe(root: Path, path: Path, tree: ast.Module) -> Iterator[tuple[int, str]]:
    for line, name in imports(root, path, tree):
        if name.split(".")[0] in PICKLERS or (within(name, "torch") and name.endswith(".load")):
            yield line, f"imports {name}"
    torches = {"torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            torches |= {alias.asname for alias in node.names if alias.name == "torch" and alias.asname}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            from_torch = ast.unparse(node.value).split(".")[0] in torches
            if (from_torch and node.attr == "load") or node.attr in ("pickle", "read_pickle", "to_pickle"):
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.keyword) and node.arg in UNSAFE_SETTINGS and not _is_false(node.value):
            yield node.value.lineno, f"{node.arg}={ast.unparse(node.value)}"
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value in UNSAFE_SETTINGS and not _is_false(value):
                    yield value.lineno, ast.unparse(node)


def _is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def silo_work_is_module_level(root: Path) -> list[str]:
    return [
        f"{path.relative_to(root)}:{function.lineno}: @in_silo on {function.name}, which is not module-level"
        for path, _, tree in sources(root)
        for function in _nested(tree, False)
        if any(_is_in_silo(mark, _marks(tree)) for mark in function.decorator_list)
    ]


def _nested(node: ast.AST, inside: bool) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions in functions or classes; an `if` or `try` at module level is still module level."""
    for child in ast.iter_child_nodes(node):
        function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        if inside and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        yield from _nested(child, inside or function or isinstance(child, ast.ClassDef))


def _marks(tree: ast.Module) -> set[str]:
    """The names under which a file knows `in_silo`."""
    found = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name == "in_silo"
    }
    return found | {"in_silo"}


def _is_in_silo(decorator: ast.expr, marks: set[str]) -> bool:
    target = decorator.func if isinstance(decorator, ast.Call) else decorator
    if isinstance(target, ast.Attribute):
        return target.attr == "in_silo"
    return isinstance(target, ast.Name) and target.id in marks


Rule = Callable[[Path], list[str]]
RULES: list[Rule] = [
    engines_import_no_methods,
    methods_import_no_engines,
    core_imports_the_standard_library_alone,
    core_fits_on_a_screen,
    files_are_short,
    loading_is_safe,
    silo_work_is_module_level,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_source_keeps(rule: Rule) -> None:
    assert rule(SRC) == []


@pytest.mark.parametrize("name", ["core", "engines", "methods"])
def test_the_layer_is_there(name: str) -> None:
    assert (SRC / name).is_dir() or (SRC / f"{name}.py").is_file(), "gone: the rules about it would hold of nothing"


GOOD = {
    "core.py": "from dataclasses import dataclass\nimport typing",
    "engines/in_process.py": "from fedtailor.core import Ask\nfrom fedtailor import methods_help\nfrom . import worker",
    "methods/lora.py": """
'No pickle here; torch.load( is not called either, nor trust_remote_code=True given.'
import torch
from ..core import in_silo
from . import averaging
if torch:
    @in_silo(cohort=None)
    def train(silo, body):
        def step(): ...
        return load(trust_remote_code=False), json.load(body), {'allow_pickle': False}
""",
    "experiment.py": "import importlib\nimportlib.import_module(f'fedtailor.methods.{1}')",
}

BAD: list[tuple[Rule, str, str]] = [
    (engines_import_no_methods, "engines/a.py", "import fedtailor.methods.lora"),
    (engines_import_no_methods, "engines/a.py", "from fedtailor import core, methods"),
    (engines_import_no_methods, "engines/a.py", "def f():\n    def g():\n        from fedtailor.methods import find"),
    (engines_import_no_methods, "engines/a.py", "from ..methods.lora import LoRA"),
    (engines_import_no_methods, "engines/deep/a.py", "from ... import methods"),
    (engines_import_no_methods, "engines/a.py", "import importlib\nimportlib.import_module(f'fedtailor.methods.{1}')"),
    (engines_import_no_methods, "engines/a.py", "import fedtailor\nfind = fedtailor.methods.find"),
    (engines_import_no_methods, "engines.py", "from .methods import find"),
    (methods_import_no_engines, "methods/a.py", "from fedtailor.engines.in_process import InProcess"),
    (methods_import_no_engines, "methods/__init__.py", "def f():\n    from .. import engines"),
    (methods_import_no_engines, "methods/a.py", "__import__('fedtailor.engines.' + 'worker')"),
    (core_imports_the_standard_library_alone, "core.py", "import torch"),
    (core_imports_the_standard_library_alone, "core.py", "if 1:\n    from fedtailor.errors import Problem"),
    (core_imports_the_standard_library_alone, "core.py", "from . import wire"),
    (core_fits_on_a_screen, "core.py", "x = 1\n" * (CORE_LIMIT + 1)),
    (files_are_short, "methods/a.py", "x = 1\n" * (FILE_LIMIT + 1)),
    (loading_is_safe, "a.py", "def f():\n    import pickle"),
    (loading_is_safe, "a.py", "from pickle import loads"),
    (loading_is_safe, "a.py", "import cloudpickle as safe"),
    (loading_is_safe, "a.py", "import torch as t\nt.load('x')"),
    (loading_is_safe, "a.py", "import torch\nread = torch.load"),
    (loading_is_safe, "a.py", "from torch import load as read"),
    (loading_is_safe, "a.py", "import torch\ntorch.serialization.load('x')"),
    (loading_is_safe, "a.py", "import pandas\npandas.read_pickle('x')"),
    (loading_is_safe, "a.py", "import numpy\nnumpy.load('x', allow_pickle=True)"),
    (loading_is_safe, "a.py", "load('x', trust_remote_code=True)"),
    (loading_is_safe, "a.py", "load('x', trust_remote_code=bool(1))"),
    (loading_is_safe, "a.py", "load('x', **{'trust_remote_code': True})"),
    (silo_work_is_module_level, "a.py", "def f():\n    @in_silo\n    def g(silo, body): ..."),
    (silo_work_is_module_level, "a.py", "class A:\n    @core.in_silo(cohort=None)\n    def g(silo, body): ..."),
    (silo_work_is_module_level, "a.py", "from core import in_silo as s\nclass A:\n  if 1:\n    @s\n    def g(): ..."),
]


def package(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_rule_lets_good_files_pass(rule: Rule, tmp_path: Path) -> None:
    assert rule(package(tmp_path, GOOD)) == []


@pytest.mark.parametrize(("rule", "name", "text"), BAD)
def test_a_rule_finds_what_breaks_it(rule: Rule, name: str, text: str, tmp_path: Path) -> None:
    found = rule(package(tmp_path, GOOD | {name: text}))
    assert len(found) == 1
    assert found[0].startswith(f"{name}:")


def test_every_rule_was_tried_on_something_bad() -> None:
    assert {rule for rule, _, _ in BAD} == set(RULES)
