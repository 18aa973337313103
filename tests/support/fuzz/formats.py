"""Damage that knows a format: each takes a sound file and gives one that lies about something."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from random import Random

from support.fuzz.mutations import INTEGERS, NAMES, damaged_bytes, damaged_json, hostile_value

YAML_BITS = (
    "&a", "*a", "<<: *a", "<<: {a: 1}", "!!python/object/apply:os.system ['true']", "!!python/name:os.system",
    "!!binary aGk=", "!!set {a}", "!!omap [a: 1]", "!!int ''", "!!bool maybe", "!!timestamp x", "!!null x", "!x y",
    "? ", "- ", "- - - -", "%YAML 9.9", "%TAG ! !!", "---", "...", "\t", "\0", "\x85", "\ufeff", "\u2028", "\r", "#",
    "|", ">", "|9", "'", '"', '"\\ud800"', '"\\x00"', "{", "}", "[", "]", ",", ": ", "{a: 1, a: 2}", "[" * 300,
    "{a: " * 300, "[" * 3000, "- " * 500, "1:1:1", "1:" * 50 + "1", "1" + ":59" * 5000,
    "0x" + "f" * 5000, "0b" + "1" * 5000,
    "1" + "0" * 400, "1" + "0" * 5000, ".nan", ".inf", "-.inf", "1e400", "2024-13-45",
    "2024-01-01", "~", "null", "yes", "0o7",
    "017", "1_000", "@", "`", "%", "=", "é", "a: b: c",
)  # fmt: skip
CSV_BITS = (
    ",", '"', '""', "\r", "\n", "\r\n", "\0", ";", "\t", "'", "a" * 140_000, "," * 500, "\ufeff", "\u2028", "positive",
    "prompt", '"a\nb"',
)  # fmt: skip


def damaged_text(random: Random, data: bytes, bits: tuple[str, ...]) -> bytes:
    """Lines moved, doubled and removed, and ``bits`` of the format where they do not belong."""
    lines = data.decode("utf-8", "surrogatepass").split("\n")
    for _ in range(random.choice((1, 1, 2, 3))):
        at, step = random.randrange(len(lines)), random.randrange(8)
        line = lines[at]
        column = random.randrange(len(line) + 1)
        if step == 0 and len(lines) > 1:
            del lines[at]
        elif step == 1:
            lines.insert(at, line)
        elif step == 2:
            lines[at] = " " * random.randrange(5) + line.lstrip()
        elif step == 3:
            lines[at], lines[-1] = lines[-1], line
        elif step == 4:
            lines[at] = line[:column]
        elif step == 5 and ":" in line:
            lines[at] = line.partition(":")[0] + ": " + random.choice(bits)
        else:
            lines[at] = line[:column] + random.choice(bits) + line[column:]
    raw = "\n".join(lines).encode("utf-8", "surrogatepass")
    return raw.replace(b"\n", b"\r\n") if random.random() < 0.03 else raw


def damaged_safetensors(random: Random, data: bytes) -> bytes:
    """A header that lies about dtypes, shapes, offsets or its own length."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    text = damaged_json(random, header) if random.random() < 0.9 else json.dumps(header).encode()
    if random.random() < 0.2:
        body = damaged_bytes(random, body)
    stated = len(text) if random.random() < 0.9 else random.choice(INTEGERS)
    if random.random() < 0.1:
        text = text + b" " * random.randrange(9)
    return (stated % 2**64).to_bytes(8, "little") + text + body


