"""The report of a plan: its numbers are the plan's, and nothing that a plan holds gets out of its place."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from cdmoe_plugin import CondensedLayer, CondensePlan
from cdmoe_plugin.cards.page import write_page
from cdmoe_plugin.cards.page_charts import format_count, format_number, format_tick
from cdmoe_plugin.cards.plots import draw_figure
from cdmoe_plugin.cards.tables import divergence_name
from cdmoe_plugin.spread import Choice
from tests.unit.test_plan import MODEL, PLAN
from tests.unit.test_target_size import some_plan

FULL = replace(
    PLAN, layers=[replace(row, tokens=[40 + i, 9, 0]) for i, row in enumerate(PLAN.layers)]
)  # of 100 calibration tokens


class Page(HTMLParser):
    """The texts of a page, its numbers by section, the titles of its points and cells, and its tags."""

    def __init__(self, plan: CondensePlan, folder: Path) -> None:
        super().__init__()
        write_page(plan, folder / "report.html")
        self.source = (folder / "report.html").read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.titles: list[str] = []
        self.texts: list[str] = []
        self.rows: dict[str, list[list[str]]] = {}  # tables by heading; numbers in full
        self.heading = ""
        self.feed(self.source)
        self.text = re.sub(r"\s+", " ", " ".join(self.texts))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.open.append(tag)
        if tag == "tr":
            self.rows.setdefault(self.heading, []).append([])
        elif tag in ("td", "th"):
            self.rows[self.heading][-1].append("")
        elif tag == "data" and "td" in self.open:
            self.rows[self.heading][-1][-1] += dict(attrs)["value"] or ""
        if tag in ("meta", "link", "line", "rect", "circle"):
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "rect", "circle"):  # those end where they begin
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_data(self, data: str) -> None:
        inside = self.open[-1] if self.open else ""
        if inside == "style":
            return
        self.texts.append(data)
        if inside == "h2":
            self.heading = data
        elif inside == "title":
            self.titles.append(data)
        elif inside != "data" and ("td" in self.open or "th" in self.open):
            self.rows[self.heading][-1][-1] += data


def mlp_parameters(plan: CondensePlan, num_layers: int, most: int = 99) -> int:
    """Parameters of the MLPs of MODEL's sparse layers with the first layers condensed."""
    kept = {row.layer: min(len(row.experts), most) for row in plan.layers[:num_layers]}
    total = 0
    for layer in (1, 2, 3):  # of 8 experts, 16 neurons each, beside 24 shared ones
        neurons = 24 + 16 * kept.get(layer, 8)
        total += 3 * 32 * neurons + (0 if layer in kept else 8 * 32)
    return total


def test_the_numbers_are_the_plans(tmp_path: Path) -> None:
    page = Page(FULL, tmp_path)
    assert {"1: 0.04", "2: 0.011", "3: 0.013"} < set(page.titles)
    assert {f"{i}: {row.score}" for i, row in enumerate(FULL.layers, 1)} < set(page.titles)
    before = mlp_parameters(FULL, 0)
    budgets = page.rows["Fewer layers"][1:]
    for i, (row, cells) in enumerate(zip(FULL.layers, budgets, strict=True), 1):
        after = mlp_parameters(FULL, i)
        assert cells == [str(i), str(row.layer), repr(row.score), str(after), f"{1 - after / before:.1%}"]
    _, saved, *own = page.rows["Fewer experts"]
    assert saved == ["saved", *(f"{1 - mlp_parameters(FULL, 3, k) / before:.1%}" for k in range(4))]
    assert own == [[str(row.layer), *map(repr, row.expert_scores)] for row in FULL.layers]
    parts = {name: cells for name, *cells in page.rows["Parameters of the sparse layers' MLPs"]}
    assert parts["together"][:2] == [str(before), str(mlp_parameters(FULL, 3))]
    assert sum(int(parts[name][0]) for name in ("routed experts", "shared experts", "routers")) == before
    assert parts["routers"] == ["768", "0", "100.0%"]
    assert "3 of 3" in page.text
    assert "9 of 24" in page.text
    assert "100 tokens" in page.text


def test_kept_experts(tmp_path: Path) -> None:
    page = Page(FULL, tmp_path)
    rows = page.rows["Kept experts in the order of selection"]
    for i, (row, cells) in enumerate(zip(FULL.layers, rows, strict=True), 1):
        experts = zip(row.experts, row.tokens or [], row.gates, strict=True)
        expected = " ".join(f"{expert} · {count / 100:.1%} · {gate!r}" for expert, count, gate in experts)
        assert [" ".join(cell.split()) for cell in cells] == [f"{i}.", str(row.layer), expected]
    cells = [title for title in page.titles if "expert" in title]
    assert len(cells) == 9
    assert "layer 2, expert 4: place 1, gate 0.250, chosen by 40.0%" in cells
    # The number of all calibration tokens is not known: they are counted.
    page = Page(replace(FULL, calibration=None), tmp_path)
    assert "layer 2, expert 4: place 1, gate 0.250, chosen by 40 tokens" in page.titles
    # Nothing was counted.
    page = Page(replace(FULL, layers=[replace(row, tokens=None) for row in FULL.layers]), tmp_path)
    assert "layer 2, expert 4: place 1, gate 0.250" in page.titles
    assert "chosen" not in page.text


