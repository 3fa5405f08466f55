"""What kernels and exchanges between processes need: triton, and room in shared memory."""

from collections.abc import Iterator

from megatsp.doctor.finding import OK, PROBLEM, WARNING, Finding

_SHARED_BYTES = 1 << 30  # less is not enough for NCCL's or RCCL's rings and the data workers of eight ranks


def import_error(name: str) -> str:
    """Why a module cannot be imported; "" if it can."""
    import importlib

    try:
        importlib.import_module(name)
    except Exception as error:  # whatever a broken installation raises
        return f"{type(error).__name__}: {error}"
    return ""


def check_triton(error: str, on_gpu: bool) -> Iterator[Finding]:
    if not error:
        yield Finding("kernels", "triton", OK, "can be imported")
    elif on_gpu:
        fix = "install the triton that this build of torch names, or use kernels=torch"
        yield Finding("kernels", "triton", PROBLEM, f"cannot be imported: {error}", fix)
    else:
        yield Finding("kernels", "triton", OK, "cannot be imported; nothing needs it on a CPU")


def check_shared_memory(total_bytes: int | None) -> Iterator[Finding]:
    """total_bytes: of /dev/shm; None: there is none."""
    fix = "start the container with --shm-size=16g or --ipc=host"
    if total_bytes is None:
        yield Finding("kernels", "/dev/shm", WARNING, "does not exist", fix)
    elif total_bytes < _SHARED_BYTES:
        text = f"{total_bytes / 2**20:,.0f} MiB are little for exchanges between ranks and data workers"
        yield Finding("kernels", "/dev/shm", WARNING, text, fix)
    else:
        yield Finding("kernels", "/dev/shm", OK, f"{total_bytes / 2**30:.1f} GiB")
