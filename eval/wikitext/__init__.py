"""WikiText (Merity et al. 2016, https://arxiv.org/abs/1609.07843): perplexity of Wikipedia's best articles."""
