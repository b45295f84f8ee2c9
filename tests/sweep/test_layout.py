"""Which runs a sweep makes of its points, and that each trains just what its points alone would."""

from pathlib import Path

import pytest
from sweep.short import SHORT

from sae_train.cli.compose import compose
from sae_train.config import to_config
from sae_train.errors import InputError
from sae_train.member_set import members
from sae_train.sweep.axes import read_axes
from sae_train.sweep.points import all_points
from sae_train.sweep.runs import lay_out, sharing, side_by_side

LIVE = ["model.name=a-model", "corpus.name=a-corpus", "hook=resid_post.1", *SHORT[5:]]
"""Of a language model that nobody loads."""


def named(config, hooks):
    """Rows of hooks as a harvest of this made-up model names them."""
    return {hook: hook.replace("blocks.1.hook_resid_post", "resid_post.1") for hook in hooks}


def laid_out(composer, args, share="auto", most=None):
    fixed, axes = read_axes(args)
    points = all_points(fixed, axes, composer)
    groups = side_by_side(points, most)
    return points, lay_out(groups, axes, sharing(groups, share), Path("S"), composer, named)


def trained_by(composer, args):
    """The SAEs that a command of `train` trains: name -> what it is."""
    config = to_config(composed := composer(args[1:]))
    return config, {member.name: member for member in members(config, composed)}


def same_sae(one, other):
    return (one.hook, one.target, one.start, one.seed, one.sae, one.optim) == (
        (other.hook, other.target, other.start, other.seed, other.sae, other.optim)
    )


def test_axes_of_the_sae_alone_make_one_run(composer):
    """Every kind of thing a member may differ in, files of conf/ with their own defaults included."""
    varied = ["sae=linear,gated", "k=3,5", "run.seed=0,7", "hook=resid_post.1,mlp_out.0"]
    points, layout = laid_out(composer, [*LIVE, "optim=schedule_free", *varied])
    (run,) = layout.runs
    assert layout.harvests == () and run.name == "grid" and len(run.members) == len(points) == 16
    config, found = trained_by(composer, run.args)
    assert config.run.dir == "S/runs/grid"
    for point, name in zip(points, run.members, strict=True):
        assert run.members[name] == point.values
        (own,), alone = point.members, point.config
        assert same_sae(found[name], own), name
        assert found[name].optim.decay == 0  # of conf/optim/schedule_free.yaml
        alone.run.seed = config.run.seed
        assert (alone.model, alone.corpus, alone.train) == (config.model, config.corpus, config.train)


def test_k_is_the_target_l0_of_activations_without_a_k(composer):
    points, layout = laid_out(composer, [*LIVE, "activation=topk,jumprelu", "k=3,5"])
    _, found = trained_by(composer, layout.runs[0].args)
    activations = {name: member.sae.activation for name, member in found.items()}
    assert activations["activationtopk-k5"].k == 5
    assert activations["activationjumprelu-k3"].target_l0 == 3.0
    assert len(points) == 4


def test_axes_of_the_run_make_a_run_for_each_combination_over_rows_harvested_once(composer):
    args = [*LIVE, "train.tokens=640,1280", "eval.tokens=100,300", "k=3,5"]
    _, layout = laid_out(composer, args)
    names = ["tokens640-tokens100", "tokens640-tokens300", "tokens1280-tokens100", "tokens1280-tokens300"]
    assert [run.name for run in layout.runs] == names
    assert [list(run.members) for run in layout.runs] == [["k3", "k5"]] * 4
    (harvest,) = layout.harvests
    config = to_config(compose("harvest", list(harvest.args[1:])))
    assert (config.train.tokens, config.eval.tokens, config.hook, config.out) == (
        (1280, 300, ["resid_post.1"], "S/shards")
    )
    for run in layout.runs:
        config, _ = trained_by(composer, run.args)
        assert (run.shards, config.source.name, config.source.path) == (0, "shards", "S/shards")


