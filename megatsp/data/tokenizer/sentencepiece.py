"""SentencePiece models, as the library of that name writes them: *.model."""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megatsp.data.tokenizer.base import Tokenizer, check_text, read_chat_template
from megatsp.data.tokenizer.exact import SPACE

if TYPE_CHECKING:
    import sentencepiece

MODEL = "tokenizer.model"


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model: the library's ids, without begin and end of sequence; eod is the model's eos_id.

    Control symbols (`<s>`, `</s>` and those that the model was trained with) never arise from text, and are
    the special tokens. User-defined symbols are text: the library finds them wherever they are spelled.

    token_bytes are those of the normalised text, in which spaces may have been put before it or folded: a
    piece with U+2581 as a space, one byte of a byte piece. It is None if the model does not fall back to
    bytes, as its unknown piece stands for any text.

    Args:
        files: MODEL, and what may stand beside it: tokenizer_config.json, chat_template.jinja.

    Raises:
        ValueError: no SentencePiece model, or one that has no end of sequence.
    """

    def __init__(self, files: dict[str, bytes], name: str) -> None:
        self.name = name
        self._files = dict(files)
        self._model = _processor(files[MODEL], name)
        self._rendered: sentencepiece.SentencePieceProcessor | None = None
        model, self._vocab_size = self._model, self._model.get_piece_size()
        self.eod = model.eos_id()
        if self.eod < 0:
            raise ValueError(
                f"{name} has no end of sequence (its eos_id is -1), so nothing would end a document: train "
                "the model with --eos_id, or convert it to a tokenizer.json with an eos_token"
            )
        pieces = [model.id_to_piece(i) for i in range(self._vocab_size)]
        self.special_tokens = {piece: i for i, piece in enumerate(pieces) if model.is_control(i)}
        self.token_bytes = None
        if sum(model.is_byte(i) for i in range(self._vocab_size)) == 256:
            self.token_bytes = [_bytes_of(model, i, piece) for i, piece in enumerate(pieces)]
        self.chat_template = read_chat_template(self._files, name)
        self.fingerprint = hashlib.sha256(files[MODEL]).hexdigest()

    @property
    def vocab_size(self) -> int:
        """The model's number of pieces."""
        return self._vocab_size

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The library's ids of each text, in this thread."""
        for text in texts:
            check_text(text)
        ids: list[list[int]] = self._model.encode(list(texts), num_threads=1, add_bos=False, add_eos=False)
        return ids

    def encode_rendered(self, text: str) -> tuple[list[int], list[int]]:
        """Ids, control symbols recognised; and the character that each begins at or in."""
        from sentencepiece import sentencepiece_pb2

        check_text(text)
        if self._rendered is None:
            self._rendered = _processor(_with_control_symbols_as_text(self._files[MODEL]), self.name)
        found = sentencepiece_pb2.SentencePieceText()  # type: ignore[attr-defined]
        found.ParseFromString(self._rendered.encode(text, out_type="serialized_proto"))
        # Offsets are of bytes: a character begins where no continuation byte stands.
        character_of, character = [], -1
        for byte in text.encode("utf-8"):
            character += not 0x80 <= byte < 0xC0
            character_of.append(character)
        character_of.append(len(text))
        return [piece.id for piece in found.pieces], [character_of[piece.begin] for piece in found.pieces]

    def decode(self, ids: Sequence[int]) -> str:
        """The library's text of `ids`; control symbols become nothing."""
        self._check_ids(ids)
        text: str = self._model.decode([int(i) for i in ids])
        return text

    def files(self) -> dict[str, bytes]:
        """The model and what was beside it."""
        return dict(self._files)

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return type(self), (self._files, self.name)


def _processor(model: bytes, name: str) -> "sentencepiece.SentencePieceProcessor":
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{name} is no SentencePiece model: {error}") from None


def _bytes_of(model: "sentencepiece.SentencePieceProcessor", i: int, piece: str) -> bytes:
    if model.is_byte(i):
        return bytes([int(piece[1:-1], 16)])  # <0xA0>
    if model.is_control(i) or model.is_unknown(i):
        return b""
    return piece.replace(SPACE, " ").encode("utf-8")


def _with_control_symbols_as_text(model: bytes) -> bytes:
    """The model, whose control symbols are found where they are spelled; their ids stay."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(model)
    for piece in proto.pieces:
        if piece.type == piece.CONTROL:
            piece.type = piece.USER_DEFINED
    changed: bytes = proto.SerializeToString()
    return changed
