"""How each family of models feeds its backbone."""
