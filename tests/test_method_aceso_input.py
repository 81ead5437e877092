"""The reader of Aceso's op tables, and a planner on what it reads."""

from __future__ import annotations

import pytest
from method_cases import peer

from autopar.planner.inputs.aceso_tables import MB, aceso_layers, read_aceso, read_aceso_table
from autopar.planner.inputs.layer_dag import LayerMachine
from autopar.planner.methods.piper_dag import dag_plan_time_s, piper_dag

HEADER = "op_name,forward-compute,backward-compute,input_size,output_size,weights,activations,fwd_reserved,bwd_reserved"
ROWS = [f"op{i},{i + 1}.0,2.0,3.0,4.0,5.0,6.0,7.0,8.0" for i in range(5)]


def write(path, lines) -> None:
    path.write_text("\n".join(lines) + "\n")


def test_reads_what_the_format_says(tmp_path):
    write(tmp_path / "m_mbs1_tp1_algo0.csv", [HEADER, *ROWS])
    write(tmp_path / "prim_m_all_gather_2gpus.csv", ["data_size(MB),time(ms)", "8,2.0", "4,1.0"])
    profile = read_aceso(tmp_path, "m")
    op = profile.tables[1, 1, 0][1]
    assert (op.name, op.forward_s, op.backward_s, op.weight_bytes) == ("op1", 2e-6, 2e-6, 5 * MB)
    assert profile.collectives["all_gather", 2] == ((4 * MB, 1e-3), (8 * MB, 2e-3))
    dag = aceso_layers(profile, 3, 1)
    assert [layer.name for layer in dag.layers] == ["front", "layer 0", "layer 1", "layer 2", "back"]
    keep, again = dag.layers[1].at[1].choices
    assert keep.time_s == pytest.approx((2 + 3 + 4 - 4 + 2 + 2) * 1e-6)
    assert again.time_s > keep.time_s and again.each_bytes < keep.each_bytes
    assert again.rest_bytes == keep.rest_bytes == 2 * 8 * 5 * MB


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([HEADER.replace("weights", "size"), *ROWS], "first line"),
        ([HEADER, *ROWS, "op9,1.0,2.0"], "3 columns"),
        ([HEADER, ROWS[0].replace("1.0", "fast")], "forward-compute of op0"),
        ([HEADER], "no ops"),
        ([""], "empty"),
    ],
)
def test_foreign_files_are_one_clear_error(tmp_path, lines, message):
    path = tmp_path / "m_mbs1_tp1_algo0.csv"
    write(path, lines)
    with pytest.raises(ValueError, match=message) as caught:
        read_aceso_table(path)
    assert str(path) in str(caught.value)


def test_folders_without_tables_and_unknown_sizes(tmp_path):
    with pytest.raises(ValueError, match="no table m_mbs"):
        read_aceso(tmp_path, "m")
    write(tmp_path / "m_mbs2_tp1_algo0.csv", [HEADER, *ROWS])
    with pytest.raises(ValueError, match=r"expected one of \[2\]"):
        aceso_layers(read_aceso(tmp_path, "m"), 2, 3)


def test_a_planner_runs_on_the_authors_own_tables():
    """GPT-1.3B, 24 layers, on 4 and 8 V100s: a plan that fits, priced as its definition says; more devices are faster."""
    folder = peer("aceso/profiles/gpt_1_3B_mbs1_tp1_algo0.csv").parent
    profile = read_aceso(folder, "gpt_1_3B")
    assert {(t, a) for _, t, a in profile.tables} == {(t, a) for t in (1, 2, 4) for a in (0, 1)}
    dag = aceso_layers(profile, 24, 4)
    times = []
    for devices in (4, 8):
        machine = LayerMachine(devices, 26 * 2**30, 11e9, 64)
        plan = piper_dag(dag, machine)
        assert dag_plan_time_s(dag, machine, plan.stages) == pytest.approx(plan.time_s)
        times.append(plan.time_s)
    assert times[1] < 0.7 * times[0]
