"""The plan file, validation, explanation and comparison of plans."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
from planner_cases import chain_graph, small_cluster

from autopar.plan import SCHEMA, Candidate, Layout, Plan, Prediction, Stage, StageMemory, Term


def random_plan(seed: int) -> Plan:
    """A plan of well-formed parts; it need not fit any graph."""
    draw = random.Random(seed)
    tokens = ["R", "P", "H", "S0", "S1", "S2/3"]

    def row(most: int = 4) -> tuple[str, ...]:
        return tuple(draw.choice(tokens) for _ in range(draw.randrange(most)))

    layouts = tuple(
        Layout(
            draw.randrange(2, 9),
            tuple(draw.choice(["-", "o", "i@3", "partial:0"]) for _ in range(3)),
            row(),
            row(),
            row(),
        )
        for _ in range(draw.randrange(3))
    )
    indices = [
        tuple(tuple(draw.randrange(len(layouts)) for _ in range(3)) for _ in range(draw.randrange(3)))
        if layouts
        else ()
        for _ in range(5)
    ]
    stages = tuple(
        Stage(
            s, s + 1, tuple(range(draw.randrange(1, 5))), draw.randrange(1, 4), (draw.randrange(2, 4),) * len(indices[s]),
            indices[s], tuple(draw.choice(["none", "selective", "full"]) for _ in range(draw.randrange(2))),
            draw.randrange(4), draw.randrange(3), tuple(draw.randrange(1, 5) for _ in range(draw.randrange(3))),
        )
        for s in range(draw.randrange(1, 5))
    )  # fmt: skip
    return Plan(
        model=draw.choice(["Llama", 'A "quoted" näme\n']),
        fingerprint=f"{draw.getrandbits(64):016x}",
        world_size=draw.randrange(1, 99),
        batch_size=draw.randrange(1, 99),
        microbatches=draw.randrange(1, 9),
        schedule=draw.choice(["1f1b", "gpipe"]),
        stages=stages,
        layouts=layouts,
        prediction=draw.choice(
            [
                None,
                Prediction(draw.expovariate(1), draw.getrandbits(40)),
                Prediction(
                    draw.expovariate(1),
                    draw.getrandbits(40),
                    draw.expovariate(1),
                    (Term("compute", draw.random()),),
                    tuple(StageMemory(*(draw.getrandbits(40) for _ in range(5))) for _ in stages),
                    ('with "2 times"',),
                ),
            ]
        ),
        candidates=tuple(
            Candidate(f"plan {i}", draw.expovariate(1e-3), draw.getrandbits(40), "1.2x slower: bubbles 3%")
            for i in range(draw.randrange(3))
        ),
    )


@pytest.mark.parametrize("seed", range(50))
def test_round_trip_is_exact(seed, tmp_path):
    plan = random_plan(seed)
    assert Plan.from_json(plan.to_json()) == plan
    path = tmp_path / "plan.json"
    plan.save(path)
    again = Plan.load(path)
    assert again == plan and hash(again) == hash(plan)
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_saving_replaces_the_file_whole(tmp_path):
    path = tmp_path / "plan.json"
    random_plan(1).save(path)
    before = path.stat().st_ino
    random_plan(2).save(path)
    assert path.stat().st_ino != before, "the file was overwritten in place, a reader could see half of it"
    assert Plan.load(path) == random_plan(2)
    with pytest.raises(FileNotFoundError):
        random_plan(2).save(tmp_path / "missing" / "plan.json")


def test_every_truncation_is_an_error_that_names_the_file(tmp_path):
    text = random_plan(3).to_json().rstrip()
    path = tmp_path / "plan.json"
    for length in range(len(text)):
        path.write_text(text[:length])
        with pytest.raises(ValueError, match="plan.json"):
            Plan.load(path)
    for seed in range(20):
        text = random_plan(seed).to_json()
        with pytest.raises(ValueError, match="truncated"):
            Plan.from_json(text[: text.rindex(",")])


def _paths(value, path=()):
    """All places of a JSON value, innermost last."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from _paths(item, (*path, key))


def _parent(data, path):
    for key in path[:-1]:
        data = data[key]
    return data


def _words(path) -> str:
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
    return text.lstrip(".")


def test_every_wrong_type_is_an_error_that_names_the_field():
    full = next(
        p for p in map(random_plan, range(100)) if p.layouts and p.prediction and p.candidates and p.stages[0].layouts
    )
    checked = 0
    for path in _paths(json.loads(full.to_json())):
        for wrong in (
            {"strange": 1},
            path[-1] != "offload" or "true",
            [["x", {}]],
            "nonsense" if path[-1] in ("recompute", "zero", "stages") else 1.5j,
        ):
            data = json.loads(full.to_json())
            old = _parent(data, path)[path[-1]]
            if isinstance(wrong, complex):
                wrong = 7 if isinstance(old, str) else "seven"
            _parent(data, path)[path[-1]] = wrong
            with pytest.raises(ValueError) as caught:
                Plan.from_json(json.dumps(data), "f.json")
            assert path[0] in str(caught.value) and "f.json" in str(caught.value)
            if isinstance(wrong, str | int | bool) and path != ("schema",):
                assert _words(path) in str(caught.value)
            checked += 1
    assert checked > 200


