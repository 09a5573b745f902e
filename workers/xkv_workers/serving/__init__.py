"""The server on Ray Serve: a stateless HTTP ingress, and replicas that own a model each."""
