"""
Everything that should be measured on a GPU, the most important first, in ten minutes on one with 80 GB:

python recipes/benchmarks/on_gpu.py

The parts are those of `PARTS`. Each runs in a process of its own, with a limit on its time, and each figure is written
to `--output` as a line of JSON as soon as it is known: a run that is cut off leaves the figures measured so far. The
table at the end has all figures, the device, versions and the command. The models have DeepSeekMoE-16B's sizes and
random weights; nothing is downloaded. The package is installed, or this file is in a checkout. To try it on a CPU:

python recipes/benchmarks/on_gpu.py --device cpu --size tiny
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Fields of the model and of the work, by `--size`.
SIZES: dict[str, dict[str, Any]] = {
    "full": {"model": (None, None, None), "samples": 100, "length": 512, "kept": 6, "layers": (9, 27), "searched": 15}
    | {"batches": (1, 8, 32), "prompt": 512, "new": 32, "refit_samples": 250, "factors": (1 / 16, 1 / 4, 4)},
    "tiny": {"model": (32, 4, 8), "samples": 20, "length": 16, "kept": 2, "layers": (1, 3), "searched": 2}
    | {"batches": (2,), "prompt": 4, "new": 2, "refit_samples": 20, "factors": (4,)},
}
Figures = Iterator[dict[str, Any]]


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="cuda", help="device to measure on (%(default)s)")
    add("--size", choices=list(SIZES), default="full", help="full: DeepSeekMoE-16B's sizes; tiny: to try the script")
    add("--minutes", type=float, default=10.0, help="time for all parts together (%(default)s)")
    add(
        "--parts",
        type=lambda text: text.split(","),
        default=list(PARTS),
        help="some of them (all), such as check,search",
    )
    add("--output", type=Path, default=Path("on_gpu.jsonl"), help="file for the figures (%(default)s)")
    add("--one_process", action="store_true", help="run all parts in this process, without limits")
    args = parser.parse_args(given)
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"--parts has {', '.join(sorted(unknown))}, but only {', '.join(PARTS)} exist")
    return args


class Setting:
    """The device, sizes and models of a run."""

    def __init__(self, device: str, size: str) -> None:
        import torch

        self.device = torch.device(device)
        self.sizes = SIZES[size]
        self.dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16

    def model(self) -> Any:
        """Build the sparse model, with random weights."""
        import common

        config = common.deepseek_config(common.DEEPSEEK_MOE_16B, *self.sizes["model"])
        return common.build_model(config, self.device, self.dtype, experts_implementation="grouped_mm")

    def ids(self, samples: int) -> Any:
        import common

        vocabulary = common.deepseek_config(common.DEEPSEEK_MOE_16B, *self.sizes["model"]).vocab_size
        return common.random_ids(vocabulary, samples, self.sizes["length"])

    def config(self, **fields: Any) -> Any:
        from cdmoe_plugin import CondenseConfig

        own = {"num_samples": self.sizes["samples"], "max_length": self.sizes["length"]}
        return CondenseConfig(
            **{"num_layers": self.sizes["searched"], "num_experts": self.sizes["kept"], **own, **fields}
        )

    def timed(self, function: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
        """Call a function; return its result, and its seconds and peak memory as a figure."""
        import common

        result, seconds, peak = common.timed(self.device, function)
        return result, {"seconds": seconds, "peak_memory_bytes": peak}

    def plan(self, model: Any, number: int, kept: int) -> Any:
        """Return a plan without a search: the first experts of the first sparse layers."""
        from cdmoe_plugin import CondensedLayer, CondensePlan
        from cdmoe_plugin.blocks import find_sparse_blocks

        layers = [block.layer for block in find_sparse_blocks(model)][:number]
        return CondensePlan([CondensedLayer(layer, list(range(kept)), [0.1] * kept) for layer in layers])


def check(setting: Setting) -> Figures:
    """Search, refit, fold, save, open and generate with a small model: the device finds the CPU's plan."""
    import torch
    from transformers import AutoModelForCausalLM

    from cdmoe_plugin import apply_plan, search_plan

    small = Setting("cpu", "tiny")
    ids, config = small.ids(20), small.config(refit="down_proj")
    model = small.model()
    model.set_experts_implementation("eager")  # on every device and in float32
    expected = search_plan(model, config, calibration=ids)
    model = model.to(setting.device)
    plan, figure = setting.timed(lambda: search_plan(model, config, calibration=ids))
    same = [(row.layer, row.experts) for row in plan.layers] == [(row.layer, row.experts) for row in expected.layers]
    yield {"name": "search of a small model", **figure, "same_plan_as_cpu": same}
    model, figure = setting.timed(lambda: apply_plan(model, plan, config, calibration=ids))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").to(setting.device).eval()
        prompt = ids[:2, :4].to(setting.device)
        difference = float((model(prompt).logits - again(prompt).logits).abs().max())
        new = again.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False
        )
    yield {"name": "refit of a small model", **figure, "reopened_difference": difference, "tokens": new.shape[1]}


