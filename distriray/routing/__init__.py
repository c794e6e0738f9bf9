"""Which request runs on which gang: pure functions, the same in hosts, in the router and in the simulator."""
