"""What the server counts, for Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The counters of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "prime_jax_requests", "Requests answered.", ("route", "status"), registry=self._registry
        )
        self.seconds = Histogram(
            "prime_jax_request_seconds",
            "Time from a request's arrival to its answer.",
            ("route",),
            buckets=SECONDS,
            registry=self._registry,
        )
        self.closed = Counter(
            "prime_jax_connections_closed",
            "Connections closed by the server before their client was done.",
            ("reason",),
            registry=self._registry,
        )
        self.batch = Histogram(
            "prime_jax_batch_size", "Requests of a device call.", buckets=SIZES, registry=self._registry
        )

    def gauge(self, name: str, meaning: str, value: Callable[[], float]) -> None:
        """Show a figure as it is at the time of asking."""
        Gauge(f"prime_jax_{name}", meaning, registry=self._registry).set_function(value)

    def count_closed(self, reason: str) -> None:
        """Count a connection that the server closed."""
        self.closed.labels(reason).inc()

    def page(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self._registry)
