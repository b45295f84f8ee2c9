"""Cross-entropy with activations replaced, against cases that can be worked out by hand."""

import math
import weakref

import pytest
import torch

from sae_train.errors import InputError
from sae_train.harvest import splice
from sae_train.harvest.hooks import resolve
from sae_train.harvest.splice import Spliced, cross_entropy, logits, splice_reports
from sae_train.harvest.windows import Windows

EPS = 2.0**-24
T, V = 12, 128


def make_windows(num_windows: int = 5, padding: int = 3) -> tuple[Windows, torch.Tensor]:
    """Windows with BOS first and padding last, and the mask of their ordinary positions."""
    tokens = torch.randint(4, V, (num_windows, T), generator=torch.Generator().manual_seed(1))
    tokens[:, 0] = 1
    valid = torch.ones_like(tokens, dtype=torch.bool)
    valid[-1, T - padding :] = False
    mask = valid & (tokens != 1)
    mask[0, 5] = False  # as a sink would be
    return Windows(tokens, valid, tokens == 1, torch.arange(num_windows)), mask


def identity(rows: torch.Tensor) -> torch.Tensor:
    return rows


@pytest.mark.parametrize(
    "name", ["resid_post.1", "resid_pre.2", "mlp_out.0", "attn_out.1", "mlp_in.1", "embed"]
)
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_an_identity_splice_changes_no_bit_of_the_logits(model_type, name, tiny_model):
    model = tiny_model(model_type)
    windows, mask = make_windows()
    site = resolve(name, model)
    clean = logits(model, windows.tokens, windows.valid, mask)
    assert torch.equal(logits(model, windows.tokens, windows.valid, mask, {site: identity}), clean)
    result = cross_entropy(model, windows, mask, {site: identity}, kl=True)
    assert result.ce == cross_entropy(model, windows, mask).ce
    assert result.kl == 0.0


def test_clean_cross_entropy_is_the_mean_over_counted_predictions(tiny_model):
    model = tiny_model("llama")
    windows, mask = make_windows()
    result = cross_entropy(model, windows, mask)
    total, count = 0.0, 0
    with torch.no_grad():
        log_p = model(input_ids=windows.tokens).logits.double().log_softmax(dim=-1)
    for b in range(5):
        for t in range(T - 1):
            if mask[b, t] and windows.valid[b, t + 1]:
                total -= float(log_p[b, t, windows.tokens[b, t + 1]])
                count += 1
    # A whole window of 12 has 10 predictions (none from BOS or the last position); the first has a sink.
    assert (result.num_tokens, count) == (46, 46)
    assert result.tokens.tolist() == [9, 10, 10, 10, 7]
    assert (
        abs(result.ce - total / count) < 1e-5
    )  # float32 forward and softmax over 128 logits of size about 1
    assert result.kl is None


def test_zero_ablating_the_last_residual_leaves_the_unconditional_guess(tiny_model):
    """A zero row stays zero through RMSNorm and the head, so all tokens are equally likely."""
    model = tiny_model("llama")
    windows, mask = make_windows()
    site = resolve("resid_post.2", model)
    result = cross_entropy(model, windows, mask, {site: torch.zeros_like}, kl=True)
    assert abs(result.ce - math.log(V)) < 8 * EPS * math.log(V)
    clean = logits(model, windows.tokens, windows.valid, mask).double().log_softmax(dim=-1)
    entropy = -(clean.exp() * clean).sum(dim=-1)
    counted = mask[:, :-1] & windows.valid[:, 1:]
    by_hand = (math.log(V) - entropy[:, :-1][counted]).mean()
    assert abs(result.kl - float(by_hand)) < 1e-5


def test_positions_outside_the_mask_keep_their_activations(tiny_model):
    model = tiny_model("llama")
    windows, mask = make_windows()
    site = resolve("resid_post.2", model)
    clean = logits(model, windows.tokens, windows.valid, mask)
    changed = logits(model, windows.tokens, windows.valid, mask, {site: torch.zeros_like})
    assert torch.equal(changed[~mask], clean[~mask])
    assert not changed[mask].any()


