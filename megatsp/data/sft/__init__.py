"""Conversations and instructions as training documents: their tokens, and who speaks each of them."""

from megatsp.data.sft.records import FORMATS, Reject
from megatsp.data.sft.renderer import Rendered, Renderer

__all__ = ["FORMATS", "Reject", "Rendered", "Renderer"]
