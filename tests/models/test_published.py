"""Checkpoints as they are published: quantised, with weights beside the decoder, in other formats, or broken.

`python -m tests.models.test_published` writes docs/published.md from `ROWS`. Quantised checkpoints are compared with
plain ones, whose weights tests/helpers/published.py works out by hand.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    FineGrainedFP8Config,
    Mxfp4Config,
    PreTrainedModel,
)

from cdmoe_plugin import CondenseConfig, CondensePlan, apply_plan, condense_pretrained, search_plan
from cdmoe_plugin.estimate import dry_run
from cdmoe_plugin.loading.load import method_of, sketch_model
from cdmoe_plugin.loading.packed import Packed
from cdmoe_plugin.model.extra import extra_weights
from tests.helpers import published
from tests.helpers.checkpoints import Reads
from tests.helpers.own_process import answer_of
from tests.helpers.plans import some_plan
from tests.helpers.states import differing, state
from tests.helpers.tiny_models import random_ids, tiny_model

PAGE = Path(__file__).parents[2] / "docs" / "published.md"
IDS = random_ids(5)
CONFIG = CondenseConfig(num_layers=1, num_experts=2, batch_size=2)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
Pair = tuple[Path, Path]


def beside(folder: Path) -> Path:
    """A checkpoint whose decoder layer 0 is dense, with other layers that are called like decoder layers."""
    tiny_model("qwen2_moe", num_layers=4).save_pretrained(folder)
    tensors = published.read(folder)
    extra = {}
    for place in ("mtp.layers.0.", "visual.blocks.1.", "audio_tower.encoder.layers.2.", "model.layers.4."):
        extra |= {key.replace("model.layers.3.", place): tensors[key] + 1 for key in tensors if "layers.3." in key}
    fields = {"num_nextn_predict_layers": 1, "mtp_num_hidden_layers": 1}
    return published.write(folder, {**extra, **tensors}, published.config_of(folder) | fields)


def plain(folder: Path) -> Path:
    return published.plain(folder, tiny_model("qwen2_moe"))


def said_to_be(method: str, folder: Path, **fields: Any) -> Path:
    """A checkpoint whose config names a method of quantisation."""
    return published.plain(folder, tiny_model("qwen2_moe"), quantization_config={"quant_method": method, **fields})


def in_bin(folder: Path) -> Path:
    plain(folder)
    torch.save(published.read(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def broken(folder: Path, content: bytes | None, name: str = "model.safetensors") -> Path:
    """A checkpoint whose weights are in another state: None is the first half of them."""
    plain(folder)
    weights = folder / "model.safetensors"
    content = weights.read_bytes()[: weights.stat().st_size // 2] if content is None else content
    weights.unlink()
    (folder / name).write_bytes(content)
    return folder


def adapter(folder: Path, beside: bool = False) -> Path:
    """An adapter's config, beside the weights of a base model or without them."""
    folder.mkdir()
    if beside:
        plain(folder)
    values = {"peft_type": "LORA", "base_model_name_or_path": "mistralai/Mixtral-8x7B-v0.1"}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder


