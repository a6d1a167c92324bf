"""Whose turn it is: priorities first, tenants by weight inside one, each tenant in the order of arrival."""

from __future__ import annotations

from collections import Counter

from coordinator.waiting import WaitingQueue
from pdserve.core.ids import RequestId


class Line:
    """A queue fed by hand; names are `tenant` + number."""

    def __init__(self, **weights: float) -> None:
        self.queue, self.weights, self.order = WaitingQueue(), weights, 0
        self.tags: dict[RequestId, tuple[int, float, int, str]] = {}

    def add(self, tenant: str, *, tokens: float = 100, priority: int = 0) -> RequestId:
        self.order += 1
        name = RequestId(f"{tenant}{self.order}")
        tag = self.queue.tag(priority, tenant, tokens, weight=self.weights.get(tenant, 1.0))
        self.tags[name] = (priority, tag, self.order, tenant)
        self.push(name)
        return name

    def push(self, name: RequestId) -> None:
        priority, tag, order, tenant = self.tags[name]
        self.queue.push(name, priority=priority, order=order, tag=tag, tenant=tenant)

    def next(self) -> str:
        request = self.queue.peek()
        assert request is not None
        self.queue.take(request)
        return request

    def serve(self, count: int) -> str:
        return "".join(self.next()[0] for _ in range(count))


def test_one_tenant_is_served_in_the_order_of_arrival_whatever_the_lengths() -> None:
    line = Line()
    names = [line.add("a", tokens=1000 - 90 * index) for index in range(10)]
    assert [line.next() for _ in names] == names


def test_a_tenant_that_sends_a_hundred_at_once_does_not_keep_another_waiting() -> None:
    line = Line()
    for _ in range(100):
        line.add("a")
    line.next()
    for _ in range(3):
        line.add("b")
    assert line.serve(7).count("b") == 3


def test_tokens_are_shared_by_weight() -> None:
    line = Line(a=3.0, b=1.0)
    for _ in range(60):
        line.add("a", tokens=100)
        line.add("b", tokens=50)
    served = Counter(line.serve(50))
    assert 2.4 <= served["a"] * 100 / (served["b"] * 50) <= 3.6


def test_an_urgent_request_goes_before_every_turn() -> None:
    line = Line()
    for _ in range(5):
        line.add("a", priority=5)
    urgent = line.add("b", priority=-1)
    assert line.next() == urgent


def test_who_comes_back_keeps_its_place() -> None:
    line = Line()
    first = line.add("a")
    line.add("a")
    line.add("b")
    assert line.next() == first
    line.push(first)
    assert line.next() == first


def test_an_idle_tenant_saves_up_no_turns_and_a_busy_one_owes_none_once_nobody_waits() -> None:
    line = Line()
    for _ in range(50):
        line.add("a")
    line.serve(50)
    line.add("a")
    line.add("b")
    assert line.serve(2) == "ab"


def test_answers_that_come_out_longer_count_against_the_next_turn() -> None:
    line = Line()
    for _ in range(3):
        line.add("a")
    line.queue.settle(0, "a", 10_000)
    line.add("a")
    for _ in range(5):
        line.add("b")
    assert line.serve(9) == "abababbba"  # its earlier places are kept


def test_the_queue_knows_who_waits_and_who_could_give_way() -> None:
    line = Line()
    line.add("a", priority=1)
    late = [line.add("b", priority=9), line.add("b", priority=9)]
    assert (line.queue.num_of("b"), line.queue.num_ahead(1), line.queue.num_ahead(9)) == (2, 1, 3)
    assert line.queue.less_urgent(1) == [late[1], late[0]]
    assert line.queue.less_urgent(9) == []
    line.queue.discard(late[0])
    assert (len(line.queue), line.queue.num_of("b")) == (2, 1)
