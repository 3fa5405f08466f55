"""A compiler that aborts, as LLVM does: for the workers of scripts/aot_report.py, which import it."""

import os
from typing import Any


def dying_job(job: Any) -> Any:
    """Ends its process on the first variant; compiles the others to nothing, without problems."""
    if job.index == 0:
        os._exit(3)
    import aot_report

    return aot_report.Row(job, "kernel", "", None, [])
