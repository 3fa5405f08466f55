"""One table of what the hosts' checks found."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatsp.doctor.finding import OK, PROBLEM, STATUSES, WARNING, Finding


def merge(hosts: Mapping[str, Sequence[Finding]]) -> list[tuple[Finding, list[str]]]:
    """Each finding once, with the hosts that have it; what is well is told once for all hosts.

    Versions that differ between hosts are a problem, whether or not each is well by itself.
    """
    groups: dict[tuple[str, ...], tuple[Finding, list[str]]] = {}
    for host, findings in hosts.items():
        for finding in findings:
            exact = finding.status != OK or finding.check == "versions"
            key = (finding.check, finding.subject, finding.status, finding.text if exact else "")
            groups.setdefault(key, (finding, []))[1].append(host)
    checks = list(dict.fromkeys(finding.check for finding, _ in groups.values()))
    merged = sorted(groups.values(), key=lambda group: checks.index(group[0].check))
    return [*merged, *_differing_versions(hosts)]


def _differing_versions(hosts: Mapping[str, Sequence[Finding]]) -> Iterator[tuple[Finding, list[str]]]:
    texts: dict[str, dict[str, list[str]]] = {}
    for host, findings in hosts.items():
        for finding in findings:
            if finding.check == "versions":
                texts.setdefault(finding.subject, {}).setdefault(finding.text, []).append(host)
    for subject, by_text in texts.items():
        if len(by_text) > 1:
            text = "; ".join(f"{text} on {_listed(names)}" for text, names in by_text.items())
            fix = "install the same environment on every host, or use one container"
            yield Finding("versions", f"{subject} differs", PROBLEM, text, fix), list(hosts)


def table(hosts: Mapping[str, Sequence[Finding]]) -> Iterator[str]:
    """The report as lines."""
    several = len(hosts) > 1
    merged = merge(hosts)
    for finding, names in merged:
        where = f"  [{_listed(names)}]" if several and len(names) < len(hosts) else ""
        more = f" (of {len(names)} hosts)" if several and len(names) > 1 and finding.status == OK else ""
        yield f"{finding.status:8} {finding.check:13} {finding.subject:18} {finding.text}{more}{where}"
        if finding.fix:
            yield f"{'':8} {'':13} {'':18} -> {finding.fix}"
    counts = count(hosts)
    yield f"{counts[PROBLEM]} problems, {counts[WARNING]} warnings on {len(hosts)} host{'s' * several}"


def count(hosts: Mapping[str, Sequence[Finding]]) -> dict[str, int]:
    """How many findings there are of each status."""
    merged = merge(hosts)
    return {status: sum(finding.status == status for finding, _ in merged) for status in STATUSES}


def as_json(hosts: Mapping[str, Sequence[Finding]]) -> dict[str, Any]:
    return {
        "hosts": list(hosts),
        "counts": count(hosts),
        "findings": [
            {
                "check": f.check, "subject": f.subject, "status": f.status, "text": f.text, "fix": f.fix,
                "hosts": names,
            }
            for f, names in merge(hosts)
        ],
    }  # fmt: skip


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return shown + (f" and {len(names) - 4} more" if len(names) > 4 else "")
