"""The prose of the project: a list of phrases that a user of transformers would not write, and what to write instead.

It covers the documentation, and docstrings, comments and messages of the package, recipes and examples. Spelling is
checked by codespell (`make check`).
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Written by tests from what the package says itself.
GENERATED = {"docs/architectures.md", "docs/methods.md"}
PATTERNS = (
    "*.md",
    "docs/*.md",
    "docs/conf.py",
    "*.py",
    *(f"{room}/**/*" for room in ("cdmoe_plugin", "recipes", "examples")),
)
SOURCES = sorted(
    name
    for pattern in PATTERNS
    for path in ROOT.glob(pattern)
    if path.suffix in (".md", ".py", ".sh", ".yaml", ".html") and (name := str(path.relative_to(ROOT))) not in GENERATED
)
MAX_LINES, MAX_BYTES = 150, 10_000

# A regular expression (case does not matter, a space is any white space), and what to write instead.
PHRASES = {
    r"(to|can't|cannot|could|couldn't|can) be had": "available, supported, possible",
    r"(is|are|was|were|be|been|not|as) told": "given, configured, tested",
    r"for good(?! (reason|measure))": "permanently, or nothing",
    r"go(es)? by": "use, follow, depend on",
    r"st(ands?|ood) for": "represent, replace, mean",
    r"of which": "a sentence of its own",
    r"in vain": "without effect",
    r"nobody's business": "not supported, ignored",
    r"whatever (it|this|that|the \w+|they) (is|are|was|were|says?)": "the name of the thing, or 'regardless of'",
    r"an? (third|half|quarter|tenth) of the \w+ (less|more)": "a percentage",
    r"bears? it": "tolerate, support",
    r"last bits make": "rounding",
    r"as (well|badly) or (well|badly) off": "the same limitations",
    r"as it (was|is) asked": "the name of the request",
    r"has no say": "is ignored",
    r"makes? do": "use",
    r"wants? (a|an|the|larger|smaller|to be)": "need",
    r"without a word": "silently",
    r"with an? \w+ in hand": "with",
    r"works? alike": "work the same way",
    r"goes with `?pip": "is removed by",
    r"are worth it": "benefit",
}
BANNED = [
    (re.compile(rf"\b{phrase}\b".replace(" ", r"\s+"), re.IGNORECASE), write) for phrase, write in PHRASES.items()
]
# The subject of a docstring's first sentence is a thing with a name.
OPENING = re.compile(r"\s*(what|whatever|how|why|where|when)\b", re.IGNORECASE)


def offences(text: str, name: str) -> list[str]:
    """Find what is wrong with a file's prose, each as "file:line: what is found (what to write)"."""
    is_python = name.endswith(".py")
    found = {
        f"{name}:{line + prose.count(chr(10), 0, match.start())}: {' '.join(match[0].split())!r} (write: {instead})"
        for line, prose in (prose_of(text) if is_python else [(1, without_markers(text))])
        for phrase, instead in BANNED
        for match in phrase.finditer(prose)
    }
    if is_python:
        found |= {f"{name}:{line}: a docstring begins with {word!r}" for line, word in openings(text)}
    return sorted(found)


def without_markers(text: str) -> str:
    """Drop what a line of a comment or a quotation begins with, so that phrases are found across lines."""
    return re.sub(r"^[ \t]*(#+|>)[ \t]?", "", text, flags=re.MULTILINE)


def prose_of(code: str) -> Iterator[tuple[int, str]]:
    """Collect the strings of a module and its comments, those on consecutive lines as one, with their first lines."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
        elif isinstance(node, ast.JoinedStr):  # phrases may go on after a value
            yield (
                node.lineno,
                "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values),
            )
    block: list[tokenize.TokenInfo] = []
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type == tokenize.COMMENT:
            if block and block[-1].start[0] + 1 != token.start[0]:
                yield block[0].start[0], without_markers("\n".join(line.string for line in block))
                block = []
            block.append(token)
    if block:
        yield block[0].start[0], without_markers("\n".join(line.string for line in block))


def openings(code: str) -> Iterator[tuple[int, str]]:
    """Find docstrings whose subject has no name, by their line and first word."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, kinds) and (found := OPENING.match(ast.get_docstring(node) or "")):
            yield node.body[0].lineno, found[1]


@pytest.mark.parametrize("name", SOURCES)
def test_prose(name: str) -> None:
    assert not (found := offences((ROOT / name).read_text(encoding="utf-8"), name)), "\n".join(found)


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("page.md", "# Page\n\nNo GPU was to\nbe had.\n", "page.md:3: 'to be had'"),
        ("page.md", "> The layer stands\n> for it.\n", "page.md:1: 'stands for'"),
        ("a.yaml", "key: 1\n# In vain\n", "a.yaml:2: 'In vain'"),
        ("a.py", "x = 1\n# Layers that\n# bear it.\n", "a.py:3: 'bear it'"),
        ("a.py", "raise ValueError(\n    f'`a` is {1}, which goes '\n    f'by {2}')\n", "a.py:2: 'goes by'"),
        ("a.py", "x = dict(help='What a text is told')\n", "a.py:1: 'is told'"),
        ("a.py", 'def f():\n    """What the user wrote."""\n', "a.py:2: a docstring begins with 'What'"),
        ("a.py", 'class A:\n    """Whatever."""\n', "a.py:2: a docstring begins with 'Whatever'"),
        ("a.py", '"""How it works."""\n', "a.py:1: a docstring begins with 'How'"),
    ],
)
def test_offences_are_found(name: str, text: str, found: str) -> None:
    assert [offence.split(" (")[0] for offence in offences(text, name)] == [found]


def test_good_prose_passes() -> None:
    assert not offences('"""Fold a block. For good reason, what follows is folded."""\n# Stand-in for it.\n', "a.py")


@pytest.mark.parametrize("name", ["README.md", "BENCHMARKS.md"])
def test_first_pages_are_short(name: str) -> None:
    text = (ROOT / name).read_bytes()
    assert text.count(b"\n") <= MAX_LINES
    assert len(text) <= MAX_BYTES
