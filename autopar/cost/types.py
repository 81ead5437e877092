"""What the cost model answers: seconds and bytes for a block and for a stage, for one microbatch on one rank."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StageCost:
    """Everything that the simulator and the stage search need of one stage; per rank.

    forward_s, backward_s: one microbatch, with the collectives inside the stage and, under recompute, the second
        forward. prologue_s: once per step.
    send_s: time to hand this stage's boundary activation to the next stage (or receive its gradient); 0 for the last.
    boundary_bytes: size of that message.
    reduce_s: gradient reduction over data, once per step, if nothing hid it; reduce_overlap_s: how much of it the last
        backward can hide. reduce_model_s: never hidden (shared parameters over model axes and tied stages).
    optimizer_s: an AdamW step over this rank's parameters.
    parameter_bytes, gradient_bytes, optimizer_bytes: at rest on this rank. unsharded_bytes: gathered parameters and
        communication buffers alive during compute (ZeRO 3).
    activation_bytes: what one in-flight microbatch keeps between its forward and its backward.
    forward_peak_bytes, backward_peak_bytes: extra transient bytes while a microbatch's forward (backward) runs.
    backward_weight_s: the part of backward_s that a schedule with split backwards can put off (gradients of weights).
    deferred_bytes: what one microbatch keeps between the halves of such a backward.
    gradients_stay: whether gradients lie in buffers that stay from step to step, and do not come into being in the first
        backward; None: where they are reduced over data.
    """

    forward_s: float
    backward_s: float
    prologue_s: float
    send_s: float
    boundary_bytes: int
    reduce_s: float
    reduce_overlap_s: float
    reduce_model_s: float
    optimizer_s: float
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    unsharded_bytes: int
    activation_bytes: int
    forward_peak_bytes: int
    backward_peak_bytes: int
    backward_weight_s: float = 0.0
    deferred_bytes: int = 0
    gradients_stay: bool | None = None

    @property
    def has_gradient_buffers(self) -> bool:
        return self.reduce_s > 0 if self.gradients_stay is None else self.gradients_stay

    @property
    def backward_input_s(self) -> float:
        """The part of backward_s that the stage before waits for."""
        return self.backward_s - self.backward_weight_s
