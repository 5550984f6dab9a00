"""Makes the damaged bytes, JSON values and tensors of all fuzz tests, which depend on the seed alone."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import torch
from torch import Tensor

_DEEP = "@deep@"
_TEXTS = (
    "",
    "x",
    "none",
    "auto",
    "nan",
    "-1",
    "1e999",
    "\ud800",
    "a" * 3000,
    "../x",
    "a\nb",
    "a|b`c<d>",
    _DEEP,
    "☃",
    "\0",
)
_NUMBERS = (-1, 0, 1, 2, 3, 2**31, 2**62, 2**63, -(2**70), 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"))
_REST = (None, True, False, [], {}, [[]], [None], {"": None}, ["x", 1], {"a": {"b": []}})
_DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.int16, torch.uint8),
    *(torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2),
)


class Mutator:
    """Makes mutations; the same ones from the same seed.

    Args:
        seed: The seed of every draw.
    """

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)

    def damaged(self, data: bytes) -> bytes:
        """Returns bytes with one to three flips, cuts, insertions, repetitions or swaps in them."""
        for _ in range(self.draw.choice((1, 1, 1, 2, 3))):
            data = self._damaged_once(data)
        return data

    def _damaged_once(self, data: bytes) -> bytes:
        draw, at = self.draw, self.draw.randrange(len(data) or 1)
        low, high = sorted(draw.randrange(len(data) + 1) for _ in range(2))
        which = draw.randrange(7)
        if which <= 1 and data:  # a bit, or a byte
            new = data[at] ^ (1 << draw.randrange(8)) if which else draw.randrange(256)
            return data[:at] + bytes([new]) + data[at + 1 :]
        if which == 2:
            return data[:at]
        if which == 3:
            return data[:at] + draw.randbytes(draw.choice((1, 2, 8, 100))) + data[at:]
        if which == 4:
            return data[:low] + data[high:]
        if which == 5:
            return data[:high] + data[low:high] + data[high:]
        return data[:low] + bytes(high - low) + data[high:]

    def hostile(self) -> Any:
        """Returns a value that hardly any place expects."""
        return copy.deepcopy(self.draw.choice((*_TEXTS, *_NUMBERS, *_REST)))

    def changed(self, value: Any) -> Any:
        """Returns a copy of a JSON value with one to three of its parts changed, missing, doubled or added."""
        value = copy.deepcopy(value)
        for _ in range(self.draw.choice((1, 1, 1, 2, 3))):
            value = self._changed_once(value)
        return value

    def _changed_once(self, value: Any) -> Any:
        places = list(_places(value))
        if not places or self.draw.random() < 0.02:
            return self.hostile()
        holder, key = self.draw.choice(places)
        which = self.draw.randrange(6)
        if which == 0:
            del holder[key]
        elif which == 1 and isinstance(holder, dict):
            holder[self.draw.choice([text for text in _TEXTS if text != _DEEP])] = self.hostile()
        elif which == 1:
            holder.insert(key, copy.deepcopy(holder[key]))
        elif which == 2 and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
            holder[key] = holder[key] + self.draw.choice((-1, 1, 0.5, 100))
        elif which == 3 and isinstance(holder[key], list):
            self.draw.shuffle(holder[key])
        else:
            holder[key] = self.hostile()
        return value

    def changed_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns tensors by name, of which one to three are changed, missing, renamed or added."""
        tensors = dict(tensors)
        for _ in range(self.draw.choice((1, 1, 1, 2, 3))):
            if not tensors:
                return tensors
            name = self.draw.choice(sorted(tensors))
            which = self.draw.randrange(8)
            if which == 0:
                del tensors[name]
            elif which == 1:
                tensors[self.draw.choice((f"{name}x", "dense::x", "x::y", "::indices", "step", "w"))] = tensors.pop(
                    name
                )
            elif which == 2:
                tensors[f"x{name}"] = tensors[name].clone()
            else:
                tensors[name] = self.changed_tensor(tensors[name])
        return tensors

    def changed_tensor(self, tensor: Tensor) -> Tensor:
        """Returns a tensor of another dtype or shape, or with other, doubled or unordered entries."""
        draw, flat = self.draw, tensor.reshape(-1)
        which = draw.randrange(7)
        if which == 0:
            return flat.to(draw.choice(_DTYPES)).reshape(tensor.shape)
        if which == 1:
            scalar, longer = torch.zeros(()).to(tensor), flat.repeat(2)
            return draw.choice((flat.view(1, -1), flat.view(-1, 1), flat[:0], scalar, flat[:-1], longer))
        changed = flat.clone()
        if not changed.numel():
            return torch.ones(3).to(tensor)
        at, other = draw.randrange(changed.numel()), draw.randrange(changed.numel())
        if which == 2:
            changed[at] = changed[other].clone()
        elif which == 3:
            bits = changed.view(torch.uint8) if changed.element_size() == 1 else changed  # float8 cannot be flipped
            return bits.flip(0).view(changed.dtype).reshape(tensor.shape)
        elif which == 4 and tensor.is_floating_point():
            changed[at] = draw.choice((float("nan"), float("inf"), -0.0, 1e30))
        else:
            changed[at] = draw.choice((-1, 0, 1, 7, 100))
        return changed.reshape(tensor.shape)


def dumps(value: Any) -> str:
    """Returns a mutated value as JSON, with deep nesting where the mutation asks for it."""
    return json.dumps(value).replace(f'"{_DEEP}"', "[" * 20_000 + "]" * 20_000)


def _places(value: Any) -> Any:
    """Returns each (container, key) inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in list(inner):
        yield value, key
        yield from _places(each)
