"""BLiMP (Warstadt et al. 2020, https://arxiv.org/abs/1912.00582): which of two sentences is grammatical?"""
