"""What kind of model a Hugging Face configuration describes, and its modules without weights."""

import copy
from typing import Any

import torch
from torch import nn

from sae_train.errors import InputError
from sae_train.harvest.load_errors import input_errors


def auto_class(hf_config: Any) -> Any:
    """AutoModelForCausalLM where the configuration says causal LM, else AutoModel (encoders).

    A configuration that names no class (GGUF) is a causal LM if its type has one and has no masked one.
    """
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    if getattr(hf_config, "is_encoder_decoder", False):
        raise InputError(
            "model.name", hf_config.model_type, "a causal language model or an encoder, not both in one"
        )
    classes = getattr(hf_config, "architectures", None) or []
    causal_types = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    remote = "AutoModelForCausalLM" in (getattr(hf_config, "auto_map", None) or {})
    if classes:
        causal = any(
            name in causal_types.values() or (remote and name.endswith("ForCausalLM")) for name in classes
        )
    else:
        causal = (
            hf_config.model_type in causal_types
            and hf_config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        )
    return AutoModelForCausalLM if causal else AutoModel


def is_causal_lm(model: nn.Module) -> bool:
    """Whether the model predicts next tokens: it has a language-model head and does not look ahead."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    name = type(model).__name__
    hf_config: Any = model.config
    both_ways = hf_config.model_type in (*MODEL_FOR_MASKED_LM_MAPPING_NAMES, "bert-generation")
    if hf_config.model_type == "xlnet" or (both_ways and not getattr(hf_config, "is_decoder", False)):
        return False
    return name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or name.endswith("ForCausalLM")


def skeleton(hf_config: Any) -> nn.Module:
    """The model's modules with shapes but no weights (meta device): under a second, whatever its size.

    A model's own code is run only if its configuration was already loaded by that code, which takes
    `model.trust_remote_code`. Raises InputError if transformers cannot build this configuration.
    """
    trusted = type(hf_config).__module__.startswith("transformers_modules")
    name = getattr(hf_config, "name_or_path", "") or hf_config.model_type
    # Of transformers' ways to run experts this one alone needs no values and takes every dtype.
    own, experts = copy.deepcopy(hf_config), {"experts_implementation": "batched_mm"}
    with input_errors("model.name", name), torch.device("meta"):
        return auto_class(own).from_config(own, trust_remote_code=trusted, **experts).eval()
