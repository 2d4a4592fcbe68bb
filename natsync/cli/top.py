"""`natsync top`: what the monitored subscribers on the server are doing, as a table that follows them."""

import json
import time
from typing import Any

import click
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

import natsync
from natsync import monitor
from natsync.cli.connection import connected, connection_options
from natsync.cli.gather import ask_all
from natsync.cli.output import Screen, counted, in_bytes, plain_table, write_json
from natsync.cli.parameters import duration
from natsync.cli.rates import Rounds

#: Seconds between two rounds, and the least.
INTERVAL = 1.0
#: Single streams that are shown.
STREAMS = 10
_LEAST = 0.1

_NOBODY = "no subscriber answers: run `natsync serve --monitor`, or call natsync.monitor.answer(subscriber)"


@click.command(short_help="Watch the streams and rates of running subscribers.")
@click.argument("name", required=False)
@click.option("--interval", type=duration, default=INTERVAL, show_default=True, help="Time between two looks.")
@click.option("--count", type=click.IntRange(min=1), help="Leave after so many looks.")
@click.option(
    "--streams",
    type=click.IntRange(0, monitor.MOST_STREAMS),
    default=STREAMS,
    show_default=True,
    help="Single streams to be shown, those longest under way.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a look.")
@connection_options
def top(name: str | None, interval: float, count: int | None, streams: int, as_json: bool) -> None:
    """Watch the subscribers that answer (all, or those called NAME): streams, requests and rates, until Ctrl-C.

    A subscriber answers if it was started by `natsync serve --monitor`, or has called natsync.monitor.answer(). Rates
    are a second's, since the look before. Into a pipe, each look is printed below the one before.
    """
    interval = max(interval, _LEAST)
    screen = Screen()
    rounds, looks = Rounds(), 0
    with connected() as client:
        live = None
        if screen.is_terminal and not as_json:
            live = Live(console=screen, screen=True, auto_refresh=False)
            live.start()
        try:
            while True:
                began = time.monotonic()
                rounds.add(look(client, name, interval, streams))
                looks += 1
                if as_json:
                    write_json({"time": time.time(), "subscribers": rounds.subscribers()})
                elif live is not None:
                    live.update(picture(rounds, client, interval, streams), refresh=True)
                else:
                    screen.show(picture(rounds, client, interval, streams))
                if count is not None and looks >= count:
                    return
                _pause(began + interval - time.monotonic())
        finally:
            if live is not None:
                live.stop()


def look(client: natsync.Client, name: str | None, interval: float, streams: int) -> list[dict[str, Any]]:
    """What the monitored subscribers answer, within the time between two looks."""
    question = json.dumps({"streams": streams}).encode()
    told = ask_all(client, monitor.SUBJECT, question, timeout=interval, stall=interval / 4)
    answers = (message.data for message, _ in told)
    read = (_read(data) for data in answers)
    return [answer for answer in read if answer is not None and name in (None, answer["name"])]


def _read(data: bytes) -> dict[str, Any] | None:
    try:
        answer = json.loads(data)
    except ValueError:
        return None
    return answer if isinstance(answer, dict) and answer.get("type") == monitor.TYPE else None


def _pause(seconds: float) -> None:
    if seconds > 0:
        time.sleep(seconds)


def picture(rounds: Rounds, client: natsync.Client, interval: float, most_streams: int) -> RenderableType:
    """One look, as it is shown."""
    subscribers = rounds.subscribers()
    streams = sum(one["streams"] for one in subscribers if not one["silent_rounds"])
    server = client.stats()["server"] or "no server: connecting again"
    head = Text.assemble(
        ("natsync top", "bold"),
        f"   {server}   {counted(len(subscribers), 'subscriber')}   {counted(streams, 'stream')}",
        f"   every {interval:g} s",
    )
    if not subscribers:
        return Group(head, Text(), Text(_NOBODY, style="yellow"))
    parts = [head, Text(), _handlers(rounds), Text(), _subscribers(subscribers)]
    single = rounds.streams(most_streams)
    if single:
        parts += [Text(), _streams(single)]
    return Group(*parts)


def _handlers(rounds: Rounds) -> RenderableType:
    numbers = ("BY", "ACTIVE", "REQ/s", "DONE/s", "DONE", "FAILED", "CANCELLED", "DROPPED")
    table = plain_table("SUBJECT", "GROUP", *numbers, right=numbers, folds=("SUBJECT", "GROUP"))
    for one in rounds.handlers():
        table.add_row(
            one["subject"],
            one["queue"] or "",
            str(one["subscribers"]),
            Text(str(one["active"]), style="bold green" if one["active"] else ""),
            _rate(one["received_rate"]),
            _rate(one["processed_rate"]),
            str(one["processed"]),
            Text(str(one["failed"]), style="red" if one["failed"] else ""),
            str(one["cancelled"]),
            Text(str(one["dropped"]), style="red" if one["dropped"] else ""),
        )
    return table


def _subscribers(subscribers: list[dict[str, Any]]) -> RenderableType:
    numbers = ("PID", "STREAMS", "THREADS", "MSG/s", "OUT/s", "RELINKED")
    table = plain_table("SUBSCRIBER", "HOST", *numbers, "STATUS", right=numbers, folds=("SUBSCRIBER", "HOST"))
    for one in subscribers:
        silent = one["silent_rounds"]
        sent = one["out_bytes_rate"]
        table.add_row(
            one["name"],
            one["host"],
            str(one["pid"]),
            str(one["streams"]),
            str(one["threads"]),
            _rate(one["out_messages_rate"]),
            "-" if sent is None else in_bytes(sent),
            str(one["connection"].get("reconnects", 0)),
            Text("no answer", style="yellow") if silent else Text(one["status"]),
            style="dim" if silent else "",
        )
    return table


#: How the states of a stream are shown, if not as they are.
_STYLES = {"waiting": "yellow", "silent": "red", "no link": "red"}


def _streams(streams: list[dict[str, Any]]) -> RenderableType:
    numbers = ("NO.", "FOR", "CHUNKS", "CHUNKS/s", "SENT", "SENT/s")
    table = plain_table(
        "STREAM", "SUBSCRIBER", *numbers, "MODE", "STATE", right=numbers, folds=("STREAM", "SUBSCRIBER")
    )
    for one in streams:
        rate = one["bytes_rate"]
        table.add_row(
            one["subject"],
            one["subscriber"],
            str(one["number"]),
            _age(one["seconds"]),
            f"{one['chunks']:,}",
            _rate(one["chunks_rate"]),
            in_bytes(one["size_bytes"]),
            "-" if rate is None else in_bytes(rate),
            one["mode"],
            Text(one["state"], style=_STYLES.get(one["state"], "")),
        )
    return table


def _age(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes} m {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} m"


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"
