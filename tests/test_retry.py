"""natsync.retry: which failures are repeated, how often, after how long, and what ends it."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import tenacity

from natsync import errors
from natsync.context import Context
from natsync.errors import (
    AuthorizationError,
    Cancelled,
    ClientLost,
    Code,
    ConnectError,
    ConnectionClosed,
    ConnectionLost,
    DeadlineExceeded,
    DrainTimeout,
    ForkError,
    HandlerError,
    IdleTimeout,
    InvalidArgument,
    MaxPayloadExceeded,
    NatsError,
    NoRespondersError,
    NoServersError,
    PermissionDenied,
    PoolClosed,
    PoolTimeout,
    ProtocolError,
    ReconnectBufferFull,
    RequestTimeout,
    ServerLost,
    SlowConsumerError,
    StreamCancelled,
    StreamClosed,
    StreamEnded,
    StreamError,
    StreamRefused,
    TimedOut,
)
from natsync.retry import Retry, run, surely_not_run

QUICK = {"initial": 0.001, "maximum": 0.001}

#: Nothing can have run at the responder: the request never left, nobody took it, or it was refused.
NOT_RUN = [
    NoRespondersError("a"),
    StreamRefused("full", retry_after=1),
    NoServersError({}),
    RequestTimeout("no link", sent=False),
    ConnectionLost("no link", sent=False),
    ReconnectBufferFull("full"),
]
#: It may have run.
MAY_HAVE_RUN = [
    RequestTimeout("no reply"),
    ConnectionLost("broke"),
    HandlerError("failed"),
    ServerLost("gone"),
    IdleTimeout("silent"),
    StreamError("broken"),
    SlowConsumerError("slow"),
    TimedOut("late"),
    ConnectError("broke"),
    ProtocolError("odd"),
    AuthorizationError("no"),
    PermissionDenied("no"),
    DrainTimeout("late"),
    NatsError("odd"),
]
#: Another try would change nothing, or is not wanted any more.
FINAL = [
    Cancelled("enough"),
    DeadlineExceeded("late"),
    StreamCancelled("enough"),
    StreamClosed("closed"),
    ClientLost("gone"),
    StreamEnded("complete"),
    ConnectionClosed("closed"),
    PoolClosed("closed"),
    ForkError("forked"),
    InvalidArgument("bad"),
]


class Failing:
    """A request that fails with each of the errors in turn and then returns; it counts its attempts."""

    def __init__(self, *failures: BaseException) -> None:
        self.attempts: list[int] = []
        self._failures = list(failures)

    def __call__(self, attempt: int) -> str:
        self.attempts.append(attempt)
        if self._failures:
            raise self._failures.pop(0)
        return "done"


def attempts_of(error: BaseException, policy: Any, ctx: Context | None = None, **options: Any) -> int:
    """How often a request that always fails with the error is tried."""
    request = Failing(*[error] * 50)
    with pytest.raises(type(error)) as caught:
        run(request, policy, ctx, **options)
    assert caught.value is error
    return len(request.attempts)


def kind(error: BaseException) -> str:
    return f"{type(error).__name__}{'' if getattr(error, 'sent', True) else ' not sent'}"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits between tries, which take no time in this test."""
    asked: list[float] = []
    monkeypatch.setattr(Context, "wait", lambda ctx, seconds: asked.append(seconds) or ctx.cancelled)
    return asked


# -- which errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", NOT_RUN, ids=kind)
def test_what_surely_did_not_run_is_repeated_without_asking(error: NatsError) -> None:
    assert surely_not_run(error)
    assert attempts_of(error, Retry(attempts=3, **QUICK)) == 3


@pytest.mark.parametrize("error", MAY_HAVE_RUN, ids=kind)
def test_what_may_have_run_is_not_repeated_without_asking(error: NatsError) -> None:
    assert not surely_not_run(error)
    assert attempts_of(error, Retry(attempts=3, **QUICK)) == 1


@pytest.mark.parametrize("error", [*NOT_RUN, *MAY_HAVE_RUN], ids=kind)
def test_an_idempotent_request_is_repeated_after_any_failure(error: NatsError) -> None:
    assert attempts_of(error, Retry(attempts=3, idempotent=True, **QUICK)) == 3


POLICIES: list[Any] = [
    Retry(**QUICK),
    Retry(idempotent=True, **QUICK),
    Retry(on=BaseException, **QUICK),
    Retry(on=lambda error: True, **QUICK),
    tenacity.Retrying(retry=tenacity.retry_if_exception_type(BaseException), stop=tenacity.stop_after_attempt(4)),
]


