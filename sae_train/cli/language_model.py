"""The language model of a run, checked against the configuration before and after its weights are read."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sae_train.errors import InputError
from sae_train.harvest.corpus import CorpusConfig
from sae_train.harvest.harvester import NeedsWeights, check_sites, dims_from_config
from sae_train.harvest.hooks import Site, is_other, resolve
from sae_train.harvest.kinds import skeleton
from sae_train.harvest.model import ModelConfig, check_context, load_config, load_model, load_tokenizer
from sae_train.harvest.second import check_embeddings, check_tokenizers, of_second, second
from sae_train.harvest.windows import check_vocabulary, special_ids

logger = logging.getLogger("sae_train.harvest")

CheckWidths = Callable[[Mapping[str, int]], None]
"""Told the width of every hook, as the user spelt it, as soon as it is known; raises what does not fit."""


@dataclass
class LanguageModel:
    """A model that has been checked against the configuration, before and after its weights were read."""

    model: nn.Module
    tokenizer: Any
    special: Tensor
    sites: list[Site]
    fingerprint: dict[str, str]
    description: dict[str, Any]
    other: nn.Module | None = None
    """The second model, where there are hooks in it."""


def load_language_model(
    config: ModelConfig,
    corpus: CorpusConfig,
    hooks: list[str],
    check_widths: CheckWidths,
    before_weights: Callable[[Any], None],
) -> LanguageModel:
    """Check what can be checked cheaply, run `before_weights(tokenizer)` (it opens the corpus), then load.

    Raises:
        InputError: anything about model, hooks or tokenizer that cannot work.
    """
    if config.name in ("none", "???"):
        raise InputError("model.name", config.name, "a Hugging Face model: model.name=HUB_ID or a folder")
    hf_config = load_config(config)
    bare = {False: skeleton(hf_config)}
    other = second(config) if any(map(is_other, hooks)) else None
    if other is not None:
        with of_second():
            hf_other = load_config(other)
            bare[True] = skeleton(hf_other)
    sites = [resolve(hook, bare[is_other(hook)]) for hook in hooks]
    for i, site in enumerate(sites):
        if site.key in [earlier.key for earlier in sites[:i]]:
            raise InputError("hook", site.name, f"each place once; it is {site.key}, which is there already")
    check_context(hf_config, corpus.context_length)
    unchecked = False
    try:
        widths = dims_from_config([site for site in sites if not site.other], hf_config)
        if other is not None:
            with of_second():
                check_context(hf_other, corpus.context_length)
                widths |= dims_from_config([site for site in sites if site.other], hf_other)
    except NeedsWeights as error:
        logger.info("widths of hooks are checked when the weights are there, not before: %s", error)
        unchecked = True
    else:
        check_widths({site.name: widths[site.key] for site in sites})
    tokenizer = load_tokenizer(config)
    check_vocabulary(tokenizer, hf_config.get_text_config().vocab_size)
    if other is not None:
        check_embeddings(other.name, tokenizer, hf_other.get_text_config().vocab_size)
        with of_second():
            check_tokenizers(other.name, tokenizer, load_tokenizer(other))
    before_weights(tokenizer)
    model, info = load_model(config, tokenizer)
    description = {
        "model": info.name,
        "model_revision": info.revision,
        "dtype": info.dtype,
        "hooks": {
            site.key: {"module": site.path, "side": site.side, "transformer_lens": site.tl_name}
            for site in sites
        },
        "context_length": corpus.context_length,
    }
    lm = LanguageModel(model, tokenizer, special_ids(tokenizer), sites, dict(info.fingerprint), description)
    if other is not None:
        with of_second():
            lm.other, info = load_model(other, tokenizer)
        lm.description |= {"other_model": info.name, "other_model_revision": info.revision}
        decisive = ("model", "model_revision", "attn_implementation")
        lm.fingerprint |= {f"other_{key}": info.fingerprint[key] for key in decisive}
    if unchecked:
        widths = check_sites(model, [site for site in sites if not site.other])
        if lm.other is not None:
            with of_second():
                widths |= check_sites(lm.other, [site for site in sites if site.other])
        check_widths({site.name: widths[site.key] for site in sites})
    return lm
