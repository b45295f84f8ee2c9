"""The frozen language model: which one, in what precision, where, and proof of which one it was.

What can be known from the configuration alone (`load_config`, `check_context`, `kinds.skeleton`) is checked
before any weights are read. Loading never runs code that came with a model unless the user asked for it
by `model.trust_remote_code=true`, nor code from a repository that the model's configuration names. It
unpickles nothing: weights are safetensors or GGUF. And it never leaves a model with weights made up for
those it did not find.
"""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sae_train.devices import native_bfloat16, pick_device
from sae_train.errors import InputError
from sae_train.files import is_name
from sae_train.harvest.kinds import auto_class, is_causal_lm
from sae_train.harvest.load_errors import input_errors
from sae_train.harvest.provenance import local_revision, tokenizer_digest

LOG = logging.getLogger("sae_train.harvest")

MAX_LAYERS = 4096
"""Each is built without memory before weights are read, in about a millisecond; 200 is deep."""
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""That accelerate makes out of the sizes of layers and the memory of devices."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class ModelConfig:
    """Which language model the rows come from, and how it is run."""

    name: str = "???"
    """Hub id or folder of the model."""
    revision: str | None = None
    """Branch, tag or commit on the hub; it is resolved to a commit and recorded."""
    tokenizer: str | None = None
    """Hub id or folder of the tokenizer; null = the model's own."""
    other: str | None = None
    """Hub id or folder of a second model, read on the same tokens at hooks that end in @other, to compare the
    two: hook=resid_post.12+resid_post.12@other with sae.kind=crosscoder."""
    other_revision: str | None = None
    """Branch, tag or commit of the second model on the hub; resolved and recorded as revision is."""
    gguf_file: str | None = None
    """Name of a GGUF file in the folder or repository; its weights are expanded to `dtype`."""
    dtype: str = "auto"
    """auto, float32, bfloat16 or float16. auto = bfloat16 where the hardware computes in it, else float32."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N. auto = cuda if there is one."""
    device_map: str | None = None
    """For a model too big for one device: balanced, balanced_low_0 (little on the first, where the SAEs are),
    auto or sequential lay its layers over all devices of the machine, one process for all of them."""
    attn_implementation: str | None = None
    """sdpa, eager, flash_attention_2 ...; null = the choice of transformers. Recorded: it changes bits."""
    micro_batch: int | None = None
    """Windows per forward pass; null = sized automatically, once. Recorded: it changes bits."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Taken from this setting only, never from a model's files."""

    def __post_init__(self) -> None:
        if self.name.startswith("~"):
            self.name = str(Path(self.name).expanduser())
        if self.other is not None and self.other.startswith("~"):
            self.other = str(Path(self.other).expanduser())
        if self.other_revision is not None and self.other is None:
            raise InputError("model.other_revision", self.other_revision, "null, or model.other with it")
        if self.device_map not in (None, *DEVICE_MAPS):
            raise InputError("model.device_map", self.device_map, f"one of {', '.join(DEVICE_MAPS)}, or null")
        if self.dtype not in ("auto", *DTYPES):
            raise InputError("model.dtype", self.dtype, f"one of auto, {', '.join(DTYPES)}")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise InputError("model.micro_batch", self.micro_batch, "null or at least 1")


@dataclass(frozen=True)
class ModelInfo:
    """What was loaded: enough to load it again, and to notice that it is no longer the same."""

    name: str
    revision: str
    """Commit on the hub, or a digest of a folder's configuration and weight files."""
    dtype: str
    device: str
    attn_implementation: str
    causal_lm: bool
    fingerprint: dict[str, str]
    """What the rows are a function of on the model's side: revision, tokenizer, dtype and attention."""


