"""What the front counts for /metrics: in the words of prometheus_client, which only a scrape imports."""

import random
import subprocess
import sys

import prometheus_client
from prometheus_client import metrics_core

from chatlm.front.annexes.metrics.routes import MetricFamilies
from chatlm.front.held import Durations
from chatlm.front.intake.budget import Budget
from chatlm.front.server.metrics import Metrics


def text_of(families):
    """What prometheus_client writes for these families."""
    registry = prometheus_client.CollectorRegistry()
    registry.register(type("Families", (), {"collect": lambda self: families})())
    return prometheus_client.generate_latest(registry).decode()


def of_the_library():
    """The library's own histogram and counters, with the names that /metrics has had from the beginning."""
    registry = prometheus_client.CollectorRegistry()
    histogram = prometheus_client.Histogram(
        "request_duration", "time from a request to its end", ["finish_reason"], namespace="chat_server", unit="seconds",
        registry=registry, buckets=Durations.BOUNDS_S)
    counter = prometheus_client.Counter(
        "http_responses", "responses by route and status", ["route", "status"], namespace="chat_server", registry=registry)
    return registry, histogram, counter


def test_a_scrape_reads_as_if_the_library_had_counted():
    prometheus_client.disable_created_metrics()
    registry, histogram, counter = of_the_library()
    metrics, dice = Metrics(None, None, Budget(1 << 20)), random.Random(7)
    bounds = [bound for bound in Durations.BOUNDS_S if bound < 1000]
    for duration in [0.0, *bounds, 4096.0, *(2 ** dice.uniform(-12, 10) for _ in range(200))]:
        reason = dice.choice(["stop", "length"])
        metrics.whole[reason].observe(duration)
        histogram.labels(reason).observe(duration)
    for route, status in [("/health", 200), ("/health", 503), ("/v1/cancel/{id}", 404), ("/health", 200)]:
        metrics.responses[route, status] += 1
        counter.labels(route, status).inc()
    wanted = prometheus_client.generate_latest(registry).decode()
    shown = text_of([*MetricFamilies(metrics, (), metrics_core)._own()])
    assert {line for line in shown.splitlines() if "request_duration" in line or "http_responses" in line} == {*wanted.splitlines()}
    assert 'chat_server_requests_total{finish_reason="refused"} 0.0' in shown      # a reason is there before it first occurs


def test_tokens_of_one_piece_count_one_by_one():
    durations = Durations()
    durations.observe(0.25, 3)
    assert durations.buckets()[-1][1] == 3 and durations.sum_s == 0.75
    assert dict(durations.buckets())[0.25] == 3 and dict(durations.buckets())[0.1] == 0


def test_only_a_scrape_imports_the_library():
    code = ("import sys; from chatlm.common.config import Settings; from chatlm.front.front import create_app; from chatlm.front.pool.catalogue import Catalogue; "
            "from chatlm.front.pool.pool import make_pool; settings = Settings(); "
            "create_app(Catalogue(settings, make_pool(settings)), settings); print('prometheus_client' in sys.modules)")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert found.stdout.split() == ["False"], found.stderr
