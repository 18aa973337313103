"""Programs that run alone, in a stock environment: none of them imports this package."""