@pytest.mark.parametrize("policy", POLICIES, ids=["default", "idempotent", "class", "predicate", "tenacity"])
@pytest.mark.parametrize("error", FINAL, ids=kind)
def test_a_cancel_a_deadline_and_what_cannot_change_are_never_repeated(error: NatsError, policy: Any) -> None:
    assert attempts_of(error, policy, rerun_errors=True) == 1


def test_every_error_of_the_library_has_its_place() -> None:
    """A new error must be thought about: is a request that failed with it safe to repeat?"""
    placed = {type(error) for error in (*NOT_RUN, *MAY_HAVE_RUN, *FINAL)}
    # Nothing ran, but another try would meet the same limit.
    placed |= {MaxPayloadExceeded, PoolTimeout, errors.PoolUnreachable}
    placed |= {errors.InvalidURL}  # an InvalidArgument
    known = {one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, NatsError)}
    assert known - placed == set()


@pytest.mark.parametrize("error", [ValueError("a fault"), KeyError("k"), OSError("disk")])
def test_an_error_that_is_not_the_librarys_is_not_repeated(error: Exception) -> None:
    assert attempts_of(error, Retry(idempotent=True, **QUICK)) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1)], ids=kind)
@pytest.mark.parametrize("policy", POLICIES, ids=["default", "idempotent", "class", "predicate", "tenacity"])
def test_an_interrupt_is_no_failure_to_be_made_up_for(policy: Any, error: BaseException) -> None:
    assert attempts_of(error, policy) == 1


@pytest.mark.parametrize(
    ("on", "error", "attempts"),
    [
        (HandlerError, HandlerError("x"), 3),
        (HandlerError, ServerLost("x"), 1),
        (HandlerError, NoRespondersError("a"), 1),  # instead of the rule, not in addition
        ((HandlerError, ServerLost), ServerLost("x"), 3),
        (StreamError, HandlerError("x"), 3),
        (ValueError, ValueError("x"), 3),
        ((), NoRespondersError("a"), 1),
        (lambda error: getattr(error, "code", None) == Code.UNAVAILABLE, HandlerError("x", code=Code.UNAVAILABLE), 3),
        (lambda error: getattr(error, "code", None) == Code.UNAVAILABLE, HandlerError("x", code=Code.INTERNAL), 1),
    ],
)
def test_what_is_repeated_can_be_chosen_by_class_or_predicate(on: Any, error: Exception, attempts: int) -> None:
    assert attempts_of(error, Retry(attempts=3, on=on, **QUICK)) == attempts


def test_a_choice_counts_even_for_an_idempotent_request() -> None:
    assert attempts_of(ServerLost("x"), Retry(attempts=3, on=HandlerError, idempotent=True, **QUICK)) == 1


@pytest.mark.parametrize(
    "error", [HandlerError("x"), StreamError("x"), IdleTimeout("x"), RequestTimeout("x"), ConnectionLost("x")]
)
def test_reported_errors_are_repeated_where_the_go_system_does(error: NatsError) -> None:
    assert attempts_of(error, Retry(attempts=3, **QUICK), rerun_errors=True) == 3
    assert attempts_of(error, Retry(attempts=3, on=(), **QUICK), rerun_errors=True) == 1


# -- how often -------------------------------------------------------------------------------------------------------


def test_without_a_policy_there_is_one_try() -> None:
    assert attempts_of(NoRespondersError("a"), None) == 1
    assert run(Failing(), None, None) == "done"


@pytest.mark.parametrize("attempts", [1, 2, 5])
def test_there_are_as_many_tries_as_told_the_first_included(attempts: int) -> None:
    assert attempts_of(NoRespondersError("a"), Retry(attempts=attempts, **QUICK)) == attempts


def test_the_first_success_ends_it() -> None:
    request = Failing(NoRespondersError("a"), NoRespondersError("a"))
    assert run(request, Retry(**QUICK), None) == "done"
    assert request.attempts == [0, 1, 2]


def test_the_last_error_is_raised_not_one_of_tenacity() -> None:
    last = RequestTimeout("the last")
    with pytest.raises(RequestTimeout) as caught:
        run(Failing(NoRespondersError("a"), NoRespondersError("a"), last), Retry(**QUICK), None)
    assert caught.value is last


