"""From counters to rates: what the answers of natsync.monitor say, round by round. Pure."""

from dataclasses import dataclass, field
from typing import Any

#: Rounds without an answer after which a subscriber is taken off the table.
KEPT_ROUNDS = 5

#: Counters of a registration of which rates are made, and what the rates are called.
_RATES = {"received": "received_rate", "processed": "processed_rate"}
_STREAM_RATES = {"chunks": "chunks_rate", "size_bytes": "bytes_rate"}
_LINK_RATES = {"out_messages": "out_messages_rate", "out_bytes": "out_bytes_rate", "in_messages": "in_messages_rate"}
#: What is added up where several subscribers serve the same subject in the same group.
_ADDED = ("active", "received", "processed", "failed", "cancelled", "dropped", *_RATES.values())


@dataclass
class Seen:
    """One subscriber: its last answer, the one before, and for how many rounds it has been silent."""

    now: dict[str, Any]
    before: dict[str, Any] | None = None
    silent: int = 0


@dataclass
class Rounds:
    """What was answered so far, by the subscribers' ids."""

    seen: dict[str, Seen] = field(default_factory=dict)

    def add(self, answers: list[dict[str, Any]]) -> None:
        """Take the answers of one round."""
        for one in self.seen.values():
            one.silent += 1
        for answer in answers:
            known = self.seen.get(answer["id"])
            self.seen[answer["id"]] = Seen(answer, known.now if known else None)
        self.seen = {key: one for key, one in self.seen.items() if one.silent <= KEPT_ROUNDS}

    def subscribers(self) -> list[dict[str, Any]]:
        """The last answer of each, by name, with rates a second: None until there are two answers."""
        found = [_rated(one) for one in self.seen.values()]
        return sorted(found, key=lambda answer: (answer["name"], answer["host"], answer["pid"]))

    def handlers(self) -> list[dict[str, Any]]:
        """The registrations of all that answered this round, those on the same subject and queue group added up."""
        totals: dict[tuple[str, str], dict[str, Any]] = {}
        for one in self.seen.values():
            if one.silent:
                continue
            for entry in _rated(one)["registrations"]:
                key = (entry["subject"], entry["queue"] or "")
                total = totals.setdefault(key, {"subject": key[0], "queue": entry["queue"], "subscribers": 0})
                total["subscribers"] += 1
                for name in _ADDED:
                    total[name] = _sum(total.get(name), entry.get(name))
        return [totals[key] for key in sorted(totals)]

    def streams(self, most: int) -> list[dict[str, Any]]:
        """Of the single streams told of this round, the longest under way, each with its subscriber's name."""
        found = [
            {**entry, "subscriber": one.now["name"]}
            for one in self.seen.values()
            if not one.silent
            for entry in _rated(one)["open_streams"]
        ]
        return sorted(found, key=lambda entry: -entry["seconds"])[:most]


def _sum(one: float | None, other: float | None) -> float | None:
    return other if one is None else one if other is None else one + other


def _rated(one: Seen) -> dict[str, Any]:
    now, before = one.now, one.before or {}
    seconds = now["clock_seconds"] - before.get("clock_seconds", now["clock_seconds"])
    former = {(entry["subject"], entry["queue"]): entry for entry in before.get("registrations", ())}
    registrations = [
        {**entry, **_rates(_RATES, entry, former.get((entry["subject"], entry["queue"])), seconds)}
        for entry in now["registrations"]
    ]
    begun = {entry["number"]: entry for entry in before.get("open_streams", ())}
    streams = [
        {**entry, **_rates(_STREAM_RATES, entry, begun.get(entry["number"]), seconds)}
        for entry in now.get("open_streams", ())
    ]
    link = _rates(_LINK_RATES, now["connection"], before.get("connection"), seconds)
    told = {"registrations": registrations, "open_streams": streams, "silent_rounds": one.silent}
    return {**now, **told, **link}


def _rates(
    names: dict[str, str], now: dict[str, Any], before: dict[str, Any] | None, seconds: float
) -> dict[str, float | None]:
    if not before or seconds <= 0:
        return dict.fromkeys(names.values())
    return {rate: max(0.0, (now.get(name, 0) - before.get(name, 0)) / seconds) for name, rate in names.items()}
