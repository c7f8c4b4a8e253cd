"""Print as JSON what `load_items("hub")` returns in this process's environment, and how long it takes."""

import json
import time

from eval.hellaswag.task import load_items

start = time.perf_counter()
items, source = load_items("hub")
result = {"seconds": time.perf_counter() - start, "n": len(items), "label": items[-1].label}
print(json.dumps(result | {name: getattr(source, name) for name in ("is_sample", "description", "sha256")}))
