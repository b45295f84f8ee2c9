"""Cross-entropy of the language model with its activations replaced: what an SAE costs the model.

The site's tensor is replaced at *ordinary* positions only (the mask of `filters.keep_mask`); special tokens,
sinks and padding keep what the model computed, and predictions made *from* them are not counted, because an
SAE was never trained on those rows. A prediction counts when its input position is ordinary and its target is
a real token. Peers that replace every position, BOS included, report other numbers for the same SAE.

Scores:

    recovered_zero = (ce_zero - ce_sae) / (ce_zero - ce_clean)      the usual, flattering one
    recovered_mean = (ce_mean - ce_sae) / (ce_mean - ce_clean)      against replacing by the mean row

An SAE reads the activations of the unchanged model, wherever it reads them; what it reconstructs is then put
into a second forward, at every hook that it reconstructs at once. For an autoencoder of one hook this is what
replacing its rows on the way would give, to the bit. An SAE of two models reads both on the same tokens; each
then runs with its own rows replaced, and has its own scores.

Zero is far from anything the model has seen, so the first looks good for any SAE: always read the raw
cross-entropies. KL is KL(clean || replaced) per counted prediction. All in nats.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sae_train import stop
from sae_train.errors import InputError
from sae_train.harvest.above import Above
from sae_train.harvest.capture import hooked
from sae_train.harvest.harvester import inputs
from sae_train.harvest.hooks import Site
from sae_train.harvest.kinds import is_causal_lm
from sae_train.harvest.windows import Windows

Replace = Callable[[Tensor], Tensor]
"""Rows [n, D] in the model's dtype -> what the model goes on with [n, D]."""

FORWARD_TOKENS = 1024
"""Tokens whose logits are held at once: 1,024 x 49,152 in float32 is 200 MB, and KL needs two of them."""

SOFTMAX_NUMBERS = {"cpu": 2**20}
"""Numbers whose log-softmax is taken at once, in float32: 4 MB stay in a processor's cache, which is four
times as fast as 50 MB that do not."""

SOFTMAX_NUMBERS_ELSEWHERE = 2**24
"""Enough to keep a device busy."""


@dataclass(frozen=True)
class SpliceResult:
    """Sums over the counted predictions of each window, in float64.

    Attributes:
        nll: [B] sum of next-token negative log-likelihoods.
        tokens: [B] int64, number of predictions.
        kl_sum: [B] sum of KL(clean || replaced), None if it was not asked for.
    """

    nll: Tensor
    tokens: Tensor
    kl_sum: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return int(self.tokens.sum())

    @property
    def ce(self) -> float:
        """Mean cross-entropy per prediction; NaN if there were none."""
        return float(self.nll.sum()) / self.num_tokens if self.num_tokens else math.nan

    @property
    def kl(self) -> float | None:
        """Mean KL per prediction; None if it was not asked for."""
        if self.kl_sum is None:
            return None
        return float(self.kl_sum.sum()) / self.num_tokens if self.num_tokens else math.nan


def cross_entropy(
    model: nn.Module,
    windows: Windows,
    mask: Tensor,
    replace: Mapping[Site, Replace] | None = None,
    kl: bool = False,
) -> SpliceResult:
    """Next-token cross-entropy of each window, with sites replaced at the positions of the mask.

    Args:
        model: a causal LM.
        windows: [B, T] tokens.
        mask: [B, T] bool, the ordinary positions.
        replace: what to do at which site; None leaves the model as it is.
        kl: also the KL from the unchanged model, which costs a second forward.

    Raises:
        InputError: the model is not a causal LM.
    """
    _check_causal(model)
    parts = []
    for part in _chunks(windows):
        stop.check()
        tokens, valid, chosen = windows.tokens[part], windows.valid[part], mask[part]
        clean = logits(model, tokens, valid, chosen) if kl else None
        changed = logits(model, tokens, valid, chosen, replace)
        parts.append(score(changed, tokens, valid, chosen, clean))
    return _together(parts)


@dataclass(frozen=True)
class Spliced:
    """What goes into the models in place of their rows.

    Attributes:
        inputs, outputs: what the SAE reads and what it reconstructs.
        reconstruct: rows of all inputs side by side [n, d_in] -> rows of all outputs [n, d_out], the SAE.
        means: [D] mean of ordinary rows of each output, for mean-ablation.
    """

    inputs: Sequence[Site]
    outputs: Sequence[Site]
    reconstruct: Replace
    means: Sequence[Tensor]

    @property
    def affected(self) -> list[bool]:
        """Which models change: of each `Site.other` once."""
        return list(dict.fromkeys(site.other for site in self.outputs))

    def ablation(self, name: str, of: bool) -> tuple[str, ...]:
        """What ablating the outputs in one model is known by."""
        return (name, *(site.key for site in self.outputs if site.other == of))

    def ways(self, made: Tensor) -> dict[str, dict[Site, Replace]]:
        """What to do at each output: put there what the SAE made [n, d_out], zeros, or the mean."""
        rows = made.split([len(mean) for mean in self.means], dim=-1)
        return {
            "sae": {site: _constant(new) for site, new in zip(self.outputs, rows, strict=True)},
            "zero": dict.fromkeys(self.outputs, torch.zeros_like),
            "mean": {site: _constant(mean) for site, mean in zip(self.outputs, self.means, strict=True)},
        }


