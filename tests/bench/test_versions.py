"""What the table of versions says of lanes: a lane in which nothing ran, or something failed, is never a pass."""

import pytest

from bench import versions


@pytest.mark.parametrize(
    "counts, words",
    [
        ({"passed": 7, "skipped": 1, "names": []}, "7 passed"),
        ({"passed": 7, "failed": 2, "error": 1, "names": []}, "**3 failed**, 7 passed"),
        ({"errors": 2, "names": []}, "**2 failed**, 0 passed"),
        (None, ""),
    ],
)
def test_a_cell(counts, words):
    assert versions.said(counts) == words


@pytest.mark.parametrize(
    "code, passed, failed",
    [("print('1 failed, 3 passed in 2s')", 3, 1), ("print('no tests ran')", None, 1), ("print('3 passed')", 3, None)],
)
def test_a_lane_is_read_from_its_last_line(tmp_path, code, passed, failed):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\nexec python3 -c \"{code}\"\n", "utf-8")
    program.chmod(0o755)
    found = versions.run(program, [], {})
    assert (found.get("passed"), found.get("failed")) == (passed, failed)


def test_rows_are_in_the_order_of_versions_and_not_of_letters():
    rows = [{"torch": torch, "triton": triton} for torch, triton in (("2.10.0", "3.6"), ("2.6.0+cu124", "3.2"))]
    assert [row["torch"] for row in sorted(rows, key=versions._order)] == ["2.6.0+cu124", "2.10.0"]
