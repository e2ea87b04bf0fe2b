"""Up to four stages, one forward and one backward pass in turn (arXiv:1806.03377); each stage is fully sharded."""

import math

from ..plan import Plan

STAGES = 4


def plan(devices: int) -> Plan:
    stage = math.gcd(devices, STAGES)
    return Plan(stage=stage, fsdp=devices // stage, schedule="1f1b")
