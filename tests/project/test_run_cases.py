"""The script that judges random cases: its judgements, its repetitions, and what becomes of jobs that fail."""

import functools
import json

import cases
import pytest
import run_cases
import torch

from hf_flashbsa.bench.workers import JobError


def test_poison_reaches_every_uninitialised_tensor(nan_memory):
    x = torch.zeros(2, 3)
    made = (torch.empty(2), torch.empty_like(x), x.new_empty(3), torch.empty_strided((2, 2), (2, 1)))
    assert all(t.isnan().all() for t in made)
    assert torch.empty(2, dtype=torch.int32).shape == (2,)


def test_random_cases_are_judged_and_repeated(tmp_path):
    options = run_cases.parse(
        f"--out {tmp_path / 'rows'} --device cpu --backend torch --max-len 64 --repeats 2".split()
    )
    seed = next(s for s in range(100) if run_cases.case_of(s, options).dropout_p > 0.0)
    judged = run_cases.run_job(run_cases.Job("case", seed), options)
    assert judged["ok"] and {"out", "lse", "dq", "dk", "dv"} <= set(judged["ratios"])
    assert run_cases.run_job(run_cases.Job("repeat", seed), options)["differing"] == []


def test_repeats_notice_a_changing_result(monkeypatch, tmp_path):
    options = run_cases.parse(f"--out {tmp_path / 'rows'} --device cpu --max-len 64 --repeats 3".split())
    monkeypatch.setattr(cases, "run", lambda *_: {"out": torch.zeros(2), "dq": torch.rand(2)})
    assert run_cases.repeat(run_cases.case_of(0, options), options) == ["dq"]


@pytest.mark.parametrize("seed", range(10))
def test_yardstick_allows_for_sums_in_float32(seed, monkeypatch):
    """Hundreds of queries see one key alone: its `dv` is the sum of their output gradients. A kernel that is exact but
    for adding them up one by one passes beside an eager attention that has no error at all; one wrong query fails."""
    case = cases.Case(
        seed=seed, dtype=torch.float32, batch=1, heads=4, heads_k=1, len_q=777, len_k=1, dim=16, dim_v=96,
        masking="none", causal=False, window_size=(None, None), bias=None, sinks=False, softcap=None,
        dropout_p=0.0, scale=None, strides="bhsd", gain=3.0, blocks=None,
    )  # fmt: skip
    exact_of = cases.expected
    exact = exact_of(cases.make_problem(case, "cpu"), case, torch.float64)
    terms = cases.make_problem(case, "cpu").dout.flatten(0, 2)

    def judged(terms: torch.Tensor) -> float:
        summed = torch.zeros(case.dim_v)
        for term in terms:
            summed += term
        monkeypatch.setattr(cases, "run", lambda *_: {**exact, "dv": summed.expand_as(exact["dv"])})
        return cases.worst_ratio(case, "cpu", "torch")["dv"]

    monkeypatch.setattr(cases, "expected", lambda problem, case, dtype: exact_of(problem, case, torch.float64))
    assert 0.1 < judged(terms) <= 1.0
    assert judged(terms[1:]) > 1.0


def test_integer_inputs_are_integers():
    make = run_cases.with_integers(cases.make_problem)
    case = cases.random_case(3, dtypes=(torch.float16,), max_len=64, dims=(16,))
    problem = make(case, "cpu")
    assert all(torch.equal(x, x.round()) for x in (problem.q, problem.k, problem.v))
    assert problem.q.requires_grad


def test_failed_jobs_become_rows(tmp_path, monkeypatch, capsys):
    path = tmp_path / "rows.jsonl"

    def outcomes(work, jobs, **limits):
        assert isinstance(work, functools.partial)
        yield jobs[0], JobError("the worker process died with exit code -11")
        yield jobs[1], {"ok": True, "ratios": {"out": 0.25}, "seconds": 1.0}

    monkeypatch.setattr(run_cases, "run_jobs", outcomes)
    assert run_cases.main(f"--cases 3 --repeats 0 --device cpu --out {path}".split()) == 1
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["ok"] for row in rows] == [False, True] and "-11" in rows[0]["error"]
    printed = capsys.readouterr().out
    assert "exit code -11" in printed and "1 of 3 jobs did not run" in printed


def test_hopper_cases_are_those_that_its_kernels_can_take(tmp_path):
    options = run_cases.parse(f"--out {tmp_path / 'rows'} --device cpu --hopper".split())
    drawn = [run_cases.case_of(seed, options) for seed in range(200)]
    assert {case.dim for case in drawn} == {case.dim_v for case in drawn} == {64, 128}
    assert {case.dtype for case in drawn} == {torch.float16, torch.bfloat16}
    assert {case.blocks for case in drawn} == {None, 128}
    assert all(case.bias is case.softcap is case.alibi is None for case in drawn)
    assert {case.masking for case in drawn} == set(run_cases.HOPPER_MASKS)
    assert {case.dropout_p > 0.0 for case in drawn} == {case.causal for case in drawn} == {True, False}
