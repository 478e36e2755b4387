"""
Run by test_docs under torchrun, two gloo processes: docs/your_model.md's FSDP2 and Muon. Sharded in
float32 the losses are those of one process. In bfloat16 γ stays float32. What is gathered loads
again, and folds.
"""
import torch
import torch.distributed as dist
from conftest import UNIFIED, tiny_gpt
from test_docs import blocks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

names = {}
for part in ("A small GPT", "FSDP2 and Muon"):
    for code in blocks("docs/your_model.md", part):
        exec(code, names)
SmallGPT, shard, optimizers = names["SmallGPT"], names["shard"], names["optimizers"]

dist.init_process_group("gloo")
rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
idx = torch.randint(61, (4, 16), generator=torch.Generator().manual_seed(0))
part = idx[2 * rank:2 * rank + 2]


def make():
    torch.manual_seed(0)
    return SmallGPT(vocab_size=61, context=16)


def train(model, idx):
    """The mean loss over all processes of each of four steps."""
    losses, steps = [], optimizers(model)
    for _ in range(4):
        loss = F.cross_entropy(model(idx).float().flatten(0, 1), idx.flatten())
        loss.backward()
        for optimizer in steps:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
    losses = torch.stack(losses)
    dist.all_reduce(losses)
    return losses / dist.get_world_size()


sharded, alone = make(), make()
shard(sharded, mesh, low=torch.float32)
torch.testing.assert_close(train(sharded, part), train(alone, idx), rtol=0, atol=1e-4)

low, dtypes = make(), set()
shard(low, mesh)
for m in low.modules():
    if isinstance(m, names["ScaleVector"]):
        m.register_forward_hook(lambda m, x, gamma: dtypes.add(("γ", gamma.dtype)))
for block in low.blocks:  # within its forward pass, when its matrices are gathered
    block.q.scale_in.register_forward_hook(
        lambda m, x, gamma, q=block.q: dtypes.add(("W", q.weight.dtype)))
losses = train(low, part)
assert losses[-1] < losses[0] and dtypes == {("γ", torch.float32), ("W", torch.bfloat16)}, dtypes

state, again = names["gather"](sharded), make()
shard(again, mesh, low=torch.float32)
names["load"](again, state)
expected = sharded(part)  # a collective: on both processes
torch.testing.assert_close(again(part), expected, rtol=0, atol=0)
if rank == 0:
    plain = make()
    plain.load_state_dict(state)
    folded = names["fold_scale_vectors"](plain)
    torch.testing.assert_close(folded(part), expected, rtol=0, atol=1e-5)
gpt, whole = (tiny_gpt(**UNIFIED) for _ in range(2))  # whose γ go in batches, but for shards
for m in (*gpt.layers, gpt):
    fully_shard(m, mesh=mesh)
torch.testing.assert_close(gpt(part)[0], whole(part)[0], rtol=0, atol=1e-5)
dist.destroy_process_group()
print("as the page says")
