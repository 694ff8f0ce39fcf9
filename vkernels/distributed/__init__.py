"""Any VideoMask over several ranks, on torch.distributed (docs/distributed.md)."""

from vkernels.distributed.attention import attention
from vkernels.distributed.cost import backward_cost, forward_cost
from vkernels.distributed.decode import decode_attention
from vkernels.distributed.divided import divided_attention, own_grid, take, trade
from vkernels.distributed.exchange import traffic
from vkernels.distributed.shards import ShardPlan, plan_shards
from vkernels.distributed.tokens import gather_tokens, scatter_tokens

__all__ = [
    "ShardPlan",
    "attention",
    "backward_cost",
    "decode_attention",
    "divided_attention",
    "forward_cost",
    "gather_tokens",
    "own_grid",
    "plan_shards",
    "scatter_tokens",
    "take",
    "trade",
    "traffic",
]
