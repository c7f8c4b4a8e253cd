"""
HellaSwag (Zellers et al. 2019, https://arxiv.org/abs/1905.07830): which of four endings follows the context?

    items.py        the items: from the Hub, a .jsonl file, or sample.jsonl (40 items of this project's own)
    task.py         the endings' log-likelihoods, build-nanogpt's convention
    accuracy.py     the arithmetic: acc, acc_norm and their standard errors
    hellaswag.py    the same as a metric: `evaluate.load("eval/hellaswag")`
"""
