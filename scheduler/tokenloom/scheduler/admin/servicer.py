"""The Admin service: each call validated and carried to the core."""

from __future__ import annotations

import asyncio
import math

import grpc

from tokenloom.scheduler.admin.link import AdminLink
from tokenloom.scheduler.admin.load import interval_of, report_of
from tokenloom.scheduler.config import SchedulerConfig
from tokenloom.scheduler.front.boundary import Context, bounded, parsed
from tokenloom.scheduler.front.errors import (
    Absence,
    InvalidRequest,
    RequestError,
    Unavailable,
    Violation,
)
from tokenloom.scheduler.messages import ModelReady
from tokenloom.v1 import admin_pb2 as pb

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["Admin"].full_name
MAX_PROFILE_STEPS = 1000
MAX_REQUEST_ID_BYTES = 256


class UnknownRequest(RequestError):
    """No request of that name runs or waits."""

    code = grpc.StatusCode.NOT_FOUND

    def __init__(self, request_id: str) -> None:
        super().__init__("UNKNOWN_REQUEST", f"no request {request_id!r} runs or waits")


class ProfileUnderWay(RequestError):
    """Steps are recorded for somebody else."""

    code = grpc.StatusCode.FAILED_PRECONDITION

    def __init__(self) -> None:
        super().__init__("PROFILE_UNDER_WAY", "steps are being recorded; one call at a time")


class NoTrace(RequestError):
    """A rank has no trace to show."""

    code = grpc.StatusCode.FAILED_PRECONDITION

    def __init__(self, rank: int, error: str) -> None:
        super().__init__("NO_TRACE", f"rank {rank}: {error}")


class AdminServicer:
    """Does what operators ask, by the core."""

    def __init__(self, config: SchedulerConfig, link: AdminLink) -> None:
        self._config = config
        self._link = link

    def handler(self) -> grpc.GenericRpcHandler:
        """Returns the service as a server takes it."""
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        return grpc.method_handlers_generic_handler(
            SERVICE_NAME,
            {
                "Drain": unary(bounded(parsed(pb.DrainRequest, self.drain))),
                "Abort": unary(bounded(parsed(pb.AbortRequest, self.abort))),
                "Profile": stream(bounded(parsed(pb.ProfileRequest, self.profile))),
                "WatchLoad": stream(bounded(parsed(pb.WatchLoadRequest, self.watch_load))),
            },
        )

    async def drain(self, request: pb.DrainRequest, _: Context) -> pb.DrainResponse:
        """Refuses new requests from now on and waits for the running ones."""
        grace_s = request.grace_s if request.HasField("grace_s") else self._config.grace_s
        if not 0 <= grace_s < math.inf:
            _refuse("grace_s", f"is {grace_s:g}; it must be 0 or more, and finite")
        return pb.DrainResponse(num_ended=await self._link.drain(grace_s))

    async def abort(self, request: pb.AbortRequest, _: Context) -> pb.AbortResponse:
        """Ends one request."""
        num_bytes = len(request.request_id.encode())
        if not 1 <= num_bytes <= MAX_REQUEST_ID_BYTES:
            _refuse(
                "request_id", f"has {num_bytes} bytes; it must have 1 to {MAX_REQUEST_ID_BYTES}"
            )
        if not await self._link.abort(request.request_id):
            raise UnknownRequest(request.request_id)
        return pb.AbortResponse()

    async def profile(self, request: pb.ProfileRequest, context: Context) -> None:
        """Streams what each rank recorded of the next steps."""
        num_steps = request.num_steps
        if not 1 <= num_steps <= MAX_PROFILE_STEPS:
            _refuse("num_steps", f"is {num_steps}; it must be 1 to {MAX_PROFILE_STEPS}")
        if self._link.is_profiling:
            raise ProfileUnderWay
        left = set(range(self._config.tensor_parallel))
        async with self._link.profile(num_steps) as pieces:
            while left:
                piece = await pieces.get()
                if isinstance(piece, Absence):
                    raise Unavailable(piece)
                if piece.error:
                    raise NoTrace(piece.rank, piece.error)
                response = pb.ProfileResponse(rank=piece.rank, data=piece.data)
                await context.write(response.SerializeToString())
                if piece.is_last:
                    left.discard(piece.rank)

    async def watch_load(self, request: pb.WatchLoadRequest, context: Context) -> None:
        """Tells the load now and again in each interval, until the caller leaves."""
        interval_s = interval_of(request)
        link = self._link
        while True:
            is_served = isinstance(link.model, ModelReady)
            report = report_of(
                link.load,
                model=self._config.name if is_served else "",
                is_ready=is_served and not link.is_draining,
            )
            await context.write(report.SerializeToString())
            await asyncio.sleep(interval_s)


def _refuse(field: str, description: str) -> None:
    raise InvalidRequest([Violation(field=field, description=description)])