def test_without_a_limit_of_tries_the_deadline_is_the_limit() -> None:
    request = Failing(*[NoRespondersError("a")] * 100_000)
    with pytest.raises((DeadlineExceeded, NoRespondersError)):  # it passes between two tries, or within one
        run(request, Retry(attempts=None, **QUICK), Context().with_timeout(1.0))
    assert len(request.attempts) > 5


def test_a_policy_can_be_shared_by_many_threads() -> None:
    policy = Retry(attempts=5, **QUICK)
    counts: list[int] = []
    threads = [
        threading.Thread(target=lambda: counts.append(attempts_of(NoRespondersError("a"), policy))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert counts == [5] * 8


# -- how long between ------------------------------------------------------------------------------------------------


def test_waits_grow_exponentially_up_to_their_maximum(waits: list[float]) -> None:
    attempts_of(NoRespondersError("a"), Retry(attempts=8, initial=0.1, maximum=2, multiplier=3, jitter=False))
    assert waits == pytest.approx([0.1, 0.3, 0.9, 2, 2, 2, 2])


def test_a_multiplier_of_one_keeps_the_wait(waits: list[float]) -> None:
    attempts_of(NoRespondersError("a"), Retry(attempts=4, initial=0.2, multiplier=1, jitter=False))
    assert waits == pytest.approx([0.2, 0.2, 0.2])


def test_with_jitter_each_wait_is_anything_from_zero_to_its_value(waits: list[float]) -> None:
    for _ in range(300):
        attempts_of(NoRespondersError("a"), Retry(attempts=4, initial=1, maximum=2.5, multiplier=2))
    assert len(waits) == 900
    for index, longest in enumerate((1, 2, 2.5)):
        series = waits[index::3]
        assert 0 <= min(series) < 0.15 * longest
        assert 0.85 * longest < max(series) <= longest


def test_the_default_waits_are_short_and_bounded(waits: list[float]) -> None:
    for _ in range(50):
        attempts_of(NoRespondersError("a"), Retry(attempts=30))
    assert max(waits[::29]) <= 0.1
    assert 2.5 < max(waits) <= 5.0


def test_a_thousand_tries_do_not_overflow(waits: list[float]) -> None:
    request = Failing(*[NoRespondersError("a")] * 2000)
    assert run(request, Retry(attempts=None, initial=1, maximum=7, multiplier=10), None) == "done"
    assert max(waits) <= 7


def test_no_wait_before_the_first_try_nor_behind_the_last(waits: list[float]) -> None:
    attempts_of(NoRespondersError("a"), Retry(attempts=1))
    assert run(Failing(), Retry(), None) == "done"
    assert waits == []


# -- contexts --------------------------------------------------------------------------------------------------------


def test_a_cancelled_context_lets_no_try_begin() -> None:
    ctx, request = Context(), Failing()
    ctx.cancel("enough")
    with pytest.raises(Cancelled, match="enough"):
        run(request, Retry(), ctx)
    assert request.attempts == []


def test_a_failure_of_a_cancelled_request_is_not_repeated() -> None:
    ctx, error = Context(), NoRespondersError("a")

    def request(attempt: int) -> None:
        ctx.cancel()
        raise error

    with pytest.raises(NoRespondersError) as caught:
        run(request, Retry(**QUICK), ctx)
    assert caught.value is error


@pytest.mark.parametrize(
    "policy", [Retry(initial=30, maximum=30, jitter=False), tenacity.Retrying(wait=tenacity.wait_fixed(30))]
)
def test_cancelling_cuts_the_wait_short(policy: Any) -> None:
    ctx = Context()
    threading.Timer(0.1, lambda: ctx.cancel("enough")).start()
    started = time.monotonic()
    with pytest.raises(Cancelled, match="enough"):
        run(Failing(*[NoRespondersError("a")] * 9), policy, ctx)
    assert time.monotonic() - started < 10


def test_the_deadline_cuts_the_wait_short() -> None:
    started = time.monotonic()
    request = Failing(*[NoRespondersError("a")] * 9)
    with pytest.raises(DeadlineExceeded):
        run(request, Retry(initial=30, maximum=30, jitter=False), Context().with_timeout(0.5))
    assert 0.5 <= time.monotonic() - started < 10
    assert request.attempts == [0]


def test_a_wait_that_fits_before_the_deadline_is_waited() -> None:
    request = Failing(NoRespondersError("a"))
    started = time.monotonic()
    with Context().with_timeout(30) as ctx:
        assert run(request, Retry(initial=0.05, jitter=False), ctx) == "done"
    assert time.monotonic() - started >= 0.05


# -- tenacity --------------------------------------------------------------------------------------------------------


def test_a_tenacity_policy_decides_how_often(waits: list[float]) -> None:
    policy = tenacity.Retrying(stop=tenacity.stop_after_attempt(3), wait=tenacity.wait_fixed(7))
    assert attempts_of(NoRespondersError("a"), policy) == 3
    assert waits == [7, 7]


def test_a_tenacity_policy_raises_the_last_error_whatever_it_says_itself() -> None:
    policy = tenacity.Retrying(stop=tenacity.stop_after_attempt(2), reraise=False)
    with pytest.raises(NoRespondersError):
        run(Failing(*[NoRespondersError("a")] * 5), policy, None)


def test_a_tenacity_policy_decides_which_errors() -> None:
    policy = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(HandlerError), stop=tenacity.stop_after_attempt(3)
    )
    assert attempts_of(HandlerError("x"), policy) == 3
    assert attempts_of(NoRespondersError("a"), policy) == 1


def test_a_tenacity_policy_may_be_a_plain_function() -> None:
    """tenacity takes any callable as its retry=."""

    def retry(state: tenacity.RetryCallState) -> bool:
        return state.outcome is not None and isinstance(state.outcome.exception(), HandlerError)

    policy = tenacity.Retrying(retry=retry, stop=tenacity.stop_after_attempt(3))
    assert attempts_of(HandlerError("x"), policy) == 3
    assert attempts_of(ServerLost("x"), policy) == 1


def test_a_tenacity_policy_is_left_as_it_was(waits: list[float]) -> None:
    slept: list[float] = []
    policy = tenacity.Retrying(stop=tenacity.stop_after_attempt(2), sleep=slept.append, wait=tenacity.wait_fixed(1))
    before = dict(vars(policy))
    attempts_of(NoRespondersError("a"), policy)
    assert dict(vars(policy)) == before
    assert (slept, waits) == ([], [1])  # it sleeps as the library does, so that a cancel wakes it


def test_callbacks_of_a_tenacity_policy_are_called() -> None:
    seen: list[int] = []
    policy = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(3), before_sleep=lambda state: seen.append(state.attempt_number)
    )
    attempts_of(NoRespondersError("a"), policy)
    assert seen == [1, 2]


