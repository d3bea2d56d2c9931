"""The peers, and the weights and models that all contenders work on."""
