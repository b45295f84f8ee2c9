"""This project, in a process of its own: the card's first snippet."""

import torch
from work import Peer, work

from sae_train.sae.base import SAE


def both(sae: SAE) -> Peer:
    return lambda x: sae.encode(x).dense(), lambda x, codes: sae(x)


if __name__ == "__main__":
    torch.set_num_threads(1)
    work(wrap=both)
