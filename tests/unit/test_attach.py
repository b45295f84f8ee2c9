"""An SAE attached to a running model: what it records, what it changes, and that nothing is left behind."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from sae_train.activations.base import ACTIVATIONS
from sae_train.activations.topk import TopKConfig
from sae_train.attach import ablated, attached, clamped, steered
from sae_train.codes import Codes
from sae_train.errors import InputError
from sae_train.harvest import capture
from sae_train.harvest.capture import hooked
from sae_train.harvest.hooks import resolve
from sae_train.harvest.splice import logits as spliced_logits
from sae_train.places import Widths
from sae_train.registry import discover
from sae_train.sae.base import SAE
from sae_train.sae.gated import GatedConfig, GatedSAE
from sae_train.sae.linear import LinearConfig, LinearSAE

pytestmark = pytest.mark.usefixtures("one_thread")
discover("sae_train.activations")

D, F = 32, 80
TOKENS = torch.randint(4, 128, (2, 9), generator=torch.Generator().manual_seed(5))
EVERYWHERE = torch.ones(2, 9, dtype=torch.bool)


def run_model(model: nn.Module, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits


def rows_at(model: nn.Module, *hooks: str) -> list[Tensor]:
    """[2, 9, D] at each hook, of the model as it is."""
    seen: dict[str, Tensor] = {}
    visits = {resolve(h, model): lambda x, h=h: seen.update({h: x.clone()}) for h in hooks}
    with hooked(model, visits):
        run_model(model)
    return [seen[hook] for hook in hooks]


def fitted(sae: SAE, x: Tensor, y: Tensor | None = None) -> SAE:
    """Started from rows and folded, with the noise that training would have added."""
    g = torch.Generator().manual_seed(2)
    sae.initialise(x.flatten(0, -2), g, None if y is None else y.flatten(0, -2))
    with torch.no_grad():
        for name in ("b_enc", "b_mag", "w_skip"):
            if hasattr(sae, name):
                getattr(sae, name).add_(0.05 * torch.randn(getattr(sae, name).shape, generator=g))
    return sae.folded().requires_grad_(False)


def autoencoder(model: nn.Module, hook: str = "resid_post.1", name: str = "topk", k: int = 6) -> SAE:
    options = ACTIVATIONS.config(name)()
    for key, value in {"k": k if name != "group_max" else 8, "target_l0": float(k)}.items():
        if hasattr(options, key):
            setattr(options, key, value)
    return fitted(LinearSAE(LinearConfig(d_sae=F, activation=options), D), rows_at(model, hook)[0])


def transcoder(model: nn.Module, skip: bool = True, layer: int = 1) -> SAE:
    x, y = rows_at(model, f"mlp_in.{layer}", f"mlp_out.{layer}")
    config = LinearConfig(kind="transcoder", skip=skip, d_sae=F, activation=TopKConfig(k=6))
    return fitted(LinearSAE(config, Widths((D,), (D,))), x, y)


def crosscoder(model: nn.Module) -> SAE:
    both = torch.cat(rows_at(model, "resid_post.0", "resid_post.1"), dim=-1)
    config = LinearConfig(kind="crosscoder", d_sae=F, activation=TopKConfig(k=6))
    return fitted(LinearSAE(config, Widths((D, D))), both)


def busiest(sae: SAE, x: Tensor, count: int = 3) -> list[int]:
    return sae.encode(x).counts().argsort(descending=True)[:count].tolist()


def hooks_of(model: nn.Module) -> int:
    """How many of our hooks are on it. Transformers leaves some of its own, of output_hidden_states."""
    hooks = (h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values()))
    return sum(hook.__module__ == capture.__name__ for hook in hooks)


@contextmanager
def by_hand(model: nn.Module, layer: int, change) -> Iterator[None]:
    """A plain torch hook on the layer's output, of which nothing here is ours."""

    def hook(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        new = change(hidden)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    blocks = model.model.layers if hasattr(model, "model") else model.transformer.h
    handle = blocks[layer].register_forward_hook(hook)
    yield
    handle.remove()


# Recording


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "bert"])
@pytest.mark.parametrize("hook", ["resid_post.1", "mlp_out.0", "mlp_in.2", "embed"])
def test_codes_are_recorded_and_the_model_computes_the_same_bits(model_type, hook, tiny_model):
    model = tiny_model(model_type)
    with torch.no_grad():
        clean = model(input_ids=TOKENS)[0]
    (x,) = rows_at(model, hook) if model_type != "bert" else (None,)
    sae = (
        autoencoder(model, hook) if x is not None else LinearSAE(LinearConfig(activation=TopKConfig(k=4)), D)
    )
    with attached(model, sae, hook) as run, torch.no_grad():
        out = model(input_ids=TOKENS)[0]
    assert torch.equal(out, clean)
    assert run.codes.shape == (2, 9) and len(run.forwards) == 1
    if x is not None:
        want = sae.encode(x)
        assert torch.equal(run.codes.values, want.values) and torch.equal(run.codes.indices, want.indices)
        assert want.l0().sum() > 0
    assert hooks_of(model) == 0


