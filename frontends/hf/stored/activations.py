"""What a checkpoint says of activations, in a line for the user: no format's own rounding of them is done here.

llmc rounds the inputs of matmuls as `--activations` says. A scale that is fixed in a checkpoint belongs to a way of
rounding that is not done here, so that leaving it out changes no weight.
"""

from __future__ import annotations

HERE = (
    "here --activations says what they are rounded to: by itself int8, with a scale for each group of a row's inputs, "
    "where -q is of integers, else nothing"
)


def activations_note(made_for: str, left_out: int = 0) -> str:
    """made_for: how the checkpoint rounds activations. left_out: tensors with scales of activations."""
    scales = f" {left_out} tensors with scales of activations are not used." if left_out else ""
    return f"the checkpoint was made for activations {made_for}; {HERE}.{scales}"