def test_missing_and_unknown_fields_are_named():
    plan = random_plan(4)
    for path in _paths(json.loads(plan.to_json())):
        if isinstance(path[-1], int):
            continue
        data = json.loads(plan.to_json())
        del _parent(data, path)[path[-1]]
        with pytest.raises(ValueError, match=path[-1]):
            Plan.from_json(json.dumps(data))
        data = json.loads(plan.to_json())
        _parent(data, path)["colour"] = 1
        with pytest.raises(ValueError, match="colour"):
            Plan.from_json(json.dumps(data))


def test_other_files_are_refused():
    plan = random_plan(5)
    data = {**json.loads(plan.to_json()), "schema": SCHEMA + 1}
    with pytest.raises(ValueError, match=f"schema is {SCHEMA + 1}, this version of autopar reads {SCHEMA}"):
        Plan.from_json(json.dumps(data))
    for text, words in (
        ("[]", "list"),
        ("{}", "no field schema"),
        ("step,time\n1,2", "not JSON"),
        ("", "JSON"),
        ("null", "null"),
    ):
        with pytest.raises(ValueError, match=words):
            Plan.from_json(text)


# --- validation ------------------------------------------------------------------------------------------------------

GRAPH = chain_graph((0, 1, 1, 0), batch_size=8)
CLUSTER = small_cluster(8)


def layouts_for(tensor: int) -> tuple[Layout, ...]:
    return tuple(
        Layout(tensor, ("-",) * len(b.ops), ("R",) * len(b.inputs), ("R",) * len(b.outputs), ("R",) * len(b.parameters))
        for b in GRAPH.blocks
    )


def good_plan() -> Plan:
    """pipeline 2 x data 2 x tensor 2, 2 microbatches, on GRAPH and CLUSTER."""
    return Plan(
        GRAPH.name, GRAPH.fingerprint, 8, 8, 2, "1f1b",
        (
            Stage(0, 2, (0, 1, 2, 3), 2, (2,), ((0, 1),), (), 3),
            Stage(2, 4, (4, 5, 6, 7), 2, (2,), ((2, 3),), ("full",) * 2, 3),
        ),
        layouts_for(2),
    )  # fmt: skip


def stage(plan: Plan, index: int, **changes) -> Plan:
    stages = list(plan.stages)
    stages[index] = replace(stages[index], **changes)
    return replace(plan, stages=tuple(stages))


def layout(plan: Plan, index: int, **changes) -> Plan:
    layouts = list(plan.layouts)
    layouts[index] = replace(layouts[index], **changes)
    return replace(plan, layouts=tuple(layouts))


def halves(plan: Plan, groups: tuple[int, ...], schedule: str) -> Plan:
    """One stage for each entry of `groups`, on that group's ranks, over the blocks in order."""
    last = len(groups) - 1
    stages = tuple(
        replace(
            plan.stages[g],
            start=i,
            stop=len(GRAPH.blocks) if i == last else i + 1,
            layouts=(tuple(range(i, len(GRAPH.blocks) if i == last else i + 1)),),
            recompute=(),
        )
        for i, g in enumerate(groups)
    )
    return replace(plan, stages=stages, schedule=schedule)


def test_a_good_plan_is_valid():
    good_plan().validate(GRAPH, CLUSTER)
    halves(good_plan(), (0, 1, 0, 1), "interleaved").validate(GRAPH, CLUSTER)
    Plan(GRAPH.name, GRAPH.fingerprint, 1, 8, 8, "gpipe", (Stage(0, 4, (0,), 1),)).validate(GRAPH, small_cluster(1))


