"""HellaSwag (Zellers et al. 2019, https://arxiv.org/abs/1905.07830): which of four endings follows the context?

task.py         the items (from the Hub, a .jsonl file, or sample.jsonl: 40 items written for this project), and their
                endings' log-likelihoods, for build-nanogpt's prompt and lm-eval's
accuracy.py     acc, acc_norm and their standard errors
hellaswag.py    the same as a metric: `evaluate.load("eval/hellaswag")`
"""
