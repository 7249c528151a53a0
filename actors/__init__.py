"""State and replicas: everything that has a replica count, and the decisions and adapters beneath it."""
