"""Figures as people read them."""

from __future__ import annotations

from fedtailor import figures


def test_numbers_as_people_read_them() -> None:
    sizes = [figures.size(count) for count in (0, 999, 1000, 99_960, 999_600, 2.5e12, None, float("nan"))]
    assert sizes == ["0 B", "999 B", "1.0 kB", "100 kB", "1.0 MB", "2.5 TB", "–", "–"]
    assert [figures.duration(s) for s in (0.04, 59.4, 90, 900, 5400)] == ["0.0 s", "59 s", "1.5 min", "15 min", "1.5 h"]
    assert [figures.number(value) for value in (0.12345, 1, 12.34, True)] == ["0.123", "1.000", "12.3", "–"]
