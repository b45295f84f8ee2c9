"""A language model laid over several devices: the rows are the same, and what does not fit is refused.

Here every part lies on the CPU, but behind the hooks that accelerate moves tensors with; with two GPUs or
more the parts really are apart.
"""

import copy

import pytest
import torch
from accelerate import dispatch_model, infer_auto_device_map

from sae_train.cli.main import main
from sae_train.errors import InputError
from sae_train.harvest.harvester import Harvester
from sae_train.harvest.hooks import resolve
from sae_train.harvest.model import DEVICE_MAPS, ModelConfig, check_placed, load_model
from sae_train.harvest.splice import Spliced, splice_reports
from sae_train.harvest.windows import Windows

T = 12
HOOKS = ("resid_post.0", "mlp_out.1", "resid_post.1")


def make_windows() -> Windows:
    """Five windows, the last with padding."""
    tokens = torch.randint(4, 128, (5, T), generator=torch.Generator().manual_seed(0))
    valid = torch.ones_like(tokens, dtype=torch.bool)
    valid[-1, -3:] = False
    return Windows(tokens, valid, tokens == 1, torch.arange(5))


def measured(model: torch.nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Rows of the hooks, and what a reconstruction that halves them costs the model."""
    windows, sites = make_windows(), [resolve(name, model) for name in HOOKS]
    rows = Harvester(model, sites, 2, context_length=T).rows(windows)
    mean = torch.zeros(rows[sites[0].key].shape[-1])
    costs = splice_reports(
        model,
        windows,
        windows.valid.clone(),
        [Spliced(sites[:1], sites[:1], lambda x: x.float() / 2, [mean])],
    )[0]
    return rows, costs


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_model_in_parts_gives_the_rows_and_the_cross_entropies_of_a_whole_one(model_type, tiny_model):
    whole = tiny_model(model_type)
    parts = copy.deepcopy(whole)
    if torch.cuda.device_count() > 1:
        whole = copy.deepcopy(whole).to("cuda:0")
        placed = infer_auto_device_map(parts, max_memory={0: "60KB", 1: "10GB"})
    else:
        placed = {name: "cpu" for name, _ in parts.model.named_children()} if model_type == "llama" else {}
        placed = {f"model.{name}": "cpu" for name in placed} | {"lm_head": "cpu"} if placed else {"": "cpu"}
    parts = dispatch_model(parts, placed, force_hooks=True)
    assert any(hasattr(module, "_hf_hook") for module in parts.modules())
    (rows, costs), (expected, once) = measured(parts), measured(whole)
    assert rows.keys() == expected.keys()
    assert all(torch.equal(rows[key], expected[key]) for key in rows)
    assert costs == once


def test_a_model_is_loaded_into_place(tiny_model_dir):
    model, info = load_model(ModelConfig(name=str(tiny_model_dir("llama")), device_map="balanced_low_0"))
    plain, as_ever = load_model(ModelConfig(name=str(tiny_model_dir("llama"))))
    assert info == as_ever
    for own, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(own.cpu(), other.cpu())


def test_a_model_that_does_not_fit_all_devices_is_refused_by_its_first_part_that_does_not(tiny_model):
    placed = infer_auto_device_map(tiny_model("llama"), max_memory={"cpu": "60KB"})
    assert set(placed.values()) == {"cpu", "disk"}  # so the next line is about what accelerate really says
    with pytest.raises(InputError, match="parts do not fit, from") as told:
        check_placed("auto", {name: where for name, where in placed.items()}, torch.device("cpu"))
    first = next(name for name, where in placed.items() if where == "disk")
    assert f"from {first} on" in str(told.value)
    check_placed("auto", {"": "cpu"}, torch.device("cpu"))
    check_placed("auto", {"a": 0, "b": "cuda:1"}, torch.device("cuda:0"))


@pytest.mark.parametrize(
    ("args", "environment", "said"),
    [
        (["model.device_map=everywhere"], {}, f"one of {', '.join(DEVICE_MAPS)}, or null"),
        (["model.device_map=auto"], {"LOCAL_WORLD_SIZE": "2"}, "one process on each machine; there are 2"),
        (["model.device_map=auto", "train.loss=kl"], {}, "rows with model.device_map"),
    ],
)
def test_what_cannot_be_laid_over_devices_is_one_line(args, environment, said, monkeypatch, capsys, tmp_path):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    keys = ["train", "model.name=nowhere", "corpus.name=none", "hook=resid_post.1", f"run.dir={tmp_path}/run"]
    assert main([*keys, *args]) == 2
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1


def test_a_plan_divides_the_model_s_weights_over_the_devices_and_nothing_else(tiny_model_dir, capsys):
    import json

    keys = [f"model.name={tiny_model_dir('llama')}", "corpus.name=nowhere", "hook=resid_post.1"]
    keys += ["corpus.context_length=16", "sae.d_sae=48", "sae.activation.k=4", "train.tokens=4096"]
    plans = []
    for more in ([], ["model.device_map=balanced", "devices=4"]):
        assert main(["plan", *keys, *more, "format=json", "device=h100"]) == 0
        plans.append(json.loads(capsys.readouterr().out)["parts"])
    whole, divided = (plan.pop("language model, weights")["training"] for plan in plans)
    assert divided == whole // 4
    assert plans[0] == plans[1]
    assert main(["plan", *keys, "devices=4"]) == 2
    assert "devices=4: expected model.device_map with it" in capsys.readouterr().err
