"""The service: Ray Serve deployments around hosts, and the HTTP interface in front of them."""
