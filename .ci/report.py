"""What a run of pytest found, as rows for the table of nights in bench/RESULTS.md: python .ci/report.py NAME=FILE.xml ...

A FILE is what `pytest --junitxml` wrote. After the rows comes why tests were skipped, with how many for each reason.
"""

import datetime
import platform
import re
import sys
import xml.etree.ElementTree as tree
from collections import Counter
from pathlib import Path


def machine() -> str:
    """The processor and its cores."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.machine()
    models = re.findall(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return f"{models[0] if models else platform.machine()}, {max(1, len(models))} cores"


def read(path: str) -> tuple[Counter, Counter, float]:
    """(how many tests have each outcome, how many were skipped for each reason, seconds)"""
    outcomes, reasons, seconds = Counter(), Counter(), 0.0
    for suite in tree.parse(path).getroot().iter("testsuite"):
        seconds += float(suite.get("time", 0))
        for case in suite.iter("testcase"):
            skipped = case.find("skipped")
            if case.find("failure") is not None or case.find("error") is not None:
                outcomes["failed"] += 1
            elif skipped is not None:
                outcomes["skipped"] += 1
                reasons[skipped.get("message", "")] += 1
            else:
                outcomes["passed"] += 1
    return outcomes, reasons, seconds


def main(words: list[str]) -> int:
    """Print the report; 1 if a test failed."""
    today, why, failed = datetime.date.today(), Counter(), 0
    for word in words:
        name, _, path = word.partition("=")
        outcomes, reasons, seconds = read(path)
        why += reasons
        failed += outcomes["failed"]
        print(f"| {name} | {today} | {machine()} | {outcomes['passed']:,} | {outcomes['failed']} | {outcomes['skipped']} | {seconds / 60:.0f} |")
    for reason, count in why.most_common():
        print(f"- skipped {count}: {reason}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
