"""The default search on many devices: shapes and layouts in outline, all at once; the best of them priced exactly.

    outline   some chains of layouts (planner/chains.py), each with what it would cost in every shape of its tensor degree
              (planner/outlines.py). The shape that looks best so far gets the chains found for it, the fastest and, where
              memory holds it back, those that keep less; they serve the other shapes too; until the best few have theirs
    price     in the order of the estimates, the cuts into stages that the stage table points to, priced and simulated
              exactly; then, for the best few, the branch and bound over cuts, and layouts found for their very shape
    prove     the least bound over all shapes is the bound of the whole space; where its best plan is what `auto` ends with, the
              shape that has it gets a closer one, in turn, as far as the work set aside for it goes (planner/proofs.py)

A tensor degree without chains stands with the costs of its largest divisor that has some, shared out further. The answer
is deterministic: counts limit the work, not clocks, unless a time limit is given.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from ..plan import Plan
from .candidates import TooLarge, Tried, chosen_verdict, conclude, nothing_fits
from .outlines import Outline, ShapeArrays
from .pricing import StagePrices
from .problem import Chain, Problem, Shape
from .proofs import Proof
from .stages import StageSearch

# Shapes that get chains of their own at most, and how many of the best degrees must have them; chains found where
# microbatches are up to so many times larger or smaller count as theirs.
MAX_OUTLINED, NUM_BEST, ALIKE = 16, 5, 4
# Where memory holds a shape back, how much slower than with room enough it is hoped to be with chains that keep less.
HELD_BACK = 1.1
# Chains of such a shape, the fastest among them.
NUM_LEAN = 2
# Pairs of a shape and a chain that are priced at most, and how far above the best plan an estimate may be to be priced.
MAX_PRICED = 24
MARGIN = 1.08
# Estimates for one shape that differ by less than this share are of the same plan, near enough.
SAME = 1e-3
# Of the best shapes, how many have their cuts searched, in how many partial plans; and how many get layouts of their own.
NUM_CUT, CUT_VISITS = 3, 60
NUM_OWN, OWN_CHAINS = 1, 3
# Tensor degrees that are asked at most what no layout of theirs beats, for the bound alone.
NUM_PROVED = 6
# Work that the proof of the bound may take (planner/proofs.py), and where more is asked for.
PROOF_WORK, MORE_PROOF_WORK = 80, 1000


@dataclass(frozen=True, slots=True)
class _Pair:
    """A shape under a chain of layouts, its estimated step time, and into how many parts the batch was cut where the chain
    was found."""

    estimate_s: float
    shape: Shape
    chain: Chain
    shards: int


@dataclass
class _Degree:
    """The shapes of one tensor degree, and the outlines known, each with the shards where its chain was found.

    looked: the shards where chains were looked for, and whether those that keep less were.
    """

    some: ShapeArrays
    outlines: list[tuple[Outline, int]] = field(default_factory=list)
    looked: list[tuple[int, bool]] = field(default_factory=list)
    _estimates: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    def estimate(self, outline: Outline) -> tuple[np.ndarray, np.ndarray]:
        """Of an outline in all shapes."""
        key = id(outline)  # outlines live as long as the search
        if key not in self._estimates:
            self._estimates[key] = outline.estimate(self.some)
        return self._estimates[key]

    def has_looked(self, shards: int, lean: bool) -> bool:
        """Whether chains were looked for where microbatches are about as large."""
        return any(
            (was_lean or not lean) and max(shards, there) <= ALIKE * min(shards, there)
            for there, was_lean in self.looked
        )


def broad(problem: Problem) -> Plan:
    """The best plan found, with its bound; ValueError, with the smallest plan found, when none fits."""
    return Broad(problem).run()


class Broad:
    """The search of one problem; `run` answers, after which `tried` has the plans that were priced."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self._budget = problem, problem.budget
        self.prices = StagePrices(problem)
        by_degree: dict[int, list[Shape]] = {}
        for shape in problem.shapes:
            by_degree.setdefault(shape.tensor, []).append(shape)
        self.degrees = {tensor: _Degree(ShapeArrays.of(shapes), []) for tensor, shapes in sorted(by_degree.items())}
        self.plain = Outline(problem, self.prices, 1, Chain(), 1)
        self.proof = Proof(problem, self.prices)
        self._bounded: tuple[list[Shape], np.ndarray, np.ndarray] = ([], np.empty(0), np.empty(0))
        self._priced: list[tuple[Tried, StageSearch]] = []
        self.tight: list[TooLarge] = []

    def run(self) -> Plan:
        try:
            self._search()
        except KeyboardInterrupt:
            if not self._priced:
                raise
            self._budget.interrupted()
        if not self._priced:
            raise (
                self._budget.no_plan("auto")
                if self._budget.cut_short
                else nothing_fits(self.problem, self.prices, self.tight)
            )
        best = min(self.tried, key=lambda one: one.step_time_s)
        if self._budget.cut_short:
            self.tight.clear()  # what would only fill the table of candidates is left out
        self.problem.provers.append(self.prove)
        return conclude(self.problem, self.prices, best, self.tried, self.tight, self._bound_s(best.step_time_s))

    def prove(self, plan: Plan) -> Plan:
        """The best plan of the space, with a closer bound."""
        step_s = plan.prediction.step_time_s
        self.proof.left = MORE_PROOF_WORK if self.problem.thorough else PROOF_WORK
        bound_s = max(plan.prediction.lower_bound_s or 0.0, self.proof.bound_s(*self._bounded, step_s))
        chosen, *rest = plan.candidates
        verdict = chosen_verdict(step_s, bound_s, self._budget.cut_short)
        prediction = replace(plan.prediction, lower_bound_s=bound_s)
        return replace(plan, prediction=prediction, candidates=(replace(chosen, verdict=verdict), *rest))

    @property
    def tried(self) -> list[Tried]:
        return [one for one, _ in self._priced]

    def _search(self) -> None:
        with self._budget.bar("planning", "step", MAX_OUTLINED + MAX_PRICED) as bar:
            for _ in range(MAX_OUTLINED):
                if self._budget.expired() and self._has_outlines() or not self._outline_more():
                    break
                bar.update()
            for pair in self._worth_pricing():
                if self._budget.expired(has_plan=bool(self._priced)):
                    return
                self._price(pair.shape, self._chain_of(pair))
                bar.update()
        if self._priced:
            self._search_cuts()
            self._own_layouts()

    def _has_outlines(self) -> bool:
        """Whether something is expected to fit."""
        return next(self._pairs(), None) is not None

    # -- outlines

    def _outline_more(self) -> bool:
        """Look for chains of the best shape that has none of its own, if it is among the best few; whether there was one."""
        views = [self._view(tensor) for tensor in self.degrees]
        limited_s, free_s = (np.concatenate([view[i] for view in views]) for i in (0, 1))
        shapes = [shape for degree in self.degrees.values() for shape in degree.some.shapes]
        # What memory holds back may gain by chains that keep less, as long as none were looked for.
        lean = free_s < limited_s * (1 - 1e-9)
        looked = [
            self.degrees[s.tensor].has_looked(s.shards, bool(tight)) for s, tight in zip(shapes, lean, strict=True)
        ]
        hope_s = np.maximum(HELD_BACK * free_s, self._shared_out_s)
        hopeful_s = np.where(looked, limited_s, np.minimum(limited_s, hope_s))
        done: set[tuple[int, int]] = set()
        for i in np.argsort(hopeful_s, kind="stable"):
            shape = shapes[i]
            if not looked[i]:
                self._look(shape, bool(lean[i]))
                return True
            done.add((shape.pipeline, shape.tensor))
            if len(done) == NUM_BEST:
                break
        return False

    @cached_property
    def _shared_out_s(self) -> np.ndarray:
        """Estimates of all shapes if the ranks of a tensor axis shared all out: what chains that keep less may hope for."""
        return np.concatenate([self.plain.estimate(degree.some)[0] for degree in self.degrees.values()])

    def _view(self, tensor: int) -> tuple[np.ndarray, np.ndarray]:
        """The least estimates of all shapes of a degree, within memory and without its limit."""
        degree = self.degrees[tensor]
        near = max((t for t, d in self.degrees.items() if d.outlines and tensor % t == 0), default=None)
        outlines = [outline for outline, _ in self.degrees[near].outlines] if near else [self.plain]
        limited_s, free_s = np.min([degree.estimate(outline) for outline in outlines], axis=0)
        return limited_s, free_s

    def _look(self, shape: Shape, lean: bool) -> None:
        """Outline the chains found for a shape."""
        degree = self.degrees[shape.tensor]
        known = [outline.chain for outline, _ in degree.outlines]
        for chain in itertools.islice(
            self.problem.chains.without_recompute(self.problem, shape), NUM_LEAN if lean else 1
        ):
            if chain not in known:
                like = degree.outlines[0][0] if degree.outlines else None
                outline = Outline(self.problem, self.prices, shape.tensor, chain, shape.shards, like)
                degree.outlines.append((outline, shape.shards))
        degree.looked.append((shape.shards, lean))

    def _pairs(self) -> Iterator[_Pair]:
        for degree in self.degrees.values():
            for outline, shards in degree.outlines:
                estimates, _ = degree.estimate(outline)
                for i in np.flatnonzero(np.isfinite(estimates)):
                    yield _Pair(float(estimates[i]), degree.some.shapes[i], outline.chain, shards)

    def _worth_pricing(self) -> Iterator[_Pair]:
        """By estimate, the best chain of each shape before the others; as many as may beat the best plan found."""
        pairs = sorted(self._pairs(), key=lambda pair: pair.estimate_s)
        if not pairs:
            pairs = self._smallest()
        count, seen = 0, set()
        for pair in pairs:
            best_s = min((one.step_time_s for one, _ in self._priced), default=math.inf)
            if self._priced and (count >= MAX_PRICED or pair.estimate_s > MARGIN * best_s):
                return
            # Chains that differ in next to nothing have next to the same estimate.
            about = (pair.shape, round(math.log(pair.estimate_s) / SAME))
            if about not in seen:
                seen.add(about)
                count += 1
                yield pair

    def _smallest(self) -> list[_Pair]:
        """Where nothing is expected to fit: what needs least memory."""
        found = []
        for degree in self.degrees.values():
            for outline, shards in degree.outlines:
                for size, shape in zip(outline.least_bytes(degree.some), degree.some.shapes, strict=True):
                    found.append(_Pair(float(size), shape, outline.chain, shards))
        return sorted(found, key=lambda pair: pair.estimate_s)[:MAX_PRICED]

    # -- exact prices

    def _price(self, shape: Shape, chain: Chain) -> None:
        search = StageSearch(self.problem, shape, chain, self.prices)
        pieces = search.first() if search.root_bound_s < math.inf else None
        if pieces is None:
            self.tight.append(TooLarge(search.smallest()[1], shape, search))
        else:
            self._priced.append((Tried.of(self.problem, search, pieces), search))

    def _chain_of(self, pair: _Pair) -> Chain:
        """Its chain, or the fastest of the shape itself where microbatches of other sizes cannot be split like its own."""
        chains, shape = self.problem.chains, pair.shape
        if chains.serve(self.problem, shape.tensor, pair.shards, shape.shards):
            return pair.chain
        return next(iter(chains.of(self.problem, shape)))

    def _search_cuts(self) -> None:
        best_s = min(one.step_time_s for one, _ in self._priced)
        for one, search in sorted(self._priced, key=lambda pair: pair[0].step_time_s)[:NUM_CUT]:
            if search.root_bound_s >= best_s or self._budget.expired():
                continue
            solution = search.solve(min(best_s, one.step_time_s), CUT_VISITS)
            if solution.pieces is not None:
                self._priced.append((Tried.of(self.problem, search, solution.pieces), search))
                best_s = solution.step_time_s

    def _own_layouts(self) -> None:
        best = sorted((one for one, _ in self._priced), key=lambda one: one.step_time_s)
        shapes = list(dict.fromkeys(one.shape for one in best))[:NUM_OWN]
        priced = [(search.shape, search.chain) for _, search in self._priced]
        for shape in shapes:
            if shape.tensor == 1:
                continue
            for chain in itertools.islice(self.problem.chains.of(self.problem, shape), OWN_CHAINS):
                if (shape, chain) not in priced and not self._budget.expired():
                    self._price(shape, chain)

    def _bound_s(self, best_s: float) -> float:
        """No plan of the space is faster.

        What no layout beats serves a multiple of its degree, and smaller microbatches, too: they take no less of all ranks
        together. It is known of the degrees and microbatches that chains were looked for; the degree that holds the bound down
        is asked for it, for the largest of its microbatches that matter.
        """
        looked = [(t, shards) for t, degree in self.degrees.items() if t > 1 for shards, _ in degree.looked]
        for one in dict.fromkeys(looked):
            self.proof.learn(*one)
        left = 0 if self._budget.cut_short else NUM_PROVED
        parts = {tensor: self._bounds(tensor) for tensor in self.degrees}
        while left:
            tensor = min(parts, key=lambda t: parts[t][0].min())
            near = parts[tensor][0] < best_s
            shards = int(self.degrees[tensor].some.shards[near].min()) if near.any() else 0
            if tensor == 1 or not shards or (tensor, shards) in self.proof.least:
                break
            self.proof.learn(tensor, shards)
            parts |= {t: self._bounds(t) for t in parts if t % tensor == 0}
            left -= 1
        bounds, again = (np.concatenate(arrays) for arrays in zip(*parts.values(), strict=True))
        shapes = [shape for degree in self.degrees.values() for shape in degree.some.shapes]
        self._bounded = (shapes, bounds, again)
        return min(best_s, float(bounds.min()))

    def _bounds(self, tensor: int) -> tuple[np.ndarray, np.ndarray]:
        """Of all shapes of a degree: their bounds, and the shares of the forward that they compute again at least."""
        some, plain = self.degrees[tensor].some, self.plain
        small_s = plain.rows * (plain.small.forward_s + plain.small.backward_s)
        known = [(1, 1, plain.pass_s), (1, plain.rows, small_s)]
        known += [(*key, float(least_s.sum())) for key, least_s in self.proof.least.items()]
        serving = [np.where(some.shards >= shards, least_s, 0.0) for t, shards, least_s in known if tensor % t == 0]
        again = plain.recomputed(some)
        return plain.bound(some, np.max(serving, axis=0), again), again
