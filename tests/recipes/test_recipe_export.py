"""recipes/condense.py --export_stock: a second checkpoint, or a refusal before anything is searched."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from cdmoe_plugin import CondenseConfig, CondensedLayer, CondensePlan, export_stock
from cdmoe_plugin.blocks import UnsupportedModelError
from cdmoe_plugin.export.check import check_export
from cdmoe_plugin.scripts import condense
from tests.helpers.exporting import CASES, NEVER, output, same
from tests.helpers.models import FROM_DISK, sparse_model
from tests.helpers.plans import some_plan
from tests.helpers.recovery import lm_rows, word_tokenizer
from tests.helpers.tiny_models import ARCHITECTURES
from tests.helpers.trimming import trim_plan

# What dense layers of these compute differs, which no config shows.
ONLY_BY_NUMBERS = ("cohere2_moe", "hy_v4")
OPENED_BY_TYPE = {name for name in FROM_DISK if name != "deepseek"}


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    return condense


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sparse checkpoints with tokenizers and a license, and texts."""
    folder = tmp_path_factory.mktemp("sparse")
    for name in ("qwen3_moe", "qwen2_moe", "mixtral", "deepseek_v3"):
        sparse_model(name).save_pretrained(folder / name)
        word_tokenizer().save_pretrained(folder / name)
        (folder / name / "README.md").write_text("---\nlicense: mit\n---\n# Base\n")
    (folder / "texts.txt").write_text("\n".join(row["text"] for row in lm_rows(12)))
    some_plan([1]).save(folder / "plan.json")
    return folder


def run(recipe: ModuleType, *arguments: object) -> None:
    args, search = recipe.make_parser().parse_args_and_config(args=[str(a) for a in arguments])
    recipe.run(args, {name: value for name, value in vars(search).items() if value is not None})


def commands(card: str) -> list[str]:
    return [block.split("```")[0] for block in card.split("```bash\n")[1:]]


def test_both_checkpoints(recipe: ModuleType, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text(
        f"model_name_or_path: {place / 'qwen3_moe'}\ncalibration: {place / 'texts.txt'}\nnum_layers: 2\n"
        f"num_experts: 1\nexport_stock: {tmp_path / 'stock'}\n"
    )
    run(recipe, "--config", tmp_path / "config.yaml", "--output_dir", tmp_path / "condensed")
    model, stock = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("condensed", "stock"))
    assert [type(each).__name__ for each in (model, stock)] == ["CDMoEQwen3MoeForCausalLM", "Qwen3MoeForCausalLM"]
    assert same(output(stock), output(model))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "stock")) == 104
    assert f"as qwen3_moe: {stock.num_parameters():,} parameters" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "condensed", "stock"}
    assert not (tmp_path / "stock" / "condense_plan.json").exists()

    card = ModelCard.load(tmp_path / "stock" / "README.md")
    assert card.data.license == "mit"
    dense = sorted(layer.layer for layer in model.condense_plan.layers)
    assert f"`mlp_only_layers` = `{json.dumps([0, *dense])}`" in card.text
    for count in (sparse_model("qwen3_moe"), model, stock):
        assert f"{count.num_parameters():,}" in card.text
    assert "import cdmoe_plugin" not in card.text
    applied, searched = commands(card.text)
    assert "--plan condense_plan.json" in applied
    assert "--calibration texts.txt" in searched
    assert applied.count("--export_stock exported") == searched.count("--export_stock exported") == 1


def test_constant_gates_by_a_plan(recipe: ModuleType, place: Path, tmp_path: Path) -> None:
    data = {"num_samples": 5, "max_length": 8}
    options = [part for name, value in data.items() for part in (f"--{name}", value)]
    start = ("--model_name_or_path", place / "qwen2_moe", "--plan", place / "plan.json", *options)
    output_dirs = ("--output_dir", tmp_path / "condensed", "--export_stock", tmp_path / "stock")
    run(recipe, *start, *output_dirs, "--export_approximate", "--calibration", place / "texts.txt")
    model, stock = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("condensed", "stock"))
    expected = export_stock(
        model, tmp_path / "again", True, config=CondenseConfig(**data), calibration=place / "texts.txt"
    )
    card = (tmp_path / "stock" / "README.md").read_text()
    assert f"{expected.shared_gates[1]:.4f} (layer 1)" in card
    assert f"{expected.divergence:.3e} nats" in card
    assert "--export_approximate true" in card
    assert same(output(stock), output(AutoModelForCausalLM.from_pretrained(tmp_path / "again")))


def test_offloaded(recipe: ModuleType, place: Path, tmp_path: Path) -> None:
    """What is not in memory is opened again, whole."""
    start = ("--model_name_or_path", place / "qwen3_moe", "--plan", place / "plan.json")
    run(recipe, *start, "--output_dir", tmp_path / "condensed", "--export_stock", tmp_path / "stock")
    more = ("--offload_folder", tmp_path / "offload")
    run(recipe, *start, "--output_dir", tmp_path / "other", "--export_stock", tmp_path / "other-stock", *more)
    for name in ("model.safetensors", "config.json", "README.md"):
        assert (tmp_path / "stock" / name).read_bytes() == (tmp_path / "other-stock" / name).read_bytes()


