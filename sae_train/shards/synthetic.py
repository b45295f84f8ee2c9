"""Synthetic activations with a known dictionary, so that recovery of the true features can be scored.

    x = bias + sum_i on_i * amplitude_i * feature_i + noise

The true features are unit vectors kept apart by at most `max_cosine`. They fire rarely and
unequally (Zipf-Mandelbrot), in groups whose members fire together, with log-normal amplitudes of mean
1: the properties of real activations that make recovery hard. With the defaults frequencies go from
0.005 to 0.064 and the mean number of active features is 4; the rarest third are the last to be found.

Rows, dictionary and true codes are pure functions of the configuration, so nothing is stored with the
rows: `SyntheticRows.truth` makes the answer for any of them again.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sae_train.batch import RawRows
from sae_train.codes import Codes
from sae_train.errors import InputError
from sae_train.seeds import stable_seed
from sae_train.shards.shard import ShardStream, even_lanes

HOOK = "synthetic"
HELDOUT = 2**40
"""Index of the first held-out shard: further than any training run gets."""
BLOCK = 8192
"""Rows made at a time: bounds the [rows, features] temporaries. Part of the rows' definition."""


@dataclass
class SyntheticConfig:
    """A dictionary of true features and how they fire. Defaults: d 64, 256 features, L0 4."""

    d: int = 64
    """Width of the activations."""
    features: int = 256
    """True features."""
    groups: int = 32
    """Groups of features that fire together; features beyond groups * group_size fire alone."""
    group_size: int = 8
    """Features per group, of all frequencies."""
    cofire: float = 0.5
    """Probability that the commonest member of a group fires when the group is on. The smaller, the
    closer to independent firing."""
    l0: float = 4.0
    """Mean number of active features per row."""
    zipf: float = 1.3
    """Exponent a of the frequencies p_i ~ (i + b)^-a, i = 0, 1, 2 ..."""
    zipf_offset: float = 0.163
    """b as a share of the number of features; with the other defaults p goes from 0.064 to 0.005."""
    amplitude_sigma: float = 0.5
    """Standard deviation of the log-amplitude; the mean amplitude is 1."""
    bias: float = 1.0
    """Norm of the vector added to every row."""
    noise: float = 0.02
    """Standard deviation of the noise on each coordinate."""
    max_cosine: float | None = None
    """Largest |cosine| between two true features. Unset: 0.18, or as near as 60 steps of pushing
    them apart come where that is too tight. 1 leaves random directions as they are."""
    rows: int = 1_000_000
    """Training rows."""
    seed: int = 0
    """Of the dictionary. The rows have source.seed, so several runs can share a dictionary."""

    def __post_init__(self) -> None:
        def check(key: str, good: bool, accepted: str) -> None:
            if not good:
                raise InputError(f"source.synthetic.{key}", getattr(self, key), accepted)

        for key in ("d", "features", "groups", "group_size", "rows"):
            check(key, getattr(self, key) >= 1, "at least 1")
        check(
            "groups",
            self.groups * self.group_size <= self.features,
            f"at most features / group_size = {self.features // self.group_size}",
        )
        check("cofire", 0 < self.cofire <= 1, "above 0 and at most 1")
        check("l0", self.l0 > 0, "above 0")
        check("zipf", self.zipf >= 0, "0 (all equal) or more")
        check("zipf_offset", self.zipf_offset > 0, "above 0")
        check("max_cosine", self.max_cosine is None or 0 < self.max_cosine <= 1, "above 0 and at most 1")
        for key in ("noise", "bias", "amplitude_sigma"):
            check(key, getattr(self, key) >= 0, "0 or more")
        commonest = float(frequencies(self).max())
        check(
            "l0",
            commonest <= self.cofire,
            f"less: the commonest feature would fire in {commonest:.2f} of rows, above cofire={self.cofire}",
        )


def frequencies(config: SyntheticConfig) -> Tensor:
    """[features] float64: how often each feature fires, commonest first; they sum to l0."""
    rank = torch.arange(config.features, dtype=torch.float64)
    weight = (rank + config.zipf_offset * config.features) ** -config.zipf
    return config.l0 * weight / weight.sum()


