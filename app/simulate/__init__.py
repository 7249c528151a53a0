"""`shoal simulate`: one pool of replicas in discrete events, under our scaling policy and under others."""
