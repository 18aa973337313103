"""The fit behind the rank-one route: what it is fitted on, how, and what it is off by."""
