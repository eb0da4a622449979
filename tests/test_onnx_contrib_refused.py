"""Forms of ONNX Runtime's own operations that have no translation: each is refused with its reason."""

from __future__ import annotations

import numpy as np
import pytest
from onnx_contrib_tools import Case, Fixed, normal
from test_onnx_contrib import caches, choice, grouped_query, multi_head, projected, refused

from llmc.frontends.onnx.contrib_parts import MICROSOFT
from llmc.frontends.onnx.translation import ATTRIBUTES, HANDLERS, discover


def without(case: Case, *places: int) -> Case:
    """The case without some of its inputs."""
    for place in places:
        case.inputs[place], case.names[place] = None, ""
    return case


def having(case: Case, **inputs: np.ndarray | Fixed) -> Case:
    """The case with inputs more, at `at_N`."""
    for name, array in inputs.items():
        place = int(name.removeprefix("at_"))
        while len(case.inputs) <= place:
            case.inputs.append(None)
            case.names.append("")
        case.inputs[place], case.names[place] = array, f"in{place}"
    return case


def giving(case: Case, outputs: int) -> Case:
    case.outputs, case.symbols = outputs, {}
    return case


def buckets(count: int, distance: int, **attributes: int) -> Case:
    length = Fixed(np.array([7], np.int64))
    given = {"max_distance": distance, **attributes}
    return Case("RelativePositionBias", [Fixed(normal(count, 3)), length, length], given)