def test_every_forward_pass_is_recorded_and_asking_before_the_first_is_refused(tiny_model):
    model = tiny_model("llama")
    sae = autoencoder(model)
    with attached(model, sae, "blocks.1.hook_resid_post") as run:
        with pytest.raises(InputError, match="a forward pass through it inside"):
            _ = run.codes
        run_model(model)
        run_model(model, TOKENS[:1, :4])
    assert [codes.shape for codes in run.forwards] == [(2, 9), (1, 4)]
    assert run.codes is run.forwards[-1]


# Replacing


@pytest.mark.parametrize("hook", ["resid_post.1", "mlp_out.0", "model.layers.2:in"])
def test_the_reconstruction_stands_in_the_place_of_the_activations(hook, tiny_model):
    model = tiny_model("llama")
    sae = autoencoder(model, hook)
    valid = torch.ones_like(TOKENS, dtype=torch.bool)
    for mask in (EVERYWHERE, torch.rand(2, 9, generator=torch.Generator().manual_seed(0)) < 0.5):
        want = spliced_logits(model, TOKENS, valid, mask, {resolve(hook, model): sae})
        with attached(model, sae, hook, replace=True, mask=mask):
            got = run_model(model)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        assert (got - run_model(model)).abs().max() > 0.1
    with attached(model, sae, hook, replace=True, mask=lambda x: x.norm(dim=-1) < 0):
        assert torch.equal(run_model(model), run_model(copy.deepcopy(model)))


@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoder_reads_one_place_and_takes_over_another(skip, tiny_model):
    model = copy.deepcopy(tiny_model("llama"))
    sae = transcoder(model, skip)
    with attached(model, sae, "mlp_in.1", target="mlp_out.1", replace=True) as run:
        got = run_model(model)
    (x,) = rows_at(model, "mlp_in.1")
    assert torch.equal(run.codes.values, sae.encode(x).values)
    model.model.layers[1].mlp = sae  # it is a module from [B, T, D] to [B, T, D]
    assert torch.equal(got, run_model(model))


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_with_the_error_term_kept_not_a_bit_of_the_logits_changes(name, dtype, tiny_model):
    model = copy.deepcopy(tiny_model("llama")).to(dtype)
    clean = run_model(model)
    sae = autoencoder(model, name=name)
    with attached(model, sae, "resid_post.1", replace=True, use_error_term=True) as run:
        assert torch.equal(run_model(model), clean)
    assert run.codes.l0().sum() > 0
    through = transcoder(model)
    with attached(model, through, "mlp_in.1", target="mlp_out.1", replace=True, use_error_term=True):
        assert torch.equal(run_model(model), clean)
    with attached(model, sae, "resid_post.1", replace=True):
        out = run_model(model)
    assert out.dtype == dtype and not torch.equal(out, clean)


def test_edited_codes_change_what_they_say_beside_the_error_or_instead(tiny_model):
    model = tiny_model("llama")
    sae, (x,) = autoencoder(model), rows_at(model, "resid_post.1")

    def double(codes: Codes) -> Codes:
        return Codes(2 * codes.values, codes.indices, codes.d_sae)

    contributed = sae.decode(sae.encode(x)) - sae.b_dec
    with by_hand(model, 1, lambda x: x + contributed):
        want = run_model(model)
    with attached(model, sae, "resid_post.1", replace=True, use_error_term=True, edit=double) as run:
        torch.testing.assert_close(run_model(model), want, rtol=1e-4, atol=1e-4)
    assert torch.equal(run.codes.values, sae.encode(x).values), "as they were before the edit"
    with by_hand(model, 1, lambda x: 2 * contributed + sae.b_dec):
        want = run_model(model)
    with attached(model, sae, "resid_post.1", replace=True, edit=double):
        torch.testing.assert_close(run_model(model), want, rtol=1e-4, atol=1e-4)


