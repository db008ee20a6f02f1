"""Condensed checkpoints are written whole or not at all, and only what was written is replaced."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, Trainer, modeling_utils

from cdmoe_plugin import CondenseConfig, CondensePlan, condense_pretrained, unfreeze_condensed
from tests.helpers.tiny_models import random_ids, tiny_model

IDS = random_ids()
WRITTEN = {"model.safetensors", "config.json", "generation_config.json", "condense_plan.json", "README.md"}
WRITTEN |= {"modeling_cdmoe.py", "layers_cdmoe.py"}
# What others may keep in the same folder.
OTHERS = {"tokenizer.json": "{}", "optimizer.pt": "adam", "logs/events.1": "", ".me": "1", "model.safetensors.old": ""}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return condense_pretrained(tiny_model("qwen2_moe"), CondenseConfig(num_layers=2, num_experts=2), calibration=IDS)


@pytest.fixture
def folder(model: PreTrainedModel, tmp_path: Path) -> Path:
    """A condensed checkpoint among other files."""
    path = tmp_path / "checkpoint"
    model.save_pretrained(path)
    for name, text in OTHERS.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(text)
    return path


@pytest.fixture
def changed(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The same model with other weights."""
    before = model.lm_head.weight.data
    model.lm_head.weight.data = before + 1
    yield model
    model.lm_head.weight.data = before


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder, in subfolders too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_weights(model: PreTrainedModel, other: PreTrainedModel) -> bool:
    expected, found = model.state_dict(), other.state_dict()
    return expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)


def others_survive(folder: Path) -> bool:
    return all((folder / name).read_text() == text for name, text in OTHERS.items())


def test_files(model: PreTrainedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "new" / "checkpoint")
    folder = tmp_path / "new" / "checkpoint"
    assert set(contents(folder)) == WRITTEN
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint"]
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "cdmoe_qwen2_moe"
    assert config["architectures"] == ["CDMoEQwen2MoeForCausalLM"]
    assert config["auto_map"]["AutoConfig"] == "modeling_cdmoe.CDMoEQwen2MoeConfig"
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_cdmoe.CDMoEQwen2MoeForCausalLM"
    condensed = sorted(layer.layer for layer in model.condense_plan.layers)
    assert sorted(map(int, config["condense_config"]["condensed_layers"])) == condensed
    assert config["condense_config"]["num_experts"] == 2
    assert CondensePlan.load(folder) == CondensePlan.load(folder / "condense_plan.json") == model.condense_plan
    weights = load_file(folder / "model.safetensors")
    width = 24 + 2 * 16
    for layer in condensed:
        shapes = {name.rpartition("mlp.")[2]: list(w.shape) for name, w in weights.items() if f"{layer}.mlp." in name}
        projections = {"gate_proj.weight": [width, 32], "up_proj.weight": [width, 32], "down_proj.weight": [32, width]}
        assert shapes == {**projections, "shared_expert_gate.weight": [1, 32]}
    sparse = ({1, 2, 3} - set(condensed)).pop()
    assert f"model.layers.{sparse}.mlp.experts.7.up_proj.weight" in weights  # the base architecture's names
    assert "cdmoe" in (folder / "README.md").read_text()


@pytest.mark.parametrize("sizes", [("20KB", "60KB"), ("60KB", "20KB"), ("20KB", "1GB"), ("1GB", "60KB")])
def test_no_shard_of_an_older_save_stays(changed: PreTrainedModel, folder: Path, sizes: tuple[str, str]) -> None:
    for size in sizes:
        changed.save_pretrained(folder, max_shard_size=size)
    found = {name for name in contents(folder) if name.startswith("model") and not name.endswith((".old", ".py"))}
    if sizes[1] == "1GB":
        assert found == {"model.safetensors"}
    else:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert found == {*index["weight_map"].values(), "model.safetensors.index.json"}
        assert len(found) > 3
    assert others_survive(folder)
    assert same_weights(changed, AutoModelForCausalLM.from_pretrained(folder))


def test_variants_live_side_by_side(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder, variant="a", max_shard_size="20KB")
    model.save_pretrained(folder, variant="a", max_shard_size="60KB")
    model.save_pretrained(folder)
    index = json.loads((folder / "model.safetensors.index.a.json").read_text())
    assert {p.name for p in folder.glob("model.a-*")} == set(index["weight_map"].values())
    for variant in (None, "a"):
        assert same_weights(model, AutoModelForCausalLM.from_pretrained(folder, variant=variant))


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt("No time left")])
@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("spot", ["first shard", "third shard", "config"])
def test_a_failed_save_changes_nothing(
    spot: str, exists: bool, error: Any, changed: PreTrainedModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name = (PreTrainedConfig, "save_pretrained") if spot == "config" else (modeling_utils, "safe_save_file")
    successes = 2 if spot == "third shard" else 0
    original, calls = getattr(owner, name), []

    def write(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) > successes:
            raise error
        original(*args, **kwargs)

    monkeypatch.setattr(owner, name, write)
    before = contents(folder.parent)
    with pytest.raises(type(error), match=r"No .* left"):
        changed.save_pretrained(folder if exists else folder.parent / "new", max_shard_size="60KB")
    assert contents(folder.parent) == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert {path.name for path in folder.iterdir()} == {name.partition("/")[0] for name in contents(folder)}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, with room for two checkpoints and little else."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=600k", "none", str(path)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("may not mount a file system here")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)  # readers may still map its files


