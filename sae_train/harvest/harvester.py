"""The harvester: token windows in, rows of every hook out, by one forward pass that stops after the last
hook.

A pass is one micro-batch of windows. How many windows that is changes bits (matrix products are cut
differently), so the number is chosen once, kept in `Harvester.micro_batch`, recorded and restored. Rows
are copied out inside the hook, before the model can change the tensor in place.

With two models (`Site.other`) a pass runs both, one after the other, on the same windows: nobody downstream
needs to know, and a model's rows are the bits that it gives when it is harvested alone.
"""

import inspect
import logging
import os
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sae_train import stop
from sae_train.errors import InputError
from sae_train.harvest.capture import hooked
from sae_train.harvest.hooks import Site
from sae_train.harvest.kinds import skeleton
from sae_train.harvest.load_errors import redact
from sae_train.harvest.windows import Windows

LOG = logging.getLogger("sae_train.harvest")

CPU_TOKENS = 2048
"""Tokens per forward on a CPU. It hardly matters: SmolLM2-135M to layer 12 in float32 ran 900, 940, 917 and
856 tokens per CPU second with 512, 1,024, 2,048 and 4,096 (one thread, Xeon at 2.5 GHz with AVX-512)."""

CUDA_TOKENS = 32768
"""At most this many tokens per forward on a GPU: matrix products are large enough, more only takes memory."""

CHECK_TOKENS = 8


class _LastHook(Exception):
    """Raised by the hook that completes a pass, so that nothing above it is computed."""


