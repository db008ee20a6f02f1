"""Condensed Mixture-of-Experts models for transformers, in one self-contained file.

A *condensed* layer is a sparse block whose router is gone and whose kept experts, with constant gates, are
folded with the shared expert into one dense gated MLP (CD-MoE, arXiv 2412.00069). This file knows how to build
and open such models, and nothing of how experts and layers are chosen. It imports torch and transformers only,
because it has two lives: as a module of the package `cdmoe_plugin`, and as a copy beside saved weights that
`trust_remote_code=True` opens where the package is not installed.

For every model class `X` of transformers there is a class `CDMoEX` here, a subclass made on first use, and for
its config class one with `model_type` "cdmoe_<base>". `config.condense_config` says which layers are condensed
and how wide they are; weights keep the names of the base architecture.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.auto import modeling_auto
from transformers.utils import logging

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.get_logger(__name__)

PREFIX = "CDMoE"
MODEL_TYPE_PREFIX = "cdmoe_"
PLAN_FILE = "condense_plan.json"
MODELING_FILE = "modeling_cdmoe.py"
MODEL_CARD_MARK = "<!-- written by cdmoe_plugin -->"
# Where a folder is written before it gets its place, see `replacing_files`; the group is the name that it will have.
STAGING = re.compile(r"\.(.+)\.saving-\d+")
NO_NAME = re.compile(r"(?!)")  # matches nothing
# Of the card that transformers makes for models that have none.
_GENERIC_CARD = "This is the model card of a 🤗 transformers model that has been pushed on the Hub."
# Config fields that hold the weight of a router's load-balancing loss, as architectures name them.
_ROUTER_LOSS_FIELDS = ("router_aux_loss_coef", "aux_loss_alpha", "router_z_loss_coef")


def _clamped(act: Any, gate: torch.Tensor, up: torch.Tensor, limit: float) -> torch.Tensor:
    return act(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def _clamped_after(act: Any, gate: torch.Tensor, up: torch.Tensor, limit: float) -> torch.Tensor:
    return act(gate).clamp(max=limit) * up.clamp(-limit, limit)


def _gpt_oss(_act: Any, gate: torch.Tensor, up: torch.Tensor, limit: float, alpha: float) -> torch.Tensor:
    gate = gate.clamp(max=limit)
    return (up.clamp(-limit, limit) + 1) * (gate * torch.sigmoid(alpha * gate))


def _softcapped(
    _act: Any, gate: torch.Tensor, up: torch.Tensor, gate_softcap: float, up_softcap: float
) -> torch.Tensor:
    g, u = gate.float(), up.float()
    inner = gate_softcap * torch.tanh(g / gate_softcap) * torch.sigmoid(g) * up_softcap * torch.tanh(u / up_softcap)
    return inner.to(gate.dtype)


# What gated MLPs do between their projections, of the activation, gate and up, with constants that config.json tells.
GATED_ACTIVATIONS: dict[str, Callable[..., torch.Tensor]] = {
    "plain": lambda act, gate, up: act(gate) * up,
    "ungated": lambda act, _gate, up: act(up),
    "clamped": _clamped,
    "clamped_after": _clamped_after,
    "gpt_oss": _gpt_oss,
    "softcapped": _softcapped,
}


class EmptyLinear(nn.Linear):
    """A projection from or to nothing, of an MLP that kept no expert and has no shared one.

    bitsandbytes divides by its width. transformers quantises `nn.Linear`s, and none of its subclasses.
    """


class CondensedMLP(nn.Module):
    """One dense gated MLP: the shared expert and the kept routed experts of a condensed layer.

    Computes `down(act(gate(x)) * up(x))`. Where the base architecture scales its shared expert per token by
    `sigmoid(w·x)` (Qwen1.5-MoE), that factor is applied to the first `shared_intermediate_size` activations, which
    is the same function because the down projection is linear. In place of `act(gate(x)) * up(x)`, neurons may have
    another gated activation, those of the shared expert another than the rest.

    Args:
        hidden_size (`int`): Width H of input and output.
        intermediate_size (`int`): Number of neurons, `shared_intermediate_size + K * expert width`; may be 0.
        hidden_act (`str`): Name of the activation in transformers' `ACT2FN`.
        shared_intermediate_size (`int`): How many of the neurons, from the first, are the shared expert's.
        shared_expert_gate (`bool`): Whether the shared expert has a per-token sigmoid gate.
        bias (`bool`): Whether the three projections have biases.
        output_bias (`bool`): Whether the down projection has one, also where the others have none.
        gated_activation (`Mapping`, *optional*): A "form" of `GATED_ACTIVATIONS` and its constants; "plain" by default.
            With "ungated", there is no gate projection.
        shared_gated_activation (`Mapping`, *optional*): That of the shared expert's neurons, where it is another one.
        returns_tuple (`bool`): Whether the base architecture's layers expect router scores beside the output; these are
            None then.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        hidden_act: str,
        shared_intermediate_size: int = 0,
        shared_expert_gate: bool = False,
        bias: bool = False,
        output_bias: bool = False,
        gated_activation: Mapping[str, Any] | None = None,
        shared_gated_activation: Mapping[str, Any] | None = None,
        returns_tuple: bool = False,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.shared_intermediate_size = shared_intermediate_size
        linear = nn.Linear if intermediate_size > 0 else EmptyLinear
        self.gated_activation = _known_activation(gated_activation)
        self.shared_gated_activation = _known_activation(shared_gated_activation or gated_activation)
        gated = self.gated_activation["form"] != "ungated"
        self.gate_proj = linear(hidden_size, intermediate_size, bias=bias) if gated else None
        self.up_proj = linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = linear(intermediate_size, hidden_size, bias=bias or output_bias)
        self.shared_expert_gate = nn.Linear(hidden_size, 1, bias=False) if shared_expert_gate else None
        self.act_fn = ACT2FN[hidden_act]
        self.returns_tuple = returns_tuple
        self.norm_name: str | None = None

    def keep_norm(self, name: str, norm: nn.Module) -> None:
        """Norms the output, as some base architectures do in their sparse blocks, under the name that it has there."""
        self.add_module(name, norm)
        self.norm_name = name

    def forward(self, hidden_states: torch.Tensor, *_routing: Any) -> Any:
        """Maps `hidden_states` of shape `[..., H]` to the same shape and dtype; see `returns_tuple` and `NoRouter`."""
        output = self.sum_of_experts(hidden_states)
        if self.norm_name is not None:
            output = getattr(self, self.norm_name)(output)
        return (output, None) if self.returns_tuple else output

    def sum_of_experts(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The output before any norm."""
        up = self.up_proj(hidden_states)
        inner = self._inner(up if self.gate_proj is None else self.gate_proj(hidden_states), up)
        if self.shared_expert_gate is not None:
            shared, routed = inner.tensor_split([self.shared_intermediate_size], dim=-1)
            shared = shared * torch.sigmoid(self.shared_expert_gate(hidden_states))
            inner = torch.cat([shared, routed], dim=-1)
        return self.down_proj(inner)

    def _inner(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        if self.shared_gated_activation == self.gated_activation:
            return _apply_activation(self.act_fn, gate, up, **self.gated_activation)
        kinds = (self.shared_gated_activation, self.gated_activation)
        gates, ups = (part.tensor_split([self.shared_intermediate_size], dim=-1) for part in (gate, up))
        parts = zip(gates, ups, kinds, strict=True)
        return torch.cat([_apply_activation(self.act_fn, g, u, **kind) for g, u, kind in parts], dim=-1)


def _apply_activation(act: Any, gate: torch.Tensor, up: torch.Tensor, form: str, **constants: float) -> torch.Tensor:
    return GATED_ACTIVATIONS[form](act, gate, up, **constants)


def _known_activation(spec: Mapping[str, Any] | None) -> dict[str, Any]:
    form = (spec or {}).get("form", "plain")
    if form not in GATED_ACTIVATIONS:
        raise ValueError(f"unknown form {form!r} of a gated activation; known are {', '.join(GATED_ACTIVATIONS)}")
    constants = {name: float(value) for name, value in (spec or {}).items() if name != "form"}
    signature(GATED_ACTIVATIONS[form]).bind(None, None, None, **constants)
    return {"form": form, **constants}


class Omitted(nn.Module):
    """Stands where a layer adds the output of a second MLP that has been folded into the condensed one."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.new_zeros(())


class NoRouter(nn.Module):
    """Stands where a decoder layer asks a router before it calls its experts; a condensed MLP needs no answer."""

    def forward(self, *_args: Any) -> tuple[None, None, None]:
        return None, None, None


class Trimmed(nn.Module):
    """Stands where a layer's MLP has been dropped whole: only the residual passes."""

    def __init__(self, returns_tuple: bool = False) -> None:
        super().__init__()
        self.returns_tuple = returns_tuple

    def forward(self, hidden_states: torch.Tensor) -> Any:
        output = torch.zeros_like(hidden_states)
        return (output, None) if self.returns_tuple else output


def install_condensed_layers(model: PreTrainedModel) -> None:
    """Puts an empty `CondensedMLP` (or `Trimmed`) in place of every block that `model.config.condense_config` lists.

    Raises:
        ValueError: if the config names modules that the model does not have, or describes them wrongly.
    """
    condense_config = getattr(model.config, "condense_config", None)
    layers = condense_config.get("condensed_layers") if isinstance(condense_config, Mapping) else None
    if not layers or not isinstance(layers, Mapping):
        raise ValueError(
            f"The config of {type(model).__name__} has no `condense_config.condensed_layers`: the checkpoint is not "
            "condensed, or its config.json was edited."
        )
    for layer, spec in layers.items():
        try:
            parent_name, _, name = spec["module"].rpartition(".")
            parent = model.base_model.get_submodule(parent_name)
            children = {child for child, _ in parent.named_children()}
            routers = [spec["router"]] if spec.get("router") is not None else []
            if parent_name.rpartition(".")[2] != layer or not children.issuperset([name, *spec["omitted"], *routers]):
                raise ValueError("it names modules that the layer does not have")
            replacement = _empty_replacement(model.config.get_text_config().hidden_size, spec)
            if isinstance(replacement, CondensedMLP) and spec.get("norm") is not None:
                replacement.keep_norm(spec["norm"], getattr(getattr(parent, name), spec["norm"]))
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ValueError(
                f"`condense_config.condensed_layers` of this checkpoint's config.json can't be understood for decoder "
                f"layer {layer}: {spec!r} ({error!r}). The file was edited or comes from another version."
            ) from error
        replacement.train(parent.training)
        setattr(parent, name, replacement)
        for other in spec["omitted"]:
            setattr(parent, other, Omitted())
        for router in routers:
            setattr(parent, router, NoRouter())


def _empty_replacement(hidden_size: int, spec: Mapping[str, Any]) -> nn.Module:
    form = spec.get("form", "condense")
    if form == "trim_layer":
        return Trimmed(spec.get("returns_tuple", False))
    if form != "condense":
        raise ValueError(f"unknown form {form!r}")
    if not 0 <= spec["shared_intermediate_size"] <= spec["intermediate_size"]:
        raise ValueError("the shared expert is wider than the layer")
    return CondensedMLP(
        hidden_size=hidden_size,
        intermediate_size=spec["intermediate_size"],
        hidden_act=spec["hidden_act"],
        shared_intermediate_size=spec["shared_intermediate_size"],
        shared_expert_gate=spec["shared_expert_gate"],
        bias=spec["bias"],
        output_bias=spec.get("output_bias", False),
        gated_activation=spec.get("gated_activation"),
        shared_gated_activation=spec.get("shared_gated_activation"),
        returns_tuple=spec.get("returns_tuple", False),
    )


def silence_router_loss(model: PreTrainedModel) -> None:
    """Turns the router's load-balancing loss off, in the config and on the model, once no router is left.

    transformers computes that loss over all routers and fails on none of them; TRL switches it on by itself
    wherever the config holds a coefficient other than 0.
    """
    config = model.config
    if hasattr(config, "output_router_logits"):
        config.output_router_logits = False
    for field in _ROUTER_LOSS_FIELDS:
        for holder in (config, model):
            if getattr(holder, field, None):
                setattr(holder, field, 0.0)


def settle_bitsandbytes(model: Any) -> None:
    """Makes a model with layers of bitsandbytes compute from its weights as they are stored, and be saved again.

    On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks a 4 bit layer's weights at its first forward pass in eval mode.
    That fails unless `out_features % 32 == 0` and `in_features % 64 == 0`, which a gate per token (one row) never has.
    Where it succeeds, no gradient passes through the layer any more, `dequantize()` returns other weights, and so does
    opening what is saved without double quantisation. So the layers are told not to.

    A checkpoint that was quantised when it was opened can't be saved again in transformers 5.17 to 5.23: their reader
    of quantised weights is noted as something to undo, and has no inverse. It needs none.
    """
    if getattr(model, "quantization_method", None) != "bitsandbytes":
        return
    narrow = []
    for name, module in model.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            if module.in_features % 64 in (16, 32, 48) and module.weight.device.type == "cpu":
                narrow.append(name)
    if narrow:
        logger.warning(
            f"The input widths of {len(narrow)} layers in 4 bit, such as {narrow[0]}, are no multiples of 64: "
            "bitsandbytes 0.50 computes wrong values from such weights on some CPUs. Use 8 bit, or name these layers "
            "in `llm_int8_skip_modules`."
        )
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is not None:
        model._weight_conversions = [conversion for conversion in conversions if _has_inverse(conversion)]


def _has_inverse(conversion: Any) -> bool:
    try:
        conversion.reverse_transform()
    except NotImplementedError:
        return False
    return True


# For type checkers, a condensed model is a model; at run time the base class comes in by `condensed_model_class`.
_Model: Any = PreTrainedModel if TYPE_CHECKING else object


class CondensedModelMixin(_Model):
    """What a condensed model adds to its base class: the condensed layers, strict loading, and safe saving."""

    _base_class: Any

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        install_condensed_layers(self)
        if (config.condense_config or {}).get("all_condensed"):
            silence_router_loss(self)
        self.post_init()

    @property
    def condense_plan(self) -> Any:
        """The plan that was applied: a `CondensePlan` with the package installed, else its plain `dict`."""
        plan = (self.config.condense_config or {}).get("plan")
        return plan if plan is None else plan_from_dict(plan)

    # transformers looks for "@use_experts_implementation" in the source of a class's own module, here in vain, and
    # would fall back to the slow loop over experts; the base class knows.
    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return cls._base_class._can_set_experts_implementation()

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return cls._base_class._can_set_attn_implementation()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`, but raises where weights of the decoder are missing.

        Raises:
            ValueError: if any weight of the base model is not in the checkpoint or has another shape.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        prefix = f"{model.base_model_prefix}."
        # Only a head that is new, such as that of a classifier, may start from random weights.
        whole = model.base_model is model or model.get_output_embeddings() is not None
        random = {str(key) for key in info.get("missing_keys", ())}
        random |= {str(key[0]) for key in info.get("mismatched_keys", ())}  # where the caller ignores the sizes
        lost = sorted(key for key in random if whole or key.startswith(prefix))
        if lost:
            raise ValueError(
                f"The checkpoint {model.name_or_path!r} lacks {len(lost)} weights of this condensed model, such as "
                f"{lost[:3]}: it was not saved whole, or its config.json belongs to another checkpoint."
            )
        places = [
            f"{name}."
            for spec in model.config.condense_config["condensed_layers"].values()
            for name in (
                spec["module"],
                *(
                    f"{spec['module'].rpartition('.')[0]}.{other}"
                    for other in (*spec["omitted"], spec.get("router"))
                    if other is not None
                ),
            )
        ]
        unused = sorted(str(key) for key in info.get("unexpected_keys", ()) if any(p in str(key) for p in places))
        if unused:
            raise ValueError(
                f"The checkpoint {model.name_or_path!r} has {len(unused)} weights for which its condensed layers have "
                f"no place, such as {unused[:3]}: its config.json was edited or belongs to another checkpoint."
            )
        settle_bitsandbytes(model)
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs: Any) -> None:
        """As `PreTrainedModel.save_pretrained`, and adds the plan, the modeling file and a model card.

        Whatever happens meanwhile, `save_directory` holds the old checkpoint or the new one, see `replacing_files`.
        """
        only_adapters = getattr(self, "_hf_peft_config_loaded", False)
        # Under torch.distributed, transformers lets the first process alone write.
        saves = getattr(self, "should_save_on_this_rank", bool)(is_main_process)
        if only_adapters or not saves or kwargs.get("distributed_checkpoint"):
            super().save_pretrained(save_directory, is_main_process, **kwargs)
            return
        if any(parameter.is_meta for parameter in self.parameters()):  # offloaded: a file is put together in memory
            kwargs.setdefault("max_shard_size", "1GB")
            state_dict = state_of_offloaded(self) if kwargs.get("state_dict") is None else None
            if state_dict is not None:
                kwargs |= {"state_dict": state_dict, "save_original_format": False}
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", Path(save_directory).name)
        self.config.auto_map = auto_map(type(self), getattr(self.config, "auto_map", None))
        variant = f".{kwargs['variant']}" if kwargs.get("variant") else ""
        stale = re.compile(
            rf"model{re.escape(variant)}(-\d{{5}}-of-\d{{5}})?\.safetensors(\.index\.json)?|model\.safetensors\.index{re.escape(variant)}\.json"
        )
        with replacing_files(save_directory, stale) as folder:
            (folder / MODELING_FILE).write_text(modeling_file(type(self)), encoding="utf-8")
            plan = (self.config.condense_config or {}).get("plan")
            if plan is not None:
                text = json.dumps(plan, indent=2, sort_keys=True)
                (folder / PLAN_FILE).write_text(text + "\n", encoding="utf-8")
            write_model_card(self, folder)
            super().save_pretrained(folder, **kwargs)

    def _upload_modified_files(
        self, working_dir: str | os.PathLike, repo_id: str, files_timestamps: dict[str, float], **kwargs: Any
    ) -> Any:
        """The last step of both `push_to_hub` and `save_pretrained(push_to_hub=True)`: uploads what was saved.

        transformers has just put a generic card over ours, and would leave out files that were written before its own.
        A card of the hub's repository that somebody wrote stays.
        """
        if not getattr(self, "_hf_peft_config_loaded", False):
            if not _is_someones_card(Path(working_dir, "README.md")):
                write_model_card(self, Path(working_dir))
            files_timestamps = {}  # the folder is a temporary one and holds this checkpoint alone
        return super()._upload_modified_files(working_dir, repo_id, files_timestamps, **kwargs)


def plan_from_dict(plan: dict[str, Any]) -> Any:
    """Hook for the package, which returns a `CondensePlan` instead."""
    return plan


def write_model_card(model: PreTrainedModel, folder: Path) -> None:
    """Hook for the package, which writes a README.md."""


def state_of_offloaded(model: PreTrainedModel) -> dict[str, torch.Tensor] | None:
    """Hook for the package, which knows where the weights of its offloaded models are."""
    return None


# --- saving: the old folder or the new one ---------------------------------------------------------------------------


@contextmanager
def replacing_files(target: str | os.PathLike, stale: re.Pattern[str] = NO_NAME) -> Iterator[Path]:
    """Yields an empty folder that takes the place of `target`, in one step, when the block ends without an error.

    Until then `target` stays as it was. Its other files are in the new folder too (by hard links), except those whose
    names match `stale`: shards of an older save must not stay. A process that is killed leaves the old content or the
    new one, and at worst a folder ".<name>.saving-<digits>" beside it or in it, which the next save removes.

    Some folders can't be replaced: mount points, the working directory and those above it, those whose parent folder
    the user may not write to; outside Linux, and on a few file systems, any that is not empty. There, files are moved
    one by one, the old config.json out first and the new one in last: what a killed process leaves does not open.

    Raises:
        ValueError: if `target` is a file, or holds a folder by the name of a file that was written.
    """
    if not os.fspath(target):
        raise ValueError("`save_directory` is empty: name a folder.")
    target = Path(target).resolve()
    if target.is_file():
        raise ValueError(f"`save_directory` should be a folder, but {target} is a file.")
    if STAGING.fullmatch(target.name):  # a part of something larger that is being saved
        yield target
        return
    staging, lock = _new_staging(target)
    try:
        yield staging
        if _is_someones_card(target / "README.md"):
            (staging / "README.md").unlink(missing_ok=True)
        written = [path.relative_to(staging) for path in staging.rglob("*") if not path.is_dir()]
        for name in written:
            if (target / name).is_dir():
                raise ValueError(f"`save_directory` holds a folder {name}, but a file of this name is to be saved.")
            _to_disk(staging / name)
        try:
            _swap(staging, target, stale)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            _move_files(staging, target, written, stale)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _new_staging(target: Path) -> tuple[Path, int | None]:
    """An empty folder beside `target`, or in it where nothing can be moved between the two places; and its lock."""
    for leftover in (path for place in (target.parent, target) for path in place.glob(".*.saving-*")):
        match = STAGING.fullmatch(leftover.name)
        lock = _lock(leftover, wait=False) if match and match[1] == target.name else None
        if lock is not None:
            shutil.rmtree(leftover, ignore_errors=True)
            os.close(lock)
    while True:
        is_new = not target.exists()
        staging = (target.parent if is_new else target) / f".{target.name}.saving-{secrets.randbits(32)}"
        staging.mkdir(parents=True)
        if not is_new:
            with suppress(OSError):
                _imitate(target, staging)
                staging = staging.rename(target.parent / staging.name)
        lock = _lock(staging, wait=True)
        if staging.exists():  # else another process took it for a leftover before it was locked
            return staging, lock


def _lock(folder: Path, wait: bool) -> int | None:
    """A handle that marks a folder as in use until it is closed or its process ends; None where that can't be had."""
    handle = None
    try:
        handle = os.open(folder, os.O_RDONLY)  # an error on Windows
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return handle
    except OSError:
        if handle is not None:
            os.close(handle)
        return None


def _imitate(folder: Path, copy: Path) -> None:
    """Gives a folder the owner, the mode and the attributes of another."""
    if hasattr(os, "chown"):
        os.chown(copy, folder.stat().st_uid, folder.stat().st_gid)
    shutil.copystat(folder, copy)


def _swap(new: Path, target: Path, stale: re.Pattern[str]) -> None:
    """Puts `new` in the place of `target` in one step; what was there is then in the place of `new`.

    Raises:
        OSError: if that can't be done. `target` is then as it was.
    """
    if Path.cwd().is_relative_to(target):
        raise OSError("the working directory can't be replaced")
    _to_disk(new)
    try:
        new.rename(target)  # where nothing is there, or an empty folder
    except OSError:
        renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
        if renameat2 is None:
            raise
        _take_over(target, new, stale)
        here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        if renameat2(here, os.fsencode(new), here, os.fsencode(target), exchange):
            raise OSError("folders can't be exchanged here") from None
    with suppress(OSError):
        _to_disk(target.parent)
        _take_over(new, target, stale)  # what others have written since


def _take_over(old: Path, new: Path, stale: re.Pattern[str] = NO_NAME) -> None:
    """Links into `new` what it lacks of `old`, so that nothing is missing in the one, nor gone from the other."""
    for path in old.iterdir():
        other = new / path.name
        if path.is_dir() and not path.is_symlink():
            if path.is_mount():
                raise OSError("a mount point can't be moved")
            if not other.exists():
                other.mkdir()
                _imitate(path, other)
            _take_over(path, other)
        elif not stale.fullmatch(path.name) and not os.path.lexists(other):
            os.link(path, other, follow_symlinks=False)
    _to_disk(new)


def _move_files(new: Path, target: Path, written: list[Path], stale: re.Pattern[str]) -> None:
    """Moves files one by one, those that are replaced out first; an error takes all of it back."""
    opening = (Path("config.json"), Path("adapter_config.json"))  # by these, transformers knows a checkpoint
    target.mkdir(parents=True, exist_ok=True)
    going = {Path(path.name) for path in target.iterdir() if stale.fullmatch(path.name) and not path.is_dir()}
    going |= {name for name in written if os.path.lexists(target / name)}
    moves = [(target / name, new / ".before" / name) for name in sorted(going, key=lambda name: name not in opening)]
    moves += [(new / name, target / name) for name in sorted(written, key=lambda name: name in opening)]
    try:
        for source, place in moves:
            place.parent.mkdir(parents=True, exist_ok=True)
            source.replace(place)
            _to_disk(target)
    except BaseException:
        for source, place in reversed(moves):
            if os.path.lexists(place) and not os.path.lexists(source):
                place.replace(source)
        raise


def _to_disk(path: Path) -> None:
    """Waits until a file or folder is where a loss of power does not reach it."""
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems can't wait for a folder
            raise
    finally:
        os.close(handle)


def _is_someones_card(path: Path) -> bool:
    """Whether a file is a model card that somebody wrote, which a save must not replace by the generated one."""
    if not path.is_file():
        return False
    text = path.read_text(encoding="utf-8", errors="replace")
    return MODEL_CARD_MARK not in text and _GENERIC_CARD not in text


# --- classes, made on first use --------------------------------------------------------------------------------------


def condensed_config_class(base: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The config class of condensed models on `base`: its fields and `condense_config` (`dict`, *optional*)."""
    return _make_class(
        base,
        (base,),
        {
            "model_type": MODEL_TYPE_PREFIX + base.model_type,
            "condense_config": None,
            # With tied embeddings, transformers 5.17 sets it to have these split, too; they stay whole.
            "base_model_tp_plan": property(
                lambda config: tensor_parallel_plan(base.base_model_tp_plan, config), lambda _config, _plan: None
            ),
            "__annotations__": {"condense_config": "dict | None"},
            "__doc__": f"Config of a condensed model on `{base.__name__}`.",
        },
    )


def tensor_parallel_plan(base_plan: Mapping[str, str] | None, config: Any) -> dict[str, str] | None:
    """How the modules of a condensed model are split over processes: the base architecture's plan, and its MLPs.

    Names are patterns ("layers.*.mlp.up_proj"), so layers that are sparse or dense by birth share the entries; they
    have other names inside, or the same gated MLP. A gate per token scales the first of the MLP's neurons: with such a
    gate, what the processes have of them is gathered before, and split again after.

    Args:
        base_plan (`Mapping[str, str]`, *optional*): The base architecture's; None, if it can't be split, stays None.
        config: A condensed model's config.
    """
    if not base_plan:
        return None
    plan = dict(base_plan)
    layers = config.condense_config.get("condensed_layers") if isinstance(config.condense_config, Mapping) else None
    # A trimmed MLP has nothing to split; what can't be understood is refused when the layers are made.
    specs = [
        spec
        for spec in (layers.values() if isinstance(layers, Mapping) else ())
        if isinstance(spec, Mapping) and isinstance(spec.get("module"), str) and "shared_expert_gate" in spec
    ]
    for spec in sorted(specs, key=lambda spec: bool(spec["shared_expert_gate"])):
        inner, outer = ("colwise", "rowwise")
        if spec["shared_expert_gate"]:
            inner, outer = "colwise_gather_output", "rowwise_split_input"
        place = re.sub(r"\.\d+(?=\.|$)", ".*", spec["module"])
        if spec.get("router") is not None:  # it stands where other layers have their experts: neither is split
            plan = {name: how for name, how in plan.items() if not f"{name}.".startswith(f"{place}.")}
            continue
        plan |= {f"{place}.gate_proj": inner, f"{place}.up_proj": inner, f"{place}.down_proj": outer}
    return plan


def condensed_model_class(base: Any) -> Any:
    """The condensed subclass of a model class of transformers (or of another architecture that it knows)."""
    if issubclass(base, CondensedModelMixin):
        return base
    config_class = condensed_config_class(base.config_class)
    for known, new in (
        (base.__name__, PREFIX + base.__name__),
        (base.config_class.model_type, config_class.model_type),
    ):
        mapping = get_checkpoint_conversion_mapping(known)
        # Without this, the names on disk would change, and original checkpoints would not be understood.
        if mapping is not None and get_checkpoint_conversion_mapping(new) is None:
            register_checkpoint_conversion_mapping(new, mapping)
    made = _make_class(
        base,
        (CondensedModelMixin, base),
        {
            "config_class": config_class,
            "_base_class": base,
            "__doc__": f"`{base.__name__}` with condensed layers.",
        },
    )
    # Classification heads build their decoder by `AutoModel.from_config`, also where this file is but a copy.
    decoder = auto_classes(base.config_class).get("AutoModel")
    if decoder is not None and config_class not in AutoModel._model_mapping:
        AutoModel.register(config_class, made if decoder is base else condensed_model_class(decoder), exist_ok=True)
    return made


def _make_class(base: type, bases: tuple[type, ...], namespace: dict[str, Any]) -> Any:
    name = PREFIX + base.__name__
    made = globals().get(name)
    if made is None:
        made = type(name, bases, {"__module__": __name__, "__qualname__": name, **namespace})
        globals()[name] = made
    return made


def __getattr__(name: str) -> Any:
    """Makes `CDMoE<X>` for a config or model class `<X>` of transformers, or of this file."""
    if name.startswith(PREFIX):
        base_name = name.removeprefix(PREFIX)
        base = globals().get(base_name) or getattr(transformers, base_name, None)
        if isinstance(base, type) and issubclass(base, PreTrainedConfig):
            return condensed_config_class(base)
        if isinstance(base, type) and issubclass(base, PreTrainedModel):
            return condensed_model_class(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def auto_classes(config_class: type[PreTrainedConfig]) -> dict[str, type[PreTrainedModel]]:
    """The model class that each AutoModel class of transformers opens for a config class, by the auto class's name."""
    found = {}
    for auto_name, auto_class in vars(modeling_auto).items():
        mapping = getattr(auto_class, "_model_mapping", None)
        if not (isinstance(auto_class, type) and auto_name.startswith("AutoModel")) or mapping is None:
            continue
        if config_class in mapping:
            model_class = mapping[config_class]
            found[auto_name] = model_class[0] if isinstance(model_class, (list, tuple)) else model_class
    return found


def auto_map(model_class: Any, before: Mapping[str, str] | None = None) -> dict[str, str]:
    """What config.json tells `trust_remote_code=True`: which class of the copied file each auto class opens.

    Args:
        model_class: The condensed model class that is saved.
        before (`Mapping[str, str]`, *optional*): The entries of the checkpoint that was opened. In the copied file an
            architecture of its own is not registered, and these are all that tells of its other heads.
    """
    base = model_class._base_class
    module = Path(MODELING_FILE).stem
    classes = {name: PREFIX + cls.__name__ for name, cls in auto_classes(base.config_class).items()}
    classes.setdefault("AutoModelForCausalLM" if "CausalLM" in base.__name__ else "AutoModel", model_class.__name__)
    entries = {"AutoConfig": f"{module}.{PREFIX}{base.config_class.__name__}"}
    entries |= {name: f"{module}.{cls}" for name, cls in classes.items()}
    kept = {name: entry.rpartition("--")[2] for name, entry in (before or {}).items() if isinstance(entry, str)}
    return {name: entry for name, entry in kept.items() if entry.startswith(f"{module}.{PREFIX}")} | entries


def modeling_file(model_class: Any) -> str:
    """Text of the self-contained modeling file for a condensed model class.

    An architecture that transformers lacks brings its own (equally self-contained) file, put before this one.
    """
    text = Path(__file__).read_text(encoding="utf-8")
    base = model_class._base_class
    if base.__module__.startswith("transformers.") or base.__module__ == __name__:
        return text
    base_text = Path(str(sys.modules[base.__module__].__file__)).read_text(encoding="utf-8")
    return base_text + "\n\n" + text.replace("from __future__ import annotations\n", "", 1)
