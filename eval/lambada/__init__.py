"""
LAMBADA (Paperno et al. 2016, https://arxiv.org/abs/1606.06031): the last word of a passage, from all that comes before.

    task.py             the passages, OpenAI's variant of them, and the words' log-likelihoods
    word_prediction.py  the arithmetic: accuracy and perplexity
    lambada.py          the same as a metric: `evaluate.load("eval/lambada")`
"""
