# megatsp on AMD GPUs, or on NVIDIA's with --build-arg GPU=cuda. How to build and run: launch/container/README.md.
# The steps are launch/container/install.sh, which tests run without an image.
ARG GPU=rocm

# AMD's and NVIDIA's own images, which bring torch, Triton and the libraries below them; Python 3.12 and torch 2.12 in
# both. A vendor may build a tag anew, so give a digest to build the same image twice (launch/container/README.md).
# Newer: https://hub.docker.com/r/rocm/pytorch/tags (rocmX_ubuntuY_pyZ_pytorch_release_V with V from 2.11 to below
# 2.14) and https://docs.nvidia.com/deeplearning/frameworks/pytorch-release-notes.
ARG BASE_ROCM=rocm/pytorch:rocm7.14.1_ubuntu24.04_py3.12_pytorch_release_2.12.0
ARG BASE_CUDA=nvcr.io/nvidia/pytorch:26.05-py3
FROM ${BASE_ROCM} AS base-rocm
FROM ${BASE_CUDA} AS base-cuda

# hadolint ignore=DL3006  # one of the two above, which are tagged
FROM base-${GPU}
ARG GPU
# auto: the base image's apex if it works, else from source; source: from source; none
ARG APEX=auto
# Both empty: chosen by install.sh for this base
ARG APEX_SOURCE=""
ARG APEX_ARCH=""
ARG MAX_JOBS=8

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# What these two steps read and no more, so that a change of the source or of a text does not build apex again.
COPY launch/container/install.sh launch/container/keep_base.py launch/container/requirements.txt \
     launch/container/constraints.txt launch/container/requirements-build.txt /opt/megatsp/steps/
RUN bash /opt/megatsp/steps/install.sh dependencies
# hadolint ignore=DL3059  # a layer of its own
RUN bash /opt/megatsp/steps/install.sh apex "${APEX}"
RUN --mount=type=bind,target=/src,rw bash /src/launch/container/install.sh package

COPY --chmod=755 launch/container/entrypoint.sh /usr/local/bin/megatsp-entrypoint
RUN useradd --no-log-init --create-home --uid 10001 megatsp && install -d -o megatsp -g megatsp -m 1777 /work

# The version control's commit: --build-arg COMMIT="$(git rev-parse HEAD)". Above, it would build all anew each time.
ARG COMMIT=unknown
LABEL org.opencontainers.image.title="megatsp" \
      org.opencontainers.image.description="Long-context GPT training with folded Tensor and Sequence Parallelism" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${COMMIT}" \
      megatsp.gpu="${GPU}"

# Numeric, so that a cluster can see that it is not root. Any other user works too.
USER 10001:10001
WORKDIR /work

# Without a GPU, as that user, from a folder without the source: the program, its kernels and its configurations.
RUN megatsp-entrypoint megatsp --version && \
    megatsp-entrypoint python3 -m megatsp train --dry-run >/dev/null && \
    if [ "${APEX}" != none ]; then \
        megatsp-entrypoint python3 -c 'from megatsp.training.optimizer import load_apex_adam; load_apex_adam()'; \
    fi

ENTRYPOINT ["megatsp-entrypoint"]
CMD ["megatsp", "--help"]