# -- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy", [3, "always", print, tenacity.retry, Retry, object()], ids=lambda one: type(one).__name__
)
def test_another_kind_of_policy_is_a_type_error_before_anything_is_sent(policy: Any) -> None:
    request = Failing()
    with pytest.raises(TypeError, match=r"natsync\.Retry"):
        run(request, policy, None)
    assert request.attempts == []


@pytest.mark.parametrize("attempts", [0, -1, 1.5, "3", True])
def test_a_number_of_tries_that_makes_no_sense_is_refused(attempts: Any) -> None:
    with pytest.raises(InvalidArgument, match="attempts"):
        Retry(attempts=attempts)


@pytest.mark.parametrize("name", ["initial", "maximum"])
def test_a_wait_that_makes_no_sense_is_refused(name: str) -> None:
    for value in (-1, float("nan")):
        with pytest.raises(InvalidArgument, match=name):
            Retry(**{name: value})
    for wrong in ("1", True, [1], None):
        with pytest.raises((TypeError, InvalidArgument), match=name):
            Retry(**{name: wrong})


@pytest.mark.parametrize("multiplier", [0, 0.9, -1, float("nan"), "2", None])
def test_a_multiplier_that_makes_no_sense_is_refused(multiplier: Any) -> None:
    with pytest.raises((TypeError, InvalidArgument)):
        Retry(multiplier=multiplier)


@pytest.mark.parametrize("on", [[ValueError], "HandlerError", 5, (ValueError, "x"), int], ids=repr)
def test_a_choice_of_errors_that_makes_no_sense_is_refused_at_once(on: Any) -> None:
    """Not when the first request fails: that would hide its error."""
    with pytest.raises(TypeError, match="on"):
        Retry(on=on)


def test_the_text_of_a_policy_shows_its_numbers() -> None:
    assert repr(Retry(attempts=3, initial=0.1, maximum=5)) == "Retry(attempts=3, initial=0.1 s, maximum=5 s)"
    assert "None" in repr(Retry(attempts=None))
