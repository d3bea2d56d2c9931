"""Keep an optimizer's states in a file, for states larger than memory: python examples/page_file.py FOLDER

Runs a small model through some steps, saves the optimizer, and goes on from there as a second process would.
"""

import sys
from pathlib import Path

import torch
from torch import nn

from qlora_kernels import PagedAdamW, quantize_model


def make(folder: Path) -> tuple[nn.Module, PagedAdamW]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(256, 128), nn.Linear(128, 512), nn.GELU(), nn.Linear(512, 256))
    quantize_model(model, rank=64, alpha=64, progress=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    # The file has no name in the folder, and its room is given back when the optimizer goes.
    return model, PagedAdamW(trained, lr=1e-2, page_file=folder)


def train(model: nn.Module, optimizer: PagedAdamW, steps: int) -> float:
    text = torch.tensor(list(b"the quick brown fox jumps over the lazy dog. " * 8))
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(text[:-1]), text[1:])
        loss.backward()
        optimizer.step()
    return loss.item()


def main(folder: str) -> tuple[float, float]:
    states = Path(folder)
    states.mkdir(parents=True, exist_ok=True)
    model, optimizer = make(states)
    first = train(model, optimizer, 10)
    print(f"{optimizer.arena_bytes / 2**20:.1f} MiB of states, {optimizer.paging}")
    optimizer.page_out()  # writes the states and gives their memory back, as before a long evaluation
    print(f"{optimizer.resident_bytes() / 2**20:.1f} MiB of them in memory after page_out()")
    torch.save(model.state_dict(), states / "model.pt")
    optimizer.save(states / "optimizer.pt")  # the old file or the new one, whenever the process is killed

    model, optimizer = make(states)
    model.load_state_dict(torch.load(states / "model.pt"))
    optimizer.load(states / "optimizer.pt")
    second = train(model, optimizer, 10)
    print(f"loss {first:.3f} after 10 steps, {second:.3f} after 10 more")
    return first, second


if __name__ == "__main__":
    main(*sys.argv[1:])