def test_hooks_are_read_from_shards_by_the_names_that_rows_have_there(composer):
    args = [*LIVE, "hook=blocks.1.hook_resid_post,mlp_out.0", "train.tokens=640,1280"]
    _, layout = laid_out(composer, args)
    config = to_config(compose("harvest", list(layout.harvests[0].args[1:])))
    assert config.hook == ["resid_post.1", "mlp_out.0"]
    _, found = trained_by(composer, layout.runs[0].args)
    assert [member.hook for member in found.values()] == ["resid_post.1", "mlp_out.0"]


@pytest.mark.parametrize(
    "axis", ["corpus.seed=0,1", "model.dtype=float32,bfloat16", "filter.sinks=true,false"]
)
def test_an_axis_that_changes_the_rows_gives_each_of_its_values_a_harvest(composer, axis):
    _, layout = laid_out(composer, [*LIVE, axis, "k=3,5"])
    assert layout.harvests == () and len(layout.runs) == 2
    _, layout = laid_out(composer, [*LIVE, axis, "train.accumulate=1,2"])
    assert [harvest.name for harvest in layout.harvests] == ["shards-0", "shards-1"]
    assert [run.shards for run in layout.runs] == [0, 0, 1, 1]


def test_a_grid_too_large_for_a_run_is_split_over_the_same_rows(composer):
    _, layout = laid_out(composer, [*LIVE, "k=3,4,5", "lr=1e-3,2e-3"], most=2)
    assert [run.name for run in layout.runs] == ["k3", "k4", "k5"]
    assert [run.shards for run in layout.runs] == [0, 0, 0]
    _, layout = laid_out(composer, [*LIVE, "k=3,4,5", "lr=1e-3,2e-3"], most=4)
    assert [list(run.members) for run in layout.runs] == (
        [["k3-lr0.001", "k3-lr0.002", "k4-lr0.001", "k4-lr0.002"], ["lr0.001", "lr0.002"]]
    )
    assert [run.name for run in layout.runs] == ["grid", "k5"]


def test_members_hooks_and_grids_of_the_command_are_kept_for_every_point(composer):
    saes = "saes={a: {}, b: {seed: 3, sae: {name: gated}}}"
    _, layout = laid_out(composer, [*LIVE, saes, "lr=1e-3,2e-3"])
    _, found = trained_by(composer, layout.runs[0].args)
    assert {name: (m.sae.name, m.seed, m.optim.lr) for name, m in found.items()} == {
        "a-lr0.001": ("linear", 0, 0.001),
        "b-lr0.001": ("gated", 3, 0.001),
        "a-lr0.002": ("linear", 0, 0.002),
        "b-lr0.002": ("gated", 3, 0.002),
    }
    _, layout = laid_out(composer, [*LIVE, "hook=[resid_post.1,mlp_out.0]", "lr=1e-3,2e-3"])
    _, found = trained_by(composer, layout.runs[0].args)
    assert [m.hook for m in found.values()] == ["resid_post.1", "mlp_out.0"] * 2


def test_sharing_can_be_asked_for_and_refused(composer):
    _, layout = laid_out(composer, [*LIVE, "train.tokens=640,1280"], share=False)
    assert layout.harvests == () and {run.shards for run in layout.runs} == {None}
    _, layout = laid_out(composer, [*LIVE, "k=3,5"], share=True)
    assert len(layout.harvests) == 1 and layout.runs[0].shards == 0
    with pytest.raises(InputError, match=r"sweep\.share"):
        laid_out(composer, [*SHORT, "k=3,5"], share=True)


def test_runs_on_rows_that_are_not_harvested_share_nothing(composer):
    _, layout = laid_out(composer, [*SHORT, "train.tokens=640,1280"])
    assert layout.harvests == () and [run.name for run in layout.runs] == ["tokens640", "tokens1280"]


def test_values_that_names_cannot_tell_apart_are_refused(composer):
    with pytest.raises(InputError, match="names can tell apart"):
        laid_out(composer, [*LIVE, "lr=0.00100000001,0.00100000002"])


def test_an_unknown_key_of_an_axis_is_named_with_what_was_meant(composer):
    with pytest.raises(InputError, match=r"sae\.activation\.kk.*did you mean sae\.activation\.k"):
        laid_out(composer, [*LIVE, "sae.activation.kk=3,5"])
