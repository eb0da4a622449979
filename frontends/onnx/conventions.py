"""What the inputs and outputs of exported text models mean, by the names that exporters give them.

Known are Optimum's names, those of torch.onnx (both exporters, transformers' caches flattened), ONNX Runtime's model
builder (GroupQueryAttention) and its older tools, and TensorFlow's BERT.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from llmc.errors import FrontendError
from llmc.frontends.onnx.model import Signature


class Role(Enum):
    """What a text model's input is, for one sequence without padding and without a past."""

    IDS = "token ids [batch, S]"
    MASK = "1 where a token is no padding [batch, past + S]"
    POSITIONS = "position of each token [batch, S] or [S], or [kinds, batch, S]: all kinds are the same for text"
    TOKEN_TYPES = "which of two texts a token belongs to [batch, S]"
    PAST = "keys or values of earlier steps"
    LENGTH = "tokens of the sequence in all"
    LAST = "tokens of each sequence in all, less one [batch]"
    PAST_LENGTH = "tokens of earlier steps"
    BRANCH = "whether there is a past"
    KEEP = "rows of logits that are wanted; 0: all"


_BY_NAME: dict[str, Role] = {
    **dict.fromkeys(("input_ids", "token_ids", "tokens"), Role.IDS),
    **dict.fromkeys(("attention_mask", "input_mask"), Role.MASK),
    **dict.fromkeys(("position_ids", "cache_position", "positions"), Role.POSITIONS),
    **dict.fromkeys(("token_type_ids", "segment_ids"), Role.TOKEN_TYPES),
    **dict.fromkeys(("total_sequence_length", "total_seq_len"), Role.LENGTH),
    "seqlens_k": Role.LAST,
    **dict.fromkeys(("past_sequence_length", "past_seq_len", "past_length"), Role.PAST_LENGTH),
    "use_cache_branch": Role.BRANCH,
    **dict.fromkeys(("num_logits_to_keep", "logits_to_keep"), Role.KEEP),
}
_PAST = re.compile(r"(past|cache|kv_cache|k_cache|v_cache|key_cache|value_cache)([._]|\d|$|_?key|_?value)")
_PRESENT = re.compile(r"(present|past|new_past|cache|kv_cache|k_cache|v_cache|key_cache|value_cache)([._]|\d|$)")
# Keys and values of another model's tokens: they are not there yet, but given.
_OTHER_PAST = re.compile(r"encoder|cross")
_BATCH = re.compile(r"batch|^b$|^n$", re.IGNORECASE)
_INTEGERS = (6, 7)  # ONNX's i32 and i64


@dataclass(frozen=True)
class TextInputs:
    """The inputs of a text model by role."""

    roles: Mapping[str, Role]

    def having(self, role: Role) -> list[str]:
        """The names of the inputs of a role."""
        return [name for name, found in self.roles.items() if found is role]


def text_inputs(inputs: Sequence[Signature]) -> tuple[TextInputs | None, str]:
    """Every input's role where all have one and token ids are among them; else None, and why not (empty: no ids)."""
    ids = [signature for signature in inputs if _role(signature) is Role.IDS]
    if len(ids) != 1:
        return None, ""
    (found,) = ids
    if found.dtype not in _INTEGERS:
        return None, f"{found.name!r} is not an integer tensor [batch, sequence]"
    assert found.dims is not None  # else it had no role
    batch, length = found.dims
    if isinstance(length, int):
        why = f"{found.name!r} has a fixed length of {length}: export the model with dynamic axes to use it with text"
        return None, why
    if isinstance(batch, int) and batch != 1:
        return None, f"{found.name!r} has a fixed batch of {batch}: export the model with a dynamic batch, or 1"
    roles: dict[str, Role] = {}
    for signature in inputs:
        role = _role(signature)
        if role is None:
            return None, f"input {signature.name!r:.100} has no meaning that is known for text"
        roles[signature.name] = role
    return TextInputs(roles), ""


def _role(signature: Signature) -> Role | None:
    name = signature.name.split(":")[0]  # TensorFlow's ":0"
    if signature.dims is None:
        return None
    rank = len(signature.dims)
    role = _BY_NAME.get(name)
    if role in (Role.IDS, Role.TOKEN_TYPES, Role.MASK):
        return role if rank == 2 else None
    if role is Role.POSITIONS:
        return role if rank in (1, 2) or (rank == 3 and isinstance(signature.dims[0], int)) else None
    if role is not None:
        return role
    return Role.PAST if rank in (3, 4, 5) and _PAST.match(name) and not _OTHER_PAST.search(name) else None


def empty_past(signature: Signature, ids: Signature) -> tuple[int, ...]:
    """The shape of keys or values of a past of no tokens: batch 1, the axis that grows 0."""
    assert signature.dims is not None
    shape: list[int] = []
    grows = []
    for axis, dim in enumerate(signature.dims):
        if isinstance(dim, int):
            shape.append(dim)
        elif (dim is None and axis == 0 and len(signature.dims) == 4) or _is_batch(dim, ids):
            shape.append(1)
        else:
            grows.append(axis)
            shape.append(0)
    if len(grows) == 1:
        return tuple(shape)
    shown = [dim if dim is not None else "?" for dim in signature.dims]
    raise FrontendError(
        f"input {signature.name!r:.100} has shape {shown}: "
        + ("a cache of a fixed size is not supported; export the model with a dynamic past" if not grows
           else "which of its axes is the past cannot be told; name them, such as past_sequence_length")
    )  # fmt: skip


def _is_batch(dim: str | None, ids: Signature) -> bool:
    return dim is not None and ids.dims is not None and (dim == ids.dims[0] or is_batch_size(dim))


def is_named_present(signature: Signature) -> bool:
    """Whether an output is called as keys and values for the next step are."""
    return bool(_PRESENT.match(signature.name))


def is_present(signature: Signature) -> bool:
    """Whether an output is keys and values for the next step, or the like: more than a row a token."""
    rank = None if signature.dims is None else len(signature.dims)
    if rank is None or rank == 3:
        return is_named_present(signature)
    return rank > 3


def is_batch_size(name: str) -> bool:
    """Whether a free size is called like a number of items."""
    return bool(_BATCH.search(name))
