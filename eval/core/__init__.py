"""CORE (Li et al. 2024, DataComp-LM, https://arxiv.org/abs/2406.11794): 22 tasks, centered by what guessing scores."""
