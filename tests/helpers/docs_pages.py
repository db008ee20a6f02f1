"""The pages of the documentation, and how what is in them is run.

Blocks marked ```bash are commands, blocks marked ```python scripts; those of a page share a folder and names.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from typing import Any

import torch

from tests.helpers.lm_eval_cases import ROOT

PAGES = ["README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]
# What is not run, and why.
EXEMPT = {
    "make quickstart": "installs everything and trains a model for minutes",
    "make test": "installs everything and is what runs this",
    "pip install .": "changes the environment",
    'pip install ".[recipes]"': "changes the environment",
    'pip install ".[lm-eval]"': "changes the environment",
}
# Training in bfloat16, the command's default, is refused on a CPU without this option, as docs/recover.md says.
WITHOUT_GPU = ("cdmoe recover --model", "cdmoe recover --use_cpu --model")
FENCE = re.compile(r"^```(?P<kind>[^\n]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
_NOT_RUN = {"", "text", "bibtex", "{include}", "{toctree}", "{eval-rst}"}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    kind: str  # bash or python
    code: str
    line: int  # of the page, at which the code starts


def blocks_of(text: str) -> list[Block]:
    """The blocks that are run.

    Raises:
        ValueError: if a block is marked by something else, or is not closed.
    """
    found = list(FENCE.finditer(text))
    if len(re.findall(r"^\s*(```|~~~)", text, re.MULTILINE)) != 2 * len(found):
        raise ValueError("A block is indented, not closed, or fenced by ~~~.")
    kinds = {match["kind"].split()[0] if match["kind"] else "" for match in found}
    if kinds - _NOT_RUN - {"bash", "python"}:
        raise ValueError(f"Blocks are marked {sorted(kinds)}; commands should be marked bash, scripts python.")
    return [
        Block(match["kind"], match["code"], text.count("\n", 0, match.start("code")) + 1)
        for match in found
        if match["kind"] in ("bash", "python")
    ]


def run_page(text: str, name: str, environment: dict[str, str]) -> None:
    """Runs the blocks of a page in the working directory."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks_of(text):
        if block.kind == "python":
            exec(compile("\n" * (block.line - 1) + block.code, name, "exec"), names)
        else:
            run_commands(block, name, environment)


def run_commands(block: Block, name: str, environment: dict[str, str]) -> None:
    lines = [line for line in block.code.splitlines() if line.split("#")[0].strip() not in EXEMPT]
    code = "\n".join(lines)
    if not torch.accelerator.is_available():
        code = code.replace(*WITHOUT_GPU)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, f"{name}, line {block.line}:\n{code}\n{done.stdout}\n{done.stderr}"
