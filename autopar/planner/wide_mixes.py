"""All pipelines of unlike stages of tiny problems, and their optimum: what planner/wide.py is for stages of one mesh.

Space: every way to share the devices out over two groups or more, not all of one mesh, in the order of the pipeline; every
mesh of each group; every cut into one stage per group; every schedule that flushes with one stage per group; ZeRO as in the
exact search, in all groups with a data axis alike; every recomputation "none", "selective" or "full" of each stage; every
chain of layouts of each mesh.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from ..plan import Plan
from ..schedule.orders import SCHEDULES
from .constraints import SEARCHED_ZEROS
from .meshes import Mesh, MeshLayouts, may_differ, meshes_of, place, team_of
from .problem import Problem, goes_together
from .sketch import Sketch
from .wide import count_plans_of, every_plan_of, is_small

MAX_DEVICES = 4

Meshes = tuple[Mesh, ...]


def is_tiny(problem: Problem) -> bool:
    """Whether this space is searched whole."""
    return is_small(problem) and problem.cluster.world_size <= MAX_DEVICES and may_differ(problem)


def unlike_meshes(problem: Problem, microbatches: int) -> Iterator[Meshes]:
    """One mesh per group, not all the same."""
    pinned, world = problem.constraints.pipeline, problem.cluster.world_size
    most = min(world, len(problem.graph.blocks))
    for groups in [pinned] if pinned else range(2, most + 1):
        for cuts in itertools.combinations(range(1, world), groups - 1) if groups <= most else ():
            sizes = [stop - start for start, stop in itertools.pairwise((0, *cuts, world))]
            for meshes in itertools.product(*(tuple(meshes_of(problem, size, microbatches)) for size in sizes)):
                if len({(mesh.data, mesh.tensor) for mesh in meshes}) > 1:
                    yield meshes


def _settings(problem: Problem) -> Iterator[tuple[Meshes, int, str, int]]:
    """(meshes, microbatches, schedule, zero)."""
    pinned = problem.constraints
    for count in problem.microbatch_counts():
        for meshes in unlike_meshes(problem, count):
            for name, chosen in SCHEDULES.items():
                if not pinned.may_have(chosen) or chosen.virtual != 1:
                    continue
                shards = any(mesh.data > 1 for mesh in meshes)
                zeros = SEARCHED_ZEROS if pinned.zero is None else (pinned.zero,)
                for zero in zeros if shards else (0,):
                    if pinned.zero in (None, zero) and goes_together(name, len(meshes), count, zero):
                        yield meshes, count, name, zero


def mixed_sketches(problem: Problem) -> Iterator[Sketch]:
    layouts, num_blocks = MeshLayouts(problem), len(problem.graph.blocks)
    for meshes, count, schedule, zero in _settings(problem):
        ranks = place(problem.cluster, [mesh.size for mesh in meshes])
        try:
            rows_of = {mesh: layouts.all(mesh, count, zero) for mesh in meshes}
        except ValueError:  # nothing is legal on one of them
            continue
        for chosen in itertools.product(*rows_of.values()):
            rows = dict(zip(rows_of, chosen, strict=True))
            teams = tuple(team_of(mesh, r, rows[mesh], zero) for mesh, r in zip(meshes, ranks, strict=True))
            for cuts in itertools.combinations(range(1, num_blocks), len(meshes) - 1):
                yield Sketch((*cuts, num_blocks), teams, count, schedule)


def every_mixed_plan(problem: Problem) -> Iterator[Plan]:
    """All plans of the space, whether or not they fit in memory; none where the problem is not tiny."""
    return every_plan_of(problem, mixed_sketches(problem) if is_tiny(problem) else ())


def count_mixed_plans(problem: Problem) -> int:
    """Plans of the space, chains of layouts apart."""
    return count_plans_of(problem, (len(meshes) for meshes, *_ in _settings(problem))) if is_tiny(problem) else 0