_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def _gguf_fields(data: bytes) -> Iterator[tuple[int, int]]:
    """Where the numbers of a GGUF file's header lie: offset and width; of one that lies, some more than there are."""
    yield from ((4, 4), (8, 8), (16, 8))
    tensors, entries = struct.unpack_from("<QQ", data, 8)
    at = 24
    for _ in range(entries):
        yield at, 8
        at += 8 + int.from_bytes(data[at : at + 8], "little")
        yield at, 4
        kind = int.from_bytes(data[at : at + 4], "little")
        at, count = at + 4, 1
        if kind == 9:
            yield from ((at, 4), (at + 4, 8))
            kind, count = struct.unpack_from("<IQ", data, at)
            at += 12
        for _ in range(min(count, 100)):
            yield at, _WIDTHS.get(kind, 8)
            at += _WIDTHS.get(kind) or 8 + int.from_bytes(data[at : at + 8], "little")
    for _ in range(tensors):
        yield at, 8
        at += 8 + int.from_bytes(data[at : at + 8], "little")
        yield at, 4
        rank = int.from_bytes(data[at : at + 4], "little")
        at += 4
        for _ in range(min(rank, 4)):
            yield at, 8
            at += 8
        yield from ((at, 4), (at + 4, 8))
        at += 12


def damaged_gguf(random: Random, data: bytes) -> bytes:
    """Counts, lengths, types, shapes and offsets that lie."""
    fields = [*islice(_gguf_fields(data), 4000)]
    raw = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 3))):
        at, width = random.choice(fields)
        old = int.from_bytes(raw[at : at + width], "little")
        new = random.choice((old + 1, old - 1, old * 2, old ^ 1, 0, random.randrange(43), *random.sample(INTEGERS, 6)))
        raw[at : at + width] = (new % (1 << (8 * width))).to_bytes(width, "little")
    if random.random() < 0.1:
        return damaged_bytes(random, bytes(raw))
    return bytes(raw)


def damaged_zip(random: Random, data: bytes) -> bytes:
    """The members of a zip file changed, under check sums that hold again."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for _ in range(random.choice((1, 1, 2))):
        pickles = [name for name in members if name.endswith(".pkl")] or list(members)
        if not pickles:
            break
        name = random.choice(pickles if random.random() < 0.8 else list(members))
        members[name] = damaged_bytes(random, members[name])
        if random.random() < 0.1:
            members[random.choice(NAMES)[:200].replace("\0", "").encode(errors="replace").decode()] = members.pop(name)
    target = io.BytesIO()
    packing = zipfile.ZIP_DEFLATED if random.random() < 0.2 else zipfile.ZIP_STORED
    with zipfile.ZipFile(target, "w", packing) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name or "x"), content)
    return target.getvalue()


def _json(random: Random, data: bytes) -> bytes:
    return damaged_json(random, json.loads(data))


def _json_lines(random: Random, data: bytes) -> bytes:
    lines = data.split(b"\n")
    at = random.randrange(len(lines))
    if random.random() < 0.2:
        lines[at : at + 1] = [damaged_bytes(random, lines[at])] * random.choice((0, 1, 2, 30))
    else:
        lines[at] = _json(random, lines[at])
    return b"\n".join(lines)


def _yaml(random: Random, data: bytes) -> bytes:
    if data.startswith(b"{") and random.random() < 0.7:
        return _json(random, data)
    return damaged_text(random, data, YAML_BITS)


def _csv(random: Random, data: bytes) -> bytes:
    return damaged_text(random, data, CSV_BITS)


_BY_SUFFIX: Mapping[str, Callable[[Random, bytes], bytes]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".yaml": _yaml,
    ".csv": _csv,
    ".safetensors": damaged_safetensors,
    ".gguf": damaged_gguf,
    ".pt": damaged_zip,
    ".bin": damaged_zip,
}


def damaged_file(random: Random, name: str, data: bytes) -> bytes:
    """A file of the kind that its name says, damaged in a way of that format, or in its bytes."""
    if random.random() < 0.02:
        return random.choice((b"", b"\0", b"{}", b"[]", b"null", data[:1], json.dumps(hostile_value(random)).encode()))
    suffix = name[name.rindex(".") :] if "." in name else ""
    known = _BY_SUFFIX.get(suffix)
    if known is None or random.random() < 0.25:
        return damaged_bytes(random, data)
    try:
        return known(random, data)
    except Exception:
        # A file of the corpus may be damaged beyond what is understood here.
        return damaged_bytes(random, data)
