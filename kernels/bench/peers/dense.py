"""The same recipe in dense torch: linear, topk, scatter, linear, plain autograd."""

import torch
from peers.protocol import Job, Start, Step, serve
from torch import Tensor, nn
from torch.nn import functional


def build(job: Job, start: Start) -> Step:
    params = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    w_enc, b_enc, w_dec, b_dec = (params[name] for name in ("w_enc", "b_enc", "w_dec", "b_dec"))
    adam = torch.optim.Adam(params.values(), lr=job.lr, fused=True)

    def step(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=job.bf16):
            pre = functional.linear(x - b_dec, w_enc, b_enc).relu()
            top = pre.topk(job.k, dim=-1, sorted=False)
            codes = torch.zeros_like(pre).scatter(1, top.indices, top.values)
            x_hat = codes @ w_dec + b_dec
            loss = (x - x_hat.float()).square().sum(dim=-1).mean()
        adam.zero_grad(set_to_none=True)
        (loss / x.shape[1]).backward()
        with torch.no_grad():
            grad = w_dec.grad
            grad -= (grad * w_dec).sum(dim=-1, keepdim=True) * w_dec
            nn.utils.clip_grad_norm_(params.values(), 1.0)
            adam.step()
            w_dec.div_(w_dec.norm(dim=-1, keepdim=True))
        return loss.detach()

    return step


if __name__ == "__main__":
    serve("torch", build)