ROWS = np.array([1], np.int32)
REFUSED = {
    "values in integers": (grouped_query(v_quant_type="PER_TENSOR"), "v_quant_type=PER_TENSOR is not supported"),
    "a cache of bits": (grouped_query(kv_cache_bit_width=4), "kv_cache_bit_width=4 is not supported, only 0"),
    "all see all": (grouped_query(causal=0), "causal=0 is not supported, only 1"),
    "a cache of one window": (grouped_query(sliding_window_cache=1), "sliding_window_cache=1 is not supported, only 0"),
    "what a later version has": (
        grouped_query(third_norm_epsilon=0.5), "its attribute 'third_norm_epsilon' is not known, and may change what",
    ),
    "tokens of each sequence": (
        having(grouped_query(), at_16=ROWS), "its input 17 ('in16') is not known: it has 16 at most",
    ),
    "scales of keys": (having(grouped_query(), at_12=normal(1)), "its input k_scale is not supported"),
    "scales of values": (having(grouped_query(), at_13=normal(1)), "its input v_scale is not supported"),
    "keys of a past": (having(grouped_query(), at_3=normal(1, 2, 4, 16)), "a past of some length"),
    "values of a past": (having(grouped_query(), at_4=normal(1, 2, 4, 16)), "a past of some length"),
    "a key alone": (without(grouped_query(), 2), "key and value come together or not at all"),
    "a value alone": (without(grouped_query(), 1), "key and value come together or not at all"),
    "a norm of queries alone": (without(grouped_query(norms=True), 15), "normalised together or not at all"),
    "a norm of keys alone": (without(grouped_query(norms=True), 14), "normalised together or not at all"),
    "a bias of more keys": (having(grouped_query(), at_10=normal(1, 1, 7, 9)), "do not broadcast"),
    "no cosines": (without(grouped_query(do_rotary=1), 7), "do_rotary=1 needs cos_cache and sin_cache"),
    "no sines": (without(grouped_query(do_rotary=1), 8), "do_rotary=1 needs cos_cache and sin_cache"),
    "more pairs than channels": (grouped_query(dim=8, do_rotary=1), "a cache of 8 pairs for heads of 8"),
    "a rotation of rows alone": (
        Case("RotaryEmbedding", [normal(7, 64), choice(1, 7, high=40), *caches(8)]),
        "x of rank 2: needs [B, S, heads * dim] or [B, heads, S, dim]",
    ),
    "a rotation of five axes": (
        Case("RotaryEmbedding", [normal(1, 2, 4, 7, 16), choice(1, 7, high=40), *caches(8)]),
        "x of rank 5: needs",
    ),
    "a length of the past": (having(multi_head(), at_8=ROWS), "its input past_sequence_length is not supported"),
    "beams": (having(multi_head(), at_9=ROWS), "its input cache_indirection is not supported"),
    "scores": (giving(multi_head(), 4), "its output qk is not supported"),
    "packed, and a key": (having(multi_head("packed"), at_1=normal(3, 7, 32)), "comes without key and value"),
    "packed, and a value": (having(multi_head("packed"), at_2=normal(3, 7, 32)), "comes without key and value"),
    "packed for other heads": (multi_head("packed", num_heads=3), "needs [B, S, heads, 3, dim]"),
    "packed keys, and a value": (having(multi_head("packed keys"), at_2=normal(3, 7, 32)), "comes without a value"),
    "packed keys for other heads": (multi_head("packed keys", num_heads=4), "needs [B, K, heads, 2, dim]"),
    "no value": (without(multi_head(), 2), "a key without a value"),
    "a length of the past of all": (having(projected(), at_6=ROWS), "its input past_sequence_length is not supported"),
    "queries and keys of unequal sizes": (projected(sizes=(32, 16, 32)), "queries and keys have different sizes"),
    "unequal sizes together": (giving(projected(sizes=(32, 32, 10)), 2), "keys and values of different sizes"),
    "a vector times a matrix": (Case("FusedMatMul", [normal(3), normal(3, 3)]), "factors without two axes"),
    "a matrix times a vector": (Case("FusedMatMul", [normal(3, 3), normal(3)]), "factors without two axes"),
    "no halves": (Case("BiasSplitGelu", [normal(3, 7), normal(7)]), "does not split into 2 parts"),
    "an inner axis": (
        Case("SimplifiedLayerNormalization", [normal(3, 7), normal(7)], {"axis": 0}, domain=""),
        "axis=0 of rank 2: only the last axis",
    ),
    "rows without elements": (
        Case("SkipSimplifiedLayerNormalization", [normal(3, 0), normal(3, 0), normal(0)]), "rows without elements",
    ),
    "layers without elements": (
        Case("SkipLayerNormalization", [normal(3, 0), normal(3, 0), normal(0)]), "rows without elements have no mean",
    ),
    "segments without a table": (
        Case("EmbedLayerNormalization", [choice(1, 7, high=9), choice(1, 7, high=2), normal(9, 5), normal(9, 5), None,
                                         normal(5), normal(5)]),
        "segment ids and their table come together",
    ),
    "a table without segments": (
        Case("EmbedLayerNormalization", [choice(1, 7, high=9), None, normal(9, 5), normal(9, 5), normal(2, 5),
                                         normal(5), normal(5)]),
        "segment ids and their table come together",
    ),
    "a gain of two axes": (
        Case("SkipLayerNormalization", [normal(3, 7), normal(3, 7, seed=1), normal(1, 7)]), "(1, 7) for rows of 7",
    ),
    "one bucket": (buckets(1, 20), "1 buckets a direction for distances up to 20: needs at least two"),
    "one bucket a direction": (buckets(3, 20, is_bidirectional=1), "1 buckets a direction"),
    "no far distances": (buckets(8, 4), "8 buckets a direction for distances up to 4"),
    "endless distances": (buckets(8, 1 << 40), "for distances up to 1099511627776: needs"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_computed_is_refused(name: str) -> None:
    refused(*REFUSED[name])


def test_an_input_that_is_left_out_may_be_an_unknown_one() -> None:
    case = grouped_query()
    case.inputs += [None] * 20
    case.names += [""] * 20
    case.translated()


def test_every_operation_says_what_attributes_it_knows() -> None:
    """They come without versions: an attribute that a later ONNX Runtime adds is seen to be new."""
    discover()
    mine = {key for key in HANDLERS if key[0] == MICROSOFT}
    assert mine - set(ATTRIBUTES) == {(MICROSOFT, "QAttention")}  # which is refused whatever it has
