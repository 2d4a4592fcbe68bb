"""`natsync services`: the micro services (ADR-32) that answer on the server, whatever they are written with."""

import json
from collections.abc import Iterable
from typing import Any

import click

import natsync
from natsync.cli.connection import connected, connection_options
from natsync.cli.gather import ask_all
from natsync.cli.output import Screen, plain_table, write_json
from natsync.cli.parameters import timeout_option

#: Seconds to wait for the first answer: services answer at once, or are not there.
TIMEOUT = 2.0

#: The start of the subjects on which services answer, and of the type of their answers.
PREFIX = "$SRV"
_TYPE = "io.nats.micro.v1."


@click.command(short_help="List the micro services on the server, their endpoints and numbers.")
@click.argument("name", required=False)
@click.argument("id", required=False)
@click.option("--ping", is_flag=True, help="Only who is there, with the time each took to answer.")
@click.option("--json", "as_json", is_flag=True, help="One JSON array instead of a table.")
@timeout_option(TIMEOUT, "Most time to wait for the first answer.")
@connection_options
def services(name: str | None, id: str | None, ping: bool, as_json: bool, timeout: float) -> None:
    """List the micro services that answer: name, version, id, endpoints and statistics.

    All of them, those called NAME, or the one instance with that ID. Any service counts that follows ADR-32, such as
    those of nats.go's, nats.py's or nats.js's micro packages. The exit status is 1 if none answers.
    """
    with connected() as client:
        if ping:
            found = [
                {**answer, "rtt_ms": round(1e3 * rtt, 3)} for answer, rtt in ask(client, "PING", timeout, name, id)
            ]
        else:
            infos = [answer for answer, _ in ask(client, "INFO", timeout, name, id)]
            found = joined(infos, (answer for answer, _ in ask(client, "STATS", timeout, name, id) if infos))
    found.sort(key=lambda service: (service["name"], service["id"]))
    if as_json:
        write_json(found)
    elif found:
        _show(found, ping)
    if not found:
        raise click.ClickException(f"no service answers on {subject_of('PING', name, id)}")


def subject_of(verb: str, name: str | None = None, id: str | None = None) -> str:
    """The subject on which services are asked: all, those of a name, or one instance."""
    return ".".join(filter(None, (PREFIX, verb, name, id)))


def ask(
    client: natsync.Client, verb: str, timeout: float, name: str | None = None, id: str | None = None
) -> list[tuple[dict[str, Any], float]]:
    """What services answer to PING, INFO or STATS, each with the seconds it took. Other answers are left out."""
    answers = ask_all(client, subject_of(verb, name, id), timeout=timeout)
    read = [(_read(message, verb), seconds) for message, seconds in answers]
    return [(answer, seconds) for answer, seconds in read if answer is not None]


def _read(message: natsync.Message, verb: str) -> dict[str, Any] | None:
    try:
        answer = json.loads(message.data)
    except ValueError:
        return None
    if not isinstance(answer, dict) or answer.get("type") != f"{_TYPE}{verb.lower()}_response":
        return None
    return answer if isinstance(answer.get("name"), str) and isinstance(answer.get("id"), str) else None


def joined(infos: Iterable[dict[str, Any]], stats: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry a service: its INFO, with the numbers of STATS in its endpoints."""
    numbers = {service["id"]: service for service in stats}
    found = []
    for info in infos:
        counted = numbers.get(info["id"], {})
        by_name = {_key(endpoint): endpoint for endpoint in counted.get("endpoints") or ()}
        endpoints = [{**by_name.get(_key(one), {}), **one} for one in info.get("endpoints") or ()]
        found.append({**_untyped(info), "started": counted.get("started"), "endpoints": endpoints})
    return found


def _untyped(answer: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in answer.items() if key != "type"}


def _key(endpoint: dict[str, Any]) -> tuple[object, object]:
    return endpoint.get("name"), endpoint.get("subject")


def _show(found: list[dict[str, Any]], ping: bool) -> None:
    if ping:
        table = plain_table("NAME", "VERSION", "ID", "RTT ms", right=("RTT ms",))
        for service in found:
            table.add_row(service["name"], str(service.get("version")), service["id"], f"{service['rtt_ms']:.2f}")
    else:
        numbers = ("REQUESTS", "ERRORS", "AVERAGE ms")
        table = plain_table(
            "NAME", "VERSION", "ID", "ENDPOINT", "SUBJECT", "GROUP", *numbers, right=numbers, folds=("NAME", "SUBJECT")
        )
        for service in found:
            who = (service["name"], str(service.get("version")), service["id"])
            for endpoint in service["endpoints"] or [{}]:
                table.add_row(*who, *_endpoint(endpoint))
    Screen().show(table)


def _endpoint(endpoint: dict[str, Any]) -> tuple[str, ...]:
    average = endpoint.get("average_processing_time")
    return (
        *(str(endpoint.get(key, "")) for key in ("name", "subject", "queue_group")),
        *(str(endpoint.get(key, "")) for key in ("num_requests", "num_errors")),
        f"{average / 1e6:.3f}" if isinstance(average, int | float) else "",
    )