def splice_reports(
    model: nn.Module,
    windows: Windows,
    mask: Tensor,
    saes: Sequence[Spliced],
    other: nn.Module | None = None,
    ablated: dict[tuple[str, ...], SpliceResult] | None = None,
) -> list[dict[str, float]]:
    """What replacing rows by their reconstruction costs, next to zero- and mean-ablation.

    The unchanged model runs once for all SAEs, and for each of them only the layers from its outputs upwards.

    Args:
        model: the model that sites without `other` are in.
        windows: [B, T] held-out tokens.
        mask: [B, T] bool, the ordinary positions.
        saes: each by itself; where several stand in one place, that is ablated once.
        other: the second model, which sites with `other` are in.
        ablated: what ablation gave for these windows, masks and means before, by name and sites; added to.

    Returns:
        Of each SAE: ce_clean, ce_sae, ce_zero, ce_mean, kl_sae (nats per prediction), recovered_zero,
        recovered_mean (1 = nothing lost, 0 = no better than the ablation; NaN where the ablation costs
        nothing, or helps), tokens (number of predictions). Of an SAE that reconstructs both models, the
        second's are under "other/". A model that predicts nothing, or of which nothing is reconstructed, has
        no scores.

    Raises:
        InputError: no model of those reconstructed is a causal LM, or no prediction can be counted.
    """
    home = next(model.parameters()).device  # of the SAE; a model on several has its hooks elsewhere too
    models = {False: model} if other is None else {False: model, True: other}
    causal = {of: is_causal_lm(one) for of, one in models.items()}
    for sae in saes:
        if not any(causal[of] for of in sae.affected):
            _check_causal(models[sae.affected[0]])
    scored = [[of for of in sae.affected if causal[of]] for sae in saes]
    affected = {of for of in models if any(of in own for own in scored)}
    above = {
        (of, sae.ablation("", of)): Above(models[of], [site for site in sae.outputs if site.other == of])
        for sae, own in zip(saes, scored, strict=True)
        for of in own
    }
    ablated = {} if ablated is None else ablated
    new: dict[tuple[str, ...], list[SpliceResult]] = {
        key: []
        for sae, own in zip(saes, scored, strict=True)
        for of in own
        for name in ("zero", "mean")
        if (key := sae.ablation(name, of)) not in ablated
    }
    whole: dict[bool, list[SpliceResult]] = defaultdict(list)
    parts: list[dict[bool, list[SpliceResult]]] = [defaultdict(list) for _ in saes]
    for number, part in enumerate(_chunks(windows, len(models))):  # whoever else is judged
        tokens, valid, chosen = windows.tokens[part], windows.valid[part], mask[part]
        read: dict[Site, Tensor] = {}
        clean: dict[bool, Tensor] = {}
        for of, one in models.items():
            stop.check()
            keep = {site: _keep(read, site) for sae in saes for site in sae.inputs if site.other == of}
            with ExitStack() as stack:
                for (where, _), upper in above.items():
                    if where == of:
                        stack.enter_context(upper.remembering())
                if of in affected:
                    clean[of] = logits(one, tokens, valid, chosen, keep)
                    whole[of].append(score(clean[of], tokens, valid, chosen))
                elif keep:
                    _forward(one, tokens, valid, chosen, keep)
        for sae, own, results in zip(saes, scored, parts, strict=True):
            made = sae.reconstruct(torch.cat([read[site].to(home) for site in sae.inputs], dim=-1))
            for name, ways in sae.ways(made).items():
                for of in own:
                    key = sae.ablation(name, of)
                    if name != "sae" and (key not in new or len(new[key]) > number):
                        continue  # known, or another SAE stands in the same place
                    stop.check()
                    way = {site: put for site, put in ways.items() if site.other == of}
                    with above[of, sae.ablation("", of)].alone():
                        result = score(  # no name for the logits: there is room for these and the clean ones
                            logits(models[of], tokens, valid, chosen, way),
                            tokens,
                            valid,
                            chosen,
                            clean[of] if name == "sae" else None,
                        )
                    (results[of] if name == "sae" else new[key]).append(result)
    ablated |= {key: _together(results) for key, results in new.items()}
    reports = []
    for sae, own, results in zip(saes, scored, parts, strict=True):
        report: dict[str, float] = {}
        for of in own:
            sums = {"clean": _together(whole[of]), "sae": _together(results[of])}
            sums |= {name: ablated[sae.ablation(name, of)] for name in ("zero", "mean")}
            prefix = "other/" if of and len(sae.affected) > 1 else ""
            report |= {prefix + key: value for key, value in _scores(sums).items()}
        reports.append(report)
    return reports


