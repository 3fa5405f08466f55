"""Records golden runs anew, after a change that is meant to change numbers: see docs/testing.md.

python scripts/golden.py               # all of them
python scripts/golden.py owner bf16    # these
python scripts/golden.py --check       # writes nothing, and exits 1 if a number changed
"""

import os
import sys
import tempfile
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / folder) for folder in ("", "training", "data/sft")]
import conftest  # noqa: E402, F401  # the tests' environment, before torch is imported
from distributed import close_pools  # noqa: E402
from golden_runs import RUNS, Record, difference, prepare, records, this_machine  # noqa: E402

from megatsp.parser import Parser  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="golden.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f"of {', '.join(RUNS)}; default: all")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a number changed")
    options = parser.parse_args(argv)
    if unknown := [name for name in options.runs if name not in RUNS]:
        parser.error(f"no golden run is named {unknown[0]}: choose of {', '.join(RUNS)}")
    os.environ["TQDM_DISABLE"] = "1"
    with tempfile.TemporaryDirectory(prefix="megatsp_golden_") as folder:
        with redirect_stdout(StringIO()):
            prepare(Path(folder))
        found = records(Path(folder), options.runs or list(RUNS))
    close_pools()
    changed = 0
    for name, record in found.items():
        try:
            golden = Record.read(name)
        except FileNotFoundError:
            said = "new"
        else:
            bound = 0.0 if golden.made_on == this_machine() else RUNS[name].bound
            said = difference(record, golden, bound) or ("same bits" if not bound else f"same to {bound:g}")
        is_changed = not said.startswith("same")
        changed += is_changed
        print(f"{name:14}{said}", flush=True)
        if is_changed and not options.check:
            record.write(name)
    return int(options.check and changed > 0)


if __name__ == "__main__":
    sys.exit(main())
