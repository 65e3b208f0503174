"""How long requests take, where their time goes, and what that predicts of others."""
