"""Drives several ranks, each a process of its own, the way a core would."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

import msgspec

from tokenloom.wire.codec import decode_to_core, decode_to_worker, encode
from tokenloom.wire.messages import Configure, Failed, Ready, Step, StepDone, ToCore, ToWorker

if TYPE_CHECKING:
    from tokenloom.worker.runner import ModelRunner

KV_BYTES = 32 * 1024 * 1024
TIMEOUT_S = 120.0


class RankFailed(Exception):
    """What a rank said before it left."""


class Group:
    """Up to so many ranks, on CPUs or a GPU each; each `configure` makes a group of the first."""

    def __init__(self, max_ranks: int, *, kind: Literal["cpu", "cuda"] = "cpu") -> None:
        # Forked from a server that has imported torch once.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tokenloom.worker.runner"])
        self._epoch = 0
        self._links: list[Connection] = []
        self._processes = []
        for index in range(max_ranks):
            own, other = context.Pipe()
            process = context.Process(target=_rank, args=(other, index, kind), daemon=True)
            process.start()
            other.close()
            self._links.append(own)
            self._processes.append(process)
        self._addresses = [link.recv_bytes().decode() for link in self._links]
        self._num_ranks = 0

    def configure(self, configure: Configure, num_ranks: int) -> list[Ready]:
        """Makes a group that holds a model; returns what each rank says. Raises RankFailed."""
        self._epoch += 1
        self._num_ranks = num_ranks
        for rank, link in enumerate(self._links[:num_ranks]):
            told = msgspec.structs.replace(
                configure,
                epoch=self._epoch,
                rank=rank,
                world_size=num_ranks,
                rendezvous=self._addresses[0] if num_ranks > 1 else "",
            )
            link.send_bytes(encode(told))
        ready = self._answers()
        assert all(isinstance(each, Ready) for each in ready)
        return ready  # type: ignore[return-value]

    def step(self, step: Step) -> StepDone:
        """Returns the answer of rank 0; the others' tokens must be the same. Raises RankFailed."""
        for link in self._links[: self._num_ranks]:
            link.send_bytes(encode(step))
        answers = self._answers()
        done = answers[0]
        assert isinstance(done, StepDone)
        for other in answers:
            assert isinstance(other, StepDone)
            assert (other.tokens, other.faulty_rows) == (done.tokens, done.faulty_rows)
        return done

    def _answers(self) -> list[ToCore]:
        answers = []
        for rank, link in enumerate(self._links[: self._num_ranks]):
            assert link.poll(TIMEOUT_S), f"rank {rank} does not answer"
            answers.append(decode_to_core(link.recv_bytes()))
        for answer in answers:
            if isinstance(answer, Failed):
                raise RankFailed(answer.error)
        return answers

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for process, link in zip(self._processes, self._links, strict=True):
            link.close()
            process.kill()
            process.join()


def _rank(link: Connection, index: int, kind: str) -> None:
    """Serves a rank until nobody asks; a rank's KV pool is smaller than that of the one before."""
    import torch

    from tokenloom.worker.options import WorkerOptions
    from tokenloom.worker.runner import ModelRunner

    torch.set_num_threads(1)
    device = kind if kind == "cpu" else f"{kind}:{index}"
    num_bytes = KV_BYTES - index * 65536
    options = WorkerOptions(device=device, kv_cache_bytes=num_bytes, host="127.0.0.1")
    runner = ModelRunner(options)
    link.send_bytes(runner.address.encode())
    while True:
        try:
            message = decode_to_worker(link.recv_bytes())
        except EOFError:
            return
        link.send_bytes(encode(_answer(runner, message)))


def _answer(runner: ModelRunner, message: ToWorker) -> ToCore:
    assert isinstance(message, Configure | Step)
    try:
        if isinstance(message, Configure):
            return runner.configure(message, lambda *_: None)
        return runner.launch(message).result()
    except Exception as error:  # noqa: BLE001 - the test is told
        return Failed(epoch=message.epoch, error=f"{type(error).__name__}: {error}")
