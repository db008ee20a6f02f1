"""The report of a plan in Chromium, where it is installed: wide and narrow, light and dark."""

from __future__ import annotations

import html
import json
import random
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cdmoe_plugin import CondenseConfig, CondensedLayer, CondensePlan, search_plan
from cdmoe_plugin.cards.page import write_page
from cdmoe_plugin.plan_layer import layers_of
from cdmoe_plugin.shapes import ModelShape, SparseLayerShape
from cdmoe_plugin.spread import Curve, LayerCurves, Spread
from tests.helpers.tiny_models import random_ids, tiny_model

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="needs Chromium")]

# In a frame of some width: is anything wider than the page, or a table wider than its place?
MEASURE = """<!doctype html><meta charset="utf-8"><iframe id="frame" style="border: 0; height: 900px; width: {width}px"
srcdoc="{page}"></iframe><script>
onload = () => {{
  const page = document.getElementById("frame").contentDocument, boxes = [...page.querySelectorAll("body *")];
  const outside = boxes.filter(b => !b.closest(".scroll") && b.getBoundingClientRect().right > {width} + 0.5);
  const scrolling = [...page.querySelectorAll(".scroll")].filter(b => b.scrollWidth > b.clientWidth);
  const found = [page.documentElement.scrollWidth, outside.map(b => b.outerHTML.slice(0, 80)), scrolling.length];
  const result = document.createElement("pre");
  result.textContent = JSON.stringify(found);
  document.body.replaceChildren(result);
}};
</script>"""


def browse(page: Path, *options: str) -> tuple[str, str]:
    """What the browser prints for a page, and what its console says."""
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    command += [f"--user-data-dir={page.parent / 'profile'}", *options]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def measure(report: Path, width: int) -> tuple[int, list[str], int, str]:
    """A page's width in a frame, what is outside of it, tables that have to be scrolled, and what the console says."""
    page = html.escape(report.read_text(encoding="utf-8"))
    (wrapper := report.with_name("measure.html")).write_text(MEASURE.format(width=width, page=page), encoding="utf-8")
    printed, console = browse(wrapper, "--window-size=1400,1000", "--dump-dom")
    scroll_width, outside, scrolling = json.loads(html.unescape(printed.split("<pre>")[1].split("</pre>")[0]))
    return scroll_width, outside, scrolling, console


def large_plan(layers: int, chosen: int, experts: int, kept: int) -> CondensePlan:
    """A plan of a large model, with everything that a search notes."""
    rng = random.Random(0)
    rows = []
    for layer in rng.sample(range(1, layers + 1), chosen):
        own = sorted((rng.uniform(1e-4, 1e-2) for _ in range(kept + 1)), reverse=True)
        gates, tokens = ([draw() for _ in range(kept)] for draw in (rng.random, lambda: rng.randrange(51_200)))
        rows.append(CondensedLayer(layer, rng.sample(range(experts), kept), gates, rng.random(), own, tokens))
    shape = ModelShape(
        "deepseek", layers + 1, 2048, [SparseLayerShape(i, experts, 1408, 2816) for i in range(1, layers + 1)]
    )
    calibration = {"source": "allenai/c4", "num_samples": 100, "num_tokens": 51_200, "fingerprint": "a0"}
    divergences = {i: 10 ** rng.uniform(-5, -2) for i in range(1, layers + 1)}
    return CondensePlan(rows, shape, CondenseConfig.paper().to_dict(), calibration, divergences)


def searched_plan() -> CondensePlan:
    config = CondenseConfig(num_layers=2, num_experts=2)
    return search_plan(tiny_model("qwen2_moe"), config, calibration=random_ids(5))


def sized_plan() -> CondensePlan:
    config = CondenseConfig.fast(target_size=0.6, refit_neurons="least_squares", batch_size=7)
    return search_plan(tiny_model("qwen2_moe", num_layers=7), config, calibration=random_ids(20))