def only_gguf(folder: Path) -> Path:
    folder.mkdir()
    (folder / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    return folder


def gguf_file(folder: Path) -> Path:
    return only_gguf(folder) / "model-Q4_K_M.gguf"


def empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


def typo(folder: Path) -> Path:
    plain(folder)
    return folder.with_name(f"{folder.name}x")


def only_config(folder: Path) -> Path:
    plain(folder)
    (folder / "model.safetensors").unlink()
    return folder


def lacks_a_shard(folder: Path) -> Path:
    tiny_model("qwen2_moe").save_pretrained(folder, max_shard_size="100KB")
    next(iter(sorted(folder.glob("*.safetensors")))).unlink()
    return folder


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
QUANTISED: dict[str, Callable[[Path], Pair]] = {
    "deepseek_v3": published.deepseek_v3,
    "gpt_oss": published.gpt_oss,
    "qwen_fp8": published.qwen_fp8,
    "static_fp8": published.static_fp8,
    "nf4": partial(published.bitsandbytes, **NF4),
    "int8": partial(published.bitsandbytes, load_in_8bit=True),
}


@dataclass(frozen=True)
class Row:
    """A way of publishing: for the table, and for the test that tries it.

    Args:
        name (`str`): How a checkpoint is published.
        example (`str`): Where.
        make (`Callable`): Writes such a checkpoint and returns its path.
        wrong (`str`): What is wrong with it: its "weights", which an estimate does not read, or its "path".
        kwargs (`dict`): How it is opened.
    """

    name: str
    example: str
    make: Callable[[Path], Path]
    wrong: str = ""
    kwargs: dict[str, Any] | None = None


def quantised_row(name: str, example: str, layout: str) -> Row:
    return Row(name, example, lambda folder: QUANTISED[layout](folder)[0])


ROWS = [
    Row("16 bit, safetensors", "Qwen1.5-MoE-A2.7B", plain),
    quantised_row("FP8 in blocks, a layer for multi-token prediction", "DeepSeek-V3", "deepseek_v3"),
    quantised_row("FP8 in blocks", "Qwen3-30B-A3B-FP8", "qwen_fp8"),
    quantised_row("FP8 with one scale per matrix", "Mixtral in FP8", "static_fp8"),
    quantised_row("MXFP4", "gpt-oss-20b", "gpt_oss"),
    quantised_row("bitsandbytes, 4 bit", "bnb-4bit", "nf4"),
    quantised_row("bitsandbytes, 8 bit", "bnb-8bit", "int8"),
    Row("compressed-tensors", "Kimi-K2-Thinking", partial(said_to_be, "compressed-tensors", format="pack-quantized")),
    Row("GPTQ", "Qwen1.5-MoE-A2.7B-Chat-GPTQ-Int4", partial(said_to_be, "gptq", bits=4)),
    Row("AWQ", "DeepSeek-V3-AWQ", partial(said_to_be, "awq", bits=4)),
    Row("torchao", "", partial(said_to_be, "torchao")),
    Row("a method unknown to transformers", "NVFP4 by ModelOpt", partial(said_to_be, "modelopt")),
    Row("weights beside the decoder", "Qwen3.5, GLM-4.5", beside),
    Row("an adapter beside the weights", "a base model to which LoRA was saved", partial(adapter, beside=True), "path"),
    Row("an adapter alone", "LoRA on Mixtral", adapter, "path"),
    Row("pytorch_model.bin", "", in_bin),
    Row("pytorch_model.bin, with `offload_folder`", "", in_bin, "weights", {"offload_folder": "offload"}),
    Row("GGUF, a folder", "", only_gguf, "path"),
    Row("GGUF, a file", "", gguf_file, "path"),
    Row("a pointer of git-lfs", "cloned without git-lfs", partial(broken, content=POINTER), "weights"),
    Row("cut-off weights", "an interrupted download", partial(broken, content=None), "weights"),
    Row("a file of weights is lacking", "an interrupted download", lacks_a_shard, "weights"),
    Row("config.json alone", "", only_config, "weights"),
    Row("an empty folder", "", empty, "path"),
    Row("a path with a typo", "", typo, "path"),
]


def happens(row: Row, folder: Path) -> str:
    """What becomes of a checkpoint, for the table."""
    path = row.make(folder / "checkpoint")
    kwargs = dict(row.kwargs or {})
    if "offload_folder" in kwargs:
        kwargs["offload_folder"] = str(folder / "offload")
    try:
        model = condense_pretrained(path, CONFIG, calibration=IDS, **kwargs)
    except ValueError as error:
        return f"refused: {error}".replace(str(folder / "checkpoint"), "FOLDER")
    words = ["condensed"]
    if method_of(sketch_model(path, {})[0]) is not None:
        words.append("weights are dequantised while they are read")
    if list(path.glob("*.safetensors")):
        model = condense_pretrained(path, plan=model.condense_plan, keep_extra=True)
        words += ["weights beside the decoder are left out, or carried over by `keep_extra`"] * bool(
            extra_weights(model)
        )
    return "; ".join(words)


def table() -> str:
    """The text of docs/published.md."""
    cells = []
    for row in ROWS:
        with TemporaryDirectory() as folder:
            cells.append((row.name, row.example, happens(row, Path(folder))))
    lines = [
        "# Checkpoints as they are published",
        "",
        "What `condense_pretrained` and `cdmoe condense` do with a checkpoint, by how it is published. Each row was",
        "tried on a small checkpoint in that layout; refusals come before weights are read and before a search.",
        "Multimodal checkpoints have [a page of their own](multimodal.md), and so have bases with",
        "[code of their own](condense.md). `python -m tests.models.test_published` writes this file; a test fails when",
        "it is out of date.",
        "",
        "| published as | for example | what happens |",
        "| --- | --- | --- |",
        *(f"| {' | '.join(text.replace('|', '/') for text in row)} |" for row in cells),
    ]
    return "\n".join(lines) + "\n"


# --- quantised ---


@pytest.fixture(scope="module", params=list(QUANTISED))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A quantised checkpoint, and a plain one with the same weights."""
    return QUANTISED[request.param](tmp_path_factory.mktemp(request.param) / "checkpoint")


def assert_same(model: PreTrainedModel, plain: PreTrainedModel, folder: Path) -> None:
    """Two models have the same weights, are saved under the same names, and nothing tells of a quantisation."""
    assert model.dtype == plain.dtype == torch.bfloat16
    for name, each in (("one", model), ("other", plain)):
        each.save_pretrained(folder / name)
    assert published.read(folder / "one").keys() == published.read(folder / "other").keys()
    config, other = (published.config_of(folder / name) for name in ("one", "other"))
    assert not differing_fields(config, other)
    opened = [AutoModelForCausalLM.from_pretrained(folder / name) for name in ("one", "other")]
    assert not differing(*map(state, opened))
    assert not {"hf_quantizer", "quantization_method", "is_loaded_in_4bit"} & vars(model).keys()


def differing_fields(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    here = {"condense_config", "_name_or_path", "transformers_version"}
    assert one["condense_config"]["plan"] == other["condense_config"]["plan"]
    return [name for name in {*one, *other} - here if one.get(name) != other.get(name)]


def test_quantised_weights_become_what_they_stand_for(
    pair: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quantised, plain = pair
    expected = condense_pretrained(plain, CONFIG, calibration=IDS)
    assert "dequantised" not in caplog.text
    model = condense_pretrained(quantised, CONFIG, calibration=IDS)
    assert caplog.text.count("they are dequantised to bfloat16 while they are read") == 1
    assert model.condense_plan == expected.condense_plan
    assert_same(model, expected, tmp_path)
    part = condense_pretrained(quantised, plan=expected.condense_plan)
    assert not differing(state(part), state(expected))


def test_from_disk(pair: Pair, tmp_path: Path) -> None:
    quantised, plain = pair
    expected = condense_pretrained(plain, CONFIG, calibration=IDS)
    model = condense_pretrained(quantised, CONFIG, calibration=IDS, offload_folder=str(tmp_path / "offload"))
    assert {p.device.type for name, p in model.named_parameters() if ".layers." in name} == {"meta"}
    assert model.condense_plan.layers[0].experts == expected.condense_plan.layers[0].experts
    again = condense_pretrained(
        quantised, plan=expected.condense_plan, offload_folder=str(tmp_path / "again"), dtype="bfloat16"
    )
    assert_same(again, expected, tmp_path)


def test_estimates_are_those_of_plain_weights(pair: Pair) -> None:
    quantised, plain = pair
    assert dry_run(quantised, CONFIG) == dry_run(plain, CONFIG)


def test_another_dtype(tmp_path: Path) -> None:
    quantised, plain = published.qwen_fp8(tmp_path / "checkpoint")
    one, other = (condense_pretrained(path, plan=some_plan([1]), dtype="float32") for path in (quantised, plain))
    assert one.dtype == torch.float32
    # More digits than bfloat16 keeps: weights are dequantised to this dtype.
    mine, its = (model.model.layers[0].self_attn.q_proj.weight for model in (one, other))
    assert mine.ne(its).any()
    torch.testing.assert_close(mine, its, rtol=0.01, atol=0)


@pytest.mark.parametrize("layout", ["deepseek_v3", "gpt_oss"])
def test_only_what_is_kept_is_read(layout: str, tmp_path: Path, reads: Reads) -> None:
    quantised, _ = QUANTISED[layout](tmp_path / "checkpoint")
    plan = some_plan([2])
    condense_pretrained(quantised, plan=plan)
    kept = set(plan.layers[0].experts)
    of_experts = [(key, index) for key, index, _ in reads if "layers.2.mlp.experts." in key]
    if layout == "deepseek_v3":
        assert {int(key.split(".")[5]) for key, _ in of_experts} == kept
        assert sum(key.endswith("_scale_inv") for key, _ in of_experts) == len(of_experts) / 2
    else:
        assert {index.start for _, index in of_experts if isinstance(index, slice)} == kept
        assert all(isinstance(index, slice) for _, index in of_experts)
    assert not any("layers.4." in key for key, *_ in reads)


def test_one_layer_of_dequantised_weights_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the search, in a refit and while saving."""
    quantised, _ = published.deepseek_v3(tmp_path / "checkpoint", block=16)
    now = most = 0
    unpack = Packed._unpacked

    def forget(size: int) -> None:
        nonlocal now
        now -= size

    def counting(self: Packed) -> torch.Tensor:
        nonlocal now, most
        tensor = unpack(self)
        now += tensor.nbytes
        most = max(most, now)
        weakref.finalize(tensor, forget, tensor.nbytes)
        return tensor

    monkeypatch.setattr(Packed, "_unpacked", counting)
    config = CondenseConfig(num_layers=1, num_experts=2, batch_size=2, refit="down_proj")
    model = condense_pretrained(quantised, config, calibration=IDS, offload_folder=str(tmp_path / "offload"))
    layer = max(sum(2 * p.numel() for p in layer.parameters()) for layer in model.model.layers)
    assert 0 < most <= layer
    most = 0
    model.save_pretrained(tmp_path / "saved")
    assert 0 < most <= layer / 8  # one matrix after the other


LOADED = {"gpt_oss": Mxfp4Config, "qwen_fp8": FineGrainedFP8Config}


@pytest.mark.parametrize("form", ["condense", "trim_block"])
@pytest.mark.parametrize("layout", [*LOADED, "nf4"])
def test_models_that_were_loaded_dequantised(layout: str, form: str, tmp_path: Path) -> None:
    quantised, plain = QUANTISED[layout](tmp_path / "checkpoint")
    if layout == "nf4":
        model = AutoModelForCausalLM.from_pretrained(quantised).dequantize(dtype=torch.bfloat16)
    else:
        settings = LOADED[layout](dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(quantised, quantization_config=settings, dtype=torch.bfloat16)
    plan = some_plan([1]) if form == "condense" else some_plan([1]).as_trimming(form)
    expected = apply_plan(AutoModelForCausalLM.from_pretrained(plain), plan)
    model = apply_plan(model, plan)
    assert not differing(state(model), state(expected))
    model.save_pretrained(tmp_path / "saved")
    expected.save_pretrained(tmp_path / "plain")
    assert published.read(tmp_path / "saved").keys() == published.read(tmp_path / "plain").keys()
    assert "quantization_config" not in published.config_of(tmp_path / "saved")
    assert not differing(state(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), state(expected))


def test_a_quantisation_that_is_passed(tmp_path: Path) -> None:
    quantised, plain = published.qwen_fp8(tmp_path / "checkpoint")
    plan = some_plan([1])
    expected = state(condense_pretrained(plain, plan=plan))
    for given in (FineGrainedFP8Config(dequantize=True), {"quant_method": "fp8", "dequantize": True}):
        assert not differing(state(condense_pretrained(quantised, plan=plan, quantization_config=given)), expected)
        assert not differing(state(condense_pretrained(plain, plan=plan, quantization_config=given)), expected)
    with pytest.raises(ValueError, match=r"does not dequantise.*`dequantize=True`") as refused:
        condense_pretrained(quantised, plan=plan, quantization_config=FineGrainedFP8Config())
    assert "condense first" not in str(refused.value)
    with pytest.raises(ValueError, match=r"is for mxfp4, but the weights of .* are stored quantised by fp8"):
        condense_pretrained(quantised, plan=plan, quantization_config=Mxfp4Config(dequantize=True))
    with pytest.raises(ValueError, match="condense first"):
        condense_pretrained(plain, plan=plan, quantization_config=BitsAndBytesConfig(load_in_4bit=True))


def test_models_that_are_still_quantised(tmp_path: Path) -> None:
    quantised, _ = QUANTISED["nf4"](tmp_path / "checkpoint")
    model = AutoModelForCausalLM.from_pretrained(quantised)
    for verb in (partial(search_plan, model, CONFIG, calibration=IDS), partial(apply_plan, model, some_plan([1]))):
        with pytest.raises(ValueError, match=r"give the checkpoint's path|Give the checkpoint's path") as refused:
            verb()
        assert "condense first" not in str(refused.value)


def test_codes_without_scales_are_no_weights(tmp_path: Path) -> None:
    quantised, _ = published.qwen_fp8(tmp_path / "checkpoint")
    tensors = published.read(quantised)
    lost = next(key for key in tensors if "layers.1.mlp.experts.3" in key and key.endswith("_scale_inv"))
    without = {key: tensor for key, tensor in tensors.items() if key != lost}
    published.write(quantised, without, published.config_of(quantised))
    with pytest.raises(
        ValueError, match=f"1 quantised weights without scales, such as {lost.removesuffix('_scale_inv')}"
    ):
        condense_pretrained(quantised, CONFIG, calibration=IDS)


def test_stacked_experts_in_fp8(tmp_path: Path) -> None:
    """As transformers' own FP8 models are saved, if names are not reverted."""
    published.plain(tmp_path / "one", tiny_model("granitemoe", dtype=torch.bfloat16))
    tensors, found, meaning = published.read(tmp_path / "one"), {}, {}
    for key, tensor in tensors.items():
        found[key] = meaning[key] = tensor
        if tensor.ndim == 3:
            parts = [published.to_fp8(matrix, (16, 16)) for matrix in tensor]
            found[key], found[f"{key}_scale_inv"] = (torch.stack(each) for each in zip(*parts, strict=True))
            meaning[key] = torch.stack([published.from_fp8(*part, (16, 16)) for part in parts]).bfloat16()
    config = published.config_of(tmp_path / "one")
    quantised = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    published.write(tmp_path / "one", found, config | {"quantization_config": quantised})
    published.write(tmp_path / "other", meaning, config)
    one, other = (condense_pretrained(tmp_path / name, plan=some_plan([1])) for name in ("one", "other"))
    assert not differing(state(one), state(other))


def test_the_command_that_makes_a_dequantised_copy(tmp_path: Path) -> None:
    """Of the refusals: transformers' own saving, under names of the model."""
    quantised, plain = published.gpt_oss(tmp_path / "checkpoint")
    settings = {"quantization_config": Mxfp4Config(dequantize=True), "dtype": "bfloat16"}
    model = AutoModelForCausalLM.from_pretrained(quantised, **settings)
    model.save_pretrained(tmp_path / "copy", save_original_format=False)
    one, other = (condense_pretrained(path, plan=some_plan([1])) for path in (tmp_path / "copy", plain))
    assert not differing(state(one), state(other))


# --- weights beside the decoder ---


@pytest.fixture(scope="module")
def surrounded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return beside(tmp_path_factory.mktemp("beside") / "checkpoint")


def ways(folder: Path, plan: CondensePlan, offload: Path) -> dict[str, dict[str, Any]]:
    return {
        "in memory": {"config": CONFIG, "calibration": IDS},
        "in part": {"plan": plan},
        "from disk": {"config": CONFIG, "calibration": IDS, "offload_folder": str(offload / "one")},
        "in part, from disk": {"plan": plan, "offload_folder": str(offload / "other")},
    }


@pytest.mark.parametrize("keep", [False, True])
def test_layers_that_are_called_like_decoder_layers(keep: bool, surrounded: Path, tmp_path: Path) -> None:
    expected = condense_pretrained(plain(tmp_path / "plain"), CONFIG, calibration=IDS)
    expected.save_pretrained(tmp_path / "expected")
    weights, before = published.read(tmp_path / "expected"), published.read(surrounded)
    extra = {key: before[key] for key in before if not key.startswith(("model.", "lm_head")) or ".layers.4." in key}
    assert len(extra) > 100
    for name, kwargs in ways(surrounded, expected.condense_plan, tmp_path).items():
        folder = tmp_path / name
        condense_pretrained(surrounded, keep_extra=keep, **kwargs).save_pretrained(folder)
        assert not differing(published.read(folder), weights | (extra if keep else {})), name
        config = published.config_of(folder)
        assert [config["num_nextn_predict_layers"], config["mtp_num_hidden_layers"]] == [int(keep)] * 2
        opened = AutoModelForCausalLM.from_pretrained(folder)
        assert not differing(state(opened), state(expected))
    # What a model that was opened again does not carry, its config does not promise.
    opened.save_pretrained(tmp_path / "again")
    assert published.config_of(tmp_path / "again")["num_nextn_predict_layers"] == 0
    assert opened.config.num_nextn_predict_layers == int(keep)


def test_extra_weights_in_files_of_a_size(surrounded: Path, tmp_path: Path) -> None:
    model = condense_pretrained(surrounded, plan=some_plan([1]), keep_extra=True)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="60KB")
    model.save_pretrained(tmp_path / "one", max_shard_size="60KB", variant="small")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = {path.name: path.stat().st_size for path in (tmp_path / "many").glob("*.safetensors")}
    assert set(index["weight_map"].values()) == files.keys()
    assert len(files) > 5
    assert max(files.values()) < 80_000
    for folder, kwargs in ((tmp_path / "one", {}), (tmp_path / "many", {}), (tmp_path / "one", {"variant": "small"})):
        assert not differing(state(AutoModelForCausalLM.from_pretrained(folder, **kwargs)), state(model))


def test_extra_weights_of_a_loaded_model_or_of_fewer_layers(surrounded: Path) -> None:
    with pytest.raises(ValueError, match="`keep_extra` reads weights from a checkpoint"):
        condense_pretrained(AutoModelForCausalLM.from_pretrained(surrounded), plan=some_plan([1]), keep_extra=True)
    config = CondenseConfig(num_layers=1, form="trim_block", layer_selection="similarity")
    with pytest.raises(ValueError, match="`keep_extra` is not supported for `form` 'trim_block'"):
        condense_pretrained(surrounded, config, calibration=IDS, keep_extra=True)


def test_a_loaded_model_declares_no_layers_that_it_lacks(surrounded: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(surrounded)
    assert model.config.num_nextn_predict_layers == 1
    assert apply_plan(model, some_plan([1])).config.num_nextn_predict_layers == 0


# --- end to end ---

LOGITS = """
import json, sys, torch
from transformers import AutoModelForCausalLM
import cdmoe_plugin
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    logits = model(torch.tensor(json.load(open(sys.argv[1] + "/ids.json")))).logits
print(json.dumps([type(model).__name__, logits.float().tolist()]))
"""


@pytest.mark.parametrize("layout", ["deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("offload", [False, True])
def test_end_to_end(layout: str, offload: bool, tmp_path: Path) -> None:
    """Searched, condensed, saved, and opened by another program."""
    quantised, plain = QUANTISED[layout](tmp_path / "checkpoint")
    kwargs = {"offload_folder": str(tmp_path / "offload")} if offload else {}
    model = condense_pretrained(quantised, CONFIG, calibration=IDS, keep_extra=True, **kwargs)
    model.save_pretrained(tmp_path / "saved")
    ids = [IDS[0]]
    (tmp_path / "saved" / "ids.json").write_text(json.dumps(ids))
    name, logits = answer_of(LOGITS, tmp_path / "saved", tmp_path)
    expected = apply_plan(AutoModelForCausalLM.from_pretrained(plain), model.condense_plan)
    assert name == type(expected).__name__
    with torch.no_grad():
        torch.testing.assert_close(
            torch.tensor(logits), expected(torch.tensor(ids)).logits.float(), rtol=0.02, atol=0.02
        )


def test_speculative_decoding_with_the_layer_that_was_carried_over(tmp_path: Path) -> None:
    quantised, _ = published.deepseek_v3(tmp_path / "checkpoint", block=16)
    condense_pretrained(quantised, CONFIG, calibration=IDS, keep_extra=True).save_pretrained(tmp_path / "saved")
    saved, before = published.read(tmp_path / "saved"), published.read(quantised)
    key = "model.layers.4.mlp.experts.5.up_proj.weight"
    assert torch.equal(saved[key], published.from_fp8(before[key], before[f"{key}_scale_inv"], (16, 16)).bfloat16())
    assert torch.equal(saved["model.layers.4.eh_proj.weight"], before["model.layers.4.eh_proj.weight"])
    assert not any("scale" in key for key in saved)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    model._keys_to_ignore_on_load_unexpected = [r"model\.layers\.4\."]  # 61 in the class
    ids = torch.tensor(IDS[:1])
    drafted = model.generate(ids, max_new_tokens=10, do_sample=False, use_mtp=True)
    assert torch.equal(drafted, model.generate(ids, max_new_tokens=10, do_sample=False))


# --- files ---


@pytest.mark.parametrize("row", [row for row in ROWS if row.wrong], ids=lambda row: row.name)
def test_what_is_wrong_is_said_first(row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line names the folder, before the calibration data is read."""
    path = row.make(tmp_path / "checkpoint")
    plan = some_plan([1])
    monkeypatch.setattr("cdmoe_plugin.api.load_calibration", lambda *_: pytest.fail("calibration data was read"))
    for kwargs in ({"config": CONFIG, "calibration": "texts"}, {"plan": plan}):
        with pytest.raises(ValueError, match=str(tmp_path / "checkpoint")) as refused:
            condense_pretrained(path, **kwargs, **(row.kwargs or {}))
        assert "\n" not in str(refused.value)
    if row.wrong == "weights":
        assert "parameters" in dry_run(path, CONFIG)
    else:
        with pytest.raises(ValueError, match=str(tmp_path / "checkpoint")):
            dry_run(path, CONFIG)


def test_a_plan_and_weights_that_can_not_be_read_in_part(tmp_path: Path) -> None:
    path = in_bin(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=r"With a plan.*safetensors.*give it to `apply_plan`"):
        condense_pretrained(path, plan=some_plan([1]))
    with pytest.raises(ValueError, match=r"With an `offload_folder`.*safetensors") as refused:
        condense_pretrained(path, CONFIG, calibration=IDS, offload_folder=str(tmp_path / "offload"))
    assert "a plan" not in str(refused.value)


def test_the_table_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == table(), "run `python -m tests.models.test_published`"


if __name__ == "__main__":
    PAGE.write_text(table(), encoding="utf-8")
