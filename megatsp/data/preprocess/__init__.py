"""`megatsp preprocess`: texts and conversations to tokenised documents on disk."""
