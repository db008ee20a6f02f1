"""The model card tells where a condensed checkpoint comes from, keeps the license, and its commands make it again."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from cdmoe_plugin import CondenseConfig, CondensedLayer, CondensePlan, apply_plan, condense_pretrained, search_plan
from cdmoe_plugin.cards import base_model
from cdmoe_plugin.cards.base_model import base_metadata, describe_base
from cdmoe_plugin.cards.card import add_results
from cdmoe_plugin.scripts import condense
from tests.helpers.models import sparse_model
from tests.helpers.plans import some_plan
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
    config = CondenseConfig(2, 2, metric="mse", max_length=16, batch_size=4, refit="down_proj")
    condense_pretrained(base, config, calibration=texts).save_pretrained(base.parent / "condensed")
    return base.parent / "condensed"


def commands(card: str) -> list[list[str]]:
    """The arguments of the card's commands."""
    blocks = [block.split("```")[0] for block in card.split("```bash\n")[1:]]
    return [shlex.split(block.replace("\\\n", " "))[2:] for block in blocks if block.startswith("cdmoe")]


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


def test_a_cut_plan(base: Path, texts: Path, tmp_path: Path) -> None:
    config = CondenseConfig(num_layers=3, num_experts=4, batch_size=4, num_samples=6)
    plan = search_plan(AutoModelForCausalLM.from_pretrained(base), config, calibration=texts)
    small = plan.truncate(num_layers=2, num_experts=3).truncate(num_experts=2)
    condense_pretrained(base, plan=small).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "The plan was cut from a search for 3 layers and 4 experts." in card
    assert "And this searched the larger plan:" in card
    assert {"--num_layers", "3", "--num_experts", "4"} < set(commands(card)[1])
    assert plan.truncate(num_layers=3) == plan  # nothing is cut


def test_a_base_model_in_memory_without_shared_experts(tmp_path: Path) -> None:
    model = apply_plan(tiny_model("mixtral"), some_plan([1, 0]))
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "The kept experts, with constant gates, form one dense MLP" in " ".join(card.split())
    assert "shared" not in card
    assert "--model_name_or_path base-model" in card
    assert "given in memory" in card


def test_use(checkpoint: Path) -> None:
    use = (checkpoint / "README.md").read_text().split("## Use")[1].split("## ")[0]
    assert "pip install cdmoe_plugin" in use
    assert 'AutoTokenizer.from_pretrained("my-moe")' in use


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


def test_the_base_model_s_card_is_of_the_same_revision(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So are the folder, the token and the cache; a card in the subfolder comes first."""
    asked = []

    def cached_file(name: str, file: str, **kwargs: Any) -> str | None:
        asked.append((name, file, {key: value for key, value in kwargs.items() if not key.startswith("_")}))
        return None

    place = {"revision": "v1", "cache_dir": "cache", "token": "secret", "local_files_only": True}
    monkeypatch.setattr(base_model, "cached_file", cached_file)
    assert describe_base("org/name", subfolder="inner", trust_remote_code=None, **place)["base_card"] == {}
    found = [("org/name", "README.md", {**place, "subfolder": folder}) for folder in ("inner", "")]
    assert asked == found
    asked.clear()
    config = CondenseConfig(num_layers=1, num_experts=1)
    for plan in (None, some_plan([1])):
        condensed = condense_pretrained(base, config, plan=plan, calibration=[[5, 6, 7]], **place)
        assert [{**kwargs, "subfolder": ""} for *_, kwargs in asked] == [{**place, "subfolder": ""}]
        assert "secret" not in repr(vars(condensed)) + condensed.config.to_json_string()
        asked.clear()
    model = tiny_model("qwen2_moe")
    model.config._name_or_path = model.name_or_path = "org/name"
    model.config._commit_hash = "0123abc"
    apply_plan(model, some_plan([1]))
    assert asked == [("org/name", "README.md", {"revision": "0123abc", "subfolder": ""})]
    monkeypatch.undo()

    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_link: LICENSE\n---\n")
    assert base_metadata(str(tmp_path), subfolder="inner") == {"license": "other"}
    (inner / "README.md").write_text("---\nlicense: mit\n---\n")
    assert base_metadata(str(tmp_path), subfolder="inner") == {"license": "mit"}
    monkeypatch.setattr(base_model, "cached_file", lambda *_args, **_kwargs: str(tmp_path / "README.md"))
    link = "https://huggingface.co/org/name/blob/v1/LICENSE"
    assert base_metadata("org/name", revision="v1") == {"license": "other", "license_link": link}


def test_neurons(texts: Path, base: Path, tmp_path: Path) -> None:
    given = {
        "num_layers": 2,
        "num_experts": 2,
        "batch_size": 4,
        "refit": "down_proj",
        "refit_neurons": "energy",
        "max_length": 16,
    }
    model = condense_pretrained(base, CondenseConfig(**given), calibration=str(texts))
    model.save_pretrained(tmp_path / "one")
    card = " ".join((tmp_path / "one" / "README.md").read_text().split())
    assert "all but some routed neurons are removed. The kept neurons, with their experts' constant gates," in card
    assert (
        "as many routed neurons as the plan's experts have, chosen from all experts (`refit_neurons='energy'`)" in card
    )
    applied, searched = commands((tmp_path / "one" / "README.md").read_text())
    assert applied[applied.index("--refit_neurons") + 1] == "energy"
    assert searched[searched.index("--expert_selection") + 1] == "frequency"


def test_experts_behind_the_router(tmp_path: Path) -> None:
    model = sparse_model("qwen2_moe")
    rows = [CondensedLayer(1, [0], [0.5]), CondensedLayer(3, [2], [0.5], routed=[0, 1, 3])]
    apply_plan(model, CondensePlan(rows)).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "in 1 decoder layers, the router and all but a few routed experts are removed" in card
    assert "In 1 decoder layers, some experts stay behind the router, and a dense MLP beside them" in card
    assert "behind the router" in card.split("| decoder layer")[1].split("\n")[0]
