"""Where llama-server's n_indent and t_max_predict_ms end an answer."""

import pytest

from chatlm.worker.engine.line_ends import LineEnds


def pushed(lines, pieces):
    return "".join(map(lines.push, pieces)), lines.ended_by


@pytest.mark.parametrize("indent, text, kept", [
    (4, "return x\n    y\nz", "return x\n    y\n"),
    (4, "x\n  y", "x\n  "),
    (2, "x\n\t\ty\n \tz\n\tw", "x\n\t\ty\n \tz\n\t"),
    (1, "x\n\ny", "x\n"),
    (1, "x\n", "x\n"),
    (1, "x\r\n y", "x\r\n y"),
    (3, "no line at all", "no line at all"),
])
def test_however_the_text_is_cut_into_tokens_it_ends_at_one_place(indent, text, kept):
    for size in range(1, len(text) + 1):
        pieces = [text[i:i + size] for i in range(0, len(text), size)]
        assert pushed(LineEnds(indent, 0), pieces) == (kept, "n_indent" if kept != text else None)


def test_time_ends_it_at_a_new_line_only():
    times = iter((100.0, 100.004, 100.006, 100.007))
    lines = LineEnds(0, 5, lambda: next(times))
    ended = []
    for piece in ("a\n", "b\n", "c", "d\n"):
        assert lines.push(piece) == piece
        ended.append(lines.ended_by)
    assert ended == [None, None, None, "t_max_predict_ms"]


def test_the_text_of_an_earlier_worker_takes_no_time():
    times = iter((0.0, 9.0, 20.0, 20.1))
    lines = LineEnds(2, 1000, lambda: next(times))
    assert pushed(lines, ["a\n", "  b\n"]) == ("a\n  b\n", "t_max_predict_ms")
    lines.resume()
    assert lines.ended_by is None
    assert pushed(lines, ["  c\n", "d"]) == ("  c\n", "n_indent")


def test_an_end_by_indentation_stays_after_a_resume():
    lines = LineEnds(2, 0)
    assert pushed(lines, ["a\n", "b"]) == ("a\n", "n_indent")
    lines.resume()
    assert pushed(lines, ["  c"]) == ("", "n_indent")
