"""`natsync check`: is all well? The answer is the exit status, for health probes."""

import ssl
import time
from collections.abc import Callable
from typing import Any

import click

import natsync
from natsync.cli.connection import connected, connection_options
from natsync.cli.failures import one_line
from natsync.cli.output import PayloadPrinter, write_json
from natsync.cli.parameters import duration, timeout_option
from natsync.cli.services import ask, subject_of

#: Seconds that each question may take. Kubernetes gives a probe one second unless told otherwise.
TIMEOUT = 2.0

#: The exit statuses; 2 is usage, as everywhere.
HEALTHY = 0
FAILED = 1
USAGE = 2
UNREACHABLE = 3
REFUSED = 4
NOT_SERVED = 5
TOO_SLOW = 6


@click.command(short_help="Exit status 0 if server and service are well, for health probes.")
@click.option("--request", "subject", metavar="SUBJECT", help="A request to SUBJECT (its handler runs) is answered.")
@click.option("--payload", default="", help="What that request carries.")
@click.option("--service", metavar="NAME", help="A micro service NAME answers a PING (no handler runs).")
@click.option("--max-rtt", type=duration, help="The server answers within this time, as 50ms.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of lines.")
@timeout_option(TIMEOUT, "Most time for each answer.")
@connection_options
@click.pass_context
def check(
    ctx: click.Context,
    subject: str | None,
    payload: str,
    service: str | None,
    max_rtt: float | None,
    as_json: bool,
    timeout: float,
) -> None:
    """Connect, and see that the server answers; with --request and --service, that somebody behind it does.

    \b
    Exit status:
      0  all is well
      1  something answers, but with an error
      2  usage: an option is wrong
      3  no server can be reached
      4  the server does not accept the credentials or the certificate, or does not permit what was asked
      5  nobody serves the subject, or no such service answers
      6  no answer within --timeout, or a slower one than --max-rtt
    """
    report = Report()
    questions: list[tuple[str, Callable[[natsync.Client], dict[str, Any]]]] = [
        ("server", lambda client: _ask_server(client, timeout, max_rtt))
    ]
    if service is not None:
        questions.append(("service", lambda client: _ask_service(client, service, timeout)))
    if subject is not None:
        data = payload.encode("utf-8", "surrogateescape")
        questions.append(("request", lambda client: _ask_subject(client, subject, data, timeout)))
    report.run(questions)
    report.show(as_json)
    ctx.exit(report.status)


class Unwell(Exception):
    """A check that did not go well."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


class Report:
    """What was checked, up to the first that did not go well."""

    def __init__(self) -> None:
        self.status = HEALTHY
        self.checks: list[dict[str, Any]] = []

    def run(self, questions: list[tuple[str, Callable[[natsync.Client], dict[str, Any]]]]) -> None:
        name = "server"
        try:
            with connected() as client:
                for name, question in questions:
                    self.checks.append({"check": name, "ok": True, **question(client)})
        except click.UsageError:
            raise
        except Exception as error:
            self.status = status_of(error)
            self.checks.append({"check": name, "ok": False, "error": one_line(error)})

    def show(self, as_json: bool) -> None:
        if as_json:
            write_json({"ok": self.status == HEALTHY, "status": self.status, "checks": self.checks})
            return
        printer = PayloadPrinter()
        for one in self.checks:
            if not one["ok"]:
                click.echo(f"natsync: {one['check']}: {one['error']}", err=True)
                continue
            facts = " ".join(f"{key}={value}" for key, value in one.items() if key not in ("check", "ok"))
            printer.write_line(f"ok {one['check']}: {facts}")


def status_of(error: BaseException) -> int:
    """The exit status that says what kind of failure it is."""
    if isinstance(error, Unwell):
        return error.status
    if isinstance(error, natsync.InvalidArgument):
        return USAGE
    if isinstance(error, natsync.AuthorizationError | natsync.PermissionDenied):
        return REFUSED
    if isinstance(error, click.ClickException):  # the server refused something, see connected()
        return REFUSED
    if isinstance(error, natsync.NoServersError):
        return REFUSED if _is_certificate(error) else UNREACHABLE
    if isinstance(error, natsync.NoRespondersError):
        return NOT_SERVED
    if isinstance(error, natsync.TimedOut):
        return TOO_SLOW
    return UNREACHABLE if isinstance(error, natsync.ConnectError | natsync.ConnectionClosed) else FAILED


def _is_certificate(error: natsync.NoServersError) -> bool:
    return bool(error.causes) and all(_chain_has(cause, ssl.SSLError) for cause in error.causes.values())


def _chain_has(error: BaseException | None, kind: type[BaseException]) -> bool:
    while error is not None:
        if isinstance(error, kind):
            return True
        error = error.__cause__
    return False


def _ask_server(client: natsync.Client, timeout: float, max_rtt: float | None) -> dict[str, Any]:
    rtt = client.rtt(timeout)
    if max_rtt is not None and rtt > max_rtt:
        raise Unwell(f"the round trip takes {1e3 * rtt:.1f} ms, more than {1e3 * max_rtt:g} ms", TOO_SLOW)
    facts = client.stats(), client.server_info
    return {"url": facts[0]["server"], "version": facts[1].get("version"), "rtt_ms": round(1e3 * rtt, 3)}


def _ask_service(client: natsync.Client, name: str, timeout: float) -> dict[str, Any]:
    answers = ask(client, "PING", timeout, name)
    if not answers:
        raise Unwell(f"no service answers on {subject_of('PING', name)}", NOT_SERVED)
    return {"name": name, "instances": len(answers), "rtt_ms": round(1e3 * min(rtt for _, rtt in answers), 3)}


def _ask_subject(client: natsync.Client, subject: str, payload: bytes, timeout: float) -> dict[str, Any]:
    began = time.monotonic()
    reply = client.request(subject, payload, timeout=timeout)
    took = time.monotonic() - began
    return {"subject": subject, "reply_bytes": len(reply.data), "took_ms": round(1e3 * took, 3)}
