"""Retry: when a failed request may be sent again, and how long to wait before; built on tenacity.

What is safe to repeat without asking: a request that surely did not run (no responders, refused, never left this
process). The rest may have run, and is repeated only if the caller declares it idempotent. A cancelled or overdue
request is never repeated, whatever the policy says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import tenacity

from natsync import retry_budget
from natsync.concurrency import check_timeout
from natsync.context import Context
from natsync.errors import (
    Cancelled,
    ConnectionClosed,
    ConnectionLost,
    DeadlineExceeded,
    ForkError,
    HandlerError,
    InvalidArgument,
    NatsError,
    NoRespondersError,
    NoServersError,
    PoolClosed,
    ReconnectBufferFull,
    RequestTimeout,
    ServerLost,
    StreamClosed,
    StreamEnded,
    StreamError,
    StreamRefused,
    TimedOut,
)
from natsync.reply import TOO_MANY_REQUESTS
from natsync.retry_budget import Bucket

T = TypeVar("T")
Predicate: TypeAlias = Callable[[BaseException], bool]

#: Never worth another try: the caller wants no more, or nothing would change.
_FINAL = (
    Cancelled, DeadlineExceeded, StreamClosed, StreamEnded, ConnectionClosed, PoolClosed, ForkError, InvalidArgument,
)  # fmt: skip


class Retry:
    """A retry policy: `client.request(..., retry=Retry(attempts=3))`. Immutable, safe to share.

    Waits grow exponentially from `initial` to `maximum` seconds; with jitter each is a random part of that, so that
    many callers who failed together do not come back together. A responder that refused and told when to come again
    (StreamRefused.retry_after) is given that time first. The deadline spans all attempts: a wait that would outlast it
    ends at it. All callers of a subject in the process share a budget of retries (natsync.retry_budget): beyond a burst
    of 100 they may make ten a second and one for every five calls, and what exceeds that is not tried again.

    Attributes:
        attempts: tries in all, the first included; None for no limit but the deadline.
        initial, maximum, multiplier: the first wait in seconds, the longest, and the growth from one to the next.
        jitter: whether waits are random (from 0 to the exponential value).
        on: a predicate, or exception classes, that says which errors are retried, instead of the rule above.
        idempotent: running the request twice does no harm: retry also what may have run.
        resumable: the handler can continue where a broken stream ended: it looks at ctx.resume_cursor, the number of
            chunks that the requester has. Without it no stream is repeated once a chunk was handed to the application.
        budget: whether the budget of the subject counts.
    """

    def __init__(
        self,
        attempts: int | None = 4,
        initial: float = 0.1,
        maximum: float = 5.0,
        multiplier: float = 2.0,
        jitter: bool = True,
        on: Predicate | type[BaseException] | tuple[type[BaseException], ...] | None = None,
        idempotent: bool = False,
        resumable: bool = False,
        budget: bool = True,
    ) -> None:
        if attempts is not None and (isinstance(attempts, bool) or not isinstance(attempts, int) or attempts < 1):
            raise InvalidArgument(f"attempts={attempts!r}: a whole number from 1 up, or None")
        for name, value in (("initial", initial), ("maximum", maximum), ("multiplier", multiplier)):
            if check_timeout(value, name) is None:
                raise InvalidArgument(f"{name}={value!r}: a number")
        if multiplier < 1:
            raise InvalidArgument(f"multiplier={multiplier!r}: at least 1")
        _check_choice(on)
        self.attempts = attempts
        self.initial = initial
        self.maximum = maximum
        self.multiplier = multiplier
        self.jitter = jitter
        self.on = on
        self.idempotent = idempotent
        self.resumable = resumable
        self.budget = budget

    def __repr__(self) -> str:
        return f"Retry(attempts={self.attempts}, initial={self.initial:g} s, maximum={self.maximum:g} s)"

    def wants(self, error: BaseException) -> bool:
        """Whether the policy repeats a request that failed like this."""
        if self.on is None:
            return surely_not_run(error) or (self.idempotent and isinstance(error, NatsError))
        if isinstance(self.on, type | tuple):
            return isinstance(error, self.on)
        return self.on(error)

    def resumes(self, error: BaseException) -> bool:
        """Whether the policy goes on with a stream that broke off like this after some chunks."""
        if not self.resumable:
            return False
        broke = isinstance(error, ServerLost | ConnectionLost) or surely_not_run(error)
        return broke if self.on is None else self.wants(error)

    def waits(self) -> tenacity.wait.wait_base:
        """tenacity's wait strategy of this policy."""
        kind = tenacity.wait_random_exponential if self.jitter else tenacity.wait_exponential
        return _AsAsked(kind(multiplier=self.initial, max=self.maximum, exp_base=self.multiplier))


