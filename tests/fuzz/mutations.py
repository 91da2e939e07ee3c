"""Random damage to bytes and to JSON."""

import copy
import json
import random

# What takes the place of a part of a JSON value.
STRANGE = (
    None, True, False, -1, 0, 1, 2, 2.5, 2**31, 2**63, 10**18, -(10**30), 1e308, "", "0", "x" * 300,
    "../x", "os.system", "\u0000", [], {}, [[]], [0], [-1, "a"], {"a": 1}, {"module": "os.system"},
)  # fmt: skip
# Stands for lists that are nested more deeply than Python's JSON writer could write them.
_DEEP = "<deep>"
_DEPTH = 5000


def damage_bytes(rng: random.Random, blob: bytes) -> bytes:
    """Flip, cut, insert, repeat, or clear a part."""
    data = bytearray(blob)
    for _ in range(rng.choice((1, 1, 2, 8))):
        start = rng.randrange(len(data) + 1)
        size = rng.choice((1, 1, 2, 8, 64))
        match rng.randrange(5):
            case 0 if start < len(data):
                data[start] ^= 1 << rng.randrange(8)
            case 1:
                del data[start:]
            case 2:
                data[start:start] = rng.randbytes(size)
            case 3:
                data[start:start] = data[start : start + size]
            case _:
                data[start : start + size] = bytes(len(data[start : start + size]))
    return bytes(data)


def damage_json(rng: random.Random, value: object) -> object:
    """Replace, remove, repeat, or rename parts of a JSON value."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        value = _damage_once(rng, value)
    return value


def damage_text(rng: random.Random, text: str) -> str:
    """Damage JSON text, as JSON or as text."""
    if rng.random() < 0.2:
        return damage_bytes(rng, text.encode()).decode(errors="replace")
    damaged = json.dumps(damage_json(rng, json.loads(text)))
    return damaged.replace(f'"{_DEEP}"', "[" * _DEPTH + "]" * _DEPTH)


def _damage_once(rng: random.Random, value: object) -> object:
    places: list[tuple[dict | list, str | int]] = []
    if isinstance(value, dict | list):
        _list_places(value, places)
    if not places:
        return copy.deepcopy(rng.choice(STRANGE))
    parent, key = rng.choice(places)
    old = parent[key]
    match rng.randrange(8):
        case 0:
            del parent[key]
        case 1 if isinstance(parent, dict):
            parent[f"{key}2"] = parent.pop(key)
        case 1 | 2 if isinstance(parent, list):
            parent.insert(key, copy.deepcopy(old))
        case 3:
            other, place = rng.choice(places)
            parent[key] = json.loads(json.dumps(other[place]))
        case 4 if isinstance(old, int | float) and not isinstance(old, bool):
            parent[key] = rng.choice((old + 1, old - 1, -old, 1000 * old, 10**9 * old))
        case 5 if rng.random() < 0.1:
            parent[key] = _DEEP
        case _:
            parent[key] = copy.deepcopy(rng.choice(STRANGE))
    return value


def _list_places(value: object, places: list[tuple[dict | list, str | int]]) -> None:
    items = value.items() if isinstance(value, dict) else enumerate(value)  # type: ignore
    for key, item in list(items):
        places.append((value, key))  # type: ignore
        if isinstance(item, dict | list):
            _list_places(item, places)
