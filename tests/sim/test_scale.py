"""What one request costs the broker must not depend on how many peers there are."""

from __future__ import annotations

from tests.sim.scale import Cost, measure

#: The logarithms of heaps, and more waiting requests looked at by more workers that join.
_ALLOWED_GROWTH = 1.3


def test_every_request_of_a_large_cluster_with_churn_ends_in_a_result() -> None:
    cost = measure(1_000, 100, count_calls=False)
    assert cost.results == cost.requests == 2_000


def test_what_is_counted_does_not_depend_on_the_machine() -> None:
    def counted(cost: Cost) -> tuple[int, int]:
        return cost.events, cost.calls

    measure(50, 5, count_calls=True)  # what is made once for all, is made now
    assert counted(measure(50, 5, count_calls=True)) == counted(measure(50, 5, count_calls=True))


def test_the_cost_of_a_request_is_flat_in_ranks_and_workers() -> None:
    small = measure(100, 10, count_calls=True)
    large = measure(1_000, 100, count_calls=True)
    assert large.events / large.requests <= 1.1 * small.events / small.requests
    assert large.calls_per_request <= _ALLOWED_GROWTH * small.calls_per_request
