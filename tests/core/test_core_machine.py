"""The whole core against a naive model: any order of submits, aborts, steps and deaths."""

from __future__ import annotations

from collections import deque

import msgspec
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.core.processes import sampling
from tokenloom.scheduler.core import admission, applying, planning
from tokenloom.scheduler.core.state import Limits, ModelSpec, State
from tokenloom.scheduler.messages import Abort, Stop, Submit
from tokenloom.scheduler.tenants import Tenant
from tokenloom.wire.messages import Configure, StepDone
from tokenloom.worker.fake import FakeConfig, FakeModel, expected_tokens

EOS = 1


def undisturbed(config: FakeConfig, prompt: list[int], max_tokens: int, seed: int) -> list[int]:
    """Returns the answer of a server with one user: up to the stop token or max_tokens."""
    tokens = expected_tokens(prompt, max_tokens, seed=seed, config=config, stop_token_ids=(EOS,))
    return tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens


class CoreMachine(RuleBasedStateMachine):
    """The naive model: each live request is its whole answer and how much of it has come."""

    @initialize(
        num_blocks=st.integers(6, 20),
        block_size=st.sampled_from([1, 3, 4]),
        slots=st.integers(1, 4),
        budget=st.integers(4, 12),
        mixed_budget=st.none() | st.integers(1, 12),
    )
    def begin(
        self, num_blocks: int, block_size: int, slots: int, budget: int, mixed_budget: int | None
    ) -> None:
        self.config = FakeConfig(
            vocab_size=11,
            num_blocks=num_blocks,
            block_size=block_size,
            max_model_tokens=24,
            max_step_tokens=budget,
            eos_token_id=EOS,
            eos_period=10,
        )
        self.limits = Limits(
            max_num_requests=slots,
            max_mixed_prompt_tokens=mixed_budget,
            max_waiting_requests=6,
            max_waiting_tokens=60,
        )
        self.state = State(self.limits)
        self.worker = FakeModel(self.config)
        self.epoch = 0
        self.now = 0.0
        self.num_streams = 0
        self.answers: dict[int, list[int]] = {}
        self.delivered: dict[int, list[int]] = {}
        self.done: deque[StepDone] = deque()
        self.start_worker()

    def start_worker(self) -> None:
        self.epoch += 1
        self.done.clear()
        ready = self.worker.configure(
            Configure(
                epoch=self.epoch,
                rank=0,
                world_size=1,
                rendezvous="",
                model="fake",
                dtype="auto",
                quantize="none",
                quantize_lm_head=False,
                int8_threshold=0.0,
                kv_cache="auto",
                max_model_tokens=None,
                max_num_requests=self.limits.max_num_requests,
                max_step_tokens=None,
            )
        )
        admission.begin_epoch(self.state, ModelSpec.of(ready))

    @rule(
        prompt=st.lists(st.integers(2, 4), min_size=1, max_size=20),
        max_tokens=st.integers(1, 12),
        seed=st.integers(0, 2),
        salt=st.sampled_from(["", "b"]),
        num_begun=st.just(0) | st.integers(0, 11),
        tenant=st.sampled_from(["a", "a", "b", "c"]),
        priority=st.sampled_from([0, 0, 1]),
    )
    def submit(
        self,
        prompt: list[int],
        max_tokens: int,
        seed: int,
        salt: str,
        num_begun: int,
        tenant: str,
        priority: int,
    ) -> None:
        """Some requests bring the beginning of their completion from another core."""
        answer = undisturbed(self.config, prompt, max_tokens, seed)
        begun = answer[: min(num_begun, len(answer) - 1)]
        tokens = prompt + begun
        stream = self.num_streams
        self.num_streams += 1
        waiting = len(self.state.waiting)
        waiting_tokens = sum(len(r.tokens) for r in self.state.waiting)
        admission.submit(
            self.state,
            0,
            Submit(
                stream=stream,
                tokens=np.array(tokens, np.int32).tobytes(),
                max_tokens=max_tokens,
                sampling=sampling(seed, stop_token_ids=(EOS,)),
                salt=salt,
                num_completion_tokens=len(begun),
                tenant=tenant,
                priority=priority,
            ),
            self.now,
        )
        capacity = min(24, self.config.num_blocks * self.config.block_size)
        taken = (
            len(prompt) + max_tokens <= capacity
            and waiting < 6
            and waiting_tokens + len(tokens) <= 60
        )
        assert ((0, stream) in self.state.requests) == taken
        if taken:
            self.answers[stream] = answer
            self.delivered[stream] = begun
        else:
            assert [r.stream for r in self.state.outputs_of(0).refused] == [stream]
        self.read()

    @precondition(lambda self: self.answers)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        stream = data.draw(st.sampled_from(sorted(self.answers)))
        admission.abort(self.state, 0, Abort(stream=stream))
        del self.answers[stream]
        self.read()

    @precondition(lambda self: self.answers)
    @rule(data=st.data())
    def stop(self, data: st.DataObject) -> None:
        stream = data.draw(st.sampled_from(sorted(self.answers)))
        admission.stop(self.state, 0, Stop(stream=stream, num_tokens=1))
        del self.answers[stream]
        self.read()

    @precondition(lambda self: len(self.done) < 2)
    @rule()
    def send_step(self) -> None:
        plan = planning.plan(self.state, self.now)
        if plan is not None:
            self.done.append(self.worker.step(plan.to_wire(self.epoch)))
        self.read()

    @precondition(lambda self: self.done)
    @rule(compute_s=st.floats())
    def finish_step(self, compute_s: float) -> None:
        self.now += 1.0
        done = msgspec.structs.replace(self.done.popleft(), compute_s=compute_s)
        applying.apply(self.state, done, self.now)
        self.read()

    @rule(weight=st.sampled_from([0.5, 1.0, 8.0]))
    def weigh_a_tenant(self, weight: float) -> None:
        self.state.set_tenants({"a": Tenant(name="a", weight=weight)}, self.now)

    @rule()
    def kill_worker(self) -> None:
        admission.end_epoch(self.state)
        assert self.state.check() == []
        self.start_worker()

    def read(self) -> None:
        for outputs in self.state.take_outputs().values():
            for streams, tokens in zip(outputs.streams, outputs.tokens, strict=True):
                for stream, token in zip(streams.tolist(), tokens.tolist(), strict=True):
                    self.delivered[stream].append(token)
                    got = self.delivered[stream]
                    assert got == self.answers[stream][: len(got)]
            for finished in outputs.finished:
                if finished.stream in self.answers:
                    answer = self.answers.pop(finished.stream)
                    assert self.delivered[finished.stream] == answer
                    assert finished.num_completion_tokens == len(answer)

    @invariant()
    def the_structures_agree(self) -> None:
        if hasattr(self, "state"):
            assert self.state.check() == []
            assert {stream for _, stream in self.state.requests} == set(self.answers)

    def teardown(self) -> None:
        """Left alone, the core answers everybody and holds nothing."""
        if not hasattr(self, "state"):
            return
        for _ in range(4000):
            if not self.answers:
                break
            if len(self.done) < 2:
                self.send_step()
            if self.done:
                self.finish_step(compute_s=0.01)
        assert not self.answers
        assert self.state.pool is not None
        assert self.state.pool.num_free == self.config.num_blocks


CoreMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestCore = CoreMachine.TestCase
