"""A slow link and a CPU quota are named for what they are; all thirty cases: tests/perf/stragglers.py."""

from __future__ import annotations

import pytest

from tests.perf.stragglers import CASES, CAUSES, CPU, Case, name_of, run

pytestmark = [pytest.mark.lab, pytest.mark.timeout(200)]
SAMPLE = [case for case in CASES if name_of(case) in ("link-5-rank1of2", "quota-0.4-rank1of2")]


@pytest.mark.parametrize("case", SAMPLE, ids=name_of)
def test_the_rank_and_its_cause(case: Case) -> None:
    if case["kind"] == "quota" and not (CPU / "cpu.cfs_quota_us").exists():
        pytest.skip("no cgroup v1 cpu controller")
    events, took = run(case)
    assert bool(took) is (case["kind"] == "quota")
    named = [(event["rank"], event["cause"]) for event in events]
    assert named[:1] == [(case["rank"], CAUSES[case["kind"]])], named
