"""natsync.outbox on an idle link: the thread that puts writes itself, what it may not or cannot is the writer's."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from natsync import outbox as outbox_module
from natsync.backlog import GIVER_AFTER
from natsync.outbox import HERE_BYTES, NOWAIT, Outbox, Traffic
from natsync.testing import eventually
from natsync.transport import Transport

FRAME = b"PUB a 1\r\nx\r\n"
OTHER = b"PUB b 1\r\ny\r\n"

pytestmark = pytest.mark.skipif(not NOWAIT, reason="this system has no write that does not wait")


class Link:
    """An outbox with a writer in a thread of its own; what each of the two ways wrote."""

    def __init__(self) -> None:
        self.box = Outbox(1 << 20)
        self.here: list[bytes] = []
        self.by_writer: list[bytes] = []
        self.writes: Callable[[], object] = lambda: None  # what keeps the writer
        self.takes: Callable[[bytes], int] = len  # how much of a write the kernel takes, or what it raises
        self.box.attach([], self._send_now)
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()
        self.rest()

    def _send_now(self, data: bytes, flags: int) -> int:
        assert flags == NOWAIT
        sent = self.takes(data)
        self.here.append(data[:sent])
        return sent

    def _write(self) -> None:
        while (data := self.box.take()) is not None:
            self.by_writer.append(data)
            self.writes()

    def rest(self) -> None:
        """Wait until the writer has nothing to do."""
        eventually(lambda: self.box._writer_waits)

    def end(self) -> None:
        self.box.close()
        self._thread.join(5)
        assert not self._thread.is_alive()


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> Iterator[Link]:
    """An idle link; it is again at once after each write."""
    monkeypatch.setattr(outbox_module, "QUIET_SECONDS", -1.0)
    monkeypatch.setattr(outbox_module, "OTHERS_QUIET_SECONDS", -1.0)
    link = Link()
    yield link
    link.end()


def put(link: Link, frame: bytes = FRAME) -> int:
    return link.box.try_put(frame, here=True)


def test_a_message_on_an_idle_link_is_written_by_the_thread_that_puts_it(link: Link) -> None:
    assert put(link) == len(FRAME)
    assert (link.here, link.by_writer) == ([FRAME], [])
    assert (link.box.taken, link.box.size_bytes, link.box.messages) == (len(FRAME), 0, 1)


def test_that_thread_writes_also_if_it_has_put_often(link: Link) -> None:
    for count in range(1, 3 * GIVER_AFTER):
        link.box.try_put(FRAME, here=True, giving=True)
        assert link.here == [FRAME] * count
    assert link.box.giver.limit_bytes <= link.box.giver.given_bytes  # it has to look each time
    assert link.by_writer == []


def test_who_does_not_offer_to_write_leaves_it_to_the_writer(link: Link) -> None:
    link.box.try_put(FRAME)
    eventually(lambda: link.by_writer == [FRAME])
    assert link.here == []


def test_what_comes_without_a_pause_is_left_to_the_writer(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    put(link)
    monkeypatch.setattr(outbox_module, "QUIET_SECONDS", 3600.0)
    put(link, OTHER)
    eventually(lambda: link.by_writer == [OTHER])
    assert link.here == [FRAME]


def test_threads_that_take_turns_leave_it_to_the_writer(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    put(link)
    monkeypatch.setattr(outbox_module, "OTHERS_QUIET_SECONDS", 3600.0)
    other = threading.Thread(target=put, args=(link, OTHER))
    other.start()
    other.join(5)
    eventually(lambda: link.by_writer == [OTHER])
    assert link.here == [FRAME]


@pytest.mark.parametrize("taken", [0, 1, len(FRAME) - 1])
def test_what_the_kernel_does_not_take_goes_first_in_the_next_write(link: Link, taken: int) -> None:
    link.takes = lambda data: taken
    put(link)
    link.box.try_put(OTHER)
    eventually(lambda: b"".join(link.here + link.by_writer) == FRAME + OTHER)
    assert link.here == [FRAME[:taken]]
    assert link.box.taken == len(FRAME + OTHER)


@pytest.mark.parametrize(
    "error", [BlockingIOError(errno.EAGAIN, "full"), BrokenPipeError(errno.EPIPE, "gone")], ids=repr
)
def test_an_error_of_the_socket_is_left_for_the_writer_to_meet(link: Link, error: OSError) -> None:
    def refuse(data: bytes) -> int:
        raise error

    link.takes = refuse
    assert put(link) == len(FRAME)
    eventually(lambda: link.by_writer == [FRAME])


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt(), SystemExit(1)], ids=repr)
def test_an_interrupt_behind_the_write_loses_and_doubles_nothing(link: Link, interrupt: BaseException) -> None:
    """As a handler of a signal raises it: once the call into C is over, and its result noted."""
    real = link.box._send_now
    assert real is not None

    def interrupted(data: bytes, flags: int) -> int:
        sent = real(data, flags)
        signals.append(sent)
        return sent

    signals: list[int] = []
    link.box._send_now = interrupted
    original = outbox_module.time.monotonic
    raised: list[BaseException] = []

    def strike() -> float:
        if signals and not raised:
            raised.append(interrupt)
            raise interrupt
        return original()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outbox_module.time, "monotonic", strike)
        with pytest.raises(type(interrupt)):
            put(link)
    link.box._send_now = real
    link.box.try_put(OTHER)
    eventually(lambda: b"".join(link.here + link.by_writer) == FRAME + OTHER)


def test_what_waits_goes_along_in_order(link: Link) -> None:
    link.box.hold()
    link.box.try_put(FRAME)
    link.rest()
    link.box.held = False  # without a word to the writer
    put(link, OTHER)
    assert (link.here, link.by_writer) == ([FRAME + OTHER], [])


def test_more_than_the_kernel_takes_at_once_is_left_to_the_writer(link: Link) -> None:
    large = b"PUB a %d\r\n%b\r\n" % (HERE_BYTES, b"x" * HERE_BYTES)
    put(link, large)
    eventually(lambda: link.by_writer == [large])
    assert link.here == []


def test_nothing_is_written_while_the_link_is_held(link: Link) -> None:
    link.box.hold()
    put(link)
    assert (link.here, link.by_writer, link.box.size_bytes) == ([], [], len(FRAME))
    link.box.release()
    eventually(lambda: link.by_writer == [FRAME])


def test_the_socket_of_a_parent_process_is_left_alone(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "at_home", bytearray(1))
    put(link)
    assert link.here == []


def test_frames_of_a_producer_are_written_at_once(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "QUIET_SECONDS", 3600.0)  # whoever asked a producer knows what it does
    link.box.put_produced(FRAME, 1)
    assert link.here == [FRAME]
    assert (link.box.produced_messages, link.box.messages) == (1, 0)
    assert (link.box.taken, link.box.produced_bytes) == (len(FRAME), 0)


def test_frames_of_a_producer_are_queued_while_the_writer_writes(link: Link) -> None:
    go_on = threading.Event()
    link.writes = go_on.wait
    link.box.try_put(FRAME)
    eventually(lambda: link.by_writer == [FRAME])
    link.box.put_produced(OTHER, 1)
    assert link.here == []
    go_on.set()
    eventually(lambda: link.by_writer == [FRAME, OTHER])


def test_what_is_worth_a_write_is_written_at_once_unless_the_writer_writes(
    link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_module, "QUIET_SECONDS", 3600.0)
    link.box.put_now(FRAME, here=True)
    assert link.here == [FRAME]
    go_on = threading.Event()
    link.writes = go_on.wait
    link.box.put_now(FRAME)
    eventually(lambda: link.by_writer == [FRAME])
    link.box.put_now(OTHER, here=True)
    assert link.here == [FRAME]
    go_on.set()
    eventually(lambda: link.by_writer == [FRAME, OTHER])


def test_the_traffic_of_a_link(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    box = link.box
    assert box.traffic() is Traffic.IDLE
    monkeypatch.setattr(outbox_module, "QUIET_SECONDS", 3600.0)
    assert box.traffic() is Traffic.OWN
    monkeypatch.setattr(outbox_module, "OTHERS_QUIET_SECONDS", 3600.0)
    found: list[Traffic] = []
    other = threading.Thread(target=lambda: found.extend([box.traffic(), box.traffic()]))
    other.start()
    other.join(5)
    assert found == [Traffic.BUSY, Traffic.OWN]
    assert box.traffic() is Traffic.BUSY
    go_on = threading.Event()
    link.writes = go_on.wait
    box.try_put(FRAME)
    eventually(lambda: link.by_writer == [FRAME])
    assert [box.traffic(), box.traffic()] == [Traffic.BUSY, Traffic.BUSY]
    go_on.set()


def test_a_producers_frames_for_a_closed_link_are_dropped(link: Link) -> None:
    link.box.close()
    link.box.put_produced(FRAME, 1)
    assert (link.here, link.box.size_bytes) == ([], 0)


def test_a_socket_is_written_to_without_waiting() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        send_now = Transport(ours, None, b"").send_now  # type: ignore[arg-type]
        assert send_now is not None
        with pytest.raises(BlockingIOError):
            while True:
                send_now(b"x" * HERE_BYTES, NOWAIT)
