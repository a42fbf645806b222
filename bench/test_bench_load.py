"""bench/load.py against the real server, its arithmetic on known times, and bench/scale_model.py on a made-up machine."""

import json
import subprocess
import sys
import xml.etree.ElementTree as tree
from pathlib import Path
from types import SimpleNamespace

import load
import pytest
import scale_model
from servers import our_server

GOAL = load.Goal(ttft_s=0.5, tpot_s=0.1)
ANSWERS = [load.Answer(1.0, 2.0, (1.2, 1.3, 1.5, 2.0), 10, 9), load.Answer(0.0, 4.0, (1.0, 4.0), 20, 31), load.Answer(2.0, 2.5, error="503")]


def test_known_times_give_known_figures():
    figures = load.figures(ANSWERS, GOAL)
    assert {name: figures[name] for name in ("answers", "failed", "seconds", "tokens", "tokens a message")} == {
        "answers": 2, "failed": 1, "seconds": 4.0, "tokens": 40, "tokens a message": 20}
    expected = {"seconds a message": 2.5, "prompt tokens a message": 15, "TTFT p50, ms": 600, "TTFT p99, ms": 992, "ITL p50, ms": 350,
                "TPOT p50, ms": 100, "tok/s per user": 10, "tok/s total": 10, "goodput, answers/s": 0.25, "goodput, share": 1 / 3}
    assert {name: figures[name] for name in expected} == pytest.approx(expected)


def test_a_load_that_failed_has_figures_and_a_plot():
    """Everything in it failed."""
    results = {("batch", "one"): {"answers": ANSWERS[2:], "figures": load.figures(ANSWERS[2:], GOAL)}}
    assert results["batch", "one"]["figures"]["failed"] == 1 and "goodput" in load.table(results)
    tree.fromstring(load.plot(results, GOAL))


def test_pieces_are_told_however_bytes_are_cut():
    """They are told by their text."""
    def event(**delta):
        return b"data: " + json.dumps({"choices": [{"delta": delta}]}).encode() + b"\n\n"
    usage = b'data: {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}\n\ndata: [DONE]\n\n'
    stream = event(role="assistant", content="") + event(content="a") + event(reasoning_content="b") + usage
    for cut in range(len(stream)):
        answer = load.read_answer((0.0, 9.0, [(1.0, stream[:cut]), (2.0, stream[cut:])]))
        assert (answer.prompt_tokens, answer.tokens, answer.error) == (7, 3, "") and set(answer.pieces) <= {1.0, 2.0}
    assert load.read_answer((0.0, 9.0, [(1.0, b"data: [DONE]\n\n")])).error
    assert "too much" in load.read_answer((0.0, 9.0, [(1.0, event(content="a") + b'data: {"error": {"message": "too much"}}\n\n')])).error


def test_poisson_arrivals_have_their_rate():
    """They are the same for each server."""
    arrivals = load.poisson_arrivals(50, 100, "seed")
    assert arrivals == load.poisson_arrivals(50, 100, "seed") == sorted(arrivals) and arrivals[-1] < 100
    assert abs(len(arrivals) - 5000) < 4 * 5000 ** 0.5     # a false alarm in 16,000
    assert len(load.poisson_arrivals(0.001, 1, 0)) == 1


def test_every_load_against_the_real_server(tmp_path):
    files = {name: tmp_path / name for name in ("svg", "json", "prompts")}
    with our_server("serve", load.ROOT / "tests/fixtures/nanochat/gen5", "--device-type", "cpu") as server:
        command = [sys.executable, Path(load.__file__), f"fixture={server.url}", "--questions", 2, "--clients", 3, "--input-tokens", 24, "--output-tokens", 5,
                   "--rates", "20", "--seconds", 0.2, *(each for name, path in files.items() for each in (f"--{name}", path))]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr.count("\n") == 4, done.stderr
    rows = json.loads(files["json"].read_text())
    assert [row["load"] for row in rows] == ["interactive", "batch of 10", "3 clients", "open, 20/s"]
    assert all(row["figures"]["tokens"] == 5 * len(row["answers"]) and not row["figures"]["failed"] for row in rows)
    prompts = [json.loads(line)["text"] for line in files["prompts"].read_text().splitlines()]
    assert len(set(prompts)) == len(prompts) == sum(len(row["answers"]) for row in rows)
    assert "goodput" in done.stdout and tree.fromstring(files["svg"].read_text()).tag.endswith("svg")


