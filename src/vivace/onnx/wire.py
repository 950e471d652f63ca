"""Weights stay in the file: the wire format is scanned, and large tensors are left out of what is parsed.

`skeleton` copies a serialized ModelProto without the `raw_data` of large initializers and Constant nodes, which it
marks as external data at an offset of the model's own file. Parsing then takes little memory, the weights are mapped
like other external data, and a file may exceed the 2 GiB that protobuf can parse. Those of nested graphs are parsed.
The file must not change while a graph made from it is in use.
A file that is not shaped as expected is returned whole: the parser will say what is wrong with it.
Source: protobuf encoding; onnx.proto (ModelProto.graph = 7, GraphProto.node = 1 and initializer = 5,
NodeProto.op_type = 4 and attribute = 5, AttributeProto.t = 5, TensorProto.raw_data = 9).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
from onnx import TensorProto

OWN_FILE = "\0model"  # no path holds a NUL, so no model can name this location by accident
_GRAPH, _NODE, _INITIALIZER, _OP_TYPE, _ATTRIBUTE, _TENSOR, _RAW_DATA = 7, 1, 5, 4, 5, 5, 9
_MIN_BYTES = 4096
_PARSER_LIMIT_BYTES = 1 << 31

Parts = Iterable[bytes | memoryview]
Rewrite = Callable[[memoryview, int, int], Parts | None]  # None: keep the message as it is
Field = tuple[int, int, int, int]  # number, start of the tag, start and end of the contents


def skeleton(data: np.ndarray) -> bytes:
    """The serialized model without its large weights. Cost: proportional to the fields outside of them."""
    view = memoryview(data)  # type: ignore[arg-type]
    try:
        return b"".join(_rewritten(view, 0, len(view), {_GRAPH: _graph}))
    except (ValueError, IndexError):
        return bytes(view) if len(view) < _PARSER_LIMIT_BYTES else b""


def _rewritten(view: memoryview, start: int, end: int, rewrites: Mapping[int, Rewrite]) -> Parts:
    """The fields of a message, those named rewritten, the others copied in runs."""
    run = start
    for number, tag, begin, stop in _fields(view, start, end):
        if number not in rewrites or begin == tag:
            continue
        parts = rewrites[number](view, begin, stop)
        if parts is not None:
            parts = list(parts)
            yield view[run:tag]
            yield _prefix(number, sum(map(len, parts)))
            yield from parts
            run = stop
    yield view[run:end]


def _graph(view: memoryview, start: int, end: int) -> Parts:
    return _rewritten(view, start, end, {_INITIALIZER: _tensor, _NODE: _node})


def _node(view: memoryview, start: int, end: int) -> Parts | None:
    if end - start < _MIN_BYTES:
        return None
    op_type = [bytes(view[begin:stop]) for number, _, begin, stop in _fields(view, start, end) if number == _OP_TYPE]
    return _rewritten(view, start, end, {_ATTRIBUTE: _attribute}) if op_type == [b"Constant"] else None


def _attribute(view: memoryview, start: int, end: int) -> Parts:
    return _rewritten(view, start, end, {_TENSOR: _tensor})


def _tensor(view: memoryview, start: int, end: int) -> Parts | None:
    """A tensor with its raw data marked as external, or None to keep it as it is."""
    raw = [f for f in _fields(view, start, end) if f[0] == _RAW_DATA]
    if len(raw) != 1 or raw[0][3] - raw[0][2] < _MIN_BYTES:
        return None
    _, tag, begin, stop = raw[0]
    mark = TensorProto(data_location=TensorProto.EXTERNAL)
    for key, value in (("location", OWN_FILE), ("offset", begin), ("length", stop - begin)):
        mark.external_data.add(key=key, value=str(value))
    return [view[start:tag], view[stop:end], mark.SerializeToString()]


def _fields(view: memoryview, start: int, end: int) -> Iterator[Field]:
    """The fields of a message; numbers that are no messages or bytes have no contents (begin == tag)."""
    at = start
    while at < end:
        tag = at
        key, at = _varint(view, at)
        kind = key & 7
        if kind == 2:
            length, begin = _varint(view, at)
            at = begin + length
            if at > end:
                raise ValueError
            yield key >> 3, tag, begin, at
            continue
        if kind == 0:
            _, at = _varint(view, at)
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise ValueError
        yield key >> 3, tag, tag, at
    if at != end:
        raise ValueError


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = view[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError


def _prefix(number: int, length: int) -> bytes:
    return _encoded(number << 3 | 2) + _encoded(length)


def _encoded(n: int) -> bytes:
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    out.append(n)
    return bytes(out)
