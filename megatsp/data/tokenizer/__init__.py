"""Tokenizers: bytes, Hugging Face's, SentencePiece's and tiktoken's, found by `load_tokenizer`."""

from megatsp.data.tokenizer.base import EOD_NAMES, Tokenizer
from megatsp.data.tokenizer.byte import ByteTokenizer
from megatsp.data.tokenizer.huggingface import HuggingFaceTokenizer
from megatsp.data.tokenizer.load import from_megatron, load_tokenizer
from megatsp.data.tokenizer.sentencepiece import SentencePieceTokenizer
from megatsp.data.tokenizer.tiktoken import TiktokenTokenizer
from megatsp.data.tokenizer.train import train_bpe

__all__ = [
    "EOD_NAMES",
    "ByteTokenizer",
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "TiktokenTokenizer",
    "Tokenizer",
    "from_megatron",
    "load_tokenizer",
    "train_bpe",
]
