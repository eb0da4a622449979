"""Forms of activations: what a kernel writes is what the form means in numpy, at any size, to within its rounding."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from kernel_harness import Compiled, aligned
from x86_machines import MACHINES, runnable

from llmc.targets.cpu.forms import Bf16Pairs, IntegerGroups, integer_groups
from llmc.targets.cpu.matrix_unit import matrix_unit
from llmc.targets.forms import Converted, Form, OwnRows
from llmc.targets.machine import Machine
from llmc.targets.template import Chooser
from llmc.targets.x86 import detect
from llmc.targets.x86.activation_tiles import Bf16Tiles

ROWS, FEATURES = (1, 7, 31, 33, 129), (1, 7, 31, 33, 129)
# Tiles are written by vectors that round to bf16, with or without tile registers.
ROUNDS_TO_TILES = detect.machine("znver5")


def padded(features: int, multiple: int) -> int:
    return -(-features // multiple) * multiple


def forms(features: int) -> list[Converted]:
    found = [
        *(IntegerGroups(features, group, paired) for group in (32, 64, 128) for paired in (False, True)),
        Bf16Pairs(features),
        *(Bf16Tiles(features, padded(features, multiple), parts) for multiple in (32, 64) for parts in (1, 3)),
    ]
    return list(dict.fromkeys(found))


def numbers(rows: int, features: int) -> np.ndarray:
    """Of many sizes, with zeros, ties and a row of nothing."""
    rng = np.random.default_rng(rows * 1000 + features)
    x = rng.standard_normal((rows, features)) * 2.0 ** rng.integers(-20, 20, (rows, 1))
    x[rng.random((rows, features)) < 0.1] = 0
    x[-1, ::3] = 2.0**-7 * 1.5  # between two bf16 of 1, and of their sums
    x[rows // 2] = 0
    return x.astype(np.float32)


def allowed(form: Converted, x: np.ndarray) -> np.ndarray:
    """How far a decoded number may be off."""
    if isinstance(form, IntegerGroups):
        wide = np.zeros((len(x), form.columns), np.float32)
        wide[:, : form.features] = np.abs(x)
        peaks = wide.reshape(len(x), -1, form.group).max(2)
        # Half a step; quotients and products of f32 are off by a few 2^-24 of the largest.
        return np.repeat(peaks * (0.5 / 127 + 2.0**-21), form.group, axis=1)[:, : form.features]
    return np.abs(x) * (2.0**-8 if not isinstance(form, Bf16Tiles) or form.parts == 1 else 0)


@pytest.mark.parametrize("features", FEATURES)
def test_what_is_decoded_is_what_was_encoded(features: int) -> None:
    for rows in ROWS:
        x = numbers(rows, features)
        for form in forms(features):
            arrays = form.encode(x)
            assert [(name, array.dtype.name, array.shape) for name, array in arrays.items()] == [
                (buffer.name, buffer.dtype, buffer.shape) for buffer in form.buffers(rows)
            ]
            found = form.decode(arrays, rows)
            assert found.shape == x.shape and found.dtype == np.float32
            assert (np.abs(found - x) <= allowed(form, x)).all(), form
            # Bytes round again to the same bytes (of scales that are an ulp off, perhaps), and bf16 to the same bf16.
            for name, array in form.encode(found).items():
                assert name == "xscales" or (array == arrays[name]).all(), (form, name)


@pytest.mark.parametrize("features", FEATURES)
def test_rows_are_independent(features: int) -> None:
    """Any cut of the rows gives the same numbers, whatever else is in the room of the last tile."""
    x = numbers(33, features)
    for form in forms(features):
        whole = form.decode(form.encode(x), 33)
        for cut in (1, 16, 31):
            halves = [form.decode(form.encode(part), len(part)) for part in (x[:cut], x[cut:])]
            assert (np.concatenate(halves) == whole).all(), form


def writers(features: int) -> list[tuple[Machine, Converted]]:
    found: list[tuple[Machine, Converted]] = []
    for name, machine in MACHINES.items():
        if runnable(name):
            found += [(machine, integer_groups(machine, features, group)) for group in (32, 64)]
            found += [(machine, Bf16Pairs(features))]
    if runnable("avx512vnni"):
        found += [(ROUNDS_TO_TILES, form) for form in forms(features) if isinstance(form, Bf16Tiles)]
    return found


@pytest.mark.parametrize("features", [7, 33, 129])
def test_kernels_write_what_the_form_means(features: int) -> None:
    """To the bit, whatever lay there before, over any split of the rows, and not a byte past the form's buffers."""
    rows, guard = 33, 64
    x = numbers(rows, features)
    for machine, form in writers(features):
        expected, kernel = form.encode(x), Compiled(form.writer(Chooser(machine)).kernel, machine)
        arrays = []
        for buffer in form.buffers(rows):
            room = aligned(np.zeros(buffer.empty().nbytes + guard, np.uint8))
            room[:] = 0xA5
            arrays.append(room)
        for begin, end in ((31, 33), (0, 7), (7, 31)):
            kernel(aligned(x), *arrays, begin, end)
        for (name, wanted), room in zip(expected.items(), arrays, strict=True):
            assert (room[-guard:] == 0xA5).all(), (form, name)
            found = room[:-guard].view(wanted.dtype).reshape(wanted.shape)
            if isinstance(form, Bf16Tiles):  # rows behind the last hold anything
                found, wanted = (tiles.transpose(0, 3, 1, 2, 4).reshape(-1, form.inputs * form.parts)[:rows]
                                 for tiles in (found, wanted))  # fmt: skip
            if name == "xscales":  # one division, exactly rounded
                np.testing.assert_array_equal(found, wanted)
            assert (found == wanted).all(), (machine.name, form, name)


def test_a_form_is_alike_only_where_its_bytes_are() -> None:
    assert Bf16Tiles(33, 64) == Bf16Tiles(33, padded(33, 64)) != Bf16Tiles(33, 64, 3)
    everything: list[Form] = [OwnRows(129), *forms(129)]
    assert len(set(everything)) == len(everything)
    assert all(replace(form, features=130) != form for form in everything)


def test_names_are_told_apart_in_buffers() -> None:
    """Two forms of one activation have no scratch in common (pairs of sums and sums are never on one machine)."""
    names = [form.name for form in (OwnRows(129), *forms(129)) if not (isinstance(form, IntegerGroups) and form.paired)]
    assert len(set(names)) == len(names)


def test_a_matrix_unit_reads_whole_groups_and_writes_whole_tiles() -> None:
    unit = matrix_unit(detect.machine("sapphirerapids"))
    assert unit is not None
    assert unit.activations(33, 4, 64) == Bf16Tiles(33, 64) and unit.activations(33, 16, None) == Bf16Tiles(33, 64)
    assert unit.activations(33, 32, None) == Bf16Tiles(33, 64, 3) and unit.result(64, 32) == Bf16Tiles(64, 64, 3)
    assert unit.activations(33, 6, 32) == Bf16Tiles(33, 64)
    assert unit.activations(33, 5, 32) is None and unit.activations(33, 4, 16) is None and unit.result(33, 4) is None


def test_sums_of_another_machine_are_refused() -> None:
    machine = MACHINES["avx512vnni"]
    with pytest.raises(ValueError, match="are not those"):
        replace(integer_groups(machine, 33, 64), paired=True).writer(Chooser(machine))
