"""The peer of the engine benchmark: `ray.serve.llm` on the same model and engine settings.

    python -m tests.benchmarks.ray_serve_llm MODEL_FOLDER ENGINE_ARGS_JSON --name NAME --port PORT

Prints `ready` when it serves, and ends on SIGTERM. It needs packages that Shoal does not: `engine` puts them
into a folder of their own and on this module's PYTHONPATH.
"""

import argparse
import json
import os
import signal
import threading

import ray
from ray import serve
from ray.serve.llm import LLMConfig, build_openai_app


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("engine_args", type=json.loads)
    parser.add_argument("--name", required=True)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    ray.init(address="local", num_cpus=4, include_dashboard=False)
    config = LLMConfig(
        model_loading_config={"model_id": options.name, "model_source": options.model},
        accelerator_type=None,
        placement_group_config={"bundles": [{"CPU": 1}]},  # no GPU
        deployment_config={"num_replicas": 1, "max_ongoing_requests": 64},
        engine_kwargs=options.engine_args,
        # Ray gives its workers OMP_NUM_THREADS of its own otherwise.
        runtime_env={"env_vars": {name: os.environ[name] for name in os.environ if _matters(name)}},
    )
    serve.start(http_options={"host": "127.0.0.1", "port": options.port})
    serve.run(build_openai_app({"llm_configs": [config]}), name="llm", route_prefix="/")
    print("ready", flush=True)
    stop.wait()
    serve.shutdown()
    ray.shutdown()


def _matters(name: str) -> bool:
    return name.startswith(("VLLM_", "OMP_", "TORCHDYNAMO_", "HF_"))


if __name__ == "__main__":
    main()
