"""Every command and every script of README.md and docs/ is run as it stands there, page by page, in order.

How they are run is in docs_pages.py, what they start from in docs_place.py.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from transformers import AutoConfig

from cdmoe_plugin import CondenseConfig
from cdmoe_plugin.estimate import dry_run
from tests.helpers.docs_pages import EXEMPT, FENCE, PAGES, blocks_of, run_page
from tests.helpers.docs_place import link_checkout, make_place, write_condensed
from tests.helpers.lm_eval_cases import ROOT
from tests.helpers.programs import Programs


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    make_place(folder)
    return folder


@pytest.fixture
def environment(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, programs: Programs) -> dict[str, str]:
    """A working directory as the pages expect it, and what programs started there should know."""
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    link_checkout(tmp_path)
    monkeypatch.chdir(tmp_path)
    return programs.environment


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of((ROOT / page).read_text())])
def test_commands_of(page: str, environment: dict[str, str]) -> None:
    if page != "README.md":
        write_condensed(Path.cwd())
    run_page((ROOT / page).read_text(), page, environment)


@pytest.mark.parametrize(
    "broken",
    [
        "```bash\ncdmoe condens --dry_run\ntrue\n```\n",
        "```bash\nfalse | true\n```\n",
        "```bash\nmake quickstart  # not run\n./no_such_program\n```\n",
        "```python\nfrom cdmoe_plugin import condense_pretraned\n```\n",
        "```python\nnumber = 1\n```\n\n```python\nassert number == 2\n```\n",
        "```sh\ntrue\n```\n",
        "- a list\n  ```bash\n  true\n  ```\n",
        "```bash\ntrue\n",
    ],
)
def test_broken_pages_fail(broken: str, environment: dict[str, str]) -> None:
    with pytest.raises((AssertionError, ImportError, ValueError)):
        run_page(f"# Page\n\n{broken}", "page.md", environment)


def test_what_is_not_run() -> None:
    readme = [line.split("#")[0].strip() for line in (ROOT / "README.md").read_text().splitlines()]
    assert set(EXEMPT) <= set(readme)


def test_dry_run_prints_the_table_of_the_readme(tmp_path: Path) -> None:
    sizes = {
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "vocab_size": 102400,
    }
    AutoConfig.for_model("deepseek", dtype="bfloat16", tie_word_embeddings=False, **sizes).save_pretrained(tmp_path)
    assert dry_run(tmp_path, CondenseConfig()) in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", ["README.md", "BENCHMARKS.md", "CHANGELOG.md", *PAGES[1:]])
def test_links_to_files(page: str) -> None:
    """That headings exist, too, is checked where the pages are built (test_docs_build.py)."""
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", (ROOT / page).read_text()))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?://|#", target):
            assert (ROOT / page).parent.joinpath(target.split("#")[0]).exists(), target
