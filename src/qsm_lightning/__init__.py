"""Q-score matching for diffusion policies: a PyTorch Lightning trainer on TorchRL and MuJoCo."""
