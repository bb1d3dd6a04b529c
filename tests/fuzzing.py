"""Seeded fuzzing: mutations of bytes and of JSON values, and `attack`, which tries a reader with many of them.

A target is a pair of functions: `make(random)` writes a file that is nearly right, `reader()` reads it. FUZZ_TRIES is
the number of tries for each; what a try does follows from its target's name and its number, which a failure names.
"""

import copy
import json
import os
import signal
from collections.abc import Callable
from random import Random
from typing import Any

from bad_input import MAX_BYTES, MAX_SECONDS, peak_bytes, reset_peak, too_long

from lit_llama import UserError

TRIES = int(os.environ.get("FUZZ_TRIES", 12))
NUMBERS = [
    *(0, 1, -1, 2, 3, 7, 127, 128, 255, 256, 65535, 65536, 10**6, 10**9, 10**12, 10**30, -(10**12)),
    *(2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**31), -(2**63)),
]
FLOATS = [0.5, -0.0, 1e-320, 1e38, 1e308, float("nan"), float("inf"), float("-inf")]
TEXTS = [
    *("", " ", "x", "0", "-1", "\0", "\n", "\ud800", "\ufdd1", "\ufeff", "\u202e", "../x", "/", "~", ".", "..", "none"),
    *(
        "null",
        "true",
        "(",
        "[",
        "(a+)+$",
        "%s%n",
        "{}",
        "{0.__class__}",
        "{{ 7 * 7 }}",
        "\x1b[31m",
        "a" * 5000,
        "é" * 300,
    ),
]
OTHERS = [None, True, False, [], {}, [[]], [0], ["x"], {"x": 1}, {"": None}, [None] * 100]
BYTES = [
    *(
        b"",
        b"\0",
        b"\0" * 8,
        b"\xff",
        b"\xff" * 8,
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\r\n",
        b'"',
        b"\\",
        b"{",
        b"}",
        b",",
        b":",
    ),
    *(b"\\ud800", b"\xc3\x28", b"\xed\xa0\x80", b"null", b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"[" * 10_000),
    *(b'{"a":' * 10_000, b"-", b"\xe2\x80\xa8", b"\x80\x04\x95", b"PK\x03\x04", b" " * 5000, b"a" * 5000),
]


def mutate_bytes(content: bytes, random: Random, changes: int | None = None) -> bytes:
    """A copy with one to four changes: bits, numbers of 1 to 8 bytes, slices gone, doubled or put in, the end."""
    data = bytearray(content)
    for _ in range(changes or random.randint(1, 4)):
        at, length = random.randint(0, len(data)), min(random.choice([1, 1, 2, 4, 8, 64, 1000]), len(data))
        kind = random.randrange(8)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            data[at : at + 1] = random.randbytes(1)
        elif kind == 2:
            size = random.choice([1, 2, 4, 8])
            order = random.choice(["little", "big"])
            data[at : at + size] = (random.choice(NUMBERS) % 256**size).to_bytes(size, order)
        elif kind == 3:
            del data[at:]
        elif kind == 4:
            del data[at : at + length]
        elif kind == 5:
            data[at:at] = random.choice(BYTES)
        elif kind == 6:
            start = random.randint(0, len(data) - length)
            data[at:at] = data[start : start + length]
        else:
            start = random.randint(0, len(data) - length)
            data[at : at + length] = data[start : start + length]
    return bytes(data)


def any_value(random: Random) -> Any:
    """A JSON value that hardly anybody expects."""
    return copy.deepcopy(random.choice(random.choice([NUMBERS, FLOATS, TEXTS, OTHERS])))


def mutate_json(value: Any, random: Random, changes: int | None = None) -> Any:
    """A copy with one to three values replaced, moved, wrapped, or gone, keys renamed or added, at any depth."""
    value = copy.deepcopy(value)
    for _ in range(changes or random.randint(1, 3)):
        places = list(_places(value))
        if not places or random.random() < 0.02:
            value = any_value(random)
            continue
        # as often near the top as deep down, where most values are
        depth = random.choice(sorted({depth for depth, _, _ in places}))
        holder, key = random.choice([(holder, key) for d, holder, key in places if d == depth])
        kind = random.randrange(8)
        if kind == 0:
            del holder[key]
        elif kind == 1:
            holder[key] = random.choice([[holder[key]], {"x": holder[key]}, str(holder[key])])
        elif kind == 2:
            _, other, name = random.choice(places)
            if name in other if isinstance(other, dict) else name < len(other):
                holder[key] = copy.deepcopy(other[name])
        elif kind == 3 and isinstance(holder, dict):
            holder[random.choice(TEXTS)] = holder.pop(key)
        elif kind == 3 and isinstance(holder, list):
            holder.insert(key, any_value(random))
        elif kind == 4 and isinstance(holder[key], (int, float)):
            holder[key] = random.choice(
                [-holder[key], holder[key] + 1, holder[key] - 1, float(holder[key]), holder[key] * 7]
            )
        else:
            holder[key] = any_value(random)
    return value


def _places(value: Any, depth: int = 0) -> Any:
    """Where values are: (depth, the dictionary or list, key or index)."""
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield depth, value, key
            yield from _places(value[key], depth + 1)


def json_bytes(value: Any, random: Random) -> bytes:
    """`value` as a JSON file, now and then in another encoding, with a key twice, or damaged."""
    text = json.dumps(value)
    kind = random.randrange(24)
    if kind == 0:
        return b"\xef\xbb\xbf" + text.encode()
    if kind == 1:
        return text.encode(random.choice(["utf-16", "utf-16-le", "utf-32"]))
    if kind == 2 and isinstance(value, dict) and value:
        return (text[:-1] + ", " + json.dumps({random.choice(list(value)): any_value(random)})[1:]).encode()
    return mutate_bytes(text.encode(), random) if kind < 8 else text.encode()


def attack(
    name: str, make: Callable[[Random], object], reader: Callable[[], object], tries: int | range = TRIES
) -> int:
    """Let `make` write and `reader` read, `tries` times; returns how many were read without a complaint.

    Every try ends in success or a `UserError` of one line, in time and within memory: anything else fails, with the
    number that repeats it: `attack(...)` with `tries=range(n, n + 1)`.
    """
    read, handler = 0, signal.signal(signal.SIGALRM, too_long)
    held = reset_peak()
    try:
        numbers = tries if isinstance(tries, range) else range(tries)
        for number in numbers:
            make(Random(f"{name} {number}"))
            message = "one line"
            signal.alarm(MAX_SECONDS)
            try:
                reader()
                read += 1
            except UserError as error:
                message = str(error)
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # also what comes of a panic in a library's Rust
                raise AssertionError(f"{name}, try {number}: {type(error).__name__}: {str(error)[:500]}") from error
            finally:
                signal.alarm(0)
            assert len(message.splitlines()) == 1, f"{name}, try {number}: no single line: {message}"
            assert len(message) < 1000, f"{name}, try {number}: {len(message):,} characters"
            assert peak_bytes() - held < MAX_BYTES, f"{name}, try {number}: {peak_bytes() - held:,} bytes"
    finally:
        signal.signal(signal.SIGALRM, handler)
    print(f"{name}: {len(numbers)} tries, {read} read, the others refused in one line")
    return read