def true_features(config: SyntheticConfig) -> Tensor:
    """[features, d] float32 unit rows whose cosines stay within max_cosine.

    Random unit vectors (256 in 64 dimensions reach cosines of 0.5) are pushed apart: each step
    removes a part of every cosine's excess. No F vectors in d dimensions stay below Welch's bound
    sqrt((F - d) / (d (F - 1))); 1.66 times that takes 20 to 60 steps at 2 to 8 features per dimension.

    Raises:
        InputError: max_cosine is set and that many vectors do not keep that far apart in d dimensions.
    """
    generator = torch.Generator().manual_seed(stable_seed("features", config.seed))
    shape = (config.features, config.d)
    w = torch.nn.functional.normalize(torch.randn(shape, generator=generator, dtype=torch.float64), dim=1)
    excess = max(0, config.features - config.d) / (config.d * max(1, config.features - 1))
    target = config.max_cosine or max(0.18, 1.66 * excess**0.5)
    limit = 0.97 * target
    rate = min(0.3, 2.4 * config.d / config.features)  # above it, crowded sets swing instead of settling
    closest = 1.0
    for _ in range(200 if config.max_cosine else 60):
        cosines = (w @ w.T).fill_diagonal_(0)
        closest = float(cosines.abs().max())
        if closest <= target:
            return w.float()
        w = torch.nn.functional.normalize(w - rate * (cosines - cosines.clamp(-limit, limit)) @ w, dim=1)
    if config.max_cosine is None:
        return w.float()
    raise InputError(
        "source.synthetic.max_cosine",
        config.max_cosine,
        f"{closest:.2f} or more, which {config.features} directions in {config.d} dimensions came to",
    )


@dataclass(frozen=True)
class Truth:
    """What synthetic rows are made of: what an SAE of them should find."""

    features: Tensor
    """[T, D] float32 unit rows, commonest first."""
    frequencies: Tensor
    """[T] float64: in what share of rows each fires, on average."""
    codes: Codes
    """Of R rows, in their order: which features are on (values above 0) and how strongly; d_sae is T."""


