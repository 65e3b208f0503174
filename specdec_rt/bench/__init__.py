"""Where the time goes: requests on a clock, calls by graph, and what that predicts."""
