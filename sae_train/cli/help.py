"""What `sae-train --help` prints. It needs nothing heavy, so it prints at once."""

OVERVIEW = """\
sae-train: train sparse autoencoders on the activations of Hugging Face models

usage: sae-train COMMAND [key=value ...]

commands:
{verbs}

start here:
  sae-train train experiment=demo                    a real SAE in minutes, on a laptop
  sae-train train model.name=EleutherAI/pythia-70m hook=resid_post.3 corpus.name=monology/pile-uncopyrighted
  sae-train plan experiment=demo                     what that will need: memory, disk, time
  sae-train harvest experiment=demo out=shards       activations once ...
  sae-train train experiment=demo source=shards source.path=shards    ... any number of SAEs
  sae-train COMMAND --help                           every key of a command, with its default
  sae-train train experiment=demo --cfg job          the composed configuration, nothing run

exit codes: 0 done, 2 wrong input (one line says what), 3 numbers went bad,
            75 stopped early and saved (run the same command again), 130/143 second interrupt
"""


def overview(verbs: dict[str, str]) -> str:
    width = max(map(len, verbs))
    return OVERVIEW.format(verbs="\n".join(f"  {name:<{width}}  {text}" for name, text in verbs.items()))
