"""The model card tells where a condensed checkpoint comes from, keeps the license, and its commands make it again."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from cdmoe_plugin import CondenseConfig, CondensePlan, condense_pretrained
from cdmoe_plugin.cards.base_model import base_metadata
from cdmoe_plugin.cards.card import add_results
from cdmoe_plugin.scripts import condense
from tests.helpers.recovery import lm_rows, word_tokenizer
from tests.helpers.tiny_models import tiny_model

RESULTS = {
    "results": {"piqa": {"alias": "piqa", "acc,none": 0.75, "acc_stderr,none": 0.01, "acc_norm,none": 0.7625}},
    "n-shot": {"piqa": 0},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse checkpoint with a tokenizer and a card that declares a license."""
    folder = tmp_path_factory.mktemp("cards") / "my-moe"
    tiny_model("qwen2_moe").save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    header = "license: other\nlicense_name: my-license\nlicense_link: https://example.org/terms\nlanguage:\n- en\n"
    (folder / "README.md").write_text(f"---\n{header}tags:\n- theirs\n---\n# Base\n")
    return folder


@pytest.fixture(scope="module")
def texts(base: Path) -> Path:
    path = base.parent / "texts.txt"
    path.write_text("\n".join(row["text"] for row in lm_rows(12)))
    return path


@pytest.fixture(scope="module")
def checkpoint(base: Path, texts: Path) -> Path:
    config = CondenseConfig(num_layers=2, num_experts=2, metric="mse", batch_size=4, refit="down_proj")
    condense_pretrained(base, config, calibration=texts).save_pretrained(base.parent / "condensed")
    return base.parent / "condensed"


def commands(card: str) -> list[list[str]]:
    """The arguments of the card's commands."""
    blocks = [block.split("```")[0] for block in card.split("```bash\n")[1:]]
    return [shlex.split(block.replace("\\\n", " "))[2:] for block in blocks]


def test_metadata(checkpoint: Path) -> None:
    card = ModelCard.load(checkpoint / "README.md")
    data = card.data.to_dict()
    assert yaml.safe_load(card.content.split("---")[1]) == data
    assert data["license"] == "other"
    assert data["license_name"] == "my-license"
    assert data["license_link"] == "https://example.org/terms"
    assert data["language"] == ["en"]
    assert data["pipeline_tag"] == "text-generation"
    assert data["tags"] == ["cdmoe", "mixture-of-experts"]
    assert "base_model" not in data  # a folder is no name on the hub
    assert card.text.lstrip().startswith("<!-- written by cdmoe_plugin -->\n# my-moe, condensed")


def test_what_was_done(checkpoint: Path, base: Path) -> None:
    card, plan = (checkpoint / "README.md").read_text(), CondensePlan.load(checkpoint)
    sizes = json.loads((checkpoint / "config.json").read_text())["condense_config"]["parameters"]
    assert f"{sizes['before']:,}" in card
    assert f"{sizes['after']:,}" in card
    assert plan.calibration is not None
    assert plan.calibration["fingerprint"] in card
    assert f"{plan.calibration['num_samples']} samples" in card
    assert "`refit='down_proj'`" in card
    assert str(base.parent) not in card  # nobody's business
    assert ", ".join(map(str, plan.layers[0].experts)) in card


def test_its_commands_make_it_again(checkpoint: Path, base: Path, texts: Path, tmp_path: Path) -> None:
    applied, searched = commands((checkpoint / "README.md").read_text())
    assert "--plan" in applied
    places = {"my-moe": base, "texts.txt": texts, "condense_plan.json": checkpoint / "condense_plan.json"}
    for name, words in (("applied", applied), ("searched", searched)):
        output = tmp_path / name
        argv = [str({**places, "condensed": output}.get(word, word)) for word in words]
        arguments, search = condense.make_parser().parse_args_and_config(argv)
        condense.run(arguments, {field: value for field, value in vars(search).items() if value is not None})
        found, expected = CondensePlan.load(output), CondensePlan.load(checkpoint)
        assert found.layers == expected.layers
    same = (tmp_path / "applied" / "model.safetensors").read_bytes()
    assert same == (checkpoint / "model.safetensors").read_bytes()


def test_results(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text((checkpoint / "README.md").read_text())
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    for _ in range(2):
        add_results(tmp_path, tmp_path / "results.json")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.text.count("## Results") == card.text.count("## Use") == 1
    assert card.text.index("## Results") < card.text.index("## Use")
    assert "± 0.0100" in card.text
    found = {(result.dataset_type, result.metric_type): result.metric_value for result in card.data.eval_results}
    assert found == {("piqa", "acc"): 0.75, ("piqa", "acc_norm"): 0.7625}
    assert card.data.license == "other"
    with pytest.raises(ValueError, match="has no score"):
        add_results(tmp_path, {"results": {}})
    (tmp_path / "README.md").write_text("# Mine")
    with pytest.raises(ValueError, match="not a model card generated by saving"):
        add_results(tmp_path, RESULTS)


def test_base_metadata(tmp_path: Path) -> None:
    assert base_metadata("") == base_metadata(str(tmp_path)) == base_metadata("nobody/nothing") == {}
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\nlicense_link: LICENSE\n---\n")
    assert base_metadata(str(tmp_path)) == {"license": "apache-2.0"}
    (tmp_path / "README.md").write_text("no header")
    assert base_metadata(str(tmp_path)) == {}
    (tmp_path / "README.md").write_text("---\n{ [\n---\n")
    assert base_metadata(str(tmp_path)) == {}
