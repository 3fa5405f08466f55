"""`megatsp report RUN`: the run as one HTML file."""

from pathlib import Path

from megatsp.checkpoint.paths import replace_text
from megatsp.parser import Parser
from megatsp.report.page import METRICS, page
from megatsp.report.sources import read_run

REPORT = "report.html"


def run(arguments: list[str]) -> int:
    """Writes the page and prints where it is.

    Raises:
        ValueError: there is no run or nothing to show of it, or the page cannot be written.
    """
    parser = Parser(
        "megatsp report",
        description="Writes one HTML file of a run: curves, settings, events, samples. It needs no network "
        "and no Weights & Biases, and works while the run goes on.",
    )
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="<output_dir>/<name> of a run")
    parser.add_argument("--output", type=Path, metavar="FILE", help=f"where to (default: RUN/{REPORT})")
    given = parser.parse_args(arguments)
    found = read_run(given.run_folder, METRICS)
    output: Path = given.output or given.run_folder / REPORT
    if output.is_dir() or not output.parent.is_dir():
        raise ValueError(f"--output {output}: give a file in a folder that exists")
    try:
        replace_text(output, page(found))
    except OSError as error:
        raise ValueError(f"cannot write {output}: {error.strerror}; give another --output") from error
    print(f"report: {output}")
    return 0