def test_an_edit_may_write_to_the_codes_it_is_given(tiny_model):
    model = tiny_model("llama")
    sae = autoencoder(model)

    def anew(codes: Codes) -> Codes:
        return Codes(torch.zeros_like(codes.values), codes.indices, codes.d_sae)

    def in_place(codes: Codes) -> Codes:
        codes.values.zero_()
        return codes

    logits = []
    for edit in (anew, in_place):
        with attached(model, sae, "resid_post.1", replace=True, use_error_term=True, edit=edit) as run:
            logits.append(run_model(model))
        assert run.codes.values.any(), "before any edit"
    assert torch.equal(*logits)
    assert not torch.equal(logits[0], run_model(model))


def test_a_compiled_model_is_refused_in_one_line(tiny_model):
    model = tiny_model("llama")
    with (
        pytest.raises(InputError, match=r"model='OptimizedModule': expected the model that torch.compile"),
        attached(torch.compile(model), autoencoder(model), "resid_post.1"),
    ):
        pass


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_latents_of_an_sae_in_half_precision_can_be_held_and_steered(tiny_model, dtype):
    model = tiny_model("llama")
    whole, half = autoencoder(model), autoencoder(model).to(dtype)
    for block, numbers in ((clamped, {3: 2.0}), (steered, {3: 2.0}), (ablated, [3])):
        with block(model, whole, "resid_post.1", numbers):
            want = run_model(model)
        with block(model, half, "resid_post.1", numbers):
            torch.testing.assert_close(run_model(model), want, rtol=0.05, atol=0.05)


def test_gradients_pass_through_the_codes_alone_and_the_error_is_a_constant(tiny_model):
    model = tiny_model("llama")
    sae = autoencoder(model)
    places = {"before": "resid_post.1", "after": "resid_post.1"}
    seen: dict[str, Tensor] = {}

    def keep(name: str):
        def visit(x: Tensor) -> None:
            x.retain_grad()
            seen[name] = x

        return {resolve(places[name], model): visit}

    start = {resolve("resid_post.0", model): lambda x: x.detach().requires_grad_()}
    error_kept = attached(model, sae, "resid_post.1", replace=True, use_error_term=True)
    with hooked(model, start), hooked(model, keep("before")), error_kept as run, hooked(model, keep("after")):
        out = model(input_ids=TOKENS).logits
        run.codes.values.retain_grad()
        out[0, -1, 7].backward()
    down = seen["after"].grad  # what the model does with the activations after the SAE
    assert down.abs().max() > 1e-3
    to_codes = torch.einsum("btd,btkd->btk", down, sae.w_dec[run.codes.latents()])
    torch.testing.assert_close(run.codes.values.grad, to_codes, rtol=1e-4, atol=1e-6)
    x = seen["before"].detach().requires_grad_()
    (to_x,) = torch.autograd.grad(sae(x), x, down)
    torch.testing.assert_close(seen["before"].grad, to_x, rtol=1e-4, atol=1e-6)


# Steering


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_steering_adds_directions_and_clamping_and_ablation_set_activations(model_type, tiny_model):
    model = tiny_model(model_type)
    sae, (x,) = autoencoder(model), rows_at(model, "resid_post.1")
    a, b, _ = busiest(sae, x)
    z = sae.encode(x).dense()
    assert (z[..., a] > 0).any() and (z[..., a] == 0).any()
    d = sae.w_dec  # scales are 1: it takes raw activations
    maxima = torch.linspace(1, 2, F)
    ways = [
        (steered(model, sae, "resid_post.1", {a: 3.0, b: -2.0}), 3 * d[a] - 2 * d[b]),
        (steered(model, sae, "resid_post.1", {a: 3.0}, maxima=maxima), 3 * maxima[a] * d[a]),
        (clamped(model, sae, "resid_post.1", {a: 1.5}), (1.5 - z[..., a, None]) * d[a]),
        (
            clamped(model, sae, "resid_post.1", {b: 0.5}, maxima=maxima),
            (0.5 * maxima[b] - z[..., b, None]) * d[b],
        ),
        (ablated(model, sae, "resid_post.1", [a, b, a]), -z[..., a, None] * d[a] - z[..., b, None] * d[b]),
    ]
    for number, (way, delta) in enumerate(ways):
        with by_hand(model, 1, lambda x, delta=delta: x + delta):
            want = run_model(model)
        with way:
            got = run_model(model)
        assert (got - run_model(model)).abs().max() > 1e-2, number
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert hooks_of(model) == 0


