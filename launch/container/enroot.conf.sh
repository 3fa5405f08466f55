# shellcheck shell=bash
# enroot start --conf launch/container/enroot.conf.sh: enroot gives a container neither the caller's environment nor
# its folder; a job needs both.

# The caller's variables, but for those that name files of the host's own installation.
environ() {
    env | grep -E '^[A-Za-z_][A-Za-z0-9_]*=' |
        grep -Ev '^(PATH|LD_[A-Z_]*|PYTHONPATH|PYTHONHOME|VIRTUAL_ENV|CONDA_[A-Z_]*|ENROOT_[A-Z_]*)='
    echo "MEGATSP_FOLDER=$PWD" # where rc goes: PWD is set anew inside
}

mounts() {
    echo "$PWD $PWD none x-create=dir,bind,rw"
}

# Inside the container, in place of the image's own start, which would go to /work.
rc() {
    cd "$MEGATSP_FOLDER" || exit 1
    exec megatsp-entrypoint "$@"
}
