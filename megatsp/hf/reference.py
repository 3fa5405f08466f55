"""transformers' own model, a layer at a time: what every conversion is held against."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from megatsp.hf.families import FAMILIES, family_of
from megatsp.hf.logits import ROWS
from megatsp.hf.source import TensorSource
from megatsp.hf.streaming import stream


class Reference:
    """The class of transformers that a config.json names, on weights read from `source` as it computes.

    Its memory is that of one layer. No code but transformers' own is run.
    """

    def __init__(self, config: Mapping[str, Any], source: TensorSource, device: torch.device) -> None:
        import transformers

        family = family_of(config)
        assert family.architecture in FAMILIES
        kind = transformers.CONFIG_MAPPING[family.model_type]
        try:
            self._config = kind.from_dict({key: value for key, value in config.items() if key != "auto_map"})
        except Exception as error:  # of many kinds: its classes check their values
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"transformers does not take this config.json: {reason}") from error
        self._class = getattr(transformers, family.architecture)
        self._source, self._device = source, device
        self.rotary: nn.Module = self._build().rotary_emb

    def _build(self) -> Any:
        with torch.device("meta"):
            decoder = self._class(self._config).model.eval()
        with self._device:  # its frequencies are no weights: they are computed
            decoder.rotary_emb = type(decoder.rotary_emb)(config=self._config)
        return decoder

    @torch.no_grad()
    def logits(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Logits of `ids`, int64 [B, T], computed in `dtype`: fp32 [B, T, V]."""
        decoder, source, device = self._build(), self._source, self._device
        for index, layer in enumerate(decoder.layers):
            stream(layer, f"model.layers.{index}", source, device, dtype)
        stream(decoder.norm, "model.norm", source, device, dtype)
        # The rows that are needed, not the whole embedding.
        rows = nn.functional.embedding(ids, source.read("model.embed_tokens.weight")).to(device, dtype)
        x = decoder(inputs_embeds=rows, use_cache=False).last_hidden_state
        own = "lm_head.weight"
        head = source.read(own if own in source.shapes else "model.embed_tokens.weight")
        blocks = (rows.to(device, dtype) for rows in head.split(ROWS))
        return torch.cat([nn.functional.linear(x, rows).float() for rows in blocks], -1)