def test_large_plans_fold_their_lists(tmp_path: Path) -> None:
    experts = list(range(121))
    plan = CondensePlan([CondensedLayer(1, experts, [0.5] * 121)])
    assert "details" in Page(plan, tmp_path).tags
    assert "details" not in Page(FULL, tmp_path).tags


def test_metric(tmp_path: Path) -> None:
    assert "Jensen-Shannon divergence of the model's last hidden state, in nats" in Page(FULL, tmp_path).text
    ppl = replace(FULL, config={**FULL.config, "metric": "ppl"})
    assert divergence_name(ppl) == "absolute difference of perplexity"
    assert divergence_name(ppl, own=True) == "Jensen-Shannon divergence of the layer's output, in nats"
    assert divergence_name(replace(FULL, config=None)) == "divergence of the model's output"
    mse = replace(FULL, config={**FULL.config, "metric": "mse", "compare": "logits"})
    assert divergence_name(mse) == "mean squared difference of the model's logits"
    assert divergence_name(replace(FULL, config={"metric": "mine"})) == "mine of the model's output"


def test_one_page_without_scripts(tmp_path: Path) -> None:
    page = Page(FULL, tmp_path)
    assert not page.tags & {"script", "img", "iframe", "object", "embed", "use", "image"}
    assert "src" not in page.attributes
    assert re.findall(r"https?:|url\(|@import", page.source) == []
    assert "prefers-color-scheme: dark" in page.source
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_everything_is_escaped(tmp_path: Path) -> None:
    evil = "\"'><script>alert(1)</script>&amp;{{ 7 * 7 }}"
    plan = replace(
        FULL,
        model=replace(MODEL, model_type=evil),
        config=dict.fromkeys(("metric", "compare", "expert_selection", "layer_selection", "layers"), evil),
        calibration={"source": evil, "num_samples": evil, "num_tokens": evil},
    )
    page = Page(plan, tmp_path)
    assert "script" not in page.tags
    assert not any(name.startswith("on") for name in page.attributes)
    assert page.text.count(evil) >= 4


def test_paths_stay_private(tmp_path: Path) -> None:
    page = Page(replace(FULL, calibration={**FULL.calibration, "source": "/home/me/texts.jsonl"}), tmp_path)
    assert "of texts.jsonl." in page.text
    assert "/home/me" not in page.source


@pytest.mark.parametrize(
    ("plan", "there", "missing"),
    [
        (
            CondensePlan([CondensedLayer(1, [4, 2], [0.5, 0.25]), CondensedLayer(7, [], [])]),
            ["no divergence per layer", "no divergence of its layers together", "does not hold the sizes"],
            ["Fewer layers", "Fewer experts"],
        ),
        (FULL.truncate(num_experts=1), ["no divergence per layer", "Fewer experts", "Fewer layers"], ["place 2"]),
        (FULL.truncate(num_experts=0), ["Fewer layers"], ["Which experts were kept", "Fewer experts"]),
        (FULL.truncate(num_layers=1), ["1 of 3", "stays sparse, with all experts"], ["no divergence"]),
        (FULL.as_trimming("trim_layer"), ["sparse layers trimmed", "Fewer layers"], ["were kept", "condensed"]),
        (FULL.as_trimming("trim_block"), ["sparse layers dropped", "lose their attention"], ["Kept", "condensed"]),
        (
            replace(FULL.as_trimming("trim_block"), layer_divergences={1: 0.5, 2: -0.1, 3: 0.0}),
            ["Each layer dropped alone"],
            ["log scale"],
        ),
    ],
)
def test_plans_that_lack_something(plan: CondensePlan, there: list[str], missing: list[str], tmp_path: Path) -> None:
    page = Page(plan, tmp_path)
    for text in there:
        assert text in page.text
    for text in missing:
        assert text not in page.text
    assert not re.search(r"\b(None|nan|inf|Undefined)\b", page.source)


def test_trimmed_layers_lose_their_shared_expert(tmp_path: Path) -> None:
    rows = Page(FULL.as_trimming("trim_layer"), tmp_path).rows["Parameters of the sparse layers' MLPs"]
    assert [row[2] for row in rows[1:]] == ["0"] * 4


