"""The types that tensors of a GGUF file have: their numbers, names, and how many bytes a block of weights takes.

Source: `enum ggml_type` and the `block_*` structures of ggml, as published in the GGUF specification.
"""

from __future__ import annotations

from dataclasses import dataclass

K = 256  # weights of a super-block, in the types that have them


@dataclass(frozen=True)
class TensorType:
    """`block` weights in a row lie in `size` bytes. dtype: the IR dtype of numbers that are stored as they are."""

    name: str
    block: int
    size: int
    dtype: str | None = None

    @property
    def bits(self) -> float:
        """Stored bits a weight."""
        return 8 * self.size / self.block


TENSOR_TYPES: dict[int, TensorType] = {
    0: TensorType("F32", 1, 4, "f32"),
    1: TensorType("F16", 1, 2, "f16"),
    2: TensorType("Q4_0", 32, 18),
    3: TensorType("Q4_1", 32, 20),
    6: TensorType("Q5_0", 32, 22),
    7: TensorType("Q5_1", 32, 24),
    8: TensorType("Q8_0", 32, 34),
    10: TensorType("Q2_K", K, 84),
    11: TensorType("Q3_K", K, 110),
    12: TensorType("Q4_K", K, 144),
    13: TensorType("Q5_K", K, 176),
    14: TensorType("Q6_K", K, 210),
    15: TensorType("Q8_K", K, 292),
    16: TensorType("IQ2_XXS", K, 66),
    17: TensorType("IQ2_XS", K, 74),
    18: TensorType("IQ3_XXS", K, 98),
    19: TensorType("IQ1_S", K, 50),
    20: TensorType("IQ4_NL", 32, 18),
    21: TensorType("IQ3_S", K, 110),
    22: TensorType("IQ2_S", K, 82),
    23: TensorType("IQ4_XS", K, 136),
    24: TensorType("I8", 1, 1, "i8"),
    25: TensorType("I16", 1, 2, "i16"),
    26: TensorType("I32", 1, 4, "i32"),
    27: TensorType("I64", 1, 8, "i64"),
    28: TensorType("F64", 1, 8, "f64"),
    29: TensorType("IQ1_M", K, 56),
    30: TensorType("BF16", 1, 2, "bf16"),
    34: TensorType("TQ1_0", K, 54),
    35: TensorType("TQ2_0", K, 66),
    39: TensorType("MXFP4", 32, 17),
}
# Numbers that a file may have and that are not read: what they are.
UNREAD_TYPES = {
    4: "Q4_2, which llama.cpp has removed",
    5: "Q4_3, which llama.cpp has removed",
    9: "Q8_1, which is for activations",
    **dict.fromkeys((31, 32, 33), "Q4_0 interleaved for one machine, which llama.cpp has removed"),
    **dict.fromkeys((36, 37, 38), "IQ4_NL interleaved for one machine, which llama.cpp has removed"),
    40: "NVFP4",
    41: "Q1_0",
}
