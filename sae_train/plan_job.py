"""What a plan is made of: devices, and the shapes of the model and of the SAEs of a run, in numbers alone."""

from dataclasses import dataclass

from sae_train.config import Config
from sae_train.train.optim import OptimConfig

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Hardware:
    """One device, and how much of what its vendor states is reckoned with.

    Attributes:
        flops: per second, of matrix products in the run's precision. bytes_per_s: of memory.
        memory: bytes. share: of both rates that is assumed to be reached; 1 where they were measured.
    """

    name: str
    flops: float
    bytes_per_s: float
    memory: int
    share: float

    @property
    def measured(self) -> bool:
        return self.share == 1


HARDWARE = {
    "cpu": Hardware("cpu", 84e9, 7e9, 0, 1.0),
    "a100": Hardware("a100", 312e12, 2.04e12, 80 * GIB, 0.4),
    "h100": Hardware("h100", 989e12, 3.35e12, 80 * GIB, 0.4),
    "h200": Hardware("h200", 989e12, 4.8e12, 141 * 10**9, 0.4),
    "mi300x": Hardware("mi300x", 1307e12, 5.3e12, 192 * 10**9, 0.4),
}
"""A CPU's rates are those of one core in float32, the Xeon of docs/benchmarks.md: 917 tokens of SmolLM2-135M
up to layer 12 in a second are 84e9 FLOP/s, and what is no matrix product in a fused step moves 7e9 bytes/s
on each core. GPUs: dense bfloat16 and memory as their data sheets say, of which 0.4 is an assumption."""


@dataclass(frozen=True)
class Parameter:
    """One tensor that is trained."""

    numel: int
    matrix: bool
    of_latents: bool
    """Its rows are latents, so that mesh.feature divides them."""


@dataclass(frozen=True)
class MemberShape:
    """What one SAE of the run is, in numbers.

    Attributes:
        latents: F. slots: the latents kept per row, None where codes are dense.
        pre: dense codes keep their pre-activations too. parts: decodes of a matryoshka's prefixes.
        buffers_bytes: what `state_dict` has beside parameters.
        one_form: `SAE.latents()` gives the form that fused steps compute.
    """

    name: str
    architecture: str
    activation: str
    d_in: int
    d_out: int
    latents: int
    slots: int | None
    pre: bool
    parts: int
    parameters: tuple[Parameter, ...]
    buffers_bytes: int
    one_form: bool
    optim: OptimConfig


@dataclass(frozen=True)
class ModelShape:
    """The language model (two of them added up) as it is run.

    Attributes:
        weights_bytes: of everything that is loaded. itemsize: bytes per number of weights and activations.
        used: numbers in the matrices that a token goes through up to the last hook.
        width, widest: of the hidden state; of the widest output of a module. vocabulary: of the logits, or 0.
    """

    weights_bytes: int
    itemsize: int
    used: int
    width: int
    widest: int
    vocabulary: int


@dataclass(frozen=True)
class Job:
    """Everything that a plan is a function of."""

    config: Config
    members: tuple[MemberShape, ...]
    model: ModelShape | None
    row_bytes: int
    """Of one row of all hooks, its id included."""
    shard_rows: int
    hardware: Hardware
    device_bytes: int | None
    """None: not known."""
    processes: int = 1
    data: int = 1
    feature: int = 1
    low: bool = False
    """Matrix products in bfloat16."""
    cores: int = 1
    cuda_build: bool = False
    """torch is built for GPUs; a process on a CPU loads what it needs for them all the same."""
    spread: int = 1
    """Devices that the language model's weights are laid over, by `model.device_map`."""

    @property
    def gpu(self) -> bool:
        return self.hardware.name != "cpu"

    @property
    def groups(self) -> int:
        """How many groups of processes train SAEs side by side."""
        return max(1, self.processes // (self.data * self.feature))