def test_experts_behind_the_router(tmp_path: Path) -> None:
    plan = replace(FULL, layers=[replace(FULL.layers[0], routed=[1, 5]), *FULL.layers[1:]])
    page = Page(plan, tmp_path)
    assert "2 of 24 routed experts stay behind the router" in page.text
    assert "9 of 24 routed experts kept in dense MLPs" in page.text
    assert {"layer 2, expert 1: stays behind the router", "layer 2, expert 5: stays behind the router"} < set(
        page.titles
    )
    assert page.source.count('class="cell stay"') == 2
    assert "behind the router: 1, 5" in " ".join(page.rows["Kept experts in the order of selection"][0][2].split())
    parts = {name: cells for name, *cells in page.rows["Parameters of the sparse layers' MLPs"]}
    assert [parts[name][1] for name in ("routed experts", "dense neurons", "routers")] == ["3072", "13824", "64"]
    pruned = [replace(row, experts=[], gates=[], expert_scores=None, tokens=None, routed=[1, 5]) for row in FULL.layers]
    page = Page(replace(FULL, layers=pruned, form="prune_experts"), tmp_path)
    parts = {name: cells for name, *cells in page.rows["Parameters of the sparse layers' MLPs"]}
    assert parts["shared experts"] == ["6912", "6912", "0.0%"]
    assert "dense neurons" not in parts
    assert "Which experts stay" in page.text
    assert "the shared expert alone" not in page.text


def test_numbers_of_neurons(tmp_path: Path) -> None:
    plan = replace(FULL, layers=[replace(row, width=40) for row in FULL.layers])
    page = Page(plan, tmp_path)
    assert "120 dense neurons in these layers, beside those of shared experts" in page.text
    assert "Which experts" not in page.text
    assert [row[2].strip() for row in page.rows["Kept experts in the order of selection"]] == [
        "40 neurons of all experts"
    ] * 3
    parts = {name: cells for name, *cells in page.rows["Parameters of the sparse layers' MLPs"]}
    assert parts["dense neurons"] == ["0", str(3 * 3 * 32 * 40), ""]
    saved = page.rows["Fewer experts"][1]
    before = mlp_parameters(FULL, 0)
    assert saved[2:4] == [f"{1 - mlp_parameters(FULL, 3, k) / before:.1%}" for k in (1, 2)]


@pytest.mark.parametrize("seed", [2, 3])  # the second leaves a layer untouched, and one without routed neurons
def test_plans_for_a_size(seed: int, tmp_path: Path) -> None:
    plan = some_plan(seed)
    assert plan.spread is not None
    page = Page(plan, tmp_path)
    spread, changed = plan.spread, {layer.layer: layer for layer in plan.layers}
    assert len({bool(layer.routed) for layer in plan.layers}) == 2  # mixed and condensed ones
    for number in ("num_layers", "num_experts", "Fewer"):
        assert number not in page.source
    assert "cdmoe plan truncate --target_size" in page.text
    forms = []
    for layer, cells in zip(spread.layers, page.rows["What became of each sparse layer"][1:], strict=True):
        row = changed.get(layer.layer)
        choice = layer.untouched if row is None else Choice(len(row.routed or ()), row.width or 0)
        form = "untouched" if row is None else "mixed" if row.routed else "condensed"
        forms.append(form)
        assert cells[:4] == [str(layer.layer), form, f"{choice.routed} of 8", str(choice.width)]
        errors = {
            Choice(curve.routed, w): e
            for curve in layer.curves
            for w, e in zip(curve.widths, curve.errors, strict=True)
        }
        error = errors.get(choice, 0.0)
        assert cells[4:] == [
            repr(value)
            for value in (
                error,
                layer.sensitivity,
                layer.sensitivity * error,
                layer.sensitivity * errors[Choice(0, 16)],
            )
        ]
        assert f"{layer.layer}: {layer.sensitivity * errors[Choice(0, 16)]}" in page.titles
        staying = {f"layer {layer.layer}, expert {e}: stays behind the router" for e in (row and row.routed) or ()}
        assert staying == {title for title in page.titles if title.startswith(f"layer {layer.layer}, expert")}
        dense = f"layer {layer.layer}: {choice.width} dense neurons in place of experts"
        assert (dense in page.titles) == bool(choice.width)
    assert f"{len(changed)} of 4" in page.text
    assert f"{forms.count('mixed')} mixed, {forms.count('condensed')} condensed" in page.text
    sizes = page.rows["Other sizes"][1:]
    parameters = [int(cells[1]) for cells in sizes]
    assert parameters == sorted(set(parameters), reverse=True)
    assert parameters[-1] == spread.smallest() == 1000 + 4 * 30
    tenths = {f"{1 - i / 10 * 4 * 910 / spread.parameters:.3f}" for i in range(1, 10)}
    assert {cells[0] for cells in sizes} <= {*tenths, "0.6", "0.242"}  # 0.242 is the first of three digits that fits
    assert len(sizes) >= 8
    for target, count, effect, *numbers in sizes:
        chosen = spread.solve(int(float(target) * spread.parameters))
        assert (count, float(effect)) == (str(spread.size(chosen)), pytest.approx(spread.effect(chosen)))
        routed = [choice.routed for choice in chosen.values()]
        assert list(map(int, numbers)) == [routed.count(8), routed.count(4), routed.count(0)]
    # The plan itself is among them, at the size that it was searched for.
    assert ["0.6", str(spread.size(spread.solve(int(0.6 * spread.parameters))))] in [cells[:2] for cells in sizes]


