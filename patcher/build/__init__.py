"""The build, local or on the Hub alone, and what is done with its result later: reproduce it, take it back."""
