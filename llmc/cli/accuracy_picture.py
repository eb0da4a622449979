"""Errors of an artifact's tensors as a picture: a column for each layer, a row for each kind of matrix, the bits that
each is stored with in its cell. Darker is worse."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from llmc.cli.roofline import FORMATS
from llmc.errors import LlmcError
from llmc.files import OutputFile, refusal, write_all, writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from llmc.runtime.accuracy import Accuracy, TensorAccuracy

_NUMBER = re.compile(r"(?<![^./])\d+(?![^./])")  # the 3 of layers.3.q_proj, not that of conv2d
_END = re.compile(r"\.(weight|kernel)$")
_COLUMN = 0.36  # inches
_ROW = 0.3
_MOST_COLUMNS = 48  # whose cells have room for the bits


@dataclass
class Cell:
    """Tensors of one kind in one layer: mostly one."""

    numbers: int = 0
    bits: float = 0.0
    error: float = 0.0

    def add(self, tensor: TensorAccuracy, error: float) -> None:
        """Errors and bits are means over all numbers."""
        total = self.numbers + tensor.numbers
        share = tensor.numbers / max(1, total)
        self.bits += (tensor.bits - self.bits) * share
        self.error += (error - self.error) * share
        self.numbers = total


@dataclass
class Grid:
    """Cells by kind and layer; layer None: of tensors that are of no layer."""

    cells: dict[str, dict[int | None, Cell]] = field(default_factory=dict)

    def add(self, tensor: TensorAccuracy, error: float) -> None:
        kind, layer = place_of(tensor.name)
        if layer is None and "*" in kind:  # numbers that are of no layer: side by side in their order
            layer = len(self.cells.get(kind, ()))
        self.cells.setdefault(kind, {}).setdefault(layer, Cell()).add(tensor, error)

    @property
    def layers(self) -> list[int | None]:
        """The columns, in order."""
        found = {layer for row in self.cells.values() for layer in row}
        return [*sorted(layer for layer in found if layer is not None), *([None] if None in found else [])]


def check_picture(path: Path) -> None:
    """Refuses what could not be drawn: LlmcError."""
    if path.suffix.lower() not in FORMATS:
        raise LlmcError(f"--picture {path}: the name must end in {', '.join(FORMATS)}")
    why = refusal(path)
    if why is not None:
        raise LlmcError(f"cannot write --picture {path}: {why}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise LlmcError("--picture needs matplotlib: pip install 'llmc[plot]'") from error


def draw_accuracy(told: Accuracy, path: Path, title: str) -> None:
    """Draws the errors into a picture whose type is that of the file's suffix. All or nothing; raises LlmcError."""
    check_picture(path)
    if not told.tensors:
        raise LlmcError("--picture: no matrix of this artifact was rounded, so that there is nothing to draw")
    drawn = io.BytesIO()
    accuracy_figure(told, title).savefig(drawn, format=path.suffix.lower().removeprefix("."))
    with writing(path, LlmcError), OutputFile(path) as file:
        write_all(file.descriptor, drawn.getbuffer())


def place_of(name: str) -> tuple[str, int | None]:
    """A tensor's kind and its layer: the first number in its name, if there is one."""
    numbers = _NUMBER.findall(name)
    plain = _END.sub("", name)
    if not numbers:
        return re.sub(r"_\d+$", "_*", plain), None
    at = plain.find(numbers[0])
    kind = _NUMBER.sub("*", plain[at + len(numbers[0]) :]).strip("._:/") or _NUMBER.sub("*", plain)
    return kind, int(numbers[0])


def accuracy_figure(told: Accuracy, title: str) -> Figure:
    """The picture: outputs' errors above, where they were measured, and weights' errors below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    weights, outputs = Grid(), Grid()
    for tensor in told.tensors:
        weights.add(tensor, tensor.weight_error)
        if tensor.output_error is not None:
            outputs.add(tensor, tensor.output_error)
    grids = [(grid, what) for grid, what in ((outputs, "outputs"), (weights, "weights")) if grid.cells]
    columns = max(len(grid.layers) for grid, _ in grids)
    heights = [1.2 + _ROW * len(grid.cells) for grid, _ in grids]
    figure = Figure(figsize=(max(8.0, 4.5 + _COLUMN * columns), 0.7 + sum(heights)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    every = figure.subplots(len(grids), 1, squeeze=False, height_ratios=heights)
    for axes, (grid, what) in zip(every[:, 0], grids, strict=True):
        _draw_grid(figure, axes, grid, what)
    return figure


def _draw_grid(figure: Figure, axes: Axes, grid: Grid, what: str) -> None:
    import numpy as np
    from matplotlib.colors import LogNorm

    kinds, layers = list(grid.cells), grid.layers
    values = np.full((len(kinds), len(layers)), np.nan)
    for row, kind in enumerate(kinds):
        for layer, cell in grid.cells[kind].items():
            values[row, layers.index(layer)] = max(cell.error, 1e-12)
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    norm = LogNorm(low if low < high else low / 2, high if low < high else high * 2)
    image = axes.imshow(values, norm=norm, cmap="YlOrRd", aspect="auto", interpolation="nearest")
    axes.set_facecolor("#f2f2f2")  # where there is no such matrix
    axes.set_yticks(range(len(kinds)), kinds, fontsize=8)
    step = -(-len(layers) // 40)
    ticks = [at for at, layer in enumerate(layers) if layer is None or at % step == 0]
    axes.set_xticks(ticks, ["none" if layers[at] is None else str(layers[at]) for at in ticks], fontsize=8)
    axes.set_xlabel("layer", fontsize=9)
    axes.set_xticks([at - 0.5 for at in range(1, len(layers))], minor=True)
    axes.set_yticks([at - 0.5 for at in range(1, len(kinds))], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.0)
    axes.tick_params(which="both", length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_title(f"squared error of {what}, as a part of their squares; in the cells: bits each", fontsize=9)
    if len(layers) <= _MOST_COLUMNS:
        for row, kind in enumerate(kinds):
            for layer, cell in grid.cells[kind].items():
                dark = norm(max(cell.error, 1e-12)) > 0.6
                axes.text(
                    layers.index(layer), row, f"{cell.bits:.0f}", ha="center", va="center", fontsize=7,
                    color="white" if dark else "#333333",
                )  # fmt: skip
    bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=12)
    bar.ax.tick_params(which="both", labelsize=8)
