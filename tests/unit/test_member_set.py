"""The SAEs of one run: named members of any architecture, and grids of them."""

import pytest

from sae_train.activations.batch_topk import BatchTopKConfig
from sae_train.activations.jumprelu import JumpReLUConfig
from sae_train.activations.topk import TopKConfig
from sae_train.cli.compose import compose
from sae_train.config import to_config
from sae_train.errors import InputError
from sae_train.member_set import MAX_MEMBERS, grid_points, members
from sae_train.sae.gated import GatedConfig
from sae_train.sae.linear import LinearConfig
from sae_train.sae.matryoshka import MatryoshkaConfig
from sae_train.train.members import MemberConfig


def made(*args: str) -> dict[str, MemberConfig]:
    composed = compose("train", ["source=synthetic", "train.tokens=100_000", *args])
    return {member.name: member for member in members(to_config(composed), composed)}


def test_members_of_one_run_may_be_of_any_architecture_and_activation():
    saes = (
        "saes={plain: {}, gated: {sae: {name: gated}}, "
        "jump: {sae: {activation: {name: jumprelu, target_l0: 8}}}, "
        "both: {sae: {name: matryoshka, prefixes: '1/2 1', activation: {name: batch_topk}}}}"
    )
    found = made("sae.activation.k=12", "sae.d_sae=96", saes)
    assert {name: (type(m.sae), type(m.sae.activation)) for name, m in found.items()} == {
        "plain": (LinearConfig, TopKConfig),
        "gated": (GatedConfig, TopKConfig),
        "jump": (LinearConfig, JumpReLUConfig),
        "both": (MatryoshkaConfig, BatchTopKConfig),
    }
    assert {m.sae.d_sae for m in found.values()} == {96}, "what the run says holds for all"
    assert found["gated"].sae.activation.k == found["both"].sae.activation.k == 12
    assert found["jump"].sae.activation == JumpReLUConfig(target_l0=8)
    assert found["both"].sae.prefixes == "1/2 1"


def test_a_member_of_the_runs_own_kind_keeps_all_of_its_values():
    found = made("sae=matryoshka", "sae.prefixes='1/4 1'", "saes={a: {sae: {name: matryoshka, d_sae: 32}}}")
    assert found["a"].sae.prefixes == "1/4 1" and found["a"].sae.d_sae == 32


def test_a_grid_is_a_member_of_every_combination_named_after_it():
    found = made("grid={k: [4, 8], lr: [1e-3, 0.02], seed: [0, 1], sae.auxk_coefficient: [0]}")
    assert list(found)[:3] == [
        "k4-lr0.001-seed0-auxk_coefficient0",
        "k4-lr0.001-seed1-auxk_coefficient0",
        "k4-lr0.02-seed0-auxk_coefficient0",
    ]
    assert len(found) == 8
    values = {(m.sae.activation.k, m.optim.lr, m.seed, m.sae.auxk_coefficient) for m in found.values()}
    assert values == {(k, lr, seed, 0) for k in (4, 8) for lr in (1e-3, 0.02) for seed in (0, 1)}


def test_k_of_a_grid_is_the_wanted_l0_of_every_activation():
    found = made("grid={activation: [topk, jumprelu, relu], k: [4, 6]}")
    found = {name.removeprefix("activation"): m.sae.activation for name, m in found.items()}
    assert {name: getattr(a, "k", None) or a.target_l0 for name, a in found.items()} == {
        f"{name}-k{k}": k for name in ("topk", "jumprelu", "relu") for k in (4, 6)
    }
    # which only a grid means by it
    with pytest.raises(InputError, match=r"saes\.a\.sae\.activation\.k=4: .* name, target_l0,"):
        made("saes={a: {sae: {activation: {name: jumprelu, k: 4}}}}")


def test_a_grid_of_named_members_and_of_hooks_is_their_product():
    found = made("saes={a: {}, b: {sae: {name: gated}}}", "grid={seed: [0, 1]}")
    assert [(name, m.sae.name, m.seed) for name, m in found.items()] == [
        ("a-seed0", "linear", 0),
        ("a-seed1", "linear", 1),
        ("b-seed0", "gated", 0),
        ("b-seed1", "gated", 1),
    ]
    found = made("hook=[resid_post.1,mlp_out.2]", "grid={k: [4]}")
    assert {name: m.hook for name, m in found.items()} == {
        "resid_post.1-k4": "resid_post.1",
        "mlp_out.2-k4": "mlp_out.2",
    }
    found = made("grid={hook: [resid_post.1, mlp_out.2]}")
    assert [m.hook for m in found.values()] == ["resid_post.1", "mlp_out.2"]
    assert list(found) == ["hookresid_post.1", "hookmlp_out.2"]


def test_each_member_of_a_grid_has_values_of_its_own():
    a, b = made("grid={k: [4, 8]}").values()
    a.sae.activation.k = 5
    a.sae.auxk_coefficient = 0.5
    assert b.sae.activation.k == 8 and b.sae.auxk_coefficient != 0.5


@pytest.mark.parametrize(
    ("grid", "told"),
    [
        ("grid=[1]", r"^grid=\[1\]: expected keys with lists"),
        ("grid={}", r"^grid=\{\}: expected keys with lists"),
        ("grid={k: 4}", r"^grid\.k=4: expected keys with lists"),
        ("grid={k: []}", r"^grid\.k=\[\]: expected keys with lists"),
        ("grid={k: [4, 4]}", r"^grid=.*two combinations are called k4"),
        (
            "grid={nothing: [4]}",
            r"^grid\.nothing=\[4\]: expected a key of a member: .* short name: k, target_l0,",
        ),
        ("grid={k: [-1]}", r"^sae\.activation\.k=-1"),
        ("grid={activation: [topkk]}", r"^saes\.activationtopkk\.sae\.activation\.name='topkk'.*topk"),
        ("grid={architecture: [linear, none]}", r"^saes\.architecturenone\.sae\.name='none'.*gated"),
        (
            "grid={seed: [" + ",".join(map(str, range(MAX_MEMBERS + 1))) + "]}",
            rf"^grid=.*at most {MAX_MEMBERS}",
        ),
    ],
)
def test_a_grid_that_cannot_be_is_refused_in_one_line(grid, told):
    with pytest.raises(InputError, match=told) as error:
        made(grid)
    assert "\n" not in str(error.value)


def test_a_key_and_its_short_name_are_one_key():
    with pytest.raises(InputError, match=r"^grid='sae\.activation\.k': expected each key once"):
        grid_points({"k": [4], "sae.activation.k": [5]})