BOX = {"step_ms": {"1": 10.0, "11": 20.0}, "serial_ms": {"1": 0.0}, "broadcast_ms": {"1": 0.0}, "layers": 4, "hidden": 1000, "vocabulary": 0, "together": 1.0,
       "links": {"node": {"latency_us": 0, "GB_per_s": 1e9}, "net": {"latency_us": 1000, "GB_per_s": 1e9}}, "ranks_per_node": 8, "front_ms": {"1": 1e-6}}


def test_free_links_scale_as_the_arithmetic_says():
    assert scale_model.at(6, BOX["step_ms"]) == 15 and scale_model.at(21, BOX["step_ms"]) == 30 and scale_model.at(1, {"4": 3.0}) == 3.0
    assert scale_model.predicted(BOX, 1, 1, 1, 11) == pytest.approx((550, 50, 20))
    assert scale_model.predicted(BOX, 2, 1, 1, 22) == pytest.approx((1100, 50, 20))         # twice as many clients on two replicas
    assert scale_model.predicted(BOX, 2, 2, 1, 11) == pytest.approx((1100, 100, 10))        # or half the time on two ranks
    assert scale_model.predicted(BOX, 2, 1, 2, 22) == pytest.approx((1100, 50, 20))         # or two batches in flight
    assert scale_model.predicted(BOX, 4, 1, 1, 2)[0] == pytest.approx(200)                  # two replicas have nothing to do
    slower = BOX | {"together": 2}
    assert [scale_model.predicted(slower, 2, 1, 1, count)[0] for count in (1, 2)] == pytest.approx([100, 100])      # and delay nobody


def test_links_and_what_is_not_shared_bound_it():
    """What cannot be shared and the links bound it."""
    serial = BOX | {"serial_ms": {"1": 10.0}}
    assert scale_model.predicted(serial, 8, 8, 1, 1)[2] == pytest.approx(10)
    assert scale_model.predicted(BOX | {"ranks_per_node": 1}, 2, 2, 1, 1)[2] == pytest.approx(5 + 2 * 4 + 1)    # 9 exchanges of 1 ms
    assert scale_model.predicted(BOX | {"front_ms": {"1": 10.0}}, 64, 1, 1, 64)[0] == pytest.approx(100)
    assert scale_model.table(BOX, 64, 256).count("\n| 64 |") == 4 * 3


def test_what_else_takes_time_from_the_ranks():
    told, uneven = BOX | {"broadcast_ms": {"1": 3.0}}, BOX | {"uneven": {"2": 1.2}}
    assert [scale_model.predicted(told, 2, tp, pp, 1)[2] for tp, pp in ((1, 1), (2, 1))] == pytest.approx([10, 8])
    assert [scale_model.predicted(uneven, 4, tp, 1, 1)[2] for tp in (2, 4)] == pytest.approx([6, 2.5])
    shared = BOX | {"ranks_per_node": 2, "overhead_ms": {"1": 4.0}}      # only where no CPU is left
    assert [scale_model.predicted(shared, gpus, tp, 1, clients)[2] for gpus, tp, clients in ((1, 1, 1), (2, 1, 1), (2, 1, 2), (2, 2, 1))] \
        == pytest.approx([10, 10, 14, 9])


def test_uneven_shares_slow_a_step_down():
    """Times between samples are interpolated."""
    attention = SimpleNamespace(head_size=2, heads=3, kv_heads=3)
    model = SimpleNamespace(width=4, attention=attention, layers=(None,), feed_width=8, vocab_size=0)      # 96 weights in attention, 96 elsewhere
    assert [scale_model.unevenness(model, tp) for tp in (1, 2, 3)] == pytest.approx([1, (96 * 4 / 3 + 96) / 192, 1])
    assert [scale_model.at_time(at_s, (0.0, 1.0, 3.0), (5, 6, 10)) for at_s in (0.5, 2.0, 4.0)] == [5.5, 8.0, 12.0]


def test_a_missing_measurement_is_told():
    with pytest.raises(SystemExit):
        scale_model.main(["predict"])
