"""Channels whose calls bear a token, and which certificates change under.

A channel of gRPC has its credentials for life. So when the files of a TLS change, the next call
opens another one; the one before is closed once its last call has ended.

    call 1 ──▶ channel with the first certificates ──▶ … runs on
    (files change)
    call 2 ──▶ channel with the second ones
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import grpc
import grpc.aio

from tokenloom.client.access import TLS, Access, Credentials, Metadata

ChannelOptions: TypeAlias = Sequence[tuple[str, int | str]]

_Method: TypeAlias = Callable[..., object]

_LONG_S = 1e7
"""How long a channel that is not used any more may wait for its last call."""


def open_channel(target: str, options: ChannelOptions, access: Access) -> grpc.Channel:
    """Returns a channel with calls that have such access.

    Raises ValueError for files that cannot be used, and where a token would be open to others.
    """
    access.check(target)
    options = (*options, *access.options)
    if access.token is None and not isinstance(access.credentials, TLS):
        return _plain(target, options, access.credentials)
    return cast("grpc.Channel", _Channel(target, options, access))


def open_aio_channel(target: str, options: ChannelOptions, access: Access) -> grpc.aio.Channel:
    """Returns a channel for the running event loop. Raises as `open_channel` does."""
    access.check(target)
    options = (*options, *access.options)
    if access.token is None and not isinstance(access.credentials, TLS):
        return _plain_aio(target, options, access.credentials)
    return cast("grpc.aio.Channel", _AioChannel(target, options, access))


def _plain(
    target: str, options: ChannelOptions, credentials: grpc.ChannelCredentials | None
) -> grpc.Channel:
    if credentials is None:
        return grpc.insecure_channel(target, options=options)
    return grpc.secure_channel(target, credentials, options=options)


def _plain_aio(
    target: str, options: ChannelOptions, credentials: grpc.ChannelCredentials | None
) -> grpc.aio.Channel:
    if credentials is None:
        return grpc.aio.insecure_channel(target, options=options)
    return grpc.aio.secure_channel(target, credentials, options=options)


@dataclass(kw_only=True, eq=False)
class _Opened:
    """A channel of gRPC."""

    channel: Any
    num_calls: int = 0
    methods: dict[str, _Method] = field(default_factory=dict)
    """What calls a method, by its path."""

    def method(self, kind: str, path: str, details: Mapping[str, object]) -> _Method:
        """Returns what calls a method; `kind` as gRPC's channels name it."""
        if path not in self.methods:
            self.methods[path] = getattr(self.channel, kind)(path, **details)
        return self.methods[path]


class _Channel:
    """A `grpc.Channel` as far as stubs need it."""

    def __init__(self, target: str, options: ChannelOptions, access: Access) -> None:
        self._target = target
        self._options = options
        self._access = access
        self._lock = threading.Lock()
        self._credentials = Credentials(access.credentials)
        self._current = self._open()
        self._retired: list[_Opened] = []
        self._is_closed = False

    def unary_unary(self, path: str, **details: object) -> _Method:
        def call(request: object, *, metadata: Metadata = (), **given: object) -> object:
            metadata = (*metadata, *self._access.metadata())
            opened = self._begin()
            try:
                method = opened.method("unary_unary", path, details)
                return method(request, metadata=metadata, **given)
            finally:
                self._end(opened)

        return call

    def unary_stream(self, path: str, **details: object) -> _Method:
        def call(request: object, *, metadata: Metadata = (), **given: object) -> object:
            metadata = (*metadata, *self._access.metadata())
            opened = self._begin()
            try:
                method = opened.method("unary_stream", path, details)
                stream: Any = method(request, metadata=metadata, **given)
            except BaseException:
                self._end(opened)
                raise
            if not stream.add_callback(lambda: self._end(opened)):  # it has ended already
                self._end(opened)
            return stream

        return call

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            everything = (self._current, *self._retired)
        for opened in everything:
            opened.channel.close()

    def _open(self) -> _Opened:
        channel = _plain(self._target, self._options, self._credentials.current)
        return _Opened(channel=channel)

    def _begin(self) -> _Opened:
        """Returns the channel for a call that begins; closes those that nothing runs over."""
        with self._lock:
            if not self._is_closed and self._credentials.renew():
                self._retired.append(self._current)
                self._current = self._open()
            self._current.num_calls += 1
            begun = self._current
            idle = [opened for opened in self._retired if not opened.num_calls]
            self._retired = [opened for opened in self._retired if opened.num_calls]
        # Closing waits for a thread of gRPC's, and that one may wait for the lock.
        for opened in idle:
            opened.channel.close()
        return begun

    def _end(self, opened: _Opened) -> None:
        with self._lock:
            opened.num_calls -= 1


class _AioChannel:
    """A `grpc.aio.Channel` as far as stubs need it."""

    def __init__(self, target: str, options: ChannelOptions, access: Access) -> None:
        self._target = target
        self._options = options
        self._access = access
        self._credentials = Credentials(access.credentials)
        self._current = self._open()
        self._retired: dict[asyncio.Task[None], grpc.aio.Channel] = {}
        self._is_closed = False

    def unary_unary(self, path: str, **details: object) -> _Method:
        return self._method("unary_unary", path, details)

    def unary_stream(self, path: str, **details: object) -> _Method:
        return self._method("unary_stream", path, details)

    async def close(self, grace: float | None = None) -> None:
        self._is_closed = True
        for task in self._retired:
            task.cancel()
        for channel in (self._current.channel, *self._retired.values()):
            await channel.close(grace)

    def _method(self, kind: str, path: str, details: Mapping[str, object]) -> _Method:
        def call(request: object, *, metadata: Metadata = (), **given: object) -> object:
            metadata = (*metadata, *self._access.metadata())
            method = self._renewed().method(kind, path, details)
            return method(request, metadata=metadata, **given)

        return call

    def _open(self) -> _Opened:
        channel = _plain_aio(self._target, self._options, self._credentials.current)
        return _Opened(channel=channel)

    def _renewed(self) -> _Opened:
        """Returns the channel for a call that begins."""
        if not self._is_closed and self._credentials.renew():
            retired = self._current.channel
            self._current = self._open()
            task = asyncio.ensure_future(retired.close(grace=_LONG_S))  # when its calls have ended
            self._retired[task] = retired
            task.add_done_callback(lambda done: self._retired.pop(done, None))
        return self._current
