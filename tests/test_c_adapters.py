"""Adapters from C: tables from memory, chosen for a sequence, and the bits that Python has."""

from __future__ import annotations

import ctypes
from pathlib import Path

import c_api
import fake_artifact
import numpy as np
import pytest
from test_adapters import COUNT, IDS, RANK, artifact, folder, logits, one, two  # noqa: F401  (fixtures)
from test_c_api import ARGUMENT, STATE, UNSUPPORTED, CodeError, Model

from llmc.runtime.lora import Product, read_adapter
from llmc.runtime.runtime import Runtime

Tables = tuple[list[np.ndarray], object]


def tables_of(runtime: Runtime, products: dict[str, Product]) -> Tables:
    """What `load_adapter` takes, and what keeps it."""
    facts, kept = runtime.manifest.adapters, list[np.ndarray]()
    assert facts is not None
    given = (c_api.AdapterTable * len(facts.tables))()
    for place, table in zip(given, facts.tables, strict=True):
        a = np.full((len(table.parts), RANK, table.inputs), np.nan, np.float32)
        b, ranks = np.zeros((RANK, table.outputs), np.float32), np.zeros(len(table.parts), np.int32)
        end = 0
        for number, part in enumerate(table.parts):
            begin, end = end, end + part.columns
            product = products.get(part.module)
            if product is not None:
                rank = ranks[number] = len(product.a)
                rows = np.concatenate([np.arange(*run) for run in part.rows])
                a[number, :rank], b[:rank, begin:end] = product.a, product.b[rows].T
        if ranks.any():  # else all is NULL
            place.ranks, place.a, place.b = ranks.ctypes.data, a.ctypes.data, b.ctypes.data
        kept += [a, b, ranks]
    return kept, given


@pytest.fixture
def python(artifact: Path, one: Path, two: Path) -> Runtime:  # noqa: F811
    runtime = Runtime.load(artifact, threads=1)
    runtime.load_lora("one", one)
    runtime.load_lora("two", two)
    return runtime


def test_c_and_python_have_the_same_bits(python: Runtime, artifact: Path, one: Path, two: Path) -> None:  # noqa: F811
    assert python.manifest.adapters is not None
    with Model(artifact, threads=1) as model:
        facts = model.api.facts.contents
        assert (facts.adapter_count, facts.adapter_rank) == (COUNT, RANK)
        assert [(t.inputs, t.outputs, t.parts) for t in c_api.listed(facts, "adapter_table")] == [  # type: ignore[attr-defined]
            (table.inputs, table.outputs, len(table.parts)) for table in python.manifest.adapters.tables
        ]
        for number, directory in ((1, one), (3, two)):
            _, given = tables_of(python, read_adapter(directory, python.manifest.adapters))
            model.call("load_adapter", model.handle, number, ctypes.addressof(given))  # type: ignore[arg-type]
        ids = IDS.tolist()
        for number, name in ((1, "one"), (3, "two"), (0, None)):
            sequence = model.sequence()
            model.call("adapt", sequence, number)
            assert model.adopt(sequence, ids) == 0
            assert np.array_equal(model.feed(sequence, ids), logits(python, name)[-1])
            again = model.sequence()
            model.call("adapt", again, number)
            assert model.adopt(again, ids) == 64
            assert np.array_equal(model.feed(again, ids[64:]), logits(python, name)[-1])
            for each in (sequence, again):
                model.api.end(each)


def test_what_cannot_be_is_an_error(python: Runtime, artifact: Path, one: Path) -> None:  # noqa: F811
    assert python.manifest.adapters is not None
    _, given = tables_of(python, read_adapter(one, python.manifest.adapters))
    place = ctypes.addressof(given)  # type: ignore[arg-type]
    with Model(artifact, threads=1) as model:

        def code(name: str, *arguments: object) -> int:
            with pytest.raises(CodeError) as error:
                model.call(name, *arguments)
            return int(error.value.args[0])

        sequence = model.sequence()
        assert code("adapt", sequence, 1) == STATE  # nothing is loaded there
        for number in (0, -1, COUNT + 1, 1 << 40):
            assert code("load_adapter", model.handle, number, place) == ARGUMENT
        assert code("load_adapter", model.handle, 1, None) == ARGUMENT
        assert code("load_adapter", None, 1, place) == ARGUMENT
        assert code("unload_adapter", model.handle, 1) == STATE
        bad = np.full(8, RANK + 1, np.int32)
        kept, given[0].ranks = given[0].ranks, bad.ctypes.data  # type: ignore[index]
        assert code("load_adapter", model.handle, 1, place) == ARGUMENT
        given[0].ranks = kept  # type: ignore[index]
        model.call("load_adapter", model.handle, 1, place)
        for number in (-1, COUNT + 1):
            assert code("adapt", sequence, number) == ARGUMENT
        assert code("adapt", None, 1) == ARGUMENT
        model.call("adapt", sequence, 1)
        assert code("unload_adapter", model.handle, 1) == STATE  # in use, also while it is empty
        assert code("load_adapter", model.handle, 1, place) == STATE
        model.feed(sequence, [3])
        assert code("adapt", sequence, 0) == STATE
        model.api.end(sequence)
        model.call("unload_adapter", model.handle, 1)
        other = model.sequence()
        assert code("adapt", other, 1) == STATE


def test_an_artifact_without_room_says_so(tmp_path: Path) -> None:
    with Model(fake_artifact.write(tmp_path / "model.so")) as model:
        sequence = model.sequence()
        model.call("adapt", sequence, 0)
        for name, arguments in (("adapt", (sequence, 1)), ("load_adapter", (model.handle, 1, None))):
            with pytest.raises(CodeError, match="has no room for adapters: compile it with --adapters N") as error:
                model.call(name, *arguments)
            assert error.value.args[0] == UNSUPPORTED