def load_config(config: ModelConfig) -> Any:
    """The Hugging Face configuration of the model, without its weights.

    Raises:
        InputError: not a folder, no config.json in it, not on the hub, offline, no access, an unknown kind of
        model, one that names code to be downloaded, more than 4096 layers.
    """
    from transformers import AutoConfig, PreTrainedConfig

    _check_folder(config)
    with input_errors("model.name", config.name):
        # As plain data first: some configurations grow lists as long as a number in them says.
        where = {key: value for key, value in _where(config).items() if key != "trust_remote_code"}
        raw, _ = PreTrainedConfig.get_config_dict(config.name, **where)
        _check_claims(config, raw)
        _check_index(Path(config.name))
        return AutoConfig.from_pretrained(config.name, **_where(config))


def load_tokenizer(config: ModelConfig) -> Any:
    """The tokenizer of the model, or `model.tokenizer`. Raises InputError as `load_config` does."""
    from transformers import AutoTokenizer

    if config.tokenizer is not None:
        with input_errors("model.tokenizer", config.tokenizer):
            return AutoTokenizer.from_pretrained(config.tokenizer, trust_remote_code=config.trust_remote_code)
    _check_folder(config)
    with input_errors("model.tokenizer", config.name):
        return AutoTokenizer.from_pretrained(config.name, **_where(config))


def load_model(config: ModelConfig, tokenizer: Any = None) -> tuple[nn.Module, ModelInfo]:
    """The model in evaluation mode without gradients, on its device, and what it is.

    Args:
        config: which model.
        tokenizer: as `load_tokenizer` gives it, for the fingerprint; None loads it once more.

    Raises:
        InputError: the device or dtype is not there, the model cannot be found or read, or its weights are
        incomplete.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # of reading weights; downloads keep theirs
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    hf_config = load_config(config)
    digest = tokenizer_digest(load_tokenizer(config) if tokenizer is None else tokenizer)
    where = _where(config)
    if Path(config.name).is_dir():
        revision = local_revision(config.name, config.gguf_file)
    else:
        revision = where["revision"] = _commit(
            config, hf_config
        )  # a branch may move before the weights are read
    with input_errors("model.name", config.name):
        model, report = auto_class(hf_config).from_pretrained(
            config.name,
            dtype=dtype,
            attn_implementation=config.attn_implementation,
            device_map=config.device_map,
            use_safetensors=True,  # else a file of pickled weights is taken where there is no other
            output_loading_info=True,
            **where,
        )
        _check_complete(config.name, report)
        if config.device_map is None:
            model = model.to(device)
        else:
            # Without that attribute transformers has found one device to be enough.
            check_placed(config.device_map, getattr(model, "hf_device_map", {"": model.device}), device)
    if config.gguf_file is not None:
        _forget_quantisation(model)
    model.eval().requires_grad_(False)
    attention = str(model.config._attn_implementation)
    info = ModelInfo(
        name=config.name,
        revision=revision,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        attn_implementation=attention,
        causal_lm=is_causal_lm(model),
        fingerprint={
            "model": config.name,
            "model_revision": revision,
            "tokenizer": digest,
            "dtype": str(dtype).removeprefix("torch."),
            "attn_implementation": attention,
        },
    )
    return model, info


def check_context(hf_config: Any, context_length: int) -> None:
    """Raises InputError if a window is longer than the positions the model was made for."""
    text = hf_config.get_text_config()
    names = ("max_position_embeddings", "max_seq_len", "n_positions")
    limits = [getattr(text, name, None) for name in names]
    limit = next((number for number in limits if isinstance(number, int) and number > 0), None)
    if limit is not None and text.model_type in ("roberta", "xlm-roberta", "camembert"):
        limit -= text.pad_token_id + 1  # their positions start after the padding's
    if limit is not None and context_length > limit:
        raise InputError(
            "corpus.context_length", context_length, f"at most {limit}, the positions of this model"
        )


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that a name means on a device: auto is bfloat16 where it is computed natively.

    Emulated, it is no bargain: SmolLM2-135M ran 255 tokens per CPU second in bfloat16 and 917 in float32
    (Xeon with AVX-512 but without its bfloat16).
    """
    native = native_bfloat16(device)
    if name == "auto":
        return torch.bfloat16 if native else torch.float32
    if name == "bfloat16" and not native:
        LOG.warning(
            "model.dtype=bfloat16: %s has no native bfloat16; float32 is several times faster", device
        )
    return DTYPES[name]


