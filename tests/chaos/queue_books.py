"""Prints the conservation sum of a model's queue as JSON: run beside a test system, since tests attach no driver.

python -m tests.chaos.queue_books ADDRESS MODEL
"""

import json
import sys

import ray
from ray import serve


def main() -> None:
    address, model = sys.argv[1:]
    ray.init(address=address, log_to_driver=False, logging_level="error")
    queue = serve.get_deployment_handle("BatchingQueue", model)
    print(json.dumps(queue.conservation.remote().result(timeout_s=30)), flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main()
