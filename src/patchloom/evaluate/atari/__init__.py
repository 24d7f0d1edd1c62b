"""Reinforcement learning on Atari games: what judges an encoder that is to see for an agent."""
