"""FaultProxy between plain sockets: what is forwarded, and that each fault is the one asked for."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

import natsync
from natsync.testing import FaultProxy, NatsServer, PeerConnection, ScriptedPeer, eventually
from support import natsync_threads

#: Seconds for what must come; a loaded machine is slow.
PATIENCE = 10.0
#: More than the buffers between two sockets hold, unless a machine lets them grow beyond all measure.
MUCH = b"x" * (24 << 20)


class Far:
    """The far end: a script that keeps its connections, for the test to read and write."""

    def __init__(self) -> None:
        self.links: list[PeerConnection] = []
        self.leave = threading.Event()

    def __call__(self, peer: PeerConnection) -> None:
        peer.sock.settimeout(PATIENCE)
        self.links.append(peer)
        self.leave.wait(PATIENCE)

    def sock(self, index: int = 0) -> socket.socket:
        """The far socket of a connection, waited for."""
        eventually(lambda: len(self.links) > index, PATIENCE, "the connection did not reach the far end")
        return self.links[index].sock


@pytest.fixture
def far() -> Iterator[Far]:
    far = Far()
    yield far
    far.leave.set()


@pytest.fixture
def peer(far: Far) -> Iterator[ScriptedPeer]:
    with ScriptedPeer(far) as peer:
        yield peer
        far.leave.set()


@pytest.fixture
def proxy(peer: ScriptedPeer) -> Iterator[FaultProxy]:
    with FaultProxy(peer.port) as proxy:
        yield proxy


@pytest.fixture
def near(proxy: FaultProxy) -> Iterator[socket.socket]:
    with closing(connect(proxy)) as near:
        yield near


@pytest.fixture
def end(near: socket.socket, far: Far) -> socket.socket:
    """The far socket of `near`."""
    return far.sock()


def connect(proxy: FaultProxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), PATIENCE)


def receive(sock: socket.socket, size: int) -> bytes:
    """Exactly so many bytes; fewer where the end came first."""
    found = b""
    while len(found) < size and (more := sock.recv(size - len(found))):
        found += more
    return found


def receive_all(sock: socket.socket) -> tuple[bytes, str]:
    """What comes until the end, and how the end came."""
    found = b""
    try:
        while more := sock.recv(65536):
            found += more
    except ConnectionResetError:
        return found, "reset"
    return found, "cut"


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def sender(sock: socket.socket, data: bytes) -> threading.Thread:
    """A thread that sends; it ends when all was taken, or with the link."""

    def send() -> None:
        try:
            sock.sendall(data)
        except OSError:
            pass

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    return thread


def reader(sock: socket.socket, size: int) -> threading.Thread:
    """A thread that reads so many bytes."""

    def read() -> None:
        left = size
        while left and (more := sock.recv(min(left, 1 << 20))):
            left -= len(more)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread


def assert_silent(sock: socket.socket, seconds: float = 0.1) -> None:
    """Nothing comes for a moment, not even an end."""
    sock.settimeout(seconds)
    with pytest.raises(TimeoutError):
        sock.recv(1)
    sock.settimeout(PATIENCE)


# -- forwarding ----------------------------------------------------------------------------------------------------


def test_bytes_go_both_ways_unchanged(near: socket.socket, end: socket.socket) -> None:
    near.sendall(b"ping")
    assert receive(end, 4) == b"ping"
    end.sendall(b"pong")
    assert receive(near, 4) == b"pong"


def test_much_at_once_arrives_whole(near: socket.socket, end: socket.socket) -> None:
    data = bytes(range(256)) * 20_000
    sender(near, data)
    assert receive(end, len(data)) == data


def test_bytes_and_connections_are_counted(proxy: FaultProxy, near: socket.socket, end: socket.socket) -> None:
    near.sendall(b"12345")
    receive(end, 5)
    end.sendall(b"123")
    receive(near, 3)
    with closing(connect(proxy)):
        eventually(lambda: (proxy.connections, proxy.open_links) == (2, 2), PATIENCE)
        eventually(lambda: (proxy.up.passed_bytes, proxy.down.passed_bytes) == (5, 3), PATIENCE)


def test_the_end_of_one_side_is_handed_on_and_the_other_may_go_on(near: socket.socket, end: socket.socket) -> None:
    near.sendall(b"last words")
    near.shutdown(socket.SHUT_WR)
    assert receive_all(end) == (b"last words", "cut")
    end.sendall(b"answer")
    end.shutdown(socket.SHUT_WR)
    assert receive_all(near) == (b"answer", "cut")


def test_a_link_that_both_sides_ended_is_over(proxy: FaultProxy, near: socket.socket, end: socket.socket) -> None:
    near.shutdown(socket.SHUT_WR)
    end.shutdown(socket.SHUT_WR)
    eventually(lambda: proxy.open_links == 0, PATIENCE)


def test_a_reset_by_the_server_reaches_the_client(near: socket.socket, end: socket.socket) -> None:
    reset(end)
    assert receive_all(near) == (b"", "reset")


def test_a_reset_by_the_client_reaches_the_server(near: socket.socket, end: socket.socket) -> None:
    reset(near)
    assert receive_all(end) == (b"", "reset")


def test_without_a_server_a_client_is_reset() -> None:
    with closing(socket.socket()) as silent:
        silent.bind(("127.0.0.1", 0))  # and does not listen; as long as it is there, nobody else gets the port
        with FaultProxy(silent.getsockname()[1]) as proxy, pytest.raises(ConnectionResetError):
            with closing(connect(proxy)) as near:  # it may come that soon
                near.recv(1)


@pytest.mark.parametrize(
    "form", ["{port}", "127.0.0.1:{port}", "nats://127.0.0.1:{port}", "nats://u:p@localhost:{port}"]
)
def test_a_target_may_be_a_port_an_address_or_a_url(form: str, far: Far, peer: ScriptedPeer) -> None:
    text = form.format(port=peer.port)
    with FaultProxy(int(text) if text.isdigit() else text) as proxy, closing(connect(proxy)) as near:
        near.sendall(b"x")
        assert receive(far.sock(), 1) == b"x"


def test_the_url_has_the_targets_scheme_and_no_credentials(peer: ScriptedPeer) -> None:
    with FaultProxy(f"tls://user:secret@127.0.0.1:{peer.port}") as proxy:
        assert proxy.url == f"tls://127.0.0.1:{proxy.port}"
        assert "secret" not in repr(proxy)


@pytest.mark.parametrize("target", ["127.0.0.1", "nats://127.0.0.1", ""])
def test_a_target_without_a_port_is_refused(target: str) -> None:
    with pytest.raises(ValueError, match="port"):
        FaultProxy(target)


# -- faults of a direction -----------------------------------------------------------------------------------------


def test_delay_holds_bytes_back_one_way_only(proxy: FaultProxy, near: socket.socket, end: socket.socket) -> None:
    proxy.up.delay(1000.0)
    proxy.down.delay(0.3)
    near.sendall(b"up")
    began = time.monotonic()
    end.sendall(b"down")
    assert receive(near, 4) == b"down"
    assert time.monotonic() - began >= 0.29
    assert_silent(end)


def test_delay_keeps_the_order_and_delays_the_end_too(
    proxy: FaultProxy, near: socket.socket, end: socket.socket
) -> None:
    proxy.up.delay(0.1)
    for index in range(10):
        near.sendall(b"%d" % index)
    near.shutdown(socket.SHUT_WR)
    assert receive_all(end) == (b"0123456789", "cut")


def test_split_hands_on_small_pieces(proxy: FaultProxy, near: socket.socket, end: socket.socket) -> None:
    proxy.down.split(2, pause=0.25)
    pieces = []
    began = time.monotonic()
    end.sendall(b"0123456789")
    while sum(map(len, pieces)) < 10:
        pieces.append(near.recv(100))
    assert b"".join(pieces) == b"0123456789"
    assert len(pieces) > 1, "all came at once"
    assert time.monotonic() - began >= 0.9, "five pieces have four pauses"


@pytest.mark.parametrize("size", [1, 3, 7])
def test_split_changes_no_byte(proxy: FaultProxy, near: socket.socket, end: socket.socket, size: int) -> None:
    proxy.up.split(size)
    data = bytes(range(256)) * 4
    near.sendall(data)
    assert receive(end, len(data)) == data


def test_both_directions_at_once_do_not_keep_each_other(
    proxy: FaultProxy, near: socket.socket, end: socket.socket
) -> None:
    proxy.up.split(1)
    proxy.down.split(1)
    for _ in range(20):
        near.sendall(b"x" * 100)
        end.sendall(b"y" * 100)
        assert receive(end, 100) == b"x" * 100
        assert receive(near, 100) == b"y" * 100


def test_throttle_bounds_the_rate(proxy: FaultProxy, near: socket.socket, end: socket.socket) -> None:
    proxy.up.throttle(100_000)
    began = time.monotonic()
    near.sendall(b"x" * 40_000)
    assert len(receive(end, 40_000)) == 40_000
    assert time.monotonic() - began >= 0.35


def test_a_stall_holds_back_every_byte_from_its_return_on(far: Far, peer: ScriptedPeer) -> None:
    # A small buffer, or the kernel might take all of it.
    with FaultProxy(peer.port, receive_buffer_bytes=65536) as proxy, closing(connect(proxy)) as near:
        sending = sender(near, MUCH)
        receive(far.sock(), 1000)
        proxy.up.stall()
        passed = proxy.up.passed_bytes
        reading = reader(far.sock(), len(MUCH) - 1000)
        sending.join(0.1)
        assert proxy.up.passed_bytes == passed
        assert sending.is_alive(), "a stalled link took all of it"
        proxy.up.resume()
        sending.join(PATIENCE)
        reading.join(PATIENCE)
        assert not sending.is_alive()
        eventually(lambda: proxy.up.passed_bytes == len(MUCH), PATIENCE)


def test_a_stall_one_way_leaves_the_other(proxy: FaultProxy, near: socket.socket, end: socket.socket) -> None:
    proxy.up.stall()
    near.sendall(b"held")
    end.sendall(b"free")
    assert receive(near, 4) == b"free"
    assert_silent(end)
    proxy.up.resume()
    assert receive(end, 4) == b"held"


def test_a_stall_hides_the_end_of_the_link(proxy: FaultProxy, near: socket.socket, end: socket.socket) -> None:
    proxy.stall()
    end.close()
    assert_silent(near)
    proxy.resume()
    assert receive_all(near)[0] == b""


def test_a_small_receive_buffer_makes_a_stalled_sender_block_sooner(far: Far, peer: ScriptedPeer) -> None:
    taken = []
    for size in (4096, 4 << 20):
        with FaultProxy(peer.port, receive_buffer_bytes=size) as proxy, closing(connect(proxy)) as near:
            far.sock(len(taken))
            proxy.stall()
            near.settimeout(0.2)
            taken.append(0)
            with pytest.raises(TimeoutError):
                while True:
                    taken[-1] += near.send(MUCH[: 1 << 16])
    assert taken[0] < taken[1]


@pytest.mark.parametrize("how", ["reset", "cut"])
def test_drop_after_ends_the_link_behind_the_nth_byte(
    proxy: FaultProxy, near: socket.socket, end: socket.socket, how: str
) -> None:
    proxy.down.drop_after(7, how)  # type: ignore[arg-type]
    end.sendall(b"0123456789")
    assert receive_all(near) == (b"0123456", how)
    assert receive_all(end) == (b"", how)


def test_drop_after_counts_from_the_call_and_happens_once(
    proxy: FaultProxy, near: socket.socket, end: socket.socket, far: Far
) -> None:
    near.sendall(b"before")
    receive(end, 6)
    proxy.up.drop_after(3)
    near.sendall(b"after")
    assert receive_all(end) == (b"aft", "reset")
    with closing(connect(proxy)) as second:
        second.sendall(b"whole again")
        assert receive(far.sock(1), 11) == b"whole again"


def test_cut_of_a_direction_leaves_the_other(proxy: FaultProxy, near: socket.socket, end: socket.socket) -> None:
    proxy.up.cut()
    assert receive_all(end) == (b"", "cut")
    near.sendall(b"lost")
    end.sendall(b"still here")
    assert receive(near, 10) == b"still here"


def test_clear_ends_every_fault_of_a_direction(proxy: FaultProxy, near: socket.socket, end: socket.socket) -> None:
    proxy.up.delay(30)
    proxy.up.split(1, pause=30)
    proxy.up.throttle(0.01)
    proxy.up.drop_after(1)
    proxy.up.stall()
    proxy.up.clear()
    near.sendall(b"hello")
    assert receive(end, 5) == b"hello"


@pytest.mark.parametrize(
    "fault",
    [
        lambda way: way.delay(-1),
        lambda way: way.split(0),
        lambda way: way.split(1, -1),
        lambda way: way.throttle(0),
        lambda way: way.drop_after(0),
        lambda way: way.drop_after(1, "gently"),
    ],
)
def test_a_fault_that_makes_no_sense_is_refused(proxy: FaultProxy, fault: Callable[[object], None]) -> None:
    with pytest.raises(ValueError):
        fault(proxy.up)


# -- faults of links -----------------------------------------------------------------------------------------------


def test_cut_ends_both_sides_by_fin(proxy: FaultProxy, near: socket.socket, end: socket.socket) -> None:
    proxy.cut()
    assert receive_all(near) == (b"", "cut")
    assert receive_all(end) == (b"", "cut")
    near.close()
    end.close()
    eventually(lambda: proxy.open_links == 0, PATIENCE)


def test_reset_ends_both_sides_by_rst(proxy: FaultProxy, near: socket.socket, end: socket.socket) -> None:
    proxy.reset()
    assert proxy.open_links == 0
    assert receive_all(near) == (b"", "reset")
    assert receive_all(end) == (b"", "reset")


@pytest.mark.parametrize(("side", "ends"), [("client", ("reset", "cut")), ("server", ("cut", "reset"))])
def test_reset_of_one_side_ends_the_other_by_fin(
    proxy: FaultProxy, near: socket.socket, end: socket.socket, side: str, ends: tuple[str, str]
) -> None:
    proxy.reset(side)  # type: ignore[arg-type]
    assert (receive_all(near)[1], receive_all(end)[1]) == ends


def test_a_stalled_link_can_be_ended(proxy: FaultProxy, near: socket.socket, end: socket.socket) -> None:
    proxy.stall()
    proxy.cut()
    assert receive_all(near) == (b"", "cut")
    assert receive_all(end) == (b"", "cut")


def test_an_unknown_side_is_refused(proxy: FaultProxy) -> None:
    with pytest.raises(ValueError, match="client or server"):
        proxy.reset("left")  # type: ignore[arg-type]


def test_refuse_closes_new_connections_and_keeps_present_ones(
    proxy: FaultProxy, near: socket.socket, end: socket.socket, far: Far
) -> None:
    proxy.refuse()
    with closing(connect(proxy)) as second:
        assert receive_all(second) == (b"", "cut")
    near.sendall(b"x")
    assert receive(end, 1) == b"x"
    assert len(far.links) == 1


def test_hang_accepts_and_says_nothing(proxy: FaultProxy, far: Far) -> None:
    proxy.hang()
    with closing(connect(proxy)) as near:
        eventually(lambda: proxy.connections == 1, PATIENCE)
        near.sendall(b"anybody there?")
        assert_silent(near)
        assert not far.links, "a connection to the server was made"
        proxy.reset()
        assert receive_all(near) == (b"", "reset")


def test_forward_takes_new_connections_on_again(proxy: FaultProxy, far: Far) -> None:
    proxy.refuse()
    proxy.hang()
    proxy.forward()
    with closing(connect(proxy)) as near:
        near.sendall(b"x")
        assert receive(far.sock(), 1) == b"x"


# -- life ----------------------------------------------------------------------------------------------------------


def test_a_proxy_has_one_thread_with_a_name_and_close_ends_it(peer: ScriptedPeer) -> None:
    before = natsync_threads()
    proxy = FaultProxy(peer.port).start()
    assert [thread.name for thread in natsync_threads() - before] == [f"natsync-proxy-{proxy.port}"]
    proxy.close()
    assert natsync_threads() <= before


def test_close_resets_what_is_open_and_may_be_repeated(
    proxy: FaultProxy, near: socket.socket, end: socket.socket
) -> None:
    proxy.close()
    proxy.close()
    assert receive_all(near) == (b"", "reset")
    assert receive_all(end) == (b"", "reset")
    with pytest.raises(ConnectionRefusedError):
        connect(proxy)


def test_faults_may_be_set_before_the_start_and_after_the_end(far: Far, peer: ScriptedPeer) -> None:
    proxy = FaultProxy(peer.port)
    proxy.up.split(1)
    proxy.refuse()
    proxy.forward()
    with proxy, closing(connect(proxy)) as near:
        near.sendall(b"abc")
        assert receive(far.sock(), 3) == b"abc"
    proxy.stall()
    proxy.cut()


def test_a_proxy_starts_once_and_has_no_port_before(peer: ScriptedPeer) -> None:
    proxy = FaultProxy(peer.port)
    with pytest.raises(RuntimeError, match="no port"):
        proxy.url
    with proxy, pytest.raises(RuntimeError, match="starts once"):
        proxy.start()


def test_orders_from_many_threads_are_all_carried_out(
    proxy: FaultProxy, near: socket.socket, end: socket.socket
) -> None:
    def torment() -> None:
        for _ in range(50):
            proxy.stall()
            proxy.up.split(1)
            proxy.resume()
            proxy.up.clear()

    threads = [threading.Thread(target=torment) for _ in range(4)]
    for thread in threads:
        thread.start()
    data = bytes(range(256)) * 100
    sender(near, data)
    got = receive(end, len(data))
    for thread in threads:
        thread.join(PATIENCE)
    assert got == data


def test_a_waiting_proxy_uses_no_processor_time(proxy: FaultProxy, near: socket.socket, end: socket.socket) -> None:
    near.shutdown(socket.SHUT_WR)  # half closed
    assert receive_all(end) == (b"", "cut")
    with closing(connect(proxy)) as second:
        eventually(lambda: proxy.open_links == 2, PATIENCE)
        proxy.stall()
        second.sendall(b"held")
        reset(second)
        before = time.process_time()
        threading.Event().wait(0.3)
        assert time.process_time() - before < 0.15


def test_the_fixture_stands_in_front_of_the_shared_server(make_fault_proxy: Callable[..., FaultProxy]) -> None:
    proxy = make_fault_proxy()
    with natsync.Client(proxy.url, discover=False) as client:
        client.flush(PATIENCE)
        assert proxy.connections == 1
        assert proxy.up.passed_bytes > 0


def test_the_fixture_stands_in_front_of_any_server(
    make_fault_proxy: Callable[..., FaultProxy], make_nats_server: Callable[..., NatsServer]
) -> None:
    server = make_nats_server()
    proxy = make_fault_proxy(server.port)
    with natsync.Client(proxy.url) as client:
        assert client.server_info["port"] == server.port