def test_layers_that_tell_nothing(tmp_path: Path) -> None:
    """Layers whose errors change nothing, and a plan without a config."""
    plan = some_plan()
    assert plan.spread is not None
    spread = replace(plan.spread, layers=[replace(layer, sensitivity=-0.1) for layer in plan.spread.layers])
    page = Page(replace(plan, spread=spread, config=None), tmp_path)
    assert "log scale" not in page.text
    assert [cells[0] for cells in page.rows["Other sizes"] if cells[0] == "this plan"] == ["this plan"]
    assert not re.search(r"\b(None|nan|inf|Undefined)\b", page.source)


def test_layers_with_different_numbers_of_experts(tmp_path: Path) -> None:
    first = replace(FULL.layers[0], experts=[4], gates=[0.25], expert_scores=[0.09, 0.05], tokens=[40])
    plan = replace(FULL, layers=[first, *FULL.layers[1:]])
    page = Page(plan, tmp_path)
    _, saved, row, *_ = page.rows["Fewer experts"]
    assert row == ["2", "0.09", "0.05", "", ""]
    assert saved[-1] == f"{1 - mlp_parameters(plan, 3) / mlp_parameters(plan, 0):.1%}"


def test_points_lie_where_their_values_are(tmp_path: Path) -> None:
    """On a logarithmic axis, equal ratios are equal distances; a smaller value lies lower."""
    page = Page(replace(FULL, layer_divergences={1: 1.0, 2: 0.01, 3: 0.1}), tmp_path)
    found = re.findall(r'cx="([\d.]+)%" cy="([\d.]+)" r="\d"><title>(\d): ', page.source)[:3]
    assert [label for *_, label in found] == ["1", "2", "3"]
    assert [float(x) for x, *_ in found] == pytest.approx([100 / 6, 50, 500 / 6], abs=0.01)
    high, low, middle = (float(y) for _, y, _ in found)
    assert 0 < high < middle < low < 210
    assert middle - high == pytest.approx(low - middle, abs=0.02)


@pytest.mark.parametrize(("values", "scale"), [({1: 0.04, 2: 0.011, 3: 0.013}, "log"), ({1: 0.0, 2: 1.0}, "linear")])
def test_the_figure_says_what_it_shows(values: dict[int, float], scale: str, tmp_path: Path) -> None:
    (axes,) = draw_figure(FULL, values).axes
    assert axes.get_title(loc="left") == "Decoder layers condensed one at a time"
    assert axes.get_ylabel() == "Jensen-Shannon divergence\nof the model's last hidden state, in nats"
    assert axes.get_yscale() == scale
    points = [point for line in axes.lines for point in zip(line.get_xdata(), line.get_ydata(), strict=True)]
    assert dict(points) == values
    orders = {text.xy[0]: text.get_text() for text in axes.texts}
    assert orders == {row.layer: str(i) for i, row in enumerate(FULL.layers, 1) if row.layer in values}
    assert not axes.patches  # bars


def test_formats() -> None:
    numbers = {0: "0", 1: "1.00", 0.0123456: "0.0123", 0.00123456: "0.00123", 0.000123456: "1.23x10⁻⁴", 12.3456: "12.3"}
    numbers |= {1234.56: "1235", 12345.6: "1.23x10⁴", -0.1: "-0.100", 0.99999: "1.00", 1e-300: "1.00x10⁻³⁰⁰"}
    ticks = {0: "0", 0.05: "0.05", 0.0002: "0.0002", 1e-5: "10⁻⁵", 2e-5: "2x10⁻⁵", 100: "100"}
    counts = {0: "0", 999_999: "999,999", 1_234_567: "1.23 M", 197_000_000: "197.0 M", 11_858_855_936: "11.86 B"}
    for format_, texts in ((format_number, numbers), (format_tick, ticks), (format_count, counts)):
        for value, text in texts.items():
            assert format_(value) == text.replace("x", "\N{MULTIPLICATION SIGN}")
