"""Bad pictures by the thousand: each made from its number alone, so that one can be made again without the others."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass

from tests.fuzzing import anatomy
from tests.fuzzing.bombs import bomb
from tests.fuzzing.seeds import TYPES, Seed, seeds

_NUMBERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
"""What a length, a count, an offset or a side should not be."""
_FOREIGN = (b"%PDF-1.7\n", b"PK\3\4" + bytes(26), b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"MZ" + bytes(62))


@dataclass(frozen=True)
class Specimen:
    """A file, and how it came about. `format` is that of the seed; `content_type` need not fit it."""

    number: int
    format: str
    seed: str
    mutation: str
    content_type: str
    data: bytes


def specimen(corpus: int, number: int) -> Specimen:
    """File `number` of the corpus with the seed `corpus`. One in twenty is a bomb, in turn."""
    chance = random.Random(f"{corpus}:{number}")
    if number % 20 == 19:
        start, names = bomb(corpus, number // 20), ["bomb"]
        data = start.data
    else:
        start = seeds()[(corpus + number) % len(seeds())]
        data, names = start.data, []
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            mutate = chance.choice(MUTATIONS)
            data = mutate(start, data, chance)
            names.append(mutate.__name__.strip("_"))
        if chance.random() < 0.8:  # else nothing behind the checksum would ever be read
            data = anatomy.with_checksums(start.format, data)
    content_type = TYPES[start.format] if chance.random() < 0.8 else chance.choice(sorted(set(TYPES.values())))
    return Specimen(number, start.format, start.name, " + ".join(names), content_type, data or b"\0")


def _parts(seed: Seed, data: bytes) -> list[anatomy.Piece]:
    """The parts of what an earlier mutation may have left in any state."""
    try:
        return anatomy.parts(seed.format, data)
    except (struct.error, IndexError):
        return []


def _part(seed: Seed, data: bytes, chance: random.Random) -> anatomy.Piece:
    return chance.choice(_parts(seed, data) or [anatomy.Piece(0, min(len(data), 64), "big")])


# ---- blind ----


def _flip_bits(_: Seed, data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _bit in range(chance.choice((1, 2, 8, 64)) if data else 0):
        changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _overwrite(_: Seed, data: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(data) + 1)
    length = chance.choice((1, 4, 64, 1024))
    new = chance.choice((bytes(length), b"\xff" * length, chance.randbytes(length)))
    return data[:start] + new + data[start + length :]


def _cut(_: Seed, data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(1, len(data) + 1)] if data else data


def _cut_out(_: Seed, data: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(data) + 1)
    return data[:start] + data[start + chance.choice((1, 2, 16, 500)) :]


def _repeat(_: Seed, data: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(data) + 1)
    end = min(len(data), start + chance.choice((1, 16, 500)))
    return data[:start] + data[start:end] * chance.choice((2, 100)) + data[end:]


def _splice(_: Seed, data: bytes, chance: random.Random) -> bytes:
    other = chance.choice(seeds()).data
    return data[: chance.randrange(len(data) + 1)] + other[chance.randrange(len(other)) :]


def _surround(_: Seed, data: bytes, chance: random.Random) -> bytes:
    foreign = chance.choice((*_FOREIGN, chance.randbytes(100), chance.choice(seeds()).data))
    return foreign + data if chance.random() < 0.3 else data + foreign


def _swap_signature(_: Seed, data: bytes, chance: random.Random) -> bytes:
    length = chance.choice((2, 4, 8, 16))
    return chance.choice(seeds()).data[:length] + data[length:]


# ---- of the structure ----


def _lie(seed: Seed, data: bytes, chance: random.Random) -> bytes:
    """Change numbers at the beginning of parts: lengths, sides, counts, offsets, tags, types."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4))):
        part = _part(seed, data, chance)
        width = chance.choice((1, 2, 4))
        place = part.start + chance.randrange(max(1, min(part.end - part.start, 40)))
        old = int.from_bytes(changed[place : place + width], part.order)
        new = chance.choice((*_NUMBERS, old + 1, old - 1, old * 2, len(data), part.start, chance.getrandbits(32)))
        changed[place : place + width] = (new % 256**width).to_bytes(width, part.order)
    return bytes(changed)


def _drop_part(seed: Seed, data: bytes, chance: random.Random) -> bytes:
    part = _part(seed, data, chance)
    return data[: part.start] + data[part.end :]


def _multiply_part(seed: Seed, data: bytes, chance: random.Random) -> bytes:
    part = _part(seed, data, chance)
    return data[: part.end] + data[part.start : part.end] * chance.choice((1, 2, 50)) + data[part.end :]


def _move_part(seed: Seed, data: bytes, chance: random.Random) -> bytes:
    part = _part(seed, data, chance)
    rest = data[: part.start] + data[part.end :]
    place = chance.choice([0, len(rest), *(other.start for other in _parts(seed, rest))])
    return rest[:place] + data[part.start : part.end] + rest[place:]


def _cut_at_part(seed: Seed, data: bytes, chance: random.Random) -> bytes:
    """In the places where readers expect something else: around a part's beginning and end."""
    part = _part(seed, data, chance)
    return data[: max(1, chance.choice((part.start, part.end)) + chance.randrange(-2, 10))]


def _flip_in_part(seed: Seed, data: bytes, chance: random.Random) -> bytes:
    part = _part(seed, data, chance)
    return data[: part.start] + _flip_bits(seed, data[part.start : part.end], chance) + data[part.end :]


def _transplant(seed: Seed, data: bytes, chance: random.Random) -> bytes:
    """Put in a part of another file of the same format."""
    donor = chance.choice([other for other in seeds() if other.format == seed.format])
    new, place = _part(donor, donor.data, chance), _part(seed, data, chance)
    end = chance.choice((place.start, place.end))  # beside what is there, or in its place
    return data[: place.start] + donor.data[new.start : new.end] + data[end:]


MUTATIONS: tuple[Callable[[Seed, bytes, random.Random], bytes], ...] = (
    *(_flip_bits, _overwrite, _cut, _cut_out, _repeat, _splice, _surround, _swap_signature),
    *(_lie, _lie, _lie, _lie, _drop_part, _multiply_part, _move_part, _cut_at_part, _flip_in_part, _transplant),
)
"""Each draws on nothing but its arguments. Lies are the most promising, so there are more of them."""