def search(setting: Setting) -> Figures:
    """Search experts, then layers in a race and in full."""
    from cdmoe_plugin.blocks import find_sparse_blocks
    from cdmoe_plugin.calibration import load_calibration
    from cdmoe_plugin.decoder.whole import searching
    from cdmoe_plugin.search.plan_search import PlanSearch

    model, config = setting.model(), setting.config()
    data = load_calibration(setting.ids(config.num_samples), config, model_config=model.config)
    with searching(model):
        run = PlanSearch(model, config, find_sparse_blocks(model), data)
        experts, figure = setting.timed(run.experts)
        yield {"name": "expert search", **figure, "layers": len(run.blocks), "tokens": data.num_tokens}
        orders = []
        for name in ("race", "full"):
            run.state.results.clear()
            run.config = replace(config, layer_search=name)
            order, figure = setting.timed(lambda: run.layers(experts))
            orders.append(order.layers)
            work = int(run.state["token-layers"])
            yield {"name": f"layer search, {name}", **figure, "layers": config.num_layers, "token_layers": work}
    yield {"name": "race and full search", "same_layers": orders[0] == orders[1]}


def refit(setting: Setting) -> Figures:
    """Refit nine layers, with the experts of a plan and with single neurons."""
    from cdmoe_plugin.blocks import find_sparse_blocks
    from cdmoe_plugin.calibration import load_calibration
    from cdmoe_plugin.condense.refit import refit_layers

    model = setting.model()
    blocks, number = find_sparse_blocks(model), setting.sizes["layers"][0]
    plan, samples = setting.plan(model, number, setting.sizes["kept"]), setting.sizes["refit_samples"]
    for method, neurons in (("down_proj", "energy"), ("down_proj", "experts"), ("distill", "least_squares")):
        config = setting.config(refit=method, refit_neurons=neurons, num_samples=samples)
        data = load_calibration(setting.ids(samples), config, model_config=model.config)
        _, figure = setting.timed(lambda c=config, d=data: refit_layers(model, blocks, plan.layers, c, d))
        yield {"name": f"refit, {method}, {neurons}", **figure, "layers": number, "tokens": data.num_tokens}


def inference(setting: Setting, compiled: bool = False) -> Figures:
    """Measure prefill and decoding of the sparse and condensed models, one batch size after the other."""
    import common
    import inference_speed

    hidden, layers, experts = setting.sizes["model"]
    sizes = {"hidden_size": hidden, "num_layers": layers, "experts": experts}
    options = [f"--{name}={value}" for name, value in sizes.items() if value is not None]
    options += [f"--layers={','.join(map(str, setting.sizes['layers']))}", f"--kept=0,{setting.sizes['kept']}"]
    options += [f"--prompt_tokens={setting.sizes['prompt']}", f"--new_tokens={setting.sizes['new']}", "--repeats=3"]
    options += [f"--device={setting.device}", f"--dtype={str(setting.dtype).removeprefix('torch.')}"]
    # On a CPU, without a compiler, and only the implementation that all versions have.
    cpu = setting.device.type == "cpu"
    options += (["--compile=eager"] if cpu else ["--compile"]) if compiled else []
    options += ["--experts_implementations=grouped_mm"] if cpu or compiled else []
    for batch in setting.sizes["batches"]:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.json"
            inference_speed.main([*options, f"--batch_sizes={batch}", f"--json={file}"])
            rows = json.loads(file.read_text(encoding="utf-8"))
        for row in rows:
            name = f"{'compiled ' if compiled else ''}{row['phase']}, batch {batch}, {row['model']}"
            yield {"name": name, **{key: row[key] for key in ("tokens_per_second", "ratio", "peak_memory_bytes")}}
        if (memory := common.memory_of(setting.device)) is not None:
            memory.empty_cache()


def compiled_inference(setting: Setting) -> Figures:
    """Measure decoding with a static cache, compiled (on a GPU: CUDA graphs)."""
    yield from inference(setting, compiled=True)


