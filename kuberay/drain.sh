#!/bin/bash
# preStop of a worker pod: Serve starts this node's replicas elsewhere, then their streams end in peace. Without it
# Kubernetes' SIGTERM ends the raylet and every stream with it. The pod's terminationGracePeriodSeconds is the limit.
#   shoal-drain SECONDS    the time the replicas have
set -u
proc=${PROC:-/proc} # tests bring their own

ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "the pod is being deleted" \
  --deadline-remaining-seconds "$1" || exit 0 # no head, nobody to take over: do not hold the deletion

# Replicas leave when their last stream has ended; clients of this node's proxy may be served by other nodes.
busy() {
  grep -alqs '^ray::ServeReplica' "$proc"/[0-9]*/cmdline ||
    awk '$2 ~ /:1F40$/ && $4 == "01" { found = 1 } END { exit !found }' "$proc/net/tcp" "$proc/net/tcp6"
}
until ! busy; do sleep 1; done