def large_sized_plan(layers: int, experts: int) -> CondensePlan:
    """A plan for a size of a large model, with layers of all forms."""
    rng, neuron, rows = random.Random(0), 3 * 2048, []
    for layer in range(1, layers + 1):
        curves = []
        for routed in range(0, experts, experts // 8):
            error = rng.uniform(0.2, 0.6) * (1 - routed / experts)
            widths = [0, 1408, 5632]
            errors = [error * (1 - width / 8192) for width in widths]
            curves.append(Curve(routed, neuron * (2816 + 1408 * routed) + 2048 * routed, widths, errors))
        whole = neuron * (2816 + 1408 * experts) + 2048 * experts
        order = rng.sample(range(experts), experts)
        rows.append(LayerCurves(layer, experts, whole, neuron, 10 ** rng.uniform(-4, -1), order, curves))
    spread = Spread(10**9 + sum(row.parameters for row in rows), 2, rows)
    shape = ModelShape("deepseek", layers + 1, 2048, [SparseLayerShape(r.layer, experts, 1408, 2816) for r in rows])
    chosen = layers_of(spread, spread.solve(spread.parameters // 2))
    return CondensePlan(chosen, shape, {"target_size": 0.5}, {"source": "allenai/c4"}, spread=spread)


PLANS = {
    "searched": searched_plan,
    "mixed": lambda: search_plan(
        tiny_model("qwen2_moe"), CondenseConfig(2, 2, num_routed=3), calibration=random_ids(5)
    ),
    "size": sized_plan,
    "deepseek size": lambda: large_sized_plan(27, 64),
    "large size": lambda: large_sized_plan(60, 384),
    "deepseek": lambda: large_plan(27, 9, 64, 6),
    "most": lambda: large_plan(60, 45, 384, 24),
    "reference": lambda: replace(large_plan(27, 9, 64, 6), model=None, layer_divergences=None, config=None),
    "trimmed": lambda: large_plan(27, 9, 64, 6).as_trimming("trim_layer"),
}


@pytest.mark.parametrize("name", PLANS)
def test_nothing_is_wider_than_the_page(name: str, tmp_path: Path) -> None:
    write_page(PLANS[name](), tmp_path / "report.html")
    for width in (360, 390, 768, 1280):
        scroll_width, outside, scrolling, console = measure(tmp_path / "report.html", width)
        assert (scroll_width, outside, console) == (width, [], "")
        assert scrolling == 0 or width < 768 or name == "most"


@pytest.mark.parametrize("name", PLANS)
def test_light_and_dark(name: str, tmp_path: Path) -> None:
    write_page(PLANS[name](), tmp_path / "report.html")
    pictures: dict[str, Any] = {}
    for scheme, number in (("dark", 0), ("light", 1)):
        file = tmp_path / f"{scheme}.png"
        setting = f"--blink-settings=preferredColorScheme={number}"
        _, console = browse(tmp_path / "report.html", setting, "--window-size=1280,900", f"--screenshot={file}")
        assert console == ""
        pictures[scheme] = np.asarray(Image.open(file).convert("RGB")).astype(int)
    dark, light = pictures["dark"], pictures["light"]
    assert dark.shape == light.shape == (900, 1280, 3)
    assert np.median(dark) < 60
    assert np.median(light) > 230
    for picture in (dark, light):
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50
        # Something is drawn in every quarter but the lowest, as some pages are short.
        assert all(part.std() > 5 for part in np.split(picture, 4)[:3])
        # The colour of the chosen layers and kept experts.
        assert ((picture[..., 2] - picture[..., 0]) > 100).any()


def test_errors_would_be_seen(tmp_path: Path) -> None:
    (page := tmp_path / "broken.html").write_text('<p style="width: 500px">wide</p><script>missing()</script>')
    scroll_width, outside, _, console = measure(page, 390)
    assert scroll_width > 500
    assert outside == ['<p style="width: 500px">wide</p>']
    assert "missing is not defined" in console