class Harvester:
    """Runs a model, or two on the same tokens, up to their hooks.

    Args:
        model: in evaluation mode, on its device or devices (`model.device_map`).
        sites: the hooks, each key once.
        micro_batch: windows per forward; None chooses, for windows of `context_length` tokens.
        other: the second model, which sites with `other` are in, on the same device.

    Attributes:
        micro_batch: the number in use.
        dims: site key -> D.
        model_lock: held during a forward. Hooks belong to the model, not to a thread: whoever else runs the
            model holds this meanwhile.

    Raises:
        InputError: a hook is given twice, is never or repeatedly called in a pass, or is not [B, T, D].
    """

    def __init__(
        self,
        model: nn.Module,
        sites: list[Site],
        micro_batch: int | None = None,
        *,
        context_length: int = 256,
        other: nn.Module | None = None,
    ) -> None:
        assert sites, "no hooks"
        assert other is not None or not any(site.other for site in sites), "no second model"
        keys = [site.key for site in sites]
        for site in sites:
            if keys.count(site.key) > 1:
                raise InputError("hook", site.name, f"each place once; {site.key!r} is there twice")
        both = ((model, False),) if other is None else ((model, False), (other, True))
        parts = [(of, [site for site in sites if site.other == second]) for of, second in both]
        self.parts = [(of, inside) for of, inside in parts if inside]
        self.sites = sites
        self.device = next(model.parameters()).device
        dims = {key: width for of, inside in self.parts for key, width in check_sites(of, inside).items()}
        self.dims: Mapping[str, int] = {key: dims[key] for key in keys}
        self.model_lock = threading.Lock()
        self.micro_batch = micro_batch if micro_batch is not None else self._size(context_length)

    def rows(self, windows: Windows, out: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The rows of every hook at every position, padding included.

        Args:
            windows: [B, T] tokens; any device.
            out: key -> [B, T, D] tensors to write into; None makes them, in the dtype of the hook.

        Returns:
            key -> [B, T, D] on the model's device, the first if there are several.

        Raises:
            InputError: the device ran out of memory (`model.micro_batch`), or a hook is not [B, T, D].
            Interrupted: the process is asked to stop.
        """
        num_windows = len(windows.tokens)
        rows = {} if out is None else out
        for start in range(0, num_windows, self.micro_batch):
            stop.check()
            part = slice(start, min(start + self.micro_batch, num_windows))
            try:
                self._forward(windows.tokens[part], windows.valid[part], part, num_windows, rows)
            except torch.OutOfMemoryError:
                held = f"fewer windows per forward: {self.device} ran out of memory"
                raise InputError("model.micro_batch", self.micro_batch, held) from None
        return rows

    def _forward(
        self, tokens: Tensor, valid: Tensor, part: slice, num_windows: int, rows: dict[str, Tensor]
    ) -> None:
        with self.model_lock:
            for model, sites in self.parts:
                self._run(model, sites, tokens, valid, part, num_windows, rows)

    def _run(
        self,
        model: nn.Module,
        sites: list[Site],
        tokens: Tensor,
        valid: Tensor,
        part: slice,
        num_windows: int,
        rows: dict[str, Tensor],
    ) -> None:
        batch, length = tokens.shape
        waiting = {site.key for site in sites}

        def take(site: Site, x: Tensor) -> None:
            if site.key not in waiting:
                raise InputError(
                    "hook", site.name, f"a module that runs once per pass; {site.path!r} runs again"
                )
            if x.shape != (batch, length, self.dims[site.key]):
                raise _misshapen(site, x)
            if site.key not in rows:
                shape = (num_windows, *x.shape[1:])
                rows[site.key] = torch.empty(shape, dtype=x.dtype, device=self.device)
            rows[site.key][part].copy_(x)
            waiting.discard(site.key)
            if not waiting:
                raise _LastHook

        visits = {site: lambda x, site=site: take(site, x) for site in sites}
        with torch.no_grad(), hooked(model, visits):
            try:
                model(**inputs(model, tokens, valid))
            except _LastHook:
                return
        raise AssertionError(f"hooks {sorted(waiting)} did not run, although they did when they were checked")

    def _size(self, context_length: int) -> int:
        """How many windows a forward takes."""
        if self.device.type != "cuda":
            chosen = max(1, CPU_TOKENS // context_length)
        else:
            chosen = self.probe(context_length, limit=max(1, CUDA_TOKENS // context_length))
        LOG.info("micro-batch: %d windows of %d tokens per forward", chosen, context_length)
        return chosen

    def probe(self, context_length: int, limit: int) -> int:
        """The micro-batch: doubled until `limit`, or until memory runs out and then half of what fitted.

        The half is left for the SAE, which shares the device.

        Raises:
            InputError: one window alone does not fit.
        """
        fits = 0
        while fits < limit:
            tried = min(max(1, 2 * fits), limit)
            tokens = torch.zeros(tried, context_length, dtype=torch.int64)
            try:
                self._forward(tokens, torch.ones_like(tokens, dtype=torch.bool), slice(0, tried), tried, {})
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                if fits == 0:
                    short = f"a shorter context: one window does not fit the memory of {self.device}"
                    raise InputError("corpus.context_length", context_length, short) from None
                return max(1, fits // 2)
            fits = tried
        return fits


def inputs(model: nn.Module, tokens: Tensor, valid: Tensor) -> dict[str, Any]:
    """Arguments of a forward: the mask only where there is padding, and no key-value cache."""
    device = next(model.parameters()).device
    arguments: dict[str, Any] = {"input_ids": tokens.to(device, non_blocking=True)}
    if not bool(valid.all()):
        arguments["attention_mask"] = valid.to(device, torch.int64)
    if "use_cache" in inspect.signature(model.forward).parameters:
        arguments["use_cache"] = False
    return arguments


class NeedsWeights(InputError):
    """A model whose forward looks at values: what it gives can be seen once its weights are there."""


def check_sites(model: nn.Module, sites: list[Site]) -> dict[str, int]:
    """Key -> D of each site, by one forward of 8 tokens: also on a model without weights (`skeleton`).

    Raises:
        InputError: a hook's module is not called, is called more than once, has no tensor, or not one of [B,
        T, D].
        NeedsWeights: the model has none, and cannot do without.
    """
    seen: dict[Site, list[Tensor]] = {site: [] for site in sites}
    bare = any(weight.is_meta for weight in model.parameters())  # XLNet makes one of its weights all the same
    device = torch.device("meta") if bare else next(model.parameters()).device
    # A second window costs nothing without weights, and tells rows from tables of positions.
    shape = (2 if device.type == "meta" else 1, CHECK_TOKENS)
    arguments: dict[str, Any] = {"input_ids": torch.zeros(shape, dtype=torch.int64, device=device)}
    if "use_cache" in inspect.signature(model.forward).parameters:
        arguments["use_cache"] = False
    visits = {site: lambda x, site=site: seen[site].append(x) for site in sites}
    with torch.no_grad(), hooked(model, visits):
        if device.type == "meta":
            _on_shapes(model, arguments, seen)
        else:
            _on_weights(model, arguments)
    for site, tensors in seen.items():
        if len(tensors) != 1:
            times = "never runs" if not tensors else f"runs {len(tensors)} times"
            raise InputError("hook", site.name, f"a module that runs once per pass; {site.path!r} {times}")
        if tensors[0].ndim != 3 or tensors[0].shape[:2] != shape:
            raise _misshapen(site, tensors[0])
    return {site.key: tensors[0].shape[2] for site, tensors in seen.items()}


def _on_weights(model: nn.Module, arguments: dict[str, Any]) -> None:
    try:
        model(**arguments)
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a stranger's code; the dtype is the one thing about it that was chosen here
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        says = redact(str(error), os.environ)
        wanted = f"one in which this model runs (float32, bfloat16 or float16); it says: {says}"
        raise InputError("model.dtype", dtype, wanted) from error


def _on_shapes(model: nn.Module, arguments: dict[str, Any], seen: dict[Site, list[Tensor]]) -> None:
    """A forward without weights. Most models make their mask from values, which a meta tensor has not, but
    take one ready-made; Bloom and Mamba take none, DeBERTa one of tokens."""
    windows, length = arguments["input_ids"].shape
    ready_made = torch.zeros(windows, 1, length, length, device="meta")
    of_tokens = torch.ones(windows, length, dtype=torch.int64, device="meta")
    reasons = []
    for mask in ({"attention_mask": ready_made}, {}, {"attention_mask": of_tokens}):
        for tensors in seen.values():
            tensors.clear()  # of an attempt that came so far
        try:
            model(**arguments, **mask)
            return
        except InputError:
            raise
        except Exception as error:  # a stranger's code on tensors that it was not written for
            reasons.append(redact(str(error), os.environ))
    name = getattr(model.config, "name_or_path", "") or type(model).__name__
    raise NeedsWeights("model.name", name, f"a model that runs without its weights; it says: {reasons[0]}")


def dims_from_config(sites: list[Site], hf_config: Any) -> dict[str, int]:
    """Key -> D without weights: everything that `check_sites` finds, before anything is downloaded."""
    return check_sites(skeleton(hf_config), sites)


def _misshapen(site: Site, x: Tensor) -> InputError:
    shape = "x".join(str(n) for n in x.shape)
    return InputError(
        "hook", site.name, f"activations [windows, positions, width]; {site.path!r} has {shape}"
    )
