"""What /metrics shows, for Prometheus."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence as Seq
from functools import partial
from typing import Any, TYPE_CHECKING

from aiohttp import web

from chatlm.common.errors import ConfigError, RequestError, require_library
from chatlm.common.messages.protocol import BROKEN_INVARIANTS
from chatlm.common.messages.requests import DRAFT_SOURCES
from chatlm.front.held import HOLDS
from chatlm.front.server.metrics import histogram

if TYPE_CHECKING:
    from chatlm.front.front import Front
    from chatlm.front.server.metrics import Metrics

Show = Callable[[Any], Iterator[Any]]  # what an annex counts, as `MetricFamilies` does


class MetricRoutes:
    """The handler of /metrics."""

    def __init__(self, metrics: Metrics, shows: Callable[[], Seq[Show]]):
        """shows: returns those of the annexes that are open."""
        self.metrics = metrics
        self.shows = shows

    @classmethod
    def of(cls, front: Front) -> MetricRoutes:
        return cls(front.metrics, lambda: [partial(annex.metrics, front.rooms[annex.name])
                                           for annex in front.annexes
                                           if annex.metrics and annex.name in front.rooms])

    async def handle_metrics(self, http: web.Request) -> web.Response:
        try:  # at the first scrape: a start without its modules is 20 ms shorter
            library = await asyncio.to_thread(require_library, "prometheus_client", "/metrics")
        except ConfigError:
            raise RequestError("the Python package prometheus_client is not installed", status=501,
                               code="no_metrics") from None
        registry = library.CollectorRegistry()
        registry.register(MetricFamilies(self.metrics, self.shows(), library.metrics_core))
        return web.Response(body=library.generate_latest(registry),
                            headers={"Content-Type": library.CONTENT_TYPE_LATEST})


class MetricFamilies:
    """Everything that a scrape shows, in the classes of prometheus_client: what the pool counts, what the
    ledger and annexes count, and what `Metrics` does."""

    def __init__(self, metrics: Metrics, shows: Seq[Show], families: Any):
        """families: the module prometheus_client.metrics_core."""
        self.metrics = metrics
        self.catalogue = metrics.catalogue
        self.ledger = metrics.ledger
        self.shows = shows
        self.families = families

    def collect(self) -> Iterator[Any]:
        """prometheus_client calls this on each scrape; it returns what the pool counts."""
        stats = self.catalogue.stats(self.catalogue.registry.served_models())
        families = self.families
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
                ("restored_tokens", "tokens whose kept pages were restored, for prompts or ahead of them"),
                ("restored_bytes", "bytes of kept pages that were restored"),
                ("kept_pages", "KV pages that were copied to memory that outlives the workers"),
                ("missed_pages", "pages of prompts that were neither cached nor kept"),
                ("prefill_saved_s", "seconds of computing that pages restored for prompts saved"),
                ("keeping_s", "seconds of a processor that copying pages to memory took")):
            unit = f"{name[:-2]}_seconds" if name.endswith("_s") else name
            yield families.CounterMetricFamily(f"chat_server_{unit}", doc,
                                               sum(worker.get(name) or 0 for worker in workers))
        yield families.CounterMetricFamily(
            "chat_server_invariant_checks", "checks of idle workers that came to their end",
            sum(worker.get("integrity_checks") or 0 for worker in workers))
        broken = families.CounterMetricFamily(
            "chat_server_broken_invariants", "what these found wrong: more than 0 is a bug of this program",
            labels=["what"])
        for name, key in BROKEN_INVARIANTS.items():
            broken.add_metric([name], sum(worker.get(key) or 0 for worker in workers))
        yield broken
        prefixes = stats.get("prefixes", {})
        for name, doc in (("stored_pages", "KV pages that were written to --prefix-store"),
                          ("stored_bytes", "bytes that were")):
            yield families.CounterMetricFamily(f"chat_server_{name}", doc, prefixes.get(name, 0))
        yield families.GaugeMetricFamily("chat_server_prefix_memory_bytes", "memory that keeps prefixes",
                                         prefixes.get("memory_bytes", 0))
        gauge = families.GaugeMetricFamily
        counter = families.CounterMetricFamily
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
        for show in self.shows:
            yield from show(self.families)
        yield from self._own()

    def _usage(self) -> Iterator[Any]:
        """What the ledger has counted since the server started. It is not divided by keys, because any key
        may read /metrics."""
        counter = self.families.CounterMetricFamily
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

    def _own(self) -> Iterator[Any]:
        """What `Metrics` has counted and timed."""
        metrics = self.metrics
        for name, doc, durations in (
                ("time_to_first_token", "time from a request to its first token", metrics.ttft),
                ("inter_token_latency", "time between two tokens of an answer", metrics.itl),
                ("queue", "time a request waited before it ran", metrics.queue)):
            yield histogram(self.families, name, doc, [([], durations)])
        yield histogram(
            self.families, "request_duration", "time from a request to its end",
            [([reason], durations) for reason, durations in metrics.whole.items()], labels=["finish_reason"])
        yield histogram(
            self.families, "held", "processor time for which the loop or a thread was held at a stretch",
            HOLDS.rows(), labels=["what"])
        busy = self.families.GaugeMetricFamily(
            "chat_server_busy_threads", "threads that work now", labels=["what"])
        for values, count in HOLDS.busy_rows():
            busy.add_metric(values, count)
        yield busy
        yield self.families.GaugeMetricFamily(
            "chat_server_held_bytes", "bytes of large bodies and of whole answers that are held now",
            metrics.budget.used)
        counter = self.families.CounterMetricFamily
        for name, doc, labels, counts in (
                ("requests", "requests by how they ended", ["finish_reason"],
                 {(reason,): count for reason, count in metrics.requests.items()}),
                ("tokens", "prompt (computed or cached) and generated tokens", ["kind"],
                 {(kind,): count for kind, count in metrics.tokens.items()}),
                ("http_responses", "responses by route and status", ["route", "status"], metrics.responses)):
            family = counter(f"chat_server_{name}", doc, labels=labels)
            for values, count in counts.items():
                family.add_metric([*map(str, values)], count)
            yield family
