"""Seeded damage, as disks, downloads and editors do it, and `attack`, which tries readers.

A target is a pair of functions: `make(random)` writes a damaged file, `reader()` reads it.
FUZZ_TRIES is the number of tries for each; a failure names the number that repeats it.
"""

import copy
import json
import os
from collections.abc import Callable
from random import Random
from typing import Any

from lit_llama import UserError

TRIES = int(os.environ.get("FUZZ_TRIES", 12))
TEXTS = ["", " ", "0", "-1", "\n", "é", "../x", "none", "null", "(", "[", "{}", "%s", "{{ 7 * 7 }}"]
BYTES = [b"\0" * 8, b"\xff\xfe", b"\xef\xbb\xbf", b"\r\n", b'"', b"{", b",", b"null", b"<html>"]


def mutate_bytes(content: bytes, random: Random) -> bytes:
    """Damage a file: cut off, zeros, a block from elsewhere, a flipped bit, foreign bytes, CRLF."""
    data = bytearray(content)
    at, size = random.randrange(len(data)), random.choice([1, 16, 512, 4096])
    other = random.randrange(len(data))
    kind = random.randrange(6)
    if kind == 0:
        del data[at:]
    elif kind == 1:
        data[at : at + size] = bytes(len(data[at : at + size]))
    elif kind == 2:
        data[at : at + size] = data[other : other + size]
    elif kind == 3:
        data[at] ^= 1 << random.randrange(8)
    elif kind == 4:
        data[at:at] = random.choice(BYTES)
    else:
        data = data.replace(b"\n", b"\r\n")
    return bytes(data)


def mutate_json(value: Any, random: Random) -> Any:
    """Damage a JSON value: one item somewhere in it is removed, null, text, or in a list."""
    value = copy.deepcopy(value)
    holder, key = random.choice(list(_items(value)))
    kind = random.randrange(5)
    if kind == 0:
        del holder[key]
    elif kind == 1:
        holder[key] = None
    elif kind == 2:
        holder[key] = str(holder[key])
    elif kind == 3:
        holder[key] = [holder[key]]
    else:
        holder[key] = random.choice([*TEXTS, 3, 0.5, True, {}, []])
    return value


def _items(value: Any) -> Any:
    """Yield each dictionary or list in a value, with each key or index of it."""
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _items(value[key])


def json_bytes(value: Any, random: Random) -> bytes:
    """Write a value as JSON, now and then in another encoding, or damaged."""
    text = json.dumps(value, indent=random.choice([None, 2]))
    kind = random.randrange(8)
    if kind == 0:
        return text.encode(random.choice(["utf-8-sig", "utf-16"]))
    return mutate_bytes(text.encode(), random) if kind < 4 else text.encode()


def attack(
    name: str,
    make: Callable[[Random], object],
    reader: Callable[[], object],
    tries: int | range = TRIES,
) -> int:
    """Write and read damaged files; return how many were read without a complaint.

    Each try ends well or in a `UserError` of one line. `tries=range(n, n + 1)` repeats the try n.
    """
    read = 0
    for number in range(tries) if isinstance(tries, int) else tries:
        make(Random(f"{name} {number}"))
        message = "one line"
        try:
            reader()
            read += 1
        except UserError as error:
            message = str(error)
        except Exception as error:
            kind = type(error).__name__
            raise AssertionError(f"{name}, try {number}: {kind}: {str(error)[:500]}") from error
        assert len(message.splitlines()) == 1, f"{name}, try {number}: {message}"
    print(f"{name}: {tries} tries, {read} read, the others refused in one line")
    return read