def test_trimmed_blocks(recipe: ModuleType, place: Path, tmp_path: Path) -> None:
    start = ("--model_name_or_path", place / "mixtral", "--form", "trim_block", "--layers", 1)
    run(recipe, *start, "--output_dir", tmp_path / "trimmed", "--export_stock", tmp_path / "stock")
    trimmed, stock = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("trimmed", "stock"))
    assert (type(stock).__name__, len(stock.model.layers)) == ("MixtralForCausalLM", 3)
    assert (output(stock) == output(trimmed)).all()
    card = ModelCard.load(tmp_path / "stock" / "README.md")
    assert card.data.license == "mit"
    assert "# mixtral, with fewer decoder layers" in card.text
    assert "Block Trimming" in card.text


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("mixtral", ["--num_layers", "2"], "has no field for dense layers"),
        ("deepseek_v3", ["--num_layers", "1"], "`first_k_dense_replace` .* A search may choose .* with `layers`"),
        ("deepseek_v3", ["--layers", "2"], r"\[0, 2\] of 4: \[1\] would have to be dense too"),
        ("qwen2_moe", ["--num_layers", "1"], r"layers \[1, 2, 3\] .* gate per token.*--export_approximate"),
        ("qwen2_moe", ["--plan", "{place}/plan.json"], r"layers \[1\] scale their shared expert by a gate"),
        ("qwen3_moe", ["--num_layers", "9"], "`num_layers` is 9"),
        (
            "qwen3_moe",
            ["--num_layers", "1", "--export_stock", "{place}/mixtral"],
            "--export_stock.*not an empty folder",
        ),
        ("qwen3_moe", ["--num_layers", "1", "--export_stock", "{new}/inside"], "should not lie in each other"),
    ],
)
def test_refused_before_the_search(
    recipe: ModuleType, place: Path, tmp_path: Path, model: str, arguments: list[str], message: str
) -> None:
    new = tmp_path / "new"
    start = ["--model_name_or_path", place / model, "--export_stock", tmp_path / "stock", "--output_dir", new]
    # Calibration data that is not there shows that it has not been looked for.
    more = [] if "--plan" in arguments else ["--calibration", "missing.txt"]
    with pytest.raises((UnsupportedModelError, ValueError), match=message):
        run(recipe, *start, *more, *(each.format(place=place, new=new) for each in arguments))
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_approximate(recipe: ModuleType, place: Path) -> None:
    with pytest.raises(ValueError, match="`--export_approximate` does nothing without"):
        run(recipe, "--model_name_or_path", place / "qwen2_moe", "--export_approximate", "--dry_run")


def test_check_agrees_with_the_export(tmp_path: Path) -> None:
    """Of every architecture, by its config alone; tests/models/test_export.py and test_export_refused.py write them."""
    for name, layers in CASES:
        if name in FROM_DISK:
            check_export(config_of(name, tmp_path), some_plan(layers))
    for name in NEVER:
        if name not in OPENED_BY_TYPE or name in ONLY_BY_NUMBERS:
            continue
        all_layers = CondenseConfig(num_layers=len(ARCHITECTURES[name].sparse_layers), num_experts=1)
        for request in (all_layers, CondenseConfig(num_layers=1, num_experts=1)):
            with pytest.raises(UnsupportedModelError, match=f"{name}. can't describe"):
                check_export(config_of(name, tmp_path), request, approximate=True)


def test_check_of_requests(tmp_path: Path) -> None:
    deepseek = config_of("deepseek_v3", tmp_path)
    for request in (CondenseConfig(layers=[2, 1]), CondenseConfig(num_layers=3), trim_plan("trim_layer", [1])):
        check_export(deepseek, request)
    with pytest.raises(UnsupportedModelError, match=r"\[0, 3\] of 4"):
        check_export(deepseek, trim_plan("trim_layer", [3]))
    check_export(deepseek, trim_plan("trim_block", [3]))
    check_export(config_of("qwen2_moe", tmp_path), trim_plan("trim_layer", [2]))  # the gate goes with the layer
    # Jamba's dense layers are as wide as one expert.
    jamba = config_of("jamba", tmp_path)
    check_export(jamba, CondensePlan([CondensedLayer(3, [5], [0.7])]))
    budget: dict[str, Any] = {"layers": [3], "num_experts": "auto"}
    check_export(jamba, CondenseConfig(**budget, expert_budget=1))
    with pytest.raises(UnsupportedModelError, match="would be 16 wide instead of 48"):
        check_export(jamba, CondenseConfig(**budget, expert_budget=3))


def config_of(name: str, folder: Path) -> Path:
    """A folder with the config of a tiny model and nothing else."""
    if not (folder / name).exists():
        sparse_model(name).config.save_pretrained(folder / name)
    return folder / name
