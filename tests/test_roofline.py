"""The picture of a profile: no two of its texts overlap, and each kernel shows its own ceiling."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

pytest.importorskip("matplotlib")

from matplotlib.backend_bases import RendererBase
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

from llmc.cli.roofline import COLOURS, roofline_figure
from llmc.cli.roofline_labels import spread_apart
from llmc.runtime.limits import Limits
from llmc.runtime.profile import KernelTime, Profile, Sample, Serves, profile_phase

NEAR = Limits(2, 41e9, int8_ops_per_second=489e9, bf16_flops_per_second=464e9, f32_flops_per_second=210e9)
NEARER = replace(NEAR, bf16_flops_per_second=484e9, f32_flops_per_second=486e9)
EQUAL = replace(NEAR, bf16_flops_per_second=489e9, f32_flops_per_second=489e9)
ALL = replace(NEARER, tile_int8_ops_per_second=4e12, tile_bf16_flops_per_second=4e12)
MANY: Serves = (("rows", 17, None),)


def kernel(name: str, seconds: float, intensity: float, gops: float, arithmetic: str = "int8") -> KernelTime:
    operations = gops * 1e9 * seconds
    sample = Sample(1, seconds, operations / intensity, operations)
    return KernelTime("llm.linear", name, MANY, "[4096, 4096]", arithmetic, (sample,) * 2)


def profile(limits: Limits, *phases: list[KernelTime]) -> Profile:
    names = ("prefill", "decode", "third", "fourth")
    walls = [[1.1 * sum(item.samples[0].seconds for item in items)] * 2 for items in phases]
    found = (profile_phase(items, limits, wall, 512) for items, wall in zip(phases, walls, strict=True))
    return Profile(limits, dict(zip(names, found, strict=False)))


def crowd(count: int, gops: float, intensity: float) -> list[KernelTime]:
    """Kernels that lie almost upon each other."""
    return [
        kernel(f"quantized_linear_{index}", 0.1 + 0.01 * index, intensity * (1 + index / 50), gops * (1 + index / 30))
        for index in range(count)
    ]


def scattered(seed: int) -> list[KernelTime]:
    draw = random.Random(seed)
    return [
        kernel(f"kernel_{index}", draw.uniform(0.01, 1), 10 ** draw.uniform(-1, 3), 10 ** draw.uniform(-1, 3.5), kind)
        for index, kind in enumerate(draw.choices(("int8", "bf16", "f32"), k=14))
    ]


def boxes(figure: Figure) -> dict[str, Bbox]:
    """Where each text of the drawn picture is, and the legend."""
    (axes,) = figure.axes
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    legend = axes.get_legend()
    assert legend is not None
    found = {"the legend": legend.get_window_extent(renderer)}
    ticks = [
        label
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim()))
        for label, place in zip(axis.get_ticklabels(), axis.get_ticklocs(), strict=True)
        if low <= place <= high
    ]
    for index, text in enumerate([axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts, *ticks]):
        if text.get_visible() and text.get_text():
            found[f"{index}: {text.get_text()}"] = extent_of(text, renderer)
    return found


def extent_of(text: Text, renderer: RendererBase) -> Bbox:
    """Of the words alone: an annotation's own extent includes its line."""
    if isinstance(text, Annotation):
        text.update_positions(renderer)
    return Text.get_window_extent(text, renderer)


PICTURES = {
    "two ceilings within 5%": profile(NEAR, crowd(4, 400, 200), crowd(4, 110, 3.5)),
    "three within 1%": profile(NEARER, crowd(4, 470, 200), crowd(4, 110, 3.5)),
    "three that are equal": profile(EQUAL, crowd(3, 400, 200)),
    "five, points upon each other": profile(ALL, crowd(9, 480, 100), crowd(9, 100, 3)),
    "in cache, above every roof": profile(replace(NEAR, cache_bytes=1 << 40), crowd(5, 900, 3), crowd(5, 4000, 2)),
    "one point": profile(NEAR, [kernel("alone", 1.0, 5, 20)]),
    "no point": profile(NEAR, [kernel("norm", 1.0, float("inf"), 20)]),  # it moves no bytes
    "no multiplier measured": profile(Limits(1, 1e10), crowd(3, 20, 4)),
    "four phases": profile(NEAR, *(crowd(3, 50 * (index + 1), 3 + index) for index in range(4))),
    **{f"drawn by chance {seed}": profile(NEARER, scattered(seed), scattered(seed + 100)) for seed in range(2)},
}


