"""Up to eight neighbours share each product, the rest is fully sharded (Megatron-LM, arXiv:1909.08053)."""

import math

from ..plan import Plan

NEIGHBOURS = 8


def plan(devices: int) -> Plan:
    tensor = math.gcd(devices, NEIGHBOURS)
    return Plan(fsdp=devices // tensor, tensor=tensor)