@pytest.mark.parametrize("name", ["relu", "group_max"])
def test_latents_of_a_gated_sae_are_clamped_at_their_magnitudes(name, tiny_model):
    model = tiny_model("llama")
    options = ACTIVATIONS.config(name)(**({"k": 8} if name == "group_max" else {}))
    x = rows_at(model, "resid_post.1")[0]
    sae = fitted(GatedSAE(GatedConfig(d_sae=F, activation=options), D), x)
    (a, *_), z = busiest(sae, x), sae.encode(x).dense()
    with by_hand(model, 1, lambda x: x - z[..., a, None] * sae.w_dec[a]):
        want = run_model(model)
    with ablated(model, sae, "resid_post.1", [a]):
        torch.testing.assert_close(run_model(model), want, rtol=1e-4, atol=1e-4)


def test_an_ablated_latent_that_is_nowhere_active_changes_no_bit(tiny_model):
    model = tiny_model("llama")
    sae, (x,) = autoencoder(model), rows_at(model, "resid_post.1")
    silent = int(sae.encode(x).counts().argmin())
    assert sae.encode(x).counts()[silent] == 0
    with ablated(model, sae, "resid_post.1", torch.tensor([silent])):
        assert torch.equal(run_model(model), run_model(copy.deepcopy(model)))


def test_masked_positions_and_what_is_before_them_keep_their_bits(tiny_model):
    model = tiny_model("llama")
    sae, clean = autoencoder(model), run_model(model)
    mask = torch.arange(9).expand(2, 9) >= 4
    for way in (
        steered(model, sae, "resid_post.1", {3: 5.0}, mask=mask),
        clamped(model, sae, "resid_post.1", {3: 5.0}, mask=mask),
        attached(model, sae, "resid_post.1", replace=True, mask=lambda x: mask),
    ):
        with way:
            out = run_model(model)
        assert torch.equal(out[:, :4], clean[:, :4])
        assert ((out - clean)[:, 4:].abs().amax(dim=-1) > 1e-3).all()


def test_a_transcoder_steers_its_target_and_a_crosscoder_all_its_hooks(tiny_model):
    model = tiny_model("llama")
    through = transcoder(model)
    way = ("mlp_out.1", through.directions([4])[0])
    cross = crosscoder(model)
    parts = cross.directions([4])[0].split(D)
    cases = [
        (steered(model, through, "mlp_in.1", {4: 6.0}, target="mlp_out.1"), [way]),
        (
            steered(model, cross, "resid_post.0+resid_post.1", {4: 6.0}),
            [("resid_post.0", parts[0]), ("resid_post.1", parts[1])],
        ),
    ]
    for steering, added in cases:
        visits = {resolve(hook, model): lambda x, d=d: x + 6 * d for hook, d in added}
        with hooked(model, visits):
            want = run_model(model)
        with steering:
            got = run_model(model)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert (got - run_model(model)).abs().max() > 1e-2


def test_a_crosscoder_records_the_codes_of_all_its_hooks_together(tiny_model):
    model = tiny_model("llama")
    sae = crosscoder(model)
    with attached(model, sae, "resid_post.0+resid_post.1") as run:
        run_model(model, TOKENS.flip(0))
        run_model(model)
    want = sae.encode(torch.cat(rows_at(model, "resid_post.0", "resid_post.1"), dim=-1))
    assert len(run.forwards) == 2
    assert torch.equal(run.codes.values, want.values) and torch.equal(run.codes.indices, want.indices)


def test_what_one_forward_pass_read_is_not_written_in_another(tiny_model):
    model = tiny_model("llama")
    sae = transcoder(model)
    with attached(model, sae, "mlp_in.0", target="mlp_out.1", replace=True):
        run_model(model)
        with pytest.raises(InputError, match=r"target='mlp_out\.1'"):
            model.model.layers[1].mlp(torch.zeros(2, 9, D))


