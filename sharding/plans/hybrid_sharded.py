"""Groups of up to eight neighbours share a copy of the model; between the groups only gradients travel (HSDP)."""

import math

from ..plan import Plan

NEIGHBOURS = 8


def plan(devices: int) -> Plan:
    fsdp = math.gcd(devices, NEIGHBOURS)
    return Plan(data=devices // fsdp, fsdp=fsdp)
