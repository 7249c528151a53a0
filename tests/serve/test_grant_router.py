"""Contract of `GrantRouter` with Ray 2.60's alpha API `RequestRouter`: a call goes to the replica it names."""

import ray
from ray.serve._private.request_router.request_router import RequestRouter

from actors.handles.grant_router import GrantRouter


def test_the_version_of_ray_that_this_was_written_for_is_installed():
    assert ray.__version__ == "2.60.0", "read RequestRouter again, then change this line"


def test_the_base_class_has_what_the_router_overrides_and_uses():
    for name in ("choose_replicas", "update_replicas", "on_replica_actor_died"):
        assert name in vars(RequestRouter)
        assert name in vars(GrantRouter)
