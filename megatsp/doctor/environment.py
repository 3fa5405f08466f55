"""Variables that slow a run down, change its numbers or break it; and where W&B would log."""

from collections.abc import Iterator, Mapping

from megatsp.doctor.finding import OK, PROBLEM, WARNING, Finding

_ON = ("1", "true", "yes", "on", "y")
# Variable: what it does when it is on.
_HARMFUL = {
    "CUDA_LAUNCH_BLOCKING": "the host waits for every kernel",
    "AMD_SERIALIZE_KERNEL": "kernels run one after the other",
    "AMD_SERIALIZE_COPY": "copies wait for each other",
    "NCCL_P2P_DISABLE": "GPUs of a host exchange through its memory",
    "NCCL_SHM_DISABLE": "ranks of a host exchange through the network",
    "NCCL_IB_DISABLE": "hosts exchange over TCP",
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "every allocation waits for the GPU",
    "PYTORCH_NO_HIP_MEMORY_CACHING": "every allocation waits for the GPU",
    "TRITON_INTERPRET": "Triton's kernels are interpreted on the CPU",
    "NVIDIA_TF32_OVERRIDE": "fp32 products are computed with 10 bits of mantissa",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "fp32 products are computed with 10 bits of mantissa",
    "PYTHONOPTIMIZE": "Python leaves out the checks of our own invariants",
}
_ERROR_HANDLING = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")


def check_environment(environment: Mapping[str, str], num_cores: int) -> Iterator[Finding]:
    found = [
        *_switches(environment),
        *_visible_devices(environment),
        *_threads(environment, num_cores),
        *_proxies(environment),
    ]
    if (level := environment.get("NCCL_DEBUG", "").upper()) in ("INFO", "TRACE"):
        text = f"NCCL_DEBUG={level}: every rank logs its communication"
        found.append(_warning("NCCL_DEBUG", text, "unset NCCL_DEBUG, or set it to WARN"))
    if environment.get("PYTHONHASHSEED", "random") != "random":
        text = "PYTHONHASHSEED is set; no result of megatsp depends on it"
        found.append(Finding("environment", "PYTHONHASHSEED", OK, text))
    yield from found
    if not any(finding.status != OK for finding in found):
        yield Finding("environment", "variables", OK, "none that harms")


def _warning(subject: str, text: str, fix: str) -> Finding:
    return Finding("environment", subject, WARNING, text, fix)


def _switches(environment: Mapping[str, str]) -> Iterator[Finding]:
    for name, effect in _HARMFUL.items():
        value = environment.get(name, "")
        if value.lower() in _ON or (name == "PYTHONOPTIMIZE" and value not in ("", "0")):
            yield _warning(name, f"{name}={value}: {effect}", f"unset {name}")
    if environment.get(_ERROR_HANDLING) == "0":
        text = f"{_ERROR_HANDLING}=0: a rank that waits for a dead one never ends"
        yield _warning(_ERROR_HANDLING, text, f"unset {_ERROR_HANDLING}")


def _visible_devices(environment: Mapping[str, str]) -> Iterator[Finding]:
    given = {name: environment[name] for name in _VISIBLE if name in environment}
    for name, value in given.items():
        if value.strip() in ("", "-1"):
            yield _warning(name, f"{name}={value!r} hides every GPU", f"unset {name}, if GPUs are wanted")
    hip, cuda = given.get("HIP_VISIBLE_DEVICES"), given.get("CUDA_VISIBLE_DEVICES")
    if hip is not None and cuda is not None and hip != cuda:
        text = f"HIP_VISIBLE_DEVICES={hip} contradicts CUDA_VISIBLE_DEVICES={cuda}, and ROCm reads both"
        fix = "unset one of them"
        yield Finding("environment", "visible devices", PROBLEM, text, fix)


def _threads(environment: Mapping[str, str], num_cores: int) -> Iterator[Finding]:
    value = environment.get("OMP_NUM_THREADS", "")
    local_ranks = environment.get("LOCAL_WORLD_SIZE", "1")
    if not value:
        return
    if not value.isdecimal() or int(value) < 1:
        text = f"OMP_NUM_THREADS={value} is no number of threads"
        yield _warning("OMP_NUM_THREADS", text, "unset OMP_NUM_THREADS")
    elif local_ranks.isdecimal() and int(value) * int(local_ranks) > num_cores:
        text = f"OMP_NUM_THREADS={value} for {local_ranks} ranks on {num_cores} cores"
        yield _warning("OMP_NUM_THREADS", text, f"set it to {max(1, num_cores // int(local_ranks))}")


def _proxies(environment: Mapping[str, str]) -> Iterator[Finding]:
    lower = {name.lower(): value for name, value in environment.items()}
    used = [name for name in _PROXIES if lower.get(name)]
    if used and not {"localhost", "127.0.0.1", "*"} & {
        p.strip() for p in lower.get("no_proxy", "").split(",")
    }:
        text = (
            f"{used[0]} is set, and no_proxy leaves out localhost: local services are asked for at the proxy"
        )
        yield _warning("proxies", text, "export no_proxy=localhost,127.0.0.1")


def check_wandb(mode: str, error: str = "") -> Iterator[Finding]:
    """mode: what logging.wandb=auto gives; error: why it gives none."""
    texts = {
        "online": "online: an API key is set",
        "offline": "offline: no API key; runs are kept under their wandb/ folder, for `wandb sync`",
        "disabled": "disabled by WANDB_MODE",
    }
    if error:
        yield Finding("environment", "W&B", PROBLEM, error, "unset WANDB_MODE, or set one of these")
    else:
        yield Finding("environment", "W&B", OK, texts[mode])
