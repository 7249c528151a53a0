"""A Ray cluster for tests, in a process of its own: started with a Serve config, ended by SIGTERM.

    python -m tests.cluster CONFIG.yaml [--cpus N]

Prints one JSON line when every application runs: {"http": URL, "dashboard": URL, "metrics": URL, "address": of the
cluster}. Tests talk to it as users do, over HTTP and the dashboard's REST API: no driver in the test process.
"""

import argparse
import json
import signal
import sys
import threading
import time
from pathlib import Path

import ray
import yaml
from ray import serve
from ray.serve._private.api import serve_start
from ray.serve.schema import ServeDeploySchema


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("--cpus", type=float, default=16)  # logical: actors ask for fractions
    options = parser.parse_args()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    config = yaml.safe_load(options.config.read_text())
    address = ray.init(
        address="local",  # a cluster of its own, whatever else runs on this machine
        num_cpus=int(options.cpus),
        include_dashboard=True,
        _system_config={"metrics_report_interval_ms": 500},  # tests look at metrics; the default is 10 s
    ).address_info
    schema = ServeDeploySchema.model_validate(config)
    client = serve_start(  # what `serve run` does with a config file
        http_options=schema.http_options.model_dump(),
        proxy_location=schema.proxy_location,
        grpc_options=schema.grpc_options.model_dump(),
        controller_options=schema.controller_options,
    )
    client.deploy_apps(schema)  # `_blocking` gives up after 60 s, which a machine full of other work needs
    _wait_for({app.name for app in schema.applications})
    client.wait_for_proxies_serving(wait_for_applications_running=True)
    ready = {
        "http": f"http://{schema.http_options.host}:{schema.http_options.port}",
        "dashboard": f"http://{address['webui_url']}",
        "address": address["gcs_address"],
        "metrics": f"http://127.0.0.1:{address['metrics_export_port']}/metrics",
    }
    print(json.dumps(ready), flush=True)
    while not stop.wait(1):
        pass
    ray.shutdown()  # all processes at once; how a system ends in order is for the tests of `serve run`


def _wait_for(names: set[str]) -> None:
    """Until all applications run; who started this process waits with a bound."""
    while True:
        states = {name: app.status for name, app in serve.status().applications.items()}
        if failed := [name for name, state in states.items() if state == "DEPLOY_FAILED"]:
            sys.exit(f"these applications could not be deployed: {', '.join(failed)}")
        if all(states.get(name) == "RUNNING" for name in names):
            return
        time.sleep(0.2)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    main()