def _where(config: ModelConfig) -> dict[str, Any]:
    where: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if config.revision is not None:
        where["revision"] = config.revision
    if config.gguf_file is not None:
        where["gguf_file"] = config.gguf_file
    return where


def _check_claims(config: ModelConfig, claims: Any) -> None:
    """Refuse what a model's configuration must not decide: code from elsewhere, and unbounded work."""
    for key, value in claims.items() if isinstance(claims, dict) else ():
        if isinstance(value, dict):
            _check_claims(config, value)
        elif key.strip("_").startswith(("attn_impl", "experts_impl")) and "/" in str(value):
            # transformers would download a repository of that name and run what is in it.
            known = f"the name of a built-in one: {config.name} asks for code from elsewhere, {value}"
            raise InputError("model.attn_implementation", config.attn_implementation, known)
        elif re.search(r"layers?$", key) and isinstance(value, int) and value > MAX_LAYERS:
            raise InputError("model.name", config.name, f"at most {MAX_LAYERS} layers, it has {key}={value}")


def _check_index(folder: Path) -> None:
    """See that the weights of a local folder are in it: an index of them may name any path."""
    for path in folder.glob("*.index.json"):
        for name in json.loads(path.read_bytes())["weight_map"].values():
            if not is_name(name):
                raise InputError(
                    "model.name", str(folder), f"an index that names files beside it, not {name!r:.80}"
                )


def _commit(config: ModelConfig, hf_config: Any) -> str:
    """The commit that a hub revision means now, or meant when it was cached."""
    from huggingface_hub import hf_hub_download

    commit = getattr(hf_config, "_commit_hash", None)
    if commit is None:  # transformers does not note it for GGUF; the cache's path has it
        with input_errors("model.revision", str(config.revision)):
            file = hf_hub_download(config.name, config.gguf_file or "config.json", revision=config.revision)
        parts = Path(file).parts
        commit = parts[parts.index("snapshots") + 1]
    return commit


def _check_folder(config: ModelConfig) -> None:
    """A name that can only be a folder must be one, with what transformers needs in it."""
    path = Path(config.name)
    if not path.exists():
        if config.name.startswith((".", "/")) or config.name.count("/") > 1:
            raise InputError("model.name", config.name, "a folder that exists, or a hub id")
        return
    needed = config.gguf_file or "config.json"
    if not (path / needed).is_file():
        raise InputError("model.name", config.name, f"a folder with {needed} in it")


def check_placed(device_map: str, placed: Mapping[str, Any], device: torch.device) -> None:
    """Raises InputError if some of a model is to be fetched from memory or disk for every forward.

    Args:
        placed: module -> where it lies, as accelerate has decided.
        device: of the SAEs.
    """
    kinds = {name: "cuda" if isinstance(w, int) else str(w).split(":")[0] for name, w in placed.items()}
    elsewhere = [name for name, kind in kinds.items() if kind != device.type]
    if elsewhere:
        held = f"devices that hold all of the model; {len(elsewhere)} of its {len(placed)} parts do not fit"
        raise InputError("model.device_map", device_map, f"{held}, from {elsewhere[0] or 'its first'} on")


def _check_complete(name: str, report: dict[str, Any]) -> None:
    """Transformers fills in random numbers for what it does not find; an SAE must not be trained on those.

    A pooler above the encoder is no part of the residual stream and often absent.
    """
    lost = [key for key in report["missing_keys"] if "pooler" not in key.split(".")]
    lost += [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]
    if lost:
        lost = sorted(lost)
        raise InputError(
            "model.name", name, f"a complete model; {len(lost)} tensors are missing or misshapen: {lost[0]}"
        )


def _forget_quantisation(model: Any) -> None:
    """GGUF weights are plain tensors once loaded; the marks left over would stop it from being saved."""
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
