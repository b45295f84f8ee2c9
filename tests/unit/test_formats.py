"""Every architecture, kind and activation with every format: the same, or refused with the reason."""

import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from format_cases import CASES, KINDS, about, built, rows, table, verdict

from sae_train.errors import InputError
from sae_train.formats.base import FORMATS, FormatConfig, check, holders
from sae_train.formats.blocks import Matrix
from sae_train.formats.plain import (
    Gate,
    Plain,
    Rule,
    as_thresholds,
    of_sae,
    to_sae,
    with_pre_bias,
    without_pre_bias,
)
from sae_train.formats.proof import compare, require
from sae_train.formats.reference import active_of, calibrated, encode, reconstruct, rows_for
from sae_train.places import Widths

pytestmark = pytest.mark.usefixtures("one_thread")

DOCS = Path(__file__).resolve().parents[2] / "docs" / "publishing.md"
NUMBER = re.compile(r"same \((\d(?:\.\d)?e[+-]\d+)\)")


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_format_gives_back_the_same_or_says_why_not_and_who_can(case, tmp_path):
    for format_name in FORMATS:
        folder = tmp_path / format_name
        folder.mkdir()
        found = verdict(case, format_name, folder)
        if found.refused is None:
            assert all(proof.holds for proof in found.proofs), (format_name, found)
            assert found.apart < 1e-5, format_name
            continue
        assert list(folder.iterdir()) == []
        able = holders(of_sae(built(*case)))
        assert format_name not in able and found.refused.startswith(f"format='{format_name}'")
        assert f"({', '.join(able) or 'none but our own'}): " in found.refused


