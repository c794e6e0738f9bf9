"""A simulator of hosts, gangs and routers, which runs the policies and the router that the service runs."""
