"""Calls of a tokenloom server: the client's own transport, without the SDK's types above it."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from tokenloom.client.bench.load import Grpc
from tokenloom.client.bench.record import CallFailed, Clock, Record, Send
from tokenloom.client.bench.workload import Request
from tokenloom.client.errors import TokenloomError
from tokenloom.client.grpc_transport import AsyncGrpcTransport
from tokenloom.v1 import inference_pb2 as pb


class GrpcCaller:
    """One channel to the server."""

    def __init__(
        self, endpoint: Grpc, *, ignore_eos: bool, temperature: float, timeout_s: float | None
    ) -> None:
        self._transport = AsyncGrpcTransport(endpoint.target, access=endpoint.access)
        self._ignore_eos = ignore_eos
        self._temperature = temperature
        self._timeout_s = timeout_s

    async def __aenter__(self) -> Self:
        await self._transport.get_model_async(pb.GetModelRequest(), timeout_s=60.0)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._transport.close_async()

    def prepare(self, request: Request) -> Send:
        """Builds the message."""
        message = pb.GenerateRequest(
            sampling=pb.Sampling(temperature=self._temperature),
            stopping=pb.Stopping(max_tokens=request.max_tokens, ignore_eos=self._ignore_eos),
        )
        if isinstance(request.prompt, str):
            message.text = request.prompt
        else:
            message.tokens.ids.extend(request.prompt)

        async def send(record: Record, clock: Clock) -> None:
            try:
                await self._read(message, record, clock)
            except TokenloomError as error:
                raise CallFailed(error.code.name, error.reason) from error

        return send

    async def _read(self, request: pb.GenerateRequest, record: Record, clock: Clock) -> None:
        stream = self._transport.generate_async(request, timeout_s=self._timeout_s)
        num_tokens = 0
        is_finished = False
        try:
            while (message := await stream.read()) is not None:
                num_new = len(message.delta.token_ids)
                if num_new:
                    if message.delta.first_index != num_tokens:
                        raise CallFailed("DATA_LOSS", "GAP")
                    record.delta_s.append(clock.now_s())
                    record.delta_tokens.append(num_new)
                    num_tokens += num_new
                elif message.HasField("admission"):
                    record.num_prompt_tokens = message.admission.num_prompt_tokens
                elif message.HasField("finish"):
                    is_finished = True
        finally:
            stream.cancel()
        if not is_finished:
            raise CallFailed("DATA_LOSS", "NO_FINISH")