def training(setting: Setting) -> Figures:
    """Measure a training step of a recovery: the condensed layers of a model with nine of them learn."""
    import torch

    from cdmoe_plugin import apply_plan, unfreeze_condensed

    model = setting.model()
    model = apply_plan(model, setting.plan(model, setting.sizes["layers"][0], setting.sizes["kept"])).train()
    unfreeze_condensed(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    ids = setting.ids(4).to(setting.device)

    def step() -> float:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    step()  # states of the optimizer
    for number in range(3):
        loss, figure = setting.timed(step)
        size = sum(parameter.numel() for parameter in trained)
        yield {"name": f"training step {number + 1}", **figure, "tokens": ids.numel(), "trained": size, "loss": loss}


def constants(setting: Setting) -> Figures:
    """Compare the compiled comparison of experts with the plain one, and sizes of the pieces of both searches."""
    from cdmoe_plugin import search_plan
    from cdmoe_plugin.blocks import find_sparse_blocks
    from cdmoe_plugin.decoder import stream
    from cdmoe_plugin.search.experts import comparison

    model, kind = setting.model(), setting.device.type
    ids = setting.ids(setting.sizes["samples"])
    layers = [block.layer for block in find_sparse_blocks(model)]
    one = setting.config(layers=layers[:1])
    few = setting.config(num_layers=2, expert_selection="frequency", layer_search="full")

    def searched(name: str, config: Any) -> dict[str, Any]:
        search_plan(model, config, calibration=ids)  # warm-up, compiling
        plan, figure = setting.timed(lambda: search_plan(model, config, calibration=ids))
        return {"name": name, **figure, "chosen": plan.layers[0].experts, "layers": [row.layer for row in plan.layers]}

    fused = dict(comparison._FUSED_ELEMENTS)
    yield searched(f"experts of a layer, {'plain' if fused[kind] else 'compiled'}", one)
    comparison._FUSED_ELEMENTS.clear()
    try:
        yield searched("experts of a layer, plain", one)
        own = comparison._COMPARE_ELEMENTS[kind]
        for factor in setting.sizes["factors"]:
            comparison._COMPARE_ELEMENTS[kind] = int(factor * own)
            yield searched(f"experts of a layer, plain, {factor:g} times the elements at a time", one)
        comparison._COMPARE_ELEMENTS[kind] = own
    finally:
        comparison._FUSED_ELEMENTS.update(fused)
    own = stream._TOGETHER_TOKENS[kind]
    for factor in (1, *setting.sizes["factors"]):
        stream._TOGETHER_TOKENS[kind] = int(factor * own)
        yield searched(f"two rounds of the layer search, {factor:g} times the tokens at a time", few)
    stream._TOGETHER_TOKENS[kind] = own


# By importance, with the most seconds that each may take.
PARTS: dict[str, tuple[Callable[[Setting], Figures], float]] = {
    "check": (check, 60),
    "search": (search, 200),
    "inference": (inference, 180),
    "refit": (refit, 150),
    "training": (training, 60),
    "compiled_inference": (compiled_inference, 120),
    "constants": (constants, 120),
}


def write(output: Path, part: str, figure: dict[str, Any]) -> None:
    """Add a figure to the file, in full before the next one is measured."""
    with output.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"part": part, **figure}, default=str) + "\n")
        file.flush()
        os.fsync(file.fileno())
    print(f"{part}: {figure}", flush=True)


def run_here(args: argparse.Namespace, part: str) -> None:
    """Run one part in this process. An error is a figure, too: other parts may still work."""
    import common
    import torch

    setting = Setting(args.device, args.size)
    try:
        write(args.output, part, {"name": "where", "where": common.where(setting.device)})
        for figure in PARTS[part][0](setting):
            write(args.output, part, figure)
    except (ArithmeticError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError) as error:
        write(args.output, part, {"name": "failed", "error": f"{type(error).__name__}: {error!s:.300}"})
    finally:
        torch.compiler.reset()


def run_apart(args: argparse.Namespace, part: str, seconds: float) -> None:
    """Run one part in a process of its own, which is ended when its time is over."""
    command = [sys.executable, __file__, f"--parts={part}", "--one_process", f"--device={args.device}"]
    command += [f"--size={args.size}", f"--output={args.output}"]
    paths = [] if find_spec("cdmoe_plugin") else [str(ROOT)]
    path = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "HF_HUB_OFFLINE": "1", **({"PYTHONPATH": path} if path else {})}
    try:
        code = subprocess.run(command, env=env, timeout=seconds, stdout=subprocess.DEVNULL).returncode
        if code:
            write(args.output, part, {"name": "failed", "error": f"exit code {code}"})
    except subprocess.TimeoutExpired:
        write(args.output, part, {"name": "cut off", "seconds": seconds})


def table(output: Path) -> str:
    """Format the figures of a file as a Markdown table."""
    figures = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    places = {figure["where"] for figure in figures if "where" in figure}
    lines = [
        *sorted(places),
        "",
        "| part | figure | seconds | peak memory | others |",
        "| --- | --- | ---: | ---: | --- |",
    ]
    for figure in (figure for figure in figures if "where" not in figure):
        part, name, seconds, peak = (figure.pop(key, None) for key in ("part", "name", "seconds", "peak_memory_bytes"))
        cells = ["" if seconds is None else f"{seconds:.3f}", "" if peak is None else f"{peak / 1e9:.2f} GB"]
        others = ", ".join(f"{key} {f'{v:.4g}' if isinstance(v, float) else v}" for key, v in figure.items())
        lines.append(f"| {part} | {name} | {' | '.join(cells)} | {others} |")
    return "\n".join(lines)


def main(given: Sequence[str] | None = None) -> None:
    args = parse_arguments(given)
    if args.one_process:
        for part in args.parts:
            run_here(args, part)
        return
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.unlink(missing_ok=True)
    end = time.monotonic() + 60 * args.minutes
    for part in args.parts:
        left = end - time.monotonic()
        if left > 0:
            run_apart(args, part, min(left, PARTS[part][1]))
            print(f"{part}: done, {end - time.monotonic():.0f} s left", flush=True)
    command = shlex.join([Path(sys.executable).name, *sys.argv] if given is None else ["on_gpu.py", *given])
    print(f"\n{table(args.output)}\n\n{command}")


if __name__ == "__main__":
    main()