# Several at once, and what is left


def test_several_saes_at_once_each_see_what_those_before_them_left(tiny_model):
    model = tiny_model("llama")
    first, second = autoencoder(model, "resid_post.0"), autoencoder(model, "resid_post.1")
    through = transcoder(model, layer=2)
    with (
        attached(model, first, "resid_post.0", replace=True) as one,
        attached(model, second, "resid_post.1") as two,
        attached(model, through, "mlp_in.2", target="mlp_out.2", replace=True) as three,
        attached(model, first, "resid_post.0") as again,
    ):
        run_model(model)
        changed = rows_at(model, "resid_post.0", "resid_post.1")
    assert torch.equal(one.forwards[0].values, first.encode(rows_at(model, "resid_post.0")[0]).values)
    assert torch.equal(two.forwards[0].values, second.encode(changed[1]).values)
    assert torch.equal(again.forwards[0].values, first.encode(changed[0]).values), "the inner one reads later"
    assert not torch.equal(two.forwards[0].values, second.encode(rows_at(model, "resid_post.1")[0]).values)
    assert three.codes.shape == (2, 9) and hooks_of(model) == 0


def test_steering_twice_at_one_place_adds_up(tiny_model):
    model = tiny_model("llama")
    sae = autoencoder(model)
    with steered(model, sae, "resid_post.1", {1: 2.0}), steered(model, sae, "resid_post.1", {1: 3.0, 2: 1.0}):
        twice = run_model(model)
    with steered(model, sae, "resid_post.1", {1: 5.0, 2: 1.0}):
        torch.testing.assert_close(run_model(model), twice, rtol=1e-5, atol=1e-5)


def interrupted(num_hooks: int) -> None:
    assert num_hooks == 2
    raise KeyboardInterrupt


def test_hooks_are_gone_however_the_block_ends(tiny_model):
    model = tiny_model("llama")
    sae, clean = autoencoder(model), run_model(model)
    blocks = [
        lambda: attached(model, sae, "resid_post.1", replace=True),
        lambda: steered(model, sae, "resid_post.1", {1: 2.0}),
        lambda: clamped(model, sae, "resid_post.1", {1: 2.0}),
        lambda: ablated(model, sae, "resid_post.1", [1]),
    ]
    for block in blocks:
        with pytest.raises(KeyboardInterrupt), block(), block():
            interrupted(hooks_of(model))
        assert hooks_of(model) == 0
    inner = attached(model, sae, "resid_post.0", replace=True, mask=EVERYWHERE[:1])
    with pytest.raises(InputError, match="mask"), attached(model, sae, "resid_post.1"), inner:
        run_model(model)
    assert hooks_of(model) == 0 and torch.equal(run_model(model), clean)


# Generating


def generate(model: nn.Module, **options) -> tuple[Tensor, Tensor]:
    """Tokens [B, T + 8] and the logits of each step [B, 8, V]."""
    made = model.generate(
        TOKENS,
        attention_mask=torch.ones_like(TOKENS),
        do_sample=False,
        min_new_tokens=8,
        max_new_tokens=8,
        return_dict_in_generate=True,
        output_logits=True,
        pad_token_id=0,
        **options,
    )
    return made.sequences, torch.stack(made.logits, dim=1)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_under_generate_with_a_cache_every_new_token_is_seen_once_and_steered(model_type, tiny_model):
    model = tiny_model(model_type)
    sae = autoencoder(model)
    clean, _ = generate(model)
    with attached(model, sae, "resid_post.1", replace=True, use_error_term=True) as run:
        kept, _ = generate(model)
    assert torch.equal(kept, clean)
    assert [codes.shape for codes in run.forwards] == [(2, 9)] + [(2, 1)] * 7
    (whole,) = read_rows(model, "resid_post.1", clean[:, :-1])
    together = torch.cat([codes.dense() for codes in run.forwards], dim=1)
    torch.testing.assert_close(together, sae.encode(whole).dense(), rtol=1e-3, atol=1e-3)
    found = []
    for use_cache in (True, False):
        with (
            steered(model, sae, "resid_post.1", {3: 20.0}),
            clamped(model, sae, "resid_post.0", {5: 4.0}),
            attached(model, sae, "resid_post.1") as run,
        ):
            found.append(generate(model, use_cache=use_cache))
        assert run.codes.shape == ((2, 1) if use_cache else (2, 16))
    assert torch.equal(found[0][0], found[1][0]) and not torch.equal(found[0][0], clean)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-3)


