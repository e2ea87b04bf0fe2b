"""A run on a Ray cluster: `python deploy/ray_train.py HOSTS GPUS_PER_HOST RECIPE [--SETTING VALUE ...]`.

Ray finds the hosts; on each runs one `twinax train`. All have Twinax installed, and share the disk of the run's output.
"""

import socket
import subprocess
import sys

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy


@ray.remote(num_cpus=1)
class Host:
    def address(self) -> str:
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def train(self, words: list[str]) -> int:
        return subprocess.run(["twinax", "train", *words]).returncode


def main(hosts: int, gpus: int, words: list[str]) -> int:
    ray.init()
    group = placement_group([{"CPU": 1, "GPU": gpus} if gpus else {"CPU": 1}] * hosts, strategy="SPREAD")
    ray.get(group.ready())
    places = [PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index) for index in range(hosts)]
    actors = [Host.options(scheduling_strategy=place, num_gpus=gpus).remote() for place in places]
    flags = ["--coordinator", ray.get(actors[0].address.remote()), "--processes", str(hosts)]
    runs = [actor.train.remote([*words, *flags, "--process", str(index)]) for index, actor in enumerate(actors)]
    return max(ray.get(runs), key=abs)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
