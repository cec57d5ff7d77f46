"""What the server counts, for Prometheus. No label takes a value that a client chooses."""

from __future__ import annotations

from fastdiff.extras import import_extra

EXTRA = "serve"
SECONDS = (0.005, 0.02, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        """
        Raises:
            ImportError: prometheus_client is not installed.
        """
        client = import_extra("prometheus_client", extra=EXTRA)
        self._client, self.registry = client, client.CollectorRegistry()
        own = {"registry": self.registry, "namespace": "fastdiff"}
        self.answers = client.Counter(
            "requests",
            "Requests that were answered, by route and status.",
            ["route", "status"],
            **own,
        )
        self.seconds = client.Histogram(
            "request_seconds", "Time from a request to the end of its answer.", ["route"],
            buckets=SECONDS, **own,
        )  # fmt: skip
        self.queued = client.Histogram(
            "queue_seconds", "Time that an image waits for a slot.", buckets=SECONDS, **own
        )
        self.steps = client.Histogram(
            "step_seconds", "Time of a step of an engine.", buckets=SECONDS, **own
        )
        self.rows = client.Counter("rows", "Rows of sampler tables taken, over all images.", **own)
        self.images = client.Counter("images", "Images that were finished.", **own)
        self.dropped = client.Counter(
            "dropped", "Requests that were dropped before they were finished.", ["reason"], **own
        )
        self.waiting = client.Gauge("images_waiting", "Images that wait for a slot.", **own)
        self.running = client.Gauge("images_running", "Images in slots.", **own)
        self.open = client.Gauge("requests_open", "Requests that are not yet answered.", **own)

    def text(self) -> tuple[bytes, str]:
        """The metrics as Prometheus reads them, and their content type."""
        return self._client.generate_latest(self.registry), self._client.CONTENT_TYPE_LATEST
