"""What /metrics shows, for Prometheus."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator
from functools import partial
from typing import Any, TYPE_CHECKING

from chatlm.common.errors import Overloaded, RequestError, require_library
from chatlm.common.messages.requests import DRAFT_SOURCES, Finished, Piece
from chatlm.front.lazy import web

if TYPE_CHECKING:
    from chatlm.common.messages.requests import Event
    from chatlm.front.pool.catalogue import Catalogue
    from chatlm.front.server.ledger import Ledger
    from chatlm.front.tools.toolbox import Toolbox


def metrics_response(metrics: Metrics | None) -> web.Response:
    if metrics is None:
        raise RequestError("the Python package prometheus_client is not installed", status=501,
                           code="no_metrics")
    return web.Response(body=metrics.library.generate_latest(metrics.registry),
                        headers={"Content-Type": metrics.library.CONTENT_TYPE_LATEST})


class Metrics:
    """What /metrics shows: `watch` feeds histograms and counters; a scrape reads the rest from the pool."""

    SECONDS = (0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
    REASONS = ("stop", "length", "cancelled", "refused", "error")

    def __init__(self, catalogue: Catalogue, ledger: Ledger, toolbox: Toolbox):
        self.catalogue = catalogue
        self.library = require_library("prometheus_client", "/metrics")
        self.ledger = ledger
        self.toolbox = toolbox
        self.library.disable_created_metrics()  # else each counter also exports its start time
        self.registry = self.library.CollectorRegistry()
        self.registry.register(self)
        seconds = partial(self.library.Histogram, namespace="chat_server", registry=self.registry,
                          unit="seconds", buckets=self.SECONDS)
        counter = partial(self.library.Counter, namespace="chat_server", registry=self.registry)
        self.ttft = seconds("time_to_first_token", "time from a request to its first token")
        self.itl = seconds("inter_token_latency", "time between two tokens of an answer")
        self.queue = seconds("queue", "time a request waited before it ran")
        self.whole = seconds("request_duration", "time from a request to its end", ["finish_reason"])
        self.requests = counter("requests", "requests by how they ended", ["finish_reason"])
        self.tokens = counter("tokens", "prompt (computed or cached) and generated tokens", ["kind"])
        self.responses = counter("http_responses", "responses by route and status", ["route", "status"])
        for reason in self.REASONS:
            self.requests.labels(reason)

    def buckets(self, name: str) -> list[tuple[float, float]]:
        """The buckets of the histogram `ttft` or `itl`: (upper bound in seconds, count up to it)."""
        histogram = {"ttft": self.ttft, "itl": self.itl}[name]
        found = []
        for family in histogram.collect():
            for sample in family.samples:
                if sample.name.endswith("_bucket"):
                    found.append((float(sample.labels["le"]), sample.value))
        return found

    def collect(self) -> Iterator[Any]:
        """prometheus_client calls this on each scrape; it returns what the pool counts."""
        stats = self.catalogue.stats(self.catalogue.registry.served_models())
        families = self.library.metrics_core
        workers = stats["workers"]
        totals = {name: sum(worker[name] for worker in workers)
                  for name in ("running", "kv_pages_used", "kv_pages_total", "restarts")}
        for name, doc, value in (
                ("running", "requests on workers", totals["running"]),
                ("queued", "requests waiting for a worker", stats["queue_depth"]),
                ("kv_pages_used", "KV pages in use", totals["kv_pages_used"]),
                ("kv_pages", "KV pages", totals["kv_pages_total"]),
                ("workers", "configured workers", stats["total_workers"]),
                ("workers_up", "workers that are ready",
                 sum(worker["state"] == "ready" for worker in workers)),
                ("workers_in_crash_loop", "workers that keep dying",
                 sum(worker["crashes_in_row"] > 1 for worker in workers))):
            yield families.GaugeMetricFamily(f"chat_server_{name}", doc, value)
        yield families.CounterMetricFamily("chat_server_worker_restarts", "restarts of workers",
                                           totals["restarts"])
        for name, doc in (
                ("restored_tokens", "tokens of prompts that kept pages saved computing"),
                ("restored_bytes", "bytes of kept pages that were restored"),
                ("kept_pages", "KV pages that were copied to memory that outlives the workers"),
                ("missed_pages", "pages of prompts that were neither cached nor kept"),
                ("prefill_saved_s", "seconds of computing prompts that restored pages saved"),
                ("keeping_s", "seconds of a processor that copying pages to memory took")):
            unit = f"{name[:-2]}_seconds" if name.endswith("_s") else name
            yield families.CounterMetricFamily(f"chat_server_{unit}", doc,
                                               sum(worker.get(name) or 0 for worker in workers))
        prefixes = stats.get("prefixes", {})
        for name, doc in (("stored_pages", "KV pages that were written to --prefix-store"),
                          ("stored_bytes", "bytes that were")):
            yield families.CounterMetricFamily(f"chat_server_{name}", doc, prefixes.get(name, 0))
        yield families.GaugeMetricFamily("chat_server_prefix_memory_bytes", "memory that keeps prefixes",
                                         prefixes.get("memory_bytes", 0))
        gauge = families.GaugeMetricFamily
        counter = families.CounterMetricFamily
        calls = counter("chat_server_tool_calls", "calls of tools by how they ended",
                        labels=["server", "outcome"])
        for (label, outcome), number in self.toolbox.outcomes.items():
            calls.add_metric([label, outcome], number)
        yield calls
        seconds = counter("chat_server_tool_seconds", "seconds that calls of tools took", labels=["server"])
        for label, number in self.toolbox.seconds.items():
            seconds.add_metric([label], number)
        yield seconds
        restarts = counter("chat_server_tool_server_restarts", "restarts of tool servers", labels=["server"])
        for server in self.toolbox.servers:
            restarts.add_metric([server.config.label], server.restarts)
        yield restarts
        yield gauge("chat_server_tool_calls_running", "calls of tools that run now",
                    self.toolbox.limits.running.total())
        scores = gauge("chat_server_bits_per_byte", "how well a checkpoint predicts --watch-text",
                       labels=["model"])
        for name, value in stats.get("bits_per_byte", {}).items():
            scores.add_metric([name], value)
        yield scores
        known = gauge("chat_server_checkpoint_metric", "what is known of how good a checkpoint is",
                      labels=["model", "metric"])
        for served in self.catalogue.registry.served_models():
            if not served.adapter:
                for name, value in served.model.metrics.items():
                    known.add_metric([served.name, name], value)
        yield known
        for family_type, name, doc in (
                (gauge, "memory_used", "bytes of its GPU in use, else of its process"),
                (gauge, "memory_total", "bytes of its GPU, else of the machine"),
                (gauge, "utilization", "share of time in which its GPU computed (needs nvidia-ml-py)"),
                (gauge, "batch_fill", "share of --max-batch in use"),
                (counter, "preemptions", "answers whose KV pages were taken for others")):
            family = family_type(f"chat_server_worker_{name}", doc, labels=["worker", "device"])
            for worker in workers:
                if worker[name] is not None:
                    family.add_metric([str(worker["gpu_id"]), worker["device"]], worker[name])
            yield family
        for name, doc in (("drafted", "tokens that drafts proposed, by their source"),
                          ("accepted", "drafted tokens that were right")):
            family = counter(f"chat_server_worker_{name}_tokens", doc, labels=["worker", "device", "source"])
            for worker in workers:
                for source in DRAFT_SOURCES:
                    family.add_metric([str(worker["gpu_id"]), worker["device"], source],
                                      worker.get(f"{name}_{source}") or 0)
            yield family

        yield from self._usage()

    def _usage(self) -> Iterator[Any]:
        """What the ledger has counted since the server started. It is not divided by keys, because any key
        may read /metrics."""
        counter = self.library.metrics_core.CounterMetricFamily
        for name, doc in (
                ("requests", "requests that were answered, also in part"),
                ("prompt_tokens", "tokens of their prompts"),
                ("cached_tokens", "of these, found in the prefix cache"),
                ("completion_tokens", "tokens that were sent to their clients"),
                ("compute_s", "seconds of steps, each divided among the tokens in it")):
            unit = f"{name[:-2]}_seconds" if name.endswith("_s") else name
            family = counter(f"chat_server_usage_{unit}", doc, labels=["background"])
            for background, amount in [*self.ledger.totals.items()]:
                family.add_metric([str(background).lower()], getattr(amount, name))
            yield family

    async def watch(self, events: AsyncGenerator[Event, None], n: int) -> AsyncGenerator[Event, None]:
        """Pass an answer's events on, and count and time them. n: answers to each prompt."""
        began_s = time.monotonic()
        reason = "cancelled"
        last_s: dict[int, float] = {}  # by choice
        try:
            async for event in events:
                if isinstance(event, Piece) and event.tokens:
                    now = time.monotonic()
                    if event.choice not in last_s:
                        self.ttft.observe(now - began_s)
                    else:
                        for _ in event.tokens:
                            self.itl.observe((now - last_s[event.choice]) / len(event.tokens))
                    last_s[event.choice] = now
                elif isinstance(event, Finished):
                    reason = event.reason
                    self.queue.observe(event.queue_ms / 1e3)
                    self.tokens.labels("generated").inc(event.usage.completion_tokens)
                    if event.choice % n == 0:  # as in `usage`, a prompt counts once
                        self.tokens.labels("prompt").inc(
                            event.usage.prompt_tokens - event.usage.cached_tokens)
                        self.tokens.labels("prompt_cached").inc(event.usage.cached_tokens)
                yield event
        except Exception as error:
            if not isinstance(error, (Overloaded, RequestError)):
                reason = "error"
            elif error.code != "cancelled":
                reason = "refused"
            raise
        finally:
            await events.aclose()
            self.requests.labels(reason).inc()
            self.whole.labels(reason).observe(time.monotonic() - began_s)
