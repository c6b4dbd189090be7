"""The header of a GGUF file, byte by byte.

transformers and the package gguf take ten seconds for it where a vocabulary is large, and map tensors that are not
there. Arrays, such as the vocabulary, are stepped over here.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasttrace.errors import ModelError, first_line
from fasttrace.models.checkpoints import what_is_wrong

__all__ = ["Header", "read_header"]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALARS = dict(enumerate(("B", "b", "H", "h", "I", "i", "f", "?"))) | {10: "Q", 11: "q", 12: "d"}
"""Kinds of values, by struct's letters."""
TEXT, ARRAY = 8, 9
LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself.

    Attributes:
        values: numbers and texts by key; of arrays how many items they have.
        tensors: name, number of weights, type (a number of ggml's) and offset in bytes of each.
        start: byte at which the tensors begin.
    """

    values: Mapping[str, Any]
    tensors: tuple[tuple[str, int, int, int], ...]
    start: int

    @property
    def architecture(self) -> str:
        """Such as "llama"; empty where the file does not say."""
        return str(self.values.get("general.architecture", ""))

    @property
    def weights(self) -> int:
        """How many there are."""
        return sum(count for _, count, _, _ in self.tensors)


def read_header(path: Path, name: str) -> Header:
    """All of a GGUF file but its tensors.

    Args:
        path: the file.
        name: the model's, for messages.

    Raises:
        ModelError: it is not a GGUF file, or is cut short.
    """
    if wrong := what_is_wrong(path):
        raise ModelError(f"{name} {wrong}")
    with path.open("rb") as file:
        if (begin := file.read(len(MAGIC))) != MAGIC:
            raise ModelError(f"{name} is not a GGUF file: it begins with {begin!r}, expected {MAGIC!r}")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _Reader(data).header()
            except (struct.error, OverflowError):  # beyond the end
                raise ModelError(f"{name} is damaged or cut short within its header: fetch it again") from None
            except (ValueError, RecursionError) as error:
                raise ModelError(f"{name} cannot be read: {first_line(error)}") from None


class _Reader:
    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, len(MAGIC)

    def header(self) -> Header:
        version = self.number("I")
        if version not in VERSIONS:
            raise ValueError(f"it is GGUF of version {version}, expected {' or '.join(map(str, VERSIONS))}")
        tensors, values = self.number("Q"), self.number("Q")
        found = {self.text(): self.value(self.number("I")) for _ in range(values)}
        described = tuple(self.tensors(tensors))
        alignment = found.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"its general.alignment is {alignment!r}, expected a number of bytes")
        return Header(found, described, -(-self.at // alignment) * alignment)

    def tensors(self, count: int) -> Iterator[tuple[str, int, int, int]]:
        for _ in range(count):
            name = self.text()
            shape = [self.number("Q") for _ in range(self.number("I"))]
            yield name, math.prod(shape), self.number("I"), self.number("Q")

    def number(self, letter: str) -> Any:
        (found,) = struct.unpack_from(f"<{letter}", self.data, self.at)
        self.at += struct.calcsize(f"<{letter}")
        return found

    def text(self) -> str:
        begin = self.skip_text()
        return self.data[begin : self.at].decode("utf-8", errors="replace")

    def skip_text(self) -> int:
        """Goes behind a text and gives its first byte's place."""
        begin = self.at + LENGTH.size
        self.at = begin + LENGTH.unpack_from(self.data, self.at)[0]
        if self.at > len(self.data):
            raise struct.error("a text goes beyond the end")
        return begin

    def skip_texts(self, items: int) -> None:
        at, data, length = self.at, self.data, LENGTH.unpack_from
        for _ in range(items):  # hundreds of thousands, so nothing is called but this
            at += LENGTH.size + length(data, at)[0]
        self.at = at

    def value(self, kind: int) -> Any:
        if kind == TEXT:
            return self.text()
        if kind != ARRAY:
            return self.number(_letter(kind))
        kind, items = self.number("I"), self.number("Q")
        if kind == ARRAY:
            raise ValueError("it has arrays of arrays, which no known file has")
        if kind == TEXT:
            self.skip_texts(items)
        else:
            self.at += items * struct.calcsize(f"<{_letter(kind)}")
        return items


def _letter(kind: int) -> str:
    if kind not in SCALARS:
        raise ValueError(f"it has a value of the unknown kind {kind}")
    return SCALARS[kind]
