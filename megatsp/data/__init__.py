"""Tokenised documents: the files on disk, the tokenizers, and the order in which samples are read."""
