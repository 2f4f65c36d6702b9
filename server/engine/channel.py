"""Frames between the two processes: one MessagePack list of messages each way per step."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

import msgspec
import zmq

from lorry.server.engine.messages import Command, EngineMessage


class Channel(Protocol):
    """The engine's side of the line."""

    def receive(self, timeout: float | None = 0.0) -> list[Command]:
        """All commands that have arrived; waits at most `timeout` seconds (None: without end) for the first."""
        ...

    def send(self, messages: Sequence[EngineMessage]) -> None: ...


class SocketChannel:
    """A ZeroMQ PAIR that connects to where the frontend has bound. Queues are not bounded here: the frontend always
    reads, and bounds what it keeps for each stream."""

    def __init__(self, address: str) -> None:
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.connect(address)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(list[Command])

    def receive(self, timeout: float | None = 0.0) -> list[Command]:
        if timeout != 0.0 and not self._socket.poll(None if timeout is None else max(1, round(timeout * 1000))):
            return []
        commands: list[Command] = []
        while True:
            try:
                commands += self._decoder.decode(self._socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                return commands

    def send(self, messages: Sequence[EngineMessage]) -> None:
        self._socket.send(self._encoder.encode(messages))

    def close(self, linger: float = 1.0) -> None:
        """Give what was sent `linger` seconds to leave."""
        self._socket.close(linger=round(linger * 1000))
        self._context.term()


class LocalChannel:
    """Both ends in one process: append to `commands`, read `messages`."""

    def __init__(self) -> None:
        self.commands: deque[Command] = deque()
        self.messages: list[EngineMessage] = []

    def receive(self, timeout: float | None = 0.0) -> list[Command]:
        commands = list(self.commands)
        self.commands.clear()
        return commands

    def send(self, messages: Sequence[EngineMessage]) -> None:
        self.messages.extend(messages)
