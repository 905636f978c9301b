"""Library notebooks: test them, refresh their outputs, make the README.

    python .ci/notebooks.py test      house rules, every library notebook in a process of its own, closing line `N passed, N failed`
    python .ci/notebooks.py refresh   execute the library notebooks and store their outputs
    python .ci/notebooks.py readme    README.md from nbs/index.ipynb
"""
import concurrent.futures, os, re, subprocess, sys, threading, time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import check

ROOT = Path(__file__).resolve().parent.parent
WORKERS, LIMIT = 2, 300   # notebooks at a time; seconds after which one has failed
GUESS = 15                # seconds, for the time left

def clock(seconds): return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"

def environment():
    "One thread a worker, nothing from the network, this environment's tools first."
    threads = {f"{lib}_NUM_THREADS": "1" for lib in ("OMP", "MKL", "OPENBLAS")}
    return {**os.environ, **threads, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "agg",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

def notebooks(): return [*check.library(ROOT), *sorted((ROOT / "nbs").glob("index.ipynb"))]

def each(items, work, label):
    "Run `work` on all items, two at a time; print each result with the time left; return the number that failed."
    start, done, failed, lock = time.monotonic(), [], [], threading.Lock()
    def one(item):
        began = time.monotonic()
        ok, text = work(item)
        took = time.monotonic() - began
        with lock:
            done.append(took)
            if not ok: failed.append(item)
            left = (len(items) - len(done)) * (sum(done) / len(done)) / WORKERS
            print(f"[{len(done)}/{len(items)}, about {clock(left)} left] {'ok  ' if ok else 'FAIL'} {label(item)} {took:.1f} s", flush=True)
            if text and not ok: print(text, flush=True)
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool: list(pool.map(one, items))
    print(f"{len(items)} in {clock(time.monotonic() - start)}", flush=True)
    return len(failed)

def run_tests(path):
    "nbdev_test of one notebook in a fresh process; its unseeded weights are the same ones every time."
    command = [sys.executable, "-c", "import sys, torch; torch.manual_seed(0); from nbdev.test import nbdev_test; nbdev_test.__wrapped__(path=sys.argv[1], n_workers=0)", str(path)]
    try: run = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired: return False, f"stopped after {LIMIT} s"
    return run.returncode == 0, (run.stdout + run.stderr)[-6000:]

def test():
    print(f"house rules, then {len(notebooks())} notebooks, {WORKERS} at a time (about {clock(60 + len(notebooks()) * GUESS / WORKERS)} in all)", flush=True)
    failed = int(check.selftest() > 0)
    results = check.check(ROOT)
    for rule, problems in results.items():
        print(f"{'ok  ' if not problems else 'FAIL'} {rule}", flush=True)
        for p in problems: print(f"       {p}", flush=True)
    failed += sum(map(bool, results.values())) + each(notebooks(), run_tests, lambda p: p.stem)
    total = 1 + len(results) + len(notebooks())
    print(f"{total - failed} passed, {failed} failed")
    return int(failed > 0)

def store_outputs(path):
    "Execute one notebook in a fresh kernel and keep its outputs, without counts, times and standard error."
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError
    nb = nbformat.read(path, 4)
    try: NotebookClient(nb, timeout=LIMIT, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
    except CellExecutionError as e: return False, str(e)
    for c in nb.cells:
        c.metadata.pop("execution", None)
        if c.cell_type != "code": continue
        c.execution_count = None
        c.outputs = [o for o in c.outputs if not (o.output_type == "stream" and o.name == "stderr")]
        for o in c.outputs:
            if "execution_count" in o: o["execution_count"] = None
    nb.metadata = nbformat.from_dict(dict(kernelspec=dict(display_name="python3", language="python", name="python3")))
    nbformat.write(nb, path)
    return True, ""

def refresh():
    os.environ.update(environment())
    return int(each(notebooks(), store_outputs, lambda p: p.stem) > 0)

def readme():
    "Markdown of nbs/index.ipynb: hidden cells out, code as fenced blocks, text outputs below them, links as seen from the root."
    parts = ["<!-- made from nbs/index.ipynb by `make readme`; edit that -->"]
    for c in check.cells(ROOT / "nbs" / "index.ipynb"):
        if re.match(r"\s*#\s*\|\s*hide", c["source"]): continue
        if c["cell_type"] == "markdown": parts.append(c["source"].replace("](../", "](").replace('src="../', 'src="')); continue
        source = "\n".join(line for line in c["source"].splitlines() if not re.match(r"#\s*\|", line)).strip()
        if source: parts.append(f"```python\n{source}\n```")
        for o in c["outputs"]:
            text = next((t for t in check.texts(o) if t.strip()), "") if o["output_type"] != "error" else ""
            if text: parts.append(f"```text\n{text.rstrip()}\n```")
    (ROOT / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print("README.md written")
    return 0

if __name__ == "__main__": sys.exit(dict(test=test, refresh=refresh, readme=readme)[sys.argv[1]]())
