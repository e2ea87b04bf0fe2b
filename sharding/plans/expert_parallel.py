"""All devices share the experts of a mixture; for all else they are fully sharded."""

from ..plan import Plan


def plan(devices: int) -> Plan:
    return Plan(expert=devices)
