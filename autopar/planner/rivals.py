"""Why plans that were priced whole lost against the chosen one: the term of the step time that grew most."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from ..plan import Candidate, Plan
from ..report.words import plan_in_words
from .candidates import MAX_CANDIDATES
from .problem import Problem
from .terms import COMPUTE, terms_of


@dataclass(frozen=True)
class Rivals:
    """Plans held against `chosen`; all have predictions."""

    problem: Problem
    chosen: Plan

    @cached_property
    def _terms(self) -> dict[str, float]:
        return {term.name: term.seconds for term in terms_of(self.problem, self.chosen)}

    def verdict(self, plan: Plan) -> str:
        """How much slower a plan is, and why."""
        step_s = plan.prediction.step_time_s
        grown = {term.name: term.seconds - self._terms.get(term.name, 0.0) for term in terms_of(self.problem, plan)}
        name = max(grown, key=grown.__getitem__)
        now_s = grown[name] + self._terms.get(name, 0.0)
        why = f"{name} {now_s / step_s:.0%}"
        if name == COMPUTE:
            why = f"each device computes {now_s / self._terms[name]:.2f}x as long"
        return f"{step_s / self.chosen.prediction.step_time_s:.2f}x slower: {why}"

    def rows(self, others: Iterable[Plan]) -> Iterator[Candidate]:
        """One for each plan that reads differently, the fastest first. others: those that fit."""
        seen = {plan_in_words(self.chosen)}
        for plan in sorted(others, key=lambda one: one.prediction.step_time_s):
            name, said = plan_in_words(plan), plan.prediction
            if name not in seen and len(seen) < MAX_CANDIDATES:
                seen.add(name)
                yield Candidate(name, said.step_time_s, said.peak_memory_bytes, self.verdict(plan))