def test_a_full_disk(changed: PreTrainedModel, small_disk: Path) -> None:
    """The folder is a mount point besides, as a container's output folder is: it can't be renamed."""
    changed.save_pretrained(small_disk)
    assert same_weights(changed, AutoModelForCausalLM.from_pretrained(small_disk))
    (small_disk / "large").write_bytes(bytes(200_000))
    before, entries = contents(small_disk), sorted(small_disk.iterdir())
    with pytest.raises(Exception, match=r"(?i)no space"):
        changed.save_pretrained(small_disk, max_shard_size="20KB")
    assert contents(small_disk) == before
    assert sorted(small_disk.iterdir()) == entries
    (small_disk / "large").unlink()
    changed.save_pretrained(small_disk, max_shard_size="20KB")
    assert same_weights(changed, AutoModelForCausalLM.from_pretrained(small_disk))


def test_a_working_directory_stays_the_same_folder(
    changed: PreTrainedModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By whatever name; elsewhere, a new folder takes the place of the old one."""
    link = folder.parent / "link"
    link.symlink_to(folder)
    folder.chmod(0o2775)
    before = folder.stat()
    monkeypatch.chdir(folder)
    for target in (link, ".", folder):
        changed.save_pretrained(target)
        assert Path("config.json").exists()
        assert link.is_symlink()
        assert (folder.stat().st_ino, folder.stat().st_mode) == (before.st_ino, before.st_mode)
    assert others_survive(folder)
    assert same_weights(changed, AutoModelForCausalLM.from_pretrained(folder))


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays_a_link(exists: bool, changed: PreTrainedModel, folder: Path) -> None:
    link, place = folder.parent / "link", folder if exists else folder.parent / "new"
    link.symlink_to(place.name)
    changed.save_pretrained(link)
    assert link.is_symlink()
    assert link.resolve() == place
    assert same_weights(changed, AutoModelForCausalLM.from_pretrained(place))
    assert not exists or others_survive(place)


def test_a_file_is_no_folder(model: PreTrainedModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"`save_directory` should be a folder, but .*file is a file"):
        model.save_pretrained(tmp_path / "file")
    assert contents(tmp_path) == {"file": b"mine"}


def test_state_dict_and_processes(model: PreTrainedModel, folder: Path) -> None:
    before = contents(folder.parent)
    doubled = {name: tensor * 2 for name, tensor in model.state_dict().items()}
    for target in (folder, folder.parent / "new"):  # processes but the main one write nothing
        model.save_pretrained(target, is_main_process=False, state_dict=doubled)
        model.save_pretrained(target, False)
    assert contents(folder.parent) == before
    model.save_pretrained(folder, state_dict=doubled)
    reopened = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(reopened[name], tensor) for name, tensor in doubled.items())


def test_saving_what_was_opened_gives_the_same_files(model: PreTrainedModel, folder: Path) -> None:
    for generation in range(2):
        opened = AutoModelForCausalLM.from_pretrained(folder)
        assert opened.condense_plan == model.condense_plan
        opened.save_pretrained(folder.parent / f"again{generation}")
        again = contents(folder.parent / f"again{generation}")
        assert again == {name: data for name, data in contents(folder).items() if name in again}
        assert set(again) >= WRITTEN


def test_somebodys_model_card_is_kept(model: PreTrainedModel, folder: Path) -> None:
    (folder / "README.md").write_text("# My model")
    model.save_pretrained(folder)
    assert (folder / "README.md").read_text() == "# My model"


@pytest.mark.slow
def test_trainer_saves_and_resumes(model: PreTrainedModel, folder: Path) -> None:
    data = [{"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)} for ids in [IDS[0]] * 8]

    def train(resume: Path | None = None) -> Trainer:
        opened = AutoModelForCausalLM.from_pretrained(folder)
        unfreeze_condensed(opened)
        options: dict[str, Any] = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-2}
        options |= {"lr_scheduler_type": "constant", "save_steps": 1, "per_device_train_batch_size": 2}
        arguments = transformers.TrainingArguments(str(out), max_steps=2, **options)
        trainer = Trainer(model=opened, args=arguments, train_dataset=data)
        trainer.train(resume_from_checkpoint=resume and str(resume))
        return trainer

    out = folder.parent / "out"
    whole, first, last = train(), out / "checkpoint-1", out / "checkpoint-2"
    assert set(contents(first)) >= {*WRITTEN, "optimizer.pt", "trainer_state.json"}
    shutil.rmtree(last)
    resumed = train(first)
    assert same_weights(whole.model, resumed.model)
    assert same_weights(whole.model, AutoModelForCausalLM.from_pretrained(last))
    assert not same_weights(whole.model, AutoModelForCausalLM.from_pretrained(first))
    assert not same_weights(model, whole.model)
    resumed.save_model(str(out))  # beside the checkpoints, which stay
    assert same_weights(whole.model, AutoModelForCausalLM.from_pretrained(out))
    assert same_weights(whole.model, AutoModelForCausalLM.from_pretrained(last))
