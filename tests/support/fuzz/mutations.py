"""Damage to bytes and to JSON: seeded, small, and of the kinds that break readers."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

OUTSIDE = "@OUTSIDE@"
"""Stands for the folder around a case, which holds files that no reader may open."""

INTEGERS = (
    0, 1, 2, 7, 8, 9, 31, 32, 63, 64, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32,
    2**40, 2**53 + 1, 2**60, 2**62, 2**63 - 1, 2**63, 2**64 - 1,
)  # fmt: skip

NAMES = (
    "", ".", "..", "/", "../secret.safetensors", "../secret.json", "../../x", f"{OUTSIDE}/secret.safetensors",
    f"{OUTSIDE}/secret.json", "a/b", "a\\b", "~", "~nobody/x", "x" * 300, "é" * 200, "\0", "a\0b.safetensors",
    "\ud800", "\u202e", "\n", "-", "*", "con", "steering.json", "model.safetensors", "steering.safetensors",
    "config.json", "file:///etc/passwd", "hf://datasets/x", "%s%n", "{0}", "$(id)", "\x1b[2J", "F32", "BF16", "I4",
)  # fmt: skip

# Text that `json.dumps` would never write, put in place of a value.
RAW = (
    "NaN", "Infinity", "-Infinity", "-0", "-0.0", "1e999", "-1e999", "1e-999", "1" + "0" * 400, "1" + "0" * 5000,
    "-1" + "0" * 400, "0.1e1", "01", "0x10", "1_000", "'a'", "tru", "", "[", "]", "{", '{"a":1,"a":2}', '"\\ud800"',
    '"\\udc00\\ud800"', '"\\u0000"', '"\t"', '"\\x"', '"', "[" * 300 + "]" * 300, "[" * 900 + "]" * 900,
    '{"a":' * 450 + "1" + "}" * 450, "[" * 100_000, '{"a":' * 50_000,
    "[" + "1," * 3000 + "1]", '"' + "x" * 20_000 + '"',
)  # fmt: skip
_MARK = "@RAW%d@"


def damaged_bytes(random: Random, data: bytes, others: tuple[bytes, ...] = ()) -> bytes:
    """One to four changes; ``others`` are spliced in."""
    raw = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 3, 4))):
        at = random.randrange(len(raw) + 1)
        step = random.randrange(10)
        if step == 0:
            del raw[at:]
        elif step == 1 and raw:
            raw[at % len(raw)] ^= 1 << random.randrange(8)
        elif step == 2 and raw:
            raw[at % len(raw)] = random.randrange(256)
        elif step in (3, 4):
            width = random.choice((1, 2, 4, 8))
            number = random.choice(INTEGERS) + random.choice((0, 0, 0, 1, -1))
            place = at // width * width if random.random() < 0.5 else at
            order = "little" if random.random() < 0.8 else "big"
            raw[place : place + width] = (number % (1 << (8 * width))).to_bytes(width, order)
        elif step == 5:
            raw[at:at] = random.randbytes(random.choice((1, 2, 8, 40)))
        elif step == 6:
            del raw[at : at + random.choice((1, 2, 4, 8, 64))]
        elif step == 7:
            length = random.choice((1, 8, 32, 200))
            start = random.randrange(len(raw) + 1)
            raw[at:at] = raw[start : start + length]
        elif step == 8:
            other = random.choice(others) if others else bytes(raw)
            start = random.randrange(len(other) + 1)
            raw[at:] = other[start:]
        else:
            word = random.choice(NAMES).encode("utf-8", "surrogatepass")
            raw[at : at + random.choice((0, len(word)))] = word
    return bytes(raw)


def damaged_json(random: Random, value: Any) -> bytes:
    """A document of JSON with one to three nodes replaced, removed, renamed or doubled."""
    value = _copy(value)
    raws: list[str] = []
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        value = _changed(random, value, raws)
    text = json.dumps(value)
    for number, raw in enumerate(raws):
        text = text.replace(f'"{_MARK % number}"', raw)
    if random.random() < 0.05:
        text = random.choice(("\ufeff", " ", "\n", "//", "\0")) + text
    if random.random() < 0.05:
        text += random.choice((" ", "x", "{}", "\0", ","))
    return text.encode("utf-8")


def hostile_value(random: Random, raws: list[str] | None = None) -> Any:
    """A value of a kind that was not expected."""
    if raws is not None and random.random() < 0.35:
        raws.append(random.choice(RAW))
        return _MARK % (len(raws) - 1)
    choices: tuple[Callable[[], Any], ...] = (
        lambda: random.choice(NAMES),
        lambda: random.choice(INTEGERS) * random.choice((1, 1, -1)),
        lambda: random.choice((None, True, False, 0.5, -1.5, 1e308, 1e-320)),
        lambda: random.choice(([], {}, [[]], [{}], {"": None}, [None], ["a", "b"], [0], {"a": {"b": {}}}, [1, 2, 3])),
    )
    return random.choice(choices)()


def _changed(random: Random, root: Any, raws: list[str]) -> Any:
    places = list(_places(root, ()))
    path = random.choice(places)
    if not path:
        return hostile_value(random, raws) if random.random() < 0.3 or not places[1:] else root
    parent = root
    for step in path[:-1]:
        parent = parent[step]
    last, what = path[-1], random.randrange(10)
    old = parent[last]
    if what < 5:
        parent[last] = hostile_value(random, raws)
    elif what == 5:
        del parent[last]
    elif what == 6:
        others = random.choice(places)
        donor = root
        for step in others:
            donor = donor[step]
        parent[last] = _copy(donor)
    elif what == 7 and isinstance(parent, dict):
        parent[random.choice((*NAMES, *map(str, parent)))] = parent.pop(last)
    elif what == 8 and isinstance(old, (int, float)) and not isinstance(old, bool):
        parent[last] = random.choice((old + 1, old - 1, -old, old * 2, old * 2**32, old + 0.5, bool(old), str(old)))
    elif isinstance(parent, list):
        parent.insert(last, _copy(old))
    else:
        parent[last] = random.choice(([old], {"a": old}, str(old), [old, old]))
    return root


def _places(value: Any, path: tuple[Any, ...]) -> Any:
    yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _places(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _places(item, (*path, index))


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value