class _Spent(tenacity.stop.stop_base):
    """Stops when the bucket is empty; else takes from it."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket

    def __call__(self, retry_state: tenacity.RetryCallState) -> bool:
        return not self._bucket.take()


class _AsAsked(tenacity.wait.wait_base):
    """Waits as another strategy does, after the pause that the responder has asked for."""

    def __init__(self, other: tenacity.wait.wait_base) -> None:
        self._other = other

    def __call__(self, retry_state: tenacity.RetryCallState) -> float:
        outcome = retry_state.outcome
        error = outcome.exception() if outcome is not None else None
        asked = error.retry_after if isinstance(error, StreamRefused) else None
        return self._other(retry_state) + (asked or 0.0)


def _check_choice(on: object) -> None:
    classes = on if isinstance(on, tuple) else (on,) if isinstance(on, type) else ()
    if not all(isinstance(one, type) and issubclass(one, BaseException) for one in classes):
        raise TypeError("on= takes exception classes, or a predicate of the exception")
    if on is not None and not isinstance(on, type | tuple) and not callable(on):
        raise TypeError(f"on= takes exception classes, or a predicate of the exception, not {type(on).__name__}")


def surely_not_run(error: BaseException) -> bool:
    """Whether nothing can have run at the responder, so that repeating is safe."""
    if isinstance(error, RequestTimeout | ConnectionLost):
        return not error.sent
    if isinstance(error, HandlerError):
        return error.code == TOO_MANY_REQUESTS
    return isinstance(error, NoRespondersError | StreamRefused | NoServersError | ReconnectBufferFull)


#: Told of a retry: which attempt failed (from 1), the seconds until the next, and the error.
Retrying: TypeAlias = Callable[[int, float, BaseException], object]
#: What `retry=` takes: a policy of natsync or one of tenacity; None = one try.
RetryPolicy: TypeAlias = "Retry | tenacity.Retrying | None"


def run(
    function: Callable[[int], T],
    policy: RetryPolicy,
    ctx: Context | None,
    *,
    bucket: Bucket | None = None,
    rerun_errors: bool = False,
    delivered: Callable[[], bool] = lambda: False,
    retrying: Retrying | None = None,
) -> T:
    """Call function(attempt number from 0) until it returns, as the policy allows; raises its last error.

    bucket: what retries spend from, see bucket_for().
    rerun_errors: errors that the responder reported are repeated too, as the Go system's StreamRequestWithRetry does.
    delivered: whether the application has had a part of the answer, which another try would give it again.
    retrying: told (attempt from 1, seconds to wait, error) before the wait for another attempt.
    """
    check_policy(policy)
    if policy is None:
        return function(0)
    attempt = iter(range(1 << 62))

    def once() -> T:
        if ctx is not None:
            ctx.check()
        return function(next(attempt))

    return _retrying(policy, ctx, rerun_errors, delivered, bucket, retrying, _sleeper(ctx))(once)


class Series:
    """The tries of one call as run() makes them, for a caller who waits between two of them himself, or goes away."""

    def __init__(self, policy: Retry | tenacity.Retrying, ctx: Context, bucket: Bucket | None) -> None:
        self._delivered = delivered = [False]
        self._pauses = pauses = list[float]()
        # No method of this object goes in: a cycle would keep the context alive until it is found.
        self._retrying = _retrying(policy, ctx, False, lambda: delivered[0], bucket, None, pauses.append)
        self._tries = iter(self._retrying)
        self._try = next(self._tries)

    def failed(self, error: BaseException, delivered: bool) -> tuple[int, float]:
        """A try has failed. Returns its number, from 1, and the seconds until the next; raises error if there is none.

        delivered: whether the application has had a part of the answer.
        """
        self._delivered[0] = delivered
        state = self._try.retry_state
        number = state.attempt_number
        state.set_exception((type(error), error, error.__traceback__))
        self._retrying.begin()  # tenacity keeps statistics by thread, and this may be another than the last time
        another = next(self._tries, None)
        if another is None:  # a policy of tenacity that has a value for its last failure, which is no part of an answer
            raise error
        self._try = another
        return number, self._pauses.pop()


def bucket_for(policy: RetryPolicy, subject: str) -> Bucket | None:
    """The budget that counts for a call on the subject, which is counted as one; None if it may not be repeated."""
    if policy is None or (isinstance(policy, Retry) and not policy.budget):
        return None
    bucket = retry_budget.of(subject)
    bucket.called()
    return bucket


def check_policy(policy: RetryPolicy) -> None:
    """Raises TypeError if it is no policy: before anything is sent."""
    if policy is not None and not isinstance(policy, Retry | tenacity.Retrying):
        raise TypeError(f"retry is a natsync.Retry or a tenacity.Retrying, not {type(policy).__name__}")


def _retrying(
    policy: Retry | tenacity.Retrying,
    ctx: Context | None,
    rerun_errors: bool,
    delivered: Callable[[], bool],
    bucket: Bucket | None,
    retrying: Retrying | None,
    sleep: Callable[[float], None],
) -> tenacity.Retrying:
    # Exception: a Ctrl-C is no failure to be made up for.
    may_repeat = tenacity.retry_if_exception(
        lambda error: isinstance(error, Exception) and not isinstance(error, _FINAL) and not _over(ctx)
    )
    # Asked last, when everything else is in favour of another try, because it spends.
    spent: list[Any] = [] if bucket is None else [_Spent(bucket)]
    if isinstance(policy, tenacity.Retrying):
        wanted: Any = policy.retry
        enough: Any = policy.stop
        whole = tenacity.retry_if_exception(lambda error: not delivered())
        return policy.copy(
            retry=may_repeat & whole & wanted,
            stop=tenacity.stop_any(enough, *spent),
            sleep=sleep,
            before_sleep=_teller(retrying, policy.before_sleep),
            reraise=True,
        )

    def repeats(error: BaseException) -> bool:
        if delivered():
            return policy.resumes(error)
        return policy.wants(error) or (rerun_errors and policy.on is None and _reported(error))

    wants = tenacity.retry_if_exception(repeats)
    stops = [] if policy.attempts is None else [tenacity.stop_after_attempt(policy.attempts)]
    return tenacity.Retrying(
        retry=may_repeat & wants,
        wait=policy.waits(),
        stop=tenacity.stop_any(*stops, *spent),
        sleep=sleep,
        before_sleep=_teller(retrying, None),
        reraise=True,
    )


def _teller(retrying: Retrying | None, further: Any) -> Any:
    """What tenacity is to call before it waits."""
    if retrying is None:
        return further

    def tell(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome is not None else None
        if error is not None and state.next_action is not None:
            retrying(state.attempt_number, state.next_action.sleep, error)
        if further is not None:
            further(state)

    return tell


def _reported(error: BaseException) -> bool:
    return isinstance(error, StreamError | TimedOut | ConnectionLost)


def _over(ctx: Context | None) -> bool:
    return ctx is not None and ctx.cancelled


def _sleeper(ctx: Context | None) -> Callable[[float], None]:
    """How to wait between tries: a wait that the end of the context cuts short, with its error."""
    waiting = ctx if ctx is not None else Context()

    def sleep(seconds: float) -> None:
        left = waiting.remaining()
        if left is not None and seconds >= left:
            waiting.wait(left)
        elif not waiting.wait(seconds):
            return
        waiting.check()

    return sleep