BAD = {
    "schema": (lambda p: replace(p, schema=9), "plan.schema is 9"),
    "model": (lambda p: replace(p, model="GPT2"), "plan.model is GPT2, the captured model is Chain"),
    "fingerprint": (lambda p: replace(p, fingerprint="0" * 16), "plan.fingerprint is 0000"),
    "batch": (lambda p: replace(p, batch_size=16), "plan.batch_size is 16, the captured example has 8 rows"),
    "world": (lambda p: replace(p, world_size=4), "plan.world_size is 4, the cluster has 8 devices"),
    "schedule": (lambda p: replace(p, schedule="1f2b"), "'1f2b', expected one of gpipe, 1f1b, .*; did you mean '1f1b'"),
    "evaluation": (lambda p: replace(p, schedule="forward"), "'forward', expected one of gpipe, 1f1b"),
    "microbatches": (lambda p: replace(p, microbatches=0), "plan.microbatches is 0"),
    "batch rows": (
        lambda p: replace(p, microbatches=3),
        "does not divide the batch of 8 rows; plan.microbatches could be 2 or 4",
    ),
    "no stages": (lambda p: replace(p, stages=()), "plan.stages is empty"),
    "degrees": (
        lambda p: replace(p, stages=p.stages[:1]),
        "pipeline 1 x data 2 x tensor 2 = 4, but plan.world_size is 8",
    ),
    "ranks": (lambda p: stage(p, 0, ranks=(0, 1)), r"stages\[0\].ranks has 2 ranks, expected data 2 x tensor 2 = 4"),
    "rank twice": (lambda p: stage(p, 1, ranks=(3, 5, 6, 7)), "ranks 3 are out of range or stand in two"),
    "rank range": (lambda p: stage(p, 1, ranks=(4, 5, 6, 8)), "ranks 8 are out of range"),
    "uneven": (
        lambda p: stage(p, 1, data=4, axes=()),
        r"stages\[1\].layouts has 1 entries, expected 0: one per model axis",
    ),
    "shares": (
        lambda p: stage(p, 1, shares=(3, 3)),
        r"stages\[1\].shares is \[3, 3\], 6 rows together; expected the 4 rows .* such as \[2, 2\]",
    ),
    "more shares than rows": (
        lambda p: replace(stage(p, 0, shares=(3, 1)), microbatches=8),
        r"stages\[0\].shares is \[3, 1\], but a microbatch has 1 rows for 2 data ranks; use fewer microbatches",
    ),
    "shares per rank": (lambda p: stage(p, 1, shares=(2, 1, 1)), r"stages\[1\].shares is .* each of 2 data ranks"),
    "empty share": (lambda p: stage(p, 1, shares=(4, 0)), r"stages\[1\].shares is \[4, 0\], expected at least one row"),
    "zero degree": (lambda p: stage(p, 0, data=0), r"stages\[0\].data is 0"),
    "zero": (lambda p: stage(p, 0, zero=4), r"stages\[0\].zero is 4, expected 0, 1, 2 or 3"),
    "recompute": (lambda p: stage(p, 1, recompute=("some",) * 2), r"stages\[1\].recompute\[0\] is 'some'"),
    "gap": (lambda p: stage(p, 1, start=3), r"stages\[1\].start is 3, expected 2"),
    "empty stage": (lambda p: stage(stage(p, 0, stop=0), 1, start=0), r"stages\[0\].stop is 0"),
    "not covered": (lambda p: stage(p, 1, stop=3), r"stages\[1\].stop is 3, expected 4"),
    "too many blocks": (lambda p: stage(p, 1, stop=5), r"stages\[1\].stop is 5, expected 4"),
    "layout count": (lambda p: stage(p, 1, layouts=((2,),)), r"stages\[1\].layouts\[0\] has 1 entries, expected 2"),
    "layout index": (lambda p: stage(p, 1, layouts=((2, 4),)), r"stages\[1\].layouts\[0\]\[1\] is 4"),
    "layout degree": (lambda p: layout(p, 1, degree=4), r"layouts\[1\].degree is 4"),
    "strategies": (lambda p: layout(p, 0, strategies=()), r"layouts\[0\].strategies has 0 entries, expected 1"),
    "strategy": (
        lambda p: layout(p, 0, strategies=("diagonal",)),
        r"layouts\[0\].strategies\[0\] is 'diagonal'.* only as .*-",
    ),
    "inputs": (lambda p: layout(p, 1, inputs=()), r"layouts\[1\].inputs has 0 entries, expected 1.*y0_0"),
    "outputs": (lambda p: layout(p, 1, outputs=("R", "R")), r"layouts\[1\].outputs has 2 entries"),
    "parameters": (lambda p: layout(p, 1, parameters=("R",)), r"layouts\[1\].parameters has 1 entries, expected 2"),
    "token": (lambda p: layout(p, 0, parameters=("X",)), r"layouts\[0\].parameters\[0\]: not a placement: 'X'"),
    "dim": (lambda p: layout(p, 0, parameters=("S2",)), r"layers.0.0.weight of shape \(24, 24\) has no dim 2"),
    "blocks": (lambda p: layout(p, 0, parameters=("S0/5",)), "degree 2 x 5 blocks does not divide"),
    "boundary": (
        lambda p: layout(p, 1, inputs=("S1",)),
        r"layouts\[1\].inputs \(block 1\) is \['S1'\], but .* leaves \['R'\]",
    ),
    "stages for the schedule": (
        lambda p: halves(p, (0, 1, 0, 1), schedule="1f1b"),
        "plan.stages: schedule '1f1b' runs 1 stage on each set of ranks, so 2 sets need 2 stages, not 4",
    ),
    "order of groups": (
        lambda p: halves(p, (0, 1, 1, 0), schedule="interleaved"),
        r"stages\[2\].ranks is \[4, 5, 6, 7\], but schedule 'interleaved' runs stage 2 of 4 on ranks \[0, 1, 2, 3\]",
    ),
    "uneven laps": (lambda p: halves(p, (0, 1, 0), schedule="interleaved"), "the nearest counts are 2 and 4"),
    "meshes of a group": (
        lambda p: stage(halves(p, (0, 1, 0, 1), schedule="interleaved"), 2, data=4, axes=(), layouts=()),
        r"stages\[2\].data is 4, but plan.stages\[0\].data, on the same ranks, is 2",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_validation_names_the_fault(case):
    change, words = BAD[case]
    with pytest.raises(ValueError, match=words):
        change(good_plan()).validate(GRAPH, CLUSTER)


def test_a_degree_that_does_not_divide_names_the_nearest():
    stages = (Stage(0, 4, tuple(range(5)), 1, (5,), ((0, 1, 2, 3),)),)
    plan = Plan(GRAPH.name, GRAPH.fingerprint, 5, 8, 1, "1f1b", stages, layouts_for(5))
    with pytest.raises(ValueError, match="degree 5 does not divide; the nearest tensor degrees that do are 4 or 6"):
        layout(plan, 0, parameters=("S0",)).validate(GRAPH, small_cluster(5))
    with pytest.raises(ValueError, match="data must divide the batch: 4 or 8"):
        replace(plan, stages=(Stage(0, 4, tuple(range(5)), 5),), layouts=()).validate(GRAPH, small_cluster(5))
    with pytest.raises(ValueError, match="zero is 3, which shards over the data axis, but data is 1"):
        replace(plan, stages=(Stage(0, 4, tuple(range(5)), 1, (5,), ((0, 1, 2, 3),), zero=3),)).validate(
            GRAPH, small_cluster(5)
        )


# --- words -----------------------------------------------------------------------------------------------------------


def test_explain_tells_degrees_stages_and_candidates():
    plan = replace(
        good_plan(),
        prediction=Prediction(0.125, 3 * 2**30),
        candidates=(
            Candidate("the winner", 0.125, 3 * 2**30, "chosen"),
            Candidate("the loser", 0.25, 2**30, "2.00x slower: bubbles 22%"),
        ),
    )
    text = plan.explain()
    for words in (
        "pipeline 2 x data 2 x tensor 2, 2 microbatches, 1f1b, zero 3, recompute none in stages 0 and full in stages 1",
        "2 microbatches of 2 rows", "ZeRO 3", "0-3", "4-7", "125 ms", "3.0 GiB", "bubbles 22%", "layout 3",
    ):  # fmt: skip
        assert words in text, f"{words!r} is not in\n{text}"
    chosen, loser = [line for line in text.splitlines() if "the winner" in line or "the loser" in line]
    assert chosen.startswith("*") and not loser.startswith("*")
    assert max(map(len, text.splitlines())) < 200
    assert "layers.0.0.weight" in plan.explain(GRAPH)


def test_diff_tells_what_changed():
    plan = good_plan()
    assert plan.diff(plan) == ""
    other = stage(replace(plan, microbatches=4), 0, stop=1, recompute=("full",), layouts=((0,),))
    other = stage(other, 1, start=1, layouts=((1, 2, 3),), recompute=("full",) * 3)
    text = plan.diff(other)
    for words in (
        "microbatches: 2 -> 4",
        "stage 0: blocks 0-1 -> 0-0, recompute none -> full",
        "stage 1: blocks 2-3 -> 1-3",
    ):
        assert words in text, text
    split = layout(layout(plan, 0, outputs=("S1",)), 1, inputs=("S1",))
    assert plan.diff(split) == "stage 0: other layouts in blocks 0-1"
    single = Plan(GRAPH.name, GRAPH.fingerprint, 8, 8, 1, "1f1b", (Stage(0, 4, tuple(range(8)), 8),))
    text = plan.diff(single)
    for words in ("pipeline: 2 -> 1", "data: 2 -> 8", "tensor: 2 -> 1", "zero: 3 -> 0", "stage 1: gone"):
        assert words in text, text
    assert "stage 1: new" in single.diff(plan)


@pytest.mark.parametrize("seed", range(20))
def test_words_for_any_plan(seed):
    plan, other = random_plan(seed), random_plan(seed + 1)
    assert plan.model in plan.explain()
    assert (plan.diff(other) == "") == (plan == other)
