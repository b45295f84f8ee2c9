"""The second model of a run: read at the same places, on the same tokens, to learn what the two share.

`model.other` names it, and a hook with "@other" after it is one of its places. It is loaded as the first is:
dtype, device, attention and `trust_remote_code` are the run's. One tokenizer makes the windows of both, so
their tokenizers must give the same ids; where they differ in a few tokens that the text does not have (a chat
model's marks, say), naming one as `model.tokenizer` says that it is meant for both.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from sae_train.errors import InputError
from sae_train.harvest.model import ModelConfig

FIELDS = {
    "model.name": "model.other",
    "model.revision": "model.other_revision",
    "model.tokenizer": "model.other",
}
"""What a user calls what is wrong, where it is wrong of the second model; a tokenizer is the model's own."""

SAMPLE = (
    "The quick brown fox doesn't jump over 12 lazy dogs; it's 3.14159 metres, or 1,000,000 mm.\n\n"
    "  def f(x_1, *args):\n\t\treturn {'key': x_1 ** 2}  # 0xFF\r\n"
    "Grüße aus Köln, naïve café — “quoted” … ﬁne Ⅷ ½ "
    "\u00e9 e\u0301\u00a0\u200b Москва 東京都 한국어 العربية हिन्दी 🙂👍🏽"
)
"""Text on which tokenizers with one vocabulary still differ: case, digits, white space, accents, scripts."""

SAMPLED_TOKENS = 2000


def second(config: ModelConfig) -> ModelConfig:
    """The configuration of the second model alone: its own name and revision, and no GGUF file."""
    assert config.other is not None
    own: dict[str, Any] = {"name": config.other, "revision": config.other_revision, "gguf_file": None}
    return replace(config, **own, other=None, other_revision=None)


@contextmanager
def of_second() -> Iterator[None]:
    """While open, what is wrong with a model is said of the second."""
    try:
        yield
    except InputError as error:
        accepted = error.accepted.replace("this model", "model.other")
        raise type(error)(FIELDS.get(error.field, error.field), error.value, accepted) from None


def check_tokenizers(name: str, mine: Any, other: Any) -> None:
    """Compare the tokenizers of two models: every token's id, and the ids of a sample of text.

    Args:
        name: of the second model.
        mine, other: as `load_tokenizer` gives them.

    Raises:
        InputError: they give other ids.
    """
    wanted = "a model whose tokenizer gives the ids of model.name's"
    way_out = "(model.tokenizer=... names one for both)"
    ours, theirs = mine.get_vocab(), other.get_vocab()
    differ = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    if differ:
        ids = f"{ours.get(differ[0], 'none')} there, {theirs.get(differ[0], 'none')} here"
        found = f"{len(differ)} tokens have other ids, such as {differ[0]!r:.40}: {ids}"
        raise InputError("model.other", name, f"{wanted}; {found} {way_out}")
    tokens = sorted(ours, key=ours.__getitem__)
    for text in (SAMPLE, " ".join(tokens[:: max(1, len(tokens) // SAMPLED_TOKENS)])):
        one, two = (
            tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            for tokenizer in (mine, other)
        )
        if one != two:
            found = "the vocabularies agree, but not how text is cut into tokens"
            raise InputError("model.other", name, f"{wanted}; {found} {way_out}")


def check_embeddings(name: str, tokenizer: Any, vocab_size: int) -> None:
    """Raises InputError if the tokenizer can produce an id that the second model has no embedding for."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        has = f"it has {vocab_size}, and the largest id is {largest}"
        raise InputError("model.other", name, f"a model with an embedding for every token; {has}")
