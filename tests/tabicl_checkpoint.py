"""Trains the small TabICL network of tests/data/tabicl_tiny.ckpt on random linear rules; takes a few CPU minutes.

python tests/tabicl_checkpoint.py FILE
"""

import sys

import torch
from tabicl._model.tabicl import TabICL

MAX_CLASSES = 5
SIZES = dict(max_classes=MAX_CLASSES, embed_dim=16, ff_factor=2, col_num_blocks=1, col_nhead=2, col_num_inds=8)
SIZES |= dict(row_num_blocks=1, row_nhead=2, row_num_cls=2, icl_num_blocks=2, icl_nhead=2)
STEPS, TABLES, ROWS, CONTEXT = 2500, 8, 72, 48


def random_tables():
    "Tables (8, 72, F) and classes of a noisy linear score, cut at random quantiles; some columns are noise."
    n_features, n_classes = torch.randint(2, 7, (1,)).item(), torch.randint(2, MAX_CLASSES + 1, (1,)).item()
    X = torch.randn(TABLES, ROWS, n_features)
    weights = torch.randn(TABLES, n_features, 1) * (torch.rand(TABLES, n_features, 1) < 0.6)
    score = (X @ weights).squeeze(-1) + 0.3 * torch.randn(TABLES, ROWS)
    shares = torch.distributions.Dirichlet(torch.full((n_classes,), 2.0)).sample()
    cuts = torch.quantile(score, shares.cumsum(0)[:-1].clamp(0, 1), dim=1)
    codes = torch.stack([torch.randperm(n_classes) for _ in range(TABLES)])
    return X, codes.gather(1, (score > cuts[..., None]).sum(0))


def train():
    torch.manual_seed(0)
    network = TabICL(**SIZES)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, STEPS)
    for step in range(STEPS):
        X, y = random_tables()
        logits = network(X, y[:, :CONTEXT].float())
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y[:, CONTEXT:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(step + 1, round(loss.item(), 3), flush=True)
    return network


if __name__ == "__main__":
    torch.save(dict(config=SIZES, state_dict=train().state_dict()), sys.argv[1])
