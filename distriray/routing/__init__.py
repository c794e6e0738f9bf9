"""The choice of a gang for every request: pure functions, the same in hosts, router and simulator."""
