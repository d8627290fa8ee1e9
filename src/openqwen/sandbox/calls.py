"""Calls between the checker and the program, two processes that do not trust each other.

Messages are JSON with a length before them. Plain values cross by value: an instance of a subclass
of `int`, `str`, `list` … crosses as that type, so that no method of the program decides a
comparison in the checker. Everything else crosses as a handle; its methods run in the process that
owns the object. A handle equals only itself, whatever the object's `__eq__` would say.
"""

import builtins
import json
import os
import struct
from collections import deque
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

_LARGEST = 1 << 26  # bytes of a message
_LISTS: tuple[Any, ...] = (list, tuple, set, frozenset, deque)


class RemoteError(Exception):
    """The other side ended, or it sent an invalid message."""


class Handle:
    """An object of the other side."""

    def __init__(self, peer: "Peer", number: int):
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_number", number)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._peer.ask("call", self._number, list(args), kwargs)

    def __getattr__(self, name: str) -> Any:
        return self._peer.ask("getattr", self._number, [name], {})

    def __setattr__(self, name: str, value: Any) -> None:
        self._peer.ask("setattr", self._number, [name, value], {})

    def __getitem__(self, key: Any) -> Any:
        return self._peer.ask("getitem", self._number, [key], {})

    def __len__(self) -> int:
        return int(self._peer.ask("len", self._number, [], {}))

    def __str__(self) -> str:
        return str(self._peer.ask("str", self._number, [], {}))

    def __iter__(self) -> Iterator[Any]:
        iterator = self._peer.ask("iter", self._number, [], {})
        while True:
            try:
                yield self._peer.ask("next", iterator._number, [], {})
            except StopIteration:
                return

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Handle) and other._number == self._number

    def __hash__(self) -> int:
        return hash(self._number)

    def __bool__(self) -> bool:
        return True


