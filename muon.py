"""Muon: momentum whose direction is made orthogonal, for the matrices inside the Transformer blocks.

A helper of train.py. The method is Keller Jordan's (kellerjordan.github.io/posts/muon). torch.optim.Muon
iterates in bf16, one matrix at a time and on every rank: on a CPU without bf16 arithmetic that alone takes
longer than the rest of our training step (LOG.md). Here matrices of one shape are one batched product, in the
dtype that the machine multiplies fast, and the ranks share the work. Of matrices that are sharded over ranks
(parallel.shard) the whole direction is gathered for it.
"""
import torch
import torch.distributed as dist

from parallel import local, own_part, whole


def orthogonalise(x, n_iter):
    """x (K, m, n) -> (K, m, n): each matrix with its singular values pushed towards 1, its vectors kept.

    Newton-Schulz with the quintic a x + b x^3 + c x^5, whose coefficients lift small singular values fast:
    after 5 rounds nearly all lie between 0.7 and 1.2, after 3 the smallest still lag behind.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x                                                 # (K, m, n) with m <= n
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(n_iter):
        gram = x @ x.mT                                                     # (K, m, m)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """step(): p -= lr * sqrt(max(1, rows / columns)) * orthogonalise(nesterov momentum of the gradient)."""

    def __init__(self, params, lr, momentum=0.95, n_iter=5, weight_decay=0.0, dtype=torch.float32):
        super().__init__(list(params), dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.n_iter, self.dtype = n_iter, dtype         # of the iteration

    @torch.no_grad()
    def step(self):
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        for group in self.param_groups:
            by_shape = {}               # a matrix and its transpose go through the same product
            for p in group["params"]:
                by_shape.setdefault(tuple(sorted(p.shape)), []).append(p)
            for shape, params in by_shape.items():
                directions = []
                for p in params:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    momentum.lerp_(p.grad, 1 - group["momentum"])
                    direction = whole(p.grad.lerp(momentum, group["momentum"]))
                    directions.append(direction.mT if p.shape != shape else direction)
                share = -(-len(params) // world)            # matrices per rank; the last rank may get fewer
                mine = directions[rank * share:(rank + 1) * share]
                stack = torch.zeros(share, *shape, dtype=self.dtype, device=params[0].device)
                if mine:
                    stack[:len(mine)] = orthogonalise(torch.stack(mine).to(self.dtype), self.n_iter)
                parts = [stack]
                if world > 1:
                    parts = [torch.empty_like(stack) for _ in range(world)]
                    dist.all_gather(parts, stack)
                for p, update in zip(params, torch.cat(parts)):
                    update = own_part(p, (update.mT if p.shape != shape else update).to(p.dtype))
                    local(p).mul_(1 - group["lr"] * group["weight_decay"])
                    local(p).add_(update, alpha=-group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)