class SyntheticRows:
    """A `RowProducer` of synthetic activations: the rows of shard s are a pure function of (seed, s).

    Args:
        config: dictionary and firing.
        shard_tokens: rows per shard.
        lanes: lanes the rows of a shard are dealt to, evenly.
        seed: of the rows.
        holdout: held-out rows as a share of the training rows, which stay as many as they are.
        split: "train" (config.rows rows) or "heldout" (holdout * config.rows rows of their own).
        epochs: times the training rows are gone through; the held-out rows are gone through once.
        device: where the rows go; they are made on the CPU, so they are the same everywhere.

    Attributes:
        features: [features, d] float32 unit rows, commonest first.
        frequencies: [features] float64.
        most_rows: rows over all epochs.
    """

    def __init__(
        self,
        config: SyntheticConfig,
        shard_tokens: int,
        lanes: int,
        seed: int = 0,
        holdout: float = 0.02,
        split: str = "train",
        epochs: int = 1,
        device: str | torch.device = "cpu",
    ) -> None:
        assert split in {"train", "heldout"}, split
        self.config, self.shard_tokens, self.lanes = config, shard_tokens, lanes
        self.seed, self.device = seed, device
        self._first_index = HELDOUT if split == "heldout" else 0
        self._total = config.rows if split == "train" else max(1, round(holdout * config.rows))
        self._shards = -(-self._total // shard_tokens)  # per epoch
        self._epochs = epochs if split == "train" else 1
        self.most_rows = self._total * self._epochs
        self.features = true_features(config)
        self.frequencies = frequencies(config)
        generator = torch.Generator().manual_seed(stable_seed("bias", config.seed))
        direction = torch.randn(config.d, generator=generator)
        self.bias = config.bias * direction / direction.norm()
        # Members are dealt to groups at random: a group has common and rare ones.
        grouped = config.groups * config.group_size
        order = torch.randperm(config.features, generator=generator)
        self._group = torch.full((config.features,), config.groups)  # group number `groups`: always on
        self._group[order[:grouped]] = torch.arange(config.groups).repeat_interleave(config.group_size)
        group_on = torch.zeros(config.groups + 1, dtype=torch.float64)
        group_on = group_on.scatter_reduce(0, self._group, self.frequencies, "amax") / config.cofire
        group_on[config.groups] = 1.0
        self._group_on = group_on.float()
        self._member_on = (self.frequencies / group_on[self._group]).float()
        self.dims: Mapping[str, int] = {HOOK: config.d}
        self.fingerprint: Mapping[str, str] = {
            "source": f"synthetic split {split}, holdout {holdout}, seed {seed}, {self._epochs} epochs, "
            f"{shard_tokens} rows per shard",
            **{f"synthetic.{key}": str(value) for key, value in asdict(config).items()},
        }
        self._shard = 0

    def seek(self, cursor: dict[str, Any]) -> None:
        self._shard = cursor["shard"]

    def next_rows(self) -> RawRows | None:
        start = time.perf_counter()
        if self._shard == self._shards * self._epochs:
            return None
        shard = self._shard
        self._shard += 1
        place = shard % self._shards
        first = place * self.shard_tokens
        count = min(self.shard_tokens, self._total - first)
        rows = torch.cat([x for x, _ in self._blocks(place, count)])
        return RawRows(
            index=shard,
            rows={HOOK: rows.to(self.device)},
            ids=torch.arange(first, first + count, device=self.device),
            lane_rows=even_lanes(count, self.lanes),
            counts={"seen": count, "kept": count},
            cursor={"shard": shard},
            seconds={"synthesise": time.perf_counter() - start},
        )

    def make(self, shard: int, count: int) -> tuple[Tensor, Tensor]:
        """The first rows of a shard, at most shard_tokens.

        Returns:
            x [count, d] float32 and the true codes [count, features] float32 (0 where a feature is off).
        """
        blocks = list(self._blocks(shard, count))
        return torch.cat([x for x, _ in blocks]), torch.cat([code for _, code in blocks])

    def truth(self, ids: Tensor) -> Truth:
        """What the rows with these ids are made of.

        Args:
            ids: [R] int64 ids of rows of this split, in any order, as `RawRows` and `Shard` give them. All
                shards up to the last one named are made again.
        """
        assert len(ids) and bool(((ids >= 0) & (ids < self._total)).all()), (ids, self._total)
        values, indices = [], []
        for place in range(int(ids.max()) // self.shard_tokens + 1):
            count = min(self.shard_tokens, self._total - place * self.shard_tokens)
            for _, code in self._blocks(place, count):
                most = max(1, int((code > 0).sum(dim=1).max()))
                value, index = code.topk(most, dim=1)
                values.append(value)
                indices.append(index.int())
        slots = max(value.shape[1] for value in values)
        # Rows were made in the order of their ids, so an id is a place; empty slots are zeros.
        padded = [
            torch.cat([functional.pad(part, (0, slots - part.shape[1])) for part in parts])[ids.cpu()]
            for parts in (values, indices)
        ]
        return Truth(self.features, self.frequencies, Codes(padded[0], padded[1], self.config.features))

    def truth_along(self, shards: ShardStream, rows: int) -> Truth:
        """`truth` of the first rows, at most `rows`, of a stream of these shards, in the stream's order."""
        ids: list[Tensor] = []
        while sum(map(len, ids)) < rows and (shard := shards.next_shard()) is not None:
            ids.append(shard.ids)
        return self.truth(torch.cat(ids)[:rows])

    def _blocks(self, shard: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """What `make` returns, at most BLOCK rows at a time."""
        generator = torch.Generator().manual_seed(stable_seed("rows", self.seed, self._first_index + shard))
        config = self.config
        for first in range(0, count, BLOCK):
            # A block is drawn as for a full shard, then cut: a shorter last shard starts like a full one.
            drawn, n = min(BLOCK, self.shard_tokens - first), min(BLOCK, count - first)
            on = torch.rand(drawn, config.groups + 1, generator=generator) < self._group_on
            fires = torch.rand(drawn, config.features, generator=generator) < self._member_on
            sigma = config.amplitude_sigma
            amplitude = (
                torch.randn(drawn, config.features, generator=generator).mul_(sigma).sub_(sigma**2 / 2).exp_()
            )
            noise = torch.randn(drawn, config.d, generator=generator)
            code = (amplitude * (fires & on[:, self._group]))[:n]
            yield code @ self.features + self.bias + config.noise * noise[:n], code