class Peer:
    """One end of the connection.

    names: what the other side may ask for by name; without it (the checker) the other side may
    only call the functions that it was given as arguments, and see nothing of them.
    """

    def __init__(self, descriptor: int, names: dict[str, Any] | None = None):
        self._descriptor, self._names = descriptor, names
        self._objects: list[Any] = []
        self._numbers: dict[int, int] = {}

    def serve(self) -> None:
        """Answer until the other side ends."""
        self._send({"names": [str(name) for name in self._names or ()]})
        while True:
            try:
                self._answer(self._receive())
            except RemoteError:
                return

    def remote_names(self) -> list[str]:
        """What the program defines, once it has run. Raises RemoteError where it ended first."""
        names = self._receive().get("names")
        if not isinstance(names, list):
            raise RemoteError("the program ended before its functions were called")
        return [name for name in names if isinstance(name, str)]

    def named(self, name: str) -> Any:
        """The program's object of that name: its value, or a handle."""
        return self.ask("name", 0, [name], {})

    def ask(self, what: str, number: int, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Send a request and wait for its answer; meanwhile answer the other side's."""
        values = [self._encode(value) for value in args]
        named = {key: self._encode(value) for key, value in kwargs.items()}
        self._send({"ask": what, "of": number, "args": values, "kwargs": named})
        while True:
            message = self._receive()
            if "value" in message:
                return self._decode(message["value"])
            if "error" in message:
                raise _error(str(message["error"]), str(message.get("text", "")))
            self._answer(message)

    def _answer(self, message: dict[str, Any]) -> None:
        try:
            args = [self._decode(value) for value in message["args"]]
            kwargs = {str(key): self._decode(value) for key, value in message["kwargs"].items()}
            value = self._do(str(message["ask"]), message["of"], args, kwargs)
            answer = {"value": self._encode(value)}
        except RemoteError:
            raise
        except Exception as error:
            answer = {"error": type(error).__name__, "text": _text(error)}
        self._send(answer)

    def _do(self, what: str, number: int, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if what == "name" and self._names is not None:
            return self._names[args[0]]
        target = self._objects[number]
        if what == "call":
            return target(*args, **kwargs)
        if self._names is None:
            raise PermissionError("functions of the checker can be called, and nothing else")
        return _ACTIONS[what](target, *args)

    def _encode(self, value: Any) -> Any:
        exact = type(value)
        if value is None or exact in (bool, str, float):
            return value
        if isinstance(value, int):
            return value if exact is int and -(2**53) < value < 2**53 else ["int", hex(int(value))]
        for base in (str, float, bytes, bytearray, complex):
            if isinstance(value, base):
                return _encode_scalar(base, value)
        for kind in _LISTS:
            if isinstance(value, kind):
                return [kind.__name__, [self._encode(item) for item in kind.__iter__(value)]]
        if isinstance(value, dict):
            pairs = dict.items(value)
            return ["dict", [[self._encode(key), self._encode(item)] for key, item in pairs]]
        if isinstance(value, range | slice):
            return [exact.__name__, [value.start, value.stop, value.step]]
        if isinstance(value, Decimal | Fraction):
            return [exact.__name__, str(value)]
        if isinstance(value, Handle) and value._peer is self:
            return ["back", value._number]
        if hasattr(value, "tolist") and hasattr(value, "dtype"):  # NumPy's numbers and arrays
            return self._encode(value.tolist())
        return ["handle", self._keep(value)]

    def _keep(self, value: Any) -> int:
        number = self._numbers.get(id(value))
        if number is None:
            number = self._numbers[id(value)] = len(self._objects)
            self._objects.append(value)
        return number

    def _decode(self, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        kind, body = value
        if kind in _PLAIN:
            return _PLAIN[kind](body)
        if kind in _CONTAINERS:
            return _CONTAINERS[kind](self._decode(item) for item in body)
        if kind == "dict":
            return {self._decode(key): self._decode(item) for key, item in body}
        if kind == "handle":
            return Handle(self, int(body))
        if kind == "back":
            return self._objects[int(body)]
        raise RemoteError(f"unknown kind of value {str(kind)[:40]!r}")

    def _send(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode()
        if len(data) > _LARGEST:
            raise ValueError("a value is too large to be passed on")
        data = struct.pack("<I", len(data)) + data
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError:
            raise RemoteError("the program ended while its functions were called") from None

    def _receive(self) -> dict[str, Any]:
        (size,) = struct.unpack("<I", self._read(4))
        if size > _LARGEST:
            raise RemoteError("the program sent too much")
        try:
            message = json.loads(self._read(size))
        except (ValueError, RecursionError):
            raise RemoteError("the program sent an invalid message") from None
        if not isinstance(message, dict):
            raise RemoteError("the program sent an invalid message")
        return message

    def _read(self, size: int) -> bytes:
        parts = []
        while size:
            try:
                part = os.read(self._descriptor, min(size, 1 << 20))
            except OSError:
                part = b""
            if not part:
                raise RemoteError("the program ended while its functions were called")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


def _encode_scalar(base: type, value: Any) -> Any:
    if base is str:
        return str.__str__(value)
    if base is float:
        return float.__float__(value)
    if base is complex:
        return ["complex", [value.real, value.imag]]
    return [base.__name__, bytes(value).hex()]


_PLAIN: dict[str, Callable[[Any], Any]] = {
    "int": lambda text: int(text, 16),
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "complex": lambda parts: complex(*parts),
    "range": lambda parts: range(*parts),
    "slice": lambda parts: slice(*parts),
    "Decimal": Decimal,
    "Fraction": Fraction,
}
_CONTAINERS: dict[str, Callable[[Iterator[Any]], Any]] = {kind.__name__: kind for kind in _LISTS}
_ACTIONS: dict[str, Callable[..., Any]] = {
    "getattr": getattr,
    "setattr": setattr,
    "getitem": lambda target, key: target[key],
    "len": len,
    "str": str,
    "iter": lambda target: _Steps(iter(target)),
    "next": lambda steps: next(steps.iterator),
}


class _Steps:
    """An iterator that crosses as a handle even where the iterator itself would cross by value."""

    def __init__(self, iterator: Iterator[Any]):
        self.iterator = iterator


def _text(error: BaseException) -> str:
    try:
        return str(error)[:2000]
    except Exception:
        return ""


def _error(name: str, text: str) -> Exception:
    """An exception of the other side: the built-in class of that name, else RuntimeError."""
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            return kind(text)
        except TypeError:  # UnicodeDecodeError and its like want more
            pass
    return RuntimeError(f"{name}: {text}")