def test_the_table_in_the_documentation_is_what_the_formats_do():
    made, told = table(), DOCS.read_text()
    for part in made.split("\n\n"):  # the table, then the reasons
        found = NUMBER.sub("same (N)", part.strip()) in NUMBER.sub("same (N)", told)
        assert found, "python tests/format_cases.py prints the table"
    numbers = [float(number) for number in NUMBER.findall(told)]
    assert len(numbers) == len(NUMBER.findall(made)) > 80 and max(numbers) < 1e-5


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_the_reference_computes_what_our_own_encoders_do(case):
    sae, x = built(*case), rows(KINDS[case[1]], seed=9)
    plain = of_sae(sae)
    codes, found = sae.encode(x), encode(plain, x)
    ours = active_of(codes)
    assert torch.equal(ours.keys, found.keys) and len(found.keys) > 0
    torch.testing.assert_close(found.values, ours.values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(reconstruct(plain, x, found), sae(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_every_change_of_form_leaves_the_same(case):
    sae, x = built(*case), rows(KINDS[case[1]], seed=9)
    plain = of_sae(sae)
    forms = [without_pre_bias(plain)]
    if plain.kind != "transcoder":
        forms.append(with_pre_bias(forms[0]))
    if plain.rule.name in ("relu", "threshold"):
        forms += [as_thresholds(plain), as_thresholds(forms[0])]
        assert all(form.gate is None and form.rule.threshold is not None for form in forms[-2:])
    for form in forms:
        proof = compare(sae, form, x, torch.float32)
        assert proof.holds and proof.codes < 1e-5, (form.rule, proof)
        back = to_sae(form)
        assert compare(back, plain, x, torch.float32).holds


def test_thresholds_in_the_place_of_top_k_are_as_many_on_the_rows_they_come_from():
    for rule, gated in product(("topk", "group_max"), ("linear", "gated")):
        sae = built(gated, "autoencoder", rule)
        x = rows(KINDS["autoencoder"], 256, seed=11)
        plain = replace(of_sae(sae), gate=None)
        found = calibrated(of_sae(sae), x)
        before, after = encode(plain, x), encode(replace(found, gate=None), x)
        assert len(before.keys) == len(after.keys) > 200
        assert not torch.equal(before.keys, after.keys), "top-k and thresholds are different rules"
        assert found.rule.name == "threshold" and found.rule.scalar


def test_no_thresholds_come_from_rows_on_which_nothing_is_active():
    plain = of_sae(built("linear", "autoencoder", "topk"))
    with pytest.raises(InputError, match=r"tokens=3: expected rows on which"):
        calibrated(replace(plain, b_enc=plain.b_enc - 1e6), torch.zeros(3, plain.d_in))


DAMAGE = {
    "a code": lambda p: replace(p, b_enc=p.b_enc + 0.01 * torch.randn(p.d_sae)),
    "an encoder row": lambda p: replace(p, w_enc=p.w_enc.scaled(1 + 1e-3 * torch.arange(p.d_sae))),
    "the decoder": lambda p: replace(p, w_dec=p.w_dec.scaled(torch.full((p.d_sae,), 1.001))),
    "the bias": lambda p: replace(p, b_dec=p.b_dec + 0.01),
    "the pre-bias": lambda p: replace(p, pre_bias=not p.pre_bias),
    "two latents": lambda p: replace(p, w_enc=Matrix.of(p.w_enc.whole().roll(1, 0))),
    "the rule": lambda p: replace(p, rule=Rule("relu") if p.rule.name != "relu" else Rule("topk", 4)),
    "k": lambda p: replace(p, rule=replace(p.rule, k=3)),
    "the thresholds": lambda p: replace(p, rule=replace(p.rule, threshold=p.rule.threshold * 1.05)),
    "the skip connection": lambda p: replace(p, w_skip=p.w_skip.T),
    "the gates": lambda p: replace(p, gate=Gate(p.gate.r_mag + 0.01, p.gate.b_mag)),
    "magnitudes": lambda p: replace(p, gate=Gate(p.gate.r_mag, p.gate.b_mag * 1.01)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_difference_of_a_thousandth_is_no_proof(damage):
    case = {
        "k": ("linear", "autoencoder", "topk"),
        "the thresholds": ("linear", "autoencoder", "jumprelu"),
        "the skip connection": ("linear", "skip transcoder", "relu"),
        "the gates": ("gated", "autoencoder", "relu"),
        "magnitudes": ("gated", "autoencoder", "relu"),
    }.get(damage, ("linear", "autoencoder", "topk"))
    sae, x = built(*case), rows(KINDS[case[1]], 256, seed=9)
    plain = of_sae(sae)
    assert compare(sae, plain, x, torch.float32).holds
    torch.manual_seed(0)
    proof = compare(sae, DAMAGE[damage](plain), x, torch.float32)
    assert not proof.holds
    with pytest.raises(InputError, match="format='saelens': expected an export that does the same as RUN"):
        require(proof, "RUN", "saelens")


def test_a_latent_within_rounding_of_its_edge_is_a_tie_and_one_beyond_is_a_difference():
    plain = of_sae(built("linear", "autoencoder", "jumprelu"))
    x = rows(KINDS["autoencoder"], 256, seed=9)
    found = encode(plain, x)
    lowest = int(found.latents.bincount(minlength=plain.d_sae).argmax())
    value = found.values[found.latents == lowest].min()

    def with_level(level: float) -> Plain:
        levels = plain.rule.threshold.clone()
        levels[lowest] = level
        return replace(plain, rule=replace(plain.rule, threshold=levels))

    below = with_level(float(value) * (1 - 1e-6))
    tied = compare(below, with_level(float(value) * (1 + 1e-6)), x, torch.float32)
    assert tied.holds and tied.ties == 1 and tied.differing == 0 and tied.codes == 0
    apart = compare(with_level(float(value) * 0.98), with_level(float(value) * (1 + 1e-6)), x, torch.float32)
    assert not apart.holds and apart.differing >= 1


def test_many_ties_are_no_proof():
    """Two latents of equal weights compete for the last place in every row: nothing tells which is meant."""
    w = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    twins = Matrix.of(torch.cat([w, w]))
    plain = Plain(
        "autoencoder", Widths((8,)), twins, torch.zeros(4), twins, torch.zeros(8), True, Rule("topk", 1)
    )
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(2))
    nudged = replace(plain, b_enc=torch.tensor([0, 0, 1e-5, 1e-5]))
    proof = compare(plain, nudged, x, torch.float32)
    assert proof.ties == proof.differing == 2 * proof.active > 64 and not proof.holds


def test_an_sae_that_is_never_active_proves_nothing():
    sae = built("linear", "autoencoder", "topk")
    plain = of_sae(sae)
    dead = replace(plain, b_enc=plain.b_enc - 1e6)
    assert not compare(dead, dead, rows(KINDS["autoencoder"]), torch.float32).holds


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_random_rows_make_latents_active(case):
    plain = of_sae(built(*case))
    x = rows_for(plain, 32)
    assert x.shape == (32, plain.d_in) and len(encode(plain, x).keys) > 32
    assert torch.equal(x, rows_for(plain, 32)) and not torch.equal(x, rows_for(plain, 32, seed=1))


def test_bfloat16_is_proved_to_its_own_precision_and_float32_is_not_taken_for_it(tmp_path):
    sae, x = built("linear", "autoencoder", "jumprelu"), rows(KINDS["autoencoder"], 256, seed=5)
    format_ = FORMATS.build(FormatConfig("saelens"))
    format_.write([(of_sae(sae), about("autoencoder"))], tmp_path, torch.bfloat16)
    (found,) = format_.read(tmp_path)
    proof = compare(sae, found.plain, x, torch.bfloat16)
    assert proof.holds and 1e-4 < proof.codes < 0.02
    assert not compare(sae, found.plain, x, torch.float32).holds


def test_a_format_that_nobody_knows_is_answered_with_those_there_are():
    with pytest.raises(InputError, match=r"format.name='saelenz'.*did you mean saelens"):
        FORMATS.build(FormatConfig("saelenz"))


def test_an_sae_that_fits_nowhere_is_refused_by_all():
    plain = of_sae(built("gated", "crosscoder", "topk"))
    assert holders(plain) == []
    with pytest.raises(InputError, match=r"holds a gated crosscoder with top-k \(none but our own\)"):
        check(FORMATS.build(FormatConfig("openmoss")), plain)
