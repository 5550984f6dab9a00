"""Reads a compressed delta of format 3 by docs/delta.md and docs/methods.md alone: it shares no code with unmask."""

import hashlib
import json
import math
import zlib

DTYPES = {
    "F32": "float32",
    "F64": "float64",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "U8": "uint8",
}
SIZES = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}
G, ONES = 0x9E3779B97F4A7C15, 2**64 - 1


def read_delta(data):
    """Returns {name: (shape, indices, values as bytes)}, {name: bytes of a tensor stored whole}, the header and the slots."""
    size = int.from_bytes(data[:8], "little")
    layout, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    outer = json.loads(layout.pop("__metadata__")["unmask"])
    parts = {key: body[slice(*entry["data_offsets"])] for key, entry in layout.items()}
    sha = hashlib.sha256(b'{"format_version": 3}')
    for key in sorted(parts):
        sha.update(f"{key} torch.{DTYPES[layout[key]['dtype']]} {layout[key]['shape']}".encode() + parts[key])
    assert outer == {"format_version": 3, "checksum": sha.hexdigest()}
    header = json.loads(zlib.decompress(parts["header"]))
    sizes = [math.prod(shape) for shape in header["shapes"]]
    if "draw" in header:
        count = sum(len(part) // SIZES[key[7:]] for key, part in parts.items() if key.startswith("values."))
        indices = drawn(header["draw"], count, sizes)
    else:
        codes = iter(parts["indices"])
        code = [int.from_bytes([next(codes) for _ in range(length)], "little") for length in header["lengths"]]
        indices = list(map(decoded, code, header["parameters"], header["counts"], sizes))
    values, sparse = {key: iter(part) for key, part in parts.items()}, {}
    for name, shape, dtype, own in zip(header["names"], header["shapes"], header["dtypes"], indices, strict=True):
        sparse[name] = shape, own, bytes(next(values[f"values.{dtype}"]) for _ in range(len(own) * SIZES[dtype]))
    slots = parts.get("slots", b"")
    slots = [int.from_bytes(slots[at : at + 4], "little") for at in range(0, len(slots), 4)]
    return sparse, {key[:-7]: part for key, part in parts.items() if key.endswith("::whole")}, header, slots


def decoded(code, parameter, count, numel):
    """Returns the indices of a code, whose bits are those of a whole number, the least significant one first."""
    size, index, found = min(count, numel - count), -1, []
    at = (size * parameter + 7) // 8 * 8
    for place in range(size):
        ones = code >> at
        quotient = (ones & -ones).bit_length() - 1  # The zeros before the next one.
        at += quotient + 1
        index += 1 + quotient * 2**parameter + (code >> place * parameter) % 2**parameter
        found.append(index)
    return sorted({*range(numel)} - {*found}) if 2 * count > numel else found


def drawn(said, count, sizes):
    """Returns the indices of a random mask, by tensor."""
    key, bits, positions, number = mix(said["seed"] + G), max(1, (said["total"] - 1).bit_length()), set(), 0
    while len(positions) < count:
        number += 1
        candidate = mix(key + number * G) >> (64 - bits)
        positions |= {candidate} if candidate < said["total"] else set()
    assert said["sha256"] == hashlib.sha256(b"".join(p.to_bytes(8, "little") for p in sorted(positions))).hexdigest()
    found, end = [], 0
    for skipped, size in zip(said["skipped"], sizes, strict=True):
        start, end = end + skipped, end + skipped + size
        found.append([p - start for p in sorted(positions) if start <= p < end])
    return found


def mix(z):
    """Returns SplitMix64's output function of a whole number modulo 2^64."""
    z = ((z & ONES) ^ (z & ONES) >> 30) * 0xBF58476D1CE4E5B9 & ONES
    z = (z ^ z >> 27) * 0x94D049BB133111EB & ONES
    return z ^ z >> 31
