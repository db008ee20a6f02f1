"""Config files of the recipes: every one is parsed, and those for accelerate are launched for a dry run."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin

from cdmoe_plugin.scripts.parsing import CONFIGS
from tests.helpers.programs import Programs
from tests.helpers.recovery import RECIPES, condensed_model, lm_then_sft, run, word_tokenizer, write_data

__all__ = ["lm_then_sft"]  # a fixture

RECOVER = sorted(CONFIGS.glob("recover-*.yaml"))
LAUNCH = sorted(RECIPES.glob("accelerate/*.yaml"))


def parse(recipe: ModuleType, *args: object) -> Any:
    return recipe.make_parser().parse_args_and_config(args=[str(each) for each in args])


@pytest.mark.parametrize("path", RECOVER, ids=lambda path: path.stem)
def test_recovery_configs(path: Path, lm_then_sft: ModuleType, tmp_path: Path) -> None:
    args, training, model, _ = parse(lm_then_sft, "--config", path, "--use_cpu", "--output_dir", tmp_path)
    assert model.model_name_or_path
    assert args.sft_dataset
    assert training.router_aux_loss_coef == 0.0
    assert training.warmup_steps == 0.1
    # The command line wins.
    _, training, _, _ = parse(lm_then_sft, "--config", path, "--use_cpu", "--learning_rate", 7, "--bf16", "false")
    assert training.learning_rate == 7


def test_defaults_are_the_papers(lm_then_sft: ModuleType, tmp_path: Path) -> None:
    args, training, model, search = parse(lm_then_sft, "--use_cpu", "--output_dir", tmp_path)
    assert (training.learning_rate, training.num_train_epochs, training.warmup_steps) == (5e-5, 1.0, 0.1)
    assert training.lr_scheduler_type == "cosine"
    assert training.bf16
    assert (args.stages, args.lm_dataset, args.lm_num_examples, args.distillation) == ("lm,sft", None, 100_000, "none")
    assert (model.dtype, model.lora_dropout) == ("auto", 0.0)
    assert set(vars(search).values()) == {None}
    lm, sft = (lm_then_sft.stage_arguments(stage, args, training) for stage in ("lm", "sft"))
    assert (lm.packing, lm.packing_strategy) == (True, "bfd_split")
    assert not sft.packing
    assert Path(lm.output_dir) == tmp_path / "lm"


def test_a_stage_has_its_own_settings(lm_then_sft: ModuleType, tmp_path: Path) -> None:
    own = ("--lm_learning_rate", 1e-3, "--sft_max_steps", 7, "--lm_num_train_epochs", 0.5, "--max_steps", 9)
    args, training, *_ = parse(lm_then_sft, "--use_cpu", "--output_dir", tmp_path, *own)
    lm, sft = (lm_then_sft.stage_arguments(stage, args, training) for stage in ("lm", "sft"))
    assert (lm.learning_rate, lm.num_train_epochs, lm.max_steps) == (1e-3, 0.5, 9)
    assert (sft.learning_rate, sft.num_train_epochs, sft.max_steps) == (5e-5, 1.0, 7)


@pytest.mark.parametrize("path", LAUNCH, ids=lambda path: path.stem)
def test_launch_configs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config_from_file(str(path))
    text = yaml.safe_load(path.read_text())
    assert config.distributed_type.value == text["distributed_type"]
    assert config.mixed_precision == "bf16"
    if text["distributed_type"] == "FSDP":
        names = FullyShardedDataParallelPlugin.__dataclass_fields__
        given = {name.removeprefix("fsdp_"): value for name, value in config.fsdp_config.items()}
        given["fsdp_version"] = given.pop("version")
        given["auto_wrap_policy"] = given.pop("auto_wrap_policy").lower()
        given["cpu_offload"] = given.pop("offload_params")
        assert set(given) <= set(names)
        plugin = FullyShardedDataParallelPlugin(**given)
        assert plugin.fsdp_version == 2
        assert "FULL" in str(plugin.state_dict_type)
    else:
        assert set(config.deepspeed_config) <= {
            *DeepSpeedPlugin.__dataclass_fields__,
            "deepspeed_multinode_launcher",
            "zero3_init_flag",
        }
        assert config.deepspeed_config["zero_stage"] == 2


@pytest.mark.slow
def test_dry_run_under_a_launch_config(tmp_path: Path, programs: Programs) -> None:
    write_data(tmp_path)
    condensed_model().save_pretrained(tmp_path / "condensed")
    word_tokenizer().save_pretrained(tmp_path / "condensed")
    launch = [programs.python, "-m", "accelerate.commands.launch", "--num_processes", "2", "--mixed_precision", "no"]
    launch += ["--config_file", RECIPES / "accelerate" / "fsdp.yaml", "--main_process_port", "0"]
    launch += [RECIPES / "lm_then_sft.py"]
    args = ["--model_name_or_path", tmp_path / "condensed", "--lm_dataset", tmp_path / "lm.jsonl", "--dry_run"]
    args += ["--sft_dataset", tmp_path / "sft.json", "--output_dir", tmp_path / "out", "--use_cpu", "--bf16", "false"]
    environment = {**programs.environment, "ACCELERATE_USE_CPU": "1"}
    result = subprocess.run([str(p) for p in (*launch, *args)], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "2 processes (FSDP) on cpu, 16 sequences per step." in result.stdout
    model = condensed_model()
    trained = sum(p.numel() for name, p in model.named_parameters() if ".1.mlp" in name or ".3.mlp" in name)
    assert f"{trained:,} of {model.num_parameters():,} parameters would learn" in result.stdout
    assert "lm: " in result.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--stages", "sft,lm"], "`--stages` should be lm,sft or lm or sft"),
        (["--stages", "dpo"], "dpo"),
        (["--plan", "{place}/condensed"], r"condensed already: \['plan'\] would do nothing"),
        (["--condense_num_layers", "2"], r"condensed already: \['condense_num_layers'\]"),
        (["--distillation", "logits"], "--teacher_name_or_path"),
        (["--distillation", "logits", "--stages", "sft"], "which `--stages` leaves out"),
        (["--distillation", "logits", "--distillation_weight", "2"], "distillation_weight"),
        (["--model_name_or_path", "{place}/dense"], "dense"),
        (["--model_name_or_path", "{place}/sparse", "--condense_num_layers", "9"], "`num_layers` is 9"),
        (["--model_name_or_path", "{place}/sparse", "--plan", "{place}/other.json"], "plan"),
        (["--model_name_or_path", "{place}/sparse", "--condense_form", "trim_layer"], "leaves nothing to train"),
        (
            ["--model_name_or_path", "{place}/sparse", "--plan", "{place}/other.json", "--condense_metric", "kl"],
            r"no search: \['condense_metric'\] would do nothing",
        ),
        (["--sft_dataset", "{place}/columns.json"], r"columns \['question'\]"),
        (["--lm_dataset", "{place}/missing.jsonl"], "does not exist"),
        (["--num_held_out", "0"], "num_held_out"),
        (["--fsdp", "full_shard", "--load_in_4bit"], "`--load_in_4bit` does not go with FSDP"),
        (["--distillation", "blocks", "--teacher_name_or_path", "x", "--fsdp", "full_shard"], "`--distillation` does"),
        (["--lm_num_examples", "0"], "lm_num_examples"),
        (["--output_dir", "{place}/full"], "not an empty folder"),
        (["--output_dir", "{place}/full", "--resume_from_checkpoint", "true"], "holds another run"),
        (["--resume_from_checkpoint", "{place}/lm/checkpoint-7"], "should be `true`, or a complete checkpoint"),
    ],
)
def test_bad_requests_leave_nothing(
    more: list[str], message: str, place: Path, lm_then_sft: ModuleType, tmp_path: Path
) -> None:
    data = ["--lm_dataset", place / "lm.jsonl", "--sft_dataset", place / "sft.json"]
    given = ["--model_name_or_path", place / "condensed", "--output_dir", tmp_path / "out", *data]
    before = sorted(place.rglob("*"))
    with pytest.raises(ValueError, match=message):
        run(lm_then_sft, [*given, "--use_cpu", *(each.format(place=place) for each in more)])
    assert sorted(place.rglob("*")) == before
    assert {path.name for path in tmp_path.rglob("*")} <= {"out", "recipe.json"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    from cdmoe_plugin import CondensedLayer, CondensePlan
    from tests.helpers.tiny_models import tiny_model

    folder = tmp_path_factory.mktemp("requests")
    write_data(folder)
    condensed_model().save_pretrained(folder / "condensed")
    tiny_model("qwen2_moe").save_pretrained(folder / "sparse")
    small = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=128
    )
    LlamaForCausalLM(small).save_pretrained(folder / "dense")
    for name in ("condensed", "sparse", "dense"):
        word_tokenizer().save_pretrained(folder / name)
    (folder / "columns.json").write_text('[{"question": "a"}, {"question": "b"}]')
    CondensePlan([CondensedLayer(77, [0], [1.0])]).save(folder / "other.json")
    (folder / "full").mkdir()
    (folder / "full" / "precious.txt").write_text("mine")
    return folder
