"""The language model's own loss with an SAE in its place: what end-to-end fine-tuning minimises.

One forward without gradients reads the rows and the clean predictions; in a second one, of the frozen model's
layers from there upwards, the reconstruction is at the ordinary positions of every hook that is
reconstructed; gradients flow back through those layers into it. The predictions that count are those of
`splice`, so what is minimised here is what evaluation reports as kl_sae or ce_sae.

Source: Braun et al. 2024, "Identifying Functionally Important Features with End-to-End Sparse Dictionary
Learning" (arXiv:2405.12241); a short fine-tuning at the end of training gives most of it: Karvonen 2025,
"Revisiting End-To-End Sparse Autoencoder Training" (arXiv:2503.17272).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from sae_train.batch import Batch
from sae_train.harvest.above import Above
from sae_train.harvest.capture import hooked
from sae_train.harvest.filters import FilterConfig, keep_mask
from sae_train.harvest.harvester import inputs
from sae_train.harvest.hooks import Site
from sae_train.harvest.splice import counted
from sae_train.harvest.windows import Windows
from sae_train.places import Places

LOSSES = ("kl", "ce")


@dataclass(frozen=True)
class Read:
    """What a clean forward gave.

    Attributes:
        batch: [n, d_in] and [n, d_out] rows of the ordinary positions, float32.
        outputs: the sites of what is reconstructed.
        windows: the tokens.
        mask: [B, T] bool, the ordinary positions.
        clean: [m, V] log-probabilities of the predictions that count; empty if they are not needed.
        above: the layers that see what the SAE makes.
    """

    batch: Batch
    outputs: list[Site]
    windows: Windows
    mask: Tensor
    clean: Tensor
    above: Above


class EndToEnd:
    """A frozen causal language model that an SAE is trained through.

    Args:
        model: in evaluation mode; its parameters stop asking for gradients.
        sites: every hook in use by key.
        special_ids: [S] int64 tokens whose positions are left alone.
        filters: which positions are ordinary.
        loss: kl, from the clean predictions, or ce, the next token's negative log-likelihood.
        tally: told the tokens seen, kept and dropped per rule of windows that are read for the first time.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Mapping[str, Site],
        special_ids: Tensor,
        filters: FilterConfig,
        loss: str,
        tally: Callable[[Mapping[str, int]], None] = lambda counts: None,
    ) -> None:
        assert loss in LOSSES, loss
        self.model, self.sites, self.loss_name = model.requires_grad_(False), dict(sites), loss
        self.special_ids, self.filters = special_ids, filters
        self.tally, self._counted = tally, -1

    @torch.no_grad()
    def read(self, windows: Windows, places: Places) -> Read:
        """Rows of the hooks and the clean predictions, by one forward."""
        seen: dict[str, Tensor] = {}

        def keep(key: str, x: Tensor) -> None:
            seen[key] = x.clone()  # the model may go on to change it in place

        outputs = [self.sites[key] for key in places.outputs]
        above = Above(self.model, outputs)
        visits = {self.sites[key]: lambda x, key=key: keep(key, x) for key in places.hooks}
        with hooked(self.model, visits), above.remembering():
            logits = self.model(**inputs(self.model, windows.tokens, windows.valid)).logits
        mask, counts, _ = keep_mask(seen, windows.tokens, windows.valid, self.special_ids, self.filters)
        if int(windows.index[-1]) > self._counted:  # several SAEs read the same ones: the first to, counts
            self._counted = int(windows.index[-1])
            self.tally(counts)
        clean = logits.new_zeros(0, dtype=torch.float32)
        if self.loss_name == "kl":
            clean = logits[counted(mask, windows.valid)].float().log_softmax(dim=-1)
        batch = places.batch({key: x[mask].float() for key, x in seen.items()})
        return Read(batch, outputs, windows, mask, clean, above)

    def loss(self, read: Read, y_hat: Tensor, widths: tuple[int, ...]) -> Tensor:
        """Mean over the predictions that count, in nats, with gradients in y_hat; 0 if none counts.

        Args:
            read: of these windows.
            y_hat: [n, d_out] reconstruction of `read.batch.y`. widths: of the outputs.
        """
        parts = y_hat.split(widths, dim=-1)

        def put(x: Tensor, rows: Tensor) -> Tensor:
            changed = x.clone()
            changed[read.mask.to(x.device)] = rows.to(x.dtype)
            return changed

        visits = {
            site: lambda x, part=part: put(x, part) for site, part in zip(read.outputs, parts, strict=True)
        }
        windows = read.windows
        with hooked(self.model, visits), read.above.alone():
            logits = self.model(**inputs(self.model, windows.tokens, windows.valid)).logits
        chosen = counted(read.mask, windows.valid).to(logits.device)
        if not bool(chosen.any()):
            return y_hat.sum() * 0.0
        log_p = logits[chosen].float().log_softmax(dim=-1)
        if self.loss_name == "kl":
            return functional.kl_div(log_p, read.clean, reduction="batchmean", log_target=True)
        following = windows.tokens.roll(-1, dims=1).to(logits.device)
        return functional.nll_loss(log_p, following[chosen])
