"""LAMBADA (Paperno et al. 2016, https://arxiv.org/abs/1606.06031): predict the last word of a passage."""
