"""What people run today: the same models in PyTorch, decoded the way the public MAR and CSpD code does it."""
