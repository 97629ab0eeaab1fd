"""The same tests on several classes: how each of them ended, side by side."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import pytest

from gist_rag.evaluate.environment import environment
from gist_rag.models import DEFAULT_MODEL


class Outcomes:
    """A pytest plugin that notes how each test ended."""

    def __init__(self) -> None:
        self.of: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            name = report.nodeid.split("::", 1)[1]
            outcome = "xfailed" if hasattr(report, "wasxfail") else str(report.outcome)
            self.of[name] = outcome


def run(tests: Sequence[str]) -> dict[str, Any]:
    """How many tests ended in which way, and which did not pass."""
    outcomes, started = Outcomes(), time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main([*tests, "-q", "-p", "no:cacheprovider"], plugins=[outcomes])
    return {
        **Counter(outcomes.of.values()),
        "seconds": round(time.perf_counter() - started),
        "not_passed": {n: o for n, o in sorted(outcomes.of.items()) if o in ("failed", "xfailed")},
    }


def main(suites: Mapping[str, Sequence[str]], packages: Sequence[str], **settings: Any) -> None:
    """Run suites, and print a line each, or the result file.

    Args:
        suites: tests by the name of the class that they are run on.
        packages: whose versions the result file tells.
        settings: for the result file, too.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true", help="print the result file")
    as_json = parser.parse_args().json
    results = {name: run(tests) for name, tests in suites.items()}
    if as_json:
        meta = {
            **environment(),
            **{name: version(name) for name in packages},
            "model": DEFAULT_MODEL,
            **settings,
        }
        json.dump({"meta": meta, "results": results}, sys.stdout, indent=2)
        print()
        return
    for name, result in results.items():
        counts = ", ".join(f"{result.get(o, 0)} {o}" for o in ("passed", "failed", "xfailed"))
        print(f"{name}: {counts}, {result.get('skipped', 0)} skipped in {result['seconds']} s")
