#!/usr/bin/env bash
# What the Dockerfile and megatsp.def run, one step a layer. `python` is the base image's, and its torch stays.
#
#   install.sh dependencies  the pinned packages of requirements.txt, and those of constraints.txt that they need
#   install.sh apex MODE     auto: the base image's apex if it is usable, else from source; source; none
#   install.sh package       megatsp itself, as a wheel, from the source around this file (which must be writable)
#
# Read from the environment:
#   MEGATSP_HOME   where constraints and versions are kept (default /opt/megatsp)
#   APEX_SOURCE    what pip installs for apex (default: the commit below for this torch, ROCm's or NVIDIA's)
#   APEX_ARCH      GPU architectures to build apex for (default gfx942;gfx950, or 9.0)
#   MAX_JOBS       compilers that run at a time
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
home=${MEGATSP_HOME:-/opt/megatsp}
kept=$home/base.txt
# release/1.12.0, which is for torch 2.12; and master of July 2026.
rocm_apex=git+https://github.com/ROCm/apex.git@ad1376f20dc0ac107040b6077c96aed52bd14298
cuda_apex=git+https://github.com/NVIDIA/apex.git@6424da3b4faa6c8f062da4a48c424fff3f02d42d

fail() { echo "install: $*" >&2; exit 1; }

# pip, held to the base image's packages and to ours. The files replace the constraints that NVIDIA's images set, which
# would also hold numpy and others to versions older than the pinned ones. Debian's python refuses without the second.
install() {
    PIP_CONSTRAINT="$kept $here/constraints.txt" PIP_BREAK_SYSTEM_PACKAGES=1 PIP_ROOT_USER_ACTION=ignore \
        python -m pip install --no-cache-dir --disable-pip-version-check "$@"
}

# The same with pinned build tools in a folder that goes away: the base's setuptools stays as it is.
install_from_source() {
    local tools
    tools=$(mktemp -d)
    PIP_CONSTRAINT='' python -m pip install --quiet --no-cache-dir --disable-pip-version-check --target "$tools" \
        --requirement "$here/requirements-build.txt"
    PATH="$tools/bin:$PATH" PYTHONPATH=$tools install --no-build-isolation --no-deps "$@"
    rm -rf "$tools"
}

# What optimizer=apex_fused_adam asks of it: PyPI's `apex` is another project, and one built without kernels is of no use.
# torch is imported first, for it loads the libraries that the kernels need. ROCm's amp_C imports without kernels too:
# each node would compile them at its first step. What was compiled when it was installed is in a table of apex's.
apex_is_usable() {
    python -c '
import torch
if torch.version.hip:
    from apex.git_version_info import installed_ops
    if not installed_ops.get("amp_C"):
        raise ImportError("this apex was installed without amp_C compiled")
import amp_C
from apex.optimizers import FusedAdam
amp_C.multi_tensor_adam  # on ROCm only this loads them
'
}

apex_from_source() { # forced, or pip keeps an unusable one of the same version
    if [[ $(python -c 'import torch; print(torch.version.hip or "")') ]]; then
        # One of some thirty extensions, which together take half an hour.
        APEX_BUILD_AMP_C=1 PYTORCH_ROCM_ARCH=${APEX_ARCH:-gfx942;gfx950} \
            install_from_source --force-reinstall "${APEX_SOURCE:-$rocm_apex}"
    else
        APEX_CPP_EXT=1 APEX_CUDA_EXT=1 TORCH_CUDA_ARCH_LIST=${APEX_ARCH:-9.0} \
            install_from_source --force-reinstall "${APEX_SOURCE:-$cuda_apex}"
    fi
    apex_is_usable || fail "the apex just built lacks FusedAdam or amp_C, its compiled kernels"
}

[[ -f $kept ]] || { mkdir -p "$home" && python "$here/keep_base.py" record "$kept"; }
case ${1:-} in
dependencies) # antlr4-python3-runtime has no wheel; pip from 25.3 on heeds what is to build it
    PIP_BUILD_CONSTRAINT=$here/requirements-build.txt install --requirement "$here/requirements.txt"
    ;;
apex)
    case ${2:-} in
    none) echo "install: no apex: optimizer=apex_fused_adam will refuse" ;;
    source) apex_from_source ;;
    auto)
        if why=$(apex_is_usable 2>&1); then
            echo "install: apex of the base image"
        else
            echo "install: the base image has no usable apex (${why##*$'\n'}): building it from source"
            apex_from_source
        fi
        ;;
    *) fail "apex ${2:-(nothing)}: expected auto, source or none" ;;
    esac
    ;;
package)
    install_from_source "$here/../.."
    # --no-deps above: a dependency that requirements.txt lacks must not come in unpinned. It is refused here.
    install --dry-run --quiet --no-index megatsp
    ;;
*) fail "${1:-(nothing)}: expected dependencies, apex or package" ;;
esac
python "$here/keep_base.py" check "$kept"
python -m pip freeze >"$home/versions.txt"
