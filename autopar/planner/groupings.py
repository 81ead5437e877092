"""All ways to group a few unequal devices, for schedules that run several stages on each group: these are not walked, because
a group's stages lie apart in the model. planner/scheduled.py judges them and goes on by moves.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

from ..schedule.orders import schedule_named
from .meshes import Mesh, MeshLayouts, team_of
from .moves import Moves, laps_of
from .problem import Problem
from .sketch import Sketch, Team
from .unequal_room import Room
from .unequal_ways import WayFinder


def every_grouping(problem: Problem, moves: Moves) -> list[Sketch]:
    """Two groups or more, with every mesh that each may have, for the pinned schedule; those first whose devices together are
    fastest. In models of few blocks with every cut, in others of one stage each.

    moves: what knows how long blocks take on a group.
    """
    pinned, num_blocks = problem.constraints, len(problem.graph.blocks)
    chosen = schedule_named(pinned.schedule)
    room, finder, layouts = Room(problem.cluster), WayFinder(problem), MeshLayouts(problem.as_equal)
    most = pinned.pipeline or min(problem.cluster.world_size, num_blocks)
    found: list[tuple[float, Sketch]] = []
    for count in problem.microbatch_counts():
        for path in room.pipelines(most):
            if len(path) < 2 or pinned.pipeline not in (None, len(path)):
                continue
            ways = [_teams(finder, layouts, move.ranks, count) for move in path]
            for teams in itertools.product(*ways):
                one = Sketch((*range(1, len(teams)), num_blocks), teams, count, "1f1b")
                # Microbatches per second, if no device ever waited.
                speed = sum(1 / sum(moves.block_s(one, team)) for team in teams)
                if not finder.is_exact:
                    found.append((count / speed, one))
                    continue
                for virtual in laps_of(chosen):
                    for cuts in itertools.combinations(range(1, num_blocks), virtual * len(teams) - 1):
                        found.append((count / speed, replace(one, stops=(*cuts, num_blocks), schedule=chosen.name)))
    return [sketch for _, sketch in sorted(found, key=lambda one: one[0])]


def _teams(finder: WayFinder, layouts: MeshLayouts, ranks: tuple[int, ...], microbatches: int) -> list[Team]:
    found = []
    for data, tensor, shares in finder.meshes(ranks, microbatches):
        mesh = Mesh(data, tensor, shares)
        for zero in finder.zeros(data):
            try:
                rows = layouts.fastest(mesh, microbatches, zero)
            except ValueError:  # nothing is legal for so many shares of the batch
                continue
            found.append(team_of(mesh, ranks, rows, zero))
    return found