def read_rows(model: nn.Module, hook: str, tokens: Tensor) -> list[Tensor]:
    seen = []
    with hooked(model, {resolve(hook, model): lambda x: seen.append(x.clone())}):
        run_model(model, tokens)
    return seen


# Refusals


def test_what_cannot_be_done_is_said_before_the_model_runs(tiny_model):
    model = tiny_model("llama")
    sae, through, cross = autoencoder(model), transcoder(model), crosscoder(model)
    both = "resid_post.0+resid_post.1"
    cases = [
        (attached(model, sae, "resid_post.7"), "hook='resid_post.7': expected a layer from 0 to 2"),
        (attached(model, sae, "residpost.1"), "hook='residpost.1'"),
        (attached(model, sae, both), "as many hooks as the SAE reads, 1"),
        (attached(model, cross, "resid_post.0"), "as many hooks as the SAE reads, 2"),
        (attached(model, sae, "resid_post.1@other"), "no @other"),
        (attached(model, sae, "resid_post.1", target="mlp_out.1"), "target='mlp_out.1': expected none"),
        (attached(model, through, "mlp_in.1", replace=True), "target=None: expected the hook that"),
        (steered(model, through, "mlp_in.1", {1: 1.0}), "target=None: expected the hook that"),
        (steered(model, through, "mlp_inn.1", {1: 1.0}, target="mlp_out.1"), "hook='mlp_inn.1'"),
        (attached(model, through, "mlp_in.1", target="mlp_out.1+mlp_out.2"), "hooks as the SAE reconstructs"),
        (attached(model, cross, both, replace=True), "expected an SAE of one hook, or steered()"),
        (ablated(model, cross, both, [1]), "expected an SAE of one hook, or steered()"),
        (attached(model, sae, "resid_post.1", use_error_term=True), "use_error_term=True: expected replace"),
        (attached(model, sae, "resid_post.1", edit=lambda codes: codes), "edit='a function': expected repl"),
        (steered(model, sae, "resid_post.1", {80: 1.0}), "latents=80"),
        (steered(model, sae, "resid_post.1", [3]), "latents with a number each"),
        (clamped(model, sae, "resid_post.1", {3: "much"}), "latents with a number each"),
        (steered(model, sae, "resid_post.1", {3: float("nan")}), "finite numbers"),
        (
            steered(model, sae, "resid_post.1", {3: 1.0}, maxima=torch.full((F,), torch.nan)),
            "finite numbers",
        ),
        (attached(model, sae, None), "hook=None: expected the name of a hook"),
        (clamped(model, sae, "resid_post.1", {"a": 1.0}), "latents="),
        (ablated(model, sae, "resid_post.1", [-1]), "latents=-1"),
        (steered(model, sae, "resid_post.1", {1: 1.0}, maxima=torch.ones(79)), r"maxima=\[79\]"),
    ]
    for block, message in cases:
        with pytest.raises(InputError, match=message.replace("(", r"\(").replace(")", r"\)")), block:
            raise AssertionError(f"entered: {message}")
        assert hooks_of(model) == 0


def test_a_place_of_another_width_or_in_the_wrong_order_is_refused_when_the_model_gets_there(tiny_model):
    model = tiny_model("llama")
    sae, through = autoencoder(model), transcoder(model)
    cases = [
        (attached(model, sae, "model.layers.0.mlp.up_proj"), "width 32, as the SAE's; this is 64 wide"),
        (steered(model, sae, "model.layers.0.mlp.up_proj", {1: 1.0}), "width 32, as the SAE's; this is 64"),
        (
            attached(model, through, "mlp_in.1", target="mlp_out.0", replace=True),
            "target='mlp_out.0': expected a place that the model computes after",
        ),
        (attached(model, sae, "resid_post.1", replace=True, mask=EVERYWHERE[0]), r"expected bool \[2, 9\]"),
        (attached(model, sae, "resid_post.1", replace=True, mask=EVERYWHERE.int()), "expected bool"),
    ]
    for block, message in cases:
        with pytest.raises(InputError, match=message), block:
            run_model(model)
        assert hooks_of(model) == 0
