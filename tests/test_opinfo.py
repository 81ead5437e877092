"""Every rule against a source that is not ours: the sample inputs of torch's own operator tests.

For each sample a graph of one op is made; for each legal strategy on 2 and 3 ranks the op runs on every rank's part,
and the outputs and all gradients are put together again and compared with those of the whole op.
"""

from __future__ import annotations

import warnings
from collections import Counter

import torch
from opinfo_cases import check_sample, generated_samples, op_samples


def test_every_split_of_every_sample():
    torch.manual_seed(0)
    failures: list[str] = []
    cases: Counter[str] = Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for sample in (*op_samples(), *generated_samples()):
            count, wrong = check_sample(sample)
            cases[".".join(sample[0].split(".")[:2])] += count
            failures += wrong
    print(f"{cases.total()} (op, sample, split) cases over {len(cases)} ops, {len(failures)} mismatches")
    assert not failures, "\n".join(failures[:40])
    assert cases.total() >= 6000
