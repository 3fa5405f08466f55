"""What a check says of a machine."""

from dataclasses import dataclass

OK, WARNING, PROBLEM = "ok", "warning", "problem"
STATUSES = (OK, WARNING, PROBLEM)


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    check, subject: what was looked at, such as versions and torch. status: ok, warning (a run works, but
    worse or otherwise than it could) or problem (a run will fail). fix: what to do; empty if ok.
    """

    check: str
    subject: str
    status: str
    text: str
    fix: str = ""

    def __post_init__(self) -> None:
        assert self.status in STATUSES and bool(self.fix) == (self.status != OK), self