def _scores(sums: Mapping[str, SpliceResult]) -> dict[str, float]:
    """The numbers of one model, from what each way of running it gave."""
    if not sums["clean"].num_tokens:
        raise InputError("eval", "held-out windows", "at least one ordinary token with a token after it")
    report = {f"ce_{name}": result.ce for name, result in sums.items()}
    report["kl_sae"] = sums["sae"].kl or 0.0
    for name in ("zero", "mean"):
        lost = report[f"ce_{name}"] - report["ce_clean"]
        won = report[f"ce_{name}"] - report["ce_sae"]
        report[f"recovered_{name}"] = won / lost if lost > 0 else math.nan
    report["tokens"] = float(sums["clean"].num_tokens)
    return report


def _keep(read: dict[Site, Tensor], site: Site) -> Replace:
    """Leaves the rows as they are and remembers them."""

    def keep(rows: Tensor) -> Tensor:
        read[site] = rows
        return rows

    return keep


def _constant(new: Tensor) -> Replace:
    """Puts these rows, or this one row, in the place of any."""
    return lambda rows: new.to(rows).expand_as(rows)


def logits(
    model: nn.Module,
    tokens: Tensor,
    valid: Tensor,
    mask: Tensor,
    replace: Mapping[Site, Replace] | None = None,
) -> Tensor:
    """[B, T, vocabulary] in the model's dtype, with sites replaced where mask [B, T] is True."""
    return _forward(model, tokens, valid, mask, replace).logits


def _forward(
    model: nn.Module,
    tokens: Tensor,
    valid: Tensor,
    mask: Tensor,
    replace: Mapping[Site, Replace] | None,
) -> Any:
    """What the model gives, with sites replaced where the mask is True."""

    def visit(x: Tensor, way: Replace) -> Tensor:
        here = mask.to(x.device)
        changed = x.clone()
        changed[here] = way(x[here]).to(x.dtype)
        return changed

    visits = {site: lambda x, way=way: visit(x, way) for site, way in (replace or {}).items()}
    with torch.no_grad(), hooked(model, visits):
        return model(**inputs(model, tokens, valid))


def score(
    logits: Tensor, tokens: Tensor, valid: Tensor, mask: Tensor, clean: Tensor | None = None
) -> SpliceResult:
    """Sums over the predictions that count, from logits [B, T, V]; with `clean` also the KL from those."""
    device = logits.device
    chosen = counted(mask, valid).to(device)
    window, position = chosen.nonzero(as_tuple=True)
    target = tokens.to(device)[window, position + 1]
    # By position first: adding at indices would sum in any order on a GPU, and last bits would differ.
    nll = torch.zeros(tokens.shape, dtype=torch.float64, device=device)
    kl_sum = torch.zeros_like(nll)
    at_once = max(1, SOFTMAX_NUMBERS.get(device.type, SOFTMAX_NUMBERS_ELSEWHERE) // logits.shape[-1])
    for start in range(0, len(window), at_once):
        part = slice(start, start + at_once)
        rows, columns = window[part], position[part]
        p = logits[rows, columns].float()
        log_z = p.logsumexp(dim=-1)
        nll[rows, columns] = (log_z - p.gather(1, target[part, None]).squeeze(1)).double()
        if clean is not None:
            q = clean[rows, columns].float()
            log_p, log_q = p - log_z[:, None], q - q.logsumexp(dim=-1, keepdim=True)
            kl_sum[rows, columns] = (log_q.exp() * (log_q - log_p)).sum(dim=-1).double()
    return SpliceResult(nll.sum(dim=1), chosen.sum(dim=1), None if clean is None else kl_sum.sum(dim=1))


def counted(mask: Tensor, valid: Tensor) -> Tensor:
    """[B, T] bool on the CPU: positions whose prediction counts, from mask and valid [B, T]."""
    mask, valid = mask.cpu(), valid.cpu()
    out = torch.zeros_like(mask)
    out[:, :-1] = mask[:, :-1] & valid[:, :-1] & valid[:, 1:]
    return out


def _chunks(windows: Windows, num_models: int = 1) -> list[slice]:
    """Parts of the windows whose clean logits, of that many models, are held at once."""
    num_windows, length = windows.tokens.shape
    step = max(1, FORWARD_TOKENS // (length * num_models))
    return [slice(start, start + step) for start in range(0, num_windows, step)]


def _together(parts: Sequence[SpliceResult]) -> SpliceResult:
    kl = [part.kl_sum for part in parts if part.kl_sum is not None]
    return SpliceResult(
        nll=torch.cat([part.nll for part in parts]),
        tokens=torch.cat([part.tokens for part in parts]),
        kl_sum=torch.cat(kl) if kl else None,
    )


def _check_causal(model: nn.Module) -> None:
    if not is_causal_lm(model):
        raise InputError(
            "model.name", type(model).__name__, "a causal LM: cross-entropy needs next-token predictions"
        )
