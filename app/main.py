"""The application builders: which actor runs with which, and the only `.bind()`.

Serve config files name them as `import_path`. What `deployments:` says in such a file wins over the defaults
here. This module must not import annotations from `__future__`: Ray reads the builders' annotations to
validate `args`, and would pass a raw dict otherwise.
"""

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from actors.batching_queue import BatchingQueue
from actors.embedder import Embedder
from actors.gateway import Gateway
from actors.handles.embedder import EMBEDDER_DEPLOYMENT
from actors.handles.llm import LLM_DEPLOYMENT
from actors.handles.queue import QUEUE_DEPLOYMENT
from actors.handles.retriever import RETRIEVER_DEPLOYMENT
from actors.job_runner import JobRunner
from actors.llm_replica import LLMReplica
from actors.local_services import ChromaServer, NoLocalServices, ValkeyServer
from actors.ready_gate import ReadyGate
from actors.retriever import Retriever
from app.api import build_api
from app.batch_lines import BatchLines
from app.config import GatewayArgs, LocalServicesArgs, ModelArgs, ReadyArgs, RetrievalArgs

# Calls that wait would poll in Serve's router; nothing may wait there, so no bound of Serve's is ever met.
_UNBOUNDED = 100_000
_COMMON = {
    "max_ongoing_requests": _UNBOUNDED,
    "ray_actor_options": {"num_cpus": 0.1},
    "health_check_period_s": 2,
    "health_check_timeout_s": 10,
    "logging_config": {
        "enable_access_log": False
    },  # the gateway logs requests; calls between actors are frames
}

_GRANT_ROUTER = RequestRouterConfig(
    request_router_class="actors.handles.grant_router:GrantRouter",
    initial_backoff_s=0.005,
    max_backoff_s=0.05,
)


def build_gateway(args: GatewayArgs) -> Application:
    """The API layer with HTTP joined to it; the only deployment that answers HTTP."""
    deployment = serve.deployment(
        name="Gateway",
        graceful_shutdown_timeout_s=args.max_timeout_s,
        **_COMMON,
    )(serve.ingress(build_api)(Gateway))
    return deployment.bind(args)


def build_model(args: ModelArgs) -> Application:
    """One model: its queue at the root, its pool of engines under it."""
    pool = serve.deployment(
        name=LLM_DEPLOYMENT,
        request_router_config=_GRANT_ROUTER,
        graceful_shutdown_timeout_s=600,
        **_COMMON,
    )(LLMReplica)
    queue = serve.deployment(
        name=QUEUE_DEPLOYMENT,
        graceful_shutdown_timeout_s=1,  # soft state: the next owner learns it from replicas and gateways
        graceful_shutdown_wait_loop_s=0.1,
        **_COMMON,
    )(BatchingQueue)
    return queue.bind(args.model, args.queue, pool.bind(args.model, args.engine, args.cache_dir.expanduser()))


def build_local_services(args: LocalServicesArgs) -> Application:
    """Valkey and Chroma, each unless an outside one is named: then nothing is started."""
    wanted = [
        (ValkeyServer, args.valkey, args.storage.redis_url),
        (ChromaServer, args.chroma, args.storage.chroma_url),
    ]
    root = None
    for server, config, outside_url in wanted:
        if outside_url is None:
            # The last one is the root and holds the other: a root of its own would be one more process.
            deployment = serve.deployment(
                name=server.__name__,
                graceful_shutdown_wait_loop_s=0.1,  # it is called over TCP: Serve sees nothing under way
                **_COMMON,
            )(server)
            root = deployment.bind(args.with_storage(config), beside=root)
    return root or serve.deployment(name="NoLocalServices", **_COMMON)(NoLocalServices).bind()


def build_ready(args: ReadyArgs) -> Application:
    """The last word of a cluster behind KubeRay: it runs when the nodes take traffic."""
    return serve.deployment(name="ReadyGate", **_COMMON)(ReadyGate).bind(args)


def build_retrieval(args: RetrievalArgs) -> Application:
    """The retrieval stages: search at the root, the embedding model and the ingestion runners beside it."""
    embedder = serve.deployment(name=EMBEDDER_DEPLOYMENT, **_COMMON)(Embedder).bind(args.embedder)
    runner = serve.deployment(
        name="JobRunner",
        graceful_shutdown_timeout_s=30,
        graceful_shutdown_wait_loop_s=0.1,  # nobody calls it: it ends, and gives its jobs back, while the rest is up
        **_COMMON,
    )(JobRunner)
    retriever = serve.deployment(name=RETRIEVER_DEPLOYMENT, **_COMMON)(Retriever)
    return retriever.bind(
        args.with_storage(args.retriever),
        beside=(embedder, runner.bind(args.with_storage(args.jobs), BatchLines)),
    )