def test_the_report_is_the_four_runs_and_scores_from_them(tiny_model):
    model = tiny_model("llama")
    windows, mask = make_windows()
    site = resolve("resid_post.1", model)
    mean = torch.linspace(-1, 1, 32)

    def shrink(rows):
        return 0.7 * rows

    report = splice_reports(model, windows, mask, [Spliced([site], [site], shrink, [mean])])[0]
    ce = {
        "clean": cross_entropy(model, windows, mask).ce,
        "sae": cross_entropy(model, windows, mask, {site: shrink}).ce,
        "zero": cross_entropy(model, windows, mask, {site: torch.zeros_like}).ce,
        "mean": cross_entropy(model, windows, mask, {site: lambda rows: mean.expand_as(rows)}).ce,
    }
    assert {f"ce_{name}": value for name, value in ce.items()}.items() <= report.items()
    assert report["kl_sae"] == cross_entropy(model, windows, mask, {site: shrink}, kl=True).kl > 0
    for name in ("zero", "mean"):  # of random weights, which an ablation may well improve
        lost, recovered = ce[name] - ce["clean"], report[f"recovered_{name}"]
        assert recovered == (ce[name] - ce["sae"]) / lost if lost > 0 else math.isnan(recovered)
    assert not math.isnan(report["recovered_zero"]), "nothing was compared"
    assert report["tokens"] == 46


def test_ablations_that_are_known_are_not_run_again_and_change_nothing(tiny_model):
    model = tiny_model("llama")
    windows, mask = make_windows()
    here, there = resolve("resid_post.1", model), resolve("mlp_out.1", model)
    passes = []
    model.register_forward_hook(lambda *args: passes.append(1))
    ablated, mean = {}, torch.linspace(-1, 1, 32)

    def report(site, known):
        passes.clear()
        sae = Spliced([site], [site], lambda rows: 0.7 * rows, [mean])
        return splice_reports(model, windows, mask, [sae], ablated=known)[0]

    first = report(here, ablated)
    assert len(passes) == 4
    assert report(here, ablated) == first and len(passes) == 2
    other = report(there, ablated)
    assert len(passes) == 4, "another place has ablations of its own"
    assert other == report(there, {}) and other["ce_zero"] != first["ce_zero"]


def test_nothing_to_judge_is_nothing_to_tell(tiny_model):
    windows, mask = make_windows()
    assert splice_reports(tiny_model("llama"), windows, mask, []) == []


def test_no_more_than_two_sets_of_logits_are_held_at_once(tiny_model, monkeypatch):
    monkeypatch.setattr(splice, "FORWARD_TOKENS", 2 * T)
    windows, mask = make_windows()
    site, alive, most = resolve("resid_post.1", tiny_model("llama")), [], []
    whole = splice.logits

    def counted(*args):
        made = whole(*args)
        alive.append(weakref.ref(made))
        most.append(sum(one() is not None for one in alive))
        return made

    monkeypatch.setattr(splice, "logits", counted)
    saes = [Spliced([site], [site], lambda rows, i=i: i * rows, [torch.zeros(32)]) for i in range(3)]
    splice_reports(tiny_model("llama"), windows, mask, saes)
    assert max(most) == 2 and len(most) == 3 * (1 + 3 + 2)


