"""Reads a compressed delta of format 3 by docs/delta.md and docs/methods.md alone: it shares no code with unmask."""

import hashlib
import io
import json
import math
import re
import struct
import zlib

KINDS, G, ONES = {"F": "float", "BF": "bfloat", "I": "int", "U": "uint"}, 0x9E3779B97F4A7C15, 2**64 - 1


def read_delta(data):
    """Returns {name: (shape, indices, values as bytes)}, {name: bytes of a tensor stored whole}, the header and the slots."""
    size = int.from_bytes(data[:8], "little")
    layout, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    outer = json.loads(layout.pop("__metadata__")["unmask"])
    parts = {key: body[slice(*entry["data_offsets"])] for key, entry in layout.items()}
    sha = hashlib.sha256(b'{"format_version": 3}')
    for key in sorted(parts):
        dtype = re.sub(r"\D+", lambda kind: KINDS[kind[0]], layout[key]["dtype"])
        sha.update(f"{key} torch.{dtype} {layout[key]['shape']}".encode() + parts[key])
    assert outer == {"format_version": 3, "checksum": sha.hexdigest()}
    header = json.loads(zlib.decompress(parts["header"]))
    streams = {key: io.BytesIO(part) for key, part in parts.items()}
    sizes = [math.prod(shape) for shape in header["shapes"]]
    if "draw" in header:
        count = sum(len(part) * 8 // int(key[-2:]) for key, part in parts.items() if key.startswith("values."))
        indices = drawn(header["draw"], count, sizes)
    else:
        codes = [int.from_bytes(streams["indices"].read(length), "little") for length in header["lengths"]]
        indices = list(map(decoded, codes, header["parameters"], header["counts"], sizes))
    sparse = {}
    for name, shape, dtype, own in zip(header["names"], header["shapes"], header["dtypes"], indices, strict=True):
        sparse[name] = shape, own, streams[f"values.{dtype}"].read(len(own) * int(dtype[-2:]) // 8)
    slots = [slot for (slot,) in struct.iter_unpack("<i", parts.get("slots", b""))]
    return sparse, {key[:-7]: part for key, part in parts.items() if key.endswith("::whole")}, header, slots


def decoded(code, parameter, count, numel):
    """Returns the indices of a code, whose bits are those of a whole number, the least significant one first."""
    size, index, found = min(count, numel - count), -1, []
    at = (size * parameter + 7) // 8 * 8
    for place in range(size):
        quotient = (code >> at & -(code >> at)).bit_length() - 1  # The number of zeros before the next one.
        at += quotient + 1
        index += 1 + quotient * 2**parameter + (code >> place * parameter) % 2**parameter
        found.append(index)
    return sorted({*range(numel)} - {*found}) if 2 * count > numel else found


def drawn(said, count, sizes):
    """Returns the indices of a random mask, by tensor."""
    state, bits, positions = mix(said["seed"] + G), max(1, (said["total"] - 1).bit_length()), set()
    while len(positions) < count:
        candidate = mix(state := state + G) >> (64 - bits)
        positions |= {candidate} if candidate < said["total"] else set()
    assert said["sha256"] == hashlib.sha256(b"".join(p.to_bytes(8, "little") for p in sorted(positions))).hexdigest()
    found, end = [], 0
    for skipped, size in zip(said["skipped"], sizes, strict=True):
        start, end = end + skipped, end + skipped + size
        found.append([p - start for p in sorted(positions) if start <= p < end])
    return found


def mix(z):  # Any whole number counts modulo 2^64.
    z = ((z & ONES) ^ (z & ONES) >> 30) * 0xBF58476D1CE4E5B9 & ONES
    z = (z ^ z >> 27) * 0x94D049BB133111EB & ONES
    return z ^ z >> 31