@pytest.mark.parametrize("name", PICTURES)
def test_no_two_texts_overlap_and_none_is_cut_off(name: str) -> None:
    figure = roofline_figure(PICTURES[name], "model.so")
    found = boxes(figure)
    for (one, box), (other, second) in itertools.combinations(found.items(), 2):
        assert not box.overlaps(second), f"{one!r} and {other!r} overlap"
    for text, box in found.items():
        assert box.x0 >= 0 and box.y0 >= 0, f"{text!r} is cut off"
        assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, f"{text!r} is cut off"


def texts(picture: Profile) -> list[str]:
    (axes,) = roofline_figure(picture, "model.so").axes
    return [text.get_text() for text in axes.texts] + [axes.get_xlabel(), axes.get_title()]


def test_each_kernel_is_named_with_the_limit_that_it_has() -> None:
    items = [kernel("fast", 1.0, 100, 244.5), kernel("slow", 1.0, 1, 4.1), kernel("floats", 1.0, 100, 21, "f32")]
    found = texts(profile(NEAR, items))
    assert "fast [4096, 4096] (17 and more rows): 50% of int8" in found
    assert "slow [4096, 4096] (17 and more rows): 10% of memory" in found
    assert "floats [4096, 4096] (17 and more rows): 10% of f32" in found
    assert found[-2:] == ["intensity: operations per byte from memory", "model.so, 2 threads"]


def test_dotted_lines_end_at_the_own_ceiling() -> None:
    items = [kernel("tiles", 1.0, 1000, 100), kernel("floats", 1.0, 200, 21, "f32"), kernel("slow", 1.0, 2, 4.1)]
    (axes,) = roofline_figure(profile(ALL, items), "model.so").axes
    dotted = [line.get_data() for line in axes.lines if line.get_linestyle() == ":"]
    ends = {round(float(x[0])): [float(y) for y in ys] for x, ys in dotted}
    assert ends == {
        1000: pytest.approx([100, 4000]),  # the faster of two units for int8
        200: pytest.approx([21, 486]),
        2: pytest.approx([4.1, 82]),
    }


def test_points_above_the_roof_are_explained() -> None:
    above = [kernel("fast", 1.0, 100, 900), kernel("read", 1.0, 2, 900)]
    found = texts(profile(NEAR, above))
    assert "fast [4096, 4096] (17 and more rows): >100% of int8" in found
    assert "above its ceiling: the limit was measured low" in found[-2]
    cached = texts(profile(replace(NEAR, cache_bytes=1 << 40), above[1:]))
    assert "read [4096, 4096] (17 and more rows): in cache" in cached
    assert "in cache: a sample reads less than the last cache" in cached[-2]
    assert "measured low" not in cached[-2]


def test_names_without_room_are_counted() -> None:
    picture = profile(NEAR, crowd(90, 100, 3))
    (axes,) = roofline_figure(picture, "model.so").axes
    named = sum("quantized_linear" in text.get_text() for text in axes.texts)
    worth = sum(item.share_percent >= 1 for item in picture.phases["prefill"].kernels)
    assert named < worth
    assert f"no room for the names of {worth - named} kernel" in axes.get_title()


def test_points_have_the_colour_of_their_phase() -> None:
    (axes,) = roofline_figure(profile(NEAR, crowd(2, 100, 3), crowd(2, 50, 3)), "model.so").axes
    named = [text for text in axes.texts if "quantized_linear" in text.get_text()]
    assert [text.get_color() for text in named].count(COLOURS[0]) == 2


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ([], []),
        ([5.0], [5.0]),
        ([0.0, 100.0], [0.0, 100.0]),
        ([100.0, 0.0], [100.0, 0.0]),
        ([10.0, 10.0], [5.0, 15.0]),
        ([10.0, 10.0, 10.0], [0.0, 10.0, 20.0]),
        ([0.0, 8.0, 100.0], [-1.0, 9.0, 100.0]),
        ([0.0, 8.0, 16.0], [-2.0, 8.0, 18.0]),
    ],
)
def test_places_are_spread_apart_as_little_as_can_be(wanted: list[float], expected: list[float]) -> None:
    assert spread_apart(wanted, 10) == pytest.approx(expected)


def test_spread_places_keep_their_order_and_distance() -> None:
    for seed in range(50):
        draw = random.Random(seed)
        wanted = [draw.uniform(0, 60) for _ in range(draw.randrange(1, 9))]
        places = spread_apart(wanted, 10)
        order = sorted(range(len(wanted)), key=lambda index: wanted[index])
        assert all(places[right] - places[left] >= 10 - 1e-9 for left, right in itertools.pairwise(order))