NAMES = ["resid_post.1", "resid_post.0", "mlp_out.1", "resid_pre.2", "attn_out.0", "embed"]


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_several_saes_are_told_what_each_is_told_alone(model_type, tiny_model, monkeypatch):
    monkeypatch.setattr(splice, "FORWARD_TOKENS", 2 * T)
    model = tiny_model(model_type)
    windows, mask = make_windows()
    sites = [resolve(name, model) for name in NAMES]
    mean = torch.linspace(-1, 1, 32)
    saes = [
        Spliced([site], [site], lambda rows, i=i: (0.4 + 0.1 * i) * rows, [mean])
        for i, site in enumerate(sites)
    ]
    saes.insert(1, Spliced([sites[0]], [sites[0]], torch.zeros_like, [mean]))  # in the place of another
    saes.append(
        Spliced([sites[1]], [sites[0], sites[1]], lambda rows: torch.cat([rows, -rows], dim=1), [mean] * 2)
    )
    passes = []
    model.register_forward_hook(lambda *args: passes.append(1))
    together = splice_reports(model, windows, mask, saes)
    chunks = 3
    assert len(passes) == chunks * (1 + len(saes) + 2 * (len(saes) - 1))
    assert together == [splice_reports(model, windows, mask, [sae])[0] for sae in saes]
    assert together[1]["ce_sae"] == together[0]["ce_zero"] != together[0]["ce_sae"]
    for sae, report in zip(saes, together, strict=True):  # against passes of the whole model
        if len(sae.outputs) == 1:
            ways = {
                "sae": sae.reconstruct,
                "zero": torch.zeros_like,
                "mean": lambda rows: mean.expand_as(rows),
            }
            whole = {
                name: cross_entropy(model, windows, mask, {sae.outputs[0]: way}) for name, way in ways.items()
            }
            assert {f"ce_{name}": result.ce for name, result in whole.items()}.items() <= report.items()


def test_a_perfect_reconstruction_recovers_everything(tiny_model):
    model = tiny_model("gpt2")
    windows, mask = make_windows()
    site = [resolve("mlp_out.1", model)]
    report = splice_reports(model, windows, mask, [Spliced(site, site, identity, [torch.zeros(32)])])[0]
    assert report["ce_sae"] == report["ce_clean"]
    assert report["ce_mean"] == report["ce_zero"]  # the mean given is zero
    assert (report["recovered_zero"], report["recovered_mean"], report["kl_sae"]) == (1.0, 1.0, 0.0)


def test_chunk_sizes_do_not_change_the_sums(tiny_model, monkeypatch):
    model = tiny_model("llama")
    windows, mask = make_windows()
    site = resolve("resid_post.1", model)
    whole = cross_entropy(model, windows, mask, {site: torch.zeros_like}, kl=True)
    monkeypatch.setattr(splice, "FORWARD_TOKENS", 2 * T)
    monkeypatch.setitem(splice.SOFTMAX_NUMBERS, "cpu", 3 * V)
    chunked = cross_entropy(model, windows, mask, {site: torch.zeros_like}, kl=True)
    assert torch.equal(chunked.tokens, whole.tokens)
    # Matrix products cut differently move logits by some EPS; ten sums of values below 16.
    assert (chunked.nll - whole.nll).abs().max() < 1e-4
    assert (chunked.kl_sum - whole.kl_sum).abs().max() < 1e-4


def test_reconstructions_are_given_and_taken_in_the_dtype_of_the_model(tiny_model):
    model = tiny_model("gpt2").__class__(tiny_model("gpt2").config).to(torch.bfloat16).eval()
    windows, mask = make_windows()
    seen = []

    def widen(rows):
        seen.append(rows.dtype)
        return rows.float()

    result = cross_entropy(model, windows, mask, {resolve("resid_post.1", model): widen}, kl=True)
    assert set(seen) == {torch.bfloat16}
    assert result.kl == 0.0


def test_an_encoder_has_no_cross_entropy(tiny_model):
    windows, mask = make_windows()
    model = tiny_model("bert")
    with pytest.raises(InputError, match="causal LM"):
        cross_entropy(model, windows, mask)


def test_nothing_to_predict_is_an_error_and_not_a_nan(tiny_model):
    windows, mask = make_windows()
    model = tiny_model("llama")
    site = [resolve("resid_post.1", model)]
    with pytest.raises(InputError, match="at least one ordinary token"):
        splice_reports(model, windows, mask & False, [Spliced(site, site, identity, [torch.zeros(32)])])[0]
