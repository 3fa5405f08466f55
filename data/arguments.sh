# shellcheck shell=bash
# Sourced by the recipes' prepare.sh: reads their arguments and trains a tokenizer where none is given.

# Reads `--source PATH` (may be repeated), `--output FOLDER`, `--tokenizer SPEC` and `--vocab-size N` into
# sources, output, tokenizer and vocab_size. `preprocess` has what is left: options of megatsp preprocess.
read_arguments() {
    sources=() output=$1 tokenizer="" vocab_size=32000 preprocess=()
    shift
    while (($#)); do
        case $1 in
        --help | -h) usage && exit 0 ;;
        --source | --output | --tokenizer | --vocab-size)
            (($# > 1)) || refuse "$1 needs a value"
            case $1 in
            --source) sources+=("${2%/}") ;;
            --output) output=${2%/} ;;
            --tokenizer) tokenizer=$2 ;;
            --vocab-size) vocab_size=$2 ;;
            esac
            shift 2
            ;;
        *) preprocess+=("$1") && shift ;;
        esac
    done
    ((${#sources[@]})) || refuse "--source is missing: the folder of the downloaded files"
}

refuse() {
    echo "${0##*/}: error: $1" >&2
    usage >&2
    exit 2
}

# Trains a BPE on the first 500 MB of the arguments, files or globs and perhaps options, unless --tokenizer was given or
# OUTPUT/tokenizer is there already. The special tokens are those of ChatML, so that it serves for SFT too.
train_tokenizer() {
    [[ -z $tokenizer ]] || return 0
    tokenizer=$output/tokenizer
    [[ -e $tokenizer ]] || python -m megatsp preprocess train-tokenizer --input "$@" --output "$tokenizer" \
        --vocab-size "$vocab_size" --limit-bytes 500000000 --special-tokens '<|im_start|>' '<|im_end|>'
}
