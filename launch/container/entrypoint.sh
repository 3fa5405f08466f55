#!/usr/bin/env bash
# Runs a command as whoever started the container, who need not be root, known to /etc/passwd, or have a home.
# Where HOME cannot be written, the caches go to a private folder; a variable that is set already stays.
# Python packages are the image's alone: Apptainer brings the caller's home and variables, which lead to the host's.
#
#   entrypoint.sh python3 -m megatsp train ...
set -euo pipefail

export PYTHONNOUSERSITE=1 # ~/.local comes before the image's packages
unset PYTHONPATH PYTHONHOME

uid=$(id -u)
if [[ -z ${USER:-} ]] && ! id -un >/dev/null 2>&1; then
    export USER=uid$uid # torch and wandb ask for a name, and an unknown number has none
fi

if [[ -z ${HOME:-} || ! -d $HOME || ! -w $HOME ]]; then
    caches=${TMPDIR:-/tmp}/megatsp-$uid
    if ! (umask 077 && mkdir -p "$caches") || [[ ! -O $caches || ! -w $caches || -L $caches ]]; then
        echo "megatsp-entrypoint: $caches is not a folder of yours: set TMPDIR to one that you can write" >&2
        exit 1
    fi
    echo "megatsp-entrypoint: HOME (${HOME:-unset}) is not writable: caches go to $caches" >&2
    export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$caches/triton}
    export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$caches/inductor}
    export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$caches/torch_extensions} # what torch compiles at first use
    export HF_HOME=${HF_HOME:-$caches/huggingface}
    export MPLCONFIGDIR=${MPLCONFIGDIR:-$caches/matplotlib}
    export WANDB_CACHE_DIR=${WANDB_CACHE_DIR:-$caches/wandb/cache}
    export WANDB_CONFIG_DIR=${WANDB_CONFIG_DIR:-$caches/wandb/config}
    export WANDB_DATA_DIR=${WANDB_DATA_DIR:-$caches/wandb/data}
    export XDG_CACHE_HOME=${XDG_CACHE_HOME:-$caches/xdg}                       # the HIP compiler, fontconfig
    export MIOPEN_USER_DB_PATH=${MIOPEN_USER_DB_PATH:-$caches/miopen}          # ROCm's convolutions,
    export MIOPEN_CUSTOM_CACHE_DIR=${MIOPEN_CUSTOM_CACHE_DIR:-$caches/miopen}  # its compiled kernels
    export CUDA_CACHE_PATH=${CUDA_CACHE_PATH:-$caches/cuda}                    # the driver's compiled kernels
fi

exec "$@"
