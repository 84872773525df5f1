"""Follows replicas: a thread each, which reads its reports and dials again while it is away."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from types import TracebackType
from typing import Self, cast

import grpc

from tokenloom.client.errors import TokenloomError
from tokenloom.client.operating import NOT_HERE
from tokenloom.client.top.rows import Sample, Sight
from tokenloom.v1 import admin_pb2 as pb
from tokenloom.v1.admin_pb2_grpc import AdminStub

_PAUSE_S = 1.0
"""Between the end of one call and the next."""
_PATIENCE_S = 5.0
"""A replica that is that much late with a report stands still, or its host is gone."""


class Watch:
    """All replicas, as they are known now, until the end of `with`."""

    def __init__(self, channels: Mapping[str, grpc.Channel], *, interval_s: float) -> None:
        """`channels` by the replicas' names; they are closed at the end."""
        self._channels = channels
        self._interval_s = interval_s
        self._stopped = threading.Event()
        self._changed = threading.Condition()
        self._sights = [Sight(target=target) for target in channels]
        self._calls: dict[int, grpc.Call] = {}
        self._threads = [
            threading.Thread(target=self._follow, args=(place,), daemon=True)
            for place in range(len(channels))
        ]

    def sights(self) -> list[Sight]:
        """Returns what is known now, in the order of the targets."""
        late_s = time.monotonic() - self._interval_s - _PATIENCE_S
        with self._changed:
            return [
                Sight(target=each.target, error="says nothing")
                if each.last is not None and each.last.at_s < late_s
                else each
                for each in self._sights
            ]

    def wait_for_rates(self, timeout_s: float) -> None:
        """Waits until each replica has told two reports, or is away."""

        def are_there() -> bool:
            return all(sight.before is not None or sight.error for sight in self._sights)

        with self._changed:
            self._changed.wait_for(are_there, timeout_s)

    def wait(self, timeout_s: float) -> None:
        """Waits for so long."""
        self._stopped.wait(timeout_s)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopped.set()
        with self._changed:
            calls = list(self._calls.values())
        for call in calls:
            call.cancel()
        for thread in self._threads:
            thread.join()

    def _follow(self, place: int) -> None:
        target = self._sights[place].target
        request = pb.WatchLoadRequest(interval_s=self._interval_s)
        with self._channels[target] as channel:
            stub = AdminStub(channel)
            while not self._stopped.is_set():
                error = self._read(place, stub, request)
                with self._changed:
                    self._sights[place] = Sight(target=target, error=error)
                    self._changed.notify_all()
                self._stopped.wait(_PAUSE_S)

    def _read(self, place: int, stub: AdminStub, request: pb.WatchLoadRequest) -> str:
        """Reads reports until there are no more; returns why."""
        try:
            call = stub.WatchLoad(request)
            with self._changed:
                self._calls[place] = cast("grpc.Call", call)
                if self._stopped.is_set():  # who stops has not seen this call
                    call.cancel()
            for report in call:
                self._see(place, report)
        except grpc.RpcError as rpc_error:
            status = cast("grpc.Call", rpc_error)
            if status.code() is grpc.StatusCode.UNIMPLEMENTED:
                return NOT_HERE
            return f"{status.code().name}: {status.details()}"
        except TokenloomError as error:  # there is no token in its file
            return str(error)
        return "the server ended the call"

    def _see(self, place: int, report: pb.WatchLoadResponse) -> None:
        sample = Sample(at_s=time.monotonic(), report=report)
        with self._changed:
            old = self._sights[place]
            self._sights[place] = replace(old, before=old.last, last=sample, error="")
            self._changed.notify_all()
